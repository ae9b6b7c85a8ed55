"""Writing a folder of latents, shard by shard: resumable, and by as many processes at once as there are."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ornstein.data.base import ImageDataset, Split
from ornstein.data.latents import FORMAT, Recipe, read_recipe, shard_facts
from ornstein.data.shards import INDEX, array_path, checksum, facts_path
from ornstein.data.shards_write import (
    LOCK_START,
    Claims,
    beside,
    check_place,
    check_room,
    clear_left,
    new_array,
    replace,
    sync,
    told_when_full,
)
from ornstein.errors import OrnsteinError


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
        class_names: of the images' labels, kept there too.

    Raises:
        OrnsteinError: the folder holds latents of another recipe, or something else, or the disk is too small.
    """

    def __init__(self, folder: str | Path, recipe: Recipe, *, command: str, class_names: Sequence[str] = ()) -> None:
        self.folder, self.recipe, self.class_names = Path(folder).expanduser(), recipe, list(class_names)
        check_place(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claims = Claims(self.folder)
        try:
            with self._claims.claim(LOCK_START, wait=True):
                self._begin(command)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the lock file back."""
        self._claims.close()

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
        with self._claims.claim(shard.place, wait=False) as mine:
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
        clear_left(path)
        shape = (len(shard.rows), len(self.recipe.planes(shard.split)), *self.recipe.shape)

        facts: dict[str, Any] = {"split": shard.split, "first_image": shard.rows.start, "images": len(shard.rows)}
        temporary = beside(path)
        with told_when_full(self.folder):
            try:
                array = new_array(temporary, dtype=self.recipe.dtype, shape=shape)
                yield array
                del array  # and with it the map: what was written is the file's from here on
                facts |= {"bytes": temporary.stat().st_size, "sha256": checksum(temporary)}
                sync(temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            rows = slice(shard.rows.start, shard.rows.stop)
            facts["labels"] = None if images.labels is None else images.labels[rows].tolist()
            facts["captions"] = None if images.captions is None else images.captions[rows]
            replace(
                facts_path(self.folder, shard.split, shard.number),
                lambda place: place.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8"),
            )

    def _begin(self, command: str) -> None:
        """Writes the index, or looks at the one that is there."""
        if (self.folder / INDEX).is_file():
            self._check_recipe(command)
            return
        needed = self.recipe.nbytes("train") + self.recipe.nbytes("val")
        check_room(self.folder, needed, holds="latents", or_else=", or set dtype=float16")
        told = {"command": command, "class_names": self.class_names}
        index = {"format": FORMAT, **told, "recipe": self.recipe.to_json()}
        replace(self.folder / INDEX, lambda path: path.write_text(json.dumps(index, indent=2), encoding="utf-8"))

    def _check_recipe(self, command: str) -> None:
        there, ours = read_recipe(self.folder, command=command).to_json(), self.recipe.to_json()
        differing = [key for key in ours if ours[key] != there[key]]
        if differing:
            told = ", ".join(f"{key} {_short(there[key])} there and {_short(ours[key])} here" for key in differing[:3])
            raise OrnsteinError(
                f"out={self.folder} holds latents of another recipe ({told}): name another folder, or remove this one."
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."
