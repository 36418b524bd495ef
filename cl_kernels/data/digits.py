"""The embedded data: scikit-learn's bundled digits, 1,797 real 8x8 images by 43 writers (from UCI)."""

from __future__ import annotations

import torch

from cl_kernels.data.sets import ImageData, ImageSet, TensorImages, held_out, stratified_split

__all__ = ["load_digits"]

TEST_SHARE = 0.25


def load_digits(*, split_seed: int = 0, image_size: int | None = None) -> ImageData:
    """The ten digits as uint8 [1, 8, 8] (the sheet's 0..16 scaled to 0..255), a quarter of each class for testing.

    Raises ``ImportError`` with the install line where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "cl-kernels[demo]"') from error
    sheet = bundled()
    pixels = torch.from_numpy(sheet.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(sheet.target).to(torch.int64)
    images = TensorImages(pixels)
    train, test = stratified_split(labels, TEST_SHARE, split_seed)
    return ImageData(
        name="digits",
        train=ImageSet(images, labels[train], train, image_size=image_size),
        test=ImageSet(images, labels[test], test, image_size=image_size),
        class_names=[str(name) for name in sheet.target_names],
        test_from=held_out(TEST_SHARE, split_seed),
    )
