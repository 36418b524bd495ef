"""Distances between feature sets: the Frechet distance by singular values, KID, proxy-A, and their references."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor

from cl_kernels import data
from cl_kernels.compare import reference as references
from cl_kernels.compare.distance import (
    Moments,
    distance_report,
    frechet,
    frechet_line,
    kid,
    measure,
    proxy_a,
)
from cl_kernels.compare.features import extract, weight_hash
from cl_kernels.compare.reference import Reference
from cl_kernels.compare.ruler import names, ruler_images
from cl_kernels.data import Backbone
from cl_kernels.errors import CheckpointError, NonFiniteError

pytest.importorskip("sklearn", reason="the domain classifier is scikit-learn's")
pytest.importorskip("timm", reason="backbones are timm models")


def sample(n: int, width: int, seed: int, spectrum: float = 1.0) -> Tensor:
    """Rows of one Gaussian whose covariance has the eigenvalues i^-spectrum."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width + 1, dtype=torch.float64).pow(-spectrum / 2)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) * scale


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return data.load_backbone("embedded-small")


@pytest.fixture(scope="module")
def digits(backbone: Backbone) -> Tensor:
    return extract(backbone, data.load("digits").train).pooled


# --- PB14 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "width"), [(300, 40), (30, 100), (64, 64)])
def test_pb14_frechet_is_a_distance(n: int, width: int) -> None:
    x, y = sample(n, width, 0), sample(n + 7, width, 1) * 1.3 + 0.2
    trace = float(x.var(dim=0).sum())
    assert frechet(x, x) <= 1e-6 * trace
    assert frechet(x, x.flip(0)) <= 1e-6 * trace  # row order is irrelevant
    there, back = frechet(x, y), frechet(y, x)
    assert there == pytest.approx(back, rel=1e-5)
    assert frechet(x.flip(0), y) == pytest.approx(there, rel=1e-9)
    assert there > 0.1 * trace
    shift = torch.randn(width, dtype=torch.float64)
    assert frechet(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-4)
    assert isinstance(there, float)
    assert np.isfinite(there)


def test_pb14_frechet_is_the_formula_with_a_matrix_square_root() -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="the square root is scipy's")
    for width, n in ((20, 200), (48, 300)):
        mix = torch.randn(width, width, dtype=torch.float64)
        x, y = sample(n, width, 2), sample(n - 50, width, 3, 0.3) @ mix + 0.5
        first, second = x.T.cov().numpy(), y.T.cov().numpy()
        root = linalg.sqrtm(first @ second).real
        wanted = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(first + second - 2 * root)
        assert frechet(x, y) == pytest.approx(wanted, rel=1e-4)
        stored = Moments.of_covariance(y.mean(0), y.T.cov())
        assert frechet(x, stored) == pytest.approx(wanted, rel=1e-6)


def test_pb14_moments_with_fewer_rows_than_dimensions() -> None:
    """n < D: the covariance has no full rank, its square root is where other code turns complex."""
    x, y = sample(25, 200, 4).float(), sample(40, 200, 5).float() * 2
    stored = Moments.of_covariance(y.double().mean(0), y.double().T.cov())
    assert frechet(x, stored) == pytest.approx(frechet(x, y), rel=1e-4)
    low = float(torch.linalg.eigvalsh(y.T.cov()).min())
    assert low < 0  # rounding does this in float32, and it must not matter
    assert frechet(x, Moments.of_covariance(y.mean(0), y.T.cov())) == pytest.approx(frechet(x, y), rel=1e-3)


