"""Files into uint8 images, and uint8 images into other sizes. Pillow and torch only."""

import stat
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.nn import functional

from ornstein.data.bad import BadImage
from ornstein.data.options import CROPS, Crop
from ornstein.errors import OrnsteinError

MODES = {1: "L", 3: "RGB"}
WIDE = 0.75
# Orientations that turn the picture on its side.
SIDEWAYS = (5, 6, 7, 8)


def load_image(
    source: Path | bytes,
    *,
    size: int | tuple[int, int] | None,
    channels: int = 3,
    crop: Crop = "adm",
    name: str = "",
) -> np.ndarray:
    """Decode an image, lay it on white where it is transparent, crop it, resize it.

    The first frame of an animation; EXIF orientation applied (which the tools that `adm` and `edm` follow do not do);
    16 bits a channel reduced to 8; CMYK, palettes and single bits turned into colours; colour profiles ignored.

    Args:
        source: a file, or the bytes of one.
        size: side of the square, (height, width), or None for the image's own size.
        channels: 3 (RGB) or 1 (grey).
        crop: how it comes to that size, see `fit`; no matter where `size` is None.
        name: what messages call it; default: the path.

    Returns uint8 (channels, height, width).

    Raises:
        BadImage: an OrnsteinError: it is empty, truncated, no image, has more pixels than Pillow trusts, pixels
            without a set range, or no size that the crop can use.
    """
    name = name or ("image" if isinstance(source, bytes) else str(source))
    try:
        with Image.open(_opened(source)) as opened:
            _check_area(opened)
            opened.load()
            flat = _opaque(_upright(opened), channels)
        image = flat if size is None else fit(flat, size if isinstance(size, tuple) else (size, size), crop)
    # Pillow's decoders raise nearly anything on damaged input: SyntaxError and struct.error among them.
    except Exception as error:
        reason = _reason(error)
        raise BadImage(f"{name}: {reason}", name=name, reason=reason) from error
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_size(source: Path | bytes, *, name: str = "") -> tuple[int, int]:
    """(height, width) as `load_image` with `size=None` would give it, from the file's head alone.

    Raises:
        BadImage: it is empty, no image, or too large; damage further on is not seen.
    """
    name = name or ("image" if isinstance(source, bytes) else str(source))
    try:
        with Image.open(_opened(source)) as opened:
            _check_area(opened)
            width, height = opened.size
            # Pillow would decode a whole PNG to look for an orientation behind its pixels, where hardly any has one.
            told = opened.format != "PNG" or {"exif", "Raw profile type exif"} & set(opened.info)
            return (width, height) if told and _orientation(opened) in SIDEWAYS else (height, width)
    except Exception as error:
        reason = _reason(error)
        raise BadImage(f"{name}: {reason}", name=name, reason=reason) from error


def _opened(source: Path | bytes) -> Path | BytesIO:
    """What Pillow opens; refuses what is empty, or would keep a reader waiting for ever."""
    if isinstance(source, bytes):
        if not source:
            raise OrnsteinError("the file is empty")
        return BytesIO(source)
    status = source.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OrnsteinError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no regular file")
    if status.st_size == 0:
        raise OrnsteinError("the file is empty")
    return source


def _check_area(image: Image.Image) -> None:
    """Refuse what Pillow would only warn of: a small file may unpack to more pixels than memory holds."""
    if min(image.size) < 1:
        raise OrnsteinError("it has no pixels")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise OrnsteinError(f"its {image.width} x {image.height} pixels are more than the {limit:,} that are read")


