"""The codec contract, and the codec that changes nothing."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError

Size = int | tuple[int, int]


class Codec(nn.Module, ABC):
    """Data in [-1, 1] -> the space being diffused, and back.

    Attributes:
        channels, size: shape of what is diffused, (channels, size, size) or (channels, \\*size).
        sigma_data: its standard deviation.
        stochastic: whether ``encode`` draws; the same image then has a new code each time.
        decode_range: the interval in which decoded values are meant to lie. ``decode`` itself does not
            clamp, so that gradients survive; whoever makes pixels of them does.
        downsample: how many pixels a side of the image has for one of a latent.
        any_size: whether images and latents of other sides than ``size`` are taken too, as far as they divide; who
            serves several shapes sets it.
    """

    channels: int
    size: Size
    sigma_data: float
    stochastic: bool
    decode_range: tuple[float, float]
    downsample: int = 1
    any_size: bool = False

    @abstractmethod
    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> z (B, channels, \\*size)."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Latents z (B, channels, \\*size) -> images (B, C, H, W), about in ``decode_range``."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (channels, h, w) of what is diffused for images of that many pixels.

        Raises: OrnsteinError for sides that do not divide.
        """
        if height % self.downsample or width % self.downsample:
            fit = ",".join(str(max(1, round(side / self.downsample)) * self.downsample) for side in (height, width))
            raise OrnsteinError(
                f"this codec shrinks images by {self.downsample}, which does not divide {height}x{width}: choose "
                f"[{fit}], say."
            )
        return (self.channels, height // self.downsample, width // self.downsample)

    def check_images(self, x: Tensor, channels: int, size: Size, *, what: str) -> None:
        """Raise an OrnsteinError unless x is (B, channels, \\*size), or of sides that divide with ``any_size``."""
        check_shape(x, channels, size, what=what, factor=self.downsample if self.any_size else None)

    def check_latents(self, z: Tensor, *, what: str) -> None:
        """Raise an OrnsteinError unless z is (B, channels, \\*size), or of any sides with ``any_size``."""
        check_shape(z, self.channels, self.size, what=what, factor=1 if self.any_size else None)

    @property
    def config(self) -> dict[str, Any]:
        """What decides beside the weights what is encoded and decoded, as plain JSON types."""
        return {}

    def encoding(self) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """What decides an image's latent up to scale, shift and draws: plain JSON types, and every weight."""
        weights = {name: value for name, value in self.state_dict().items() if name not in ("scale", "shift")}
        return self.config, weights

    @property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) over the class's name and ``encoding``.

        Scale and shift (buffers, to be compared as they are) and ``stochastic`` are no part of it.
        """
        config, weights = self.encoding()
        digest = hashlib.sha256(json.dumps([type(self).__name__, config], sort_keys=True).encode())
        for name, value in sorted(weights.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class Identity(Codec):
    """Diffuse the data themselves: z = x.

    Args:
        channels: channels of the images.
        size: their side, or (height, width).
        sigma_data: their standard deviation in [-1, 1], positive.

    Raises: ValueError for a sigma_data that is not positive, and for tensors of another shape.
    """

    def __init__(self, channels: int, size: int | Sequence[int], *, sigma_data: float) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise OrnsteinError(f"sigma_data is a standard deviation and must be positive, not {sigma_data!r}.")
        self.channels = int(channels)
        self.size = as_size(size)
        self.sigma_data = float(sigma_data)
        self.stochastic = False
        self.decode_range = (-1.0, 1.0)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images themselves; ``generator`` is not used."""
        self.check_images(x, self.channels, self.size, what="the images")
        return x

    def decode(self, z: Tensor) -> Tensor:
        """The samples themselves."""
        self.check_latents(z, what="the samples")
        return z

    @property
    def config(self) -> dict[str, Any]:
        """Its constructor's arguments."""
        return {"channels": self.channels, "size": self.size, "sigma_data": self.sigma_data}

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"channels={self.channels}, size={self.size}, sigma_data={self.sigma_data}"


def as_size(size: int | Sequence[int]) -> Size:
    """An int for squares, (height, width) otherwise. Raises ValueError for anything but positive sides."""
    sides = (size, size) if isinstance(size, int) else tuple(int(side) for side in size)
    if len(sides) != 2 or min(sides) < 1:
        raise OrnsteinError(f"an image size is one positive side or (height, width), not {size!r}.")
    return sides[0] if sides[0] == sides[1] else sides


def sides_of(size: Size) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else size


def check_shape(x: Tensor, channels: int, size: Size, *, what: str, factor: int | None = None) -> None:
    """Raise a ValueError unless x is (B, channels, \\*size), or with ``factor`` of any sides that it divides."""
    expected = (channels, *sides_of(size))
    if factor is not None and x.ndim == 4 and x.shape[1] == channels:
        if x.shape[2] % factor == 0 and x.shape[3] % factor == 0:
            return
        raise OrnsteinError(
            f"this codec takes {what} whose sides are multiples of {factor} but got {tuple(x.shape)}; choose another "
            "size, or data.buckets."
        )
    if x.ndim != 4 or tuple(x.shape[1:]) != expected:
        raise OrnsteinError(
            f"this codec takes {what} as (B, {', '.join(map(str, expected))}) but got {tuple(x.shape)}; "
            "check data.image_size, data.channels and codec."
        )
