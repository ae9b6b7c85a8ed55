"""``metrics.csv``: one row a step, kept whole through kills, read back as the same numbers."""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ornstein.errors import OrnsteinError
from ornstein.experiment.atomic import write_text

Value = int | float | str
Row = dict[str, Value]

STEP = "step"
_TAIL_ROWS = 32


def read_metrics(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a ``metrics.csv`` in order of step, each with the keys that were logged at that step.

    Whole numbers come back as int, others as the same float that was written. A last line that a killed
    process left half-written is passed over; so is a second line of one step (none is written).

    Raises:
        OrnsteinError: where the file is missing, or its first line is not the header of a ``metrics.csv``.
    """
    _, rows = _parse(Path(path))
    return rows


def _parse(path: Path) -> tuple[list[str], list[Row]]:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        raise OrnsteinError(f"there is no {path}: has the run logged anything yet?") from None
    lines = text.split("\n")[:-1]  # what follows the last newline is torn
    if not lines:
        return [STEP], []
    columns = next(csv.reader([lines[0]]))
    if columns[0] != STEP or len(set(columns)) != len(columns):
        raise OrnsteinError(f"{path} is no metrics.csv of a run (its first line is {lines[0][:80]!r}): move it away")
    rows: dict[int, Row] = {}
    for line in lines[1:]:
        cells = next(csv.reader([line]), [])
        # digits only: a line that lost its head, or was cut, is not taken for a row of some other step
        if len(cells) == len(columns) and cells[0].isdecimal():
            step = int(cells[0])
            rows.setdefault(step, {STEP: step}).update(
                (column, _value(cell)) for column, cell in zip(columns[1:], cells[1:], strict=True) if cell != ""
            )
    return columns, [rows[step] for step in sorted(rows)]


def _value(cell: str) -> Value:
    for convert in (int, float):
        try:
            return convert(cell)
        except ValueError:
            continue
    return cell


def _cell(key: str, value: Any) -> Value:
    """A number or a text as it is kept in a row. Raises ``ValueError`` for anything else."""
    if getattr(value, "ndim", None) == 0:  # a scalar of torch or NumPy
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return " ".join(value.split("\n"))
    raise ValueError(f"metric {key!r} is a {type(value).__name__}: log a number (or a short text) under it")


def _line(row: Mapping[str, Value], columns: list[str]) -> bytes:
    buffer = io.StringIO()
    cells = [repr(value) if isinstance(value, float) else value for value in (row.get(key, "") for key in columns)]
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue().encode()


class MetricsFile:
    """The writer's side of a ``metrics.csv``.

    A step's row is on the way to the disk when :meth:`add` returns (one ``write``, so a killed process
    leaves at most one torn line, which the next start removes), and what is logged later at the same step
    joins it. A new column rewrites the file, atomically. Steps may come a little out of order (a callback
    that counts from one): rows stay sorted.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open or make the file at ``path``; rows already there are repaired and kept.

        Raises:
            OrnsteinError: where there is a file of that name that is no ``metrics.csv``.
            OSError: from the file system.
        """
        self.path = Path(path)
        self._descriptor: int | None = None
        columns, rows = _parse(self.path) if self.path.exists() else ([STEP], [])
        self._columns = columns
        self._replace(rows)

    @property
    def last_step(self) -> int | None:
        """The largest step that has a row; None while there is none."""
        return int(self._tail[-1][STEP]) if self._tail else None

    def _replace(self, rows: list[Row]) -> None:
        """Write the whole file anew and keep the last rows at hand, with where they begin."""
        self.close()
        lines = [_line(row, self._columns) for row in rows]
        header = _line({key: key for key in self._columns}, self._columns)
        write_text(self.path, b"".join([header, *lines]).decode())
        self._descriptor = os.open(self.path, os.O_RDWR)
        self._tail = rows[-_TAIL_ROWS:]
        self._earlier = len(rows) > _TAIL_ROWS
        self._offsets: list[int] = []
        at = len(header) + sum(len(line) for line in lines[: -_TAIL_ROWS or None])
        if len(lines) <= _TAIL_ROWS:
            at = len(header)
        for line in lines[-_TAIL_ROWS:]:
            self._offsets.append(at)
            at += len(line)
        self._end = at

    def add(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Put ``metrics`` (numbers, scalar tensors, short texts) into the row of ``step`` >= 0.

        Raises:
            ValueError: for a value that is neither number nor text, a negative step, a key with a line break.
            OSError: from the file system.
        """
        if step < 0:
            raise ValueError(f"metrics are logged at a step >= 0, not {step}")
        if bad := [key for key in metrics if "\n" in key]:
            raise ValueError(f"the metric name {bad[0]!r} holds a line break: choose another")
        cells = {key: _cell(key, value) for key, value in metrics.items() if key != STEP}
        if self._descriptor is None:
            self._reopen()
        new = [key for key in cells if key not in self._columns]
        if new:
            rows = self.rows()
            self._columns = [*self._columns, *new]
            self._replace(_merged(rows, step, cells))
        elif self._earlier and step < int(self._tail[0][STEP]):
            self._replace(_merged(self.rows(), step, cells))
        else:
            self._write_tail(step, cells)

    def _write_tail(self, step: int, cells: Row) -> None:
        assert self._descriptor is not None
        first = next((i for i, row in enumerate(self._tail) if int(row[STEP]) >= step), len(self._tail))
        self._tail = _merged(self._tail, step, cells)
        lines = [_line(row, self._columns) for row in self._tail[first:]]
        at = self._offsets[first] if first < len(self._offsets) else self._end
        _write_at(self._descriptor, b"".join(lines), at)
        del self._offsets[first:]
        for line in lines:
            self._offsets.append(at)
            at += len(line)
        if at < self._end:
            os.ftruncate(self._descriptor, at)
        self._end = at
        surplus = len(self._tail) - _TAIL_ROWS
        if surplus > 0:
            del self._tail[:surplus], self._offsets[:surplus]
            self._earlier = True

    def rows(self) -> list[Row]:
        """All rows as they stand on the disk."""
        return _parse(self.path)[1]

    def truncate(self, *, after_step: int) -> int:
        """Cut the rows of steps greater than ``after_step``; columns stay. Returns how many were cut."""
        rows = self.rows()
        kept = [row for row in rows if int(row[STEP]) <= after_step]
        if len(kept) < len(rows) or self._descriptor is None:
            self._replace(kept)
        return len(rows) - len(kept)

    def sync(self) -> None:
        """Force the rows to the disk (``add`` leaves that to the system, which outlives this process)."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def _reopen(self) -> None:
        self._columns, rows = _parse(self.path)
        self._replace(rows)

    def close(self) -> None:
        """Let go of the file; the next :meth:`add` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _write_at(descriptor: int, data: bytes, at: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, at)
        data, at = data[done:], at + done


def _merged(rows: list[Row], step: int, cells: Row) -> list[Row]:
    """``rows`` with ``cells`` in the row of ``step``, made where it belongs if there is none."""
    index = next((i for i in range(len(rows) - 1, -1, -1) if int(rows[i][STEP]) <= step), -1)
    if index >= 0 and rows[index][STEP] == step:
        return [*rows[:index], {**rows[index], **cells}, *rows[index + 1 :]]
    return [*rows[: index + 1], {STEP: step, **cells}, *rows[index + 1 :]]
