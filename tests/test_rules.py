"""Rank rules against the golden vectors V1 and their own definitions."""

import pytest
import torch

from cl_kernels.ops.rules import Energy, Knee, PaperKnee, Rank, RatioToLargest, RatioToSmallest, Threshold

I768 = torch.arange(768, dtype=torch.float64)
TAIL = (768 - I768) / 768
EXP40 = torch.exp(-I768 / 40) + 1e-3 * TAIL
LOGISTIC = 1 / (1 + torch.exp((I768 - 200) / 15)) + 1e-4 * TAIL
LINEAR = (1 - I768 / 150).clamp_min(0) + 1e-3 * TAIL
TIED = torch.cat([torch.ones(100, dtype=torch.float64), torch.full((668,), 1e-3, dtype=torch.float64)])
DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("curve", "cut"),
    [
        (EXP40, 29),
        (LOGISTIC, 223),
        (LINEAR, 150),
        (torch.exp(-I768 / 5), 19),
        (torch.exp(-I768 / 100), 34),
        (1 / (I768 + 1), 18),
    ],
    ids=["exp40", "logistic", "linear", "exp5", "exp100", "power1"],
)
def test_v1_repository_rule(curve, cut, dtype):
    assert Knee().protected(curve.to(dtype)) == cut


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("curve", "free"), [(EXP40, 766), (LOGISTIC, 547), (LINEAR, 617)])
def test_v1_paper_rule(curve, free, dtype):
    assert 768 - PaperKnee().protected(curve.to(dtype)) == free


@pytest.mark.parametrize(
    ("curve", "repository", "paper"),
    [([10, 3, 1, 0.5], 3, 2), ([10, 9, 2, 1], 2, 1), ([10, 5, 1, 0.5], 2, 1), ([10, 9, 8, 1], 3, 2)],
)
def test_v1_four_prompts(curve, repository, paper):
    values = torch.tensor(curve, dtype=torch.float64)
    assert 4 - Knee().protected(values) == repository
    assert 4 - PaperKnee().protected(values) == paper


@pytest.mark.parametrize(("offset", "cut"), [(0.1, 102), (20, 49), (-10, 19), (-100, 0), (1000, 767)])
def test_v1_offset(offset, cut):
    assert Knee(offset=offset).protected(EXP40) == cut


@pytest.mark.parametrize(("n", "cut"), [(384, 34), (512, 34), (1024, 34), (192, 188), (128, 125)])
def test_cut_does_not_depend_on_length_until_the_curve_is_too_short(n, cut):
    assert Knee().protected(torch.exp(-torch.arange(n, dtype=torch.float64) / 100)) == cut


def test_v1_ties_are_refused_by_default_and_named():
    with pytest.raises(ValueError, match=r"run of 668 equal eigenvalues .* would free only 1 directions"):
        Knee().protected(TIED)
    assert Knee(ties="last").protected(TIED) == 767  # the repository's artefact
    assert Knee(ties="first").protected(TIED) == 100


def test_zeros_are_free_without_a_complaint():
    curve = torch.zeros(768)
    curve[:5] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert Knee().protected(curve) == 5


@pytest.mark.parametrize("rule", [Knee(), PaperKnee()])
def test_knees_need_three_values(rule):
    with pytest.raises(ValueError, match="n >= 3"):
        rule.protected(torch.ones(2))


def test_smoothing_keeps_the_sum_and_survives_a_radius_beyond_the_curve():
    from cl_kernels.ops.rules import _smooth

    curve = torch.rand(200, dtype=torch.float64)
    assert torch.allclose(_smooth(curve, 10.0).sum(), curve.sum())  # symmetric ends lose nothing
    assert torch.allclose(_smooth(curve, 1e4), curve.mean().expand(200), atol=1e-3)


@pytest.mark.parametrize(("keep", "count"), [(0.0, 0), (0.5, 1), (0.51, 2), (0.75, 2), (0.875, 3), (0.9, 4), (1.0, 4)])
def test_energy_takes_the_fewest_that_reach_the_share(keep, count):
    assert Energy(keep).protected(torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0])) == count


def test_v6_energy_reaches_the_threshold_that_the_gpm_repository_misses():
    values = torch.exp(-torch.arange(50, dtype=torch.float64) / 8).square()  # the vector holds singular values
    for keep, repository in ((0.95, 11), (0.97, 14), (0.99, 18)):
        count = Energy(keep).protected(values)
        held = values.cumsum(0) / values.sum()
        assert count == repository + 1
        assert held[count - 1] >= keep > held[count - 2]


def test_other_rules_cut_where_they_say():
    values = torch.tensor([100.0, 10.0, 1.0, 0.1])
    assert Rank(2).protected(values) == 2
    assert Rank(9).protected(values) == 4
    assert Threshold(1.0).protected(values) == 2  # at most tau is free
    assert RatioToLargest(0.1).protected(values) == 1
    assert RatioToSmallest(10.0).protected(values) == 2


def test_ratio_to_smallest_has_a_floor_under_rounding_noise():
    noise = torch.tensor([1.0, 0.5] + [3e-8] * 600 + [1e-12])  # float32 noise of a matrix of rank 2
    assert RatioToSmallest(10.0).protected(noise) == 2
    assert RatioToSmallest(10.0).protected(torch.zeros(3)) == 0


@pytest.mark.parametrize(
    "rule", [Energy(0.9), RatioToLargest(0.1), RatioToSmallest(10.0), Rank(3), Knee(), PaperKnee()]
)
def test_scaling_the_matrix_changes_nothing(rule):
    assert rule.protected(EXP40) == rule.protected(1e-9 * EXP40) == rule.protected(1e9 * EXP40)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Energy(1.5), ValueError),
        (lambda: Energy(float("nan")), ValueError),
        (lambda: RatioToLargest(-0.1), ValueError),
        (lambda: Threshold(-1.0), ValueError),
        (lambda: Rank(-1), ValueError),
        (lambda: Rank(2.5), TypeError),
        (lambda: Knee(sigma=0), ValueError),
        (lambda: Knee(sigma=1e9), ValueError),
        (lambda: Knee(sigma=float("nan")), ValueError),
        (lambda: Knee(trim=1.0), ValueError),
        (lambda: Knee(offset=float("nan")), ValueError),
        (lambda: Knee(ties="middle"), ValueError),
    ],
)
def test_bad_parameters_are_refused_when_the_rule_is_made(make, error):
    with pytest.raises(error):
        make()


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [3.0, 2.0, -1.0], [3.0, float("nan"), 1.0]])
def test_spectra_must_be_descending_and_finite(values):
    with pytest.raises((ValueError, ArithmeticError), match="eigenvalues"):
        Energy(0.9).protected(torch.tensor(values))
