"""Self-attention over the positions of a feature map, full (quadratic) and linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.networks.blocks import zero_init
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


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""Attention `softmax(q k^T / sqrt(d)) v` of `(B, heads, N, d)` tensors, in the way that is fastest.

    The fused kernel of `scaled_dot_product_attention` does it; on a CPU few positions go through plain matrix
    products, which take 0.8 to 1.2 times the fused kernel's time, and a tenth of it where
    `torch.set_float32_matmul_precision("medium")` sends products to oneDNN.
    """
    if q.device.type == "cpu" and q.shape[-2] <= FEW_POSITIONS:
        return torch.matmul(torch.matmul(q * q.shape[-1] ** -0.5, k.mT).softmax(dim=-1), v)
    return F.scaled_dot_product_attention(q, k, v)


class _Attention2d(nn.Module):
    """What both kinds have: a norm, one projection to queries, keys and values, and one back."""

    def __init__(
        self, channels: int, *, groups: int, heads: int | None, head_dim: int | None, bias: bool, zero_out: bool
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = resolve_heads(channels, heads=heads, head_dim=head_dim)
        inner = self.heads * self.head_dim
        self.norm = nn.GroupNorm(groups, channels)
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
        bias: bool = True,
    ) -> None:
        """Make the module; `resolve_heads` describes `heads` and `head_dim`; `bias` is q, k and v's."""
        super().__init__(channels, groups=groups, heads=heads, head_dim=head_dim, bias=bias, zero_out=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the `H * W` positions of `x (B, C, H, W)`."""
        batch, _, height, width = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # contiguous in channels_last
        qkv = qkv.reshape(batch, height * width, 3 * self.heads, self.head_dim).transpose(1, 2)
        y = attend(*qkv.chunk(3, dim=1))
        y = y.transpose(1, 2).reshape(batch, height, width, -1).permute(0, 3, 1, 2)
        return x + self.out(y)


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
        post_norm: bool = False,
    ) -> None:
        """Make the module; `heads` and `head_dim` are described at `resolve_heads`."""
        super().__init__(channels, groups=groups, heads=heads, head_dim=head_dim, bias=False, zero_out=not post_norm)
        self.post_norm = nn.GroupNorm(1, channels) if post_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the `H * W` positions of `x (B, C, H, W)`."""
        return x + self.post_norm(self.out(linear_attention(self.qkv(self.norm(x)), self.heads)))


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
