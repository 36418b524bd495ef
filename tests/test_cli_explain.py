"""`cl-kernels explain`: from a run, a comparison's folder or a model file and one's own pictures to a page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_tiny import one_thread, tiny_backbone

from cl_kernels import continual
from cl_kernels.compare.attribution.sources import read_images
from cl_kernels.continual import RunConfig, load_model, load_run
from cl_kernels.errors import CheckpointError

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
pytest.importorskip("jinja2", reason="the page is a template")
Pillow = pytest.importorskip("PIL.Image", reason="pictures are read with Pillow")
pytest.importorskip("timm", reason="the backbone is timm's")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two finished runs on real digits with the backbone in the package."""
    found = {}
    for method, options in (("vpt-deep", {"prompts": 2}), ("linear", {})):
        out = tmp_path_factory.mktemp("runs") / method
        config = RunConfig(
            method, data="digits", backbone="embedded-small", tasks=2, epochs=1, quick=True, options=options, out=out,
            threads=1, device="cpu",
        )  # fmt: skip
        continual.run(config)
        found[method] = out
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three real digits in folders named after their classes, and one file that is no picture."""
    from cl_kernels.data import load

    data = load("digits")
    for row in range(3):
        image, label = data.test[row]
        place = tmp_path / "digits" / data.class_names[label]
        place.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(image[0].numpy()).save(place / f"{row}.png")
    (tmp_path / "digits" / "broken.png").write_bytes(b"not a picture")
    return tmp_path / "digits"


def model_file(method: Any, name: str, path: Path, **options: Any) -> Path:
    continual.save_model(
        path, method.method, name=name, options=options, backbone="embedded-small", preprocess=method.preprocess,
        class_names=[str(number) for number in range(10)],
    )  # fmt: skip
    return path


class TestLoadRun:
    @pytest.mark.parametrize("name", ["vpt-deep", "linear"])
    def test_is_the_model_that_the_run_measured(self, runs: dict[str, Path], name: str) -> None:
        from cl_kernels.continual import stream
        from cl_kernels.data import load

        results = json.loads((runs[name] / "results.json").read_text())
        model, data = load_run(runs[name]), load("digits")
        hits = []
        for task, said in zip(stream.class_incremental(data, 2, 0), results["tasks"], strict=True):
            rows = stream.quick(task, data).test
            assert len(rows) == said["test"]
            pixels = torch.stack([data.test[int(row)][0] for row in rows])
            right = [said_one == data.class_names[int(data.test.labels[row])] for said_one, row in
                     zip(model.names(pixels), rows, strict=True)]  # fmt: skip
            hits.append(sum(right) / len(right))
        assert hits == pytest.approx(results["accuracy_matrix"][-1])

    def test_says_what_to_do_where_there_is_no_model(self, runs: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="it holds no run"):
            load_run(tmp_path)
        copy = tmp_path / "copy"
        shutil.copytree(runs["linear"], copy)
        results = json.loads((copy / "results.json").read_text())
        (copy / "results.json").unlink()
        with pytest.raises(FileNotFoundError, match="--resume"):
            load_run(copy)
        (copy / "results.json").write_text("{}")
        with pytest.raises(CheckpointError, match=re.escape("results.json")):
            load_run(copy)
        results["fingerprint"] = "of another run"
        (copy / "results.json").write_text(json.dumps(results))
        with pytest.raises(CheckpointError, match="another run"):
            load_run(copy)
        (copy / "checkpoints" / "last.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="train it again"):
            load_run(copy)
        results["config"]["teacher"] = "embedded"
        (copy / "checkpoints" / "last.safetensors").touch()
        (copy / "results.json").write_text(json.dumps(results))
        with pytest.raises(FileNotFoundError, match="student"):
            load_run(copy)


class TestExplain:
    def test_a_run(self, command: Command, runs: dict[str, Path], folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "page"
        code, said, errors = command(
            "explain", "--run", str(runs["vpt-deep"]), "--images", str(folder), "--out", str(out), "--nodes", "8"
        )
        assert code == 0, errors
        assert "skipped:" in errors
        assert "Broken images left out" in said
        shown = json.loads((out / "explain.json").read_text())
        assert shown["schema"] == "cl_kernels.explain/1"
        assert len(shown["images"]) == 3
        assert said.count("completeness error") == 3
        assert shown["largest_completeness"]["vpt-deep"] <= 0.01
        assert all(image["label"] is not None for image in shown["images"])
        page = (out / "explain.html").read_text()
        sources = re.findall(r'src="([^"]*)"', page)
        assert len(sources) == 3 * 5
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        assert not re.search(r"https?://|<script|<link", page)
        assert page.count("alt=") == len(sources)

    def test_a_comparisons_best_weights_side_by_side(
        self, command: Command, runs: dict[str, Path], folder: Path, tmp_path: Path
    ) -> None:
        compared = tmp_path / "compared"
        compared.mkdir()
        for name, options in (("vpt-deep", {"prompts": 2}), ("linear", {})):
            model_file(load_run(runs[name]), name, compared / f"best_{name}.safetensors", **options)
        code, said, errors = command(
            "explain", "--run", str(compared), str(folder), "--images", str(folder / "nothing.png"),
        )  # fmt: skip
        assert (code, said) == (2, "")
        assert "nothing.png" in errors
        code, said, errors = command(
            "explain", "--run", str(compared), "--images", str(folder), "--method", "gradcam,rollout",
            "--target", "true", "--count", "2",
        )  # fmt: skip
        assert code == 0, errors
        assert "of 4 images, drawn by --seed 0" in errors
        shown = json.loads((compared / "explain" / "explain.json").read_text())
        assert shown["models"] == ["vpt-deep", "linear"]
        for image in shown["images"]:
            gradcam, rollout = image["panels"]
            assert gradcam["class"] == Path(image["name"]).parent.name
            assert [one["arm"] for one in rollout["maps"]] == ["vpt-deep", "linear"]

    def test_a_model_file_and_a_class_by_name(
        self, command: Command, runs: dict[str, Path], folder: Path, tmp_path: Path
    ) -> None:
        file = model_file(load_run(runs["linear"]), "linear", tmp_path / "mine.safetensors")
        words = ("explain", "--run", str(file), "--images", str(folder), "--method", "gradcam", "--count", "1")
        assert command(*words, "--target", "7")[0] == 0
        shown = json.loads((tmp_path / "mine-explain" / "explain.json").read_text())
        assert shown["images"][0]["panels"][0]["class"] == "7"
        code, _, errors = command(*words, "--target", "77")
        assert code == 2
        assert "nearest: 7" in errors

    def test_images_of_a_data_set(self, command: Command, runs: dict[str, Path], tmp_path: Path) -> None:
        words = ("explain", "--run", str(runs["linear"]), "--images", "digits", "--method", "attention", "--count", "2")
        code, _, errors = command(*words, "--out", str(tmp_path / "a"))
        assert code == 0, errors
        images = json.loads((tmp_path / "a" / "explain.json").read_text())["images"]
        assert [image["label"] is None for image in images] == [False, False]
        assert all(image["panels"][0]["maps"][0]["reads"] == "patches" for image in images)
        command(*words, "--out", str(tmp_path / "b"), "--seed", "1")
        assert images != json.loads((tmp_path / "b" / "explain.json").read_text())["images"]

    def test_wrong_calls(self, command: Command, runs: dict[str, Path], folder: Path, tmp_path: Path) -> None:
        run, pictures = ("--run", str(runs["linear"])), ("--images", str(folder))
        (tmp_path / "empty").mkdir()
        (tmp_path / "plain").mkdir()
        shutil.copy(next(folder.rglob("0.png")), tmp_path / "plain" / "x.png")
        cases = {
            "--run is missing": pictures,
            "--images is missing": run,
            "no such file or folder": ("--run", str(tmp_path / "nowhere"), *pictures),
            "no such picture": (*run, "--images", "nowhere"),
            "holds no picture": (*run, "--images", str(tmp_path / "empty")),
            "none of 1 pictures": (*run, "--images", str(folder / "broken.png")),
            "expected some of": (*run, *pictures, "--method", "saliency"),
            "true class": (*run, "--images", str(tmp_path / "plain"), "--target", "true"),
            "nodes": (*run, *pictures, "--nodes", "0"),
            "count": (*run, *pictures, "--count", "0"),
        }
        for message, words in cases.items():
            code, _, errors = command("explain", *words, "--out", str(tmp_path / "out"))
            assert code == 2, (message, errors)
            assert message in errors
        assert not (tmp_path / "out").exists()

    def test_a_file_that_is_no_model(self, command: Command, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.safetensors").write_bytes(b"{}")
        code, _, errors = command("explain", "--run", str(tmp_path / "bad.safetensors"), "--images", str(folder))
        assert code == 1
        assert "bad.safetensors" in errors


def test_models_with_other_classes_are_not_set_side_by_side(runs: dict[str, Path]) -> None:
    from cl_kernels.compare.attribution.sources import known_classes

    one, other = load_run(runs["linear"]), load_run(runs["linear"])
    assert known_classes([one, other]) == [str(number) for number in range(10)]
    other.class_names = [f"digit {name}" for name in other.class_names]
    with pytest.raises(ValueError, match="same classes"):
        known_classes([one, other])
    assert load_model is not load_run
    assert tiny_backbone().preprocessing.size == 16


def test_the_count_holds_for_all_sources_together(folder: Path) -> None:
    """And none of them is out of reach behind another."""
    (folder / "broken.png").unlink()
    kinds = set()
    for seed in range(8):
        shown, _, total = read_images(["digits", str(folder)], size=8, count=3, seed=seed)
        assert len(shown) == 3
        assert total == 450 + 3
        kinds |= {"file" if image.name.endswith(".png") else "set" for image in shown}
    assert kinds == {"file", "set"}
