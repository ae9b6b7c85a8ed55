"""`data=hf`: any data set that `datasets` opens, its images decoded here as those of a folder are."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ornstein.data.bad import Bad
from ornstein.data.base import KEY_BYTES, SPLITS, ImageDataset, NoSplit, Split, checked_split
from ornstein.data.bucket_files import stored_somehow
from ornstein.data.buckets import bucket_shapes
from ornstein.data.captions import check_template, from_classes
from ornstein.data.hf_load import Columns, file_of, find_columns, is_local, open_split, tell, undecoded
from ornstein.data.images import check_channels, check_size, checked_crop
from ornstein.data.splits import content_key, split_mask
from ornstein.data.stored import DECODING, checked_storage, map_folder, report_path
from ornstein.errors import OrnsteinError

CHUNK = 512
WORTH_KEEPING = 5000
NO_PATH = "data=hf needs a data set: data.path=NAME of the hub, or a folder or file on this machine"
# Options that only one of the two ways to serve a data set of the hub takes.
STREAM_ONLY = ("shuffle_buffer", "reference_images", "val_limit", "num_images", "exact_resume")
STORED_ONLY = {"limit_reference": "whole", "balanced": False, "buckets": None, "test_fraction": 0, "storage": None}


class HuggingFace(ImageDataset):
    """The images of a column, with classes and captions of others.

    Args:
        split: "train", "val" or "test".
        path: name of the hub, or on this machine a folder (images, parquet, arrow, JSON, CSV, `save_to_disk`) or a
            parquet, arrow, JSON or CSV file.
        config_name, revision: as `datasets.load_dataset` takes them.
        train_split, val_split, test_split: what the data set calls them. Without `val_split` a share of train is val,
            by content; without `test_split` another is test, where `test_fraction` is not 0.
        val_fraction, test_fraction: those shares.
        image_column, label_column, caption_column: None: guessed from types and names, and told. Images may be files,
            paths (relative ones are below the table's folder) or arrays of 0 to 255.
        image_size, channels, crop, storage, max_bad, labels, caption_template, buckets: as of `ImageFolder`.

    Raises:
        NoSplit: test, where there is none.
        OrnsteinError: the data set, a split or a column is not there, images cannot be read, labels are missing.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS

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
        test_fraction: float = 0.0,
        image_column: str | None = None,
        label_column: str | None = None,
        caption_column: str | None = None,
        image_size: int = 64,
        channels: int = 3,
        crop: str = "adm",
        labels: bool = True,
        storage: str = "auto",
        caption_template: str | None = None,
        max_bad: int = 0,
        buckets: Any = None,
    ) -> None:
        chosen = checked_split(split, SPLITS)
        if path is None:
            raise OrnsteinError(NO_PATH)
        check_size(image_size, name="hf")
        check_channels(channels)
        check_template(caption_template)
        cut, way = checked_crop(crop), checked_storage(storage)
        named = {"train": train_split, "val": val_split, "test": test_split}[chosen]
        if chosen == "test" and named is None and not test_fraction:
            raise NoSplit("there is no test split: set data.test_split, or data.test_fraction")

        opening = {"config_name": config_name, "revision": revision}
        table = open_split(path, named or train_split, **opening)
        columns = find_columns(
            table.features, path=path, image=image_column, label=label_column, caption=caption_column, labels=labels
        )
        tell(path, columns)
        cells = Cells(table, columns.image, path=path, split=named or train_split)
        rows = np.arange(len(cells), dtype=np.int64)
        shares = {"val": 0.0 if val_split else val_fraction, "test": 0.0 if test_split else test_fraction}
        if (chosen == "train" or named is None) and any(shares.values()):
            rows = np.flatnonzero(_share(cells.keys, chosen, **shares))
        bad = Bad(max_bad, where=f"data.path={path}")
        shape = (len(rows), channels, image_size, image_size)
        several = bucket_shapes(buckets, image_size=image_size)
        images, kept = stored_somehow(way, cells.at(rows), shape, buckets=several, crop=cut, bad=bad)
        bad.settle(report_path(f"{path}-{chosen}"))
        rows = rows[kept]
        if not len(rows):
            raise OrnsteinError(f"the {chosen} split of data.path={path} holds no images: name other data")
        classes: np.ndarray | None = None
        names: tuple[str, ...] = ()
        if columns.label is not None:
            names = columns.classes or class_values(open_split(path, train_split, **opening), columns.label)
            classes = _numbers(table, columns, rows, names, path=path)
        keys = cells.keys[rows]
        super().__init__(
            images,
            name="hf",
            split=chosen,
            labels=classes,
            class_names=names,
            captions=_captions(table, columns, rows) or from_classes(caption_template, classes, names),
            content=f"{DECODING} {cut}".encode() + keys.tobytes(),
            keys=keys,
        )

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Refuses, before anything is built, a data set that is not named, or a path that is not there."""
        if options.get("path") is None:
            raise OrnsteinError(NO_PATH)
        is_local(str(options["path"]))
        if options.get("streaming"):
            _check_streamed(options)

    @classmethod
    def count_classes(cls, options: Mapping[str, Any]) -> int | None:
        """What `data.num_classes=auto` stands for: the classes of the train split, None without such a column."""
        opened = {key: options.get(key) for key in ("config_name", "revision")}
        streaming = bool(options.get("streaming"))
        table = open_split(
            str(options["path"]), str(options.get("train_split", "train")), streaming=streaming, **opened
        )
        asked = {key: options.get(f"{key}_column") for key in ("image", "label", "caption")}
        try:
            columns = find_columns(table.features, path=str(options["path"]), labels=True, **asked)
        except OrnsteinError:
            if asked["label"] is not None:
                raise
            return None
        assert columns.label is not None
        if columns.classes is None and streaming:
            raise OrnsteinError(
                f"data.num_classes=auto: the type of column {columns.label} does not name its classes, and a stream is "
                "not read through to count them; give data.num_classes=N"
            )
        return len(columns.classes or class_values(table, columns.label))


class Cells:
    """A column's images, as `ornstein.data.stored` reads them, named by split and row."""

    def __init__(self, table: Any, column: str, *, path: str, split: str, rows: np.ndarray | None = None) -> None:
        self.table = undecoded(table.select_columns([column]), column)
        self.column, self.path, self.split = column, path, split
        self.rows = np.arange(len(table), dtype=np.int64) if rows is None else rows
        self.home = path
        place = Path(path).expanduser()
        # A table's relative paths start where the table lies.
        self.base = None if not place.exists() else (place if place.is_dir() else place.parent)
        self.names = [f"{split}[{row}]" for row in self.rows.tolist()]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.rows)

    def __getitem__(self, row: int) -> Path | bytes:
        """The file. OrnsteinError: the cell holds none."""
        return file_of(self.table[int(self.rows[row])][self.column], base=self.base)

    def at(self, rows: np.ndarray) -> Cells:
        """Those rows alone."""
        return Cells(self.table, self.column, path=self.path, split=self.split, rows=self.rows[rows])

    def stamps(self) -> list[bytes]:
        """What `datasets` knows the table's content by, with the row's number."""
        mark = f"{self.table._fingerprint}\0{self.column}\0".encode()
        return [mark + str(row).encode() for row in self.rows.tolist()]

    @cached_property
    def keys(self) -> np.ndarray:
        """A content hash of each file, uint8 (N, 16); of large tables kept in the cache folder."""
        mark = hashlib.sha256(b"".join(self.stamps())).hexdigest()
        place = map_folder() / f"hub-keys-{mark[:32]}.npy"
        if place.is_file():
            return np.load(place)
        found, inside = [], True
        for start in range(0, len(self), CHUNK):
            chunk = self.table[self.rows[start : start + CHUNK].tolist()][self.column]
            for value in chunk:
                key, is_inside = self._key(value)
                found.append(key)
                inside &= is_inside
        keys = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, KEY_BYTES)
        if inside and len(keys) >= WORTH_KEEPING:  # files beside the table may change without it
            _save(place, keys)
        return keys

    def _key(self, value: Any) -> tuple[bytes, bool]:
        """A cell's key, and whether its file lies in the table. One that cannot be read is met again when decoded."""
        try:
            file = file_of(value, base=self.base)
            return content_key(file if isinstance(file, bytes) else file.read_bytes()), isinstance(file, bytes)
        except (OrnsteinError, OSError) as error:
            return content_key(f"{value!r:.200} {error}".encode()), False


