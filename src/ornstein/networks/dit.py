"""DiT: a transformer over image patches, conditioned by adaptive layer norms that start at zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.errors import OrnsteinError
from ornstein.networks.attention import attend
from ornstein.networks.blocks import zero_init
from ornstein.networks.checks import auto_patch_size, check_divisible, check_heads, image_size_pair
from ornstein.networks.embeddings import ConditionEmbedding, sincos_positions


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `x * (1 + scale) + shift` for tokens `x (B, N, D)` and per-sample `shift, scale (B, 1, D)`."""
    return torch.addcmul(shift, x, 1 + scale)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: norms modulated, branches gated by the condition; identity at start.

    Source: Peebles & Xie 2023 (arXiv 2212.09748) §3.2, fig. 3.
    """

    def __init__(self, hidden_size: int, *, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        """Make a block of `hidden_size` channels in `heads` heads with an MLP `mlp_ratio` times as wide."""
        super().__init__()
        check_heads(hidden_size, heads)
        self.heads = heads
        hidden = int(hidden_size * mlp_ratio)
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp_in = nn.Linear(hidden_size, hidden)
        self.dropout = nn.Dropout(dropout)
        self.mlp_out = nn.Linear(hidden, hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Transform tokens `x (B, N, D)` under `condition (B, D)`, already activated."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        batch, tokens, width = x.shape
        qkv = self.qkv(modulate(self.norm1(x), shift1, scale1))
        qkv = qkv.view(batch, tokens, 3 * self.heads, width // self.heads).transpose(1, 2)
        attended = attend(*qkv.chunk(3, dim=1))
        attended = attended.transpose(1, 2).reshape(batch, tokens, width)
        x = torch.addcmul(x, gate1, self.out(attended))
        h = F.gelu(self.mlp_in(modulate(self.norm2(x), shift2, scale2)), approximate="tanh")
        return torch.addcmul(x, gate2, self.mlp_out(self.dropout(h)))


class DiT(nn.Module):
    """Diffusion transformer with adaLN-Zero for images (or latents) of any size that divides into patches.

    Positions are fixed 2-D sines and cosines made for the grid at hand, so that a network takes other sizes
    than it was trained on. An untrained network returns exactly 0.

    Source: Peebles & Xie 2023 (arXiv 2212.09748). Published sizes (depth, hidden_size, heads): S 12, 384, 6;
    B 12, 768, 12; L 24, 1024, 16; XL 28, 1152, 16.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        image_size: int | Sequence[int] | None = None,
        patch_size: int | None = 2,
        hidden_size: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        num_classes: int | None = None,
        noise_embedding: str = "sinusoidal",
        label_std: float = 0.02,
    ) -> None:
        """Make the network.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output; None: as many as the input.
            image_size: side or `(height, width)`, checked at once; None: any size that divides, checked when
                called.
            patch_size: side of a patch; one token per patch. None: the smallest power of two that leaves at
                most 8 patches on the longer side of `image_size`.
            hidden_size: channels of a token, divisible by 4 and by `heads`.
            depth: number of blocks.
            heads: attention heads.
            mlp_ratio: width of the perceptrons relative to `hidden_size`.
            dropout: inside the perceptrons, in [0, 1).
            num_classes: classes, or None for an unconditional network; label `num_classes` is the null class.
            noise_embedding: `sinusoidal` (conditions up to 1000) or `fourier` (of order one).
            label_std: standard deviation of the label embedding at the start.

        Raises:
            OrnsteinError: widths or an `image_size` that do not divide, or an unknown option.
        """
        super().__init__()
        check_heads(hidden_size, heads)
        if hidden_size % 4:
            raise OrnsteinError(f"hidden_size must be divisible by 4 for 2-D positions, got {hidden_size}.")
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.num_classes = num_classes
        self.hidden_size = hidden_size
        self.image_size = image_size_pair(image_size)
        if patch_size is None:
            patch_size = auto_patch_size(self.image_size, grid=8)
        self.patch_size = patch_size
        if self.image_size is not None:
            self._check_size(*self.image_size)
        self._positions: dict[tuple[int, int, torch.device], Tensor] = {}
        self.embed = ConditionEmbedding(
            hidden_size, num_classes=num_classes, noise_embedding=noise_embedding, label_std=label_std
        )
        self.patches = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, heads=heads, mlp_ratio=mlp_ratio, dropout=dropout) for _ in range(depth)
        )
        self.out_norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.out_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, patch_size**2 * self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name == "out" or name.endswith("modulation"):
                    zero_init(module)
                elif name.startswith("embed."):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Initialised as the matrix it is, of patch_size**2 * in_channels inputs.
        nn.init.xavier_uniform_(self.patches.weight.view(self.hidden_size, -1))

    def _check_size(self, height: int, width: int) -> None:
        check_divisible(height, width, self.patch_size, why=f"a DiT of patch_size {self.patch_size}")

    def positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return the positions `(rows * columns, hidden_size)` of a grid of patches, made once per size."""
        key = (rows, columns, device)
        if key not in self._positions:
            self._positions[key] = sincos_positions(rows, columns, self.hidden_size, device=device)
        return self._positions[key]

    def forward(self, x: Tensor, noise_cond: Tensor, *, label: Tensor | None = None) -> Tensor:
        """Return the network's output for a batch.

        Args:
            x: `(B, in_channels, H, W)`, scaled to about unit variance.
            noise_cond: `(B,)` noise condition.
            label: `(B,)` integers in `[0, num_classes]`; only and always for a class-conditional network.

        Returns:
            `(B, out_channels, H, W)`.

        Raises:
            OrnsteinError: sides that do not divide, or labels that do not fit the network.
        """
        batch, _, height, width = x.shape
        self._check_size(height, width)
        rows, columns = height // self.patch_size, width // self.patch_size
        condition = F.silu(self.embed(noise_cond, label))
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = h + self.positions(rows, columns, x.device).to(h.dtype)
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.out_modulation(condition)[:, None].chunk(2, dim=-1)
        h = self.out(modulate(self.out_norm(h), shift, scale))
        h = h.view(batch, rows, columns, self.patch_size, self.patch_size, self.out_channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, height, width)
