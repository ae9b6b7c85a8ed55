"""Images that cannot be used: named in one sentence, listed in a report, left out up to a limit."""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from ornstein.errors import OrnsteinError

NAMED = 10
_RAISED = re.compile(r"\nornstein\.[\w.]+: ")
Batch = TypeVar("Batch")


class BadImage(OrnsteinError):
    """One image that cannot be used; `name` and `reason` are what `Bad.add` takes."""

    # By one argument too: torch makes a worker's exception anew from its message alone.
    def __init__(self, told: str, *, name: str = "", reason: str = "") -> None:
        super().__init__(told)
        self.name = name
        self.reason = reason or told


class Bad:
    """What was found wrong in a data set, collected while it is read and judged once at the end.

    Args:
        limit: how many bad images may be left out (`data.max_bad`); 0 refuses the first.
        where: what holds them, as a sentence should say it: the folder, the table, the data set's name.

    Raises:
        OrnsteinError: a limit that is no whole number of 0 or more.
    """

    def __init__(self, limit: int, *, where: str) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise OrnsteinError(f"data.max_bad={limit}: give the number of bad images that may be left out, 0 for none")
        self.limit = limit
        self.where = where
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Note one bad image, from any thread; a name that was noted before keeps its first reason."""
        with self._lock:
            self._reasons.setdefault(str(name), " ".join(str(reason).split()))

    @property
    def count(self) -> int:
        """How many images were noted."""
        return len(self._reasons)

    @property
    def names(self) -> list[str]:
        """Their names, sorted: threads note them in any order."""
        with self._lock:
            return sorted(self._reasons)

    def settle(self, report: Path | None = None) -> None:
        """Silence where nothing is bad, a warning and a report up to the limit, an error above it.

        Args:
            report: a JSON file {where, limit, bad: {name: reason}} to write, atomically, beside the warning.

        Raises:
            OrnsteinError: more than the limit, the first ten by name.
        """
        names = self.names
        if not names:
            return
        reasons = {name: self._reasons[name] for name in names}
        images = f"{len(names)} image{'s' if len(names) > 1 else ''}"
        listed = "; ".join(f"{name}: {reasons[name]}" for name in names[:NAMED])
        more = f"; and {len(names) - NAMED} more" if len(names) > NAMED else ""
        if len(names) > self.limit:
            allowed = f", {self.limit} may be (data.max_bad={self.limit})" if self.limit else ""
            raise OrnsteinError(
                f"{images} of {self.where} cannot be used{allowed}: {listed}{more}. Repair or remove them, "
                f"or leave them out with data.max_bad={len(names)}"
            )
        told = f"{images} of {self.where} left out (data.max_bad={self.limit}): {listed}{more}"
        if report is not None:
            try:
                write_json(report, {"where": self.where, "limit": self.limit, "bad": reasons})
                told += f". All are listed in {report}"
            except OrnsteinError as error:
                # What may be left out is no reason to stop, and neither is a disk that will not have the list of it.
                told += f". The list of all is missing: {error}"
        warnings.warn(told, stacklevel=2)


def plainly(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches of a loader, whose workers' OrnsteinErrors come as the one sentence, not in a traceback of theirs."""
    try:
        yield from batches
    except OrnsteinError as error:
        # torch gives the message "Caught ... in DataLoader worker process 0.", the traceback, and the sentence last.
        sentence = _RAISED.split(str(error))[-1].strip()
        if sentence == str(error):
            raise
        raise OrnsteinError(sentence) from error


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whole or not at all. Raises OrnsteinError where the disk will not have it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            # File names that are not UTF-8 come out as escapes.
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                json.dump(content, file, ensure_ascii=False, indent=1)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise OrnsteinError(f"{path} cannot be written ({error.strerror or error}): make room for it") from error
