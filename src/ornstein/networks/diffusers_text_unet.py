"""Adapter that makes diffusers' UNet2DConditionModel a network of ours; diffusers is imported when one is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError
from ornstein.networks.checks import check_divisible, check_pooled, check_text, image_size_pair, join_concat
from ornstein.networks.diffusers_unet import diffusers_config, their_arguments
from ornstein.networks.embeddings import check_labels

DEFAULT_CONTEXT = 64  # numbers of a context token where there are no captions to say
_OWN = (
    "sample_size",
    "num_class_embeds",
    "class_embed_type",
    "time_embedding_type",
    "time_cond_proj_dim",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "addition_embed_type",
)


class DiffusersUNet2DCondition(nn.Module):
    """diffusers' `UNet2DConditionModel`, Stable Diffusion's U-Net, behind our signature.

    What conditions it, and where it goes: caption tokens into the cross-attention (`encoder_hidden_states`), through
    diffusers' own projection where they are not as wide as its context; the pooled caption onto the noise embedding
    (`timestep_cond`); a class onto the noise embedding (`label_mode: add`, diffusers' table) or into the context as a
    learned token behind the caption's (`label_mode: cross_attention`). Without captions and class tokens its
    cross-attention sees one learned token.

    diffusers' weights are its state dict's under `model.`. Source: Rombach et al. 2022 (arXiv 2112.10752).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        image_size: int | Sequence[int] | None = None,
        num_classes: int | None = None,
        text_dim: int | None = None,
        pooled_dim: int | None = None,
        concat_channels: int = 0,
        label_mode: str = "cross_attention",
        cross_attention_dim: int | None = None,
        noise_embedding: str = "sinusoidal",
        **config: Any,
    ) -> None:
        """Make the network.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output; None: as many as the input.
            image_size: side or `(height, width)`, checked at once and passed on as `sample_size`.
            num_classes: classes, or None for a network without labels; the null class is one row more.
            text_dim: size of a caption's tokens, or None for a network without captions.
            pooled_dim: size of a caption's pooled vector, or None for a network without one.
            concat_channels: channels of a conditioning image joined to the input.
            label_mode: `cross_attention` (a token per class) or `add` (to the noise embedding).
            cross_attention_dim: size of what the blocks attend to; None: `text_dim`, or 64 without captions.
            noise_embedding: `sinusoidal` only: diffusers' Fourier form divides its output by the condition.
            config: all other arguments of `UNet2DConditionModel`, such as `block_out_channels`.

        Raises:
            OrnsteinError: an unknown option, an argument that this adapter sets itself, or an `image_size` that does
                not divide.
        """
        super().__init__()
        if label_mode not in ("add", "cross_attention"):
            raise OrnsteinError(f"label_mode is 'add' or 'cross_attention', got '{label_mode}'.")
        config = diffusers_config("DiffusersUNet2DCondition", config, noise_embedding=noise_embedding, own=_OWN)
        from diffusers import UNet2DConditionModel

        size = image_size_pair(image_size)
        width = cross_attention_dim or text_dim or DEFAULT_CONTEXT
        projected = text_dim is not None and text_dim != width
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.num_classes = num_classes
        self.text_dim, self.pooled_dim, self.concat_channels = text_dim, pooled_dim, concat_channels
        self.label_mode = label_mode
        self.image_size = size
        table = num_classes is not None and label_mode == "add"
        with their_arguments("UNet2DConditionModel"):
            model: Any = UNet2DConditionModel(
                sample_size=size,
                in_channels=in_channels + concat_channels,
                out_channels=self.out_channels,
                num_class_embeds=num_classes + 1 if num_classes is not None and table else None,
                time_cond_proj_dim=pooled_dim,
                cross_attention_dim=width,
                encoder_hid_dim=text_dim if projected else None,
                encoder_hid_dim_type="text_proj" if projected else None,
                **config,
            )
        self.model = model
        token = text_dim or width
        self.classes = None if num_classes is None or table else nn.Embedding(num_classes + 1, token)
        self.constant = nn.Parameter(torch.randn(1, 1, token)) if text_dim is None and self.classes is None else None
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)
        if size is not None:
            self._check_size(*size)

    def _check_size(self, height: int, width: int) -> None:
        check_divisible(height, width, self.factor, why=f"a U-Net of {self.factor} x downsampling")

    def context(
        self, batch: int, label: Tensor | None, text: Tensor | None, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens `(batch, L', D)` that blocks attend to, and which of them are real (None: all)."""
        if self.constant is not None:
            return self.constant.expand(batch, -1, -1), None
        parts = [] if text is None else [text.to(self.model.dtype)]
        if self.classes is not None:
            parts.append(self.classes(label)[:, None])
            if text_mask is not None:
                text_mask = nn.functional.pad(text_mask, (0, 1), value=True)
        return torch.cat(parts, dim=1), text_mask

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
            text: `(B, L, text_dim)` caption tokens; only and always for a network with captions.
            text_mask: `(B, L)` bool, True where a token is real; None: all are.
            pooled: `(B, pooled_dim)`; only and always for a network with a pooled vector.
            concat: `(B, concat_channels, H, W)`; only and always for a network with a conditioning image.

        Returns:
            `(B, out_channels, H, W)`.

        Raises:
            OrnsteinError: sides that do not divide, or conditioning that does not fit the network.
        """
        self._check_size(x.shape[-2], x.shape[-1])
        check_labels(label, self.num_classes)
        check_text(text, text_mask, self.text_dim)
        check_pooled(pooled, self.pooled_dim)
        x = join_concat(x, concat, self.concat_channels)
        tokens, mask = self.context(x.shape[0], label, text, text_mask)
        return self.model(
            x,
            noise_cond,
            encoder_hidden_states=tokens,
            encoder_attention_mask=mask,
            class_labels=label if self.classes is None else None,
            timestep_cond=None if pooled is None else pooled.to(self.model.dtype),
            return_dict=False,
        )[0]
