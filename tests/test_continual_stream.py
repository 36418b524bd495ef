"""Streams, transforms, metrics and the configuration of continual runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from continual_tiny import tiny_backbone, tiny_config, tiny_data
from hypothesis import given
from hypothesis import strategies as st

from cl_kernels import data
from cl_kernels.continual import RunConfig, metrics, run, stream, transforms
from cl_kernels.data import ImageData, ImageSet, corruptions
from cl_kernels.data.sets import TensorImages


def with_labels(labels: list[int], names: int) -> ImageData:
    images = TensorImages(torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8))
    part = ImageSet(images, torch.tensor(labels))
    return ImageData("made", part, part, [str(i) for i in range(names)])


class TestClassIncremental:
    @given(classes=st.integers(2, 12), tasks=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
    def test_every_class_and_image_is_in_exactly_one_task(self, classes: int, tasks: int, seed: int) -> None:
        data = with_labels([label for label in range(classes) for _ in range(3)], classes)
        if tasks > classes:
            with pytest.raises(ValueError, match=rf"tasks.*{classes} classes.*{tasks}"):
                stream.class_incremental(data, tasks, seed)
            return
        made = stream.class_incremental(data, tasks, seed)
        assert sorted(label for task in made for label in task.classes) == list(range(classes))
        assert sorted(torch.cat([task.train for task in made]).tolist()) == list(range(3 * classes))
        for task in made:
            assert set(data.train.labels[task.train].tolist()) == set(task.classes)
        sizes = [len(task.classes) for task in made]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)
        assert [task.last for task in made] == [False] * (tasks - 1) + [True]

    def test_the_order_is_numpys_pcg64_shuffle_of_the_seed(self) -> None:
        # numpy.random.default_rng is Generator(PCG64(seed)); the official code shuffles the same way
        for seed in (2024, 2025, 2026):
            expected = np.arange(100)
            np.random.default_rng(seed).shuffle(expected)
            assert stream.class_order(100, seed) == expected.tolist()
        assert stream.class_order(5, None) == [0, 1, 2, 3, 4]
        assert stream.class_order(100, 1) != stream.class_order(100, 2)

    def test_given_sizes(self) -> None:
        made = stream.class_incremental(tiny_data(), 2, None, sizes=[4, 2])
        assert [task.classes for task in made] == [(0, 1, 2, 3), (4, 5)]
        for wrong in ([3, 2], [6, 0], [6]):
            with pytest.raises(ValueError, match="sizes"):
                stream.class_incremental(tiny_data(), 2, None, sizes=wrong)

    def test_domains_take_turns(self) -> None:
        made = stream.class_incremental(tiny_data(), 3, 0, domains=("invert", "blur"))
        assert [task.domain for task in made] == ["invert", "blur", "invert"]

    def test_one_class_or_an_empty_one_is_refused_by_name(self) -> None:
        with pytest.raises(ValueError, match="at least 2 classes"):
            stream.class_incremental(with_labels([0, 0], 1), 1, 0)
        with pytest.raises(ValueError, match="1 classes of made have no training image, first: 1"):
            stream.class_incremental(with_labels([0, 0, 2], 3), 2, 0)


class TestDomainIncremental:
    def test_all_classes_in_every_task(self) -> None:
        data = tiny_data()
        made = stream.domain_incremental(data, ("identity", "invert"))
        assert [task.domain for task in made] == ["identity", "invert"]
        assert all(task.classes == tuple(range(6)) and len(task.train) == len(data.train) for task in made)

    def test_unknown_domain_offers_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"'invrt'.*invert"):
            stream.domain_incremental(tiny_data(), ("identity", "invrt"))


class TestTransforms:
    @pytest.mark.parametrize("name", transforms.names())
    def test_keeps_dtype_and_shape_and_looks_at_each_image_alone(self, name: str) -> None:
        images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
        made = transforms.get(name)(images)
        assert made.dtype == torch.uint8
        assert made.shape == images.shape
        for index in range(3):
            assert torch.equal(made[index], transforms.get(name)(images[index : index + 1])[0])
        assert (name == "identity") == torch.equal(made, images)

    def test_chains_run_left_to_right(self) -> None:
        images = torch.randint(0, 256, (1, 1, 6, 6), dtype=torch.uint8)
        expected = transforms.get("dark")(255 - images)
        assert torch.equal(transforms.get("invert+dark")(images), expected)
        assert not torch.equal(transforms.get("dark+invert")(images), expected)
        assert torch.equal(transforms.get("rotate90+rotate270")(images), images)


class TestMetrics:
    # method-null-space.md 14.2, V5, in percent
    ROWS = ((90.0, None, None), (80.0, 85.0, None), (70.0, 90.0, 88.0))
    SIZES = (100, 300, 200)

    def test_golden(self) -> None:
        assert metrics.average_accuracy(self.ROWS) == pytest.approx(82.667, abs=5e-4)
        assert metrics.forgetting(self.ROWS) == 7.5
        assert metrics.repository_metrics(self.ROWS, self.SIZES) == {"average_accuracy": 86.0, "forgetting": 10.0}

    def test_after_each_task(self) -> None:
        assert metrics.accuracy_after(self.ROWS) == pytest.approx([90, 82.5, 248 / 3])
        assert metrics.forgetting_after(self.ROWS) == [0, 10, 7.5]

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
    def test_a_constant_matrix_forgets_nothing(self, accuracies: list[float]) -> None:
        matrix = [accuracies] * len(accuracies)
        assert metrics.forgetting(matrix) == 0
        assert metrics.forgetting(matrix, last_row=True) == 0

    @given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n)))
    def test_the_repository_never_reports_less_forgetting(self, matrix: list[list[float]]) -> None:
        square = matrix[: len(matrix[0])]
        assert metrics.forgetting(square, last_row=True) >= max(0.0, metrics.forgetting(square)) - 1e-12

    def test_a_hole_in_the_lower_triangle_is_refused(self) -> None:
        with pytest.raises(ValueError, match="row 1"):
            metrics.average_accuracy([[0.5], [None, 0.5]])
        with pytest.raises(ValueError, match="at least one row"):
            metrics.forgetting([])


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("lr", float("nan")),
            ("lr", float("inf")),
            ("lr", -1.0),
            ("tasks", 10**6),
            ("tasks", 0),
            ("epochs", 10**9),
            ("batch_size", 0),
            ("seed", -1),
            ("seed", 2**32),
            ("threads", 0),
            ("image_size", 10**9),
            ("checkpoint_steps", 0),
            ("checkpoint_minutes", float("nan")),
            ("precision", "fp8"),
            ("augment", "mixup"),
            ("stream", "task"),
        ],
    )
    def test_out_of_range_names_the_field_and_the_value(self, field: str, value: object) -> None:
        with pytest.raises(ValueError, match=rf"{field}.*{value}"):
            RunConfig("linear", **{field: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("seed", 1.5),
            ("epochs", True),
            ("lr", "0.1"),
            ("method", ""),
            ("options", [1]),
            ("domains", "invert"),
            ("domains", 3),
            ("domains", (1,)),
            ("weights", 3),
            ("out", 3),
            ("out", ""),
            ("quick", "yes"),
            ("strict", 1),
        ],
    )
    def test_wrong_type(self, field: str, value: object) -> None:
        with pytest.raises(TypeError, match=field):
            RunConfig(**{"method": "linear", field: value})  # type: ignore[arg-type]

    def test_streams_and_their_tasks(self) -> None:
        with pytest.raises(ValueError, match="domains"):
            RunConfig("linear", stream="domain", tasks=None)
        with pytest.raises(ValueError, match=r"domains \(2\).*5"):
            RunConfig("linear", stream="domain", tasks=5, domains=("identity", "invert"))
        with pytest.raises(ValueError, match="tasks"):
            RunConfig("linear", tasks=None)

    def test_fingerprint_follows_what_decides_the_result_and_nothing_else(self) -> None:
        base = tiny_config("nsp2")
        other = {"out": "there", "resume": True, "checkpoint_minutes": 1.0, "checkpoint_steps": 3, "threads": 2}
        assert dataclasses.replace(base, **other).fingerprint("data") == base.fingerprint("data")
        for change in ({"seed": 1}, {"lr": 0.02}, {"options": {"eta": 0.5}}, {"epochs": 4}, {"method": "sequential"}):
            assert dataclasses.replace(base, **change).fingerprint("data") != base.fingerprint("data")
        assert base.fingerprint("other data") != base.fingerprint("data")


def test_forgetting_by_every_definition() -> None:
    """Worked by hand: after its own task 0.9, 0.8, 0.7, at the end 0.6, 0.7, 0.7; task 1 was best, 0.95, in between."""
    matrix = [[0.9, None, None], [0.95, 0.8, None], [0.6, 0.7, 0.7]]
    found = metrics.forgetting_variants(matrix)
    assert found["maximum"] == pytest.approx((0.35 + 0.1) / 2)
    assert found["diagonal"] == pytest.approx((0.3 + 0.1) / 2)
    assert found["diagonal_over_all"] == pytest.approx((0.3 + 0.1) / 3)
    assert metrics.average_accuracy(matrix) == pytest.approx(2 / 3)
    assert metrics.forgetting_variants([[0.5]]) == {"maximum": 0.0, "diagonal": 0.0, "diagonal_over_all": 0.0}


class TestSources:
    """Several data sets as one, one after another."""

    def sets(self) -> tuple[ImageData, ImageData]:
        first, second = with_labels([0, 0, 1, 1, 2, 2], 3), with_labels([0, 1, 1, 0, 2, 3, 4, 3], 5)
        return dataclasses.replace(first, name="a"), dataclasses.replace(second, name="b")

    def test_a_join_holds_every_image_with_its_own_label(self) -> None:
        first, second = self.sets()
        grey = TensorImages(torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 1, 4, 4))
        second = dataclasses.replace(second, train=ImageSet(grey, second.train.labels))
        both = data.joined([first, second])
        assert both.parts == (("a", 0), ("b", 3))
        assert both.class_names == ["a: 0", "a: 1", "a: 2", "b: 0", "b: 1", "b: 2", "b: 3", "b: 4"]
        assert both.train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 4, 3, 5, 6, 7, 6]
        assert both.train.tensors()[6:, :, 0, 0].tolist() == [[i, i, i] for i in range(8)], "grey became RGB"
        assert both.train.tensors().shape == (14, 3, 4, 4)
        assert both.train.subset([13, 0])[0][1] == 6
        for wrong in ([first], [first, first], []):
            with pytest.raises(ValueError, match="two different sets"):
                data.joined(wrong)

    def test_sources_come_one_after_another(self) -> None:
        both = data.joined(self.sets())
        made = stream.source_incremental(both, 3, 0)
        assert [sorted(task.classes) for task in made[2:]] == [[3, 4, 5, 6, 7]]
        assert sorted(label for task in made[:2] for label in task.classes) == [0, 1, 2]
        assert [len(task.classes) for task in made] == [2, 1, 5], "the first set is dealt into one task more"
        assert [task.last for task in made] == [False, False, True]
        assert stream.source_incremental(both, 2, 0, domains=("invert",))[0].domain == "invert"
        for tasks, said in ((1, "at least one per data set"), (8, "a has 3 classes, too few for 4")):
            with pytest.raises(ValueError, match=said):
                stream.source_incremental(both, tasks)
        with pytest.raises(ValueError, match="joined by"):
            stream.source_incremental(self.sets()[0], 2)

    def test_a_part_is_numbered_anew(self) -> None:
        _, second = self.sets()
        part = data.part_of(second, classes=(1, 4), per_class=1)
        assert part.class_names == ["1", "2", "3"]
        assert part.train.labels.tolist() == [0, 1, 2]
        assert part.test.labels.tolist() == [0, 0, 1, 2, 2]
        assert second.train.labels.tolist() == [0, 1, 1, 0, 2, 3, 4, 3], "the data are as they were"
        for wrong, said in (({"classes": (3, 9)}, "within 0:5, got 3:9"), ({"per_class": 0}, "images_per_class")):
            with pytest.raises(ValueError, match=said):
                data.part_of(second, **wrong)

    @pytest.mark.parametrize(
        ("classes", "parts"),
        [((0, 8), (("a", 0), ("b", 3))), ((1, 5), (("a", 0), ("b", 2))), ((3, 8), (("b", 0),)), ((1, 3), (("a", 0),))],
    )
    def test_a_part_of_a_join_knows_where_its_sets_begin(
        self, classes: tuple[int, int], parts: tuple[tuple[str, int], ...]
    ) -> None:
        both = data.joined(self.sets())
        part = data.part_of(both, classes=classes)
        assert part.parts == parts
        assert part.class_names == both.class_names[classes[0] : classes[1]]
        for name, start in part.parts:
            assert part.class_names[start].startswith(f"{name}: ")
            assert start == 0 or not part.class_names[start - 1].startswith(f"{name}: ")

    def test_groups_of_class_names_are_sources(self) -> None:
        named = dataclasses.replace(with_labels([0, 1, 2, 3, 4], 5), class_names=["a/1", "a/2", "a/3", "b/1", "b/2"])
        made = stream.source_incremental(named, 2, 0)
        assert [sorted(task.classes) for task in made] == [[0, 1, 2], [3, 4]]
        for names in (
            ["a/1", "b/1", "a/2", "b/2", "b/3"],
            ["a/1", "a/2", "b", "b/1", "b/2"],
            [f"a/{i}" for i in range(5)],
        ):
            with pytest.raises(ValueError, match="joined by"):
                stream.source_incremental(dataclasses.replace(named, class_names=names), 2)

    def test_names_joined_by_plus(self) -> None:
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
        with pytest.raises(ValueError, match="two different sets"):
            data.load("digits+digits")
        with pytest.raises(ValueError, match="unknown data 'digit'"):
            data.load("digits + digit")

    @pytest.mark.parametrize("wrong", ["0-20", "5:5", "9:3", ":3", "a:b", ""])
    def test_a_wrong_range_of_classes(self, wrong: str) -> None:
        with pytest.raises(ValueError, match="classes must be a range"):
            tiny_config("linear", classes=wrong)

    def test_settings_without_a_range_are_what_they_were(self) -> None:
        assert not {"classes", "images_per_class"} & set(tiny_config("linear").as_json())
        cut = tiny_config("linear", classes="0:4", images_per_class=3)
        assert cut.as_json()["classes"] == "0:4"
        assert cut.fingerprint() != tiny_config("linear").fingerprint()

    def test_a_run_on_a_part(self) -> None:
        pytest.importorskip("timm", reason="the backbone is timm's")
        config = tiny_config("class-mean", tasks=2, classes="2:6", images_per_class=2)
        found = run(config, data=tiny_data(), backbone=tiny_backbone())
        assert [task["train"] for task in found["tasks"]] == [4, 4]
        assert {label for task in found["tasks"] for label in task["classes"]} == {0, 1, 2, 3}


def test_a_corruption_is_a_domain() -> None:
    pytest.importorskip("PIL", reason="one family needs Pillow")
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = transforms.get("invert+fog@3")(images)
    assert torch.equal(made, corruptions.corrupt(255 - images, "fog", 3))
    assert torch.equal(transforms.get("gaussian-noise@2")(images)[1:2], transforms.get("gaussian-noise@2")(images[1:2]))
    for wrong, said in (("fogg@3", "nearest: fog"), ("fog@6", "severity of 1, 2, 3, 4, 5"), ("fog@", "severity")):
        with pytest.raises(ValueError, match=said):
            transforms.get(wrong)
