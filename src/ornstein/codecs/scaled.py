"""Codecs with latents of their own scale, brought to unit variance a channel."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from ornstein.codecs.codec import Codec
from ornstein.errors import OrnsteinError


class ScaledCodec(Codec):
    """A codec whose unscaled latents h become z = (h - shift) * scale; both (1, channels, 1, 1), stored with it."""

    scale: Tensor
    shift: Tensor

    @abstractmethod
    def latents(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> unscaled latents h (B, channels, \\*size), nothing drawn."""

    @abstractmethod
    def reconstruct(self, h: Tensor) -> Tensor:
        """Unscaled latents h (B, channels, \\*size) -> images (B, C, H, W)."""

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> z (B, channels, \\*size)."""
        return (self.latents(x) - self.shift) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Latents z (B, channels, \\*size) -> images (B, C, H, W), about in [-1, 1]; differentiable."""
        return self.reconstruct(z / self.scale + self.shift)

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> None:
        """Choose ``shift`` and ``scale`` so that each channel of z has mean 0 and variance 1 over all of these images.

        ``batches``: images (B, C, H, W) in [-1, 1], on this codec's device; nothing is drawn.

        Raises: OrnsteinError if a channel carries nothing, or there are no images.
        """
        self.set_moments(*channel_moments(self.latents(x) for x in batches))

    @torch.no_grad()
    def set_moments(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation of the unscaled latents, (1, channels, 1, 1) each.

        Raises: OrnsteinError if a channel carries nothing (its scale would blow up noise).
        """
        if not bool((std >= 1e-3).all()):
            raise OrnsteinError(
                f"a latent channel carries nothing (standard deviations {std.flatten().tolist()}): lower "
                "model.loss.kl_weight, use fewer latent channels or train longer."
            )
        self.shift.copy_(mean)
        self.scale.copy_(1.0 / std)


def channel_moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, C, 1, 1), float64, over all positions of all (B, C, H, W), a batch at a time.

    Raises: OrnsteinError if there is nothing.
    """
    origin: Tensor | None = None
    sums: list[Tensor] = []  # (2, 1, C, 1, 1): of values and of their squares
    count = 0
    for batch in batches:
        # About a first guess of the mean, so that a large mean costs no digits.
        origin = batch.double().mean(dim=(0, 2, 3), keepdim=True) if origin is None else origin
        centred = batch.double() - origin
        both = torch.stack([each.sum(dim=(0, 2, 3), keepdim=True) for each in (centred, centred.square())])
        sums = [sums[0] + both] if sums else [both]
        count += batch.numel() // batch.shape[1]
    if origin is None:
        raise OrnsteinError("there are no images to measure latents of.")
    mean, square = sums[0] / count
    return origin + mean, (square - mean.square()).clamp(min=0).sqrt()
