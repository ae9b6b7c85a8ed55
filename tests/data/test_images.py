"""Decoding every kind of file that turns up in a folder of images."""

import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ornstein.data.bad import BadImage
from ornstein.data.images import CROPS, center_square, load_image, read_size, resize_array

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


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(pixels: np.ndarray, colour: int, *, extra: bytes = b"", shape: tuple[int, int] | None = None) -> bytes:
    """A PNG file of uint8 or uint16 (H, W, C), by hand: Pillow writes neither 16-bit colours nor wrong heads."""
    deep = pixels.dtype == np.uint16
    height, width = shape or pixels.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 16 if deep else 8, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2" if deep else np.uint8).tobytes() for row in pixels)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep_png(values: tuple[int, ...], colour: int, *, extra: bytes = b"") -> bytes:
    """One 16-bit colour: 257 times what 8 bits would say."""
    return png(np.full((SIZE, SIZE, len(values)), [257 * value for value in values], np.uint16), colour, extra=extra)


def clear_grey(value: int) -> bytes:
    """The chunk that makes one grey of 16 bits transparent."""
    return chunk(b"tRNS", struct.pack(">H", value))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    """The bytes of an image file."""
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def animation(form: str) -> bytes:
    """Two frames, the first of them red."""
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    return saved(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)


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


# File by file where Pillow cannot write what a test needs. Colours of 16 bits keep their high byte.
WHOLE_FILES: list[tuple[str, Callable[[], bytes], tuple[int, ...], int]] = [
    ("deep-rgb.png", lambda: deep_png(RED, 2), RED, 0),
    ("deep-rgba.png", lambda: deep_png((*RED, 0), 6), (255, 255, 255), 0),
    ("deep-grey-alpha.png", lambda: deep_png((GREY, 255), 4), (GREY,) * 3, 0),
    (
        "deep-clear.png",
        lambda: deep_png((GREY,), 0, extra=chunk(b"tRNS", struct.pack(">H", 257 * GREY))),
        (255,) * 3,
        0,
    ),
    ("deep-other.png", lambda: deep_png((GREY,), 0, extra=chunk(b"tRNS", struct.pack(">H", 5))), (GREY,) * 3, 0),
    ("key-colour.png", lambda: saved(Image.new("RGB", (SIZE, SIZE), RED), "PNG", transparency=RED), (255,) * 3, 0),
    ("alphas.png", lambda: saved(palette(transparent=False), "PNG", transparency=bytes([255, 128])), HALF, 1),
    ("big-endian.tiff", lambda: big_endian(257 * GREY), (GREY,) * 3, 0),
    ("animated.gif", lambda: animation("GIF"), (255, 0, 0), 0),
    ("animated.webp", lambda: animation("WEBP"), (255, 0, 0), 0),
    ("animated.png", lambda: animation("PNG"), (255, 0, 0), 0),
    ("pages.tiff", lambda: animation("TIFF"), (255, 0, 0), 0),
    ("really-a-jpeg.png", lambda: saved(Image.new("RGB", (SIZE, SIZE), RED), "JPEG"), RED, 3),
    ("really-a-png.jpg", lambda: saved(Image.new("RGB", (SIZE, SIZE), RED), "PNG"), RED, 0),
    ("broken-exif.png", lambda: saved(Image.new("RGB", (SIZE, SIZE), RED), "PNG", exif=b"Exif\0\0garbage"), RED, 0),
    ("odd-exif.jpg", lambda: saved(Image.new("RGB", (SIZE, SIZE), RED), "JPEG", exif=orientation_of(77)), RED, 3),
]


def big_endian(value: int) -> bytes:
    """A 16-bit grey TIFF of the other byte order, which Pillow reads as "I;16B"."""
    pixels = np.full((SIZE, SIZE), value, dtype=">u2").tobytes()
    tags = [(256, 3, SIZE), (257, 3, SIZE), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 3, SIZE)]
    tags.append((279, 4, len(pixels)))
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", count, 0) if kind == 3 else struct.pack(">I", count))
        for tag, kind, count in tags
    )
    directory = struct.pack(">H", len(tags)) + entries + struct.pack(">I", 0)
    return b"MM\0*" + struct.pack(">I", 8 + len(pixels)) + pixels + directory


