"""Methods that train the backbone's weights near an anchor: what they train, what holds them, and what goes on from
task to task."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from continual_tiny import one_thread, tiny_backbone, tiny_config, tiny_data, tiny_model
from test_methods import TASKS, Toy, snapshot, train
from torch import Tensor, nn

from cl_kernels import continual, methods
from cl_kernels.continual.feed import held_out
from cl_kernels.optim import TPGM

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

ROBUST = ("ftp", "tpgm", "spd", "l2-sp", "wise-ft")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def rows(moved: Tensor) -> Tensor:
    return (moved.reshape(1, -1) if moved.ndim < 2 else moved.flatten(1)).abs().sum(1)


class TestWhatTrains:
    @pytest.mark.parametrize("targets", ["blocks", "attention", "mlp", "all"])
    def test_all_are_compared_on_the_weights_that_full_trains(self, targets: str) -> None:
        trained = {
            name: [key for key, _ in methods.create(name, tiny_model(), targets=targets)._body()]  # type: ignore[attr-defined]  # a WeightMethod
            for name in ("full", *ROBUST)
        }
        assert all(names == trained["full"] for names in trained.values())
        assert len(trained["full"]) == {"blocks": 8, "attention": 4, "mlp": 4, "all": 30}[targets]

    @pytest.mark.parametrize("name", ["full", *ROBUST])
    def test_all_is_everything_but_a_classifier(self, name: str) -> None:
        model: Any = tiny_model()
        model.reset_classifier(7)
        before = weights(model)
        method: Any = methods.create(name, model, targets="all", lr=1e-3)
        assert {key for key, _ in method._body()} == set(before) - {"head.weight", "head.bias"}
        train(method, TASKS[0])
        moved = {key for key, value in weights(model).items() if not torch.equal(value, before[key])}
        missing = set(before) - moved
        assert {"head.weight", "head.bias"} <= missing
        if name == "tpgm":  # a norm's weight near 1 with a radius at its floor is where it was, rounded
            missing -= {key for key in missing if "norm" in key}
        assert missing == {"head.weight", "head.bias"}

    @pytest.mark.parametrize("name", ["null-space", "gpm", "adam-nscl"])
    def test_a_projector_of_inputs_does_not_cover_all(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"targets: expected blocks, attention or mlp, got 'all'"):
            methods.check(name, targets="all")

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("ftp", {"kappa": 1.5}),
            ("ftp", {"radius": -1.0}),
            ("ftp", {"norm": "linf"}),
            ("ftp", {"masked": "yes"}),
            ("ftp", {"anchor": "previous task"}),
            ("ftp", {"targets": "heads"}),
            ("tpgm", {"held_out": 0.0}),
            ("tpgm", {"held_out": 1.0}),
            ("tpgm", {"project": "epoch"}),
            ("tpgm", {"iterations": 0}),
            ("tpgm", {"every": 0}),
            ("tpgm", {"norm": "mars"}),
            ("spd", {"strength": -1.0}),
            ("l2-sp", {"strength": math.nan}),
            ("l2-sp", {"coupled": 1}),
            ("l2-sp", {"head_weight_decay": -1.0}),
            ("wise-ft", {"alpha": 1.5}),
        ],
    )
    def test_values_out_of_range(self, method: str, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            methods.check(method, **options)


class TestNothingHeld:
    @pytest.mark.parametrize(
        ("name", "options"),
        [("spd", {"strength": 0.0}), ("l2-sp", {"strength": 0.0}), ("wise-ft", {"alpha": 1.0})],
    )
    def test_it_is_full_bit_for_bit(self, name: str, options: dict[str, Any]) -> None:
        runs = []
        for method_name, given in (("full", {}), (name, options)):
            torch.manual_seed(0)
            method = methods.create(method_name, tiny_model(), targets="all", lr=1e-3, **given)
            for task in TASKS[:2]:
                train(method, task)
            runs.append(snapshot(method)["parameters"])
        for key, value in runs[0].items():
            assert torch.equal(value, runs[1][key]), key

    def test_an_endless_fixed_radius_is_full_to_rounding(self) -> None:
        runs = []
        for name, given in (("full", {}), ("ftp", {"radius": 1e30})):
            torch.manual_seed(0)
            method = methods.create(name, tiny_model(), lr=1e-3, **given)
            train(method, TASKS[0], steps=6)
            runs.append(snapshot(method)["parameters"])
        for key, value in runs[0].items():
            torch.testing.assert_close(value, runs[1][key], rtol=0, atol=1e-5)


class TestAnchors:
    @pytest.mark.parametrize("name", ROBUST)
    @pytest.mark.parametrize("anchor", ["previous", "pretrained"])
    def test_distances_are_from_the_anchor_that_was_asked_for(self, name: str, anchor: str) -> None:
        model = tiny_model()
        method = methods.create(name, model, anchor=anchor, lr=1e-3)
        before = [weights(model)]
        for task in TASKS[:2]:
            train(method, task)
            before.append(weights(model))
            from_ = before[0] if anchor == "pretrained" else before[-2]
            report = method.anchoring()
            assert set(report) == {name for name, _ in method._body()}  # type: ignore[attr-defined]  # a WeightMethod
            for key, values in report.items():
                moved = (before[-1][key].double() - from_[key].double()).norm()
                assert values["distance"] == pytest.approx(float(moved), rel=1e-9)
                assert values["distance"] > 0
                assert values["relative"] == pytest.approx(float(moved / from_[key].double().norm()), rel=1e-9)

    @pytest.mark.parametrize("name", ROBUST)
    def test_heads_are_not_held(self, name: str) -> None:
        """The strongest setting of each holds the body where it is; heads train as ever."""
        options = {
            "ftp": {"radius": 0.0}, "tpgm": {"radius_lr": 0.0}, "spd": {}, "wise-ft": {"alpha": 0.0},
            "l2-sp": {"strength": 1e3, "coupled": False},
        }[name]  # fmt: skip
        model = tiny_model()
        before = weights(model)
        method = methods.create(name, model, lr=1e-3, head_lr=1e-2, **options)
        method.begin_task(TASKS[0])
        heads = {key: p.detach().clone() for key, p in method.trainable_parameters() if key.startswith("heads")}
        assert method.optimizer is not None
        images, labels = TASKS[0].images()
        for _ in range(4):
            method.optimizer.zero_grad()
            method.loss((images, labels)).backward()
            method.optimizer.step()
        after = dict(method.trainable_parameters())
        for key, value in heads.items():
            assert float((after[key].detach() - value).abs().max()) > 1e-2, key
        method.end_task(TASKS[0], TASKS[0].batches())
        if name in ("ftp", "wise-ft"):
            for key, value in weights(model).items():
                assert torch.equal(value, before[key]), key

    def test_what_wise_ft_evaluates_is_what_the_next_task_starts_from(self) -> None:
        alpha, model = 0.25, tiny_model()
        torch.manual_seed(0)
        method = methods.create("wise-ft", model, alpha=alpha, lr=1e-3)
        torch.manual_seed(0)
        twin_model = tiny_model()
        twin = methods.create("full", twin_model, lr=1e-3)
        before = weights(model)
        train(method, TASKS[0])
        train(twin, TASKS[0])
        tuned, mixed = weights(twin_model), weights(model)
        for key in method.anchoring():
            torch.testing.assert_close(mixed[key], before[key] + alpha * (tuned[key] - before[key]), rtol=0, atol=1e-7)
        method.begin_task(TASKS[1])
        for key, value in weights(model).items():
            assert torch.equal(value, mixed[key]), key


class TestFTP:
    @pytest.mark.parametrize("anchor", ["previous", "pretrained"])
    def test_every_row_is_within_its_radius_after_every_task(self, anchor: str) -> None:
        model = tiny_model()
        method = methods.create("ftp", model, targets="all", anchor=anchor, lr=1e-3)
        before = weights(model)
        for task in TASKS:
            train(method, task, steps=6)
            now, report = weights(model), method.anchoring()
            assert any(values["projected"] > 0 for values in report.values())
            for key, values in report.items():
                slack = now[key][0].numel() * 2**-24 * float(now[key].abs().max())
                assert float(rows(now[key] - before[key]).max()) <= values["radius"] * (1 + 1e-5) + slack, key
                assert 0 <= values["fire_rate"] <= 1
            before = before if anchor == "pretrained" else now

    def test_around_pretrained_weights_a_second_task_goes_on(self) -> None:
        """A fresh radius would return every weight to the anchor in the first step, and undo the first task."""
        for anchor, kept in (("pretrained", True), ("previous", False)):
            model = tiny_model()
            method = methods.create("ftp", model, anchor=anchor, lr=1e-3)
            before = weights(model)
            train(method, TASKS[0], steps=8)
            learned, radii = weights(model), {key: values["radius"] for key, values in method.anchoring().items()}
            method.begin_task(TASKS[1])
            optimizer: Any = method.optimizer
            images, labels = TASKS[1].images()
            method.loss((images, labels)).backward()
            optimizer.step()
            for key, radius in radii.items():
                if kept:
                    assert optimizer.radii()[key] == pytest.approx(radius, abs=1.01e-2)
                    assert float((weights(model)[key] - before[key]).norm()) > 0.3 * float(
                        (learned[key] - before[key]).norm()
                    )
                else:
                    assert torch.equal(weights(model)[key], learned[key]), "the first step stays on its anchor"


class Recording(Toy):
    """A task that tells which of its images were held out."""

    def images(self) -> tuple[Tensor, Tensor]:
        images, labels = super().images()
        keep = torch.arange(len(labels)) % 4 != 0
        return images[keep], labels[keep]

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = super().images()
        yield from zip(images[::4].split(3), labels[::4].split(3), strict=True)


class TestTPGM:
    def trained(self, steps: int = 5, **options: Any) -> tuple[list[int], list[int]]:
        """How often radii were learned, and the weights projected."""
        learned: list[int] = []
        projected: list[int] = []
        method: Any = methods.create("tpgm", tiny_model(), lr=1e-3, **options)
        task = Recording(0, (3, 1))
        method.begin_task(task)
        tpgm: TPGM = method._tpgm
        inner, outer = tpgm._learn, tpgm._write
        tpgm._learn = lambda *a: (learned.append(len(a[1][0][1])), inner(*a))[1]  # type: ignore[method-assign]  # watched
        tpgm._write = lambda: (projected.append(len(learned)), outer())[1]  # type: ignore[method-assign]  # watched
        images, labels = task.images()
        for _ in range(steps):
            method.optimizer.zero_grad()
            method.loss((images, labels)).backward()
            method.optimizer.step()
        method.end_task(task, task.batches())
        return learned, projected

    def test_the_published_schedules(self) -> None:
        learned, projected = self.trained()  # DomainNet: one inner step after each step
        assert learned == [3, 1, 3, 1, 3], "the held-out batches, again and again"
        assert projected == [1, 2, 3, 4, 5]
        learned, projected = self.trained(project="end", norm="l2")  # ImageNet: 200 after training
        assert len(learned) == 200
        assert projected == [200]
        assert self.trained(every=2, iterations=3)[1] == [3, 3, 6, 6, 9]

    def test_radii_follow_held_out_images_alone(self) -> None:
        """Other held-out images give other radii at the same weights; other training images, the same weights given,
        do not come in."""
        radii = []
        for labels in ((3, 1), (1, 3)):
            torch.manual_seed(0)
            method: Any = methods.create("tpgm", tiny_model(), lr=1e-3)
            task = Recording(0, (3, 1))
            swapped = {3: labels[0], 1: labels[1]}
            held = [(x, torch.tensor([swapped[int(label)] for label in y])) for x, y in task.held_out()]
            object.__setattr__(task, "held_out", lambda held=held: iter(held))
            train(method, task, steps=6)
            radii.append([values["radius"] for values in method.anchoring().values()])
        assert all(a != b for a, b in zip(*radii, strict=True))
        assert sum(radii[0]) > sum(radii[1]), "held-out images with wrong labels hold the weights back"

    def test_radii_go_on_around_pretrained_weights(self) -> None:
        method: Any = methods.create("tpgm", tiny_model(), lr=1e-3, anchor="pretrained")
        train(method, TASKS[0])
        before = {key: values["radius"] for key, values in method.anchoring().items()}
        method.begin_task(TASKS[1])
        assert method._tpgm.radii() == before
        other: Any = methods.create("tpgm", tiny_model(), lr=1e-3)
        train(other, TASKS[0])
        other.begin_task(TASKS[1])
        assert set(other._tpgm.radii().values()) == {0.0}

    def test_a_task_without_held_out_images_is_refused(self) -> None:
        method = methods.create("tpgm", tiny_model())
        task = Recording(0, (3, 1))
        object.__setattr__(task, "held_out", lambda: iter(()))
        with pytest.raises(ValueError, match="holds no images out"):
            train(method, task)

    def test_the_share_of_every_class(self) -> None:
        labels = torch.tensor([0] * 20 + [1] * 2 + [2] * 5 + [3])
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
        held, rest = held_out(labels, 0.1, order)
        assert sorted(labels[held].tolist()) == [0, 0, 1, 2]
        assert sorted([*held.tolist(), *rest.tolist()]) == list(range(len(labels)))
        assert rest.tolist() == sorted(rest.tolist())
        assert held.tolist() != sorted(held.tolist()), "batches of them are not of one class each"

    def test_a_run_trains_on_no_held_out_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from cl_kernels.methods.tpgm import TPGMMethod

        seen: dict[str, list[Tensor]] = {"train": [], "held": []}
        loss, learn = TPGMMethod.loss, TPGM._learn
        inside = []

        def watched(self: Any, batch: Any, *facts: Any) -> Tensor:
            seen["held" if inside else "train"].append(batch[0].flatten(1).sum(1))
            return loss(self, batch, *facts)

        def learning(self: Any, *arguments: Any) -> None:
            inside.append(1)
            learn(self, *arguments)
            inside.pop()

        monkeypatch.setattr(TPGMMethod, "loss", watched)
        monkeypatch.setattr(TPGM, "_learn", learning)
        config = tiny_config("tpgm", options={"held_out": 0.2}, tasks=2, epochs=2)
        found = continual.run(config, data=tiny_data(), backbone=tiny_backbone())
        train_, held = ({round(float(v), 3) for part in parts for v in part} for parts in seen.values())
        assert (len(train_), len(held)) == (48, 12)
        assert not train_ & held
        assert [task["train"] for task in found["tasks"]] == [30, 30]


class TestRuns:
    @pytest.mark.parametrize("name", ROBUST)
    def test_results_say_what_held_each_weight(self, name: str) -> None:
        found = continual.run(tiny_config(name, tasks=2, epochs=1), data=tiny_data(), backbone=tiny_backbone())
        kept = json.loads(json.dumps(found["anchoring"], allow_nan=False))
        further = {"ftp": {"radius", "projected", "fire_rate"}, "tpgm": {"radius", "projected", "fire_rate"},
                   "spd": {"fire_rate"}, "l2-sp": {"fire_rate"}, "wise-ft": set()}[name]  # fmt: skip
        assert len(kept) == 2
        for report in kept:
            assert len(report) == 8
            assert all(set(values) == {"distance", "relative"} | further for values in report.values())

    def test_methods_without_anchors_say_nothing(self) -> None:
        found = continual.run(tiny_config("full", tasks=2, epochs=1), data=tiny_data(), backbone=tiny_backbone())
        assert found["anchoring"] == [{}, {}]

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("ftp", {"anchor": "pretrained", "targets": "all"}),
            ("ftp", {"lr": 0.1}),  # falls to the floor and back
            ("tpgm", {"anchor": "pretrained", "every": 2}),
            ("tpgm", {"project": "end", "iterations": 3}),
            ("spd", {"anchor": "pretrained"}),
            ("l2-sp", {"coupled": False, "strength": 5.0}),
            ("wise-ft", {"anchor": "pretrained"}),
        ],
    )
    def test_saved_in_any_step_it_goes_on_bit_for_bit(self, name: str, options: dict[str, Any]) -> None:
        def fresh() -> methods.Method:
            torch.manual_seed(0)
            return methods.create(name, tiny_model(), **{"lr": 1e-3, **options})

        def run(stop: int | None) -> dict[str, Any]:
            method, done = fresh(), 0
            for task in TASKS:
                method.begin_task(task)
                images, labels = task.images()
                for step in range(4):
                    if done == stop:
                        state = copy.deepcopy(method.state_dict())
                        method = fresh()
                        method.load_state_dict(state)
                        method.resume_task(task)
                    assert method.optimizer is not None
                    method.optimizer.zero_grad()
                    method.loss((images[step : step + 8], labels[step : step + 8])).backward()
                    method.optimizer.step()
                    done += 1
                method.end_task(task, task.batches())
                if done == stop:
                    state, method = copy.deepcopy(method.state_dict()), fresh()
                    method.load_state_dict(state)
            return {**method.state_dict()["parameters"], "report": method.anchoring()}

        whole = run(None)
        for stop in (1, 4, 6, 8, 11):
            again = run(stop)
            assert again["report"] == whole["report"], stop
            for key, value in whole.items():
                assert key == "report" or torch.equal(value, again[key]), (stop, key)