def test_known_gaussians() -> None:
    x = Moments.of_covariance(torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    y = Moments.of_covariance(torch.tensor([1.0, 0, 0]), torch.diag(torch.tensor([4.0, 4.0, 1.0])))
    assert frechet(x, y) == pytest.approx(1 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2, rel=1e-12)
    assert x.total == pytest.approx(14)


# --- PB15 -----------------------------------------------------------------------------------------------------------


def test_pb15_two_samples_of_one_law_in_768_dimensions() -> None:
    x, y = sample(1000, 768, 10), sample(1000, 768, 11)
    total = float((1 / torch.arange(1, 769)).sum())
    line = frechet_line(x, y, draws=1)
    assert line is not None
    assert line["sizes"] == [400, 550, 700, 850, 1000]
    assert line["values"][-1] == pytest.approx(frechet(x, y), rel=1e-9)
    assert line["values"][-1] / total == pytest.approx(0.15, abs=0.02)  # raw, at n = 1000: what chance alone gives
    assert abs(line["intercept"]) / total <= 0.05
    assert line["residual"] / total < 0.02
    found = kid(x, y)
    assert abs(found["value"]) <= 2 * found["se"]
    assert found["n"] == 1000


def test_pb15_kid_is_unbiased_and_its_error_is_its_spread() -> None:
    for shift in (0.0, 2.0):
        found = [kid(sample(60, 16, 2 * s), sample(60, 16, 2 * s + 1) + shift * torch.eye(16)[0]) for s in range(150)]
        values = torch.tensor([entry["value"] for entry in found])
        spread = float(values.std())
        assert float(torch.tensor([entry["se"] for entry in found]).mean()) == pytest.approx(spread, rel=0.2)
        if shift == 0:
            assert abs(float(values.mean())) < 3 * spread / 150**0.5
            inside = [entry["low"] <= 0 <= entry["high"] for entry in found]
            assert sum(inside) >= 0.9 * len(inside)
        else:
            assert float(values.min()) > 0


def test_kid_is_its_definition() -> None:
    x, y = sample(9, 5, 0), sample(9, 5, 1) + 0.3

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    inside = [sum(k(p[i], p[j]) for i in range(9) for j in range(9) if i != j) / 72 for p in (x, y)]
    across = sum(k(a, b) for a in x for b in y) / 81
    found = kid(x, y)
    assert found["value"] == pytest.approx(sum(inside) - 2 * across, rel=1e-10)
    assert found["high"] - found["value"] == pytest.approx(1.96 * found["se"])
    assert kid(x, torch.cat([y, y + 100]))["value"] == found["value"]  # cut to the smaller n


def test_proxy_a_runs_from_none_to_two() -> None:
    x, y = sample(150, 8, 0), sample(150, 8, 1)
    same, apart, near = proxy_a(x, y), proxy_a(x, y + 20), proxy_a(x, y + 0.5)
    assert same["value"] <= 3 * same["se"]
    assert apart["value"] == pytest.approx(2)
    assert same["value"] < near["value"] < apart["value"]
    assert same["value"] == max(0, 2 * (1 - 2 * same["error"]))
    assert near == proxy_a(x, y + 0.5)


def test_wrong_features_are_named() -> None:
    x = sample(10, 4, 0)
    with pytest.raises(ValueError, match="n at least 2"):
        frechet(x[:1], x)
    with pytest.raises(ValueError, match="widths differ, 4 and 3"):
        frechet(x, x[:, :3])
    with pytest.raises(NonFiniteError, match="NaN"):
        frechet(x, x / 0)
    with pytest.raises(NonFiniteError, match="overflow"):
        frechet(x * 1e200, x)  # max(0, NaN) would be 0
    with pytest.raises(ValueError, match="n at least 4"):
        kid(x[:3], x)
    with pytest.raises(ValueError, match="n >= 5"):
        proxy_a(x[:3], x)
    assert frechet_line(x, x) is None  # too few for a line


# --- references -----------------------------------------------------------------------------------------------------


def test_statistics_of_the_embedded_backbones_ship_and_fit() -> None:
    folder = Path(references.__file__).parent / "references"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    for name, width in (("embedded", 128), ("embedded-small", 64)):
        model = data.load_backbone(name)
        found = references.find(model)
        assert found is not None
        assert (len(found.mean), found.n) == (width, 3630)
        assert found.features is not None
        assert found.features.shape == (1000, width)
        assert "MIT" in found.source
        assert found.weight_hash == weight_hash(model.model)
        # the 1000 that are stored are of the law that the moments describe
        assert frechet(found.features, found.moments()) < 0.03 * found.moments().total
        mark = found.marks["Omniglot, same characters by other drawers"]
        assert abs(mark["kid"]["value"]) < 2 * mark["kid"]["se"]
        with torch.no_grad():
            next(model.model.parameters()).add_(1)
        assert references.find(model) is None  # other weights, other features


def test_shipped_statistics_are_those_of_the_shard(data_dir: Path, tmp_path: Path, backbone: Backbone) -> None:
    spec = importlib.util.spec_from_file_location("reference_statistics", ROOT / "examples" / "reference_statistics.py")
    if spec is None or spec.loader is None:
        pytest.fail("the example is not where it should be")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = tmp_path / "made.safetensors"
    shard = str(data_dir / "omniglot_small12.npz")
    script.main(["--backbone", "embedded-small", "--data", shard, "--ink", "--source", "drawings", "--out", str(out)])
    made, stored = references.load(out), references.shipped(weight_hash(backbone.model))
    assert stored is not None
    torch.testing.assert_close(made.mean, stored.mean, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(made.covariance, stored.covariance, atol=1e-3, rtol=1e-3)
    assert (made.weight_hash, made.n) == (stored.weight_hash, stored.n)


def test_a_reference_from_a_folder_of_pictures(tmp_path: Path, backbone: Backbone) -> None:
    image = pytest.importorskip("PIL.Image", reason="picture files need Pillow")
    for index in range(12):
        folder = tmp_path / "pictures" / f"deep{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "torn.png").write_bytes(b"\x89PNG")
    made = references.find(backbone, tmp_path / "pictures")
    assert made is not None
    assert (made.n, made.skipped, made.name) == (12, 1, "pictures")
    assert made.features is not None
    torch.testing.assert_close(made.features.double().T.cov(), made.covariance, atol=1e-4, rtol=1e-4)
    few = references.from_path(backbone, tmp_path / "pictures", limit=5)
    assert few.n == 5
    made.save(tmp_path / "r.safetensors")
    again = references.find(backbone, tmp_path / "r.safetensors")
    assert again is not None
    assert (again.n, again.name, again.source, again.skipped) == (12, "pictures", "pictures", 1)
    torch.testing.assert_close(again.covariance, made.covariance, rtol=1e-5, atol=1e-5)


def test_references_that_cannot_be_used_are_named(tmp_path: Path, backbone: Backbone) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        references.find(backbone, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="two readable pictures or more, found 0"):
        references.find(backbone, tmp_path)
    found = references.find(data.load_backbone("embedded"))
    assert found is not None
    found.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="made with other weights"):
        references.find(backbone, tmp_path / "other.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tmp_path / "other.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors"):
        references.find(backbone, damaged)
    with pytest.raises(CheckpointError):  # weights are no statistics
        references.load(data.backbones.embedded_weights())


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_report_puts_digits_on_a_ruler(digits: Tensor, backbone: Backbone) -> None:
    found = distance_report(
        digits, references.find(backbone), n=300, backbone=backbone, ruler=("digits", "digits, inverted")
    )
    assert (found["n"], found["images"], found["dimensions"]) == (300, 1347, 64)
    assert found["reference"]["n"] == 3630
    rows = {row["name"]: row for row in found["ruler"]}
    near = rows["Omniglot, same characters by other drawers"]
    assert near["n"] == 1000  # a stored mark carries its own n
    assert near["kid"] < rows["digits"]["kid"] < rows["digits, inverted"]["kid"]
    assert near["frechet_relative"] < found["frechet"]["chance_relative"] < rows["digits"]["frechet_relative"]
    assert rows["digits"]["frechet_relative"] == pytest.approx(found["frechet"]["relative"], rel=0.1)  # other digits
    assert abs(found["kid"]["value"] - rows["digits"]["kid"]) < 4 * found["kid"]["se"]
    assert [row["frechet"] for row in found["ruler"]] == sorted(row["frechet"] for row in found["ruler"])
    line = found["frechet"]["line"]
    assert 0 < line["intercept_relative"] < found["frechet"]["relative"]
    assert found["proxy_a"]["value"] > 1.9
    assert found["notes"][0].endswith("compare it only with others at n = 300")
    assert any("Inception" in entry for entry in found["missing"])
    assert found == distance_report(
        digits, references.find(backbone), n=300, backbone=backbone, ruler=("digits", "digits, inverted")
    )


def test_the_pre_training_drawings_are_at_no_distance(backbone: Backbone) -> None:
    stored = references.find(backbone)
    assert stored is not None
    assert stored.features is not None
    half = stored.features[500:]
    first = Reference("half", stored.mean, stored.covariance, stored.n, stored.features[:500], stored.weight_hash)
    found = measure(half, first)
    assert found["n"] == 500
    assert abs(found["kid"]["value"]) <= 2.5 * found["kid"]["se"]
    assert found["proxy_a"]["value"] <= 3 * found["proxy_a"]["se"]
    assert abs(found["frechet"]["line"]["intercept_relative"]) <= 0.05


def test_moments_alone_give_frechet_and_say_what_is_missing(digits: Tensor, backbone: Backbone) -> None:
    stored = references.find(backbone)
    assert stored is not None
    bare = Reference("moments", stored.mean, stored.covariance, stored.n, None, stored.weight_hash)
    found = distance_report(digits[:80], bare)
    assert found["n"] == 80
    assert (found["kid"], found["proxy_a"]) == (None, None)
    assert found["frechet"]["value"] == pytest.approx(found["frechet"]["moments"]["value"])
    text = " ".join(found["notes"])
    assert "as there are fewer than 1000 images" in text
    assert "KID and proxy-A distance need stored reference features" in text
    assert "n = 80 is near or below the 64 dimensions" in text
    assert any("no backbone was given" in entry for entry in found["missing"])


def test_without_a_reference_the_report_says_so(digits: Tensor) -> None:
    found = distance_report(digits, None)
    assert found["reference"] is None
    assert "give --reference DIR or FILE" in found["missing"][0]
    assert "frechet" not in found


def test_the_ruler_stops_when_told_and_refuses_other_features(digits: Tensor, backbone: Backbone) -> None:
    stored = references.find(backbone)
    found = distance_report(digits[:60], stored, backbone=backbone, should_stop=lambda: True)
    assert [row["name"] for row in found["ruler"]] == ["Omniglot, same characters by other drawers"]
    assert sum("no time was left" in entry for entry in found["missing"]) == 6
    with pytest.raises(ValueError, match="features of width 64, not 10"):
        distance_report(digits[:, :10], stored)


def test_marks_are_the_same_digits_made_worse() -> None:
    plain = ruler_images("digits", 16, 40)
    assert plain.shape == (40, 1, 16, 16)
    assert torch.equal(ruler_images("digits, inverted", 16, 40), 255 - plain)
    foggy = ruler_images("digits, fog 5", 16, 40)
    assert foggy.shape == plain.shape
    assert not torch.equal(foggy, plain)
    assert len(names()) == 2 + 15 * 5
    with pytest.raises(ValueError, match="unknown mark 'letters'"):
        ruler_images("letters", 16, 40)


def test_photographs_are_told_apart_from_drawings(data_dir: Path, backbone: Backbone) -> None:
    photographs = data.load(data_dir / "grocery64.npz", image_size=32).train.subset(range(0, 2640, 12))
    stored = references.find(backbone)
    assert stored is not None
    found = measure(extract(backbone, photographs).pooled, stored)
    near = stored.marks["Omniglot, same characters by other drawers"]
    assert found["n"] == 220
    assert found["kid"]["low"] > near["kid"]["high"]
    assert found["frechet"]["line"]["intercept_relative"] > near["frechet"]["line"]["intercept_relative"] + 0.1
    assert found["proxy_a"]["value"] > 1.5
