"""Layers and blocks that preserve magnitudes: what goes in at unit size comes out at about unit size (EDM2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.networks.attention import attend, resolve_heads
from ornstein.networks.embeddings import sinusoidal_embedding

EPSILON = 1e-4  # added to a magnitude before dividing by it
SILU_MAGNITUDE = 0.596  # root mean square of silu(x) for x ~ N(0, 1)
CLIP = 256.0  # activations never come near it in float32, and stay finite behind it in float16


def unit_magnitude(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Return `x` divided by its root mean square over `dims`, measured in at least float32; the shape stays.

    Source: Karras et al. 2024 (arXiv 2312.02696), pixel norm and weight normalisation alike.
    """
    size = torch.linalg.vector_norm(x, dim=list(dims), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (size * (size.numel() / x.numel()) ** 0.5 + EPSILON).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over its root mean square under unit normal inputs."""
    return F.silu(x) * (1 / SILU_MAGNITUDE)


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    r"""Return :math:`((1 - t) a + t b) / \sqrt{(1 - t)^2 + t^2}`, of unit size where a and b are and do not correlate.

    Source: Karras et al. 2024 (arXiv 2312.02696), magnitude-preserving sum.
    """
    scale = ((1 - t) ** 2 + t**2) ** -0.5
    # Not `add`: where b is a matrix product, inductor joins the two to one `addmm` and drops alpha (torch 2.13).
    return torch.sub(a * ((1 - t) * scale), b, alpha=-t * scale)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    r"""Join channels of `a (B, Na, H, W)` and `b (B, Nb, H, W)`, which then say 1 - t to t of what follows.

    .. math:: \sqrt{\tfrac{N_a + N_b}{(1-t)^2 + t^2}}\,
        \Bigl[\tfrac{1-t}{\sqrt{N_a}}\, a \oplus \tfrac{t}{\sqrt{N_b}}\, b\Bigr]

    Source: Karras et al. 2024 (arXiv 2312.02696), magnitude-preserving concatenation.
    """
    of_a, of_b = a.shape[1], b.shape[1]
    scale = ((of_a + of_b) / ((1 - t) ** 2 + t**2)) ** 0.5
    return torch.cat([a * (scale * (1 - t) * of_a**-0.5), b * (scale * t * of_b**-0.5)], dim=1)


def _rows(weight: Tensor) -> Tensor:
    """Each output channel's weights at unit root mean square."""
    return unit_magnitude(weight, range(1, weight.ndim))


def _effective(weight: Tensor, gain: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Weights that give unit variance for inputs of unit variance, times `gain`; rows are normalised by the gradient's
    eyes too, which so has no part along them."""
    weight = _rows(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    return (weight * (gain * weight[0].numel() ** -0.5)).to(dtype)


class MPLinear(nn.Linear):
    """Linear map without bias whose rows are normalised: `(B, in) -> (B, out)` of the inputs' magnitude."""

    def __init__(self, in_features: int, out_features: int) -> None:
        """Draw normal weights and normalise them."""
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Unit normal weights, at unit magnitude from the start."""
        with torch.no_grad():
            self.weight.copy_(_rows(torch.randn_like(self.weight)))

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        """Map `x (B, in)` and multiply by `gain`."""
        return F.linear(x, _effective(self.weight, gain, x.dtype))


class MPConv(nn.Conv2d):
    """Convolution without bias whose output channels' weights are normalised, at the resolution of its input."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        """Draw normal weights and normalise them; `kernel_size` is odd."""
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)

    def reset_parameters(self) -> None:
        """Unit normal weights, at unit magnitude from the start."""
        with torch.no_grad():
            self.weight.copy_(_rows(torch.randn_like(self.weight)))

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        """Map `x (B, in, H, W)` and multiply by `gain`."""
        return F.conv2d(x, _effective(self.weight, gain, x.dtype), padding=self.padding)


@torch.compiler.disable  # inductor's backward of a graph that changes its own parameters is wrong (torch 2.13)
@torch.no_grad()
def normalise_weights(layers: Sequence[MPLinear | MPConv]) -> None:
    """Put every trained weight back to unit magnitude, in place: the forced normalisation of each training step.

    Through `data`, which leaves autograd's version counter alone: weights that are normalised already change by no more
    than rounding, so that a graph of an earlier forward pass of the same step keeps its truth.
    """
    for layer in layers:
        if layer.weight.requires_grad:
            layer.weight.data.copy_(_rows(layer.weight.data))


class MPNoiseEmbedding(nn.Module):
    r"""Features of unit magnitude of a noise condition: `(B,) -> (B, dim)`.

    `fourier`: :math:`\sqrt 2 \cos(2\pi (f v + \phi))`, f ~ N(0, 1) and phi ~ U(0, 1) drawn once, for conditions of
    order one such as EDM's. `sinusoidal`: :math:`\sqrt 2` times the cosines and sines of the other networks, for
    conditions up to 1000.

    Source: Karras et al. 2024 (arXiv 2312.02696), magnitude-preserving Fourier features.
    """

    def __init__(self, dim: int, *, kind: str) -> None:
        """Make the embedding; `kind` is `fourier` or `sinusoidal`."""
        super().__init__()
        self.dim, self.kind = dim, kind
        if kind == "fourier":
            self.register_buffer("frequencies", torch.randn(dim))
            self.register_buffer("phases", torch.rand(dim))

    def forward(self, noise_cond: Tensor) -> Tensor:
        """Embed `noise_cond (B,)`, in at least float32."""
        if self.kind == "sinusoidal":
            return 2**0.5 * sinusoidal_embedding(noise_cond, self.dim)
        wide = torch.promote_types(noise_cond.dtype, torch.float32)
        frequencies, phases = self.get_buffer("frequencies").to(wide), self.get_buffer("phases").to(wide)
        return 2**0.5 * torch.cos(2 * math.pi * (noise_cond.to(wide)[:, None] * frequencies + phases))


class MPAttention(nn.Module):
    """Residual attention among positions by the cosine of queries and keys, `(B, C, H, W)` both ways.

    Queries, keys and values of each head are brought to unit magnitude, so that no logit exceeds the root of the head's
    size. Source: Karras et al. 2024 (arXiv 2312.02696), cosine attention.
    """

    def __init__(self, channels: int, *, head_dim: int, balance: float) -> None:
        """Make the module; `balance` is the share of attention in the sum with its input."""
        super().__init__()
        self.heads, self.head_dim = resolve_heads(channels, heads=None, head_dim=head_dim)
        self.balance = balance
        self.qkv = MPConv(channels, 3 * channels, 1)
        self.out = MPConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the `H * W` positions of `x (B, C, H, W)`."""
        batch, _, height, width = x.shape
        qkv = self.qkv(x).permute(0, 2, 3, 1).reshape(batch, height * width, 3 * self.heads, self.head_dim)
        y = attend(*unit_magnitude(qkv, [-1]).transpose(1, 2).chunk(3, dim=1))
        y = y.transpose(1, 2).reshape(batch, height, width, -1).permute(0, 3, 1, 2)
        return mp_sum(x, self.out(y), self.balance)


class EDM2Block(nn.Module):
    """Residual block of EDM2's encoder or decoder: resampling, two convolutions under the condition, attention.

    The encoder's begins with a pixel norm, after its 1x1 convolution where channels change; the decoder's changes
    channels on the way around its two convolutions. The condition multiplies by `1 + gain * linear(embedding)`, with a
    learned gain that starts at zero.

    Source: Karras et al. 2024 (arXiv 2312.02696), config G.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_channels: int,
        encoder: bool,
        resample: str = "keep",
        attention: bool = False,
        head_dim: int = 64,
        dropout: float = 0.0,
        residual_balance: float = 0.3,
        attention_balance: float = 0.3,
    ) -> None:
        """Make a block; `resample` is `keep`, `down` or `up`; the balances are the branches' shares in their sums."""
        super().__init__()
        self.dropout, self.balance = dropout, residual_balance
        self.encoder, self.resample = encoder, resample
        self.gain = nn.Parameter(torch.zeros([]))
        self.shortcut = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.conv1 = MPConv(out_channels if encoder else in_channels, out_channels, 3)
        self.condition = MPLinear(embedding_channels, out_channels)
        self.conv2 = MPConv(out_channels, out_channels, 3)
        self.attention = (
            MPAttention(out_channels, head_dim=head_dim, balance=attention_balance) if attention else nn.Identity()
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Transform `x (B, C, H, W)` under `embedding (B, E)`, already activated."""
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.encoder:
            x = unit_magnitude(x if self.shortcut is None else self.shortcut(x), [1])
        y = self.conv1(mp_silu(x))
        y = mp_silu(y * (1 + self.condition(embedding, self.gain))[:, :, None, None].to(y.dtype))
        y = self.conv2(F.dropout(y, self.dropout, self.training))
        if not self.encoder and self.shortcut is not None:
            x = self.shortcut(x)
        return self.attention(mp_sum(x, y, self.balance)).clamp(-CLIP, CLIP)
