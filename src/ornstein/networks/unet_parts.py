"""Parts that the U-Net alone has: its stages, filtered resampling, context tokens and label channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ornstein.errors import OrnsteinError
from ornstein.networks.attention import Context
from ornstein.networks.checks import check_text
from ornstein.networks.embeddings import label_table


class Stage(nn.Module):
    """A residual block, the attention after it (or the identity), and perhaps attention to context tokens."""

    def __init__(
        self, block: nn.Module, attention: nn.Module, *, cross: nn.Module | None = None, checkpointing: bool = False
    ) -> None:
        """Join `block(x, embedding)`, `attention(x)` and `cross(x, context)`.

        With `checkpointing` the backward pass computes what lies inside again instead of keeping it.
        """
        super().__init__()
        self.block = block
        self.attention = attention
        self.cross = cross
        self.checkpointing = checkpointing

    def forward(
        self, x: Tensor, embedding: Tensor, context: Context | None = None, *, skip: Tensor | None = None
    ) -> Tensor:
        """Transform `x (B, C, H, W)`, joined by `skip`'s channels, under `embedding (B, E)`, already activated."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, x, embedding, context, skip, use_reentrant=False)
        return self._run(x, embedding, context, skip)

    def _run(self, x: Tensor, embedding: Tensor, context: Context | None, skip: Tensor | None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        h = self.attention(self.block(x, embedding))
        return h if self.cross is None else self.cross(h, context)


class Resample(nn.Module):
    """Halve or double height and width through a separable low-pass filter; no parameters.

    The filter `[1, 1]` averages 2 x 2 pixels going down and repeats them going up (DDPM++, ADM), `[1, 3, 3, 1]` is
    the smoother one of StyleGAN2 and NCSN++. Source: Karras et al. 2020 (arXiv 1912.04958) app. B, where it
    follows Zhang 2019 (arXiv 1904.11486).
    """

    taps: Tensor

    def __init__(self, *, up: bool, taps: Sequence[float] = (1, 1)) -> None:
        """Make the layer; `taps` are an even number of filter coefficients, normalised here.

        Raises:
            OrnsteinError: an odd number of taps (or none), or taps that sum to nothing.
        """
        super().__init__()
        if not taps or len(taps) % 2 or not sum(taps) > 0:
            raise OrnsteinError(
                f"resample_filter is an even number of coefficients with a positive sum, such as [1, 1] or "
                f"[1, 3, 3, 1], got {list(taps)}."
            )
        self.up = up
        self.plain = len(taps) == 2 and taps[0] == taps[1]
        self.padding = (len(taps) - 1) // 2
        line = torch.tensor(taps, dtype=torch.float64) / sum(taps)
        square = line.outer(line).float() * (4 if up else 1)  # up: three of four pixels that it sees are zeros
        self.register_buffer("taps", square, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, 2H, 2W)` or `(B, C, H/2, W/2)`."""
        if self.plain:
            return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.avg_pool2d(x, 2)
        channels = x.shape[1]
        taps = self.taps.to(x.dtype).expand(channels, 1, -1, -1)
        apply = F.conv_transpose2d if self.up else F.conv2d
        return apply(x, taps, stride=2, padding=self.padding, groups=channels)


class FilteredDownConv(nn.Module):
    """3x3 convolution, then half the resolution through the filter of `Resample`, seen as one larger convolution.

    The border is padded once, before the convolution, so that the filter sees it convolved. Source: the
    progressive input of NCSN++ (Song et al. 2021, arXiv 2011.13456, app. H), as EDM's code has it.
    """

    def __init__(self, in_channels: int, out_channels: int, *, taps: Sequence[float]) -> None:
        """Make the layer; `taps` as in `Resample`."""
        super().__init__()
        self.resample = Resample(up=False, taps=taps)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1 + self.resample.padding)
        self.resample.padding = 0

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', H/2, W/2)`."""
        return self.resample(self.conv(x))


class ContextTokens(nn.Module):
    """Tokens for cross-attention: one learned, those of a caption (normalised), one of a label.

    The learned token gives positions something to look at that says nothing, and keeps an empty caption finite.
    """

    def __init__(self, *, text_dim: int | None, num_classes: int | None, channels: int, label_std: float = 1.0) -> None:
        """Make tokens of `text_dim` numbers where there are captions, of `channels` where there are none.

        `num_classes` None: no label token; otherwise label `num_classes` is the null class.
        """
        super().__init__()
        self.text_dim = text_dim
        self.channels = channels if text_dim is None else text_dim
        self.start = nn.Parameter(0.02 * torch.randn(1, 1, self.channels))
        self.norm = None if text_dim is None else nn.LayerNorm(text_dim)
        self.label: nn.Embedding | None = None
        if num_classes is not None:
            self.label = label_table(num_classes, self.channels, std=label_std)

    def forward(self, batch: int, *, label: Tensor | None, text: Tensor | None, mask: Tensor | None) -> Context:
        """Join the tokens of `label (batch,)` and of `text (batch, L, text_dim)` under `mask (batch, L)`.

        Raises:
            OrnsteinError: captions are missing, superfluous or misshapen.
        """
        check_text(text, mask, self.text_dim)
        tokens = [self.start.expand(batch, -1, -1)]
        if self.norm is not None and text is not None:
            tokens.append(self.norm(text.to(self.start.dtype)))
        if self.label is not None and label is not None:
            tokens.append(self.label(label)[:, None])
        if mask is None:
            return Context(torch.cat(tokens, dim=1), None)
        return Context(torch.cat(tokens, dim=1), F.pad(mask.bool(), (1, len(tokens) - 2), value=True))


class LabelChannels(nn.Module):
    """A label's embedding as constant channels beside the input.

    Source: the class-conditional example of Hugging Face's diffusion course (unit 2).
    """

    def __init__(self, num_classes: int, channels: int, *, label_std: float = 1.0) -> None:
        """Make `channels` numbers for each of `num_classes` classes and the null class."""
        super().__init__()
        self.table = label_table(num_classes, channels, std=label_std)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """Join `x (B, C, H, W)` with the channels of `label (B,)`."""
        channels = self.table(label)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return torch.cat([x, channels.to(x.dtype)], dim=1)
