"""Tables that say what belongs to each image: csv, tsv, jsonl and parquet, with their faults told by line."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ornstein.data.describe import NAMED, read_text
from ornstein.errors import OrnsteinError

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Row:
    """The values of the columns that were asked for, and where they stand, for messages: "captions.csv, line 7"."""

    place: str
    values: tuple[Any, ...]


def read_columns(path: Path) -> tuple[str, ...]:
    """Names of a table's columns, from its head alone (of a jsonl file: the keys of its first line).

    Raises:
        OrnsteinError: no such file, another ending, or not what its ending says.
    """
    _check_file(path)
    if path.suffix.lower() == ".parquet":
        return tuple(_parquet(path).schema_arrow.names)
    head = next(_lines(path), None)
    if head is None:
        raise OrnsteinError(f"{path} is empty: give it columns and rows")
    return tuple(head[1])


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """All rows of a table, some of their columns.

    Args:
        path: a csv or tsv file with a head, a jsonl file of one object a line, or a parquet file; text in UTF-8.
        columns: which, in the order of `Row.values`. Text from csv and tsv; from the others what they hold.

    Raises:
        OrnsteinError: no such file, another ending, a damaged one, or a column or value that is not there, by line.
    """
    check_columns(path, columns)
    if path.suffix.lower() == ".parquet":
        return list(_parquet_rows(path, columns))
    rows = []
    for line, content in _lines(path, head=False):
        place = f"{path}, line {line}"
        missing = [column for column in columns if column not in content]
        if missing:
            raise OrnsteinError(f"{place} has no {', '.join(missing)}: add it")
        rows.append(Row(place, tuple(content[column] for column in columns)))
    if not rows:
        raise OrnsteinError(f"{path} has no rows: give it some")
    return rows


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """Refuse a table that lacks a column, naming those that it has (OrnsteinError)."""
    there = read_columns(path)
    missing = [column for column in columns if column not in there]
    if missing:
        more = ", ..." if len(there) > NAMED else ""
        raise OrnsteinError(
            f"{path} has no column {', '.join(missing)}, only {', '.join(there[:NAMED])}{more}: set data.image_column, "
            "data.caption_column or data.label_column to one of those"
        )


def _check_file(path: Path) -> None:
    if path.suffix.lower() not in ENDINGS:
        raise OrnsteinError(f"data.table={path}: tables are read from {', '.join(ENDINGS)} files; name one of those")
    if not path.is_file():
        raise OrnsteinError(f"data.table={path}: there is no such file")


def _lines(path: Path, *, head: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1 and contents by column: with `head` a csv's head line too, by column its name."""
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        yield from _json_lines(path, text)
        return
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    names: list[str] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if not cells:
                continue
            if not names:
                names = cells
                twice = sorted({name for name in names if names.count(name) > 1})
                if twice:
                    raise OrnsteinError(f"{path} has two columns named {twice[0]}: rename one")
                if not head:
                    continue
            if len(cells) != len(names):
                raise OrnsteinError(
                    f"{path}, line {reader.line_num} has {len(cells)} values for {len(names)} columns: quote texts "
                    "that hold a comma or tab"
                )
            yield reader.line_num, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise OrnsteinError(f"{path}, line {reader.line_num} cannot be read ({error}): repair it") from error


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """One object a line; empty lines count and hold nothing."""
    # Not splitlines(): texts may hold other line separators of Unicode's.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise OrnsteinError(f"{path}, line {number} is no JSON ({error}): repair it") from error
        if not isinstance(content, dict):
            raise OrnsteinError(f'{path}, line {number} is no object like {{"file_name": "a.png", "text": "..."}}')
        yield number, content


def _parquet(path: Path) -> Any:
    """An open parquet file."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise OrnsteinError(
            f"data.table={path} needs pyarrow: pip install 'ornstein[data]', or save it as csv"
        ) from error
    try:
        return ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise OrnsteinError(f"{path} is no parquet file that can be read ({error})") from error


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    from pyarrow import ArrowException

    number = 0
    try:
        for batch in _parquet(path).iter_batches(columns=list(columns)):
            for content in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                number += 1
                yield Row(f"{path}, row {number}", tuple(content))
    except (ArrowException, OSError) as error:
        raise OrnsteinError(f"{path} cannot be read after row {number} ({error})") from error
    if number == 0:
        raise OrnsteinError(f"{path} has no rows: give it some")
