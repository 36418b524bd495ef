"""Corruptions of images: stronger with severity, the same in any batch, and what their formulas say."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_kernels import data
from cl_kernels.data import corruptions
from cl_kernels.data.corruptions import blur, noise, sampling
from cl_kernels.data.corruptions.draws import Draws

FAMILIES = corruptions.names()
pytestmark = pytest.mark.usefixtures("needs_pillow")


@pytest.fixture(scope="module")
def needs_pillow() -> None:
    pytest.importorskip("PIL", reason="JPEG and pixelate go through Pillow")


def pictures(count: int = 6, channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    """Random pictures with bright and dark parts and some texture."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, channels, 5, 5, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    texture = 0.15 * torch.randn(count, channels, (height + 1) // 2, (width + 1) // 2, generator=generator)
    fine = fine + torch.nn.functional.interpolate(texture, size=(height, width), mode="bilinear", align_corners=False)
    return (fine.clamp(0, 1) * 255).round().to(torch.uint8)


def distances(images: Tensor, name: str) -> list[float]:
    """Mean over images of the root mean square change, at every severity."""
    found = []
    for severity in corruptions.SEVERITIES:
        moved = corruptions.corrupt(images, name, severity).double() - images.double()
        found.append(float(moved.square().mean(dim=(1, 2, 3)).sqrt().mean()))
    return found


def test_the_fifteen_families() -> None:
    assert len(FAMILIES) == 15
    assert [len(group) for group in corruptions.GROUPS.values()] == [3, 4, 4, 4]
    assert [name for group in corruptions.GROUPS.values() for name in group] == FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
class TestEveryFamily:
    @pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 64), (1, 16, 16), (3, 33, 47), (1, 5, 4)])
    def test_shape_dtype_and_that_the_input_is_left_alone(self, name: str, shape: tuple[int, int, int]) -> None:
        images = pictures(2, *shape)
        before = images.clone()
        made = corruptions.corrupt(images, name, 5)
        assert made.dtype == torch.uint8
        assert made.shape == images.shape
        assert made.is_contiguous()
        assert not torch.equal(made, images)
        assert torch.equal(images, before)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_an_image_is_the_same_in_any_batch(self, name: str, channels: int) -> None:
        images = pictures(7, channels)
        whole = corruptions.corrupt(images, name, 4)
        alone = torch.cat([corruptions.corrupt(one[None], name, 4) for one in images])
        assert torch.equal(whole, alone)
        order = torch.randperm(7)
        assert torch.equal(corruptions.corrupt(images[order], name, 4), whole[order])
        strided = torch.stack([images, images], dim=1)[:, 1]
        assert torch.equal(corruptions.corrupt(strided, name, 4), whole)

    def test_the_same_twice_whatever_the_random_state_and_the_threads(self, name: str) -> None:
        images = pictures(3)
        first = corruptions.corrupt(images, name, 2)
        state, threads = torch.get_rng_state(), torch.get_num_threads()
        torch.manual_seed(99)
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            assert torch.equal(corruptions.corrupt(images, name, 2), first)
        finally:
            torch.set_num_threads(threads)
        torch.set_rng_state(state)
        corruptions.corrupt(images, name, 2)
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_seed_decides_what_is_random_and_nothing_else(self, name: str) -> None:
        images = pictures(3)
        one, other = (corruptions.corrupt(images, name, 3, seed=seed) for seed in (0, 1))
        fixed = name in ("defocus-blur", "zoom-blur", "brightness", "contrast", "pixelate", "jpeg")
        assert torch.equal(one, other) == fixed

    @pytest.mark.parametrize("size", [16, 32, 64])
    def test_stronger_with_severity(self, name: str, size: int) -> None:
        found = distances(pictures(12, 3, size, size), name)
        allowed = 0.65 if name == "pixelate" else 0.98  # where its blocks fall on a drawn texture decides
        assert all(b > allowed * a for a, b in itertools.pairwise(found)), found
        assert found[4] > 1.2 * found[0]

    def test_extremes_stay_in_range(self, name: str) -> None:
        for value in (0, 255):
            images = torch.full((2, 3, 32, 32), value, dtype=torch.uint8)
            made = corruptions.corrupt(images, name, 5)
            if name in ("defocus-blur", "glass-blur", "motion-blur", "zoom-blur", "contrast", "elastic", "pixelate"):
                assert torch.equal(made, images), "a flat picture has nothing to blur or to move"

    def test_real_images(self, name: str, data_dir: Path) -> None:
        if not (data_dir / "cifar10_1000x200.npz").exists():
            pytest.skip("the shard is not in the data folder")
        shard = data.load(data_dir / "cifar10_1000x200.npz", image_size=32).test
        found = distances(shard.subset(torch.arange(0, len(shard), 40)).tensors(), name)
        assert found == sorted(found)
        assert 1.0 < found[0] < found[4] < 90, "in grey levels: seen, and not beyond recognition"

    def test_the_digits(self, name: str) -> None:
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
        found = distances(data.load("digits", image_size=32).test.tensors()[:60], name)
        allowed = 0.98 if name == "pixelate" else 1.0  # 8 x 8 drawings are smooth: where the blocks fall decides
        assert all(b >= allowed * a for a, b in itertools.pairwise(found)), found


