"""Which images a data set of pairs has, and what its tables say of each: read before any image is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ornstein.data.describe import NAMED, Parts, image_files, parts_of
from ornstein.data.tables import Row, check_columns, read_rows
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.data.base import Split

# Hugging Face's imagefolder layout.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Pair:
    """An image's file, its captions (none: an empty one), and its class as the table says it, or None."""

    path: Path
    captions: tuple[str, ...]
    label: str | None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of the tables, as the config names them; `label` may be None."""

    image: str
    caption: str
    label: str | None

    @property
    def asked(self) -> list[str]:
        """Those that must be there."""
        return [self.image, self.caption, *([] if self.label is None else [self.label])]


@dataclass(frozen=True)
class Tables:
    """The folder of the images, and the table of each split: of "train" alone, where that holds all; or none at all.

    Names of images start from the folder given by `root`, or from their own table's where `beside` is true.
    """

    root: Path
    tables: Mapping[Split, Path]
    beside: bool = False

    def read(self, columns: Columns) -> dict[Split, list[Pair]]:
        """What each table says. Raises OrnsteinError, see `read_pairs`."""
        return {
            split: read_pairs(path, path.parent if self.beside else self.root, columns)
            for split, path in self.tables.items()
        }

    def listed(self, pairs: Mapping[Split, Sequence[Pair]]) -> dict[Split, list[Path]]:
        """The files of each split; all of them under "train" alone, where the split is to be made.

        Raises:
            OrnsteinError: a single table names images both inside and outside the folders of splits.
        """
        parts = parts_of(self.root)
        if not pairs:
            return {split: list(image_files(folder)) for split, folder in _folders(parts).items()}
        if len(pairs) > 1 or not parts.given:
            return {split: [pair.path for pair in own] for split, own in pairs.items()}
        below: dict[Split, list[Path]] = {split: [] for split in _folders(parts)}
        outside: list[Path] = []
        for pair in pairs["train"]:
            home = next((split for split, folder in _folders(parts).items() if pair.path.is_relative_to(folder)), None)
            (outside if home is None else below[home]).append(pair.path)
        if outside and any(below.values()):
            raise OrnsteinError(
                f"{self.tables['train']}: {len(outside)} of its images lie in none of the folders "
                f"{', '.join(folder.name for folder in _folders(parts).values())}, {outside[0]} the first: move them "
                "into one, or all out of them"
            )
        return {"train": outside} if outside else below


def find_tables(root: str | os.PathLike[str] | None, table: str | None, val_table: str | None) -> Tables:
    """The tables that `data.root`, `data.table` and `data.val_table` mean.

    Raises:
        OrnsteinError: neither root nor table is given, they are not there, or the folder has several metadata files.
    """
    folder = None if root is None else Path(root).expanduser()
    if folder is not None and not folder.is_dir():
        raise OrnsteinError(f"data.root={root}: there is no such folder; name the one that holds the images.")
    if table is None:
        if val_table is not None:
            raise OrnsteinError(f"data.val_table={val_table} needs a data.table that holds train.")
        if folder is None:
            raise OrnsteinError(
                "data=pairs needs images with captions: say data.root=FOLDER (with metadata.jsonl, metadata.csv or "
                "text files), or data.table=FILE."
            )
        return _metadata(folder)
    tables: dict[Split, Path] = {"train": _table(table, folder, "table")}
    if val_table is not None:
        tables["val"] = _table(val_table, folder, "val_table")
    return Tables(folder or tables["train"].parent, tables)


def _table(named: str, folder: Path | None, key: str) -> Path:
    """A table as it is named, or in the folder."""
    path = Path(named).expanduser()
    places = [path] if folder is None or path.is_absolute() else [folder / path, path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise OrnsteinError(f"data.{key}={named}: there is no such file ({', '.join(str(place) for place in places)}).")
    return found


def _metadata(folder: Path) -> Tables:
    """The metadata files of the splits' folders, or of the folder itself, or none."""
    parts = parts_of(folder)
    if parts.given:
        own = {split: _metadata_file(part) for split, part in _folders(parts).items()}
        lacking = [split for split, path in own.items() if path is None]
        if not lacking:
            return Tables(folder, {split: path for split, path in own.items() if path is not None}, beside=True)
        if len(lacking) < len(own):
            raise OrnsteinError(
                f"data.root={folder}: its folder of {lacking[0]} has no metadata file ({', '.join(METADATA)}) and "
                "others have one: add it"
            )
    whole = _metadata_file(folder)
    return Tables(folder, {} if whole is None else {"train": whole}, beside=True)


