"""A uniform subset of numbered rows in bounded memory, the same however the rows arrive."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Rows = dict[str, Tensor]


def ranks_of(index: Tensor, seed: int = 0) -> Tensor:
    """A pseudo-random rank, int64 in [0, 2**63), for each image number: a hash of (seed, number) and of nothing else.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """
    with np.errstate(over="ignore"):
        state = index.cpu().numpy().astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state ^= state >> np.uint64(31)
    return torch.from_numpy((state >> np.uint64(1)).astype(np.int64))


class Subset:
    """Keeps the ``limit`` rows whose image numbers have the lowest ranks.

    The subset is uniform and depends on the numbers alone: not on batch size, order, or which process saw which row.

    Args:
        limit: how many rows at most.
        widths: name and width of each kind of row (features, logits, ...), all kept side by side in float32.
        seed: of the ranks.
    """

    def __init__(self, limit: int, widths: dict[str, int], *, seed: int = 0) -> None:
        self.limit, self.widths, self.seed = limit, widths, seed
        self._slack = max(1024, limit // 4)
        self._parts: list[Rows] = []
        self._length = 0
        self._highest: int | None = None

    def add(self, index: Tensor, rows: Rows) -> None:
        """Takes in rows ``(B, width)`` of images number ``index (B,)``."""
        index = index.cpu()
        ranks = ranks_of(index, self.seed)
        wanted = torch.ones(len(ranks), dtype=torch.bool) if self._highest is None else ranks < self._highest
        if not wanted.any():
            return
        part = {name: rows[name].detach()[wanted.to(rows[name].device)].float().cpu() for name in self.widths}
        self._parts.append({"index": index[wanted], "rank": ranks[wanted], **part})
        self._length += int(wanted.sum())
        if self._length > self.limit + self._slack:
            kept = _lowest(self._joined(), self.limit)
            self._parts, self._length = [kept], len(kept["rank"])
            if self._length:
                self._highest = int(kept["rank"].max())

    def rows(self, gather: Callable[[Tensor], Tensor] | None = None) -> Rows:
        """The kept rows in order of image number, with their ``index``.

        Args:
            gather: joins a tensor's rows over all processes (collective); none is one process's own.
        """
        kept = _lowest(self._joined(), self.limit)
        if gather is not None:
            ranks = gather(kept["rank"])
            if len(ranks) > self.limit:  # nobody sends what nobody keeps
                below = kept["rank"] <= ranks.kthvalue(self.limit).values
                kept = {name: value[below] for name, value in kept.items()}
            kept = {name: gather(value) for name, value in kept.items()}
        order = kept["index"].argsort(stable=True)
        return {name: value[order] for name, value in kept.items() if name != "rank"}

    def _joined(self) -> Rows:
        empty = {name: torch.empty(0, width) for name, width in self.widths.items()}
        none = torch.empty(0, dtype=torch.int64)
        parts = [{"index": none, "rank": none, **empty}, *self._parts]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _lowest(rows: Rows, limit: int) -> Rows:
    if len(rows["rank"]) <= limit:
        return rows
    places = rows["rank"].topk(limit, largest=False).indices
    return {name: value[places] for name, value in rows.items()}
