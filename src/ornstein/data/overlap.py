"""Holding the splits of a data set apart by content: an image that training sees says nothing when it is held out."""

import sys
from collections.abc import Mapping
from typing import Literal, cast

import numpy as np

from ornstein.data.base import KEY_BYTES, ImageDataset, Split
from ornstein.data.options import check_options
from ornstein.errors import OrnsteinError

Overlap = Literal["drop", "refuse", "allow"]
NAMED = 10


def checked_policy(policy: str) -> Overlap:
    """`policy` itself, or an error that names what there is."""
    check_options({"overlap": policy})
    return cast(Overlap, policy)


def apart(found: ImageDataset, others: Mapping[Split, ImageDataset], *, policy: Overlap) -> ImageDataset:
    """A split without the images that others hold, told in one line; itself where there are none.

    Images are compared by `ImageDataset.content_keys`.

    Args:
        found: the split to look at.
        others: what it may not hold: train for val, train and val for test.
        policy: "drop" leaves them out, "refuse" raises, "allow" does not look.

    Raises:
        OrnsteinError: under "refuse", naming the first ten; under "drop" where nothing would be left.
    """
    if policy == "allow":
        return found
    kept = np.ones(len(found), dtype=bool)
    mine = _keys(found)
    for split, other in others.items():
        places = {key: row for row, key in enumerate(_keys(other))}
        twice = [(row, places[key]) for row, key in enumerate(mine) if key in places]
        if not twice:
            continue
        where = f"{len(twice):,} of {len(found):,} {found.split} images of {found.name} are in {split} too"
        if policy == "refuse":
            pairs = "; ".join(f"{_named(found, row)} is {_named(other, there)}" for row, there in twice[:NAMED])
            more = f", and {len(twice) - NAMED} more" if len(twice) > NAMED else ""
            raise OrnsteinError(
                f"{where} ({pairs}{more}): remove them from one of the two, or leave them out with data.overlap=drop"
            )
        kept[[row for row, _ in twice]] = False
        _say(f"{where}: left out of {found.split} (data.overlap=allow keeps them)")
    if kept.all():
        return found
    if not kept.any():
        raise OrnsteinError(
            f"every {found.split} image of {found.name} is in {' or '.join(others)} too, so that none is left: name "
            "other data, or set data.overlap=allow"
        )
    return found.subset(np.flatnonzero(kept))


def _keys(dataset: ImageDataset) -> list[bytes]:
    """The content keys as hashable values."""
    flat = dataset.content_keys.tobytes()
    return [flat[start : start + KEY_BYTES] for start in range(0, len(flat), KEY_BYTES)]


def _named(dataset: ImageDataset, row: int) -> str:
    """An image as its owner knows it: by its file where there is one, else by its number."""
    paths, names = getattr(dataset, "paths", None), getattr(dataset, "file_names", None)
    if names:
        return f"{dataset.split} image {names[row]}"
    return str(paths[row]) if paths else f"{dataset.split} image {row}"


def _say(line: str) -> None:
    """One line on standard error, of one process."""
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only(print)(line, file=sys.stderr, flush=True)