def _metadata_file(folder: Path) -> Path | None:
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise OrnsteinError(f"{folder} has {' and '.join(path.name for path in found)}: name one with data.table=")
    return found[0] if found else None


def _folders(parts: Parts) -> dict[Split, Path]:
    """The folder of each split; of the whole under "train" alone."""
    if not parts.given:
        return {"train": parts.train}
    rest: dict[Split, Path] = {} if parts.test is None else {"test": parts.test}
    return {"train": parts.train, "val": parts.val, **rest}


def read_pairs(table: Path, home: Path, columns: Columns) -> list[Pair]:
    """What a table says of each image.

    Args:
        table: csv, tsv, jsonl or parquet.
        home: where the images' names start from.
        columns: the names of the columns.

    Raises:
        OrnsteinError: the table cannot be read, a value is not of its kind, or an image is named twice.
    """
    pairs: dict[Path, Pair] = {}
    for row in read_rows(table, columns.asked):
        path = Path(os.path.normpath(home / _file_name(row)))
        if path in pairs:
            raise OrnsteinError(
                f"{row.place} names {row.values[0]} for the second time: give several captions of an image as a list "
                "(jsonl or parquet)"
            )
        label = None if columns.label is None else _label(row, columns.label)
        pairs[path] = Pair(path, _captions(row), label)
    return list(pairs.values())


def class_names_of(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """The classes that labels name, each once: in the order of numbers where all are numbers, else of the alphabet."""
    names = {pair.label for pair in pairs if pair.label is not None}
    numbers = all(_NUMBER.fullmatch(name) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def label_numbers(pairs: Sequence[Pair], names: Sequence[str]) -> list[int]:
    """The class of each image. Raises OrnsteinError for one that train has not."""
    number = {name: index for index, name in enumerate(names)}
    unknown = sorted({str(pair.label) for pair in pairs} - number.keys())
    if unknown:
        raise OrnsteinError(f"there are classes that train has not ({', '.join(unknown[:NAMED])}): remove them")
    return [number[str(pair.label)] for pair in pairs]


def check_tables(options: Mapping[str, Any]) -> tuple[Tables, Columns]:
    """The tables that the options of a config mean, their columns looked for and no rows read.

    Raises:
        OrnsteinError: as `find_tables`; a column is not there; or classes are asked for and no column holds them.
    """
    found = find_tables(options.get("root"), options.get("table"), options.get("val_table"))
    columns = Columns(
        image=options.get("image_column") or "file_name",
        caption=options.get("caption_column") or "text",
        label=options.get("label_column"),
    )
    for path in found.tables.values():
        check_columns(path, columns.asked)
    if options.get("num_classes") is not None and (columns.label is None or not found.tables):
        raise OrnsteinError(
            f"data.num_classes={options['num_classes']} and data=pairs names no classes: set data.label_column to a "
            "column of the table that holds them, or data.num_classes=null"
        )
    return found, columns


def _file_name(row: Row) -> str:
    name = row.values[0]
    if isinstance(name, str) and name:
        return name
    if isinstance(name, dict):
        raise OrnsteinError(
            f"{row.place} holds an image itself where a file's name belongs: take data=hf for such tables"
        )
    raise OrnsteinError(f"{row.place} names no file: its name is {name!r:.80}")


def _captions(row: Row) -> tuple[str, ...]:
    """The texts of a row, each on one line; a missing one is an empty caption."""
    value = row.values[1]
    texts = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise OrnsteinError(f"{row.place}: its caption is {value!r:.80} where text, or a list of texts, belongs")
    return tuple(" ".join((text or "").split()) for text in texts)


def _label(row: Row, column: str) -> str:
    value = row.values[2]
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise OrnsteinError(f"{row.place}: its {column} is {value!r:.80} where a class's number or name belongs")
    return str(value)
