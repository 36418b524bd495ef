"""Methods with prompt pools: what their loss is, what later tasks leave alone, what results say of the prompts."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from continual_tiny import one_thread, tiny_backbone, tiny_config, tiny_data, tiny_model
from torch import Tensor

from cl_kernels import methods
from cl_kernels.continual import run
from cl_kernels.data import ImageData, ImageSet
from cl_kernels.data.sets import TensorImages

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

NAMES = ["l2p", "dualprompt", "coda-prompt"]
SMALL: dict[str, dict[str, Any]] = {"l2p": {"size": 8, "top": 2}, "dualprompt": {}, "coda-prompt": {"components": 4}}


@dataclass(frozen=True)
class Toy:
    """A task of noisy pictures of its classes."""

    index: int
    classes: tuple[int, ...]
    last: bool = False
    epochs: int = 2

    def images(self) -> tuple[Tensor, Tensor]:
        labels = torch.tensor(self.classes).repeat_interleave(8)
        noise = torch.randn(len(labels), 3, 16, 16, generator=torch.Generator().manual_seed(100 + self.index))
        means = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(5))
        return noise + 0.5 * means[labels], labels

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.images()
        yield from zip(images.split(8), labels.split(8), strict=True)


TASKS = (Toy(0, (3, 1)), Toy(1, (0, 4)), Toy(2, (2, 5), last=True))


def created(name: str, **options: Any) -> Any:
    torch.manual_seed(3)
    return methods.create(name, tiny_model(), **({"lr": 2e-2} | SMALL[name] | options))


def steps(method: Any, task: Toy, count: int = 3, *, cached: bool = False) -> None:
    images, labels = task.images()
    facts = method.per_image(images) if cached else ()
    for step in range(count):
        rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(step))[:8]
        method.optimizer.zero_grad()
        method.loss((images[rows], labels[rows]), *(fact[rows] for fact in facts)).backward()
        method.optimizer.step()


def train(method: Any, task: Toy, *, cached: bool = False) -> None:
    method.begin_task(task)
    steps(method, task, cached=cached)
    method.end_task(task, task.batches())


def small_run(name: str, data: ImageData | None = None, **changes: Any) -> dict[str, Any]:
    config = tiny_config(name, **({"options": SMALL[name]} | changes))
    return run(config, data=tiny_data() if data is None else data, backbone=tiny_backbone())


class TestLoss:
    @pytest.mark.parametrize("name", NAMES)
    def test_cross_entropy_over_the_tasks_classes_and_the_pools_loss(self, name: str) -> None:
        method = created(name)
        train(method, TASKS[0])
        method.begin_task(TASKS[1])
        images, labels = TASKS[1].images()
        found = method.model(images, train=True)
        logits = method.heads.head(1)(found.cls)
        expected = F.cross_entropy(logits, (labels == 4).long()) + found.loss
        torch.testing.assert_close(method.loss((images, labels)), expected)
        assert (float(found.loss.detach()) > 0) == (name != "coda-prompt")

    @pytest.mark.parametrize("name", ["l2p", "dualprompt"])
    def test_the_pull_has_a_factor(self, name: str) -> None:
        batch, values = TASKS[0].images(), []
        for pull in (0.0, 0.5, 1.0):
            method = created(name, pull=pull)
            method.begin_task(TASKS[0])
            values.append(float(method.loss(batch).detach()))
        assert values[1] - values[0] > 0.1
        assert values[2] - values[1] == pytest.approx(values[1] - values[0], rel=1e-4)

    @pytest.mark.parametrize("name", NAMES)
    def test_prompts_alone_learn(self, name: str) -> None:
        method = created(name, lr=5e-2, head="linear", head_init="default", head_lr=0.0)
        method.begin_task(TASKS[0])
        images, labels = TASKS[0].images()
        before = method._cross_entropy(method.model(images, train=True).cls, labels)
        steps(method, TASKS[0], 30)
        after = method._cross_entropy(method.model(images, train=True).cls, labels)
        assert float(after.detach()) < 0.7 * float(before.detach())

    @pytest.mark.parametrize("name", NAMES)
    def test_a_query_computed_in_advance_changes_nothing(self, name: str) -> None:
        one, other = created(name), created(name)
        for task in TASKS[:2]:
            train(one, task)
            train(other, task, cached=True)
        for key, value in one.state_dict()["parameters"].items():
            torch.testing.assert_close(value, other.state_dict()["parameters"][key], rtol=1e-3, atol=1e-4)

    def test_heads_start_from_the_tasks_own_prompts(self) -> None:
        """At its beginning a task's key is noise: inference would choose the prompts of another one."""
        method = created("dualprompt")
        train(method, TASKS[0])
        method.begin_task(TASKS[1])
        images, labels = TASKS[1].images()
        features = F.normalize(method.model(images, train=True).cls.detach(), dim=1)
        means = torch.stack([features[labels == label].mean(0) for label in TASKS[1].classes])
        torch.testing.assert_close(method.heads.head(1).weight, F.normalize(means, dim=1), rtol=1e-4, atol=1e-5)

    def test_the_schedule_is_a_quarter_of_a_cosine(self) -> None:
        """PA15."""
        factors = methods.multipliers("quarter-cosine", 20)
        assert len(set(factors)) == 20
        assert factors[0] == 1
        assert factors[-1] == pytest.approx(math.cos(0.495 * math.pi), rel=1e-6)
        assert methods.multipliers("quarter-cosine", 1) == [1.0]


