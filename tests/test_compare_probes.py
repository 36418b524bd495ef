"""Probes of frozen features: right on real digits, honest about their error, blind to test labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_kernels import data
from cl_kernels.compare import _classify
from cl_kernels.compare._classify import accuracy, best_logistic, fold_numbers, splits, stratified_sample
from cl_kernels.compare.features import Features, extract
from cl_kernels.compare.probes import class_mean, knn, linear_probe, logme, probes

pytest.importorskip("sklearn", reason="the linear probe is scikit-learn's")
pytest.importorskip("timm", reason="backbones are timm models")


@pytest.fixture(scope="module")
def digits() -> tuple[Features, Tensor]:
    loaded = data.load("digits")
    return extract(data.load_backbone("embedded-small"), loaded.train, layers="all"), loaded.train.labels


# --- the whole ------------------------------------------------------------------------------------------------------


def test_digits_are_known_to_the_embedded_backbone(digits: tuple[Features, Tensor]) -> None:
    features, labels = digits
    found = probes(features, labels, limit=400)
    assert (found["n"], found["images"], found["classes"], found["feature"]) == (400, 1347, 10, "mean")
    assert found["linear"]["n"] == 400
    assert found["linear"]["accuracy"] > 0.95  # logistic regression on all of them: 98.9 % (model card)
    assert found["class_mean"]["accuracy"] == pytest.approx(0.942, abs=0.04)  # of the model card, trained on more
    assert found["knn"]["5"]["accuracy"] > 0.93
    assert found["majority"] == pytest.approx(0.1, abs=0.01)
    assert [entry["layer"] for entry in found["layers"]] == [0, 1, 2, 3]
    assert found["layers"][3]["accuracy"] > found["layers"][0]["accuracy"]  # deeper blocks know more of digits
    for entry in (found["linear"], found["class_mean"], *found["knn"].values(), *found["layers"]):
        assert 0 < entry["se"] < 0.03
    assert found["missing"] == []
    assert probes(features, labels, limit=400) == found  # the same to the bit


def test_shuffled_labels_are_not_known(digits: tuple[Features, Tensor]) -> None:
    """A probe that saw the images it is judged on would be above chance here."""
    features, labels = digits
    bare = Features(features.pooled)
    mixed = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    found = probes(bare, mixed, limit=300, folds=4)
    for entry in (found["linear"], found["class_mean"], *found["knn"].values()):
        assert entry["accuracy"] == pytest.approx(0.1, abs=0.06)
    assert found["logme"]["value"] < probes(bare, labels, limit=300, folds=4)["logme"]["value"] - 0.2


def test_layers_are_left_out_when_time_is_up(digits: tuple[Features, Tensor]) -> None:
    features, labels = digits
    calls = iter([False, True, True, True])
    found = probes(features, labels, limit=100, should_stop=lambda: next(calls))
    assert [entry["layer"] for entry in found["layers"]] == [0]
    assert found["missing"] == [f"the probe of layer {n}: no time was left" for n in (1, 2, 3)]
    assert found["linear"]["n"] == 100


def test_wrong_input_is_named(digits: tuple[Features, Tensor]) -> None:
    features, labels = digits
    with pytest.raises(ValueError, match="at least two classes, got 1"):
        probes(features, torch.zeros_like(labels))
    with pytest.raises(ValueError, match=r"expected \[N, D\] and \[N\]"):
        probes(features, labels[:5])
    with pytest.raises(ValueError, match=r"folds: expected 2\.\.1347"):
        probes(features, labels, folds=1)


# --- folds, samples, errors -----------------------------------------------------------------------------------------


def test_folds_are_stratified_and_cover_everything_once() -> None:
    labels = torch.tensor([0] * 13 + [1] * 7 + [2] * 1 + [3] * 24)
    numbers = fold_numbers(labels, 5, seed=3)
    for value in range(4):
        counts = torch.bincount(numbers[labels == value], minlength=5)
        assert int(counts.max() - counts.min()) <= 1
    sizes = torch.bincount(numbers, minlength=5)
    assert int(sizes.max() - sizes.min()) <= 1
    tested = torch.cat([test for _, test in splits(numbers, range(5))])
    assert torch.equal(tested.sort().values, torch.arange(45))
    for train, test in splits(numbers, range(5)):
        assert not set(train.tolist()) & set(test.tolist())
    assert not torch.equal(numbers, fold_numbers(labels, 5, seed=4))


@pytest.mark.parametrize("size", [3, 4, 10, 44, 45, 100])
def test_samples_keep_the_shares_of_classes(size: int) -> None:
    labels = torch.tensor([0] * 13 + [1] * 7 + [2] * 1 + [3] * 24)
    rows = stratified_sample(labels, size, seed=0)
    assert len(rows) == len(set(rows.tolist())) == min(size, 45)
    counts = torch.bincount(labels[rows], minlength=4).tolist()
    if size >= 4:
        assert min(counts) >= 1
    for count, whole in zip(counts, (13, 7, 1, 24), strict=True):
        assert abs(count - whole * min(size, 45) / 45) <= (2 if size == 4 else 1)  # four of four classes: one each


def test_the_standard_error_is_the_spread_of_the_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [accuracy(torch.rand(200, generator=generator) < 0.8) for _ in range(300)]
    spread = np.std([draw["accuracy"] for draw in draws])
    assert np.mean([draw["se"] for draw in draws]) == pytest.approx(spread, rel=0.12)
    assert accuracy(torch.ones(50, dtype=torch.bool))["se"] > 0.015  # all right says little about the rest


# --- single probes --------------------------------------------------------------------------------------------------


def test_the_penalty_is_chosen_without_the_tested_fold(
    digits: tuple[Features, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong labels in the tested fold change neither the penalty nor the predictions."""
    features, labels = digits[0].pooled[:200], digits[1][:200]
    numbers = fold_numbers(labels, 4, 0)
    (rows, held), *_ = splits(numbers, [0])
    broken = labels.clone()
    broken[held] = (broken[held] + 1) % 10
    right, chosen = linear_probe(features, labels, numbers, range(1), 0)
    wrong, again = linear_probe(features, broken, numbers, range(1), 0)
    assert chosen == again
    assert not bool((right & wrong).any())
    assert chosen[0] in _classify.STRENGTHS
    assert best_logistic(features[rows], labels[rows], 0)[1] == chosen[0]


