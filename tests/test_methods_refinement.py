"""NSP2's head refinement: Gaussians of the features, their samples, and the training of the heads on them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from continual_tiny import one_thread, tiny_model
from test_methods import TASKS, snapshot, train
from torch import Tensor

from cl_kernels import NonFiniteError, methods
from cl_kernels.methods import _refinement as refinement
from cl_kernels.methods._heads import Heads
from cl_kernels.methods._refinement import RIDGE, GaussianReplay, RefineOptions

F64 = torch.float64
KINDS = ("full", "shared", "diagonal")

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def features(count: int = 40, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features of the classes 2 and 7, in float64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([7, 2]).repeat(count // 2)
    mix = torch.randn(2, dim, dim, generator=generator, dtype=F64)
    noise = torch.randn(count, dim, generator=generator, dtype=F64)
    centres = 3 * torch.randn(2, dim, generator=generator, dtype=F64)
    which = (labels == 7).long()
    return centres[which] + torch.einsum("nd,nde->ne", noise, mix[which]), labels


def heads(dim: int = 5, kind: str = "linear", groups: tuple[tuple[int, ...], ...] = ((2,), (7,))) -> Heads:
    made = Heads(dim, kind, 16.0)
    for group in groups:
        made.extend(group, torch.empty(0, dtype=F64))
    torch.manual_seed(3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.requires_grad_(False)


class TestGaussians:
    @pytest.mark.parametrize("kind", KINDS)
    def test_samples_have_the_mean_and_covariance_of_their_class(self, kind: str) -> None:
        x, y = features()
        replay = GaussianReplay(kind)
        replay.remember([(x[:13], y[:13]), (x[13:], y[13:])])
        drawn, labels = replay.sample(200_000, torch.Generator().manual_seed(1))
        assert labels.bincount().tolist() == [0, 0, 200_000, 0, 0, 0, 0, 200_000]
        covariances = {label: torch.cov(x[y == label].mT) for label in (2, 7)}  # unbiased, of 20 images each
        for label in (2, 7):
            expected = covariances[label]
            if kind == "diagonal":
                expected = torch.diag(expected.diagonal())
            elif kind == "shared":
                expected = (covariances[2] + covariances[7]) / 2
            expected = expected + RIDGE * torch.eye(5, dtype=F64)
            mine, scale = drawn[labels == label], expected.diagonal().max()
            assert float((mine.mean(0) - x[y == label].mean(0)).abs().max() / scale.sqrt()) < 0.015  # 5 sigma: 0.011
            assert float((torch.cov(mine.mT) - expected).abs().max() / scale) < 0.02

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_image_of_a_class_is_enough(self, kind: str) -> None:
        replay = GaussianReplay(kind)
        replay.remember([(torch.ones(1, 4), torch.tensor([3]))])
        drawn, _ = replay.sample(1000, torch.Generator().manual_seed(0))
        assert float((drawn - 1).square().mean().sqrt()) == pytest.approx(RIDGE**0.5, rel=0.1)

    def test_a_class_in_two_domains_is_drawn_in_proportion(self) -> None:
        replay = GaussianReplay("diagonal")
        replay.remember([(torch.zeros(30, 2), torch.zeros(30, dtype=torch.int64))])
        replay.remember([(torch.full((10, 2), 9.0), torch.zeros(10, dtype=torch.int64))])
        drawn, labels = replay.sample(256)
        assert len(labels) == 256
        assert int((drawn[:, 0] > 4).sum()) == 64

    def test_each_class_is_factorised_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # T20: the official code does it for every class, epoch and task
        seen = []
        real = refinement._cholesky
        monkeypatch.setattr(refinement, "_cholesky", lambda c: seen.append(len(c)) or real(c))
        replay, made = GaussianReplay("full"), heads()
        for seed in (0, 1):
            replay.remember([features(seed=seed)])
            replay.refine(made, RefineOptions(refine_epochs=4))
        assert len(seen) == 4

    @pytest.mark.parametrize(("kind", "numbers"), [("full", 2 * 30), ("shared", 2 * 5 + 25), ("diagonal", 2 * 10)])
    def test_memory(self, kind: str, numbers: int) -> None:
        replay = GaussianReplay(kind)
        replay.remember([features()])
        state = replay.state()
        tensors = [part for component in state["components"] for part in component if isinstance(part, Tensor)]
        tensors += [state["scatter"]] if state["scatter"] is not None else []
        assert sum(tensor.numel() for tensor in tensors) == numbers

    def test_bad_features_are_named(self) -> None:
        x, y = features()
        x[int((y == 7).nonzero()[0, 0]), 1] = float("nan")
        with pytest.raises(NonFiniteError, match="class 7"):
            GaussianReplay("full").remember([(x, y)])


class TestTraining:
    @pytest.mark.parametrize("kind", ["linear", "cosine"])
    def test_against_sgd_written_out(self, kind: str) -> None:
        """Nesterov momentum, decay on matrices only, all classes compete, logits over the temperature."""
        x, y = features()
        replay = GaussianReplay("full")
        replay.remember([(x, y)])
        made, twin = heads(kind=kind), heads(kind=kind)
        options = RefineOptions(
            refine_epochs=3,
            refine_samples=20,
            refine_batch=16,
            refine_lr=0.05,
            refine_weight_decay=0.1,
            temperature=2.0,
        )
        torch.manual_seed(5)
        replay.refine(made, options)
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        values = [p.clone() for p in twin.parameters()]
        buffers: list[Tensor | None] = [None] * len(values)
        for _ in range(3):
            drawn, labels = replay.sample(20, generator)
            order = torch.randperm(40, generator=generator)
            for rows in order.split(16):
                leaves = [v.clone().requires_grad_() for v in values]
                logits = self.logits(kind, leaves, drawn[rows]) / 2
                loss = F.cross_entropy(logits, (labels[rows] == 7).long())
                for i, g in enumerate(torch.autograd.grad(loss, leaves)):
                    g = g + 0.1 * values[i] if values[i].ndim > 1 else g
                    buffer = buffers[i]
                    buffers[i] = buffer = g if buffer is None else 0.9 * buffer + g
                    values[i] = values[i] - 0.05 * (g + 0.9 * buffer)
        for got, expected in zip(made.parameters(), values, strict=True):
            torch.testing.assert_close(got.detach(), expected, rtol=1e-9, atol=1e-10)
            assert got.grad is None
            assert not got.requires_grad

    @staticmethod
    def logits(kind: str, leaves: list[Tensor], x: Tensor) -> Tensor:
        if kind == "cosine":
            return 16 * F.normalize(x, dim=1) @ F.normalize(torch.cat(leaves), dim=1).mT
        return torch.cat([F.linear(x, *leaves[:2]), F.linear(x, *leaves[2:])], dim=1)

    @pytest.mark.parametrize("covariance", KINDS)
    def test_heads_that_were_trained_apart_are_brought_together(self, covariance: str) -> None:
        """Each head alone prefers its own class everywhere: a bias that only training them together removes."""
        x, y = features(400)
        made = heads()
        with torch.no_grad():
            for index, bias in ((0, 0.0), (1, 30.0)):
                made.head(index).weight.zero_()
                made.head(index).bias.fill_(bias)
        replay = GaussianReplay(covariance)
        replay.remember([(x, y)])
        before = float((made(x).argmax(1) == made.columns(y)).double().mean())
        replay.refine(made, RefineOptions(refine_lr=0.1))
        after = float((made(x).argmax(1) == made.columns(y)).double().mean())
        assert before == 0.5
        assert after > 0.9

    def test_no_epochs_change_nothing(self) -> None:
        replay, made = GaussianReplay("full"), heads()
        replay.remember([features()])
        before = [p.clone() for p in made.parameters()]
        replay.refine(made, RefineOptions(refine_epochs=0))
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), before, strict=True))


class TestMethod:
    @pytest.mark.parametrize("name", ["nsp2", "nsp2-exact"])
    def test_after_every_task_the_last_included_all_heads_move(self, name: str) -> None:
        method: Any = methods.create(name, tiny_model(), refine="gaussian", refine_epochs=2, refine_lr=0.1)
        for index, task in enumerate(TASKS):
            before = snapshot(method)["parameters"]
            train(method, task, steps=1)
            after = method.state_dict()["parameters"]
            for old in range(index):
                assert not torch.equal(after[f"heads.{old}.weight"], before[f"heads.{old}.weight"])
        assert [component.label for component in method.replay.components] == [1, 3, 0, 4, 2, 5]
        assert method.optimizer is None

    def test_off_is_as_before(self) -> None:
        ends = []
        for options in ({}, {"refine": "gaussian", "refine_epochs": 0}):
            torch.manual_seed(0)
            method = methods.create("nsp2", tiny_model(), **options)
            for task in TASKS:
                train(method, task)
            ends.append(method.state_dict()["parameters"])
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])

    @pytest.mark.parametrize("covariance", KINDS)
    def test_saved_and_resumed_exactly(self, covariance: str) -> None:
        options = {"refine": "gaussian", "refine_epochs": 2, "refine_lr": 0.1, "refine_covariance": covariance}

        def fresh() -> Any:
            return methods.create("nsp2", tiny_model(), **options)

        torch.manual_seed(0)
        straight = fresh()
        train(straight, TASKS[0])
        saved, state = snapshot(straight), torch.get_rng_state()
        resumed = fresh()
        resumed.load_state_dict(copy.deepcopy(saved))
        ends = []
        for method in (straight, resumed):
            torch.set_rng_state(state)
            for task in TASKS[1:]:
                train(method, task)
            ends.append(method.state_dict()["parameters"])
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
