"""Writing a folder of shards: each file whole or not at all, one writer a claim, and a full disk told in a sentence."""

import errno
import fcntl
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ornstein.data.shards import INDEX
from ornstein.errors import OrnsteinError

LOCK = ".lock"
LOCK_START = 0  # byte of the lock file that stands for the folder; shards' bytes may follow
FULL = (errno.ENOSPC, errno.EDQUOT)


class Claims:
    """Bytes of a lock file in a folder, each to be had by one process at a time.

    The kernel gives a process's claims back when it ends, however it ends.

    Args:
        folder: that is written into.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)

    def close(self) -> None:
        """Give the lock file back."""
        os.close(self._file)

    @contextmanager
    def claim(self, place: int, *, wait: bool) -> Iterator[bool]:
        """Holds one byte of the lock file; gives False where another process has it and `wait` is off."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
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
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)


def check_place(folder: Path) -> None:
    """Refuse a place for shards that is a file, or a folder that holds something else (OrnsteinError)."""
    if folder.exists() and not folder.is_dir():
        raise OrnsteinError(f"out={folder} is a file: name a folder.")
    if folder.is_dir() and not (folder / INDEX).is_file():
        foreign = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
        if foreign:
            raise OrnsteinError(
                f"out={folder} holds something else ({min(foreign)}, say): name an empty or a new folder."
            )


def check_room(folder: Path, needed: int, *, holds: str, or_else: str) -> None:
    """Refuse a disk with fewer than `needed` bytes free (OrnsteinError)."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OrnsteinError(
            f"{needed / 1e6:,.0f} MB of {holds} do not fit into the {free / 1e6:,.0f} MB free at out={folder}: name a "
            f"folder on a larger disk{or_else}."
        )


@contextmanager
def told_when_full(folder: Path) -> Iterator[None]:
    """Within it, a disk that fills up is told in one sentence.

    Raises:
        OrnsteinError: no room is left for the next file; what is there stays whole.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(folder).free
        raise OrnsteinError(
            f"the disk of out={folder} is full ({free / 1e6:,.1f} MB free, too few for the next file): free some room "
            "and give the same command again, which goes on where it stopped; nothing is left half written."
        ) from error


def new_array(path: Path, *, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy file as a writable map, all of whose room is taken at once.

    Without that a disk that fills up later would kill the process as it writes into the map.

    Raises:
        OSError: the disk has no room.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, 0, path.stat().st_size)
    finally:
        os.close(descriptor)
    return array


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an .npy file.

    Raises:
        OSError: with its number where the disk is full, which `numpy.save` leaves out.
    """
    whole = np.ascontiguousarray(array)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(whole))
        file.write(whole.reshape(-1).view(np.uint8).data)


def beside(path: Path) -> Path:
    """A temporary name in the folder of `path`: a move is atomic only within a file system."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")


def clear_left(path: Path) -> None:
    """Remove what a writer of `path` that was killed has left beside it; for who has claimed it."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file beside `path` and moves it into place in one step."""
    temporary = beside(path)
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """The file's content to the disk, so that a power cut leaves no empty file under a final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
