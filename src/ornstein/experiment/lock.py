"""One process to a run folder."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

from ornstein.errors import OrnsteinError

_HELD: set[int] = set()


def _drop_in_child() -> None:
    # a forked data worker shares the lock with its parent and would keep it after the parent was killed
    for descriptor in _HELD:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_drop_in_child)


def is_writer() -> bool:
    """Whether this process writes a run's files: rank zero of a distributed run, and whoever is alone.

    Told by the variables that torchrun, SLURM's srun and Lightning's own launcher set; no library is asked.
    """
    ranks = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
    return all(os.environ.get(name, "0") in ("", "0") for name in ranks)


class FolderLock:
    """An exclusive lock on a file that the kernel drops when this process ends, however it ends.

    ``flock`` is used, not the file's existence: a killed run leaves the file but not the lock.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """``path``: the lock's file, created on first use and left behind."""
        self.path = Path(path)
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock, or say who has it; taking it twice through one object does nothing.

        Ranks other than zero work under rank zero's lock and take none.

        Raises:
            OrnsteinError: where another process (or another object in this one) holds it.
        """
        if self.held or not is_writer():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OrnsteinError(
                    f"the run folder {self.path.parent} is in use by {self._owner()}: wait until that run "
                    "has ended, or give this one another folder"
                ) from None
            warnings.warn(
                f"{self.path.parent} lies on a file system without locks ({error.strerror}): "
                "see to it yourself that no second process uses this run folder",
                stacklevel=2,
            )
            return
        self._descriptor = descriptor
        _HELD.add(descriptor)
        owner = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)

    def _owner(self) -> str:
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
        except (OSError, ValueError, KeyError):
            return "another process"

    def release(self) -> None:
        """Give the lock back; without it, nothing happens."""
        if self._descriptor is not None:
            _HELD.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "FolderLock":
        """Acquire (raises as :meth:`acquire` does)."""
        self.acquire()
        return self

    def __exit__(self, *_: Any) -> None:
        """Release."""
        self.release()