class TestMemory:
    @pytest.mark.parametrize("name", NAMES)
    def test_the_backbone_is_bit_for_bit_what_it_was(self, name: str) -> None:
        """PA8, and a change of it is noticed."""
        method = created(name)
        before = copy.deepcopy(method.backbone.state_dict())
        for task in TASKS:
            train(method, task)
        assert all(torch.equal(value, before[key]) for key, value in method.backbone.state_dict().items())
        assert all(p.grad is None for p in method.backbone.parameters())
        method = created(name)
        method.begin_task(TASKS[0])
        with torch.no_grad():
            method.backbone.blocks[0].norm1.bias.add_(1e-6)
        with pytest.raises(RuntimeError, match="frozen backbone changed during task 0"):
            method.end_task(TASKS[0], TASKS[0].batches())

    @pytest.mark.parametrize("name", ["dualprompt", "coda-prompt"])
    def test_what_earlier_tasks_own_stays_to_the_bit(self, name: str) -> None:
        method = created(name, weight_decay=0.1)
        train(method, TASKS[0])
        own = {key: value.detach().clone() for key, value in method.pool.trainable_parameters() if "general" not in key}
        train(method, TASKS[1])
        train(method, TASKS[2])
        pool = method.pool
        for key, value in own.items():
            _, layer, kind = key.split(".")
            if name == "dualprompt":
                kept = getattr(pool.expert[layer], {"prompt": "bank_prompts", "key": "bank_keys"}[kind])
            else:
                kept = getattr(pool.parts[layer], f"past_{kind}")
            assert torch.equal(kept[: len(value)], value), key

    @pytest.mark.parametrize("name", NAMES)
    def test_results_do_not_depend_on_later_tasks(self, name: str) -> None:
        """PA18."""
        plain = small_run(name)
        data = tiny_data()
        parts = []
        for part in (data.train, data.test):
            images, labels = part.subset(torch.arange(len(part.labels))).tensors().clone(), part.labels
            last = torch.isin(labels, torch.tensor(plain["tasks"][2]["classes"]))
            images[last] = images[last].flip(0).flip(-1)
            parts.append(ImageSet(TensorImages(images), labels))
        other = small_run(name, ImageData("tiny", parts[0], parts[1], data.class_names))
        assert other["accuracy_matrix"][:2] == plain["accuracy_matrix"][:2]
        assert other["loss"][:2] == plain["loss"][:2]
        assert other["loss"][2] != plain["loss"][2]

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("augment", ["none", "crop"])
    def test_a_run_on_domains_and_with_augmentation(self, name: str, augment: str) -> None:
        found = small_run(name, stream="domain", domains=["identity", "invert"], tasks=2, lr=1e-3, augment=augment)
        assert found["average_accuracy"] > 1.5 / 6
        assert len(found["prompt_usage"]) == 2

    def test_what_later_tasks_draw_follows_the_seed_and_the_state(self) -> None:
        def fresh(seed: int) -> Any:
            model = tiny_model()
            torch.manual_seed(seed)
            return methods.create("coda-prompt", model, **SMALL["coda-prompt"])

        drawn, states = {}, []
        for name, seed in (("one", 0), ("again", 0), ("other", 1), ("resumed", 2)):
            method = fresh(seed)
            if name == "resumed":
                method.load_state_dict(states[0])
            else:
                train(method, TASKS[0])
            states.append(copy.deepcopy(method.state_dict()))
            method.begin_task(TASKS[1])
            drawn[name] = method.pool.parts["0"].key.detach()
        assert torch.equal(drawn["one"], drawn["again"])
        assert torch.equal(drawn["one"], drawn["resumed"])
        assert not torch.allclose(drawn["one"], drawn["other"], atol=1e-2)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_state_of_another_pool_is_refused(self, name: str) -> None:
        method = created(name)
        train(method, TASKS[0])
        state = copy.deepcopy(method.state_dict())
        other = methods.create(name, tiny_model(dim=16), **SMALL[name])
        with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|another shape"):
            other.load_state_dict(state)


