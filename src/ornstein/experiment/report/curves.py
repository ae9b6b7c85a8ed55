"""Curves of a run for a page: rounded, and of long runs as many rows as a plot can show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

POINTS = 6000  # of a curve, over all runs of a page
FEWEST = 100  # of a run's
_DIGITS = 5


def thinned(curves: Mapping[str, Sequence[float | None]], most: int) -> dict[str, list[float | None]]:
    """Columns with about ``most`` values each, evenly spaced over those that they have, the first and last among them.

    Curves that are written at the same steps stay so: a row is kept whole that any of them needs.
    """
    values = {name: [_plain(value) for value in column] for name, column in curves.items()}
    kept: set[int] = set()
    for column in values.values():
        rows = [row for row, value in enumerate(column) if value is not None]
        if len(rows) > most:
            rows = [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]
        kept |= set(rows)
    rows = sorted(kept)
    return {name: [column[row] for row in rows] for name, column in values.items()}


def _plain(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    # Steps and images are whole and exact; of a loss nobody reads a sixth digit.
    return int(value) if float(value).is_integer() else float(f"{value:.{_DIGITS}g}")
