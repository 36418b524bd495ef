"""gpm and adam-nscl: properties 15 and 16 and golden V6 of method-null-space 14, the traps of 15.1 and 15.2."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from continual_tiny import one_thread, tiny_model
from test_methods import TASKS, Toy, train
from torch import Tensor, nn

from cl_kernels import NonFiniteError, SubspaceMismatchError, methods, optim
from cl_kernels.methods import _memory as memory
from cl_kernels.methods.adam_nscl import AdamNSCLOptions, BatchMeans
from cl_kernels.methods.gpm import GPMOptions, subset
from cl_kernels.ops import rules
from cl_kernels.subspace import Covariance, CovarianceCollector, grow_basis

F64 = torch.float64
TASKS64 = tuple(Toy(task.index, task.classes, dtype=F64) for task in TASKS)  # in float32 rounding of p + dp hides leaks
FORMS = [("adam-nscl", "full"), ("adam-nscl", "prompts"), ("gpm", "full"), ("gpm", "prompts")]

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def decaying(seed: int, n: int = 40, d: int = 24, rate: float = 4.0) -> Tensor:
    """R [d, n] with a decaying spectrum in a basis of its own."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(k, d, generator=generator, dtype=F64)).Q for k in (d, n))
    return left @ torch.diag(torch.exp(-torch.arange(d) / rate)).double() @ right.mT


def moment(matrix: Tensor, rows: int = 1) -> Covariance:
    return Covariance(matrix, rows, torch.zeros(len(matrix), dtype=matrix.dtype), rows)


