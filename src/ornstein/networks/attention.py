"""Attention of the positions of a feature map, to each other (full and linear) and to context tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.networks.blocks import residual_sum, zero_init
from ornstein.networks.checks import check_heads


def resolve_heads(channels: int, *, heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """Return `(heads, head_dim)` from whichever is given; neither given means one head of all channels.

    Both given means projections of `heads * head_dim` channels, whatever `channels` is.

    Raises:
        OrnsteinError: `channels` does not split evenly.
    """
    if heads is not None and head_dim is not None:
        return heads, head_dim
    if heads is None:
        heads = 1 if head_dim is None else max(1, channels // head_dim)
    check_heads(channels, heads, name="An attention level of channels")
    return heads, channels // heads


FEW_POSITIONS = 64  # on a CPU the fused kernel pays from about 100 positions on


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Attention `softmax(q k^T / sqrt(d)) v` of `(B, heads, N, d)` tensors, in the way that is fastest.

    `mask`, bool and broadcast to `(B, heads, N, M)`, is True where a query may look; each must see something.

    The fused kernel of `scaled_dot_product_attention` does it; on a CPU few positions go through plain matrix
    products, which take 0.8 to 1.2 times the fused kernel's time, and a tenth of it where
    `torch.set_float32_matmul_precision("medium")` sends products to oneDNN.
    """
    if q.device.type == "cpu" and q.shape[-2] <= FEW_POSITIONS:
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.mT)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return torch.matmul(scores.softmax(dim=-1), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class _Attention2d(nn.Module):
    """What both kinds have: a norm, one projection to queries, keys and values, and one back."""

    def __init__(
        self,
        channels: int,
        *,
        groups: int,
        heads: int | None,
        head_dim: int | None,
        eps: float,
        skip_scale: float,
        bias: bool,
        zero_out: bool,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = resolve_heads(channels, heads=heads, head_dim=head_dim)
        self.skip_scale = skip_scale
        inner = self.heads * self.head_dim
        self.norm = nn.GroupNorm(groups, channels, eps=eps)
        self.qkv = nn.Conv2d(channels, 3 * inner, 1, bias=bias)
        self.out = nn.Conv2d(inner, channels, 1)
        if zero_out:
            zero_init(self.out)


class SelfAttention2d(_Attention2d):
    """Residual self-attention among all positions: `x + out(attention(norm(x)))`, `(B, C, H, W)` both ways.

    Memory-efficient kernels do the work (`scaled_dot_product_attention`). The output projection starts at
    zero, so that the module starts as the identity. Source: Ho et al. 2020 (arXiv 2006.11239) app. B.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int = 32,
        heads: int | None = None,
        head_dim: int | None = None,
        eps: float = 1e-5,
        skip_scale: float = 1.0,
        bias: bool = True,
    ) -> None:
        """Make the module.

        `resolve_heads` describes `heads` and `head_dim`; `groups` and `eps` are the norm's, `skip_scale` a factor on
        the sum, `bias` q, k and v's.
        """
        super().__init__(
            channels,
            groups=groups,
            heads=heads,
            head_dim=head_dim,
            eps=eps,
            skip_scale=skip_scale,
            bias=bias,
            zero_out=True,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the `H * W` positions of `x (B, C, H, W)`."""
        batch, _, height, width = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # contiguous in channels_last
        qkv = qkv.reshape(batch, height * width, 3 * self.heads, self.head_dim).transpose(1, 2)
        y = attend(*qkv.chunk(3, dim=1))
        y = y.transpose(1, 2).reshape(batch, height, width, -1).permute(0, 3, 1, 2)
        return residual_sum(x, self.out(y), scale=self.skip_scale)


class LinearAttention2d(_Attention2d):
    r"""Residual attention whose cost grows linearly with the number of positions.

    .. math:: y = \mathrm{softmax}_d(q)\,\bigl(\mathrm{softmax}_n(k)^\top v\bigr) / \sqrt d

    Queries are normalised over features, keys over positions. Source: Shen et al. 2021 (arXiv 1812.01243)
    §3.2; Katharopoulos et al. 2020 (arXiv 2006.16236) for the general form. The output projection starts at
    zero, unless a norm follows it (`post_norm`, as in the U-Net of "The Annotated Diffusion Model").
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int = 32,
        heads: int | None = None,
        head_dim: int | None = None,
        eps: float = 1e-5,
        skip_scale: float = 1.0,
        post_norm: bool = False,
    ) -> None:
        """Make the module; arguments as in `SelfAttention2d`."""
        super().__init__(
            channels,
            groups=groups,
            heads=heads,
            head_dim=head_dim,
            eps=eps,
            skip_scale=skip_scale,
            bias=False,
            zero_out=not post_norm,
        )
        self.post_norm = nn.GroupNorm(1, channels) if post_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the `H * W` positions of `x (B, C, H, W)`."""
        y = self.post_norm(self.out(linear_attention(self.qkv(self.norm(x)), self.heads)))
        return residual_sum(x, y, scale=self.skip_scale)


def linear_attention(qkv: Tensor, heads: int) -> Tensor:
    """Linear attention (see `LinearAttention2d`) of stacked queries, keys and values.

    Args:
        qkv: `(B, 3 * heads * d, H, W)`.
        heads: number of heads.

    Returns:
        `(B, heads * d, H, W)`.
    """
    batch, channels, height, width = qkv.shape
    q, k, v = qkv.reshape(batch, 3, heads, channels // (3 * heads), height * width).unbind(1)
    q = q.softmax(dim=-2) * q.shape[-2] ** -0.5
    context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
    return torch.einsum("bhde,bhdn->bhen", context, q).reshape(batch, -1, height, width)


class Context(NamedTuple):
    """What a network may look at beside its input.

    Attributes:
        tokens: `(B, L, D)`.
        mask: `(B, L)` bool, True where a token counts; None: all do. At least one of each row must count.
    """

    tokens: Tensor
    mask: Tensor | None


class CrossAttention2d(nn.Module):
    """Residual attention of all positions to context tokens, `(B, C, H, W)` both ways.

    The output projection starts at zero, so that the module starts as the identity. Source: Rombach et al. 2022
    (arXiv 2112.10752) §3.3.
    """

    def __init__(
        self,
        channels: int,
        *,
        context_channels: int,
        groups: int = 32,
        heads: int | None = None,
        head_dim: int | None = None,
        eps: float = 1e-5,
        skip_scale: float = 1.0,
    ) -> None:
        """Make the module for tokens of `context_channels` numbers; the rest as in `SelfAttention2d`."""
        super().__init__()
        self.heads, self.head_dim = resolve_heads(channels, heads=heads, head_dim=head_dim)
        self.skip_scale = skip_scale
        inner = self.heads * self.head_dim
        self.norm = nn.GroupNorm(groups, channels, eps=eps)
        self.q = nn.Conv2d(channels, inner, 1)
        self.kv = nn.Linear(context_channels, 2 * inner, bias=False)
        self.out = zero_init(nn.Conv2d(inner, channels, 1))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Let the positions of `x (B, C, H, W)` attend to the context's tokens."""
        batch, _, height, width = x.shape
        q = self.q(self.norm(x)).permute(0, 2, 3, 1).reshape(batch, height * width, self.heads, self.head_dim)
        kv = self.kv(context.tokens).reshape(batch, -1, 2 * self.heads, self.head_dim).transpose(1, 2)
        mask = None if context.mask is None else context.mask[:, None, None, :]
        k, v = kv.chunk(2, dim=1)
        y = attend(q.transpose(1, 2), k, v, mask)
        y = y.transpose(1, 2).reshape(batch, height, width, -1).permute(0, 3, 1, 2)
        return residual_sum(x, self.out(y), scale=self.skip_scale)
