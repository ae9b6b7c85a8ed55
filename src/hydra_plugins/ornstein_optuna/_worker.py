"""Which commands work on a study: a file each, touched while they live, so that the trials of a dead one are found."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ornstein.experiment.atomic import read_json, write_json

BEAT_S = 15
DEAD_AFTER_S = 120  # without a sign of life; a dead process of this machine is known at once


class Worker:
    """One command, a worker of the study in ``folder``; its number is its own for good.

    Attributes:
        index: 0 for the first that worked here, 1 for the second, be it at the same time or in a resumed search.
        path: its file.
    """

    def __init__(self, folder: Path) -> None:
        """Joins. Raises ``OSError`` from the file system."""
        folder.mkdir(parents=True, exist_ok=True)
        index = 0
        while True:
            path = folder / f"worker_{index}.json"
            try:
                path.open("x", encoding="utf-8").close()
                break
            except FileExistsError:
                index += 1
        self.index, self.path = index, path
        self._ended = threading.Event()

    def __enter__(self) -> Worker:
        """Shows that it lives, until it ends."""
        write_json(self.path, {"host": platform.node(), "pid": os.getpid(), "ended": False})
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Says that it has ended: what it left running will not end."""
        self._ended.set()
        write_json(self.path, {"host": platform.node(), "pid": os.getpid(), "ended": True})

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                os.utime(self.path)
            except OSError:  # the next beat may reach the file system again
                continue


def lives(path: str | os.PathLike[str]) -> bool:
    """Whether the worker of this file still works."""
    try:
        told = read_json(path)
        modified = os.stat(path).st_mtime
    except (OSError, ValueError):
        return False
    if told.get("ended"):
        return False
    if told.get("host") == platform.node() and isinstance(told.get("pid"), int):
        try:
            os.kill(told["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return _now(Path(path).parent) - modified < DEAD_AFTER_S


def _now(folder: Path) -> float:
    """The file system's clock, which may be another machine's."""
    probe = folder / f".now_{os.getpid()}_{threading.get_ident()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def alone(lock_file: Path) -> Iterator[None]:
    """One worker at a time: whoever is within counts the trials and takes some, and nobody else does meanwhile."""
    from optuna.storages.journal import JournalFileSymlinkLock

    lock_file.parent.mkdir(parents=True, exist_ok=True)
    # Optuna's: its journal's own, which network file systems keep and which a killed process does not keep for ever.
    lock = JournalFileSymlinkLock(str(lock_file))
    lock_file.touch()
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