class TestGrowth:
    @pytest.mark.parametrize(
        ("keep", "rank", "captured", "more"),
        [(0.95, 11, 0.9361, 0.9502), (0.97, 14, 0.9698, 0.9765), (0.99, 18, 0.9889, 0.9914)],
    )
    def test_v6(self, keep: float, rank: int, captured: float, more: float) -> None:
        turn = torch.linalg.qr(torch.randn(50, 50, generator=torch.Generator().manual_seed(0), dtype=F64)).Q
        c = turn @ torch.diag(torch.exp(-torch.arange(50, dtype=F64) / 8).square()) @ turn.mT
        official, paper = grow_basis(None, c, keep, short=True), grow_basis(None, c, keep)
        assert (official.basis.shape[1], paper.basis.shape[1]) == (rank, rank + 1)
        assert official.captured == pytest.approx(captured, abs=5e-5)
        assert paper.captured == pytest.approx(more, abs=5e-5)
        assert official.captured < keep <= paper.captured

    def test_property_16_over_ten_tasks(self) -> None:
        basis: Tensor | None = None
        for task in range(10):
            r = decaying(task)
            keep = min(0.9 + 0.003 * task, 1.0)
            before = basis
            basis, captured = grow_basis(basis, r @ r.mT, keep)
            assert float((basis.mT @ basis - torch.eye(basis.shape[1], dtype=F64)).abs().max()) <= 1e-13
            assert captured >= keep
            assert captured == pytest.approx(float((basis.mT @ r).square().sum() / r.square().sum()), abs=1e-13)
            if before is not None:
                assert torch.equal(basis[:, : before.shape[1]], before), "what is protected stays protected"
        assert basis is not None
        assert basis.shape[1] <= 24

    def test_fewest_directions(self) -> None:
        first = grow_basis(None, decaying(0) @ decaying(0).mT, 0.9).basis
        c = decaying(1) @ decaying(1).mT
        grown, _ = grow_basis(first, c, 0.95)
        fewer = grown[:, :-1]
        assert float(((c @ fewer) * fewer).sum() / c.trace()) < 0.95

    @pytest.mark.parametrize("short", [False, True])
    def test_the_official_svd_of_the_inputs_gives_the_same_spans(self, short: bool) -> None:
        basis: Tensor | None = None
        official: Tensor | None = None
        for task, keep in enumerate((0.9, 0.95, 0.97)):
            r = decaying(task)
            basis = grow_basis(basis, r @ r.mT, keep, short=short and task == 0).basis
            official = self.official(official, r, keep, short)
            assert basis.shape == official.shape
            # sines of the principal angles: what sticks out of the other span
            assert float(torch.linalg.matrix_norm(basis - official @ (official.mT @ basis), 2)) <= 1e-5

    @staticmethod
    def official(m: Tensor | None, r: Tensor, keep: float, short: bool) -> Tensor:
        """GPM's update as its paper has it, by SVD of R and of its residual."""
        total = r.square().sum()
        u, s, _ = torch.linalg.svd(r if m is None else r - m @ (m.mT @ r), full_matrices=False)
        held = total - s.square().sum()
        count = 0
        while held < keep * total:
            held = held + s[count] ** 2
            count += 1
        if m is None:
            return u[:, : count - short]
        return torch.cat([m, u[:, :count]], dim=1)

    @pytest.mark.parametrize("seed", range(8))
    def test_rounding_adds_no_direction(self, seed: int) -> None:
        """Sums of rounded eigenvalues may never reach the whole trace: without a floor some of these fill R^24."""
        generator = torch.Generator().manual_seed(seed)
        r = torch.randn(24, 5, generator=generator, dtype=F64)
        basis, captured = grow_basis(None, r @ r.mT, 1.0)
        assert basis.shape[1] == 5
        assert captured == pytest.approx(1.0, abs=1e-12)
        assert grow_basis(basis, r @ r.mT, 1.0).basis.shape[1] == 5
        r[:, 3:] = torch.randn(24, 2, generator=generator, dtype=F64)
        assert grow_basis(basis, r @ r.mT, 1.0).basis.shape[1] == 7

    def test_directions_of_little_energy_are_orthogonal_all_the_same(self) -> None:
        """The residual of strong old directions is rounding, here 1e-4 of the new energy: eigenvectors alone lean."""
        q = torch.linalg.qr(torch.randn(24, 8, generator=torch.Generator().manual_seed(0), dtype=F64)).Q
        old, new = q[:, :5], q[:, 5:]
        c = old @ old.mT + 1e-12 * new @ torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=F64)) @ new.mT
        basis, _ = grow_basis(old, (c + c.mT) / 2, 1.0)
        assert basis.shape[1] == 8
        assert float((basis.mT @ basis - torch.eye(8, dtype=F64)).abs().max()) <= 1e-14

    def test_a_full_basis_grows_no_further_and_a_zero_moment_adds_nothing(self) -> None:
        eye = torch.eye(6, dtype=F64)
        assert torch.equal(grow_basis(eye, decaying(0, d=6) @ decaying(0, d=6).mT, 1.0).basis, eye)
        empty = grow_basis(None, torch.zeros(6, 6), 0.9)
        assert (tuple(empty.basis.shape), empty.captured) == ((6, 0), 1.0)
        one = grow_basis(None, torch.diag(torch.tensor([1.0, 0, 0])), 0.9, short=True)
        assert one.basis.shape[1] == 0

    def test_bad_input(self) -> None:
        c = torch.eye(4)
        with pytest.raises(ValueError, match="keep"):
            grow_basis(None, c, 1.5)
        with pytest.raises(SubspaceMismatchError, match="covariance"):
            grow_basis(None, c[:3], 0.5)
        with pytest.raises(SubspaceMismatchError, match="basis"):
            grow_basis(torch.eye(3), c, 0.5)
        with pytest.raises(NonFiniteError, match="covariance"):
            grow_basis(None, c.masked_fill(c > 0, float("nan")), 0.5)


class TestNullSpaceOfInputs:
    """Property 15."""

    rank, dim = 7, 32

    def inputs(self) -> Tensor:
        """X [60, 32] of rank 7, in float32 without any rounding: small whole numbers."""
        generator = torch.Generator().manual_seed(3)
        a, b = (torch.randint(-3, 4, shape, generator=generator) for shape in ((60, self.rank), (self.rank, self.dim)))
        return (a @ b).float()

    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    def test_outputs_on_old_inputs_do_not_move(self, dtype: torch.dtype) -> None:
        x = self.inputs()
        c = (x.mT @ x).to(dtype)
        rule = memory.Cut(rules.RatioToSmallest(10.0, AdamNSCLOptions().floor))
        made = memory.Accumulated({"right": rule}).remember({"weight": {"right": moment(c)}}, 60)
        projector, _ = made["weight"]["right"]
        assert projector.rank == self.rank, "the numerical null space, of dimension 25, is free"
        layer = nn.Linear(self.dim, 16, bias=False)
        start = layer.weight.detach().clone()
        optimizer = optim.ProjectedAdam(layer.named_parameters(), lr=1e-2, weight_decay=5e-5)
        optimizer.set_subspace({"weight": projector.to(torch.float32)})
        generator = torch.Generator().manual_seed(4)
        for _ in range(100):
            optimizer.zero_grad(set_to_none=True)
            (layer(torch.randn(8, self.dim, generator=generator)) ** 2).sum().backward()
            optimizer.step()
        moved = layer.weight.detach() - start
        assert float(moved.norm()) > 0.1
        assert float((x @ moved.mT).norm() / (x.norm() * moved.norm())) <= 1e-6

    def test_the_literal_rule_collapses_on_rounding(self) -> None:
        """Why there is a floor: in float32 the official rule leaves next to nothing free (15.1, trap 2)."""
        x = self.inputs()
        x = x / x.norm(dim=1, keepdim=True)
        values = torch.linalg.svdvals(x.mT @ x)
        literal = int((values <= 10 * values[-1]).sum())
        floored = self.dim - rules.RatioToSmallest(10.0).protected(values)
        assert literal < 25
        assert floored == 25

    def test_the_floor_is_of_the_largest(self) -> None:
        values = torch.tensor([1.0, 1e-3, 1e-9, 1e-12], dtype=F64)
        assert rules.RatioToSmallest(10.0).protected(values) == 3
        assert rules.RatioToSmallest(10.0, 1e-10).protected(values) == 2 + 0
        assert rules.RatioToSmallest(10.0, 1e-4).protected(values) == 1
        with pytest.raises(ValueError, match="floor"):
            rules.RatioToSmallest(10.0, 2.0)


