"""What the loss of each noise level has been over a training, in little memory however long that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_MOST_ROWS = 512  # columns of the picture that are told apart


class LevelHistory:
    """Sums and counts of the losses in each of ``bins`` noise levels, an interval of steps a row.

    When there are more than 512 rows, each two neighbours become one, whose mean is exact.
    """

    def __init__(self, bins: int) -> None:
        self._bins = bins
        self._steps: list[int] = []  # where each interval ends
        self._sums: list[list[float]] = []
        self._counts: list[list[float]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, sums: Sequence[float], counts: Sequence[float]) -> None:
        """Adds the interval from the last row's step to ``step``; one of a step that is there replaces it and what
        follows.
        """
        while self._steps and self._steps[-1] >= step:
            del self._steps[-1], self._sums[-1], self._counts[-1]
        self._steps.append(step)
        self._sums.append(list(sums))
        self._counts.append(list(counts))
        if len(self._steps) > _MOST_ROWS:
            self._halve()

    def _halve(self) -> None:
        odd = len(self._steps) % 2
        pairs = range(odd, len(self._steps), 2)
        kept = slice(0, odd)
        self._sums = self._sums[kept] + [_added(self._sums[i], self._sums[i + 1]) for i in pairs]
        self._counts = self._counts[kept] + [_added(self._counts[i], self._counts[i + 1]) for i in pairs]
        self._steps = self._steps[kept] + [self._steps[i + 1] for i in pairs]

    def means(self) -> tuple[list[int], Tensor]:
        """The step at which each of N intervals ends, and (N, bins) mean losses, NaN where a bin was empty; float64."""
        sums = torch.tensor(self._sums, dtype=torch.float64).reshape(-1, self._bins)
        counts = torch.tensor(self._counts, dtype=torch.float64).reshape(-1, self._bins)
        return list(self._steps), sums / counts

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors."""
        return {
            "steps": torch.tensor(self._steps, dtype=torch.int64),
            "sums": torch.tensor(self._sums, dtype=torch.float64).reshape(-1, self._bins),
            "counts": torch.tensor(self._counts, dtype=torch.float64).reshape(-1, self._bins),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self._steps, self._sums, self._counts = (state_dict[key].tolist() for key in ("steps", "sums", "counts"))


def _added(first: list[float], second: list[float]) -> list[float]:
    return [a + b for a, b in zip(first, second, strict=True)]