def test_logistic_regression_survives_constant_features_and_rare_classes() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0] * 20 + [1] * 20 + [2])
    features = torch.randn(41, 4) + labels[:, None] * torch.tensor([3.0, 0, 0, 0])
    features[:, 3] = 7.0
    model, _ = best_logistic(features, labels, 0)
    assert int((model.predict(features) == labels).sum()) >= 38
    alone, _ = best_logistic(features[:5], labels[:5], 0)
    assert alone.predict(features[:3]).tolist() == [0, 0, 0]


def test_neighbours_and_means_are_those_of_scikit_learn(digits: tuple[Features, Tensor]) -> None:
    from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

    features, labels = digits[0].pooled, digits[1]
    train, test = slice(0, 900), slice(900, 1347)
    theirs = KNeighborsClassifier(1, metric="cosine").fit(features[train].numpy(), labels[train].numpy())
    mine = knn(1)(features[train], labels[train], features[test])
    assert np.mean(theirs.predict(features[test].numpy()) == mine.numpy()) > 0.995
    theirs = KNeighborsClassifier(5, metric="cosine").fit(features[train].numpy(), labels[train].numpy())
    mine = knn(5)(features[train], labels[train], features[test])
    assert np.mean(theirs.predict(features[test].numpy()) == mine.numpy()) > 0.98  # ties are broken otherwise
    unit = torch.nn.functional.normalize(features, dim=1)
    centroid = NearestCentroid().fit(unit[train].numpy(), labels[train].numpy())
    agree = np.mean(
        centroid.predict(unit[test].numpy()) == class_mean(features[train], labels[train], features[test]).numpy()
    )
    assert agree > 0.97  # Euclidean distance to a mean of unit vectors, not angle to it
    assert knn(20)(features[:3], labels[:3], features[:1]).tolist() == [int(labels[0])] or len(set(labels[:3])) > 1


# --- LogME ----------------------------------------------------------------------------------------------------------


def log_evidence(features: Tensor, y: Tensor, alpha: float, beta: float) -> float:
    """log N(y; 0, I / beta + F F^T / alpha), by its definition."""
    covariance = torch.eye(len(y), dtype=torch.float64) / beta + features @ features.T / alpha
    sign, logdet = torch.linalg.slogdet(covariance)
    assert sign > 0
    return -0.5 * float(y @ torch.linalg.solve(covariance, y) + logdet + len(y) * math.log(2 * math.pi))


@pytest.mark.parametrize(("n", "width", "signal"), [(40, 6, 1.0), (40, 6, 0.0), (30, 50, 0.5), (60, 3, 4.0)])
def test_logme_is_the_evidence_maximised_by_brute_force(n: int, width: int, signal: float) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="brute force uses scipy")
    generator = torch.Generator().manual_seed(n + width)
    labels = torch.arange(n) % 3
    features = torch.randn(n, width, generator=generator, dtype=torch.float64)
    features[:, :3] += signal * torch.nn.functional.one_hot(labels, 3)
    total = 0.0
    for value in range(3):
        y = (labels == value).double()

        def negative(logs: np.ndarray, y: Tensor = y) -> float:
            return -log_evidence(features, y, float(np.exp(logs[0])), float(np.exp(logs[1])))

        how = {"method": "Nelder-Mead", "bounds": [(-20, 25)] * 2, "options": {"xatol": 1e-5, "fatol": 1e-9}}
        starts = [(1, 0), (5, 0), (5, 3)]  # wide features may leave no noise at all: beta at its bound
        total += max(-optimize.minimize(negative, start, **how).fun for start in starts)
    assert logme(features, labels) == pytest.approx(total / 3 / n, abs=1e-6)


def test_logme_does_not_depend_on_scale_rotation_or_order(digits: tuple[Features, Tensor]) -> None:
    features, labels = digits[0].pooled[:300].double(), digits[1][:300]
    value = logme(features, labels)
    assert logme(features * 1e3, labels) == pytest.approx(value, abs=1e-8)
    rotation = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
    assert logme(features @ rotation, labels) == pytest.approx(value, abs=1e-8)
    order = torch.randperm(300)
    assert logme(features[order], labels[order]) == pytest.approx(value, abs=1e-8)
    assert math.isfinite(logme(torch.zeros(10, 3), torch.arange(10) % 2))
    with pytest.raises(ValueError, match="two images or more"):
        logme(features[:1], labels[:1])


def test_deeper_layers_have_more_evidence_than_the_first(digits: tuple[Features, Tensor]) -> None:
    features, labels = digits
    assert logme(features.layers[3], labels) > logme(features.layers[0], labels)
