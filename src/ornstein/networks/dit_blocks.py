"""The transformer block of DiT and its relatives: attention, attention to a context, perceptron, modulated or not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.errors import OrnsteinError
from ornstein.networks.attention import attend
from ornstein.networks.blocks import zero_init
from ornstein.networks.checks import check_heads
from ornstein.networks.dit_positions import Rotation, rotate

CONDITIONINGS = ("adaln_zero", "adaln_single", "in_context", "cross_attention")
NORMS = ("layer", "rms")
PERCEPTRONS = ("gelu", "swiglu")


class Surroundings(NamedTuple):
    """What every block of a network sees beside its tokens, the same for all of them."""

    rotation: Rotation | None = None  # of queries and keys
    mask: Tensor | None = None  # (B, 1, 1, N), True where a token may be attended to
    context: Tensor | None = None  # (B, L, D), attended to
    context_mask: Tensor | None = None  # (B, 1, 1, L)


def check_option(name: str, value: str | None, options: tuple[str, ...], *, null: bool = False) -> None:
    """Refuse a value that is not one of an option's (OrnsteinError)."""
    if value not in options and not (null and value is None):
        known = ", ".join((*options, "null") if null else options)
        raise OrnsteinError(f"{name} is one of {known}, got '{value}'.")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `x * (1 + scale) + shift` for tokens `x (B, N, D)` and per-sample `shift, scale (B, 1, D)`."""
    return torch.addcmul(shift, x, 1 + scale)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` whose weight follows the type of its input, as autocast changes it."""

    def forward(self, x: Tensor) -> Tensor:
        """Norm the last axis of `x (..., width)`."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(kind: str, width: int, *, affine: bool) -> nn.Module:
    """Return a `layer` norm, with weight and bias where `affine`, or an `rms` norm, which always has its weight."""
    if kind == "rms":
        return RMSNorm(width, eps=1e-6)
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)


def make_head_norm(kind: str | None, width: int) -> nn.Module | None:
    """Return the norm of a head's queries or keys: None, `layer` or `rms`, each with torch's or its paper's epsilon."""
    if kind is None:
        return None
    return RMSNorm(width, eps=1e-6) if kind == "rms" else nn.LayerNorm(width)


def perceptron_width(hidden_size: int, mlp_ratio: float, kind: str) -> int:
    """Return the hidden width: `hidden_size * mlp_ratio`, two thirds of it for `swiglu`, which has three matrices."""
    width = int(hidden_size * mlp_ratio)
    return int(2 / 3 * width) if kind == "swiglu" else width


