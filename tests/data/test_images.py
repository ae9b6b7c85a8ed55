"""Decoding every kind of file that turns up in a folder of images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ornstein.data.images import center_square, load_image, resize_array
from ornstein.errors import OrnsteinError

SIZE = 16
RED = (200, 30, 10)
GREY = 77


def rgba(alpha: int) -> Image.Image:
    """One colour, one alpha."""
    return Image.new("RGBA", (SIZE, SIZE), (*RED, alpha))


def palette(*, transparent: bool) -> Image.Image:
    """A palette image of one red, which may be the transparent one."""
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([0, 0, 0, *RED])
    if transparent:
        image.info["transparency"] = 1
    return image


def deep_grey() -> Image.Image:
    """16 bits a pixel: 8-bit grey v is 257 v."""
    return Image.fromarray(np.full((SIZE, SIZE), 257 * GREY, dtype=np.uint16))


def bits() -> Image.Image:
    """One bit a pixel, white."""
    return Image.new("1", (SIZE, SIZE), 1)


# Half of alpha 128/255 over white; Pillow's compositing rounds within one level.
HALF = tuple(round((c * 128 + 255 * 127) / 255) for c in RED)
CASES = [
    ("rgb.png", Image.new("RGB", (SIZE, SIZE), RED), RED, 0),
    ("opaque.png", rgba(255), RED, 0),
    ("clear.png", rgba(0), (255, 255, 255), 0),
    ("half.png", rgba(128), HALF, 1),
    ("grey-alpha.png", Image.new("LA", (SIZE, SIZE), (GREY, 0)), (255, 255, 255), 0),
    ("grey.png", Image.new("L", (SIZE, SIZE), GREY), (GREY,) * 3, 0),
    ("deep.png", deep_grey(), (GREY,) * 3, 0),
    ("deep.tiff", deep_grey(), (GREY,) * 3, 0),
    ("bits.png", bits(), (255,) * 3, 0),
    ("palette.png", palette(transparent=False), RED, 0),
    ("clear-palette.png", palette(transparent=True), (255, 255, 255), 0),
    ("palette.gif", palette(transparent=False), RED, 0),
    ("rgb.bmp", Image.new("RGB", (SIZE, SIZE), RED), RED, 0),
    ("rgb.tif", Image.new("RGB", (SIZE, SIZE), RED), RED, 0),
    # JPEG stores brightness and colour, each rounded: 3 levels.
    ("rgb.jpg", Image.new("RGB", (SIZE, SIZE), RED), RED, 3),
    # CMYK (0, 255, 255, 0) is full red ink: magenta and yellow.
    ("cmyk.jpg", Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), (255, 0, 0), 3),
    ("cmyk.tiff", Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), (255, 0, 0), 0),
    ("clear.webp", rgba(0), (255, 255, 255), 0),
]


@pytest.mark.parametrize(("name", "image", "colour", "tolerance"), CASES, ids=[case[0] for case in CASES])
def test_modes(tmp_path: Path, name: str, image: Image.Image, colour: tuple, tolerance: int) -> None:
    """Each mode and format comes out as the colour that was meant, over white."""
    image.save(tmp_path / name)
    pixels = load_image(tmp_path / name, size=SIZE)
    assert pixels.shape == (3, SIZE, SIZE) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.array(colour)[:, None, None]).max() <= tolerance
    grey = load_image(tmp_path / name, size=SIZE, channels=1)
    assert grey.shape == (1, SIZE, SIZE)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    """An animated gif counts as its first frame."""
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif", size=SIZE)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    """However the camera was held, the white corner lies at the top left."""
    upright = Image.new("L", (SIZE, SIZE))
    upright.paste(255, (0, 0, SIZE // 2, SIZE // 2))
    # What a camera stores so that applying the orientation gives the upright picture.
    stored_by = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(stored_by[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", size=SIZE, channels=1)[0], np.asarray(upright))


@pytest.mark.parametrize("shape", [(16, 16), (40, 20), (20, 41), (7, 90), (200, 133), (3, 3)])
def test_center_square(shape: tuple[int, int]) -> None:
    """Any shape becomes the square; what is cut away is the ends, alike on both sides."""
    width, height = shape
    x = np.linspace(-1, 1, width)[None, :] if width >= height else np.linspace(-1, 1, height)[:, None]
    ramp = np.broadcast_to(np.rint(127.5 + 127 * x), (height, width)).astype(np.uint8)
    square = np.asarray(center_square(Image.fromarray(ramp), SIZE)).astype(float)
    assert square.shape == (SIZE, SIZE)
    # The middle of an odd ramp stays the middle; one pixel of asymmetry where the parities differ.
    step = 255 / max(shape) * min(shape) / SIZE
    assert abs(square.mean() - 127.5) <= step + 1


def test_shrinking_is_antialiased() -> None:
    """A one-pixel chequerboard becomes its mean, not one of its colours."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(np.asarray(center_square(Image.fromarray(board), 32)).astype(int) - 127).max() <= 1
    small = resize_array(board[None, None], 32)
    # The bicubic window of 32 pixels weighs even and odd ones equally to within 2 of 255 levels.
    assert np.abs(small.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "float"])
def test_refuses_what_is_no_image(tmp_path: Path, damage: str) -> None:
    """Damaged files are named, whatever the decoder raised."""
    path = tmp_path / "bad.png"
    if damage == "float":
        path = tmp_path / "bad.tiff"
        Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(path)
    else:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"no image at all"}[damage])
    with pytest.raises(OrnsteinError, match=r"bad\.") as caught:
        load_image(path, size=SIZE)
    assert len(str(caught.value)) > len(str(path)) + 5