class TestFormulas:
    def test_gaussian_noise_has_its_deviation(self) -> None:
        images = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
        for severity, deviation in zip(corruptions.SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
            moved = (corruptions.corrupt(images, "gaussian-noise", severity).double() - 128) / 255
            assert float(moved.std()) == pytest.approx(deviation, rel=0.02)
            assert abs(float(moved.mean())) < 3 * deviation / images.numel() ** 0.5

    def test_shot_noise_counts_photons(self) -> None:
        """Mean x, variance x / c; and the inversion is that of the distribution function."""
        pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 1, 256, 400)
        uniform = ((torch.arange(400, dtype=torch.float64) + 0.5) / 400).expand_as(pixels)
        for photons in (500, 50):
            counts = noise._poisson(pixels, photons / 255, uniform)
            mean = torch.arange(256, dtype=torch.float64) * photons / 255
            torch.testing.assert_close(counts.mean(dim=3).flatten(), mean, rtol=0, atol=0.05)
            torch.testing.assert_close(counts.var(dim=3).flatten(), mean, rtol=0.03, atol=0.05)
        first = noise._poisson(pixels[..., :1], 0.2, torch.zeros(1, 1, 256, 1, dtype=torch.float64))
        assert (first <= 0.2 * pixels[..., :1]).all()
        last = torch.full((1, 1, 256, 1), 1 - 2.0**-53, dtype=torch.float64)
        assert (noise._poisson(pixels[..., :1], 0.2, last) < 200).all()

    def test_impulse_noise_hits_its_share(self) -> None:
        images = torch.full((4, 3, 64, 64), 100, dtype=torch.uint8)
        made = corruptions.corrupt(images, "impulse-noise", 5)
        assert float((made == 0).double().mean()) == pytest.approx(0.035, rel=0.1)
        assert float((made == 255).double().mean()) == pytest.approx(0.035, rel=0.1)
        assert set(made.unique().tolist()) == {0, 100, 255}

    def test_brightness_is_that_of_hsv(self) -> None:
        matplotlib = pytest.importorskip("matplotlib.colors", reason="the reference is matplotlib's HSV")
        images = pictures(2)
        images[0, :, 0, 0] = 0
        hsv = matplotlib.rgb_to_hsv(images.permute(0, 2, 3, 1).numpy() / 255)
        hsv[..., 2] = np.clip(hsv[..., 2] + 0.15, 0, 1)
        expected = torch.from_numpy(matplotlib.hsv_to_rgb(hsv)).permute(0, 3, 1, 2) * 255
        made = corruptions.corrupt(images, "brightness", 3).double()
        assert float((made - expected).abs().max()) <= 0.5 + 1e-9

    def test_contrast_keeps_the_mean_and_scales_the_rest(self) -> None:
        images = pictures(2)
        made, values = corruptions.corrupt(images, "contrast", 2).double(), images.double()
        mean = values.mean(dim=(2, 3), keepdim=True)
        torch.testing.assert_close(made, mean + 0.5 * (values - mean), rtol=0, atol=0.51)

    def test_pixelate_and_jpeg_are_pillows(self) -> None:
        import io

        from PIL import Image

        images = pictures(1)
        picture = Image.fromarray(images[0].permute(1, 2, 0).contiguous().numpy())
        small = picture.resize((20, 20), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
        made = corruptions.corrupt(images, "pixelate", 5)[0].permute(1, 2, 0)
        assert np.array_equal(made.numpy(), np.array(small))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=40)
        made = corruptions.corrupt(images, "jpeg", 5)[0].permute(1, 2, 0)
        assert np.array_equal(made.numpy(), np.array(Image.open(buffer)))

    @pytest.mark.parametrize("radius", [0.1, 0.78, 1.42, 3.0, 10.0])
    def test_a_disc_is_round_and_whole(self, radius: float) -> None:
        kernel = blur._disc(radius)
        assert float(kernel.sum()) == pytest.approx(1)
        for turned in (kernel.mT, kernel.flip(0), kernel.flip(1)):
            torch.testing.assert_close(turned, kernel)
        places = torch.arange(len(kernel)) - len(kernel) // 2
        variance = float((kernel.sum(dim=0) * places**2).sum())
        assert variance >= radius**2 / 4 - 1e-3, "reading between pixels only adds to a disc's own"
        if radius >= 1:
            assert variance == pytest.approx(radius**2 / 4 + 1 / 6, rel=0.05)

    def test_defocus_spreads_as_the_published_kernels(self) -> None:
        wanted = (0.081, 0.213, 0.333, 0.400, 0.667)  # of the 3 x 3 kernels, along one axis
        for radius, variance in zip(blur._RADIUS, wanted, strict=True):
            kernel = blur._disc(radius)
            places = torch.arange(len(kernel)) - len(kernel) // 2
            assert float((kernel.sum(dim=0) * places**2).sum()) == pytest.approx(variance, rel=0.02)

    def test_lengths_scale_with_the_side(self) -> None:
        """A point drawn at twice the size is blurred twice as wide."""

        def width(size: int, name: str) -> float:
            images = torch.zeros(1, 1, size, size, dtype=torch.uint8)
            square = slice(size // 2 - size // 16, size // 2 + size // 16)
            images[..., square, square] = 255
            made = corruptions.corrupt(images, name, 5)[0, 0].double()
            places = torch.arange(size).double()
            mean = (made.sum(dim=0) * places).sum() / made.sum()
            return float(((made.sum(dim=0) * (places - mean) ** 2).sum() / made.sum()).sqrt()) / size

        for name in ("defocus-blur", "zoom-blur"):
            assert width(128, name) == pytest.approx(width(64, name), rel=0.06)

    def test_motion_runs_along_its_direction(self) -> None:
        point = torch.zeros(2, 1, 33, 33, dtype=torch.float64)
        point[:, :, 16, 16] = 1
        made = sampling.directional(point, 2.0, torch.tensor([0.0, -90.0], dtype=torch.float64))
        assert float(made[0, 0, 16].sum()) == pytest.approx(float(made[0].sum()))
        assert float(made[1, 0, :, 16].sum()) == pytest.approx(float(made[1].sum()))
        assert float(made[0].sum()) == pytest.approx(1)

    def test_fog_hides_black_more_than_white(self) -> None:
        images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        images[..., :16] = 255
        made = corruptions.corrupt(images, "fog", 5).double()
        assert float(made[..., 16:].mean()) > 40
        assert float(made[..., :16].mean()) < 255
        black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        assert torch.equal(corruptions.corrupt(black, "fog", 5), black), "as published: fog is lit by the image"


class TestDraws:
    def test_uniform_and_normal(self) -> None:
        draws = Draws(pictures(4), 0, "x")
        values = draws.uniform(0, 50_000)
        assert float(values.min()) >= 0
        assert float(values.max()) < 1
        for row in values:
            counts = torch.histc(row.float(), bins=50, min=0, max=1)
            assert float(((counts - 1000).square() / 1000).sum()) < 100, "chi square with 49 degrees of freedom"
        normal = draws.normal(0, 100_000)
        for moment, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
            assert float((normal**moment).mean()) == pytest.approx(expected, abs=0.03)
        assert bool(torch.isfinite(normal).all())

    def test_images_streams_names_and_seeds_are_unrelated(self) -> None:
        images = pictures(2)
        images[1] = images[0]
        images[1, 2, 31, 31] += 1
        numbers = [
            Draws(images, 0, "x").uniform(0, 20_000)[0],
            Draws(images, 0, "x").uniform(0, 20_000)[1],
            Draws(images, 0, "x").uniform(1, 20_000)[0],
            Draws(images, 1, "x").uniform(0, 20_000)[0],
            Draws(images, 0, "y").uniform(0, 20_000)[0],
            Draws(images, 0, "x").uniform(0, 20_001)[0][1:],
        ]
        related = torch.corrcoef(torch.stack(numbers)) - torch.eye(6, dtype=torch.float64)
        assert float(related.abs().max()) < 0.03

    def test_pinned(self) -> None:
        """Splitmix64 in int64: what is here today must be what a later version and another machine draw."""
        images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
        assert [round(float(v), 12) for v in Draws(images, 0, "x").uniform(0, 2).flatten()] == PINNED


PINNED = [0.889510358097, 0.631535168817, 0.563982879289, 0.68843950953]


class TestErrors:
    def test_unknown_names_offer_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"'fogg'.*nearest: fog"):
            corruptions.corrupt(pictures(1), "fogg", 1)

    @pytest.mark.parametrize("severity", [0, 6, 2.5, True, "3"])
    def test_severities(self, severity: object) -> None:
        with pytest.raises(ValueError, match="severity must be 1, 2, 3, 4 or 5, got"):
            corruptions.corrupt(pictures(1), "fog", severity)  # type: ignore[arg-type]  # what is refused

    @pytest.mark.parametrize(
        "images", [torch.rand(1, 3, 8, 8), pictures(1)[0], pictures(1, 2), torch.zeros(2, 3, 0, 8, dtype=torch.uint8)]
    )
    def test_images(self, images: Tensor) -> None:
        with pytest.raises(ValueError, match=r"images must be uint8 \[N, 1 or 3, H, W\], got"):
            corruptions.corrupt(images, "fog", 1)

    def test_no_images_give_none(self) -> None:
        assert corruptions.corrupt(pictures(2)[:0], "jpeg", 1).shape == (0, 3, 32, 32)

    def test_without_pillow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ImportError, match=r"need Pillow: pip install"):
            corruptions.corrupt(pictures(1), "jpeg", 1)
        corruptions.corrupt(pictures(1), "fog", 1)
