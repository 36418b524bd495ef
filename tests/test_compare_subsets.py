"""PB10: which images a run trains on; and the sealed labels of PB11."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_kernels.compare.subsets import SealedLabels, fold, ladder, nested_order, subset


@st.composite
def labelled(draw: st.DrawFn) -> torch.Tensor:
    classes = draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    shares = torch.rand(classes, generator=generator).square() + 0.02
    rest = torch.multinomial(shares, draw(st.integers(classes, 300)), True, generator=generator)
    return torch.cat([torch.arange(classes), rest])[torch.randperm(classes + len(rest), generator=generator)]


@given(labelled(), st.integers(0, 1000))
def test_every_beginning_of_the_order_is_a_stratified_sample(labels: torch.Tensor, seed: int) -> None:
    order = nested_order(labels, seed)
    assert order.sort().values.equal(torch.arange(len(labels))), "every image once"
    totals = torch.bincount(labels).double()
    counts = torch.zeros(len(totals), len(labels), dtype=torch.float64)
    counts[labels[order], torch.arange(len(labels))] = 1
    counts = counts.cumsum(dim=1)
    for n in range(len(totals), len(labels) + 1):
        have, share = counts[:, n - 1], n * totals / len(labels)
        assert int(have.min()) >= 1, "no class is missing"
        if float(share.min()) >= 1:
            assert float((have - share).abs().max()) <= 1 + 1e-9


def test_balanced_classes_stay_within_one_of_each_other() -> None:
    labels = torch.arange(1000) % 10
    order = nested_order(labels, 3)
    for n in range(1, 1001):
        counts = torch.bincount(labels[order[:n]], minlength=10)
        assert int(counts.max() - counts.min()) <= 1


def test_smaller_subsets_are_beginnings_of_larger_ones_and_seeds_draw_others() -> None:
    labels = torch.arange(400) % 7
    small, large = subset(labels, 50, 1), subset(labels, 200, 1)
    assert large[:50].equal(small)
    assert subset(labels, 50, 1).equal(small), "a function of labels and seed"
    assert len(set(small.tolist()) & set(subset(labels, 50, 2).tolist())) < 40


def test_a_size_below_the_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size: expected 7 .* to 400 images, got 6"):
        subset(torch.arange(400) % 7, 6, 0)
    with pytest.raises(ValueError, match="got 401"):
        subset(torch.arange(400) % 7, 401, 0)


@pytest.mark.parametrize(("images", "classes"), [(1347, 10), (50_000, 100), (120, 10), (30, 10), (200, 10), (56, 8)])
def test_the_ladder_has_four_sizes_or_more_up_to_all_images(images: int, classes: int) -> None:
    sizes = ladder(images, classes)
    assert len(sizes) >= 4
    assert sizes == sorted(set(sizes))
    assert sizes[0] >= classes
    assert sizes[-1] == images


@given(labelled(), st.integers(0, 3))
def test_a_fold_holds_a_fifth_of_every_class_and_leaves_one_to_train_on(labels: torch.Tensor, repeat: int) -> None:
    train, held = fold(labels, 5, repeat)
    assert torch.cat([train, held]).sort().values.equal(torch.arange(len(labels)))
    assert len(held) >= 1
    assert set(labels[train].tolist()) == set(labels.tolist())
    counts, kept = torch.bincount(labels), torch.bincount(labels[held], minlength=int(labels.max()) + 1)
    assert bool((kept <= 0.2 * counts + 1).all())
    assert abs(len(held) - 0.2 * len(labels)) <= 1 + int((counts == 1).sum())


def test_test_labels_stay_closed_until_they_are_unsealed() -> None:
    sealed = SealedLabels(torch.tensor([2, 0, 1]))
    assert sealed.digest() != SealedLabels(torch.tensor([2, 1, 0])).digest()
    with pytest.raises(RuntimeError, match="sealed"):
        sealed.open()
    sealed.unseal()
    assert sealed.open().tolist() == [2, 0, 1]