class TestStatistics:
    def test_the_mean_over_rows_does_not_depend_on_tasks_or_batches(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(50, 6, generator=generator, dtype=F64)
        cut = {"right": memory.Cut(rules.Energy(0.9))}
        for splits in ([50], [10, 40], [1, 2, 47]):
            kept = memory.Accumulated(cut, "rows")
            for part in x.split(splits):
                kept.remember({"w": {"right": moment(part.mT @ part, len(part))}}, 1)
            torch.testing.assert_close(kept.statistics["w"]["right"], x.mT @ x / 50, rtol=1e-13, atol=1e-13)

    def test_batch_mean_is_the_official_statistic(self) -> None:
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
        batches = torch.randn(3, 7, 2, 5, generator=torch.Generator().manual_seed(0)).unbind()
        with BatchMeans(model, ["0", "1"]) as collector:
            for batch in batches:
                model(batch)
        found = collector.covariances()
        expected = sum(batch.mean(0).double().mT @ batch.mean(0).double() for batch in batches)
        torch.testing.assert_close(found["0.weight"].matrix, expected, rtol=1e-6, atol=1e-6)
        assert set(found) == {"0.weight", "1.weight"}
        assert not model[0]._forward_pre_hooks

    def test_the_option_uses_it(self) -> None:
        method: Any = methods.create("adam-nscl", tiny_model(), statistic="batch-mean", accumulation="sum")
        train(method, TASKS[0])
        name = "blocks.0.attn.qkv.weight"
        expected = 0.0
        seen: list[Tensor] = []
        handle = method.backbone.blocks[0].attn.qkv.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        for images, _ in TASKS[0].batches():
            method.predict(images)
        handle.remove()
        for x in seen:
            expected = expected + x.mean(0).double().mT @ x.mean(0).double()
        torch.testing.assert_close(method.memory.statistics[name]["right"], expected, rtol=1e-5, atol=1e-6)

    def test_a_random_subset_of_the_images(self) -> None:
        def batches() -> list[tuple[Tensor, Tensor]]:
            numbers = torch.arange(20)
            return list(zip(numbers.float()[:, None].split(6), numbers.split(6), strict=True))

        chosen = subset(batches(), 8, seed=1)
        labels = torch.cat([y for _, y in chosen])
        assert len(labels.unique()) == 8
        assert max(len(y) for _, y in chosen) <= 6
        assert all(torch.equal(x[:, 0].long(), y) for x, y in chosen)
        assert torch.equal(torch.cat([y for _, y in subset(batches(), 8, seed=1)]), labels)
        assert len(torch.cat([y for _, y in subset(batches(), 99, seed=1)])) == 20
        assert subset([], 3, seed=0) == []
        hits = torch.zeros(20)
        for seed in range(600):
            hits[torch.cat([y for _, y in subset(batches(), 5, seed)])] += 1
        # binomial(600, 1/4): mean 150, standard deviation 10.6
        assert float(hits.min()) > 100
        assert float(hits.max()) < 200

    def test_samples_per_task_limits_the_pass(self) -> None:
        method: Any = methods.create("gpm", tiny_model(), samples_per_task=5)
        train(method, TASKS[0])
        assert max(basis.shape[1] for sides in method.memory.bases.values() for basis in sides.values()) <= 5 * 5


class TestMemory:
    @pytest.mark.parametrize("kind", ["accumulated", "grown"])
    def test_what_was_saved_does_not_change_with_the_memory(self, kind: str) -> None:
        def fresh() -> memory.Memory:
            if kind == "grown":
                return memory.Grown(lambda task, name: 0.9, ("right",), False)
            return memory.Accumulated({"right": memory.Cut(rules.Energy(0.9))}, "rows")

        found = [{"w": {"right": moment(decaying(task) @ decaying(task).mT, 5)}} for task in range(2)]
        kept, again = fresh(), fresh()
        kept.remember(found[0], 1)
        saved = kept.state()
        expected = kept.remember(found[1], 1)["w"]["right"][0]
        again.load(saved, torch.device("cpu"))
        assert torch.equal(again.remember(found[1], 1)["w"]["right"][0].matrix(), expected.matrix())

    @pytest.mark.parametrize("sides", ["left", "right", "both"])
    def test_gpm_on_one_side_of_the_prompts(self, sides: str) -> None:
        method: Any = methods.create("gpm", tiny_model(), base="prompts", sides=sides)
        train(method, TASKS[0])
        for name in method.store:
            left, right = method.store.sides(name)
            assert (left is not None, right is not None) == (sides != "right", sides != "left")


class TestThresholds:
    def test_by_task_and_layer(self) -> None:
        options = GPMOptions(threshold=0.9, increment=0.03, per_layer={"mlp": 0.5, "mlp.fc2": 0.99})
        assert options.keep(0, "blocks.0.attn.qkv.weight") == 0.9
        assert options.keep(2, "blocks.0.attn.qkv.weight") == pytest.approx(0.96)
        assert options.keep(0, "blocks.0.mlp.fc1.weight") == 0.5
        assert options.keep(1, "blocks.3.mlp.fc2.weight") == 1.0

    def test_published(self) -> None:
        # method-null-space.md 15.1 and 15.2
        gpm = GPMOptions(**methods.published("gpm"))
        assert [gpm.keep(t, "x") for t in (0, 1, 9)] == pytest.approx([0.97, 0.973, 0.997])
        assert (gpm.mode, gpm.samples_per_task, gpm.lr, gpm.momentum, gpm.weight_decay) == (
            "repository", 125, 0.01, 0.0, None,
        )  # fmt: skip
        assert methods.multipliers("halves", 80) == [1.0] * 30 + [0.5] * 30 + [0.25] * 20
        method = methods.create("adam-nscl", tiny_model(), **methods.published("adam-nscl"))
        rates = []
        for task in TASKS:
            method.begin_task(task)
            assert method.optimizer is not None
            rates.append([(g["lr"], g["weight_decay"]) for g in method.optimizer.param_groups])
            method.end_task(task, task.batches())
        assert rates == [[(1e-4, 5e-5), (1e-3, 0.0)]] + [[(5e-5, 5e-5), (1e-3, 0.0)]] * 2


class TestPromises:
    @pytest.mark.parametrize(("name", "base"), FORMS)
    def test_later_steps_do_not_enter_what_is_protected(self, name: str, base: str) -> None:
        options: dict[str, Any] = {"rule": "energy:0.9"} if name == "adam-nscl" else {"threshold": 0.9}
        method: Any = methods.create(name, tiny_model().double(), base=base, lr=0.03, weight_decay=1e-2, **options)
        train(method, TASKS64[0])
        stores = [method.store]
        start = {key: p.detach().clone() for key, p in method._body()}
        train(method, TASKS64[1], steps=5)
        protected = 0
        for key, p in method._body():
            moved = (p.detach() - start[key]).double()
            moved = moved[0] if moved.ndim == 3 else moved
            assert float(moved.norm()) > 0
            sides = stores[0].sides(key)
            assert (sides.left is None) == (base == "full")
            for projector, step in ((sides.right, moved), (sides.left, moved.mT)):
                if projector is None:
                    continue
                # what a unit vector keeps: eigenvalues of P are 1 and 0, so this is the part of the step P removes
                lost = step - projector.to(F64).apply(step)
                assert float(lost.norm() / step.norm()) < 1e-11
                protected += projector.dim - round(float(projector.matrix().double().trace()))
        assert protected > 0

    @pytest.mark.parametrize("base", ["full", "prompts"])
    @pytest.mark.parametrize("mode", ["paper", "repository"])
    def test_gpm_captures_its_threshold_after_every_task(self, base: str, mode: str) -> None:
        method: Any = methods.create("gpm", tiny_model(), base=base, threshold=0.8, increment=0.05, mode=mode)
        before: dict[tuple[str, str], Tensor] = {}
        for index in range(3):
            task = Toy(index, (2 * index, 2 * index + 1))
            train(method, task)
            wanted = 0.8 + 0.05 * index
            for name, sides in self.independent(method, task).items():
                for side, c in sides.items():
                    m = method.memory.bases[name][side]
                    gram = m.mT @ m - torch.eye(m.shape[1], dtype=F64)
                    assert float(gram.norm()) <= 1e-12
                    captured = float(((c @ m) * m).sum() / c.trace())
                    if mode == "repository" and index == 0:
                        assert captured < wanted
                    else:
                        assert captured >= wanted - 1e-12
                        assert method.subspace()[name][side]["energy"] == pytest.approx(captured, abs=1e-9)
                    if (name, side) in before:
                        assert torch.equal(m[:, : before[name, side].shape[1]], before[name, side])
                    before[name, side] = m
                    projector = getattr(method.store.sides(name), side)
                    assert float((projector.matrix().double() @ m).norm()) < 1e-5

    @staticmethod
    @torch.no_grad()
    def independent(method: Any, task: Toy) -> dict[str, dict[str, Tensor]]:
        """The task's own moments, gathered again."""
        if hasattr(method.model, "prompts"):
            collector = CovarianceCollector(method.model, what="prompt")
        else:
            collector = CovarianceCollector(method.backbone, targets="linear")
        with collector:
            for images, _ in task.batches():
                method.model(images)
        found = collector.covariances()
        if hasattr(method.model, "prompts"):
            return {name: {"left": c.left.matrix, "right": c.right.matrix} for name, c in found.items()}
        return {name: {"right": c.matrix} for name, c in found.items() if name in method.memory.bases}

    def test_gpm_projects_the_gradient_before_plain_sgd(self) -> None:
        method: Any = methods.create("gpm", tiny_model().double(), lr=0.1, threshold=0.9)
        train(method, TASKS64[0])
        method.begin_task(TASKS64[1])
        images, labels = TASKS64[1].images()
        method.loss((images, labels)).backward()
        expected = {}
        for name, p in method._body():
            m = method.memory.bases[name]["right"]
            expected[name] = p.detach() - 0.1 * (p.grad - p.grad @ m @ m.mT)
        method.optimizer.step()
        for name, p in method._body():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-13)

    def test_adam_nscl_is_adam_with_coupled_decay_then_projection(self) -> None:
        method: Any = methods.create("adam-nscl", tiny_model().double(), lr=1e-2, weight_decay=0.1, rule="energy:0.9")
        train(method, TASKS64[0])
        method.begin_task(TASKS64[1])
        twins = [p.detach().clone().requires_grad_() for _, p in method._body()]
        adam = torch.optim.Adam(twins, lr=1e-2, weight_decay=0.1)
        images, labels = TASKS64[1].images()
        method.loss((images, labels)).backward()
        for twin, (_, p) in zip(twins, method._body(), strict=True):
            twin.grad = p.grad.clone()
        start = [twin.detach().clone() for twin in twins]
        method.optimizer.step()
        adam.step()
        for twin, before, (name, p) in zip(twins, start, method._body(), strict=True):
            step = method.store.sides(name).right.apply(twin.detach() - before)
            torch.testing.assert_close(p.detach(), before + step, rtol=1e-9, atol=1e-12)

    @pytest.mark.filterwarnings("ignore:.*directions are protected")
    def test_a_full_memory_freezes_the_layer_and_says_so(self) -> None:
        method: Any = methods.create("gpm", tiny_model(), base="prompts", threshold=1.0, lr=0.1)
        with pytest.warns(UserWarning, match="all 4 directions are protected"):
            train(method, TASKS[0])
        start = {key: p.detach().clone() for key, p in method._body()}
        train(method, TASKS[1])
        assert all(torch.equal(p, start[key]) for key, p in method._body())


