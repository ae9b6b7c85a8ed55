"""Deterministic splits that depend on content, so that equal images never land on both sides."""

import hashlib
from collections.abc import Sequence

import numpy as np

from ornstein.errors import OrnsteinError


def content_key(content: bytes) -> bytes:
    """A key for `val_mask`: 16 bytes, equal for equal content, else as good as random."""
    return hashlib.blake2b(content, digest_size=16).digest()


def val_mask(keys: Sequence[bytes], val_fraction: float, *, groups: Sequence[int] | None = None) -> np.ndarray:
    """Which items are held out: bool (N,), True for val.

    In every group the distinct keys are put in order, and the first `round(val_fraction * number)` of them,
    at least one and never all, go to val with every item that bears them. So items with equal keys stay
    together within a group, whatever the order of the items, and adding items moves few others.

    Args:
        keys: N keys (`content_key`).
        val_fraction: in (0, 1), the share of distinct keys that is held out.
        groups: N integers; the split is stratified over them. Default: one group.

    Raises:
        OrnsteinError: the fraction is outside (0, 1), or nothing can be held out since no group has two
            distinct keys.
    """
    if not 0 < val_fraction < 1:
        raise OrnsteinError(f"val_fraction is {val_fraction}: give a number between 0 and 1, such as 0.1")
    members = np.zeros(len(keys), dtype=np.int64) if groups is None else np.asarray(groups)
    held_out = np.zeros(len(keys), dtype=bool)
    for group in np.unique(members):
        rows = np.flatnonzero(members == group).tolist()
        distinct = sorted({keys[row] for row in rows})
        if len(distinct) < 2:
            continue
        count = min(max(1, round(val_fraction * len(distinct))), len(distinct) - 1)
        chosen = set(distinct[:count])
        held_out[rows] = [keys[row] in chosen for row in rows]
    if not held_out.any():
        raise OrnsteinError(
            f"{len(keys)} image(s) with fewer than two different ones among them cannot be split into train "
            "and val: add images"
        )
    return held_out
