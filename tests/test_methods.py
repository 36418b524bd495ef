"""Methods: names and options, heads, losses, schedules, states."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from continual_tiny import one_thread, tiny_model
from torch import Tensor

from cl_kernels import Projector, Sides, methods, ops
from cl_kernels.methods import _subspaces as subspaces
from cl_kernels.methods._heads import Heads
from cl_kernels.ops import rules

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


@dataclass(frozen=True)
class Toy:
    """A task of random pictures with a class-dependent shift."""

    index: int
    classes: tuple[int, ...]
    last: bool = False
    epochs: int = 2
    dtype: torch.dtype = torch.float32
    batch: int = 8

    def images(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 + self.index)
        labels = torch.tensor(self.classes).repeat_interleave(8)
        images = torch.randn(len(labels), 3, 16, 16, generator=generator)
        means = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(5))
        return (images + 2 * means[labels]).to(self.dtype), labels

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.images()
        yield from zip(images.split(self.batch), labels.split(self.batch), strict=True)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.images()
        for rows in torch.randperm(len(labels), generator=torch.Generator().manual_seed(9)).split(6):
            yield images[rows], labels[rows]


TASKS = (Toy(0, (3, 1)), Toy(1, (0, 4)), Toy(2, (2, 5), last=True))


def created(name: str, backbone: Any = None, **options: Any) -> methods.Method:
    """A method on a tiny model, with a wider one as its teacher where it needs one."""
    method = methods.create(name, tiny_model() if backbone is None else backbone, **options)
    if method.needs_teacher:
        method.set_teacher(tiny_model(dim=48), lambda images: images)
    return method


def train(method: methods.Method, task: Toy, steps: int = 4) -> None:
    method.begin_task(task)
    images, labels = task.images()
    for phase in range(len(method.phases)):
        if phase:
            method.begin_phase(phase)
        for step in range(steps):
            if method.optimizer is None:
                break
            rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(step))[:8]
            method.optimizer.zero_grad()
            method.loss((images[rows], labels[rows])).backward()
            method.optimizer.step()
    method.end_task(task, task.batches())


def snapshot(method: methods.Method) -> dict[str, Any]:
    return copy.deepcopy(method.state_dict())


class TestNames:
    def test_every_method_of_the_first_release_is_there(self) -> None:
        assert set(methods.names()) >= {
            "sequential", "joint", "linear", "class-mean", "matched-lr", "nsp2", "nsp2-exact", "full", "null-space",
        }  # fmt: skip

    def test_unknown_names_and_options_offer_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"method.*'nsp'.*nsp2"):
            methods.create("nsp", tiny_model())
        with pytest.raises(ValueError, match=r"nsp2 has no option 'etta'.*eta"):
            methods.create("nsp2", tiny_model(), etta=0.5)

    def test_the_knee_by_name_is_the_repositorys_but_never_stops_at_a_tie(self) -> None:
        smooth = torch.exp(-torch.arange(384, dtype=torch.float64) / 100)
        tied = torch.cat([torch.tensor([9.0, 8.0, 7.0]), torch.ones(5)]).double()
        rule = subspaces.parse_rule("rule", "knee")
        assert rule.protected(smooth) == rules.Knee().protected(smooth) == 34
        with pytest.raises(ValueError, match="equal eigenvalues"):
            rules.Knee().protected(tied)
        assert rule.protected(tied) == 3

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("nsp2", {"eta": 1.5}),
            ("nsp2", {"eta": float("nan")}),
            ("nsp2", {"rule": "elbow"}),
            ("nsp2", {"rule": "energy:2"}),
            ("nsp2", {"prompts": 0}),
            ("nsp2", {"prompts": 10**9}),
            ("nsp2", {"betas": 3}),
            ("nsp2", {"rule": "rank:1e400"}),
            ("nsp2", {"prompts": 2}),
            ("nsp2-exact", {"prompts": 1}),
            ("matched-lr", {"prompts": 2}),
            ("nsp2", {"weighting": "images"}),
            ("nsp2-exact", {"eta": 0.5}),
            ("sequential", {"lr": float("nan")}),
            ("sequential", {"lr": -1.0}),
            ("sequential", {"betas": (0.9, 1.0)}),
            ("sequential", {"head": "mlp"}),
            ("sequential", {"temperature": 0.0}),
            ("linear", {"schedule": "warm"}),
            ("matched-lr", {"scale": "big"}),
            ("matched-lr", {"base": "lora"}),
            ("null-space", {"rule": "energy"}),
            ("joint", {"base": "lora"}),
            ("adam-nscl", {"base": "lora"}),
            ("adam-nscl", {"floor": -1.0}),
            ("adam-nscl", {"statistic": "batch-mean", "base": "prompts"}),
            ("adam-nscl", {"later_scale": True}),
            ("gpm", {"threshold": 1.5}),
            ("gpm", {"per_layer": {"mlp": 2}}),
            ("gpm", {"mode": "official"}),
            ("gpm", {"samples_per_task": 0}),
            ("gpm", {"momentum": 1.0}),
            ("nsp2", {"refine": "yes"}),
            ("nsp2", {"refine_covariance": "tied"}),
            ("nsp2", {"refine_samples": 0}),
        ],
    )
    def test_a_value_out_of_range_is_refused_before_the_backbone_is_touched(
        self, method: str, options: dict[str, Any]
    ) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            methods.check(method, **options)

    @pytest.mark.parametrize("name", methods.names())
    def test_published_options_are_options(self, name: str) -> None:
        assert methods.published(name).items() <= {**methods.options(name), **methods.published(name)}.items()
        methods.check(name, **methods.published(name))


class TestSchedule:
    def test_golden(self) -> None:
        # method-null-space.md 14.2, V5
        expected = [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]
        assert methods.multipliers("steps-official", 10) == pytest.approx(expected, rel=1e-12)
        assert methods.multipliers("steps", 10) == pytest.approx([1] * 5 + [0.1] * 3 + [0.01] * 2, rel=1e-12)

    def test_a_hundred_epochs_split_49_30_21(self) -> None:
        rates = methods.multipliers("steps-official", 100)
        assert [rates.count(rate) for rate in sorted(set(rates), reverse=True)] == [49, 30, 21]

    def test_the_optimizer_follows_it(self) -> None:
        method = methods.create("linear", tiny_model(), lr=0.5, schedule="steps-official")
        method.begin_task(Toy(0, (0, 1), epochs=10))
        seen = []
        for _ in range(10):
            assert method.optimizer is not None
            assert method.scheduler is not None
            seen.append(method.optimizer.param_groups[0]["lr"])
            method.optimizer.step()
            method.scheduler.step()
        assert seen == pytest.approx([0.5 * rate for rate in methods.multipliers("steps-official", 10)], rel=1e-12)


class TestHeads:
    @pytest.mark.parametrize("kind", ["cosine", "linear"])
    def test_started_at_class_means_it_is_the_nearest_class_mean(self, kind: str) -> None:
        backbone = tiny_model()
        method = methods.create("linear", copy.deepcopy(backbone), head=kind)
        floor = methods.create("class-mean", copy.deepcopy(backbone), head=kind)
        for task in TASKS[:1]:
            train(method, task, steps=0)
            train(floor, task)
            images, _ = task.images()
            assert torch.equal(method.predict(images).argmax(1), floor.predict(images).argmax(1))
        assert len(set(floor.predict(images).argmax(1).tolist())) == 2

    @pytest.mark.parametrize("kind", ["cosine", "linear"])
    def test_class_means_against_the_definition(self, kind: str) -> None:
        method = methods.create("class-mean", tiny_model(), head=kind)
        for task in TASKS:
            train(method, task)
        images, labels = TASKS[1].images()
        everything = [task.images() for task in TASKS]
        features = method.features(torch.cat([part[0] for part in everything])).double()
        of_all = torch.cat([part[1] for part in everything])
        x = method.features(images).double()
        if kind == "cosine":
            features, x = F.normalize(features, dim=1), F.normalize(x, dim=1)
        means = torch.stack([features[of_all == label].mean(0) for label in method.classes])
        distance = torch.cdist(x, F.normalize(means, dim=1) if kind == "cosine" else means)
        assert torch.equal(method.predict(images).argmax(1), distance.argmin(1))
        assert method.classes == [3, 1, 0, 4, 2, 5]
        assert labels.unique().tolist() == [0, 4]

    def test_official_initialisation(self) -> None:
        method = methods.create("sequential", tiny_model(), head="linear", head_init="official")
        method.begin_task(TASKS[0])
        first = dict(method.trainable_parameters())
        weight = first["heads.0.weight"].detach()
        assert 0.01 < float(weight.std()) < 0.03
        assert torch.equal(first["heads.0.bias"], torch.zeros(2))
        method.end_task(TASKS[0], TASKS[0].batches())
        with torch.no_grad():
            first["heads.0.bias"].fill_(0.25)
        method.begin_task(TASKS[1])
        second = dict(method.trainable_parameters())
        assert torch.equal(second["heads.1.weight"], weight)
        assert torch.equal(second["heads.1.bias"], torch.full((2,), 0.25))
        method.end_task(TASKS[1], TASKS[1].batches())
        method.begin_task(TASKS[2])
        third = dict(method.trainable_parameters())["heads.2.weight"].detach()
        assert 0.8 / 32**0.5 < float(third.abs().max()) <= 1 / 32**0.5

    def test_known_classes_share_their_head_and_a_mixture_is_refused(self) -> None:
        heads = Heads(4, "linear", 1.0)
        like = torch.empty(0)
        assert heads.extend((2, 0), like) == (0, True)
        assert heads.extend((5,), like) == (1, True)
        assert heads.extend((0, 2), like) == (0, False)
        assert heads.columns(torch.tensor([5, 2, 0])).tolist() == [2, 0, 1]
        with pytest.raises(ValueError, match=r"\[0\]"):
            heads.extend((0, 7), like)

    def test_the_loss_sees_the_tasks_own_classes_only(self) -> None:
        method = methods.create("sequential", tiny_model(), temperature=2.0, lr=0.0)
        train(method, TASKS[0])
        method.begin_task(TASKS[1])
        images, labels = TASKS[1].images()
        logits = method.predict(images)[:, 2:]
        expected = F.cross_entropy(logits / 2, (labels == 4).long())
        torch.testing.assert_close(method.loss((images, labels)), expected)

    def test_old_heads_do_not_move(self) -> None:
        for name in ("sequential", "full", "linear"):
            method = methods.create(name, tiny_model())
            train(method, TASKS[0])
            before = snapshot(method)["parameters"]
            train(method, TASKS[1])
            after = method.state_dict()["parameters"]
            assert torch.equal(before["heads.0.weight"], after["heads.0.weight"])
            assert not torch.equal(after["heads.1.weight"], before["heads.0.weight"])


class TestBodies:
    def body(self, method: methods.Method) -> dict[str, Tensor]:
        saved = method.state_dict()["parameters"]
        return {name: tensor.clone() for name, tensor in saved.items() if not name.startswith("heads")}

    @pytest.mark.parametrize("name", methods.names())
    def test_only_what_should_train_trains(self, name: str) -> None:
        backbone = tiny_model()
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        method = created(name, backbone)
        for task in TASKS[:2]:
            train(method, task)
        after = {key.replace(".base.", "."): value for key, value in backbone.state_dict().items()}  # LoRA wraps layers
        moved = {key for key in before if not torch.equal(after[key], before[key])}
        linears = {
            f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        }
        weights = ("full", "null-space", "adam-nscl", "gpm", "ftp", "tpgm", "spd", "l2-sp", "wise-ft")
        assert moved == (linears if name in weights else set())
        names = set(self.body(method))
        prompts = {"prompts.0", "prompts.1"}
        nothing = {"linear", "class-mean"} | {name for name in methods.names() if "lor" in name} - {"sequential-lora"}
        expected = {**dict.fromkeys(weights, linears), **{key: set() for key in nothing}}
        if name == "sequential-lora":  # the others' adapters are no parameters any more once their task has ended
            assert len(names) == 2 * 6 * 2
            assert all(part.endswith(("lora_a", "lora_b")) for part in names)
        elif name in ("l2p", "dualprompt", "coda-prompt"):
            assert names
            assert all(part.startswith("pool.") for part in names)
        elif name == "kdp":
            assert {part.split(".")[0] for part in names} == {"pool", "kd", "kd_heads"}
        else:
            assert names == expected.get(name, {"prompts.0"} if name == "vpt-shallow" else prompts)

    @pytest.mark.parametrize(
        ("targets", "parts"), [("attention", ["attn.qkv", "attn.proj"]), ("mlp", ["mlp.fc1", "mlp.fc2"])]
    )
    def test_a_part_of_the_weights(self, targets: str, parts: list[str]) -> None:
        method: Any = methods.create("null-space", tiny_model(), targets=targets)
        train(method, TASKS[0])
        expected = {f"blocks.{i}.{part}.weight" for i in (0, 1) for part in parts}
        assert set(self.body(method)) == set(method.store) == expected

    def test_moments_are_new_in_every_task(self) -> None:
        method = methods.create("sequential", tiny_model())
        train(method, TASKS[0])
        assert method.optimizer is None
        method.begin_task(TASKS[1])
        assert method.optimizer is not None
        assert not method.optimizer.state

    def test_a_task_must_end_before_the_next(self) -> None:
        method = methods.create("sequential", tiny_model())
        method.begin_task(TASKS[0])
        with pytest.raises(RuntimeError, match="task 0 has not been ended"):
            method.begin_task(TASKS[1])

    def test_joint_starts_again_and_trains_every_head(self) -> None:
        method = methods.create("joint", tiny_model())
        origin = self.body(method)
        train(method, TASKS[0])
        assert not torch.equal(self.body(method)["prompts.0"], origin["prompts.0"])
        method.begin_task(TASKS[1])
        assert torch.equal(self.body(method)["prompts.0"], origin["prompts.0"])
        names = [name for name, _ in method.trainable_parameters()]
        assert {"heads.0.weight", "heads.1.weight", "prompts.0"} <= set(names)
        assert method.scope == "seen"
        images, labels = TASKS[0].images()
        expected = F.cross_entropy(method.predict(images), (labels == 1).long())
        torch.testing.assert_close(method.loss((images, labels)), expected)

    @pytest.mark.parametrize("base", ["prompts", "full"])
    def test_a_constant_scale_is_a_smaller_step_from_task_2_on(self, base: str) -> None:
        plain = {"prompts": "sequential", "full": "full"}[base]
        options: dict[str, Any] = {"lr": 1e-3, "head_lr": 0.0, "weight_decay": 0.0}
        runs = []
        for name, extra in ((plain, {}), ("matched-lr", {"base": base, "scale": 0.125})):
            torch.manual_seed(0)
            method = methods.create(name, tiny_model(), **options, **extra)
            train(method, TASKS[0])
            start = self.body(method)
            train(method, TASKS[1], steps=1)
            end = self.body(method)
            runs.append((start, {key: end[key].double() - start[key].double() for key in end}))
        (first, steps), (second, smaller) = runs
        for key in first:
            assert torch.equal(first[key], second[key]), "task 1 is the same"
            torch.testing.assert_close(smaller[key], 0.125 * steps[key], rtol=2e-3, atol=2e-7)

    @pytest.mark.parametrize("base", ["prompts", "full"])
    def test_the_automatic_scale_is_the_projectors_rms_gain(self, base: str) -> None:
        made: list[Any] = []
        for name, options in (("matched-lr", {"base": base}), ({"prompts": "nsp2", "full": "null-space"}[base], {})):
            torch.manual_seed(0)
            made.append(methods.create(name, tiny_model(), **options))
            train(made[-1], TASKS[0])
        control, projecting = made
        for name in projecting.store:
            for mine, theirs in zip(control.store.sides(name), projecting.store.sides(name), strict=True):
                assert (mine is None) == (theirs is None)
                if mine is None:
                    continue
                gain = float(theirs.matrix().norm()) / theirs.dim**0.5
                torch.testing.assert_close(mine.matrix(), gain * torch.eye(theirs.dim))
                assert 0 < gain < 1
        assert control.subspace() == projecting.subspace()
        control.begin_task(TASKS[1])
        images, labels = TASKS[1].images()
        loss = control.loss((images, labels))
        torch.testing.assert_close(loss, F.cross_entropy(control.predict(images)[:, 2:], (labels == 4).long()))


class TestProtection:
    def test_null_space_updates_leave_protected_inputs_alone(self) -> None:
        backbone = tiny_model()
        method: Any = methods.create("null-space", backbone, rule="energy:0.9", lr=1e-2)
        train(method, TASKS[0])
        covariances = {name: sides["right"] for name, sides in method.memory.statistics.items()}
        before = {name: parameter.detach().clone() for name, parameter in method.trainable_parameters()}
        train(method, TASKS[1], steps=6)
        for name, projector in ((name, method.store.sides(name).right) for name in method.store):
            moved = (dict(backbone.named_parameters())[name].detach() - before[name]).double()
            assert float(moved.norm()) > 0
            # the store was rebuilt after task 2: protected directions of task 1 from its own statistics
            values, vectors = torch.linalg.eigh(covariances[name])
            rank = rules.Energy(0.9).protected(values.flip(0).clamp(min=0))
            basis = vectors.flip(1)[:, :rank]
            assert float((moved @ basis).norm() / moved.norm()) < 1e-4
            assert projector.dim == moved.shape[1]

    @pytest.mark.parametrize("name", ["nsp2", "null-space", "adam-nscl"])
    def test_statistics_add_up_over_tasks_and_stop_at_the_last(self, name: str) -> None:
        options = {"accumulation": "sum"} if name == "adam-nscl" else {}
        method: Any = methods.create(name, tiny_model(), lr=0.0, head_lr=0.0, **options)
        sums = []
        for task in TASKS:
            train(method, task, steps=1)
            sums.append({key: sides["right"] for key, sides in method.memory.statistics.items()})
        for key in sums[0]:
            first, second, third = (s[key] for s in sums)
            assert float(second.diagonal().sum()) > 1.5 * float(first.diagonal().sum())
            assert torch.equal(second, third)

    def test_report_of_a_projector(self) -> None:
        basis = torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64)).Q
        covariance = 7 * basis @ basis.mT + torch.eye(12, dtype=torch.float64)
        report = subspaces.side_report(Projector(basis, 0.5, 0.4), covariance)
        assert (report["dim"], report["protected"]) == (12, 3)
        assert report["energy"] == pytest.approx(24 / 33)
        values = torch.tensor([0.5] * 9 + [0.1] * 3, dtype=torch.float64)
        assert report["gain"] == pytest.approx(float(values.square().mean().sqrt()))
        flipped = subspaces.side_report(Projector(basis, 0.0, -1.0), covariance)
        assert flipped["protected"] == 9
        assert flipped["energy"] == pytest.approx(9 / 33)
        assert subspaces.matched(Sides(None, Projector(basis, 0.5, 0.4))).left is None

    @pytest.mark.parametrize(("eta", "expected"), [(0.0, (0, 0.0)), (0.9, (3, 0.75)), (1.0, (3, 0.75))])
    @pytest.mark.parametrize("few", [True, False])  # whichever of the two bases is kept
    def test_the_report_counts_what_is_protected(self, eta: float, expected: tuple[int, float], few: bool) -> None:
        rest = 16 if few else 2
        covariance = torch.diag(torch.tensor([4.0] * 3 + [4.0 / rest] * rest, dtype=torch.float64))
        row = subspaces.side_report(ops.null_space_projector(covariance, rules.Rank(3), mix=eta), covariance)
        assert (row["protected"], row["energy"]) == pytest.approx(expected)

    @pytest.mark.parametrize("normalize", [None, "fro"])
    @pytest.mark.parametrize("eta", [0.9, 1.0])
    def test_a_soft_edge_is_counted_like_a_hard_one(self, eta: float, normalize: Any) -> None:
        values = torch.tensor([9.0, 8.0, 7.0, *[1e-3] * 5], dtype=torch.float64)
        basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.manual_seed(0))).Q
        covariance = (basis * values) @ basis.mT
        rows = [
            subspaces.side_report(
                ops.null_space_projector(covariance, rules.Rank(3), mix=eta, normalize=normalize, solver=solver),
                covariance,
            )
            for solver in ("eigh", "filter")
        ]
        assert rows[0]["protected"] == rows[1]["protected"] == 3
        for key in ("gain", "energy"):
            assert rows[1][key] == pytest.approx(rows[0][key], rel=1e-3)

    def test_what_protects_nothing_or_all_is_reported_so_whatever_its_form(self) -> None:
        covariance = torch.eye(6, dtype=torch.float64)
        for gain, expected in ((0.0, (6, 1.0)), (0.3, (0, 0.0)), (1.0, (0, 0.0))):
            row = subspaces.side_report(Projector.from_dense(gain * covariance), covariance)
            assert (row["protected"], row["energy"]) == expected

    @pytest.mark.parametrize("name", ["null-space", "adam-nscl", "nsp2", "nsp2-exact"])
    def test_a_soft_edge_trains_and_goes_on_from_its_state(self, name: str) -> None:
        made: dict[str, Any] = {edge: methods.create(name, tiny_model(), edge=edge) for edge in ("hard", "soft")}
        for method in made.values():
            for task in TASKS[:2]:
                train(method, task)
        hard, soft = (torch.cat([p.detach().flatten() for _, p in m._body()]) for m in made.values())
        assert not torch.equal(hard, soft)
        kept = [Sides.of(projector).right for projector in made["soft"].store.values()]
        assert kept
        assert all(right is not None and right.dense is not None for right in kept)
        again: Any = methods.create(name, tiny_model(), edge="soft")
        again.load_state_dict(made["soft"].state_dict())
        for method in (made["soft"], again):
            train(method, TASKS[2])
        for (_, mine), (_, theirs) in zip(made["soft"]._body(), again._body(), strict=True):
            assert torch.equal(mine, theirs)

    @pytest.mark.parametrize("eta", [1.0, 0.97])
    def test_rms_gain_is_what_white_updates_see(self, eta: float) -> None:
        # method-null-space.md 14.1, property 2, and the table of section 5
        d, free = 768, 745
        basis = torch.linalg.qr(torch.randn(d, d - free, dtype=torch.float64)).Q
        b = eta / free**0.5
        projector = Projector(basis, b + 1 - eta, b)
        gain = subspaces.rms_gain(projector)
        assert gain == pytest.approx({1.0: 0.0361, 0.97: 0.0648}[eta], abs=6e-5)
        u = torch.randn(4000, d, dtype=torch.float64)
        assert float(projector.apply(u).norm() / u.norm()) == pytest.approx(gain, rel=5e-3)
        assert subspaces.rms_gain(Projector.from_dense(projector.matrix())) == pytest.approx(gain, rel=1e-12)


class TestState:
    @pytest.mark.parametrize(
        "name", [*methods.names(), "matched-lr full", "joint full", "gpm prompts", "adam-nscl prompts"]
    )
    def test_saved_in_the_middle_of_a_task_it_goes_on_bit_for_bit(self, name: str) -> None:
        name, *base = name.split()
        options: dict[str, Any] = {"base": base[0]} if base else {}

        def fresh() -> methods.Method:
            torch.manual_seed(0)
            return created(name, schedule="cosine", **options)

        def steps(method: methods.Method, task: Toy, which: range) -> None:
            images, labels = task.images()
            for step in which:
                if method.optimizer is not None and method.scheduler is not None:
                    rows = slice(step, step + 8)
                    method.optimizer.zero_grad()
                    method.loss((images[rows], labels[rows])).backward()
                    method.optimizer.step()
                    if step == 2:
                        method.scheduler.step()

        def tail(method: methods.Method) -> dict[str, Any]:
            steps(method, TASKS[1], range(2, 5))
            for phase in range(1, len(method.phases)):
                method.begin_phase(phase)
                steps(method, TASKS[1], range(5))
            method.end_task(TASKS[1], TASKS[1].batches())
            train(method, TASKS[2])
            return method.state_dict()

        straight = fresh()
        train(straight, TASKS[0])
        straight.begin_task(TASKS[1])
        steps(straight, TASKS[1], range(2))
        saved = snapshot(straight)
        expected = tail(straight)
        torch.manual_seed(99)
        resumed = created(name, schedule="cosine", **options)
        resumed.load_state_dict(saved)
        resumed.resume_task(TASKS[1])
        again = tail(resumed)
        assert expected["parameters"].keys() == again["parameters"].keys()
        for key, value in expected["parameters"].items():
            assert torch.equal(value, again["parameters"][key]), key
        images, _ = TASKS[0].images()
        assert torch.equal(straight.predict(images), resumed.predict(images))

    def test_a_state_that_does_not_fit_is_refused(self) -> None:
        method = methods.create("sequential", tiny_model())
        train(method, TASKS[0])
        state = snapshot(method)
        state["parameters"]["prompts.0"] = torch.zeros(1, 5, 32)
        with pytest.raises(ValueError, match=r"prompts\.0"):
            methods.create("sequential", tiny_model()).load_state_dict(state)
