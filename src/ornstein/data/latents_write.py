"""Writing a folder of latents, shard by shard: resumable, and by as many processes at once as there are."""

import errno
import fcntl
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ornstein.data.base import ImageDataset, Split
from ornstein.data.latents import (
    FORMAT,
    INDEX,
    Recipe,
    array_path,
    checksum,
    facts_path,
    read_recipe,
    shard_facts,
)
from ornstein.errors import OrnsteinError

LOCK = ".lock"
LOCK_START = 0  # byte of the lock file that stands for the folder; shards' bytes follow


@dataclass(frozen=True)
class Shard:
    """One file of latents: shard `number` of `split`, the images `rows`, its place among all shards of the folder."""

    split: Split
    number: int
    rows: range
    place: int


class LatentWriter:
    """Writes latents into a folder, each shard whole or not at all.

    Any number of processes may write into one folder: who claims a shard has it alone, and a process that dies gives
    its claim back with its life.

    Args:
        folder: made where it is missing; one that holds shards of the same recipe is gone on with.
        recipe: of the latents.
        command: that makes them, kept in the index.

    Raises:
        OrnsteinError: the folder holds latents of another recipe, or something else, or the disk is too small.
    """

    def __init__(self, folder: str | Path, recipe: Recipe, *, command: str) -> None:
        self.folder, self.recipe = Path(folder).expanduser(), recipe
        self._check_place()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with self._locked(LOCK_START, wait=True):
                self._begin(command)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the lock file back."""
        os.close(self._lock)

    def shards(self) -> list[Shard]:
        """Every shard of the folder, train before val."""
        splits: tuple[Split, ...] = ("train", "val")
        named = [(split, number) for split in splits for number in range(self.recipe.shards(split))]
        return [
            Shard(split, number, self.recipe.rows(split, number), place)
            for place, (split, number) in enumerate(named, start=LOCK_START + 1)
        ]

    @contextmanager
    def claim(self, shard: Shard) -> Iterator[bool]:
        """Whether this process has the shard to itself; False where another one has it."""
        with self._locked(shard.place, wait=False) as mine:
            yield mine

    def done(self, shard: Shard) -> bool:
        """Whether the shard is there, whole, with the checksum that it was written with."""
        return shard_facts(self.folder, self.recipe, shard.split, shard.number, verify=True) is not None

    @contextmanager
    def open(self, shard: Shard, images: ImageDataset) -> Iterator[np.ndarray]:
        """An array (images, planes, C, h, w) to fill; it becomes the shard where nothing is raised meanwhile.

        Args:
            shard: claimed before.
            images: the split, for labels and captions.
        """
        path = array_path(self.folder, shard.split, shard.number)
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed: the claim is ours now
            left.unlink(missing_ok=True)
        shape = (len(shard.rows), len(self.recipe.planes(shard.split)), *self.recipe.shape)

        facts: dict[str, Any] = {"split": shard.split, "first_image": shard.rows.start, "images": len(shard.rows)}
        temporary = _beside(path)
        try:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=self.recipe.dtype, shape=shape)
            yield array
            array.flush()
            del array
            facts |= {"bytes": temporary.stat().st_size, "sha256": checksum(temporary)}
            _sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        rows = slice(shard.rows.start, shard.rows.stop)
        facts["labels"] = None if images.labels is None else images.labels[rows].tolist()
        facts["captions"] = None if images.captions is None else images.captions[rows]
        _replace(
            facts_path(self.folder, shard.split, shard.number),
            lambda place: place.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8"),
        )

    def _begin(self, command: str) -> None:
        """Writes the index, or looks at the one that is there."""
        if (self.folder / INDEX).is_file():
            self._check_recipe(command)
            return
        self._check_room()
        index = {"format": FORMAT, "command": command, "recipe": self.recipe.to_json()}
        _replace(self.folder / INDEX, lambda path: path.write_text(json.dumps(index, indent=2), encoding="utf-8"))

    def _check_place(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise OrnsteinError(f"out={self.folder} is a file: name a folder.")
        if self.folder.is_dir() and not (self.folder / INDEX).is_file():
            foreign = [entry.name for entry in self.folder.iterdir() if not entry.name.startswith(".")]
            if foreign:
                raise OrnsteinError(
                    f"out={self.folder} holds something else ({min(foreign)}, say): name an empty or a new folder."
                )

    def _check_recipe(self, command: str) -> None:
        there, ours = read_recipe(self.folder, command=command).to_json(), self.recipe.to_json()
        differing = [key for key in ours if ours[key] != there[key]]
        if differing:
            told = ", ".join(f"{key} {_short(there[key])} there and {_short(ours[key])} here" for key in differing[:3])
            raise OrnsteinError(
                f"out={self.folder} holds latents of another recipe ({told}): name another folder, or remove this one."
            )

    def _check_room(self) -> None:
        needed = self.recipe.nbytes("train") + self.recipe.nbytes("val")
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OrnsteinError(
                f"{needed / 1e6:,.0f} MB of latents do not fit into the {free / 1e6:,.0f} MB free at "
                f"out={self.folder}: name a folder on a larger disk, or set dtype=float16."
            )

    @contextmanager
    def _locked(self, place: int, *, wait: bool) -> Iterator[bool]:
        """Holds one byte of the lock file; gives False where another process has it. The kernel frees it at death."""
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                yield False
                return
            warnings.warn(
                f"{self.folder} lies on a file system without locks ({error.strerror}): see to it yourself that no "
                "second process writes there",
                stacklevel=4,
            )
            yield True
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, place)


def _beside(path: Path) -> Path:
    """A temporary name in the folder of `path`: a move is atomic only within a file system."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file beside `path` and moves it into place in one step."""
    temporary = _beside(path)
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """The file's content to the disk, so that a power cut leaves no empty file under a final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."