class CrossAttention(nn.Module):
    """Attention of tokens to a context of the same width; its output starts at zero.

    Source: Chen et al. 2023 (PixArt-alpha, arXiv 2310.00426) §2.3.
    """

    def __init__(self, hidden_size: int, *, heads: int, qk_norm: str | None = None) -> None:
        """Make attention of `hidden_size` channels in `heads` heads."""
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.q_norm = make_head_norm(qk_norm, hidden_size // heads)
        self.k_norm = make_head_norm(qk_norm, hidden_size // heads)
        self.out = zero_init(nn.Linear(hidden_size, hidden_size))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from `x (B, N, D)` to `context (B, L, D)` where `mask (B, 1, 1, L)` is True."""
        batch, tokens, width = x.shape
        q = self.q(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        kv = self.kv(context).view(batch, context.shape[1], 2 * self.heads, -1).transpose(1, 2)
        k, v = kv.chunk(2, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        attended = attend(q, k, v, mask)
        return self.out(attended.transpose(1, 2).reshape(batch, tokens, width))


class DiTBlock(nn.Module):
    """Transformer block; with adaLN norms modulated and branches gated by the condition, the identity at the start.

    `adaln_zero` has a linear map of the condition of its own, `adaln_single` a table that is added to the modulation
    shared by all blocks, and `in_context` and `cross_attention` are not modulated. A context, such as a caption, is
    attended to between self-attention and perceptron: as it is in the modulated kinds (PixArt-alpha), after a norm in
    the others.

    Source: Peebles & Xie 2023 (arXiv 2212.09748) §3.2, fig. 3; Chen et al. 2023 (arXiv 2310.00426) §2.3 for
    adaln_single; Bao et al. 2023 (U-ViT, arXiv 2209.12152) for long skips.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        conditioning: str = "adaln_zero",
        norm: str = "layer",
        qk_norm: str | None = None,
        qkv_bias: bool = True,
        mlp: str = "gelu",
        context: bool = False,
        long_skip: bool = False,
    ) -> None:
        """Make a block of `hidden_size` channels in `heads` heads with an MLP `mlp_ratio` times as wide.

        Args:
            hidden_size: channels of a token.
            heads: attention heads.
            mlp_ratio: width of the perceptron relative to `hidden_size` (`perceptron_width`).
            dropout: inside the perceptron.
            conditioning: `adaln_zero`, `adaln_single`, `in_context` or `cross_attention`.
            norm: `layer` or `rms`.
            qk_norm: norm of queries and keys per head: None, `layer` or `rms`.
            qkv_bias: biases of queries, keys and values.
            mlp: `gelu` or `swiglu`.
            context: attends to a context.
            long_skip: takes the output of an earlier block, joined by a linear map that starts by passing x alone.

        Raises:
            OrnsteinError: widths that do not divide, or an unknown option.
        """
        super().__init__()
        check_heads(hidden_size, heads)
        check_option("conditioning", conditioning, CONDITIONINGS)
        check_option("norm", norm, NORMS)
        check_option("qk_norm", qk_norm, NORMS, null=True)
        check_option("mlp", mlp, PERCEPTRONS)
        self.heads = heads
        self.swiglu = mlp == "swiglu"
        hidden = perceptron_width(hidden_size, mlp_ratio, mlp)
        modulated = conditioning.startswith("adaln")
        self.norm1 = make_norm(norm, hidden_size, affine=not modulated)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.q_norm = make_head_norm(qk_norm, hidden_size // heads)
        self.k_norm = make_head_norm(qk_norm, hidden_size // heads)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.cross = CrossAttention(hidden_size, heads=heads, qk_norm=qk_norm) if context else None
        self.cross_norm = make_norm(norm, hidden_size, affine=True) if context and not modulated else None
        self.norm2 = make_norm(norm, hidden_size, affine=not modulated)
        self.mlp_in = nn.Linear(hidden_size, 2 * hidden if self.swiglu else hidden)
        self.dropout = nn.Dropout(dropout)
        self.mlp_out = nn.Linear(hidden, hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size) if conditioning == "adaln_zero" else None
        self.table = nn.Parameter(torch.zeros(6, hidden_size)) if conditioning == "adaln_single" else None
        self.long_skip = nn.Linear(2 * hidden_size, hidden_size) if long_skip else None

    def forward(
        self, x: Tensor, condition: Tensor | None, around: Surroundings | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """Transform tokens.

        Args:
            x: `(B, N, D)`.
            condition: of adaln_zero `(B, D)`, activated; of adaln_single the shared modulation `(B, 6, D)`.
            around: rotation, masks and context.
            skip: an earlier block's output `(B, N, D)`, of a block with `long_skip`.

        Returns:
            `(B, N, D)`.
        """
        around = Surroundings() if around is None else around
        if self.long_skip is not None and skip is not None:
            x = self.long_skip(torch.cat([x, skip], dim=-1))
        if condition is None:
            x = x + self._attention(self.norm1(x), around)
            x = self._look(x, around)
            return x + self._perceptron(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulations(condition)
        x = torch.addcmul(x, gate1, self._attention(modulate(self.norm1(x), shift1, scale1), around))
        x = self._look(x, around)
        return torch.addcmul(x, gate2, self._perceptron(modulate(self.norm2(x), shift2, scale2)))

    def _modulations(self, condition: Tensor) -> tuple[Tensor, ...]:
        if self.table is not None:
            return (condition + self.table).chunk(6, dim=1)
        assert self.modulation is not None
        return self.modulation(condition)[:, None].chunk(6, dim=-1)

    def _attention(self, x: Tensor, around: Surroundings) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3 * self.heads, width // self.heads).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if around.rotation is not None:
            q, k = rotate(q, around.rotation), rotate(k, around.rotation)
        attended = attend(q, k, v, around.mask)
        return self.out(attended.transpose(1, 2).reshape(batch, tokens, width))

    def _look(self, x: Tensor, around: Surroundings) -> Tensor:
        if self.cross is None or around.context is None:
            return x
        query = x if self.cross_norm is None else self.cross_norm(x)
        return x + self.cross(query, around.context, around.context_mask)

    def _perceptron(self, x: Tensor) -> Tensor:
        if self.swiglu:
            gate, value = self.mlp_in(x).chunk(2, dim=-1)
            h = F.silu(gate) * value
        else:
            h = F.gelu(self.mlp_in(x), approximate="tanh")
        return self.mlp_out(self.dropout(h))