class TestTraps:
    @pytest.mark.parametrize(("name", "base"), FORMS)
    def test_zero_grad_disables_nothing(self, name: str, base: str) -> None:
        # method-null-space.md 15.1, trap 1: with grad = None the official code finds nothing to project
        ends = []
        for none in (True, False):
            torch.manual_seed(0)
            options: dict[str, Any] = {"rule": "energy:0.9"} if name == "adam-nscl" else {"threshold": 0.9}
            method: Any = methods.create(name, tiny_model().double(), base=base, lr=0.03, **options)
            for task in TASKS64[:2]:
                method.begin_task(task)
                for _ in range(3):
                    method.optimizer.zero_grad(set_to_none=none)
                    method.loss(task.images()).backward()
                    method.optimizer.step()
                method.optimizer.zero_grad(set_to_none=none)
                if task.index == 1:
                    leaks = method.optimizer.violations()
                    assert set(leaks) == {key for key, _ in method._body()}
                    assert max(leaks.values()) < 1e-11
                method.end_task(task, task.batches())
                assert set(method.store) == {key for key, _ in method._body()}
            ends.append({key: p.detach().clone() for key, p in method._body()})
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])

    @pytest.mark.parametrize("kind", [optim.ProjectedAdam, optim.ProjectedSGD])
    def test_one_dimensional_parameters_in_the_projected_group(self, kind: Any) -> None:
        # 15.1, trap 4: the official step crashes on them
        model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
        optimizer = kind(model.named_parameters(), lr=0.1)
        basis = torch.eye(6)[:, :2]
        optimizer.set_subspace({"0.weight": memory.Projector(basis)})
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        (model(torch.randn(5, 6)) * torch.arange(4)).sum().backward()
        optimizer.step()
        for name, p in model.named_parameters():
            assert not torch.equal(p, start[name]), name
        assert torch.equal(model[0].weight[:, :2], start["0.weight"][:, :2])

    @pytest.mark.parametrize(("name", "base"), FORMS)
    def test_a_trained_parameter_without_a_projector_raises(self, name: str, base: str) -> None:
        method: Any = methods.create(name, tiny_model(), base=base)
        train(method, TASKS[0])
        lost = next(iter(method.store))
        del method.store[lost]
        with pytest.raises(SubspaceMismatchError, match=lost):
            method.begin_task(TASKS[1])

    @pytest.mark.filterwarnings("ignore:no input reached")
    def test_a_layer_that_the_pass_does_not_reach_is_named(self) -> None:
        method: Any = methods.create("adam-nscl", tiny_model())
        block = method.backbone.blocks[1]
        block.mlp.forward = lambda x: x
        with pytest.raises(SubspaceMismatchError, match=r"blocks\.1\.mlp\.fc1\.weight"):
            train(method, TASKS[0], steps=0)

    def test_the_frobenius_gain_is_reported(self) -> None:
        # 15.1, trap 5
        gains = {}
        for normalize in ("none", "fro"):
            torch.manual_seed(0)
            method: Any = methods.create("adam-nscl", tiny_model(), normalize=normalize, rule="energy:0.9", lr=0.0)
            train(method, TASKS[0])
            gains[normalize] = {name: sides["right"] for name, sides in method.subspace().items()}
        for name, row in gains["fro"].items():
            free = row["dim"] - row["protected"]
            assert row["gain"] == pytest.approx(1 / math.sqrt(row["dim"]), rel=1e-6)
            assert gains["none"][name]["gain"] == pytest.approx(math.sqrt(free / row["dim"]), rel=1e-6)


