"""What a data set gives to be prepared: its images in shards, decoded by as many processes as there are cores.

Images that are decoded as they are read are asked for in small pieces, so that a data set larger than memory passes
through; one that cannot be read is left out and named.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ornstein.data.base import ImageDataset, Split
from ornstein.data.prepared_write import Piece, Shard
from ornstein.errors import OrnsteinError

SHARD_BYTES = 1 << 26
PIECE_BYTES = 1 << 21
MOST_IN_PIECE = 64

Sets = dict[Split, ImageDataset]


def shard_size(images: ImageDataset) -> int:
    """Images in a shard of about 64 MB."""
    return max(1, SHARD_BYTES // image_bytes(images))


def image_bytes(images: ImageDataset) -> int:
    """Bytes of one image and of what it is conditioned on, the largest shape of them."""
    height, width = max(shapes_of(images) or [(images.image_size, images.image_size)], key=lambda shape: np.prod(shape))
    return (images.channels + (condition_channels(images) or 0)) * int(height) * int(width)


def condition_channels(images: ImageDataset) -> int | None:
    """Channels of what the images are conditioned on; None without."""
    return None if images.conditions is None else int(images.conditions.shape[1])


def shapes_of(images: ImageDataset) -> list[tuple[int, int]]:
    """(height, width) of every shape; empty for a data set of one."""
    return [] if images.bucket_of is None else [(int(h), int(w)) for h, w in images.shapes]


def source_of(images: ImageDataset) -> str:
    """A digest (32 hex digits) of a split: its images by their content keys, and labels, captions, classes."""
    return _digest(images, np.arange(len(images)))


def plan(sets: Sets, *, shard_images: int) -> list[Shard]:
    """Every shard of the data set, split by split and shape by shape."""
    return [
        Shard(split, below, number, rows[start : start + shard_images], _digest(images, rows[start:][:shard_images]))
        for split, images in sets.items()
        for below, rows in _parts(split, images)
        for number, start in enumerate(range(0, len(rows), shard_images))
    ]


def read(
    sets: Sets, shards: Sequence[Shard], *, workers: int | None, advance: Callable[[int], None]
) -> Iterator[tuple[Shard, Piece]]:
    """The images of shards, in their order.

    Args:
        sets: the splits.
        shards: of `plan`.
        workers: processes that decode; 0 is this one, None as many as there are cores, and this one for what lies in
            memory already.
        advance: called with a number of images as they come in.
    """
    jobs = [(at, rows) for at, shard in enumerate(shards) for rows in _pieces(shard, sets[shard.split])]
    splits = [shard.split for shard in shards]
    loader = DataLoader(
        _Decoding(sets, splits, jobs),
        batch_size=None,
        num_workers=_cores(sets) if workers is None else workers,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_leave_with, os.getpid()),
        generator=torch.Generator().manual_seed(0),  # making an iterator must not move the global one
    )

    def counted() -> Iterator[tuple[int, Piece]]:
        for at, piece in loader:
            advance(len(piece.rows) + len(piece.bad))
            yield at, piece

    for at, pieces in groupby(counted(), key=lambda found: found[0]):
        yield shards[at], joined([piece for _, piece in pieces])


def read_stream(
    data: Any, split: Split, *, shard_images: int, advance: Callable[[int], None]
) -> Iterator[tuple[Shard, Piece]]:
    """The images of a split of a `StreamModule`, once, shard by shard.

    A stream is read from its start whatever shards there are already: it cannot be entered in the middle.
    """
    source = hashlib.blake2b(repr((data.fingerprint, split)).encode(), digest_size=16).hexdigest()
    waiting: list[Piece] = []
    taken = number = 0
    for batch in data.read(split):
        images = np.asarray(batch["image"])
        advance(len(images))
        rows = np.arange(taken, taken + len(images))
        labels = np.asarray(batch["label"]) if "label" in batch else None
        waiting.append(Piece(images, rows, np.asarray(batch["keys"]), labels, batch.get("caption")))
        taken += len(images)
        while sum(len(piece.rows) for piece in waiting) >= shard_images:
            whole = joined(waiting)
            piece, rest = _cut(whole, slice(shard_images)), _cut(whole, slice(shard_images, None))
            yield Shard(split, split, number, piece.rows, source), piece
            number, waiting = number + 1, [rest]
    last = joined(waiting) if waiting else None
    if last is not None and len(last.rows):
        yield Shard(split, split, number, last.rows, source), last


def joined(pieces: Sequence[Piece]) -> Piece:
    """Several pieces as one."""
    bad = tuple(each for piece in pieces for each in piece.bad)
    pieces = [piece for piece in pieces if len(piece.rows)] or pieces[:1]  # an empty one may have another shape
    first = pieces[0]
    return Piece(
        np.concatenate([piece.images for piece in pieces]),
        np.concatenate([piece.rows for piece in pieces]),
        np.concatenate([piece.keys for piece in pieces]),
        None if first.labels is None else np.concatenate([piece.labels for piece in pieces]),
        None if first.captions is None else [text for piece in pieces for text in piece.captions or ()],
        None if first.conditions is None else np.concatenate([piece.conditions for piece in pieces]),
        bad,
    )


def _cut(piece: Piece, part: slice) -> Piece:
    lists = (piece.images, piece.rows, piece.keys, piece.labels, piece.captions, piece.conditions)
    return Piece(*(None if each is None else each[part] for each in lists))  # type: ignore[arg-type]


class _Decoding(Dataset[tuple[int, Piece]]):
    """Pieces of shards by number, decoded where they are asked for: in a worker process, say."""

    def __init__(self, sets: Sets, splits: list[Split], jobs: list[tuple[int, np.ndarray]]) -> None:
        self.sets, self.splits, self.jobs = sets, splits, jobs
        for images in sets.values():
            _ = images.content_keys  # once, before there are workers

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> tuple[int, Piece]:
        at, rows = self.jobs[number]
        return at, read_rows(self.sets[self.splits[at]], rows)


def read_rows(images: ImageDataset, rows: np.ndarray) -> Piece:
    """Images by number, those that cannot be read left out and named."""
    bad: list[tuple[str, str]] = []
    kept = rows
    try:
        pixels, conditions = _pixels(images, rows)
    except OrnsteinError:
        found = []
        for row in rows.tolist():
            try:
                found.append((row, _pixels(images, np.array([row]))))
            except OrnsteinError as error:
                name = getattr(error, "name", None) or f"{images.split} image {row}"
                bad.append((name, getattr(error, "reason", None) or str(error)))
        kept = np.array([row for row, _ in found], dtype=np.int64)
        empty = np.empty((0, *images.images.shape[1:]), dtype=np.uint8)
        pixels = np.concatenate([each for _, (each, _) in found]) if found else empty
        own = [each for _, (_, each) in found if each is not None]
        conditions = np.concatenate(own) if own else None
    return Piece(
        pixels,
        kept,
        images.content_keys[kept],
        None if images.labels is None else images.labels[kept],
        None if images.captions is None else [images.captions[row] for row in kept.tolist()],
        conditions,
        tuple(bad),
    )


def _pixels(images: ImageDataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    found = np.ascontiguousarray(images.images[rows])
    return found, None if images.conditions is None else np.ascontiguousarray(images.conditions[rows])


def _pieces(shard: Shard, images: ImageDataset) -> list[np.ndarray]:
    """The rows of a shard in pieces of about two megabytes, so that cores share even the last shard."""
    size = min(MOST_IN_PIECE, max(1, PIECE_BYTES // image_bytes(images)))
    return [shard.rows[start : start + size] for start in range(0, len(shard.rows), size)]


def _parts(split: Split, images: ImageDataset) -> list[tuple[str, np.ndarray]]:
    """The folders of a split's shards, and the images that belong in each: one, or one a shape."""
    bucket_of = images.bucket_of
    if bucket_of is None:
        return [(split, np.arange(len(images)))]
    named = [(f"{split}/{h}x{w}", np.flatnonzero(bucket_of == b)) for b, (h, w) in enumerate(shapes_of(images))]
    return [(below, rows) for below, rows in named if len(rows)]


def _digest(images: ImageDataset, rows: np.ndarray) -> str:
    digest = hashlib.blake2b(repr((images.name, images.class_names)).encode(), digest_size=16)
    digest.update(rows.astype("<i8").tobytes() + images.content_keys[rows].tobytes())
    if images.labels is not None:
        digest.update(images.labels[rows].astype("<i8").tobytes())
    if images.captions is not None:
        digest.update("\0".join(images.captions[row] for row in rows.tolist()).encode())
    return digest.hexdigest()


def _cores(sets: Sets) -> int:
    """Worker processes that serve a data set: none for arrays that are in memory."""
    arrays = [each for images in sets.values() for each in (images.images, images.conditions) if each is not None]
    return 0 if all(isinstance(each, np.ndarray) for each in arrays) else len(os.sched_getaffinity(0))


def _leave_with(parent: int, _: int) -> None:
    """Ends a worker whose parent was killed: it would wait for ever that somebody takes its images."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_it_is(found: Any) -> Any:
    return found
