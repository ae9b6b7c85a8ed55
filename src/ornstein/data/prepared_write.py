"""Writing a folder of prepared images, shard by shard: resumable, and whole or not at all."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ornstein.data.base import Split
from ornstein.data.prepared import FORMAT, condition_path, shard_facts
from ornstein.data.shards import INDEX, array_path, checksum, facts_path, read_index
from ornstein.data.shards_write import (
    LOCK_START,
    Claims,
    beside,
    check_place,
    check_room,
    clear_left,
    replace,
    save_array,
    sync,
    told_when_full,
)
from ornstein.errors import OrnsteinError


@dataclass(frozen=True, eq=False)
class Shard:
    """A file of images to be.

    Attributes:
        split: of the data set.
        below: its folder below the prepared one: the split, or `split/HEIGHTxWIDTH`.
        number: of the file.
        rows: the images' numbers in the split, int64 (n,).
        source: a digest of what these images, their labels and captions are where they come from.
    """

    split: Split
    below: str
    number: int
    rows: np.ndarray
    source: str


@dataclass(frozen=True, eq=False)
class Piece:
    """What becomes a shard, or a part of one.

    Attributes:
        images: uint8 (n, C, H, W).
        rows: their numbers in the split, int64 (n,).
        keys: their content keys, uint8 (n, 16).
        labels: int64 (n,), or None.
        captions: n strings, or None.
        conditions: what they are conditioned on, uint8 (n, C', H, W), or None.
        bad: (name, reason) of each image that was left out since it cannot be read.
    """

    images: np.ndarray
    rows: np.ndarray
    keys: np.ndarray
    labels: np.ndarray | None = None
    captions: list[str] | None = None
    conditions: np.ndarray | None = None
    bad: tuple[tuple[str, str], ...] = ()


class PreparedWriter:
    """Writes prepared images into a folder that no other process writes into meanwhile.

    Args:
        folder: made where it is missing; one that holds shards of the same recipe is gone on with.
        recipe: what decides the images, in plain JSON types: `config`, how the data set was asked for; `images`, what
            its splits hold; and their sizes. An unfinished folder is gone on with where all but `images` is the same,
            a finished one (to mend it) where all but `config` is.
        needed: bytes that the images will take.
        command: that makes the folder, kept in the index.

    Raises:
        OrnsteinError: the folder holds something else, images of another recipe or other images, another process
            writes into it, or the disk is too small.
    """

    def __init__(self, folder: str | Path, recipe: dict[str, Any], *, needed: int, command: str) -> None:
        self.folder, self.recipe, self.needed = Path(folder).expanduser(), recipe, needed
        self.command = command
        check_place(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claims = Claims(self.folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The folder, to this process alone; looks at what is there, and writes an index that says "unfinished".

        Raises:
            OrnsteinError: as the class says.
        """
        try:
            with self._claims.claim(LOCK_START, wait=False) as mine, told_when_full(self.folder):
                if not mine:
                    raise OrnsteinError(
                        f"another process writes into out={self.folder}: wait for it, or name another folder."
                    )
                self._begin()
                yield
        finally:
            self._claims.close()

    def done(self, shard: Shard) -> dict[str, Any] | None:
        """What the shard's JSON says, if the shard is there, whole, and of the images that the data set now has."""
        conditions = self.recipe["condition_channels"] is not None
        facts = shard_facts(self.folder, shard.below, shard.number, conditions=conditions, verify=True)
        return facts if facts is not None and facts["source"] == shard.source else None

    def write(self, shard: Shard, piece: Piece) -> dict[str, Any]:
        """Writes a shard and returns what its JSON says.

        Raises:
            OrnsteinError: the disk is full; neither the array nor the JSON is then there.
        """
        with told_when_full(self.folder):
            return self._write(shard, piece)

    def _write(self, shard: Shard, piece: Piece) -> dict[str, Any]:
        facts: dict[str, Any] = {"images": len(piece.rows), "rows": piece.rows.tolist(), "source": shard.source}
        files = {"": (array_path(self.folder, shard.below, shard.number), piece.images)}
        if piece.conditions is not None:
            files["condition_"] = (condition_path(self.folder, shard.below, shard.number), piece.conditions)
        told = facts_path(self.folder, shard.below, shard.number)
        told.parent.mkdir(parents=True, exist_ok=True)
        told.unlink(missing_ok=True)  # until the new JSON is there, what lies here is no shard
        for prefix, (path, array) in files.items():
            clear_left(path)
            temporary = beside(path)
            try:
                save_array(temporary, array)
                facts |= {f"{prefix}bytes": temporary.stat().st_size, f"{prefix}sha256": checksum(temporary)}
                sync(temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        facts["labels"] = None if piece.labels is None else piece.labels.tolist()
        facts |= {"captions": piece.captions, "keys": piece.keys.tobytes().hex(), "bad": [list(x) for x in piece.bad]}
        clear_left(told)
        replace(told, lambda place: place.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8"))
        return facts

    def index(self, shards: Sequence[Shard], counts: Sequence[int], **facts: Any) -> dict[str, Any]:
        """The index of a folder whose shards are all there.

        Args:
            shards: all of them.
            counts: how many images each holds.
            facts: what a config is to know of the data set, see `ornstein.data.prepared.FACTS`.
        """
        splits: dict[str, dict[str, Any]] = {}
        for shard, count in zip(shards, counts, strict=True):
            shape = shard.below.partition("/")[2]
            split = splits.setdefault(shard.split, {"count": 0, "shards": {} if shape else 0})
            split["count"] += count
            if shape:
                split["shards"][shape] = split["shards"].get(shape, 0) + 1
            else:
                split["shards"] += 1
        return self._started() | {"complete": True, "splits": splits, **facts}

    def finish(self, index: dict[str, Any], shards: Sequence[Shard]) -> None:
        """Writes the index, and removes shards that a run before this one left over."""
        with told_when_full(self.folder):
            self._write_index(index)
        self._remove_left(shards)

    def _begin(self) -> None:
        if (self.folder / INDEX).is_file():
            self._check_recipe()
        else:
            check_room(self.folder, self.needed, holds="images", or_else=", or make them smaller (data.image_size)")
        self._write_index(self._started())

    def _check_recipe(self) -> None:
        asked = f"out={self.folder}"
        index = read_index(self.folder, form=FORMAT, asked=asked, holds="prepared images", command=self.command)
        there, ours = index.get("recipe", {}), self.recipe
        # One that is finished is what its images were; one that is not may follow its images' changes.
        keys = [key for key in ours if not (key == "config" if index.get("complete") else key == "images")]
        differing = [key for key in keys if there.get(key) != ours[key]]
        if not differing:
            return
        if differing == ["images"]:
            what = "the same data set with other images"
        else:
            told = _differences(there.get(differing[0]), ours[differing[0]], differing[0])
            what = f"images of another recipe ({told})"
        raise OrnsteinError(f"{asked} holds {what}: name another folder, or remove this one.")

    def _started(self) -> dict[str, Any]:
        return {"format": FORMAT, "complete": False, "command": self.command, "recipe": self.recipe}

    def _write_index(self, index: dict[str, Any]) -> None:
        replace(self.folder / INDEX, lambda path: path.write_text(json.dumps(index, indent=1), encoding="utf-8"))

    def _remove_left(self, shards: Sequence[Shard]) -> None:
        """Removes files of shards that there are no more."""
        known = {facts_path(self.folder, shard.below, shard.number) for shard in shards}
        for path in self.folder.glob("*/**/*.json"):
            if path not in known:
                for each in (path, path.with_suffix(".npy"), path.with_suffix(".condition.npy")):
                    each.unlink(missing_ok=True)


def _differences(there: Any, here: Any, key: str) -> str:
    """The first thing in which two values differ, as a sentence says it."""
    if isinstance(there, dict) and isinstance(here, dict):
        first = next(name for name in {**here, **there} if there.get(name) != here.get(name))
        return f"data.{first}={there.get(first)} there and {here.get(first)} here"
    return f"{key}={there} there and {here} here"
