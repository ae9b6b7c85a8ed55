"""Files into uint8 images, and uint8 images into other sizes. Pillow and torch only."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional

from ornstein.errors import OrnsteinError

MODES = {1: "L", 3: "RGB"}


def load_image(path: Path, *, size: int, channels: int = 3) -> np.ndarray:
    """Decode a file, lay it on white where it is transparent, crop its centre square, resize it.

    The first frame of an animation; EXIF orientation applied; 16 bits a channel reduced to 8; colour profiles
    ignored. Returns uint8 (channels, size, size).

    Raises:
        OrnsteinError: the file is empty, truncated, not an image, or has pixels without a set range.
    """
    try:
        if path.stat().st_size == 0:
            raise OrnsteinError("the file is empty")
        with Image.open(path) as opened:
            opened.load()
            image = center_square(_opaque(ImageOps.exif_transpose(opened), channels), size)
    # Pillow's decoders raise nearly anything on damaged input: SyntaxError and struct.error among them.
    except Exception as error:
        raise OrnsteinError(f"{path}: {str(error) or type(error).__name__}") from error
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _opaque(image: Image.Image, channels: int) -> Image.Image:
    """Any mode to "L" or "RGB" at 8 bits, transparency laid on white."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise OrnsteinError("its 32-bit pixels have no set range: save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        # 65535 maps to 255 and every 8-bit grey v, stored as 257 v, comes back as v.
        deep = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((deep + 128) // 257).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return image.convert("RGB").convert(MODES[channels])


def center_square(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an image at `size` x `size` pixels, antialiased.

    Halved by box filter while it stays at least twice as large, then brought to size by bicubic, then
    cropped: the preparation of Dhariwal and Nichol 2021 (arXiv 2105.05233), which published figures at
    64 to 512 pixels share.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


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
