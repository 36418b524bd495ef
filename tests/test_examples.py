"""examples/replace_optimizer.py: an ordinary timm loop keeps its promise when one line of it changes."""

from __future__ import annotations

import importlib.util
import inspect
from types import ModuleType

import pytest
from conftest import ROOT

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("replace_optimizer", ROOT / "examples" / "replace_optimizer.py")
    if spec is None or spec.loader is None:
        pytest.fail("the example is not where it should be")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_does_not_know_its_optimizer(example: ModuleType) -> None:
    loop = inspect.getsource(example.train) + inspect.getsource(example.loss_of)
    assert "optimizer.step()" in loop
    assert "rojected" not in loop
    assert "subspace" not in loop
    lines = [line for line in inspect.getsource(example).splitlines() if "ProjectedAdamW(" in line]
    assert len(lines) == 1
    assert sum("FTPAdamW(" in line for line in inspect.getsource(example).splitlines()) == 1


@pytest.mark.filterwarnings("error")
def test_one_line_keeps_the_first_task(example: ModuleType) -> None:
    results = example.run(epochs=6)
    plain, projected = results["AdamW"], results["ProjectedAdamW"]
    assert plain["inside"] > 0.5
    assert projected["inside"] <= 1e-4
    assert plain["first"] + plain["forgotten"] > 0.8, "the first task was not learned: nothing to forget"
    assert projected["forgotten"] < 0.8 * plain["forgotten"]
    assert projected["second"] > 0.6
    assert results["FTPAdamW"]["forgotten"] < plain["forgotten"]
    assert results["FTPAdamW"]["second"] > 0.6