def hub_data(dataset: Callable[..., Any], *, streaming: bool = False, **options: Any) -> Any:
    """The data module of `conf/data/hf.yaml`: a `DataModule` of whole splits, or under `streaming` a `StreamModule`."""
    if not streaming:
        from ornstein.data.datamodule import DataModule

        return DataModule(dataset, **{key: value for key, value in options.items() if key not in STREAM_ONLY})
    _check_streamed(options)
    from ornstein.data.hf_stream import HubShards
    from ornstein.data.stream_module import StreamModule

    return StreamModule(HubShards, **{key: value for key, value in options.items() if key not in STORED_ONLY})


def _check_streamed(options: Mapping[str, Any]) -> None:
    """Refuses what a stream cannot do; how it is stored is no matter there."""
    for key, off in STORED_ONLY.items():
        if key != "storage" and options.get(key, off) not in (off, None):
            raise OrnsteinError(f"data.{key}={options[key]} cannot be had of a stream: set data.streaming=false")


def class_values(table: Any, column: str) -> tuple[str, ...]:
    """The distinct values of a column as class names: numbers by size, words in order."""
    found = [value for value in table.unique(column) if value is not None]
    ordered = sorted(found) if all(isinstance(value, int) for value in found) else sorted(map(str, found))
    return tuple(str(value) for value in ordered)