def orientation_of(value: int) -> bytes:
    """EXIF with that orientation."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


@pytest.mark.parametrize(("name", "content", "colour", "tolerance"), WHOLE_FILES, ids=[row[0] for row in WHOLE_FILES])
def test_files(tmp_path: Path, name: str, content: Callable[[], bytes], colour: tuple, tolerance: int) -> None:
    """A file and its bytes come out alike, as the colour that was meant; the first frame of several."""
    (tmp_path / name).write_bytes(content())
    pixels = load_image(tmp_path / name, size=SIZE)
    assert np.abs(pixels.astype(int) - np.array(colour)[:, None, None]).max() <= tolerance
    np.testing.assert_array_equal(load_image(content(), size=SIZE), pixels)
    assert read_size(tmp_path / name) == (SIZE, SIZE)


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


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_own_size_is_that_of_the_upright_picture(orientation: int) -> None:
    """Of the head alone and of the decoded image; nothing is cropped."""
    content = saved(Image.new("RGB", (20, 12), RED), "JPEG", exif=orientation_of(orientation))
    expected = (20, 12) if orientation in (6, 8) else (12, 20)
    assert read_size(content) == expected
    for crop in CROPS:
        assert load_image(content, size=None, crop=crop).shape == (3, *expected)


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


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
ONE = np.zeros((1, 1, 3), dtype=np.uint8)
# What is no image that can be used, and a word of the reason.
DAMAGED: list[tuple[str, Callable[[], bytes], str]] = [
    ("empty.png", lambda: b"", "empty"),
    ("cut.png", lambda: saved(NOISE, "PNG")[:6000], "truncated"),
    ("cut.jpg", lambda: saved(NOISE, "JPEG")[:1500], "truncated"),
    ("cut.webp", lambda: saved(NOISE, "WEBP", lossless=True)[:3000], ""),
    ("cut.gif", lambda: saved(NOISE, "GIF")[:2000], "truncated"),
    ("head-only.png", lambda: saved(NOISE, "PNG")[:40], ""),
    ("text.png", lambda: b"no image at all", "no image of a known format"),
    ("float.tiff", lambda: saved(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"), "32-bit"),
    ("int.tiff", lambda: saved(Image.fromarray(np.ones((4, 4), dtype=np.int32)), "TIFF"), "32-bit"),
    ("no-width.png", lambda: png(ONE, 2, shape=(1, 0)), ""),
    # Just above Pillow's limit it would only warn, at twice the limit it refuses by itself.
    ("huge.png", lambda: png(ONE, 2, shape=(9000, 10_000)), "pixels"),
    ("bomb.png", lambda: png(ONE, 2, shape=(60_000, 60_000)), "pixels"),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("name", "content", "word"), DAMAGED, ids=[row[0] for row in DAMAGED])
def test_refuses_what_is_no_image(tmp_path: Path, name: str, content: Callable[[], bytes], word: str) -> None:
    """Damaged files are named, with a reason, whatever the decoder raised; bytes by the name that is given."""
    path = tmp_path / name
    path.write_bytes(content())
    for source, called in ((path, str(path)), (content(), "member 7")):
        with pytest.raises(BadImage) as caught:
            load_image(source, size=SIZE, name="" if source is path else called)
        error = caught.value
        assert (error.name, str(error)) == (called, f"{called}: {error.reason}")
        assert word in error.reason and len(error.reason) > 5 and str(tmp_path) not in error.reason


def place_folder(path: Path) -> None:
    path.mkdir()


def place_broken_link(path: Path) -> None:
    path.symlink_to("nowhere.png")


def place_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("place", "word"), [(place_folder, "folder"), (place_broken_link, "broken link"), (place_pipe, "regular file")]
)
def test_refuses_what_is_no_file(tmp_path: Path, place: Callable[[Path], None], word: str) -> None:
    """Named at once; a pipe would be waited on for ever."""
    place(tmp_path / "x.png")
    for read in (read_size, lambda path: load_image(path, size=SIZE)):
        with pytest.raises(BadImage, match=rf"x\.png: .*{word}"):
            read(tmp_path / "x.png")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own words; the tests may run as one who may read everything."""
    NOISE.save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    if os.geteuid() == 0:

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", str(tmp_path / "x.png"))

        monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(BadImage, match=r"x\.png: Permission denied$"):
        load_image(tmp_path / "x.png", size=SIZE)