class TestUsage:
    @pytest.mark.parametrize("name", NAMES)
    def test_results_say_which_prompts_images_choose(self, name: str) -> None:
        found = small_run(name)
        assert len(found["prompt_usage"]) == 3
        for task, usage in enumerate(found["prompt_usage"]):
            assert set(usage) == {"l2p": {"blocks.0"}, "dualprompt": {"blocks.1"}}.get(name, {"blocks.0", "blocks.1"})
            for shares in usage.values():
                assert all(0 <= share <= 1 for share in shares)
                entries = {"l2p": 8, "dualprompt": task + 1, "coda-prompt": 4 * (task + 1)}[name]
                assert len(shares) == entries
                if name != "coda-prompt":
                    assert sum(shares) == pytest.approx({"l2p": 2, "dualprompt": 1}[name])
        assert json.loads(json.dumps(found["prompt_usage"])) == found["prompt_usage"]

    def test_methods_without_a_pool_say_nothing(self) -> None:
        found = run(tiny_config("linear"), data=tiny_data(), backbone=tiny_backbone())
        assert found["prompt_usage"] == [{}, {}, {}]


class TestOptions:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("l2p", {"length": 7}),
            ("l2p", {"length": 0}),
            ("l2p", {"top": 31}),
            ("l2p", {"size": 0}),
            ("l2p", {"blocks": 0}),
            ("l2p", {"pull": -1.0}),
            ("dualprompt", {"general_length": 5}),
            ("dualprompt", {"length": 3}),
            ("dualprompt", {"expert": 2}),
            ("dualprompt", {"candidates": "none"}),
            ("coda-prompt", {"components": 0}),
            ("coda-prompt", {"length": 1}),
            ("coda-prompt", {"blocks": True}),
            ("coda-prompt", {"orthogonalize": "svd"}),
        ],
    )
    def test_a_value_out_of_range_is_refused(self, name: str, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
            methods.check(name, **options)

    @pytest.mark.parametrize(
        ("name", "options"), [("l2p", {"blocks": 3}), ("coda-prompt", {"blocks": 3}), ("dualprompt", {"expert": 2})]
    )
    def test_more_blocks_than_there_are(self, name: str, options: dict[str, Any]) -> None:
        backbone = tiny_model()
        given = options | ({"general": 1} if name == "dualprompt" else {})
        with pytest.raises(ValueError, match="at most the 2 blocks"):
            methods.create(name, backbone, **given)
        assert all(p.requires_grad for p in backbone.parameters())

    @pytest.mark.parametrize("name", NAMES)
    def test_a_model_that_is_no_vit(self, name: str) -> None:
        with pytest.raises(ValueError, match="Linear has no patch_embed"):
            methods.create(name, torch.nn.Linear(3, 3))
        given: dict[str, Any] = {"general": 1, "expert": 1} if name == "dualprompt" else {"blocks": 1}
        with pytest.raises(ValueError, match="at most the 0 blocks"):
            methods.create(name, torch.nn.Linear(3, 3), **given)

    def test_blocks_by_number(self) -> None:
        pool: Any = created("dualprompt", general=0, expert=2).pool
        assert (sorted(pool.general), sorted(pool.expert)) == ([], ["0", "1"])
        assert created("coda-prompt", blocks=1).pool.layers == (0,)
        assert created("l2p", blocks=2).pool.layers == (0, 1)
