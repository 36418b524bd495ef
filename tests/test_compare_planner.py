"""Budgets in words, the settings of a comparison, and the plan that fits."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from cl_kernels.compare.config import CompareConfig, describe_seconds, parse_budget
from cl_kernels.compare.planner import (
    BudgetError,
    Plan,
    Rates,
    batch_size,
    cost_of_cell,
    cost_of_sweep,
    cost_of_tuning,
    fits,
    make_plan,
    rungs,
)

ARMS = ("vpt-deep", "full", "linear")
SIZES = [50, 100, 200, 400, 800, 1347]


def rates(scale: float = 1.0) -> Rates:
    def each(value: float) -> dict[str, float]:
        return {"vpt-deep": value, "full": 1.3 * value, "linear": 0.02 * value}

    return Rates(each(1e-3 * scale), each(5e-3 * scale), each(4e-4 * scale), each(0.02 * scale))


def plan(seconds: float, scale: float = 1.0, **changes: Any) -> Plan:
    given: dict[str, Any] = {"spent": 5.0, "reserve": 10.0, "seeds": 3, "most_trials": 8, **changes}
    return make_plan(SIZES, SIZES[-1], 450, rates(scale), ARMS, seconds=seconds, **given)


def cost(made: Plan, scale: float = 1.0) -> float:
    return cost_of_tuning(made, rates(scale), ARMS) + cost_of_sweep(made, rates(scale), ARMS)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10m", 600), ("90s", 90), ("1h30m", 5400), ("1.5h", 5400), ("45", 45), (30.0, 30), ("2M", 120)],
)
def test_budgets_in_words(text: str | float, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "ten", "10 x", "-5", "0", "5m3", "nan", "inf", "40d"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="budget: expected"):
        parse_budget(text)


def test_seconds_are_told_as_budgets_are_read() -> None:
    for seconds in (7, 90, 600, 3600, 5400):
        assert parse_budget(describe_seconds(seconds)) == seconds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arms": ("vpt-deep", "ful")}, "arms: unknown name 'ful'; did you mean full"),
        ({"arms": ("full", "linear")}, "arms: expected at least full and one of vpt-shallow, vpt-deep"),
        ({"arms": ()}, "got none"),
        ({"grid": "papers"}, "grid: unknown name 'papers'; did you mean paper"),
        ({"prefer": "speed"}, "prefer: unknown name 'speed'"),
        ({"seeds": 1}, r"seeds: expected a whole number in 2\.\.20, got 1"),
        ({"threads": 0}, "threads: expected"),
        ({"seed": True}, "seed: expected"),
        ({"resume": True, "overwrite": True}, "not both"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompareConfig(**given)


def test_what_a_resumed_run_may_change() -> None:
    fixed = CompareConfig().fixed()
    assert {"budget", "seed", "arms", "backbone", "data", "grid", "quick"} <= fixed.keys()
    assert not {"prefer", "pictures", "threads", "device", "out", "resume", "overwrite"} & fixed.keys()


@pytest.mark.parametrize("seconds", [80, 120, 300, 1200, 7200])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_a_plan_fits_into_its_budget(seconds: float, scale: float) -> None:
    made = plan(seconds, scale)
    assert cost(made, scale) + 15 <= seconds
    assert len(made.sizes) >= 4
    assert made.seeds >= 2
    assert {draw for _, draw in made.cells} == set(range(made.seeds))
    assert sorted({size for size, _ in made.cells}) == made.sizes


def test_a_larger_budget_never_gives_less() -> None:
    found = [plan(seconds) for seconds in (100, 300, 1000, 4000)]
    for less, more in itertools.pairwise(found):
        assert (more.sizes[-1], more.epochs * more.seeds) >= (less.sizes[-1], less.epochs * less.seeds)
    assert found[-1].sizes == SIZES
    assert found[-1].seeds == 3
    assert found[-1].trials == 8


def test_small_sets_get_more_epochs_and_smaller_batches_but_no_more_steps() -> None:
    made = plan(1000)
    steps = [made.epochs_at(size) * -(-size // batch_size(size)) for size in made.sizes]
    assert made.epochs_at(50) > made.epochs_at(1347) == made.epochs
    assert all(less <= 1.5 * more for less, more in itertools.pairwise(steps))
    assert min(steps) >= 0.2 * max(steps)


def test_a_budget_too_small_names_one_that_is_not() -> None:
    with pytest.raises(BudgetError, match="budget: 20s is too small to decide") as caught:
        plan(20)
    wanted = float(str(caught.value).split("--budget ")[1].split("s")[0])
    assert 20 < wanted < 200
    assert plan(wanted).epochs >= 3
    with pytest.raises(BudgetError):
        plan(0.85 * wanted)


@pytest.mark.parametrize("trials", [2, 3, 4, 6, 8, 12, 16])
def test_halving_ends_with_two_at_the_full_number_of_epochs(trials: int) -> None:
    found = rungs(trials, 32)
    assert found[0][0] == trials
    assert found[-1] == (2, 32)
    for (count, epochs), (fewer, longer) in itertools.pairwise(found):
        assert fewer == -(-count // 2)
        assert longer == 2 * epochs
    assert rungs(8, 1)[0] == (8, 1)


def test_any_beginning_of_the_cells_spans_the_sizes() -> None:
    made = plan(4000)
    assert made.sizes == SIZES
    assert made.cells[:4] == [(1347, 0), (1347, 1), (50, 0), (50, 1)]
    assert made.cells[4][0] in (200, 400)
    assert {draw for _, draw in made.cells[: 2 * len(SIZES)]} == {0, 1}, "third draws come last"
    assert len(set(made.cells)) == len(made.cells) == 3 * len(SIZES)


def test_a_first_draw_needs_time_for_the_second_too() -> None:
    made = plan(1000)
    price = cost_of_cell(made, rates(), ARMS, 200)
    assert fits(made, rates(), ARMS, (200, 1), 1.1 * price)
    assert not fits(made, rates(), ARMS, (200, 0), 1.1 * price)
    assert fits(made, rates(), ARMS, (200, 0), 2.1 * price)
    assert not fits(made, rates(), ARMS, (200, 2), 0.9 * price)


def test_a_plan_survives_json() -> None:
    made = plan(500)
    assert Plan.from_dict(made.as_dict()) == made
    found = rates()
    assert Rates(**found.as_dict()) == found


def test_rates_learn_from_trials() -> None:
    found = rates()
    before = found.trial("full", 400, 10, 450)
    for _ in range(30):
        predicted = found.trial("full", 400, 10, 450)
        found.observe(predicted, 3 * before)
    assert found.trial("full", 400, 10, 450) == pytest.approx(3 * before, rel=0.05)
    again = dataclasses.replace(found)
    again.observe(0.0, 5.0)
    assert again == found


def test_a_set_too_large_for_the_budget_is_trained_in_part() -> None:
    sizes = [100, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 50_000]
    made = make_plan(sizes, 50_000, 2000, rates(), ARMS, seconds=300, spent=5, reserve=10, seeds=3, most_trials=8)
    assert 800 <= made.sizes[-1] < 50_000
    assert made.anchors[-1] <= made.sizes[-1]
