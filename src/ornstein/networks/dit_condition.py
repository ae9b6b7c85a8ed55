"""What a transformer is told beside the image: how it reads the noise level, and conditions as tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.errors import OrnsteinError
from ornstein.networks.checks import check_pooled
from ornstein.networks.embeddings import ConditionEmbedding, check_labels

USUAL = (1.0, 0.0, 0.0)  # scale, offset, and sinusoids in the usual order


class NoiseSettings(nn.Module):
    r"""How a network reads its noise condition c: the embedding sees :math:`scale\,c + offset`.

    Weights of other libraries were trained on other clocks (time that runs from noise to data, for one), which an
    affine map takes ours to. Settings other than the usual ones are written into the state dict, as `values`, so that
    weights cannot be read by a network that has others: their shapes would not tell.
    """

    values: Tensor

    def __init__(self, scale: float, offset: float, noise_embedding: str) -> None:
        """Keep the numbers, and whether the embedding is one of the two in another order than usual."""
        super().__init__()
        self.scale, self.offset = float(scale), float(offset)
        self.settings = (self.scale, self.offset, float(noise_embedding in ("ddpm", "ncsnpp")))
        if self.settings != USUAL:
            self.register_buffer("values", torch.tensor(self.settings))

    def forward(self, noise_cond: Tensor) -> Tensor:
        """Map `(B,)` noise conditions to what the embedding sees; in float32 at least, where they change."""
        if self.scale == 1.0 and self.offset == 0.0:
            return noise_cond
        noise_cond = noise_cond if noise_cond.dtype == torch.float64 else noise_cond.float()
        return self.scale * noise_cond + self.offset

    def check(self, stored: Tensor | None) -> None:
        """Refuse weights that were trained with other settings (`stored`; None: the usual ones).

        Raises:
            OrnsteinError: names the options to set.
        """
        if stored is not None and stored.is_meta:
            return
        theirs = USUAL if stored is None else tuple(float(value) for value in stored)
        # A network cast to bfloat16 keeps three digits of them.
        if all(abs(a - b) <= 0.01 * max(abs(a), abs(b)) for a, b in zip(self.settings, theirs, strict=True)):
            return
        order = "ddpm (or ncsnpp)" if theirs[2] else "sinusoidal (or fourier)"
        raise OrnsteinError(
            "These weights read the noise level in another way than this network, with noise_embedding="
            f"{order}, noise_scale={theirs[0]:.6g} and noise_offset={theirs[1]:.6g}: set these in model.network."
        )


def condition_tokens(
    embed: ConditionEmbedding, noise_cond: Tensor, label: Tensor | None, pooled: Tensor | None
) -> Tensor:
    """Return what `embed` would add up as tokens `(B, n, D)`: the noise level's, then label's and pooled vector's.

    Source: Peebles & Xie 2023 (arXiv 2212.09748) §3.2, in-context conditioning and cross-attention.
    """
    check_labels(label, embed.num_classes)
    check_pooled(pooled, None if embed.pooled is None else embed.pooled.in_features)
    tokens = [embed.mlp(embed.features(noise_cond).to(embed.mlp[0].weight.dtype))]
    if embed.label is not None:
        tokens.append(embed.label(label))
    if embed.pooled is not None:
        tokens.append(embed.pooled(pooled))
    return torch.stack(tokens, dim=1)


def join_tokens(first: Tensor, second: Tensor | None) -> Tensor:
    """Return one sequence `(B, n + m, D)` of two, the second optional, in the first's type."""
    return first if second is None else torch.cat([first, second.to(first.dtype)], dim=1)


def key_mask(mask: Tensor | None, *, before: int = 0, after: int = 0) -> Tensor | None:
    """Return attention's mask `(B, 1, 1, before + L + after)` of a caption's `(B, L)`; the others are all seen.

    Attention must see something: a caption without any real token, where it stands alone, is seen whole.
    """
    if mask is None:
        return None
    mask = F.pad(mask.bool(), (before, after), value=True)
    return (mask | ~mask.any(dim=-1, keepdim=True))[:, None, None]
