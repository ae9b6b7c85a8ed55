"""Noise-level, label and position embeddings shared by every denoising network."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError
from ornstein.networks.checks import check_pooled


def sinusoidal_embedding(
    values: Tensor, dim: int, *, max_period: float = 10_000.0, sines_first: bool = False, endpoint: bool = False
) -> Tensor:
    r"""Embed scalars as cosines and sines of geometrically spaced frequencies.

    .. math:: e(v) = [\cos(v f_i), \sin(v f_i)], \quad f_i = \mathrm{max\_period}^{-i / (d/2)}

    Source: Vaswani et al. 2017 (arXiv 1706.03762) §3.5, in the cos-then-sin order of DiT and ADM; DDPM has the
    sines first and the endpoint.

    Args:
        values: `(B,)`, any real numbers (`1000 * t` in [0, 1000] for most parameterizations).
        dim: size of the embedding; an odd one is padded with a zero.
        max_period: longest wavelength divided by `2 pi`.
        sines_first: swap the halves.
        endpoint: divide `i` by `d/2 - 1`, so that the last wavelength is the longest.

    Returns:
        `(B, dim)` float32 (float64 in, float64 out), each entry in [-1, 1].
    """
    values = values if values.dtype == torch.float64 else values.float()
    half = dim // 2
    steps = torch.arange(half, device=values.device, dtype=values.dtype)
    angles = values[:, None] * torch.exp(-math.log(max_period) / (half - endpoint) * steps)
    parts = [angles.sin(), angles.cos()] if sines_first else [angles.cos(), angles.sin()]
    embedding = torch.cat(parts, dim=-1)
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

    def __init__(
        self, dim: int, *, max_period: float = 10_000.0, sines_first: bool = False, endpoint: bool = False
    ) -> None:
        """Make an embedding of `dim` numbers; the other arguments are `sinusoidal_embedding`'s."""
        super().__init__()
        if endpoint and dim < 4:
            raise OrnsteinError(f"A sinusoidal embedding with its endpoint needs at least 4 numbers, got {dim}.")
        self.dim = dim
        self.max_period = max_period
        self.sines_first = sines_first
        self.endpoint = endpoint

    def forward(self, values: Tensor) -> Tensor:
        """Embed `(B,)` values as `(B, dim)`."""
        return sinusoidal_embedding(
            values, self.dim, max_period=self.max_period, sines_first=self.sines_first, endpoint=self.endpoint
        )


