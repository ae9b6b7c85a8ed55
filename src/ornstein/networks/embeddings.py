"""Noise-level, label and position embeddings shared by every denoising network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError


def sinusoidal_embedding(values: Tensor, dim: int, *, max_period: float = 10_000.0) -> Tensor:
    r"""Embed scalars as cosines and sines of geometrically spaced frequencies.

    .. math:: e(v) = [\cos(v f_i), \sin(v f_i)], \quad f_i = \mathrm{max\_period}^{-i / (d/2)}

    Source: Vaswani et al. 2017 (arXiv 1706.03762) §3.5, in the cos-then-sin order of DiT and ADM.

    Args:
        values: `(B,)`, any real numbers (`1000 * t` in [0, 1000] for most parameterizations).
        dim: size of the embedding; an odd one is padded with a zero.
        max_period: longest wavelength divided by `2 pi`.

    Returns:
        `(B, dim)` float32 (float64 in, float64 out), each entry in [-1, 1].
    """
    values = values if values.dtype == torch.float64 else values.float()
    half = dim // 2
    steps = torch.arange(half, device=values.device, dtype=values.dtype)
    angles = values[:, None] * torch.exp(-math.log(max_period) / half * steps)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, 1)) if dim % 2 else embedding


def sincos_positions(height: int, width: int, dim: int, *, device: torch.device | None = None) -> Tensor:
    """Fixed 2-D sine-cosine positions of a grid, as in DiT (the column fills the first half of `dim`).

    Source: Peebles & Xie 2023 (arXiv 2212.09748) §3, after He et al. 2022 (MAE).

    Args:
        height: rows of the grid.
        width: columns of the grid.
        dim: size of the embedding, divisible by 4.
        device: where to make them.

    Returns:
        `(height * width, dim)` float32, rows in raster order.

    Raises:
        OrnsteinError: `dim` is not divisible by 4.
    """
    if dim % 4:
        raise OrnsteinError(f"2-D sine-cosine positions need a hidden size divisible by 4, got {dim}.")
    quarter = dim // 4
    # float64, because DiT computes them in numpy; the positions then agree to float32 rounding.
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def axis(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float64)[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    columns = axis(width)[None].expand(height, width, -1)
    rows = axis(height)[:, None].expand(height, width, -1)
    return torch.cat([columns, rows], dim=-1).reshape(height * width, dim).float().to(device)


class SinusoidalEmbedding(nn.Module):
    """`sinusoidal_embedding` as a module: `(B,) -> (B, dim)`."""

    def __init__(self, dim: int, *, max_period: float = 10_000.0) -> None:
        """Make an embedding of `dim` numbers with the given longest period."""
        super().__init__()
        self.dim = dim
        self.max_period = max_period

    def forward(self, values: Tensor) -> Tensor:
        """Embed `(B,)` values as `(B, dim)`."""
        return sinusoidal_embedding(values, self.dim, max_period=self.max_period)


class FourierEmbedding(nn.Module):
    r"""Random Fourier features `[cos(2 pi f v), sin(2 pi f v)]`, `f ~ N(0, scale^2)`, fixed at construction.

    Suits noise conditions of order one, such as EDM's `ln(sigma)/4`. Source: Song et al. 2021
    (arXiv 2011.13456) app. C; Karras et al. 2022 (arXiv 2206.00364) table 8 (DDPM++ uses the sinusoidal one).
    """

    frequencies: Tensor

    def __init__(self, dim: int, *, scale: float = 16.0) -> None:
        """Draw `dim // 2` frequencies of standard deviation `scale`; an even `dim` is required."""
        super().__init__()
        if dim % 2:
            raise OrnsteinError(f"A Fourier embedding needs an even size, got {dim}.")
        self.register_buffer("frequencies", torch.randn(dim // 2) * scale)

    def forward(self, values: Tensor) -> Tensor:
        """Embed `(B,)` values as `(B, dim)`, entries in [-1, 1]."""
        frequencies = self.frequencies.to(torch.promote_types(values.dtype, torch.float32))
        angles = values.to(frequencies.dtype)[:, None] * (2 * math.pi * frequencies)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def check_labels(label: Tensor | None, num_classes: int | None, *, values: bool | None = None) -> None:
    """Refuse labels that a network with `num_classes` classes cannot take.

    Args:
        label: `(B,)` integers in `[0, num_classes]`, where `num_classes` is the null class; None: no labels.
        num_classes: classes the network knows, or None for an unconditional network.
        values: also check the range. By default only on the CPU, where reading values costs no device sync.

    Raises:
        OrnsteinError: a label is missing, superfluous, of the wrong shape or type, or out of range.
    """
    if num_classes is None:
        if label is not None:
            raise OrnsteinError(
                "This network is unconditional (num_classes is null) and takes no label: "
                "leave the label out, or set num_classes."
            )
        return
    if label is None:
        raise OrnsteinError(
            f"This network is class-conditional ({num_classes} classes) and needs a label for every sample; "
            f"pass the null class {num_classes} for unconditional output."
        )
    if label.ndim != 1 or label.is_floating_point() or label.dtype == torch.bool:
        raise OrnsteinError(
            f"Labels are a one-dimensional integer tensor, got shape {tuple(label.shape)} of {label.dtype}."
        )
    if values is None:
        values = label.device.type == "cpu" and not torch.compiler.is_compiling()
    if values and label.numel():
        low, high = (int(bound) for bound in label.aminmax())
        if low < 0 or high > num_classes:
            raise OrnsteinError(
                f"Labels lie in [0, {num_classes}] ({num_classes} is the null class), got {low} to {high}: "
                "check data.num_classes."
            )


class ConditionEmbedding(nn.Module):
    """Noise level and label in one vector per sample, computed once per network evaluation.

    The noise condition is embedded, passed through a two-layer SiLU perceptron, and the label's row of an
    embedding table of `num_classes + 1` rows (the last one is the null class) is added.
    """

    def __init__(
        self,
        dim: int,
        *,
        features: int = 256,
        num_classes: int | None = None,
        noise_embedding: str = "sinusoidal",
        label_std: float = 1.0,
    ) -> None:
        """Make the embedding.

        Args:
            dim: size of the result.
            features: size of the sinusoidal or Fourier features before the perceptron.
            num_classes: classes, or None for an unconditional network.
            noise_embedding: `sinusoidal` (conditions up to 1000) or `fourier` (conditions of order one).
            label_std: standard deviation of the label table at the start.

        Raises:
            OrnsteinError: an unknown `noise_embedding`, or fewer than one class.
        """
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise OrnsteinError(f"num_classes is null (unconditional) or at least 1, got {num_classes}.")
        self.num_classes = num_classes
        if noise_embedding == "sinusoidal":
            self.features: nn.Module = SinusoidalEmbedding(features)
        elif noise_embedding == "fourier":
            self.features = FourierEmbedding(features)
        else:
            raise OrnsteinError(f"noise_embedding is 'sinusoidal' or 'fourier', got '{noise_embedding}'.")
        self.mlp = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label: nn.Embedding | None = None
        if num_classes is not None:
            self.label = nn.Embedding(num_classes + 1, dim)
            nn.init.normal_(self.label.weight, std=label_std)

    def forward(self, noise_cond: Tensor, label: Tensor | None = None) -> Tensor:
        """Embed `noise_cond (B,)` and, for a conditional network, `label (B,)` as `(B, dim)`."""
        check_labels(label, self.num_classes)
        embedding = self.mlp(self.features(noise_cond).to(self.mlp[0].weight.dtype))
        return embedding if self.label is None else embedding + self.label(label)
