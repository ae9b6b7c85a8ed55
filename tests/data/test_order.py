"""Which images training meets, and in which order, is the same whatever the number of worker processes is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ornstein.data import DataModule, Digits, HuggingFace, ImageFolder

Make = Callable[..., Path]


def hub(folder: Path) -> Callable[[int], DataModule]:
    """Of a folder through `datasets`, decoded at every access."""
    pytest.importorskip("datasets")
    return lambda workers: DataModule(
        partial(HuggingFace, path=str(folder)), batch_size=6, num_workers=workers, seed=4, image_size=8, storage="lazy"
    )


def lazy(folder: Path) -> Callable[[int], DataModule]:
    """Of a folder, decoded at every access."""
    return lambda workers: DataModule(
        ImageFolder, batch_size=6, num_workers=workers, seed=4, root=str(folder), image_size=8, storage="lazy"
    )


def mapped(folder: Path) -> Callable[[int], DataModule]:
    """Of a memory map, classes balanced."""
    options = {"root": str(folder), "image_size": 8, "storage": "mapped", "balanced": True}
    return lambda workers: DataModule(ImageFolder, batch_size=6, num_workers=workers, seed=4, **options)


def memory(folder: Path) -> Callable[[int], DataModule]:
    """In memory, limited."""
    return lambda workers: DataModule(Digits, batch_size=300, num_workers=workers, seed=4, limit=500)


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two batches are equal to the bit."""
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) if isinstance(ours[key], torch.Tensor) else ours[key] == theirs[key]
        for key in ours
    )


@pytest.mark.parametrize("kind", [memory, lazy, mapped, hub])
def test_order_does_not_depend_on_workers(
    kind: Callable[[Path], Callable[[int], DataModule]],
    picture_folder: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """0, 1 and 2 workers give the same batches to the bit, from the start and from the middle, over epochs' seams."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make = kind(picture_folder({"cat": 14, "dog": 9}))
    expected = list(islice(make(0).train_dataloader(), 9))
    assert np.prod(expected[0]["image"].shape) > 0
    for workers in (1, 2):
        found = islice(make(workers).train_dataloader(), 9)
        assert all(same(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        middle = make(workers)
        middle.start_batch = 5
        rest = islice(middle.train_dataloader(), 4)
        assert all(same(ours, theirs) for ours, theirs in zip(rest, expected[5:], strict=True))
