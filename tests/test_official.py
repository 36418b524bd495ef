"""The official ways in one place: each is a baseline that is checked before it is timed, FTP's two forms are one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cl_kernels.benchmarks import ftp_variants, official, official_ftp, peers

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def test_every_official_form_is_a_variant_of_some_benchmark() -> None:
    """Where it is checked against float64: test_outputs_are_right_at_small_sizes calls every variant of every room."""
    files = [*FOLDER.glob("bench_*.py"), FOLDER / "step_variants.py", FOLDER / "ftp_variants.py"]
    text = "\n".join(path.read_text() for path in files)
    for name in official.__all__:
        assert f"official.{name}" in text, f"{name} is checked by nothing"
    assert "Released(" in text


@pytest.mark.parametrize("base", ["adam", "sgd"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_timed_form_of_ftp_is_the_recurrence(monkeypatch: pytest.MonkeyPatch, base: str, share: float) -> None:
    """Three steps from the middle of a training, radii at rest: the in-place form with its caches, and the formulas."""
    monkeypatch.setattr(official_ftp, "MU", 0.0)
    s = ftp_variants.State([(6, 5), (7,), (4, 3, 2, 2), (2, 9)], share, "cpu", base)
    for name in ("params", "grads", "first", "second", "anchors", "steps"):
        setattr(s, name, [t.double() for t in getattr(s, name)])
    released = official_ftp.Released(s)
    released.reset()
    rule = official_ftp.adamw() if base == "adam" else official_ftp.sgd(momentum=official_ftp.MOMENTUM, nesterov=True)
    names = [str(i) for i in range(len(s.params))]
    formulas = official_ftp.Recurrence(dict(zip(names, s.params, strict=True)), rule, kappa=1.0)
    formulas.t = int(official_ftp.STEPS)
    for name, anchor, m, v, gamma in zip(names, s.anchors, s.first, s.second, s.gammas, strict=True):
        formulas.anchors[name] = anchor.clone()
        formulas.moments[name] = {"m": m.clone(), "v": v.clone(), "buffer": m.clone()}
        formulas.moments[name] |= {"a": torch.zeros((), dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
        c = official_ftp.rows(formulas.weights[name] - anchor)
        formulas.cached[name] = (c, c.abs().sum(1) + 1e-8)
        formulas.radii[name] = torch.tensor(gamma, dtype=torch.float64)
    start = [p.clone() for p in s.params]
    for _ in range(3):
        released.step()
        formulas.step(dict(zip(names, s.grads, strict=True)), s.lr)
    for name, before, p in zip(names, start, s.params, strict=True):
        assert not torch.equal(before, p)
        assert torch.allclose(formulas.weights[name], p, rtol=0, atol=1e-15)
    assert max(float((a - b).abs().max()) for a, b in zip(start, s.params, strict=True)) > 1e-9, (
        "what is compared to 1e-15"
    )


def test_peers_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_there", lambda package: False)
    assert peers.liger_kl() is None
    assert peers.galore_adamw() is None
