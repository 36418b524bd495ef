"""The optimizers under DDP, FSDP2 and distributed checkpoints, with two gloo processes on this machine.

What this cannot show: NCCL's ordering, overlap, bandwidth, several machines. The checks are functions of
optim_workers.py and optim_ftp_workers.py; two interpreters are started once and run them all.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
WORKERS = "".join((TESTS / name).read_text(encoding="utf-8") for name in ("optim_workers.py", "optim_ftp_workers.py"))
CHECKS = re.findall(r"^@check\ndef (\w+)", WORKERS, re.M)

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """By rank, the traceback of each check, empty where it passed."""
    folder = tmp_path_factory.mktemp("ranks")
    logs = [folder / f"log-{rank}" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "optim_workers.py"), str(rank), str(folder)],
            cwd=TESTS,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.wait(timeout=300)
    finally:
        for process in processes:
            process.kill()
    found = []
    for rank, log in enumerate(logs):
        report = folder / f"outcome-{rank}.json"
        if not report.exists():
            pytest.fail(f"rank {rank} did not start:\n{log.read_text()[-4000:]}")
        found.append(json.loads(report.read_text()))
    return found


def test_there_are_checks() -> None:
    assert len(CHECKS) >= 20


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert name in outcome, f"rank {rank} did not get here: an earlier check ended the run"
        assert outcome[name] == "", f"rank {rank}:\n{outcome[name]}"
