"""`data=hf data.streaming=true`: a data set of the hub read front to back, file by file, without keeping it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ornstein.data.base import SPLITS, NoSplit, checked_split
from ornstein.data.hf import NO_PATH, caption_text
from ornstein.data.hf_load import Columns, commit_of, file_of, find_columns, open_split, tell, undecoded
from ornstein.data.splits import content_key, val_mask
from ornstein.data.stored import stamps_of
from ornstein.data.streaming import Record
from ornstein.errors import OrnsteinError


class HubShards:
    """A split of a streamed data set; its shards are the files that it lies in.

    Args: as `ornstein.data.HuggingFace` takes them, without those of storage.

    Raises:
        NoSplit: test, and no `test_split`.
        OrnsteinError: as `HuggingFace`; or there is no `val_split` and one file, of which none can be held out.
    """

    splits = SPLITS
    name = "hf"

    def __init__(
        self,
        *,
        split: str,
        path: str | None = None,
        config_name: str | None = None,
        revision: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: float = 0.1,
        image_column: str | None = None,
        label_column: str | None = None,
        caption_column: str | None = None,
        labels: bool = True,
    ) -> None:
        chosen = checked_split(split, SPLITS)
        if path is None:
            raise OrnsteinError(NO_PATH)
        named = {"train": train_split, "val": val_split, "test": test_split}[chosen]
        if chosen == "test" and named is None:
            raise NoSplit("there is no test split: set data.test_split")
        table = open_split(path, named or train_split, config_name=config_name, revision=revision, streaming=True)
        columns = find_columns(
            table.features, path=path, image=image_column, label=label_column, caption=caption_column, labels=labels
        )
        tell(path, columns)
        self.columns, self.revision = columns, revision
        self.source = HubFiles(undecoded(table, columns.image), columns, path=path, split=named or train_split)
        if val_split is None and chosen != "test":
            if len(self.source.numbers) < 2:
                raise OrnsteinError(
                    f"data.path={path} streams {train_split} from one file, of which none can be held out: name "
                    "another split with data.val_split, or set data.streaming=false"
                )
            keys = [content_key(str(number).encode()) for number in self.source.numbers]
            self.source.keep(np.flatnonzero(val_mask(keys, val_fraction) == (chosen == "val")).tolist())
        self._examples = (table.info.splits or {}).get(named or train_split)

    @cached_property
    def identity(self) -> Sequence[str]:
        """What the content is known by: the commit of the hub, or sizes and times of the files on this machine."""
        info, place = self.source.table.info, Path(self.source.path).expanduser()
        facts = [info.version, getattr(self._examples, "num_bytes", None), self.revision]
        if place.exists():
            files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
            facts += stamps_of(files)
        else:
            facts.append(commit_of(self.source.path, self.revision))
        return [f"{name} {facts!r}" for name in self.source.shards]

    @property
    def captions(self) -> bool:
        """Whether there is a column of captions."""
        return self.columns.caption is not None

    def classes(self, count: int | None) -> tuple[str, ...] | None:
        """The names that the features say, or None."""
        return self.columns.classes

    def count(self) -> int | None:
        """How many samples the files hold, as the hub says of all together; None where it does not."""
        total = getattr(self._examples, "num_examples", None)
        return total * len(self.source.numbers) // self.source.total if total else None

    def counts(self) -> Sequence[int]:
        """Refused: how many samples each file holds is known behind its last one."""
        raise OrnsteinError(
            "data.limit takes the first images of shards whose sizes are known, and those of a streamed data set of "
            "the hub are not: set data.streaming=false, or train_split='train[:1000]', say"
        )


class HubFiles:
    """The files of a streamed split, each a shard."""

    def __init__(self, table: Any, columns: Columns, *, path: str, split: str) -> None:
        self.table, self.columns, self.path, self.split = table, columns, path, split
        self.total = int(table.num_shards)
        self.numbers = list(range(self.total))
        place = Path(path).expanduser()
        self.base = None if not place.exists() else (place if place.is_dir() else place.parent)

    @property
    def shards(self) -> Sequence[str]:
        """What messages call the files."""
        return [f"{self.path} {self.split} file {number}" for number in self.numbers]

    def keep(self, places: Sequence[int]) -> None:
        """Those files alone."""
        self.numbers = [self.numbers[place] for place in places]

    def read(self, shard: int, at: Any = None) -> Iterator[tuple[Record, Any]]:
        """The rows of a file in order, each with [state, number] of what follows it."""
        state, number = (None, 0) if at is None else (at[0], int(at[1]))
        file = self.table.shard(num_shards=self.total, index=self.numbers[shard])
        if state is not None:
            file.load_state_dict(state)
        # Row by row would be shared out over worker processes once more.
        for batch in file.iter(batch_size=1):
            row = {name: cells[0] for name, cells in batch.items()}
            yield self._record(shard, number, row), [file.state_dict(), number + 1]
            number += 1

    def _record(self, shard: int, number: int, row: dict[str, Any]) -> Record:
        name = f"{self.path} {self.split} file {self.numbers[shard]}: row {number}"
        try:
            file = file_of(row[self.columns.image], base=self.base)
            content = file if isinstance(file, bytes) else file.read_bytes()
        except (OrnsteinError, OSError) as error:
            return Record(shard, number, name, fault=str(error))
        columns = self.columns
        label = None if columns.label is None else row[columns.label]
        caption = None if columns.caption is None else caption_text(row[columns.caption])
        if columns.label is not None and label in (None, -1):
            return Record(shard, number, name, fault=f"it has no class in {columns.label}")
        if columns.classes is not None:
            label = columns.classes[int(label or 0)]
        return Record(shard, number, name, image=content, label=label, caption=caption)