@pytest.mark.parametrize(("name", "base"), [*FORMS, ("nsp2", ""), ("null-space", "")])
def test_store_and_report_say_what_each_task_added_and_how_many_like_it_still_fit(name: str, base: str) -> None:
    torch.manual_seed(0)
    made = ({"base": base} if base else {}) | ({} if name == "gpm" else {"rule": "energy:0.9"})
    once, method = (methods.create(name, tiny_model(), **made) for _ in range(2))
    train(method, TASKS[0], steps=1)
    first = {row["layer"] + row["side"]: row for row in method.store.report()}
    train(method, TASKS[1], steps=1)
    assert len(TASKS) == 3, "the last task leaves no room to report"
    grown = 0
    for row in method.store.report():
        before, kept = first[row["layer"] + row["side"]], method.subspace()[row["layer"]][row["side"]]
        assert before["added"] == before["rank"]
        assert row["added"] == row["rank"] - before["rank"] == kept["added"]
        grown += row["added"] > 0
        left = math.inf if row["added"] <= 0 else (row["dimension"] - row["rank"]) // row["added"]
        assert row["tasks_left"] == left
        assert kept["tasks_left"] == (None if left == math.inf else left)
    assert grown, "without growth anything passes"
    once.load_state_dict(method.state_dict())
    assert once.store.report() == method.store.report()
    json.dumps(once.subspace(), allow_nan=False)
