"""The LoRA methods: which snapshot sees an image, what is frozen for good, what old inputs notice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_tiny import one_thread, tiny_backbone, tiny_config, tiny_data, tiny_model
from torch import Tensor

from cl_kernels import methods
from cl_kernels.continual import run
from cl_kernels.methods._base import HeadMethod
from cl_kernels.methods._task_inference import TaskInference, _k_means
from cl_kernels.nn import LoRAStack

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


@dataclasses.dataclass(frozen=True)
class Toy:
    """A task of pictures of its classes; `shade` is what a domain adds to all of them."""

    index: int
    classes: tuple[int, ...]
    shade: float = 0.0
    last: bool = False
    epochs: int = 2
    each: int = 8

    def images(self) -> tuple[Tensor, Tensor]:
        labels = torch.tensor(self.classes).repeat_interleave(self.each)
        noise = torch.randn(len(labels), 3, 16, 16, generator=torch.Generator().manual_seed(100 + self.index))
        means = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(5))
        ramp = torch.linspace(-1, 1, 16)
        return noise + 0.3 * means[labels] + self.shade * ramp, labels  # hard enough for a loss to remain

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.images()
        yield from zip(images.split(8), labels.split(8), strict=True)


CLASS = (Toy(0, (3, 1)), Toy(1, (0, 4)), Toy(2, (2, 5), last=True))
DOMAIN = (Toy(0, (0, 1)), Toy(1, (0, 1), shade=6.0), Toy(2, (0, 1), shade=-6.0, last=True))


def train(method: Any, task: Toy, steps: int = 3) -> None:
    """`steps` steps an epoch."""
    method.begin_task(task)
    images, labels = task.images()
    for epoch in range(task.epochs):
        for step in range(steps):
            rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(10 * epoch + step))[:8]
            method.optimizer.zero_grad()
            method.loss((images[rows], labels[rows])).backward()
            method.optimizer.step()
        method.scheduler.step()
    method.end_task(task, task.batches())


def trained(name: str, tasks: tuple[Toy, ...] = CLASS, **options: Any) -> Any:
    torch.manual_seed(3)
    method: Any = methods.create(name, tiny_model(), **({"rank": 4, "alpha": 4.0, "lr": 2e-2} | options))
    for task in tasks:
        train(method, task)
    return method


@contextmanager
def inference(method: Any, kind: str) -> Iterator[None]:
    """The same trained method under another protocol."""
    before = method.options
    method.options = dataclasses.replace(before, inference=kind)
    try:
        yield
    finally:
        method.options = before


def clusters(tasks: int, classes: int, apart: float, dim: int = 12) -> list[tuple[Tensor, Tensor]]:
    """(features, labels) of every task, each class around a point of its own."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(tasks):
        labels = torch.arange(classes).repeat_interleave(20)
        centres = torch.randn(classes, dim, generator=generator) * apart
        found.append((centres[labels] + 0.3 * torch.randn(len(labels), dim, generator=generator), labels))
    return found


