"""Sanity measures, the choice of images, files and numbers of pictures: what a reader is shown and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution_models import CLASSES, GRID, images, learned, prompted, vit
from continual_tiny import one_thread
from torch import nn

from cl_kernels.compare import attribution as at
from cl_kernels.compare.attribution import gallery, render
from cl_kernels.compare.attribution._panels import _where
from cl_kernels.data import Preprocessing, load, load_backbone

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
Pillow = pytest.importorskip("PIL.Image", reason="pictures are written with Pillow")

NAMES = [f"class {index}" for index in range(CLASSES)]


class TestSpearman:
    def test_is_scipys_with_ties(self) -> None:
        stats = pytest.importorskip("scipy.stats", reason="compared with scipy")
        a = torch.randint(0, 6, (4, 5, 5)).double()
        b = a + torch.randint(0, 9, (4, 5, 5))
        wanted = [stats.spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
        torch.testing.assert_close(at.spearman(a, b), torch.tensor(wanted, dtype=torch.float64))

    def test_order_alone_counts(self) -> None:
        a = torch.rand(2, 4, 4)
        torch.testing.assert_close(at.spearman(a, a.exp()), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(at.spearman(a, -a), -torch.ones(2, dtype=torch.float64))
        assert bool(at.spearman(a, torch.zeros(2, 4, 4)).isnan().all())
        with pytest.raises(ValueError, match="shape"):
            at.spearman(a, a[:, :3])


class TestSanity:
    def test_a_random_head_changes_the_maps_of_real_digits(self) -> None:
        """Adebayo et al.'s check, on the backbone in the package with class means as its head."""
        from cl_kernels import methods

        data, backbone = load("digits"), load_backbone("embedded")
        pixels = backbone.preprocessing(data.train.tensors()[:200])
        labels = data.train.labels[:200]
        method = methods.create("class-mean", backbone.model)
        task = Digits(pixels, labels)
        method.begin_task(task)
        method.end_task(task, task.batches())
        x, y = pixels[:8], labels[:8]
        mine = at.gradcam(method, x, y)
        ranks = []
        for seed in range(3):
            head = at.randomised_head(method, seed=seed)
            ranks.append(at.spearman(mine, at.gradcam(method, x, 0, head=head)))
        found = torch.cat(ranks)
        assert float(found[~found.isnan()].median()) < 0.5
        assert torch.equal(mine, at.gradcam(method, x, y))  # while the map itself is the same each time
        looked = at.attention_map(method, x)
        assert looked.reads == "patches"
        attributions = at.integrated_gradients(method, x[:2], y[:2])
        assert bool((attributions.error <= 0.01).all())
        torch.testing.assert_close(
            attributions.on_patches(4, 4).sum(dim=(1, 2)), attributions.values.sum(dim=(1, 2, 3))
        )
        other = at.integrated_gradients(method, x[:2], 0, head=at.randomised_head(method))
        assert float(at.spearman(attributions.on_patches(4, 4), other.on_patches(4, 4)).median()) < 0.5

    def test_an_area_under_a_constant_probability_is_that_probability(self) -> None:
        """A head that says the same of everything: taking patches away changes nothing."""
        logits = torch.tensor([1.0, 0.0, 2.0])
        found = at.deletion_insertion(
            vit(classes=0), images(2), torch.rand(2, 4, 4), 2, head=lambda features: logits.expand(len(features), 3)
        )
        wanted = torch.full((2,), float(logits.softmax(0)[2]), dtype=torch.float64)
        for area in found:
            torch.testing.assert_close(area, wanted, atol=1e-6, rtol=0)

    def test_ends_are_the_image_and_the_baseline(self) -> None:
        """One step is the trapezoid between the two, whichever way and whatever the order."""
        model, x = vit(), images(2)
        found = at.deletion_insertion(model, x, torch.rand(2, 4, 4), 1, steps=1)
        with torch.no_grad():
            both = [model(shown).double().softmax(dim=1)[:, 1] for shown in (x, torch.zeros_like(x))]
        for area in found:
            torch.testing.assert_close(area, 0.5 * (both[0] + both[1]), atol=1e-6, rtol=1e-5)

    def test_pixels_are_summed_over_patches(self) -> None:
        maps = torch.arange(64.0).reshape(1, 8, 8)
        summed = at.on_patches(maps, 2, 2)
        assert summed.tolist() == [[[maps[0, :4, :4].sum(), maps[0, :4, 4:].sum()],
                                    [maps[0, 4:, :4].sum(), maps[0, 4:, 4:].sum()]]]  # fmt: skip
        assert at.on_patches(summed, 2, 2) is summed
        with pytest.raises(ValueError, match="maps"):
            at.on_patches(maps, 3, 3)


class Digits:
    index, epochs, last = 0, 1, True

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        self.classes = tuple(sorted(set(labels.tolist())))
        self._pairs = list(zip(pixels.split(50), labels.split(50), strict=True))

    def batches(self) -> Any:
        return iter(self._pairs)

    def held_out(self) -> Any:
        return iter(())


