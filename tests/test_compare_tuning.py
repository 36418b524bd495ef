"""How settings are chosen: the rule on made-up trials, and which of a grid are tried."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import pytest

from cl_kernels.compare.arms import ARMS
from cl_kernels.compare.planner import Plan
from cl_kernels.compare.runner import OutOfTime
from cl_kernels.compare.tuning import at_the_edge, candidates, describe, ranked_by_rule, tune


def entry(accuracy: float | None, loss: float | None, lr: float, images: int = 60) -> dict[str, Any]:
    return {
        "options": {"lr": lr}, "validation_accuracy": accuracy, "validation_loss": loss, "validation_images": images,
    }  # fmt: skip


def order(*entries: dict[str, Any]) -> list[float]:
    found = {tuple(one["options"]["lr"] for one in ranked_by_rule(list(turn))) for turn in turns(entries)}
    assert len(found) == 1, "the rule does not depend on the order of the trials"
    return list(found.pop())


def turns(entries: tuple[dict[str, Any], ...]) -> list[list[dict[str, Any]]]:
    rng, made = random.Random(0), []
    for _ in range(6):
        turn = list(entries)
        rng.shuffle(turn)
        made.append(turn)
    return made


def test_the_least_loss_among_accuracies_that_cannot_be_told_apart() -> None:
    assert order(entry(0.933, 0.79, 1e-4), entry(0.90, 0.26, 1e-3)) == [1e-3, 1e-4]


def test_accuracy_decides_where_it_can() -> None:
    assert order(entry(0.93, 0.79, 1e-4), entry(0.70, 0.26, 1e-3)) == [1e-4, 1e-3]
    assert order(entry(0.933, 0.79, 1e-4, 6000), entry(0.90, 0.26, 1e-3, 6000)) == [1e-4, 1e-3]


def test_equals_go_to_the_smaller_learning_rate_and_failures_to_the_end() -> None:
    assert order(entry(0.9, 0.3, 3e-3), entry(0.9, 0.3, 1e-3), entry(None, None, 1e-2)) == [1e-3, 3e-3, 1e-2]


@pytest.mark.parametrize("arm", sorted(ARMS))
@pytest.mark.parametrize("count", [1, 2, 4, 6, 8, 100])
def test_some_of_a_grid_are_different_and_take_part_of_all_of_it(arm: str, count: int) -> None:
    grid = ARMS[arm].grid()
    found = candidates(grid, count)
    assert len(found) == min(count, len(grid))
    assert all(options in grid for options in found)
    assert all(found.count(options) == 1 for options in found)


def test_a_rate_at_the_end_of_its_grid_is_told() -> None:
    grid = ARMS["full"].grid()
    rates = sorted({options["lr"] for options in grid})
    found = [at_the_edge(grid, {"lr": lr, "layer_decay": 1.0}) for lr in rates]
    assert found == ["lowest", None, None, "highest"]
    assert at_the_edge(ARMS["vpt-deep"].grid(), {"optimizer": "sgd", "lr": 1.0, "prompts": 10}) is None


class Rated:
    """In place of a runner: high rates fare best while epochs are few, and fail in the end."""

    def __init__(self) -> None:
        self.session = self.cache = self.budget = self

    def grid(self, arm: Any) -> list[dict[str, Any]]:
        return [{"lr": float(lr)} for lr in range(1, 5)]

    def tune(self, arm: Any, options: dict[str, Any], size: int, repeat: int, epochs: int) -> dict[str, Any]:
        told = None if epochs == 4 else options["lr"] / 10
        return {
            "images": 80, "validation_images": 2000, "validation_accuracy": told, "validation_loss": 1.0,
            "curve": [{"validation_accuracy": told}],
            "status": "done" if told else "failed", "reason": "", "seconds": {"total": 1.0},
        }  # fmt: skip

    def get(self, kind: str, key: Any) -> dict[str, bool]:
        return {"cut": False}


class Stopped(Rated):
    """The budget ends inside the second rung."""

    reserve, cushion = 1.0, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[int, int], bool] = {}
        self.cushions: list[float] = []

    def tune(self, arm: Any, options: dict[str, Any], size: int, repeat: int, epochs: int) -> dict[str, Any]:
        self.cushions.append(self.cushion)
        if epochs == 4:
            raise OutOfTime
        return super().tune(arm, options, size, repeat, epochs)

    def get(self, kind: str, key: Any) -> dict[str, bool]:
        return {"cut": self.kept.get((key["anchor"], key["rung"]), False)}

    def put(self, kind: str, key: Any, value: dict[str, bool], **told: Any) -> None:
        self.kept[key["anchor"], key["rung"]] = value["cut"]

    def spent(self) -> float:
        return 0.0

    stages: ClassVar[dict[str, float]] = {}


def test_a_rung_that_the_budget_ended_stays_ended() -> None:
    """A resumed run must not get further there, and the sweep's time is not for rungs that can be done without."""
    plan = Plan([100], 2, 4, 4, [100], {100: 1}, 100, 10)
    made: Any = Stopped()
    first = tune(made, [ARMS["full"]], plan, 50.0)["full"].entries(100)
    assert made.kept == {(100, 1): True}
    assert made.cushions == [0.0] * 4 + [50.0]
    assert made.cushion == 0.0
    tried = len(made.cushions)
    assert tune(made, [ARMS["full"]], plan, 50.0)["full"].entries(100) == first
    assert len(made.cushions) == tried + 4, "the second rung is not tried again"


def test_settings_that_went_out_stand_behind_those_of_the_last_rung() -> None:
    """The sweep takes the next where one fails: of the two best of the first rung both may."""
    plan = Plan([100], 2, 4, 4, [100], {100: 1}, 100, 10)
    made: Any = Rated()
    found = tune(made, [ARMS["full"]], plan, 0.0)["full"]
    assert [entry["options"]["lr"] for entry in found.entries(100)] == [3.0, 4.0, 2.0, 1.0]
    assert [entry["rung"] for entry in found.entries(100)] == [1, 1, 0, 0]


def test_settings_in_words() -> None:
    assert describe({"lr": 0.001, "prompts": 10, "first": {"lr": 1e-4}}) == 'lr 0.001, prompts 10, first {"lr": 0.0001}'