class FourierEmbedding(nn.Module):
    r"""Random Fourier features `[cos(2 pi f v), sin(2 pi f v)]`, `f ~ N(0, scale^2)`, fixed at construction.

    Suits noise conditions of order one, such as EDM's `ln(sigma)/4`. Source: Song et al. 2021
    (arXiv 2011.13456) app. C; Karras et al. 2022 (arXiv 2206.00364) table 8 (DDPM++ uses the sinusoidal one).
    """

    frequencies: Tensor

    def __init__(self, dim: int, *, scale: float = 16.0, sines_first: bool = False) -> None:
        """Draw `dim // 2` frequencies of deviation `scale`, `dim` being even; `sines_first` swaps the halves."""
        super().__init__()
        if dim % 2:
            raise OrnsteinError(f"A Fourier embedding needs an even size, got {dim}.")
        self.sines_first = sines_first
        self.register_buffer("frequencies", torch.randn(dim // 2) * scale)

    def forward(self, values: Tensor) -> Tensor:
        """Embed `(B,)` values as `(B, dim)`, entries in [-1, 1]."""
        frequencies = self.frequencies.to(torch.promote_types(values.dtype, torch.float32))
        angles = values.to(frequencies.dtype)[:, None] * (2 * math.pi * frequencies)
        return torch.cat([angles.sin(), angles.cos()] if self.sines_first else [angles.cos(), angles.sin()], dim=-1)


# name -> module of a given size. The last two differ from the first two in order and frequencies alone, as it takes to
# compute what the papers' weights were trained for.
NOISE_EMBEDDINGS: dict[str, Callable[[int], nn.Module]] = {
    "sinusoidal": SinusoidalEmbedding,
    "fourier": FourierEmbedding,
    "ddpm": partial(SinusoidalEmbedding, sines_first=True, endpoint=True),
    "ncsnpp": partial(FourierEmbedding, sines_first=True),
}


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


def label_table(num_classes: int, dim: int, *, std: float) -> nn.Embedding:
    """Return a table of `dim` normal numbers for each class and, in its last row, for the null class.

    Raises:
        OrnsteinError: fewer than one class.
    """
    _check_classes(num_classes)
    table = nn.Embedding(num_classes + 1, dim)
    nn.init.normal_(table.weight, std=std)
    return table


def _check_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise OrnsteinError(f"num_classes is null (unconditional) or at least 1, got {num_classes}.")


class OneHotLinear(nn.Module):
    r"""Linear map of one-hot labels, :math:`\sqrt K\, W e_c + b`, where the null class `K` is the zero vector.

    Source: Karras et al. 2022 (arXiv 2206.00364), the label input of their DDPM++ and NCSN++.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        """Make the map of `num_classes` classes (and the null class) to `dim` numbers."""
        super().__init__()
        _check_classes(num_classes)
        self.weight = nn.Parameter(torch.empty(dim, num_classes))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, label: Tensor) -> Tensor:
        """Map `label (B,)` in `[0, num_classes]` to `(B, dim)`."""
        rows = nn.functional.pad(self.weight.t(), (0, 0, 0, 1))
        return nn.functional.embedding(label, rows) * math.sqrt(self.weight.shape[1]) + self.bias


class ConditionEmbedding(nn.Module):
    """Noise level and label in one vector per sample, computed once per network evaluation.

    The noise condition is embedded, passed through a two-layer SiLU perceptron, and the label's row of an
    embedding table of `num_classes + 1` rows (the last one is the null class) is added; so is a linear map of a
    caption's pooled vector. Where labels are `mapped` they are added before the perceptron instead, and so are
    augmentation parameters.
    """

    def __init__(
        self,
        dim: int,
        *,
        features: int = 256,
        num_classes: int | None = None,
        noise_embedding: str = "sinusoidal",
        label_std: float = 1.0,
        pooled_dim: int | None = None,
        label_embedding: str = "table",
        augment_dim: int | None = None,
    ) -> None:
        """Make the embedding.

        Args:
            dim: size of the result.
            features: size of the noise embedding before the perceptron.
            num_classes: classes, or None for an unconditional network.
            noise_embedding: `sinusoidal` (conditions up to 1000), `fourier` (conditions of order one), or these in
                the order and with the frequencies of `ddpm` (also DDPM++) and `ncsnpp`.
            label_std: standard deviation of the label table at the start.
            pooled_dim: size of a caption's pooled vector, or None for a network without captions.
            label_embedding: `table`, or `mapped`: `OneHotLinear` into the perceptron (EDM's DDPM++ and NCSN++).
            augment_dim: numbers that describe an augmented training image (9 in EDM), or None.

        Raises:
            OrnsteinError: an unknown `noise_embedding` or `label_embedding`, or fewer than one class.
        """
        super().__init__()
        if noise_embedding not in NOISE_EMBEDDINGS:
            raise OrnsteinError(
                f"noise_embedding is 'sinusoidal' or 'fourier', got '{noise_embedding}' ('ddpm' and 'ncsnpp' are these "
                "two as those papers' code has them)."
            )
        if label_embedding not in ("table", "mapped"):
            raise OrnsteinError(f"label_embedding is 'table' or 'mapped', got '{label_embedding}'.")
        self.num_classes = num_classes
        self.mapped = label_embedding == "mapped"
        self.features = NOISE_EMBEDDINGS[noise_embedding](features)
        self.mlp = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label: nn.Module | None = None
        if num_classes is not None and self.mapped:
            self.label = OneHotLinear(num_classes, features)
        elif num_classes is not None:
            self.label = label_table(num_classes, dim, std=label_std)
        self.pooled: nn.Linear | None = None if pooled_dim is None else nn.Linear(pooled_dim, dim)
        self.augment: nn.Linear | None = None if augment_dim is None else nn.Linear(augment_dim, features, bias=False)

    def forward(
        self,
        noise_cond: Tensor,
        label: Tensor | None = None,
        pooled: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Embed what was given as `(B, dim)`.

        Args:
            noise_cond: `(B,)`.
            label: `(B,)`, only and always for a conditional network.
            pooled: `(B, pooled_dim)`, only and always for a network that takes captions.
            augment: `(B, augment_dim)`, for a network that takes it; None: nothing was changed.

        Raises:
            OrnsteinError: one of them does not fit the network.
        """
        check_labels(label, self.num_classes)
        check_pooled(pooled, None if self.pooled is None else self.pooled.in_features)
        features = self.features(noise_cond).to(self.mlp[0].weight.dtype)
        if self.label is not None and self.mapped:
            features = features + self.label(label)
        if augment is not None:
            if self.augment is None:
                raise OrnsteinError("This network takes no augmentation parameters (augment_dim is null).")
            features = features + self.augment(augment.to(features.dtype))
        embedding = self.mlp(features)
        if self.label is not None and not self.mapped:
            embedding = embedding + self.label(label)
        return embedding if self.pooled is None else embedding + self.pooled(pooled)