class TestColours:
    def test_lightness_rises_all_the_way(self) -> None:
        """So that it reads without colour and with any colour vision; and a viridis, where matplotlib can say so."""
        scale = torch.linspace(0, 1, 256)
        colours = render.coloured(scale)
        lightness = colours @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
        assert bool((lightness.diff() > 0).all())
        assert render.coloured(torch.tensor([-1.0, 2.0])).tolist() == [
            list(render.COLOURS[0]),
            list(render.COLOURS[-1]),
        ]
        viridis = pytest.importorskip("matplotlib", reason="compared with matplotlib").colormaps["viridis"]
        wanted = torch.from_numpy(viridis(scale.numpy())[:, :3] * 255)
        assert float((colours - wanted).abs().max()) < 8

    def test_no_smoothing_unless_asked_for(self) -> None:
        share = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
        large = render.upsampled(share, 8, 8)
        assert torch.equal(large, share.double().repeat_interleave(4, 0).repeat_interleave(4, 1))
        assert len(render.upsampled(share, 8, 8, smooth=True).unique()) > 4

    def test_what_the_model_saw_is_shown(self) -> None:
        prepare = Preprocessing(8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
        image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
        picture = render.shown(prepare(image)[0], prepare)
        factor = len(picture) // 8
        assert factor * 8 == len(picture) >= render.SIDE
        back = torch.from_numpy(picture[::factor, ::factor].copy()).permute(2, 0, 1)
        assert int((back.int() - image[0].int()).abs().max()) <= 1
        assert render.shown(torch.randn(1, 8, 8), None).shape[2] == 3

    def test_where_in_words(self) -> None:
        patches = torch.zeros(4, 4)
        assert _where(patches) == "nothing speaks for this class"
        patches[3, 0] = 1.0
        assert _where(patches) == "brightest at the bottom left; half of it on 1 of 16 patches"


class TestChoice:
    def test_every_image_is_in_the_one_group_it_belongs_to(self) -> None:
        a = torch.tensor([True, True, False, False, True])
        b = torch.tensor([True, False, True, False, True])
        found = {name: rows.tolist() for name, _, rows in gallery.groups((a, b), ("p", "f"))}
        assert found == {"first-right": [1], "second-right": [2], "both-right": [0, 4], "both-wrong": [3]}
        assert gallery.groups((a,), ("p",))[0][2].tolist() == [0, 1, 4]

    def test_random_by_seed_and_no_group_moves_another(self) -> None:
        a, b = torch.rand(200) < 0.5, torch.rand(200) < 0.5
        found = gallery.groups((a, b), ("p", "f"))
        drawn = gallery._drawn(found, 3, 0)
        assert drawn == gallery._drawn(found, 3, 0) != gallery._drawn(found, 3, 1)
        assert len({row for _, row in drawn}) == 12
        assert gallery._drawn([*found[:1], ("second-right", "", torch.arange(0)), *found[2:]], 3, 0)[3:] == drawn[6:]
        hits = torch.zeros(len(found[0][2]))
        for seed in range(300):
            for _, row in gallery._drawn(found[:1], 3, seed):
                hits[(found[0][2] == row).nonzero().item()] += 1
        assert bool((hits > 0).all())  # nobody is out of reach


def drawn(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    x = images(40)
    labels = torch.randint(0, CLASSES, (40,), generator=torch.Generator().manual_seed(2))
    models = {"vpt-deep": prompted(6), "full": vit(seed=4)}
    options: dict[str, Any] = {"class_names": NAMES, "per_group": 1, "nodes": 4, "max_nodes": 32}
    return at.pictures(models, x, labels, out=tmp_path, **(options | changes))


class TestPictures:
    def test_files_numbers_and_rules(self, tmp_path: Path) -> None:
        found = drawn(tmp_path)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["arms"] == found["pair"] == ["vpt-deep", "full"]
        assert sum(group["available"] for group in found["groups"]) == 40
        assert [group["shown"] for group in found["groups"]] == [min(1, g["available"]) for g in found["groups"]]
        files = [image["file"] for image in found["images"]]
        for image in found["images"]:
            said = {arm: answer["label"] for arm, answer in image["predicted"].items()}
            right = {"first-right": (True, False), "second-right": (False, True),
                     "both-right": (True, True), "both-wrong": (False, False)}[image["group"]]  # fmt: skip
            assert tuple(label == image["label"] for label in said.values()) == right
            explained = {panel["target"] for panel in image["panels"] if panel["method"] == "gradcam"}
            assert explained == {image["label"], *said.values()}
            for panel in image["panels"]:
                assert [one["arm"] for one in panel["maps"]] == ["vpt-deep", "full"]
                assert (panel["target"] is None) == (panel["method"] in ("rollout", "attention"))
                assert panel["high"] >= 0
                for one in panel["maps"]:
                    files.append(one["file"])
                    assert one["alt"].startswith(
                        str({m["name"]: m["title"] for m in found["methods"]}[panel["method"]])
                    )
                    assert 0 <= one["deletion"] <= 1
                    assert 0 <= one["insertion"] <= 1
                    assert 0 <= one["random"] <= 1
                    assert (one["completeness"] is not None) == (panel["method"] == "ig")
                    if one["masses"]:
                        assert sum(one["masses"].values()) == pytest.approx(1, abs=1e-5)
                        assert (one["masses"]["prompts"] > 0) == (
                            panel["method"] == "attention" and one["arm"] != "full"
                        )
        assert len(files) == len(set(files))
        assert sorted(files) == sorted(f"figures/{path.name}" for path in (tmp_path / "figures").iterdir())
        assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "figures").iterdir())
        assert found["largest_completeness"]["full"] <= 0.01
        assert set(found["sanity"]["full"]) == {"gradcam", "ig"}

    def test_numbers_are_those_of_the_functions_and_the_pair_has_one_scale(self, tmp_path: Path) -> None:
        found = drawn(tmp_path, methods=("gradcam", "ig"))
        x, models = images(40), {"vpt-deep": prompted(6), "full": vit(seed=4)}
        image = found["images"][0]
        row = image["number"]
        maps = {}
        for panel in image["panels"]:
            for one in panel["maps"]:
                if panel["method"] == "gradcam":
                    cam = at.gradcam(models[one["arm"]], x[row : row + 1], panel["target"])[0]
                    maps[panel["target"], one["arm"]] = cam / cam.sum() if bool(cam.any()) else cam
                    assert one["empty"] == (not bool(cam.any()))
            if panel["method"] == "gradcam":
                shares = [maps[panel["target"], arm] for arm in models]
                assert panel["high"] == pytest.approx(float(max(share.max() for share in shares)), rel=1e-5)
        panel, one = image["panels"][0], image["panels"][0]["maps"][1]
        share = maps[panel["target"], "full"]
        picture = np.asarray(Pillow.open(tmp_path / image["file"]))
        wanted = render.legend(picture, share, panel["high"])
        assert np.abs(np.asarray(Pillow.open(tmp_path / one["file"])).astype(int) - wanted.astype(int)).max() <= 1

    def test_methods_from_uint8_and_given_answers(self, tmp_path: Path) -> None:
        """As `compare` calls it: labels that are no columns, log-probabilities in label order."""
        method = learned("vpt-deep", prompts=3)
        prepare = Preprocessing(32, (0.5,) * 3, (0.25,) * 3)
        x = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
        labels = torch.tensor([7, 2, 0, 4, 7, 2])
        names = [f"name {index}" for index in range(8)]
        columns = method.predict(prepare(x)).log_softmax(dim=1)
        given = torch.full((6, 8), -torch.inf)
        given[:, method.classes] = columns
        options: dict[str, Any] = {"class_names": names, "preprocess": prepare, "methods": ("gradcam",)}
        a = at.pictures({"one": method}, x, labels, out=tmp_path / "a", **options)
        b = at.pictures({"one": method}, x, labels, out=tmp_path / "b", log_probabilities={"one": given}, **options)
        assert a == b
        for image in a["images"]:
            assert image["class"] == f"name {image['label']}" == f"name {int(labels[image['number']])}"
            assert (image["group"] == "right") == (image["predicted"]["one"]["label"] == image["label"])
            assert image["panels"][0]["agreement"] is None

    def test_stops_in_time_and_keeps_what_is_whole(self, tmp_path: Path) -> None:
        asked: list[int] = []

        def late() -> bool:
            asked.append(1)
            return len(asked) > 1

        seen: list[tuple[int, int]] = []
        found = drawn(tmp_path, methods=("gradcam",), deadline=late, on_image=lambda *at: seen.append(at))
        assert found["stopped"]
        assert len(found["images"]) == 1 == len(seen)
        assert seen[0][0] == 1 < seen[0][1]

    def test_wrong_calls_write_nothing(self, tmp_path: Path) -> None:
        x, labels = images(2), torch.tensor([0, 1])
        model = {"a": vit()}
        good: dict[str, Any] = {"class_names": NAMES, "out": tmp_path / "none"}
        for wrong in (
            {"methods": ("saliency",)}, {"methods": ()}, {"per_group": 0}, {"numbers": [1]}, {"pair": ("a", "b")},
            {"class_names": NAMES[:1]},
        ):  # fmt: skip
            with pytest.raises(ValueError, match=next(iter(wrong)) if "class_names" not in wrong else "labels"):
                at.pictures(model, x, labels, **(good | wrong))
        for models, pixels, answers in (
            ({}, x, labels), ({"a": nn.Linear(1, 1)}, x, labels), (model, x[:0], labels[:0]), (model, x, labels[:1]),
            (model, x, labels.float()), (model, x.to(torch.uint8), labels),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=r"model|images|labels|uint8"):
                at.pictures(models, pixels, answers, **good)
        assert not (tmp_path / "none").exists()
        assert GRID == 4
