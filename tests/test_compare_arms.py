"""Arms of the comparison and one training run of one arm.

| property | what | tolerance |
|---|---|---|
| PB7 | prompt, linear and LoRA arms leave the backbone as it is; fine-tuning does not | exact |
| PB8 | every arm's trained model is saved and comes back with the same logits | exact |
| PB9 | in every arm: first learning rate above 0, last at most 0.001 of the top | exact |
| PB10 | arms with one seed see the same images in the same order | exact |
| PB11 | no test label enters a run | by signature |
| equal tuning | as many settings for every arm | exact |
| repeatable | the same arguments give the same curve, predictions and digests | exact |
"""

from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_tiny import one_thread, tiny_model
from torch import Tensor, nn

from cl_kernels import continual, data, methods
from cl_kernels.compare import _loop, tuning
from cl_kernels.compare.arms import ARMS, EQUAL, TRIALS, Scale, arm_named
from cl_kernels.compare.trial import Trial, train_trial
from cl_kernels.continual import seeds
from cl_kernels.nn._backbone import digest

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

CLASSES = 3
FROZEN = ("vpt-shallow", "vpt-deep", "linear", "lora")


def pictures(count: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images of the tiny model: much noise around one picture a class."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.4 * torch.randn(CLASSES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % CLASSES
    return means[labels] + torch.randn(count, 3, 16, 16, generator=generator), labels


def setting(name: str, kind: str = "default") -> dict[str, Any]:
    """One of the arm's settings, in the middle of its grid."""
    grid = ARMS[name].grid(kind, Scale.of(tiny_model(), 8))
    return grid[len(grid) // 2]


def tried(name: str = "vpt-deep", options: dict[str, Any] | None = None, **changes: Any) -> Trial:
    given: dict[str, Any] = {"classes": CLASSES, "epochs": 3, "batch_size": 8, "seed": 2, "validation": pictures(9, 5)}
    given |= {"test_images": pictures(12, 6)[0], **changes}
    images, labels = given.pop("train", pictures())
    backbone = given.pop("backbone", None) or tiny_model()
    return train_trial(name, setting(name) if options is None else options, backbone, images, labels, **given)


def outcome(trial: Trial) -> list[Any]:
    tensors = [] if trial.final is None or trial.best is None else [trial.final.tolist(), trial.best.tolist()]
    return [trial.curve, trial.digests, trial.status, trial.rates, *tensors]


class TestGrids:
    def test_the_arms(self) -> None:
        assert list(ARMS) == ["vpt-shallow", "vpt-deep", "full", "linear", "lora", "ftp", "mixed", "ft-then-pt"]
        assert all(arm.name == name and arm.title and arm.method in methods.names() for name, arm in ARMS.items())
        assert [name for name, arm in ARMS.items() if arm.frozen_features] == ["linear"]
        with pytest.raises(ValueError, match="arm: expected one of vpt-shallow"):
            arm_named("prompts")

    @pytest.mark.parametrize("name", ARMS)
    def test_every_arm_has_as_many_settings_and_all_are_valid(self, name: str) -> None:
        for scale in (Scale(), Scale(64, 16, 32), Scale(1024, 1369, 256)):
            grid = ARMS[name].grid("default", scale)
            assert len(grid) == TRIALS == 8
            assert len({str(options) for options in grid}) == TRIALS
            for kind in ("default", "paper"):
                for options in ARMS[name].grid(kind, scale):
                    ARMS[name].check(options)

    def test_the_documents_settings_for_vit_b(self) -> None:
        full = ARMS["full"].grid()
        assert {o["lr"] for o in full} == {1e-5, 3e-5, 1e-4, 3e-4}
        assert {o["layer_decay"] for o in full} == {1.0, 0.75}
        deep = ARMS["vpt-deep"].grid()
        assert {o["prompts"] for o in deep} == {10, 50}
        assert {o["lr"] for o in deep if o["optimizer"] == "adamw"} == {1e-3, 3e-3, 1e-2}
        assert {o["lr"] for o in deep if o["optimizer"] == "sgd"} == {0.25}

    @pytest.mark.parametrize("name", ["vpt-shallow", "vpt-deep", "full", "linear", "lora", "ftp", "mixed"])
    def test_a_few_of_them_are_spread_too(self, name: str) -> None:
        grid = ARMS[name].grid()
        second = next(key for key in ("prompts", "layer_decay", "weight_decay", "rank", "kappa") if key in grid[0])
        rates = {(o.get("optimizer"), o["lr"]) for o in grid}
        four, two = tuning.candidates(grid, 4), tuning.candidates(grid, 2)
        assert {(o.get("optimizer"), o["lr"]) for o in four} == rates
        for chosen in (four, two):
            assert len({o["lr"] for o in chosen}) >= 2
            assert len({o[second] for o in chosen}) == 2

    def test_the_papers_settings(self) -> None:
        scale = Scale(batch_size=64)
        assert len(ARMS["full"].grid("paper", scale)) == 16
        deep = ARMS["vpt-deep"].grid("paper", scale)
        assert len(deep) == 240
        assert sorted({o["lr"] * 4 for o in deep}) == [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50]
        assert {o["optimizer"] for o in deep} == {"sgd"}
        assert {o["weight_decay"] for o in deep} == {1e-2, 1e-3, 1e-4, 0.0}
        assert ARMS["linear"].grid("paper") == ARMS["linear"].grid("default")
        with pytest.raises(ValueError, match="grid: expected one of default, paper"):
            ARMS["full"].grid("papers")

    def test_small_backbones(self) -> None:
        scale = Scale.of(data.load_backbone().model, 32)
        assert scale == Scale(128, 16, 32, math.sqrt(6 / (3 * 8**2 + 128)))
        assert sorted({o["lr"] for o in ARMS["full"].grid("default", scale)}) == [6e-5, 1.8e-4, 6e-4, 1.8e-3]
        deep = ARMS["vpt-deep"].grid("default", scale)
        assert sorted({o["prompts"] for o in deep}) == [1, 4]
        assert sorted({o["lr"] for o in deep if o["optimizer"] == "adamw"}) == [0.0022, 0.0066, 0.022]
        assert Scale(tokens=4).lengths((1, 5, 10)) == [1, 2, 3], "different, however few the tokens"

    def test_what_arms_share(self) -> None:
        for name, arm in ARMS.items():
            full = {**methods.options(arm.method), **arm.method_options(setting(name))}
            assert {key: full[key] for key in EQUAL} == EQUAL, name


class TestEveryArm:
    @pytest.mark.parametrize("name", ARMS)
    def test_a_run(self, name: str) -> None:
        backbone = tiny_model()
        before = copy.deepcopy(backbone.state_dict())
        random = torch.get_rng_state()
        trial = tried(name, backbone=backbone)
        assert (trial.status, trial.reason, trial.arm, trial.epochs) == ("done", "", name, 3)
        assert [row["epoch"] for row in trial.curve] == [1, 2, 3]
        assert trial.curve[-1]["train_loss"] < trial.curve[0]["train_loss"]
        for row in trial.curve:
            assert row["validation_loss"] > 0
            assert row["validation_accuracy"] * 9 == pytest.approx(round(row["validation_accuracy"] * 9))
        for told in (trial.final, trial.best):
            assert told is not None
            assert (told.shape, told.dtype) == ((12, CLASSES), torch.float32)
            torch.testing.assert_close(told.exp().sum(1), torch.ones(12))
        assert trial.accuracy_best == max(row["validation_accuracy"] for row in trial.curve)
        assert trial.accuracy_last == trial.curve[-1]["validation_accuracy"]
        first, top, last = trial.rates
        assert 0 < first <= top
        assert last <= 1e-3 * top * (1 + 1e-12)
        assert trial.seconds["total"] >= trial.seconds["train"] > 0
        assert trial.peak_bytes > trial.stored_bytes >= 4 * trial.trainable_parameters > 0
        assert torch.equal(torch.get_rng_state(), random), "global random states are put back"
        assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items()), "it is copied"
        assert trial.digests["backbone"] == digest(backbone)

    @pytest.mark.parametrize("name", ARMS)
    def test_what_changes(self, name: str) -> None:
        trial = tried(name, epochs=1)
        assert trial.method is not None
        assert trial.digests["backbone"] == digest(tiny_model())
        assert (trial.digests["after"] == trial.digests["backbone"]) == (name in FROZEN)
        assert all(p.grad is None for module in trial.method.modules() for p in module.parameters()), "memory is freed"

    def test_prompts_after_fine_tuning_train_on_what_it_left(self) -> None:
        options = {"lr": 0.0, "head_lr": 1e-3, "first": {"lr": 1e-3}}
        both, first = tried("ft-then-pt", options), tried("full", {"lr": 1e-3})
        assert both.digests["after"] == first.digests["after"]
        assert both.curve != first.curve
        weights = sum(parameter.numel() for parameter in tiny_model().parameters())
        assert both.stored_bytes == 4 * (both.trainable_parameters + weights), "no other task has this backbone"

    @pytest.mark.parametrize("name", ARMS)
    def test_the_same_again(self, name: str) -> None:
        torch.manual_seed(1)
        first = outcome(tried(name, epochs=2))
        torch.manual_seed(2)
        assert outcome(tried(name, epochs=2)) == first
        assert outcome(tried(name, epochs=2, backbone=lambda: tiny_model())) == first
        assert outcome(tried(name, epochs=2, seed=3)) != first

    @pytest.mark.parametrize("name", ARMS)
    def test_it_is_saved_and_comes_back(self, name: str, tmp_path: Path) -> None:
        loaded = data.load_backbone("embedded-small")
        images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
        labels = torch.arange(12) % CLASSES
        x = loaded.preprocessing(images)
        trial = tried(name, backbone=loaded.model, train=(x, labels), validation=None, test_images=x, epochs=1)
        assert trial.method is not None
        assert trial.final is not None
        path = tmp_path / "best.safetensors"
        continual.save_model(
            path, trial.method, name=trial.method_name, options=trial.options, backbone="embedded-small",
            preprocess=loaded.preprocessing, class_names=["a", "b", "c"],
        )  # fmt: skip
        again = continual.load_model(path)
        assert torch.equal(again(images), trial.method.predict(x))
        assert torch.equal(again(images).log_softmax(1), trial.final)


class TestOrder:
    def test_arms_with_one_seed_see_the_same_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        images, labels = pictures()
        numbered = (images, labels)
        seen: dict[str, list[list[int]]] = {}
        real = _loop.Loop._step

        def spy(loop: Any, some: Tensor, those: Tensor) -> Tensor:
            table = loop.data[0] if loop.method.frozen else images  # features, in the order of the images
            seen[name].append([int((table == one).flatten(1).all(1).nonzero()[0]) for one in some])
            return real(loop, some, those)

        monkeypatch.setattr(_loop.Loop, "_step", spy)
        for name in ("vpt-deep", "full", "linear", "lora"):
            seen[name] = []
            tried(name, train=numbered, epochs=2)
        expected = [part.tolist() for epoch in range(2) for part in seeds.permutation(24, 2, "order", epoch).split(8)]
        assert all(order == expected for order in seen.values())

    def test_no_test_label_can_come_in(self) -> None:
        given = inspect.signature(train_trial).parameters
        assert [name for name in given if "label" in name or "test" in name] == ["labels", "test_images", "test_every"]

    def test_augmentation_is_the_same_for_every_arm(self) -> None:
        plain, flipped = (tried("full", epochs=2, augment=kind) for kind in ("none", "flip"))
        assert plain.curve != flipped.curve
        assert outcome(tried("full", epochs=2, augment="flip")) == outcome(flipped)
        assert outcome(tried("linear", epochs=2, augment="flip")) != outcome(tried("linear", epochs=2))


class TestBestAndLast:
    def test_best_is_the_best_epoch_and_last_the_last(self) -> None:
        """A rate that grows too high spoils the last epochs, so that best and last differ."""
        options = {"prompts": 2, "optimizer": "sgd", "lr": 1.0}
        trial = tried("vpt-deep", options, epochs=6, test_every=1, train=pictures(24, 1), validation=spoilt())
        assert trial.best_epoch is not None
        ranks = [(row["validation_accuracy"], -row["validation_loss"]) for row in trial.curve]
        assert ranks[trial.best_epoch - 1] == max(ranks)
        assert ranks.index(max(ranks)) == trial.best_epoch - 1, "the earliest of equals"
        assert trial.best_epoch < 6
        assert list(trial.test_curve) == [1, 2, 3, 4, 5, 6]
        assert trial.final is not None
        assert trial.best is not None
        assert torch.equal(trial.final, trial.test_curve[6])
        assert torch.equal(trial.best, trial.test_curve[trial.best_epoch])
        assert not torch.equal(trial.final, trial.best)
        assert 0 < trial.seconds["to_best"] < trial.seconds["total"]
        assert trial.method is not None
        told = trial.method.predict(pictures(12, 6)[0]).log_softmax(1)
        assert torch.equal(told, trial.final), "the method is left as after the last epoch"

    def test_the_first_of_equal_epochs_is_the_best(self) -> None:
        trial = tried("vpt-deep", {"lr": 0.0, "dropout": 0.0})
        assert len({row["validation_loss"] for row in trial.curve}) == 1
        assert trial.best_epoch == 1

    def test_without_validation_images_best_is_last(self) -> None:
        trial = tried(validation=None)
        assert trial.best is not None
        assert torch.equal(trial.best, trial.final)
        assert trial.best_epoch is None
        assert trial.accuracy_best == trial.accuracy_last == -math.inf
        assert [row["validation_loss"] for row in trial.curve] == [None] * 3

    def test_test_images_change_nothing(self) -> None:
        with_them, without = tried(test_every=1), tried(test_images=None)
        assert without.final is without.best is None
        assert without.curve == with_them.curve
        assert without.digests == with_them.digests


def spoilt() -> tuple[Tensor, Tensor]:
    """Validation images whose labels are one off: the better the model, the lower its accuracy on them."""
    images, labels = pictures(9, 5)
    return images, (labels + 1) % CLASSES


class TestFrozenFeatures:
    def test_features_in_place_of_images(self) -> None:
        model: Any = tiny_model().eval()
        with torch.no_grad():
            given = [model.forward_head(model.forward_features(x), pre_logits=True) for x, _ in SETS]
        labels = [y for _, y in SETS]
        ours = tried("linear", train=(given[0], labels[0]), validation=(given[1], labels[1]), test_images=given[2])
        assert outcome(ours) == outcome(tried("linear"))

    def test_other_arms_want_images(self) -> None:
        with pytest.raises(ValueError, match=r"images: expected floats \[N, C, H, W\].*\(24, 32\)"):
            tried("full", train=(torch.randn(24, 32), pictures()[1]))


SETS = (pictures(), pictures(9, 5), pictures(12, 6))


class TestEnds:
    @pytest.mark.parametrize("name", ["full", "ft-then-pt"])
    def test_the_deadline_is_looked_at_before_every_step(self, name: str) -> None:
        asked = iter([False] * 4 + [True])
        trial = tried(name, deadline=lambda: next(asked))
        assert trial.status == "stopped"
        assert trial.final is trial.best is None
        assert len(trial.curve) == (1 if name == "full" else 0), "three steps an epoch; the fifth is not taken"

    def test_the_caller_stops_it(self) -> None:
        rows: list[dict[str, Any]] = []

        def told(row: dict[str, Any]) -> bool:
            rows.append(row)
            return len(rows) == 2

        trial = tried(on_epoch=told)
        assert trial.status == "stopped"
        assert trial.curve == rows
        assert [row["epoch"] for row in rows] == [1, 2]
        assert trial.accuracy_best >= 0

    @pytest.mark.parametrize("name", ["full", "vpt-deep", "linear"])
    def test_a_loss_that_is_not_finite_fails_the_run_and_no_more(self, name: str) -> None:
        images, labels = pictures()
        images[5, 0, 0, 0] = math.nan
        trial = tried(name, options={"lr": 1e-3}, train=(images, labels))
        assert trial.status == "failed"
        assert trial.reason == "the loss is nan in epoch 1"
        assert trial.curve == []
        assert trial.accuracy_last == trial.accuracy_best == -math.inf
        assert trial.final is None

    def test_a_rate_that_explodes_fails_the_run(self) -> None:
        trial = tried("full", options={"lr": 1e3}, epochs=20)
        assert trial.status in ("failed", "done")
        assert trial.status == "failed" or math.isfinite(trial.curve[-1]["train_loss"])

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"classes": 1}, "classes: expected at least 2"),
            ({"epochs": 0}, "epochs: expected at least 1"),
            ({"batch_size": 0}, "batch_size: expected at least 1"),
            ({"classes": 2}, "labels: expected 0 to 1, got 0 to 2"),
            ({"train": (torch.randint(0, 9, (4, 3, 16, 16)), torch.arange(4) % 3)}, "images: expected floats"),
            ({"train": (torch.randn(4, 3, 16, 16), torch.zeros(4))}, r"labels: expected int64 \[4\]"),
            ({"train": (torch.randn(0, 3, 16, 16), torch.zeros(0, dtype=torch.int64))}, "images: expected floats"),
            ({"validation": (torch.randn(2, 3, 16, 16), torch.tensor([0, 7]))}, "validation labels: expected 0 to 2"),
            ({"test_images": torch.randn(2, 3, 8, 8)}, "test_images: expected the shape of images"),
            ({"options": {"lr": -1.0}}, "lr: expected"),
            ({"options": {"prompt": 4}}, "vpt-deep has no option 'prompt'; nearest: prompts"),
            ({"options": {"first": {}}}, "vpt-deep has no option 'first'"),
            ({"name": "ft-then-pt", "options": {"first": {"lrr": 1}}}, "full has no option 'lrr'; nearest: lr"),
        ],
    )
    def test_wrong_arguments(self, changes: dict[str, Any], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            tried(**changes)


class TestMeasured:
    def test_numbers_that_train_and_bytes_of_a_task(self) -> None:
        head = 32 * CLASSES + CLASSES
        weights = sum(parameter.numel() for parameter in tiny_model().parameters())
        expected = {"linear": head, "full": weights + head, "vpt-deep": 2 * 7 * 32 + head, "vpt-shallow": 7 * 32 + head}
        for name, numbers in expected.items():
            trial = tried(name, {"lr": 1e-3} | ({"prompts": 7} if "vpt" in name else {}), epochs=1)
            assert (trial.trainable_parameters, trial.stored_bytes) == (numbers, 4 * numbers)

    def test_memory_of_a_linear_layer(self) -> None:
        """Counted by hand: the input that autograd keeps, weights, gradients, and no memory twice."""
        layer = nn.Linear(8, 4, bias=False)
        kept = _loop.Footprint([layer], torch.device("cpu"))
        x = torch.randn(16, 8, requires_grad=True)  # so that autograd keeps the weight too
        with kept.watching():
            layer(x).sum().backward()
        assert kept.peak(None) == 4 * (16 * 8 + 2 * 32)
        adam = torch.optim.AdamW(layer.parameters())
        adam.step()
        assert kept.peak(adam) == 4 * (16 * 8 + 4 * 32 + 1)

    def test_fine_tuning_needs_more_memory_than_prompts_and_they_than_a_linear_head(self) -> None:
        found = [tried(name, epochs=1).peak_bytes for name in ("linear", "vpt-deep", "full")]
        assert found == sorted(found)
        assert found[0] < found[1] < found[2]