def _share(keys: np.ndarray, split: Split, *, val: float, test: float) -> np.ndarray:
    """Which rows of train a split takes, by content."""
    flat = [key.tobytes() for key in keys]
    if val:
        return split_mask(flat, split, val_fraction=val, test_fraction=test)
    # Val is a split of its own: what would be val here is test.
    return split_mask(flat, "val" if split == "test" else split, val_fraction=test)


def _numbers(table: Any, columns: Columns, rows: np.ndarray, names: tuple[str, ...], *, path: str) -> np.ndarray:
    """The class of each row, int64 (N,)."""
    assert columns.label is not None
    every = _column(table, columns.label)
    values = [every[row] for row in rows.tolist()]
    number = {name: index for index, name in enumerate(names)}
    if columns.classes is not None:
        found = [-1 if value is None else int(value) for value in values]
    else:
        found = [-1 if value is None else number.get(str(value), -1) for value in values]
    classes = np.array(found, dtype=np.int64)
    missing = np.flatnonzero(classes < 0)
    if len(missing):
        raise OrnsteinError(
            f"{len(missing)} of {len(rows)} rows of data.path={path} have no class in {columns.label} that train has "
            f"(row {rows[missing[0]]} the first): name another data.label_column, or set data.num_classes=null"
        )
    return classes


def _captions(table: Any, columns: Columns, rows: np.ndarray) -> list[str] | None:
    """The caption of each row on one line, the first of several, "" where there is none."""
    if columns.caption is None:
        return None
    values = _column(table, columns.caption)
    return [caption_text(values[row]) for row in rows.tolist()]


def _column(table: Any, name: str) -> list[Any]:
    """All cells of a column, read as one."""
    found: list[Any] = table.select_columns([name])[:][name]
    return found


def caption_text(value: Any) -> str:
    """A caption on one line; the first of several."""
    first = value[0] if isinstance(value, list) and value else value
    return "" if first is None or isinstance(first, list) else " ".join(str(first).split())


def _save(place: Path, keys: np.ndarray) -> None:
    """Keeps the keys, whole or not at all; where it cannot be done they are made again next time."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, keys)
            os.replace(name, place)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError:
        return
