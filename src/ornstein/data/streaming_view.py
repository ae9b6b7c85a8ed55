"""The first images of a stream as a data set that can be indexed: decoded once into a cached memory map."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ornstein.data.bad import Bad, write_json
from ornstein.data.base import KEY_BYTES, ImageDataset, Split
from ornstein.data.fetch import cache_dir
from ornstein.data.stored import DECODING, MappedImages
from ornstein.data.streaming import Decode, Decoded, Record, Source, in_order
from ornstein.errors import OrnsteinError

FORMAT = "ornstein.stream.1"
BAR_FROM = 2000


def first_images(
    source: Source,
    decode: Decode,
    *,
    count: int,
    identity: Sequence[str],
    name: str,
    split: Split,
    max_bad: int,
    stops: Sequence[int] | None = None,
) -> ImageDataset:
    """The first `count` images of a stream in the order of its shards, or all where it has fewer.

    They lie as a memory map in the cache folder, under a digest of what they are made of, and are decoded only where
    it is not there; it appears whole or not at all.

    Args:
        source, decode, stops: as of `Stream`.
        identity: what stands for the shards' content.
        name, split: of the data set; where the stream goes on behind them the name says how many they are.
        max_bad: bad samples that may be left out.

    Raises:
        OrnsteinError: a shard cannot be had, too many samples are bad, there are no images, or no room.
    """
    facts = (FORMAT, DECODING, decode.size, decode.channels, decode.crop, decode.classes, decode.captions)
    held_out = hashlib.sha256(b"".join(sorted(decode.held_out))).hexdigest()
    digest = hashlib.sha256(repr((*facts, decode.template, held_out, count, stops, list(identity))).encode())
    place = cache_dir() / "streams" / f"{digest.hexdigest()[:32]}.npy"
    facts_of = _read(place)
    if facts_of is None:
        bad = Bad(max_bad, where=f"the {split} stream")
        facts_of = _write(place, _shown(in_order(source, decode, bad=bad, stops=stops), count), decode, count=count)
        bad.settle(place.with_suffix(".bad.json"))
    keys = np.frombuffer(bytes.fromhex(facts_of["keys"]), dtype=np.uint8).reshape(-1, KEY_BYTES)
    if not len(keys):
        raise OrnsteinError(f"the {split} shards, {source.shards[0]} the first, hold no images: name others")
    return ImageDataset(
        MappedImages(place),
        name=name if facts_of["all"] else f"{name}, its first {len(keys):,}",
        split=split,
        labels=None if decode.classes is None else np.array(facts_of["labels"], dtype=np.int64),
        class_names=decode.classes or (),
        captions=facts_of["captions"],
        content=DECODING.encode() + decode.crop.encode() + keys.tobytes(),
        keys=keys,
    )


def _shown(samples: Iterator[tuple[Record, Decoded]], count: int) -> Iterator[Decoded]:
    """The samples, with a progress bar where there are many."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet = count < BAR_FROM or not console.is_terminal
    plain = (sample for _, sample in samples)
    yield from track(plain, "decoding images", total=count, console=console, transient=True, disable=quiet)


def _write(place: Path, samples: Iterator[Decoded], decode: Decode, *, count: int) -> dict[str, Any]:
    """Writes the map, then the facts beside it, without which it does not count; returns these."""
    labels: list[int | None] = []
    captions: list[str | None] = []
    keys: list[bytes] = []

    def put(file: BinaryIO) -> None:
        shape = (decode.channels, decode.size, decode.size)
        # The head leaves room for any number of images: it is written again once that is known.
        _head(file, (count, *shape))
        start = file.tell()
        for sample in islice(samples, count):
            file.write(sample.image.tobytes())
            labels.append(sample.label)
            captions.append(sample.caption)
            keys.append(sample.key)
        file.seek(0)
        _head(file, (len(keys), *shape))
        assert file.tell() == start

    _whole(place, put)
    facts = {
        "keys": b"".join(keys).hex(),
        "labels": None if decode.classes is None else labels,
        "captions": captions if keys and captions[0] is not None else None,
        # One image more would have been read, had there been one.
        "all": len(keys) < count or next(samples, None) is None,
    }
    write_json(place.with_suffix(".json"), facts)
    return facts


def _head(file: BinaryIO, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _whole(place: Path, put: Callable[[BinaryIO], None]) -> None:
    """Writes a file whole or not at all."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                put(file)
            os.replace(name, place)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise OrnsteinError(
            f"decoded images cannot be written below {place.parent} ({error.strerror or error}): free some room, set "
            "XDG_CACHE_HOME to a larger disk, or lower data.reference_images and data.val_limit"
        ) from error


def _read(place: Path) -> dict[str, Any] | None:
    """The facts beside a map; None where the two are not there, or do not belong together."""
    try:
        facts: dict[str, Any] = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
        known = len(facts["keys"]) == 2 * KEY_BYTES * MappedImages(place).shape[0]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if known else None
