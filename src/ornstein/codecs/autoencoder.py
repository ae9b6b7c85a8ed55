"""What the convolutional autoencoders have in common: their shapes, their latents' scale, their measures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ornstein.codecs.codec import as_size, sides_of
from ornstein.codecs.layers import Decoder, Encoder
from ornstein.codecs.scaled import ScaledCodec, channel_moments
from ornstein.errors import OrnsteinError


@dataclass(frozen=True)
class Coded:
    """What training needs of one pass through an autoencoder.

    Attributes:
        images: reconstructions, (B, C, H, W).
        terms: what is added to the loss beside the reconstruction, by name; each (B,), per image.
        facts: scalars to log that the loss does not hold.
    """

    images: Tensor
    terms: dict[str, Tensor]
    facts: dict[str, Tensor]


class Autoencoder(ScaledCodec):
    r"""An encoder and a decoder with unscaled latents h between them; what is diffused is z = (h - shift) * scale.

    ``shift`` and ``scale`` (1, channels, 1, 1) are measured once on training data (:meth:`measure`), so that z has unit
    variance a channel, and are stored with the weights.

    Args:
        image_channels: channels of the images.
        image_size: their side or (height, width); ``2 ** (len(multipliers) - 1)`` must divide it.
        channels: latent channels.
        width: channels at full resolution; ``width * multipliers[i]`` after i halvings, each divisible by ``groups``.
        multipliers: one entry a resolution, so ``(1, 2, 2)`` shrinks the side by 4.
        blocks: residual blocks a resolution in the encoder; the decoder has one more.
        groups: of every GroupNorm.
        attention: self-attention at the lowest resolution.
        encoded: channels that the encoder puts out.
        decoded: channels that the decoder takes in.

    Raises: OrnsteinError for sizes that do not divide.
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int | Sequence[int],
        *,
        channels: int,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        groups: int,
        attention: bool,
        encoded: int,
        decoded: int,
    ) -> None:
        super().__init__()
        widths = [int(width) * int(multiplier) for multiplier in multipliers]
        if not widths or groups < 1 or any(w < 1 or w % groups for w in widths):
            raise OrnsteinError(
                f"every width of the autoencoder ({widths}) must be a positive multiple of groups={groups}."
            )
        if channels < 1 or blocks < 1:
            raise OrnsteinError(f"an autoencoder needs channels={channels} and blocks={blocks} of at least 1.")
        self.image_size = as_size(image_size)
        self.image_channels = int(image_channels)
        self.downsample = 2 ** (len(widths) - 1)
        height, breadth = sides_of(self.image_size)
        if height % self.downsample or breadth % self.downsample:
            raise OrnsteinError(
                f"the autoencoder shrinks images by {self.downsample}, which does not divide {height}x{breadth}; "
                f"choose data.image_size as a multiple of {self.downsample}."
            )
        self.channels = int(channels)
        self.size = as_size((height // self.downsample, breadth // self.downsample))
        self.sigma_data = 1.0
        self.stochastic = False
        self.decode_range = (-1.0, 1.0)
        self._config: dict[str, Any] = {
            "image_channels": self.image_channels,
            "image_size": self.image_size,
            "channels": self.channels,
            "width": int(width),
            "multipliers": [int(m) for m in multipliers],
            "blocks": int(blocks),
            "groups": int(groups),
            "attention": bool(attention),
        }
        shape: dict[str, Any] = {"blocks": blocks, "groups": groups, "attention": attention}
        self.encoder = Encoder(self.image_channels, widths, encoded, **shape)
        self.decoder = Decoder(decoded, widths, self.image_channels, **shape)
        self.register_buffer("scale", torch.ones(1, self.channels, 1, 1))
        self.register_buffer("shift", torch.zeros(1, self.channels, 1, 1))

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments that give the same architecture, as plain JSON types."""
        return dict(self._config)

    @property
    def last_layer(self) -> Tensor:
        """The weights that put out the image: where an adversarial loss is weighed against the others."""
        return self.decoder.out.weight

    @abstractmethod
    def code(self, x: Tensor, generator: torch.Generator | None = None) -> Coded:
        """One pass for training: images (B, C, H, W) in [-1, 1] to what they become, and what that costs."""

    @torch.no_grad()
    def set_scale(self, h: Tensor) -> None:
        """Choose ``shift`` and ``scale`` so that each channel of h gets mean 0 and variance 1.

        h are unscaled latents, (N, channels, \\*size), of the training images.

        Raises: OrnsteinError if a channel carries nothing (its scale would blow up noise).
        """
        self.check_latents(h, what="latents")
        self.set_moments(*channel_moments([h]))
