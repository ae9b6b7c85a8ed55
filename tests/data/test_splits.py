"""Splits by content."""

import numpy as np
import pytest

from ornstein.data.splits import content_key, val_mask
from ornstein.errors import OrnsteinError


def keys(count: int) -> list[bytes]:
    """Distinct keys."""
    return [content_key(str(number).encode()) for number in range(count)]


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"),
    [(100, 0.1, 10), (1797, 0.2, 359), (2, 0.1, 1), (2, 0.9, 1), (10, 0.01, 1)],
)
def test_count(count: int, fraction: float, held_out: int) -> None:
    """The rounded share, at least one, never all."""
    assert val_mask(keys(count), fraction).sum() == held_out


def test_order_does_not_matter_and_copies_stay_together() -> None:
    """Shuffled, with copies: every key keeps its side."""
    originals = keys(200)
    side = dict(zip(originals, val_mask(originals, 0.3), strict=True))
    shuffled = [originals[i] for i in np.random.default_rng(1).integers(0, 200, 1000)] + originals
    assert all(side[key] == held for key, held in zip(shuffled, val_mask(shuffled, 0.3), strict=True))


def test_adding_moves_few() -> None:
    """Ten new keys can push at most ten old ones off their side."""
    before, after = val_mask(keys(1000), 0.1), val_mask(keys(1010), 0.1)[:1000]
    assert (before != after).sum() <= 10


def test_groups_are_split_each() -> None:
    """Stratified; a group that cannot be split trains."""
    groups = [0] * 50 + [1] * 10 + [2]
    mask = val_mask(keys(61), 0.2, groups=groups)
    assert np.bincount(np.array(groups)[mask], minlength=3).tolist() == [10, 2, 0]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0])
def test_fraction_is_checked(fraction: float) -> None:
    """Only a real share."""
    with pytest.raises(OrnsteinError, match="val_fraction"):
        val_mask(keys(10), fraction)


@pytest.mark.parametrize("items", [[], [b"a"], [b"a", b"a"]])
def test_too_few(items: list[bytes]) -> None:
    """One image, however often, makes no two splits."""
    with pytest.raises(OrnsteinError, match="cannot be split"):
        val_mask(items, 0.5)