def _reason(error: Exception) -> str:
    """What went wrong, without the file's name, which stands before it."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, too many to be read"
    if isinstance(error, FileNotFoundError):
        return "there is no such file, or it is a broken link"
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return told or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return 1


def _upright(image: Image.Image) -> Image.Image:
    """The image as the camera was held; itself where the camera does not say, or says nothing readable."""
    return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image


def _opaque(image: Image.Image, channels: int) -> Image.Image:
    """Any mode to "L" or "RGB" at 8 bits, transparency laid on white."""
    if image.mode in ("F", "I"):
        raise OrnsteinError("its 32-bit pixels have no set range: save it with 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):
        # 65535 maps to 255 and every 8-bit grey v, stored as 257 v, comes back as v.
        deep = np.asarray(image).astype(np.uint32)
        grey = ((deep + 128) // 257).clip(0, 255)
        if "transparency" in image.info:
            grey[deep == image.info["transparency"]] = 255
        image = Image.fromarray(grey.astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return image.convert("RGB").convert(MODES[channels])


def fit(image: Image.Image, size: tuple[int, int], crop: Crop) -> Image.Image:
    """An 8-bit image at (height, width), as one of these prepares it:

    - "adm": Dhariwal and Nichol 2021 (arXiv 2105.05233): halved by box filter while it stays at least twice as
      large, brought to size by bicubic, then the centre cut out. EDM2's tool calls it center-crop-dhariwal.
    - "edm": the data set tool of StyleGAN and EDM (Karras et al. 2022, arXiv 2206.00364), center-crop: the centre
      cut out first, then brought to size by Lanczos.
    - "edm_wide": that tool's center-crop-wide at a resolution of side x 3/4 side, LSUN cars' 512x384: the picture
      between black bars, square. It keeps round(side * height / width) rows of the file, counted at the size that
      it makes and not at the file's, so a picture larger than that comes out stretched; that is how it was published.
    - "stretch": bicubic to that size whatever its shape. "none": as it is, which must be that size.

    All antialiased. Sizes that are not square cut out the largest centre of that shape.

    Raises:
        OrnsteinError: "none" and another size; "edm_wide" and a picture smaller than what it makes (that tool leaves
            it out), or a size that is not square.
    """
    height, width = size
    if crop == "adm":
        return _halved(image, size)
    if crop == "edm":
        rows = min(image.height, round(image.width * height / width))
        columns = min(image.width, round(image.height * width / height))
        return _center(image, (max(rows, 1), max(columns, 1))).resize((width, height), Image.Resampling.LANCZOS)
    if crop == "edm_wide":
        return _wide(image, size)
    if crop == "stretch":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    if image.size != (width, height):
        raise OrnsteinError(f"it is {image.height} x {image.width} and data.crop=none takes {height} x {width} alone")
    return image


def center_square(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an image at `size` x `size` pixels, antialiased: "adm" of `fit`."""
    return _halved(image, (size, size))


def _center(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """The centre (rows, columns) of an image, the odd pixel cut at the far end."""
    rows, columns = shape
    left, top = (image.width - columns) // 2, (image.height - rows) // 2
    return image.crop((left, top, left + columns, top + rows))


def _halved(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Box halvings, bicubic, centre."""
    height, width = size
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    across, down = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if image.size != (across, down):
        image = image.resize((across, down), Image.Resampling.BICUBIC)
    return _center(image, size)


def _wide(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Rows from the middle, Lanczos, black above and below."""
    height, width = size
    if height != width:
        raise OrnsteinError(f"data.crop=edm_wide makes squares and {height} x {width} is none: take another crop")
    inner = round(WIDE * width)
    rows = round(width * image.height / image.width)
    if image.width < width or rows < inner:
        raise OrnsteinError(
            f"it is {image.height} x {image.width}: too small or too wide for the {inner} x {width} pixels that "
            "data.crop=edm_wide makes of it"
        )
    strip = _center(image, (rows, image.width)).resize((width, inner), Image.Resampling.LANCZOS)
    canvas = Image.new(image.mode, (width, width))
    canvas.paste(strip, (0, (width - inner) // 2))
    return canvas


def resize_array(images: np.ndarray, size: int) -> np.ndarray:
    """Square uint8 images (N, C, H, H) to (N, C, size, size): bicubic, antialiased on the way down."""
    if images.shape[-1] == size:
        return images
    resized = np.empty((*images.shape[:2], size, size), dtype=np.uint8)
    for start in range(0, len(images), 4096):
        block = torch.from_numpy(images[start : start + 4096]).float()
        block = functional.interpolate(block, size=(size, size), mode="bicubic", antialias=True)
        resized[start : start + 4096] = block.round_().clamp_(0, 255).to(torch.uint8).numpy()
    return resized


def to_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Grey images (N, 1, H, W) as they are for 1 channel, as a view with equal channels for 3."""
    check_channels(channels)
    return np.broadcast_to(images, (len(images), channels, *images.shape[2:]))


def check_size(size: int, *, name: str) -> None:
    """Refuse an image size that is no positive integer."""
    if size < 1:
        raise OrnsteinError(f"data.image_size={size} for {name}: give a positive number of pixels")


def check_channels(channels: int, *, key: str = "channels") -> None:
    """Refuse a channel count other than grey's or RGB's; `key` is its name in the data config."""
    if channels not in MODES:
        raise OrnsteinError(f"data.{key}={channels}: images are read as 1 (grey) or 3 (RGB) channels")


def checked_crop(crop: str) -> Crop:
    """`crop` itself, or an error that names what there is."""
    for known in CROPS:
        if crop == known:
            return known
    raise OrnsteinError(f"data.crop={crop} does not exist: choose one of {', '.join(CROPS)}")
