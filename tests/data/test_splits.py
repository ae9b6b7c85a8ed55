"""Splits by content."""

import numpy as np
import pytest

from ornstein.data.base import SPLITS, NoSplit
from ornstein.data.splits import content_key, official_part, official_rows, split_mask, val_mask
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


@pytest.mark.parametrize(("val_fraction", "test_fraction"), [(0.1, 0.1), (0.2, 0.5), (0.01, 0.01), (0.5, 0.49)])
@pytest.mark.parametrize("grouped", [False, True])
def test_three_way_split_leaves_val_as_it_was(val_fraction: float, test_fraction: float, grouped: bool) -> None:
    """Every item in one split, copies together, val that of the two-way split, shares as asked for."""
    items = keys(300) + keys(60)
    groups = [number % 3 for number in range(300)] + [number % 3 for number in range(60)] if grouped else None
    fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction, "groups": groups}
    masks = {split: split_mask(items, split, **fractions) for split in SPLITS}
    assert (sum(mask.astype(int) for mask in masks.values()) == 1).all()
    assert np.array_equal(masks["val"], val_mask(items, val_fraction, groups=groups))
    assert abs(masks["test"][:300].sum() - 300 * test_fraction) <= 3
    for mask in masks.values():
        assert np.array_equal(mask[300:], mask[:60])
    two = split_mask(items, "train", val_fraction=val_fraction, groups=groups)
    assert np.array_equal(two, ~masks["val"]) and (masks["train"] <= two).all()


@pytest.mark.parametrize(
    ("count", "arguments", "fault", "message"),
    [
        (10, {"split": "test", "val_fraction": 0.1}, NoSplit, r"data\.test_fraction"),
        (10, {"split": "val", "val_fraction": 0.5, "test_fraction": 0.5}, OrnsteinError, "nothing to train on"),
        (10, {"split": "val", "val_fraction": 0.5, "test_fraction": -0.1}, OrnsteinError, r"data\.test_fraction=-0\.1"),
        (2, {"split": "test", "val_fraction": 0.1, "test_fraction": 0.1}, OrnsteinError, "fewer than three"),
    ],
)
def test_three_way_refusals(count: int, arguments: dict, fault: type, message: str) -> None:
    with pytest.raises(fault, match=message):
        split_mask(keys(count), **arguments)


def test_three_items_make_three_splits() -> None:
    """At least one each, whatever the fractions."""
    sides = [split_mask(keys(3), split, val_fraction=0.01, test_fraction=0.01).sum() for split in SPLITS]
    assert sides == [1, 1, 1]


@pytest.mark.parametrize(
    ("val_from", "parts"),
    [("test", {"train": "train", "val": "test"}), ("train", {"train": "train", "val": "train", "test": "test"})],
)
def test_official_parts(val_from: str, parts: dict) -> None:
    """What a data set published in two parts serves as which split."""
    for split in SPLITS:
        if split in parts:
            assert official_part(split, val_from, name="x") == parts[split]
        else:
            with pytest.raises(NoSplit, match=r"data\.val_from=train"):
                official_part(split, val_from, name="x")
    with pytest.raises(OrnsteinError, match=r"data\.val_from=both"):
        official_part("val", "both", name="x")


def test_official_rows_read_keys_only_where_needed() -> None:
    untouched = lambda: pytest.fail("read")  # noqa: E731
    for split, val_from in (("train", "test"), ("val", "test"), ("test", "train")):
        assert official_rows(untouched, split, val_from, val_fraction=0.1) is None
    train, val = (official_rows(lambda: keys(50), split, "train", val_fraction=0.2) for split in ("train", "val"))
    assert len(val) == 10 and np.array_equal(np.sort(np.concatenate([train, val])), np.arange(50))
