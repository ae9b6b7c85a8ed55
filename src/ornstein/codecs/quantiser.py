"""Vector quantisation: a codebook, the nearest code of each vector, and how the codebook learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ornstein.errors import OrnsteinError

UPDATES = ("gradient", "ema")


@dataclass(frozen=True)
class Quantised:
    """Vectors replaced by their codes.

    Attributes:
        codes: the codes themselves, (B, C, H, W); gradients go to the codebook, where it has any.
        straight: the same values, whose gradient goes to the vectors as if nothing had been replaced.
        indices: (B, H, W), in [0, codes).
    """

    codes: Tensor
    straight: Tensor
    indices: Tensor


class VectorQuantiser(nn.Module):
    r"""The nearest of ``codes`` vectors, in squared distance, for each position.

    The codebook learns by the gradient of :math:`\|sg[h] - e\|^2`, or as the moving average of what falls to each code.
    Codes that hardly anything falls to are moved to vectors of the running batch, so that none stays dead.

    Sources: van den Oord et al. 2017 (arXiv 1711.00937), eq. 3 and appendix A.1; Esser et al. 2021 (arXiv 2012.09841),
        eq. 2 to 4; restarts of dead codes after Dhariwal et al. 2020 (arXiv 2005.00341).

    Args:
        codes: entries of the codebook, at least 2.
        channels: of each.
        update: gradient or ema.
        decay: of the moving averages, in [0, 1): of each code's share of the vectors, and with ema of the codes.
        revive_below: a code whose share falls below this part of 1 / codes is moved; 0 never moves one.

    Raises: OrnsteinError for a number out of its range.
    """

    codebook: Tensor
    share: Tensor
    sums: Tensor

    def __init__(
        self, codes: int, channels: int, *, update: str = "gradient", decay: float = 0.99, revive_below: float = 0.1
    ) -> None:
        super().__init__()
        if codes < 2 or not 0 <= decay < 1 or not 0 <= revive_below < 1:
            raise OrnsteinError(
                f"a codebook needs codes={codes} of at least 2, decay={decay} and revive_below={revive_below} in "
                "[0, 1)."
            )
        if update not in UPDATES:
            raise OrnsteinError(f"update={update} is unknown: a codebook learns by {' or '.join(UPDATES)}.")
        self.codes, self.channels = int(codes), int(channels)
        self.update_by, self.decay, self.revive_below = update, decay, revive_below
        start = torch.empty(codes, channels).uniform_(-1 / codes, 1 / codes)
        if update == "gradient":
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
            self.register_buffer("sums", start / codes)  # of what falls to each code, per vector of the batch
        self.register_buffer("share", torch.full((codes,), 1 / codes))

    def indices(self, h: Tensor) -> Tensor:
        """(B, C, H, W) -> index of the nearest code at each position, (B, H, W)."""
        # Products of half precision would choose other codes than the ones that are nearest.
        with torch.autocast(h.device.type, enabled=False):
            flat, book = h.detach().float().movedim(1, -1), self.codebook.detach().float()
            # |h - e|^2 less |h|^2, which is the same for every code.
            return (book.square().sum(1) - 2 * (flat @ book.T)).argmin(-1)

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, H, W) -> codes (B, C, H, W)."""
        return nn.functional.embedding(indices, self.codebook).movedim(-1, 1)

    def forward(self, h: Tensor) -> Quantised:
        """(B, C, H, W) -> the nearest codes."""
        indices = self.indices(h)
        codes = self.lookup(indices)
        return Quantised(codes, h + (codes - h).detach(), indices)

    def perplexity(self, indices: Tensor) -> Tensor:
        """Exponential of the entropy of the codes' use: 1 where one is used alone, ``codes`` where all are, alike."""
        share = self._shares(indices.flatten())
        return torch.special.entr(share).sum().exp()

    def _shares(self, flat: Tensor) -> Tensor:
        # By sorting: counting by adding up in place has no fixed order on a GPU, or makes the host wait.
        edges = torch.arange(self.codes + 1, device=flat.device)
        counts = torch.searchsorted(flat.sort().values, edges).diff().float()
        return _mean_over_ranks(counts / flat.numel())

    @torch.no_grad()
    def learn(self, h: Tensor, indices: Tensor, generator: torch.Generator | None = None) -> None:
        """Takes one training batch into the averages, (B, C, H, W) and (B, H, W), and moves codes that are dead.

        ``generator`` draws the vectors that dead codes move to.
        """
        flat, index = h.detach().float().movedim(1, -1).reshape(-1, self.channels), indices.flatten()
        self.share.lerp_(self._shares(index), 1 - self.decay)
        if self.update_by == "ema":
            sums = torch.zeros_like(self.sums).index_add_(0, index, flat) / len(flat)
            self.sums.lerp_(_mean_over_ranks(sums), 1 - self.decay)
            # A share that has vanished keeps its code.
            known = self.share[:, None] > 1e-8
            self.codebook.copy_(torch.where(known, self.sums / self.share[:, None].clamp(min=1e-8), self.codebook))
        if self.revive_below > 0:
            drawn = torch.randint(len(flat), (self.codes,), generator=generator, device=flat.device)
            fresh = _of_first_rank(flat[drawn])
            dead = self.share < self.revive_below / self.codes
            self.codebook.copy_(torch.where(dead[:, None], fresh.to(self.codebook), self.codebook))
            self.share.copy_(torch.where(dead, 1 / self.codes, self.share))
            if self.update_by == "ema":
                self.sums.copy_(torch.where(dead[:, None], fresh / self.codes, self.sums))


def _mean_over_ranks(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def _of_first_rank(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.contiguous()
        dist.broadcast(value, src=0)
    return value
