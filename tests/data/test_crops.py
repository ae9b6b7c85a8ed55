"""Crops and resizing: what the publications say, and what their tools made, to the bit."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ornstein.data.bad import BadImage
from ornstein.data.images import Crop, checked_crop, load_image
from ornstein.errors import OrnsteinError

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# A picture of formulas, 52 x 37, and the red of what the tools themselves made of it: guided-diffusion's
# center_crop_arr at 8, EDM's dataset_tool center-crop at 8x8 and center-crop-wide at 8x6.
Y, X = np.mgrid[:37, :52]
PICTURE = np.stack([(7 * X + 3 * Y) % 256, (X * Y) % 256, (5 * (X - Y) ** 2) % 256], -1).astype(np.uint8)
RECORDED: list[tuple[Crop, list[list[int]]]] = [
    ("adm", [
        [79, 109, 139, 170, 200, 240, 96, 33], [92, 122, 152, 183, 222, 182, 51, 43],
        [106, 136, 166, 197, 236, 119, 32, 60], [120, 150, 179, 218, 199, 63, 37, 76],
        [135, 165, 196, 236, 129, 29, 60, 91], [149, 179, 217, 196, 66, 35, 76, 105],
        [163, 194, 233, 144, 26, 57, 89, 119], [176, 211, 208, 87, 31, 72, 102, 132],
    ]),
    ("edm", [
        [67, 99, 132, 164, 193, 244, 91, 21], [81, 113, 146, 176, 219, 209, 21, 50],
        [95, 127, 160, 188, 243, 118, 16, 70], [109, 141, 173, 209, 227, 38, 42, 81],
        [123, 155, 184, 238, 150, 10, 66, 93], [137, 168, 201, 238, 60, 31, 77, 107],
        [151, 180, 229, 180, 12, 58, 90, 121], [165, 193, 244, 87, 22, 73, 103, 135],
    ]),
    ("edm_wide", [
        [0, 0, 0, 0, 0, 0, 0, 0], [64, 109, 153, 214, 185, 26, 84, 127],
        [67, 112, 155, 221, 151, 21, 89, 130], [70, 115, 158, 224, 154, 24, 92, 133],
        [73, 118, 161, 229, 117, 25, 95, 136], [76, 121, 164, 232, 120, 28, 98, 139],
        [79, 124, 168, 230, 85, 35, 100, 142], [0, 0, 0, 0, 0, 0, 0, 0],
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("crop", "red"), RECORDED, ids=[row[0] for row in RECORDED])
def test_crops_equal_the_tools_they_are_named_after(crop: Crop, red: list[list[int]]) -> None:
    """To the bit, as this Pillow resamples."""
    assert load_image(png(Image.fromarray(PICTURE)), size=8, crop=crop)[0].tolist() == red


def box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def lanczos(x: np.ndarray) -> np.ndarray:
    """Three lobes."""
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


def resampled(image: np.ndarray, height: int, width: int, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Each output pixel the kernel's mean around its place, the kernel widened by the scale on the way down; rounded to
    8 bits after each direction."""
    for axis, size in ((1, width), (0, height)):
        scale = image.shape[axis] / size
        distance = np.arange(image.shape[axis]) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale
        weights = kernel(distance / max(scale, 1))
        weights /= weights.sum(1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, axes=(1, axis)), 0, axis)
        image = np.clip(np.floor(image + 0.5), 0, 255)
    return image


def centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def by_formula(image: np.ndarray, size: tuple[int, int], crop: Crop) -> np.ndarray:
    """What the publications say, in numpy."""
    height, width = size
    if crop == "stretch":
        return resampled(image, height, width, cubic)
    if crop == "edm":
        rows, columns = image.shape[:2]
        largest = min(rows, round(columns * height / width)), min(columns, round(rows * width / height))
        return resampled(centre(image, *largest), height, width, lanczos)
    if crop == "edm_wide":
        strip = centre(image, round(width * image.shape[0] / image.shape[1]), image.shape[1])
        canvas = np.zeros((width, width, 3))
        centre(canvas, round(0.75 * width), width)[:] = resampled(strip, round(0.75 * width), width, lanczos)
        return canvas
    while image.shape[0] >= 2 * height and image.shape[1] >= 2 * width:
        image = resampled(image, image.shape[0] // 2, image.shape[1] // 2, box)
    scale = max(height / image.shape[0], width / image.shape[1])
    large = resampled(image, round(image.shape[0] * scale), round(image.shape[1] * scale), cubic)
    return centre(large, height, width)


@pytest.mark.parametrize("crop", ["adm", "edm", "edm_wide", "stretch"])
@pytest.mark.parametrize("size", [(16, 16), (12, 12), (12, 20), (24, 16)])
@pytest.mark.parametrize("shape", [(37, 52), (90, 91), (16, 16), (33, 150), (70, 40)])
def test_crops_are_what_is_published(shape: tuple[int, int], size: tuple[int, int], crop: Crop) -> None:
    """Against the formulas on smooth noise, to rounding: Pillow's weights are fixed-point numbers."""
    rng = np.random.default_rng(sum(shape))
    coarse = Image.fromarray(rng.integers(0, 256, (shape[0] // 4, shape[1] // 4, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC))
    content = png(Image.fromarray(image))
    if crop == "edm_wide" and (size[0] != size[1] or round(size[1] * shape[0] / shape[1]) < 0.75 * size[1]):
        with pytest.raises(BadImage, match=r"data\.crop=edm_wide"):
            load_image(content, size=size, crop=crop)
        return
    ours = load_image(content, size=size, crop=crop)
    assert ours.shape == (3, *size)
    difference = ours.transpose(1, 2, 0) - by_formula(image.astype(float), size, crop)
    # Which direction comes first is Pillow's choice, and each is rounded: two levels at most, and few. Another kernel
    # or crop is off by five on the mean.
    assert np.abs(difference).max() <= 2 and np.abs(difference).mean() < 0.4


def test_no_crop_takes_its_size_alone() -> None:
    """As they are, to the bit; any other size is named with both."""
    content = png(NOISE)
    np.testing.assert_array_equal(load_image(content, size=64, crop="none"), np.asarray(NOISE).transpose(2, 0, 1))
    with pytest.raises(BadImage, match=r"it is 64 x 64 and data\.crop=none takes 64 x 32"):
        load_image(content, size=(64, 32), crop="none")


def test_unknown_crop() -> None:
    with pytest.raises(OrnsteinError, match=r"data\.crop=middle.*adm, edm, edm_wide, stretch, none"):
        checked_crop("middle")
