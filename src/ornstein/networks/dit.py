"""DiT: a transformer over image patches, conditioned by adaptive layer norms that start at zero, or in other ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ornstein.errors import OrnsteinError
from ornstein.networks.blocks import zero_init
from ornstein.networks.checks import (
    auto_patch_size,
    check_divisible,
    check_heads,
    check_text,
    image_size_pair,
    join_concat,
)
from ornstein.networks.dit_blocks import (
    CONDITIONINGS,
    NORMS,
    DiTBlock,
    Surroundings,
    check_option,
    make_norm,
    modulate,
)
from ornstein.networks.dit_condition import NoiseSettings, condition_tokens, join_tokens, key_mask
from ornstein.networks.dit_positions import Positions
from ornstein.networks.embeddings import ConditionEmbedding


class DiT(nn.Module):
    """Diffusion transformer for images (or latents) of any size that divides into patches.

    Positions are made for the grid at hand, so that a network takes other sizes than it was trained on. Noise level,
    class and caption vector are embedded once a step. An untrained network returns exactly 0, and its blocks, where
    they are modulated, are the identity.

    The condition reaches the tokens in one of four ways: `adaln_zero` modulates norms and gates branches by a linear
    map of its own in each block; `adaln_single` shares that map and gives each block a table, which saves a third of
    a block's parameters; `in_context` prepends noise level, class and caption as tokens; `cross_attention` attends to
    them. With adaLN, caption tokens are attended to in each block.

    Source: Peebles & Xie 2023 (arXiv 2212.09748); adaln_single and captions: Chen et al. 2023 (PixArt-alpha, arXiv
    2310.00426) §2.3; long skips and learned positions: Bao et al. 2023 (U-ViT, arXiv 2209.12152); rotary positions,
    RMS norms, SwiGLU: Yao et al. 2025 (LightningDiT, arXiv 2501.01423); norms of queries and keys: Dehghani et al.
    2023 (arXiv 2302.05442); registers: Darcet et al. 2024 (arXiv 2309.16588). Published sizes of DiT (depth,
    hidden_size, heads): S 12, 384, 6; B 12, 768, 12; L 24, 1024, 16; XL 28, 1152, 16.
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
        text_dim: int | None = None,
        pooled_dim: int | None = None,
        concat_channels: int = 0,
        conditioning: str = "adaln_zero",
        positions: str = "sincos",
        norm: str = "layer",
        qk_norm: str | None = None,
        qkv_bias: bool = True,
        mlp: str = "gelu",
        long_skips: bool = False,
        registers: int = 0,
        noise_embedding: str = "sinusoidal",
        noise_scale: float = 1.0,
        noise_offset: float = 0.0,
        label_std: float = 0.02,
        checkpointing: bool = False,
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
            mlp_ratio: width of the perceptrons relative to `hidden_size`; two thirds of it with SwiGLU.
            dropout: inside the perceptrons, in [0, 1).
            num_classes: classes, or None for an unconditional network; label `num_classes` is the null class.
            text_dim: size of a caption's tokens, or None for a network without captions.
            pooled_dim: size of a caption's vector, added to the noise embedding, or None.
            concat_channels: channels of a conditioning image, joined to the input.
            conditioning: `adaln_zero`, `adaln_single`, `in_context` or `cross_attention`.
            positions: `sincos` (added), `rope` (rotary), `sincos_rope` (both) or `learned` (added).
            norm: `layer` or `rms`.
            qk_norm: norm of queries and keys, per head: None, `layer` or `rms`.
            qkv_bias: biases of queries, keys and values.
            mlp: `gelu` or `swiglu`.
            long_skips: the second half of the blocks takes the outputs of the first half, last to first.
            registers: extra learned tokens, dropped at the end.
            noise_embedding: `sinusoidal` (conditions up to 1000) or `fourier` (of order one); `ddpm` has the sinusoids
                of diffusers' DiT.
            noise_scale: the embedding sees `noise_scale * noise_cond + noise_offset`.
            noise_offset: see `noise_scale`.
            label_std: standard deviation of the label embedding at the start.
            checkpointing: keep only the blocks' inputs for the backward pass and compute them again: less memory,
                about a third more time.

        Raises:
            OrnsteinError: widths or an `image_size` that do not divide, or an unknown option.
        """
        super().__init__()
        check_heads(hidden_size, heads)
        check_option("conditioning", conditioning, CONDITIONINGS)
        check_option("norm", norm, NORMS)
        if long_skips and depth < 2:
            raise OrnsteinError(f"long_skips=true joins pairs of blocks and needs depth of at least 2, got {depth}.")
        if registers < 0:
            raise OrnsteinError(f"registers is a number of tokens, 0 or more, got {registers}.")
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.num_classes = num_classes
        self.text_dim = text_dim
        self.concat_channels = concat_channels
        self.hidden_size = hidden_size
        self.conditioning = conditioning
        self.checkpointing = checkpointing
        self.image_size = image_size_pair(image_size)
        if patch_size is None:
            patch_size = auto_patch_size(self.image_size, grid=8)
        self.patch_size = patch_size
        if self.image_size is not None:
            self._check_size(*self.image_size)
        grid = None if self.image_size is None else self._grid(*self.image_size)
        self.positions = Positions(positions, hidden_size, head_dim=hidden_size // heads, grid=grid)
        self.noise = NoiseSettings(noise_scale, noise_offset, noise_embedding)
        self.embed = ConditionEmbedding(
            hidden_size,
            num_classes=num_classes,
            noise_embedding=noise_embedding,
            label_std=label_std,
            pooled_dim=pooled_dim,
        )
        self.patches = nn.Conv2d(in_channels + concat_channels, hidden_size, patch_size, stride=patch_size)
        modulated = conditioning.startswith("adaln")
        self.first_joined = depth - depth // 2 if long_skips else depth
        self.blocks = nn.ModuleList(
            DiTBlock(
                hidden_size,
                heads=heads,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                conditioning=conditioning,
                norm=norm,
                qk_norm=qk_norm,
                qkv_bias=qkv_bias,
                mlp=mlp,
                context=conditioning == "cross_attention" or (modulated and text_dim is not None),
                long_skip=index >= self.first_joined,
            )
            for index in range(depth)
        )
        self.out_norm = make_norm(norm, hidden_size, affine=not modulated)
        self.modulation: nn.Linear | None = None
        self.out_modulation: nn.Linear | None = None
        self.out_table: nn.Parameter | None = None
        if conditioning == "adaln_zero":
            self.out_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        elif conditioning == "adaln_single":
            self.modulation = nn.Linear(hidden_size, 6 * hidden_size)
            self.out_table = nn.Parameter(torch.zeros(2, hidden_size))
        self.out = nn.Linear(hidden_size, patch_size**2 * self.out_channels)
        self.text: nn.Sequential | None = None
        if text_dim is not None:
            layers = nn.Linear(text_dim, hidden_size), nn.GELU(approximate="tanh"), nn.Linear(hidden_size, hidden_size)
            self.text = nn.Sequential(*layers)
        self.registers = nn.Parameter(0.02 * torch.randn(registers, hidden_size)) if registers else None
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name == "out" or name.endswith(("modulation", "cross.out")):
                    zero_init(module)
                elif name.endswith("long_skip"):
                    nn.init.eye_(module.weight)  # x passes, the earlier output joins as it is learned
                elif name.startswith(("embed.", "text.")):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Initialised as the matrix it is, of patch_size**2 * in_channels inputs.
        nn.init.xavier_uniform_(self.patches.weight.view(self.hidden_size, -1))

    def _check_size(self, height: int, width: int) -> None:
        check_divisible(height, width, self.patch_size, why=f"a DiT of patch_size {self.patch_size}")

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_size, width // self.patch_size

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}embed.mlp.0.weight" in state_dict:
            self.noise.check(state_dict.get(f"{prefix}noise.values"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        x: Tensor,
        noise_cond: Tensor,
        *,
        label: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        """Return the network's output for a batch.

        Args:
            x: `(B, in_channels, H, W)`, scaled to about unit variance.
            noise_cond: `(B,)` noise condition.
            label: `(B,)` integers in `[0, num_classes]`; only and always for a class-conditional network.
            text: `(B, L, text_dim)` caption tokens; only and always for a network with `text_dim`.
            text_mask: `(B, L)`, True for real tokens; None: all are.
            pooled: `(B, pooled_dim)` caption vector; only and always for a network with `pooled_dim`.
            concat: `(B, concat_channels, H, W)`; only and always for a network with `concat_channels`.

        Returns:
            `(B, out_channels, H, W)`.

        Raises:
            OrnsteinError: sides that do not divide, or conditions that do not fit the network.
        """
        batch, _, height, width = x.shape
        self._check_size(height, width)
        check_text(text, text_mask, self.text_dim)
        rows, columns = self._grid(height, width)
        h = self.patches(join_concat(x, concat, self.concat_channels)).flatten(2).transpose(1, 2)
        added = self.positions.added(rows, columns, x.device)
        if added is not None:
            h = h + added.to(h.dtype)
        vector, prefix, around = self._surroundings(
            self.noise(noise_cond), label, text, text_mask, pooled, patches=rows * columns
        )
        extra = 0
        if prefix is not None:
            extra = prefix.shape[1]
            h = join_tokens(prefix.to(h.dtype), h)
        around = around._replace(rotation=self.positions.rotation(rows, columns, x.device, prefix=extra))
        active = None if vector is None else F.silu(vector)
        h = self._run(h, active, around)[:, extra:]
        h = self.out(self._finish(h, vector, active))
        h = h.view(batch, rows, columns, self.patch_size, self.patch_size, self.out_channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, height, width)

    def _surroundings(
        self,
        noise_cond: Tensor,
        label: Tensor | None,
        text: Tensor | None,
        text_mask: Tensor | None,
        pooled: Tensor | None,
        *,
        patches: int,
    ) -> tuple[Tensor | None, Tensor | None, Surroundings]:
        """Return the condition as a vector `(B, D)` or None, tokens to prepend or None, and what is attended to."""
        caption = None if self.text is None or text is None else self.text(text.to(self.out.weight.dtype))
        registers = None
        if self.registers is not None:
            registers = self.registers.expand(noise_cond.shape[0], -1, -1)
        if self.conditioning.startswith("adaln"):
            around = Surroundings(context=caption, context_mask=key_mask(text_mask))
            return self.embed(noise_cond, label, pooled), registers, around
        tokens = condition_tokens(self.embed, noise_cond, label, pooled)
        if self.conditioning == "cross_attention":
            mask = key_mask(text_mask, before=tokens.shape[1])
            return None, registers, Surroundings(context=join_tokens(tokens, caption), context_mask=mask)
        if registers is not None:
            tokens = join_tokens(registers, tokens)
        mask = key_mask(text_mask, before=tokens.shape[1], after=patches)
        return None, join_tokens(tokens, caption), Surroundings(mask=mask)

    def _run(self, h: Tensor, condition: Tensor | None, around: Surroundings) -> Tensor:
        """Take tokens `(B, N, D)` through the blocks under an activated condition `(B, D)`."""
        if self.modulation is not None and condition is not None:
            condition = self.modulation(condition).view(-1, 6, self.hidden_size)
        again = self.checkpointing and torch.is_grad_enabled()
        joined = len(self.blocks) - self.first_joined  # as many outputs are kept as there are blocks to take them
        kept: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            skip = kept.pop() if index >= self.first_joined else None
            if again:
                h = checkpoint(block, h, condition, around, skip, use_reentrant=False)
            else:
                h = block(h, condition, around, skip)
            if index < joined:
                kept.append(h)
        return h

    def _finish(self, h: Tensor, vector: Tensor | None, active: Tensor | None) -> Tensor:
        """Norm patches `(B, N, D)` for the last layer, modulated by the condition `(B, D)` where the blocks are."""
        h = self.out_norm(h)
        if self.out_table is not None and vector is not None:
            shift, scale = (vector[:, None] + self.out_table).chunk(2, dim=1)
        elif self.out_modulation is not None:
            shift, scale = self.out_modulation(active)[:, None].chunk(2, dim=-1)
        else:
            return h
        return modulate(h, shift, scale)
