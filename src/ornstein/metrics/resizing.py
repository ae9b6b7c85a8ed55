"""Images brought to the size that a network takes, as Pillow does it."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 ``(B, C, H, W)`` to float32 ``(B, C, *size)`` in [0, 255]: Pillow's antialiased bicubic, not rounded.

    On the images' device and in float64: in float32 torch places the kernel a hundredth of a grey level off.
    """
    if images.shape[-2:] == torch.Size(size):
        return images.float()
    pixels = images.cpu() if images.device.type == "mps" else images  # which has no float64
    resized = F.interpolate(pixels.double(), size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255).float().to(images.device)


def pillow_bicubic(images: Tensor, size: int) -> Tensor:
    """uint8 ``(B, 3, H, W)`` to uint8 ``(B, 3, size, size)``: Pillow's own resize of 8-bit pictures, on the CPU.

    It rounds between its two passes, as the published figures of DINOv2 and CLIP features do.
    """
    from PIL import Image

    if images.shape[-2:] == (size, size):
        return images
    pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images.cpu()]
    resized = [np.array(picture.resize((size, size), Image.Resampling.BICUBIC)) for picture in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device)


def centre_square(images: Tensor) -> Tensor:
    """The largest square in the middle of ``images (..., H, W)``."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(pixels / 255 - mean) / std``, channel by channel: ``pixels (B, 3, H, W)`` in [0, 255]."""
    shift, scale = (pixels.new_tensor(list(values)).view(3, 1, 1) for values in (mean, std))
    return (pixels / 255 - shift) / scale
