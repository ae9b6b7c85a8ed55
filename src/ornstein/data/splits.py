"""Deterministic splits that depend on content, so that equal images never land on both sides."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from ornstein.data.base import NoSplit, Split
from ornstein.data.options import PARTS, check_shares
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
    return _sides(keys, val_fraction, 0.0, groups) == "val"


def split_mask(
    keys: Sequence[bytes],
    split: Split,
    *,
    val_fraction: float,
    test_fraction: float = 0.0,
    groups: Sequence[int] | None = None,
) -> np.ndarray:
    """Which items a split holds: bool (N,). Every item is in one split, and items with equal keys of a group in the
    same one.

    Val is that of `val_mask`, whatever the test fraction; test takes the last of the ordered distinct keys, at least
    one where a group has three, never all that val leaves.

    Args:
        keys, val_fraction, groups: as of `val_mask`.
        split: which one.
        test_fraction: in [0, 1), the share of distinct keys in test. 0: there is no test split.

    Raises:
        NoSplit: test is asked for and `test_fraction` is 0.
        OrnsteinError: a fraction is out of its range, the two leave nothing to train on, or there are too few items.
    """
    check_shares(val_fraction, test_fraction)
    if split == "test" and test_fraction == 0:
        raise NoSplit("there is no test split: set data.test_fraction, to 0.1 say")
    return _sides(keys, val_fraction, test_fraction, groups) == split


def _sides(
    keys: Sequence[bytes], val_fraction: float, test_fraction: float, groups: Sequence[int] | None
) -> np.ndarray:
    """The name of every item's split, (N,)."""
    check_shares(val_fraction)
    members = np.zeros(len(keys), dtype=np.int64) if groups is None else np.asarray(groups)
    sides = np.full(len(keys), "train")
    for group in np.unique(members):
        rows = np.flatnonzero(members == group).tolist()
        distinct = sorted({keys[row] for row in rows})
        if len(distinct) < 2:
            continue
        first = min(max(1, round(val_fraction * len(distinct))), len(distinct) - 1)
        last = min(max(1, round(test_fraction * len(distinct))), len(distinct) - first - 1) if test_fraction else 0
        side = dict.fromkeys(distinct[:first], "val") | dict.fromkeys(distinct[len(distinct) - last :], "test")
        sides[rows] = [side.get(keys[row], "train") for row in rows]
    if not (sides == "val").any() or (test_fraction and not (sides == "test").any()):
        number, wanted = ("three", "train, val and test") if test_fraction else ("two", "train and val")
        raise OrnsteinError(
            f"{len(keys)} image(s) with fewer than {number} different ones among them cannot be split into {wanted}: "
            "add images"
        )
    return sides


def official_part(split: Split, val_from: str, *, name: str) -> Literal["train", "test"]:
    """Which part a split is read from, of a data set that is published as train and test.

    `val_from="test"`: val is the published test part, as papers without model selection have it; there is no test
    split. `val_from="train"`: a share of the published train part is val, and the test part is test.

    Raises:
        NoSplit: test is asked for and val has taken its part.
        OrnsteinError: `val_from` is something else.
    """
    if val_from not in PARTS:
        raise OrnsteinError(f"data.val_from={val_from} does not exist: choose one of {', '.join(PARTS)}")
    if split == "test" and val_from == "test":
        raise NoSplit(f"the test images of {name} are its val: set data.val_from=train to keep the two apart")
    return "train" if split == "train" or (split == "val" and val_from == "train") else "test"


def official_rows(
    keys: Callable[[], Sequence[bytes]],
    split: Split,
    val_from: str,
    *,
    val_fraction: float,
    groups: Sequence[int] | None = None,
) -> np.ndarray | None:
    """The rows of `official_part` that make up a split, ascending; None for all of them.

    Args:
        keys: gives the content keys of the part; called only where they are needed.
        split, val_from: as of `official_part`.
        val_fraction: share of the train part that is val under `val_from="train"`, by content.
        groups: the split is stratified over them.
    """
    if val_from == "test" or split == "test":
        return None
    return np.flatnonzero(split_mask(keys(), split, val_fraction=val_fraction, groups=groups))
