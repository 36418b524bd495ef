"""Runs continual runs in forked processes that a test may kill; the imports are paid once.

One JSON object a line on stdin, [when, {"method": ..., more fields of RunConfig}], or with "compare" true the fields
of a CompareConfig; the answer on stdout is the exit
status of the run. `when` is null, or seconds after which it is killed with -9, or "checkpoint": then it gets SIGTERM
when one is there."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from compare_small import run_small
from continual_tiny import tiny_backbone, tiny_config, tiny_data

from cl_kernels import continual
from cl_kernels._timm import import_timm


def serve() -> None:
    import_timm()
    torch.set_num_threads(1)  # no thread is alive when the process forks
    for line in sys.stdin:
        after, config = json.loads(line)
        process = os.fork()
        if process == 0:
            os._exit(child(config))
        # Not waited for yet, so the number is still its own when a signal is sent.
        if after == "checkpoint":
            while not (Path(config["out"]) / "checkpoints" / "last.safetensors").exists():
                time.sleep(0.001)
            os.kill(process, signal.SIGTERM)
        elif after is not None:
            time.sleep(after)
            os.kill(process, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def child(config: dict[str, Any]) -> int:
    """Run; the exit status that the interpreter would give."""
    try:
        if config.pop("compare", False):
            run_small(**config)
            return 0
        continual.run(tiny_config(**config), data=tiny_data(), backbone=tiny_backbone())
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve()
