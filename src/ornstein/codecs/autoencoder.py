"""A convolutional autoencoder with a Gaussian posterior: the first stage of latent diffusion."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ornstein.codecs.codec import Codec, as_size, check_shape, sides_of
from ornstein.codecs.posterior import DiagonalGaussian
from ornstein.errors import OrnsteinError


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # A block that starts as the identity keeps the deep stack trainable from the first step.
        nn.init.zeros_(self.conv2.weight)
        self.skip: nn.Module = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Single-head self-attention over positions, residual, (B, C, H, W) -> the same."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # each (B, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(1, 2).reshape(x.shape))


def _middle(channels: int, *, groups: int, attention: bool) -> nn.Sequential:
    parts: list[nn.Module] = [ResidualBlock(channels, channels, groups=groups)]
    if attention:
        parts += [Attention(channels, groups=groups), ResidualBlock(channels, channels, groups=groups)]
    return nn.Sequential(*parts)


def _encoder(
    image_channels: int,
    widths: Sequence[int],
    out_channels: int,
    *,
    blocks: int,
    groups: int,
    attention: bool,
) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 3, padding=1)]
    width = widths[0]
    for level, next_width in enumerate(widths):
        for _ in range(blocks):
            parts.append(ResidualBlock(width, next_width, groups=groups))
            width = next_width
        if level < len(widths) - 1:
            parts.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
    parts += [_middle(width, groups=groups, attention=attention), nn.GroupNorm(groups, width), nn.SiLU()]
    return nn.Sequential(*parts, nn.Conv2d(width, out_channels, 3, padding=1))


def _decoder(
    in_channels: int, widths: Sequence[int], image_channels: int, *, blocks: int, groups: int, attention: bool
) -> nn.Sequential:
    width = widths[-1]
    parts: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1)]
    parts.append(_middle(width, groups=groups, attention=attention))
    for level, next_width in reversed(list(enumerate(widths))):
        for _ in range(blocks):
            parts.append(ResidualBlock(width, next_width, groups=groups))
            width = next_width
        if level > 0:
            parts += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, width, 3, padding=1)]
    parts += [nn.GroupNorm(groups, width), nn.SiLU()]
    return nn.Sequential(*parts, nn.Conv2d(width, image_channels, 3, padding=1))


class KLAutoencoder(Codec):
    r"""Variational autoencoder whose scaled latents have unit variance a channel.

    The encoder gives q(h | x) (:class:`DiagonalGaussian`); what is diffused is ``z = (h - shift) * scale``,
    with ``shift`` and ``scale`` (1, channels, 1, 1) measured once on training data (:meth:`set_scale`) and
    stored with the weights. Residual blocks of GroupNorm and SiLU, strided convolutions down,
    nearest-neighbour and a convolution up, one self-attention in the middle.

    Sources: Kingma & Welling 2014 (arXiv 1312.6114); encoder and decoder after Esser et al. 2021 (arXiv
        2012.09841), table 7; the scaling after Rombach et al. 2022 (arXiv 2112.10752), appendix G.

    Args:
        image_channels: channels of the images.
        image_size: their side or (height, width); ``2 ** (len(multipliers) - 1)`` must divide it.
        channels: latent channels.
        width: channels at full resolution; ``width * multipliers[i]`` after i halvings, each divisible by
            ``groups``.
        multipliers: one entry a resolution, so ``(1, 2, 2)`` shrinks the side by 4.
        blocks: residual blocks a resolution, on either side.
        groups: groups of every GroupNorm.
        attention: self-attention at the lowest resolution.
        sample_posterior: ``encode`` draws from the posterior instead of taking its mean.

    Raises: ValueError for sizes that do not divide.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        image_channels: int,
        image_size: int | Sequence[int],
        *,
        channels: int = 4,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 1,
        groups: int = 8,
        attention: bool = True,
        sample_posterior: bool = False,
    ) -> None:
        super().__init__()
        widths = [width * multiplier for multiplier in multipliers]
        if not widths or any(w < 1 or w % groups for w in widths):
            raise OrnsteinError(
                f"every width of the autoencoder ({widths}) must be a positive multiple of groups={groups}."
            )
        self.image_size = as_size(image_size)
        self.image_channels = int(image_channels)
        self.downsample = 2 ** (len(widths) - 1)
        height, breadth = sides_of(self.image_size)
        if height % self.downsample or breadth % self.downsample:
            raise OrnsteinError(
                f"the autoencoder shrinks images by {self.downsample}, "
                f"which does not divide {height}x{breadth}; "
                f"choose data.image_size as a multiple of {self.downsample}."
            )
        self.channels = int(channels)
        self.size = as_size((height // self.downsample, breadth // self.downsample))
        self.sigma_data = 1.0
        self.sample_posterior = sample_posterior
        self.stochastic = sample_posterior
        self.decode_range = (-1.0, 1.0)
        self._config = {
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
        self.encoder = _encoder(self.image_channels, widths, 2 * self.channels, **shape)
        self.decoder = _decoder(self.channels, widths, self.image_channels, **shape)
        self.register_buffer("scale", torch.ones(1, self.channels, 1, 1))
        self.register_buffer("shift", torch.zeros(1, self.channels, 1, 1))

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments that give the same architecture, as plain JSON types."""
        return dict(self._config)

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """q(h | x) for images (B, C, H, W) in [-1, 1]; unscaled, as the autoencoder is trained."""
        check_shape(x, self.image_channels, self.image_size, what="images")
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar)

    def reconstruct(self, h: Tensor) -> Tensor:
        """Unscaled latents h (B, channels, \\*size) -> images (B, C, H, W)."""
        check_shape(h, self.channels, self.size, what="latents")
        return self.decoder(h)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> unit-variance z (B, channels, \\*size).

        The posterior's mean, or with ``sample_posterior`` a draw of it by ``generator`` (on the device of x).
        """
        posterior = self.posterior(x)
        h = posterior.sample(generator) if self.sample_posterior else posterior.mean
        return (h - self.shift) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Latents z (B, channels, \\*size) -> images (B, C, H, W), about in [-1, 1]; differentiable."""
        return self.reconstruct(z / self.scale + self.shift)

    @torch.no_grad()
    def set_scale(self, h: Tensor) -> None:
        """Choose ``shift`` and ``scale`` so that each channel of h gets mean 0 and variance 1.

        h are unscaled latents, (N, channels, \\*size), of the training images.

        Raises: ValueError if a channel carries nothing (its scale would blow up noise).
        """
        check_shape(h, self.channels, self.size, what="latents")
        std, mean = torch.std_mean(h.double(), dim=(0, 2, 3), keepdim=True, correction=0)
        if bool((std < 1e-3).any()):
            raise OrnsteinError(
                f"a latent channel carries nothing (standard deviations {std.flatten().tolist()}): "
                "lower the weight of the KL term or use fewer latent channels."
            )
        self.shift.copy_(mean)
        self.scale.copy_(1.0 / std)