class TestTaskInference:
    def remembered(self, data: list[tuple[Tensor, Tensor]], number: int = 2) -> TaskInference:
        inference = TaskInference(number)
        for task, (features, labels) in enumerate(data):
            inference.remember(task, zip(features.split(7), labels.split(7), strict=True))
        return inference

    def test_separated_clusters_give_back_their_task(self) -> None:
        data = clusters(tasks=4, classes=3, apart=3.0)
        inference = self.remembered(data)
        for task, (features, _) in enumerate(data):
            assert (inference.tasks_of(features) == task).all()

    def test_a_class_that_comes_again_has_clusters_of_its_own_in_each_domain(self) -> None:
        data = clusters(tasks=3, classes=2, apart=3.0)  # the same labels 0 and 1 in every task
        inference = self.remembered(data, number=1)
        assert inference.tasks == [0, 0, 1, 1, 2, 2]
        assert (inference.tasks_of(data[1][0]) == 1).all()

    def test_the_distance_is_that_of_the_document(self) -> None:
        """Shrinkage, correlation and pseudo-inverse, written out with dense matrices."""
        data = clusters(tasks=2, classes=1, apart=0.3)
        inference = self.remembered(data, number=1)
        wanted = []
        for features, _ in data:
            unit = torch.nn.functional.normalize(features.double(), dim=1)
            s = torch.cov(unit.mT) + 1e-4 * torch.eye(12).double()
            s = s + s.diagonal().mean() * torch.eye(12).double()
            p = torch.linalg.pinv(s / torch.outer(s.diagonal().sqrt(), s.diagonal().sqrt()))
            rows = torch.nn.functional.normalize(data[0][0].double(), dim=1) - unit.mean(dim=0)
            wanted.append(torch.einsum("nd,de,ne->n", rows, p, rows))
        for mean, factor, want in zip(inference.means, inference.factors, wanted, strict=True):
            rows = torch.nn.functional.normalize(data[0][0].double(), dim=1) - mean
            torch.testing.assert_close((rows @ factor.mT).square().sum(dim=1), want, rtol=1e-9, atol=1e-12)
        assert torch.equal(inference.tasks_of(data[0][0]), torch.stack(wanted).argmin(dim=0))

    def test_the_scale_of_a_feature_does_not_matter(self) -> None:
        data = clusters(tasks=3, classes=2, apart=1.0)
        inference = self.remembered(data)
        assert torch.equal(inference.tasks_of(data[2][0] * 50), inference.tasks_of(data[2][0]))

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_a_class_of_a_few_images_has_finite_distances(self, count: int) -> None:
        features = torch.randn(count, 12, generator=torch.Generator().manual_seed(0))
        inference = self.remembered([(features, torch.zeros(count, dtype=torch.int64)), *clusters(1, 2, 3.0)], 4)
        assert all(torch.isfinite(factor).all() for factor in inference.factors)
        assert (inference.tasks_of(features) == 0).all()

    def test_equal_images_and_more_clusters_than_points_are_no_trouble(self) -> None:
        same = torch.ones(9, 12)
        assert [len(members) for members in _k_means(same, 4)] == [9]
        two = torch.cat([torch.zeros(6, 3), torch.ones(5, 3)])
        assert sorted(len(members) for members in _k_means(two, 2)) == [5, 6]
        lone = torch.cat([torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.full((1, 3), 90.0)])
        assert all(len(members) > 1 for members in _k_means(lone, 3))  # an outlier is no cluster

    def test_a_state_goes_into_a_new_one(self) -> None:
        data = clusters(tasks=3, classes=2, apart=0.4)
        inference = self.remembered(data)
        other = TaskInference(2)
        other.load(inference.state(), torch.device("cpu"))
        everything = torch.cat([features for features, _ in data])
        assert torch.equal(other.tasks_of(everything), inference.tasks_of(everything))
        assert other.tasks == inference.tasks


@pytest.fixture(scope="module")
def method() -> Any:
    return trained("lorac-ipc", DOMAIN, share=0.0)


class TestProtocols:
    def test_each_image_sees_the_snapshot_that_its_protocol_says(self, method: Any) -> None:
        images = torch.cat([task.images()[0] for task in DOMAIN])
        tasks = method._tasks(images)
        assert len(tasks.unique()) == 3
        shown = []
        for task in range(3):
            with method.model.at(task):
                shown.append(method.model(images))
        shown = torch.stack(shown)
        assert not torch.allclose(shown[0], shown[2])
        every = torch.arange(len(images))
        torch.testing.assert_close(method.features(images), shown[tasks, every])
        with inference(method, "last"):
            torch.testing.assert_close(method.features(images), shown[2])
        with inference(method, "batch"):
            torch.testing.assert_close(method.features(images), shown[int(tasks.mode().values)])
        with inference(method, "known"):
            for task in range(3):
                method.assume_task(task)
                torch.testing.assert_close(method.features(images), shown[task])
            method.assume_task(None)

    def test_instance_wise_an_image_is_judged_by_itself(self, method: Any) -> None:
        """Neither the order nor the company in a batch matters; a vote depends on both."""
        images = torch.cat([task.images()[0][:5] for task in DOMAIN])
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        together = method.predict(images)
        torch.testing.assert_close(method.predict(images[order]), together[order], rtol=1e-4, atol=1e-5)
        alone = torch.cat([method.predict(image[None]) for image in images])
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
        with inference(method, "batch"):
            assert not torch.allclose(method.predict(images), together, atol=1e-3)

    def test_known_needs_to_be_told(self, method: Any) -> None:
        images = DOMAIN[0].images()[0]
        with inference(method, "known"), pytest.raises(RuntimeError, match="assume_task"):
            method.predict(images)
        method.assume_task(7)
        with inference(method, "known"), pytest.raises(ValueError, match="one of the 3 tasks"):
            method.predict(images)
        method.assume_task(None)

    @pytest.mark.parametrize("kind", ["instance", "batch", "last"])
    def test_an_empty_batch_has_no_predictions(self, method: Any, kind: str) -> None:
        with inference(method, kind):
            assert method.predict(torch.empty(0, 3, 16, 16)).shape == (0, 2)

    def test_results_say_which_protocol_they_are_of(self) -> None:
        told = set()
        for kind in ("instance", "batch", "known", "last"):
            config = tiny_config("lorac", epochs=1, options={"inference": kind, "rank": 2})
            told.add(run(config, data=tiny_data(), backbone=tiny_backbone())["protocol"])
        assert len(told) == 4
        assert {text for text in told if "vote" in text} == {text for text in told if "nearly told the task" in text}

    @pytest.mark.parametrize("name", ["lorac", "lorac-ipc"])
    @pytest.mark.parametrize("orthogonality", ["penalty", "qr", "absorb"])
    def test_with_the_true_snapshot_the_backbone_forgets_nothing(self, name: str, orthogonality: str) -> None:
        torch.manual_seed(0)
        method: Any = methods.create(
            name, tiny_model(), rank=3, lr=2e-2, inference="known", orthogonality=orthogonality,
            **({"share": 0.2} if name == "lorac-ipc" else {}),
        )  # fmt: skip
        kept: list[Tensor] = []
        for task in CLASS:
            train(method, task)
            method.assume_task(task.index)
            kept.append(method.features(task.images()[0]).detach())
        for task, features in zip(CLASS, kept, strict=True):
            method.assume_task(task.index)
            assert torch.equal(method.features(task.images()[0]), features)
        with inference(method, "last"):
            assert not torch.equal(method.features(CLASS[0].images()[0]), kept[0])


class TestImportance:
    def test_a_frozen_position_keeps_every_bit_of_its_update_and_the_others_go_on(self) -> None:
        """Position by position, through a run that freezes more after each task. The official code gates K by Q's mask:
        K frozen with Q free then moves, and Q frozen with K free stops K."""
        torch.manual_seed(0)
        tasks = (*CLASS[:2], Toy(2, (2, 5)), Toy(3, (6, 7), last=True))
        method: Any = methods.create("lorac-ipc", tiny_model(), rank=3, lr=2e-2, share=0.0, weight_decay=0.1)
        stack: LoRAStack = method.model
        frozen: dict[str, Tensor] = {}
        chosen = iter([["blocks.0.attn.qkv.k", "blocks.1.attn.qkv.q"], ["blocks.0.mlp.fc1"], []])
        before: dict[str, Tensor] = {}
        for task in tasks:
            train(method, task)
            for name, adapters in stack.places().items():
                delta = adapters.delta()
                if name in frozen:
                    assert torch.equal(delta, frozen[name]), (task.index, name)
                elif name in before:
                    assert not torch.equal(delta, before[name]), (task.index, name)
                before[name] = delta
            for name in next(chosen, []):
                stack.places()[name].frozen_after = stack.task
                frozen[name] = before[name]
        assert len(frozen) == 3

    def test_each_task_freezes_its_share_and_none_twice(self) -> None:
        method = trained("lorac-ipc", share=0.25)
        assert [len(names) for names in method.frozen_by_task] == [3, 3, 0]  # of 12; nothing after the last task
        assert len({name for names in method.frozen_by_task for name in names}) == 6
        for after, names in enumerate(method.frozen_by_task):
            assert all(method.model.places()[name].tasks == list(range(after + 1)) for name in names)

    def steps(self, monkeypatch: pytest.MonkeyPatch, *, epochs: int, steps: int, window: int) -> list[int]:
        """The numbers of the steps of a task that were measured."""
        seen: list[int] = []
        counter = {"step": 0}
        plain = LoRAStack.record_importance

        def noted(stack: LoRAStack, **given: Any) -> Any:
            seen.append(counter["step"])
            return plain(stack, **given)

        monkeypatch.setattr(LoRAStack, "record_importance", noted)
        method: Any = methods.create("lorac-ipc", tiny_model(), rank=2, window=window)
        own = method.loss

        def loss(batch: Any) -> Tensor:
            counter["step"] += 1
            return own(batch)

        monkeypatch.setattr(method, "loss", loss)
        train(method, Toy(0, (0, 1), epochs=epochs), steps)
        monkeypatch.undo()
        return seen

    @pytest.mark.parametrize(
        ("epochs", "steps", "window", "expected"),
        [
            (3, 4, 1, [12]),
            (3, 4, 3, [10, 11, 12]),
            (3, 4, 6, [7, 8, 9, 10, 11, 12]),
            (3, 4, 99, [5, 6, 7, 8, 9, 10, 11, 12]),  # the length of an epoch is known after the first
            (1, 5, 2, [1, 2, 3, 4, 5]),  # a single epoch is measured whole: its end is not known before
        ],
    )
    def test_only_the_last_steps_are_measured(
        self, epochs: int, steps: int, window: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.steps(monkeypatch, epochs=epochs, steps=steps, window=window) == expected

    def test_a_loop_that_never_comes_to_the_end_is_told_so(self) -> None:
        method: Any = methods.create("lorac-ipc", tiny_model(), rank=2, share=0.5)
        method.begin_task(CLASS[0])
        method.loss(CLASS[0].images()).backward()
        with pytest.raises(RuntimeError, match=r"scheduler\.step\(\)"):
            method.end_task(CLASS[0], CLASS[0].batches())

    def test_bfloat16_runs(self) -> None:
        config = tiny_config("lorac-ipc", epochs=2, precision="bfloat16", options={"share": 0.2, "rank": 2})
        found = run(config, data=tiny_data(), backbone=tiny_backbone())
        assert all(math.isfinite(value) for losses in found["loss"] for value in losses)
        assert found["average_accuracy"] > 0.2


class TestInfLoRA:
    def inputs(self, method: Any, task: Toy) -> dict[str, Tensor]:
        """What every adapted layer sees of a task's images, [rows, in]."""
        found: dict[str, Tensor] = {}
        hooks = [
            layer.base.register_forward_pre_hook(
                lambda _, given, name=name: found.__setitem__(name, given[0].flatten(0, -2))
            )
            for name, layer in method.model.layers()
        ]
        with torch.no_grad():
            method.model(task.images()[0])
        for hook in hooks:
            hook.remove()
        return found

    def test_an_adapter_does_not_change_old_inputs_inside_the_basis_at_all(self) -> None:
        """Whatever B becomes; and it does change new inputs."""
        method = trained("inf-lora", CLASS[:1], positions="q k v proj fc1 fc2", threshold=0.9)
        before = self.inputs(method, CLASS[1])
        method.begin_task(CLASS[1])
        for name, layer in method.model.layers():
            basis = method.bases[name].float()
            old = torch.randn(50, basis.shape[1]) @ basis.mT  # any inputs inside M
            for _, adapters in layer.named_adapters():
                with torch.no_grad():
                    adapters.lora_b.normal_()
                for x, reached in ((old, False), (before[name], True)):
                    change = ((x @ adapters.lora_a) @ adapters.lora_b).detach()
                    share = float(change.norm() / (x.norm() * adapters.lora_b.detach().norm()))
                    assert share > 1e-3 if reached else share < 1e-6, name

    def test_the_directions_are_the_leading_ones_of_the_rest_of_the_gram_matrix(self) -> None:
        method = trained("inf-lora", CLASS[:1], positions="v", threshold=0.8)
        x = self.inputs(method, CLASS[1])
        method.begin_task(CLASS[1])
        for name, adapters in method.model.places().items():
            layer = name.removesuffix(".v")
            rows, basis = x[layer].double(), method.bases[layer]
            rest = rows - rows @ basis @ basis.mT
            leading = torch.linalg.svd(rest, full_matrices=False).Vh[:4]
            a = adapters.lora_a.detach().double() * math.sqrt(3)
            torch.testing.assert_close(a.mT @ a, torch.eye(4).double(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close((leading @ a).square().sum(), torch.tensor(4.0).double(), rtol=1e-4, atol=0)

    def test_only_b_trains(self) -> None:
        method: Any = methods.create("inf-lora", tiny_model(), rank=2)
        method.begin_task(CLASS[0])
        body = [name for name, _ in method.trainable_parameters() if not name.startswith("heads")]
        assert len(body) == 4
        assert all(name.endswith("lora_b") for name in body)

    def test_fourth_powers_protect_fewer_directions(self) -> None:
        ranks = {
            power: {
                name: basis.shape[1] for name, basis in trained("inf-lora", CLASS[:2], gram_power=power).bases.items()
            }
            for power in (1, 2)
        }
        assert all(0 < ranks[2][name] < ranks[1][name] for name in ranks[1])

    def test_where_fewer_directions_are_free_than_the_rank_the_rest_of_a_is_zero(self) -> None:
        method = trained("inf-lora", CLASS[:1], threshold=0.5, positions="k v")
        for name, basis in method.bases.items():  # leave two directions to each
            assert basis.shape[1] < 30
            method.bases[name] = torch.linalg.qr(torch.cat([basis, torch.randn(32, 30).double()], dim=1)).Q[:, :30]
        method.begin_task(CLASS[1])
        for adapters in method.model.places().values():
            used = adapters.lora_a.detach().norm(dim=0) > 0
            assert used.tolist() == [True, True, False, False]
        images, labels = CLASS[1].images()
        method.loss((images, labels)).backward()
        assert all(torch.isfinite(p.grad).all() for _, p in method.trainable_parameters())

    def test_a_full_basis_leaves_nothing_to_train_on(self) -> None:
        method = trained("inf-lora", CLASS[:1])
        method.bases = {name: torch.eye(32).double() for name in method.bases}
        method.begin_task(CLASS[1])
        assert all(int(adapters.lora_a.count_nonzero()) == 0 for adapters in method.model.places().values())


class TestOthers:
    def test_the_penalty_of_o_lora_lowers_the_overlap_with_earlier_adapters(self) -> None:
        overlap = {}
        for penalty in (0.0, 0.5):
            method = trained("o-lora", CLASS[:2], penalty=penalty)
            first = [(a.past_a[:, :4].mT @ a.past_a[:, 4:]).abs().sum() for a in method.model.places().values()]
            overlap[penalty] = float(torch.stack(first).sum())
        assert overlap[0.5] < 0.5 * overlap[0.0]

    def test_the_penalty_is_part_of_the_loss_from_the_second_task_on(self) -> None:
        method: Any = methods.create("o-lora", tiny_model(), rank=2, penalty=2.0)
        train(method, CLASS[0])
        images = CLASS[1].images()
        method.begin_task(CLASS[1])
        expected = sum((a.past_a.mT @ a.lora_a).abs().sum() for a in method.model.places().values())
        with_it = method.loss(images)
        method.options = dataclasses.replace(method.options, penalty=0.0)
        torch.testing.assert_close(with_it - method.loss(images), 2.0 * expected, rtol=1e-4, atol=1e-3)

    def test_sd_lora_goes_over_from_task_to_task_without_a_jump_and_keeps_directions(self) -> None:
        method: Any = methods.create("sd-lora", tiny_model(), rank=3, lr=2e-2)
        images = CLASS[0].images()[0]
        directions: dict[str, Tensor] = {}
        after = method.model(images)
        for task in CLASS:
            method.begin_task(task)
            torch.testing.assert_close(method.model(images), after, rtol=1e-4, atol=1e-5)
            sizes = [adapters.omega.detach().clone() for adapters in method.model.places().values()]
            batch = task.images()
            for _ in range(3):
                method.optimizer.zero_grad()
                method.loss(batch).backward()
                method.optimizer.step()
            moved = [a.omega.detach() for a in method.model.places().values()]
            assert all(not torch.equal(x, y) for x, y in zip(moved, sizes, strict=True)) or task.index == 0
            before = method.model(images)
            method.end_task(task, task.batches())
            after = method.model(images)
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
            for name, adapters in method.model.places().items():
                if name in directions:
                    assert torch.equal(adapters.past_a[:, : directions[name].shape[1]], directions[name])
                directions[name] = adapters.past_a.clone()

    def test_one_adapter_serves_all_tasks_of_the_control(self) -> None:
        method = trained("sequential-lora")
        assert method.protocol == "one model for every image"
        assert all(adapters.ranks == [] and adapters.current for adapters in method.model.places().values())
        assert method.model.task == 0

    @pytest.mark.parametrize("name", ["lorac", "lorac-ipc", "inf-lora", "sd-lora"])
    def test_the_published_recipe_is_of_options_there_are(self, name: str) -> None:
        recipe = methods.published(name)
        methods.check(name, **recipe)
        defaults = methods.options(name)
        assert recipe
        assert all(defaults[option] != value for option, value in recipe.items())


@pytest.mark.parametrize("name", ["sequential-lora", "lorac", "lorac-ipc", "o-lora", "inf-lora", "sd-lora"])
def test_a_run_killed_in_its_second_task_ends_in_the_same_results(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the file of a checkpoint made while importance is being measured: adapters, shares and clusters too."""
    extra: dict[str, Any] = {"share": 0.2} if name == "lorac-ipc" else {}
    options = {"rank": 2, "head_init": "default", "inference": "instance", "schedule": "cosine", **extra}
    config = tiny_config(name, checkpoint_steps=2, options=options)

    def results(**changes: Any) -> dict[str, Any]:
        found = run(dataclasses.replace(config, **changes), data=tiny_data(), backbone=tiny_backbone())
        return {key: value for key, value in found.items() if key not in ("seconds", "environment", "config")}

    expected = results()
    steps, plain = 0, HeadMethod.loss

    def loss(method: HeadMethod, batch: Any) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 17:  # of 18 in two tasks; the checkpoint is of step 16
            raise KeyboardInterrupt
        return plain(method, batch)

    with monkeypatch.context() as patch:
        patch.setattr(HeadMethod, "loss", loss)
        with pytest.raises(KeyboardInterrupt):
            results(out=tmp_path)
    assert results(out=tmp_path, resume=True) == expected
