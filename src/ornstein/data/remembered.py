"""What was found out about files once, kept in the cache folder by what a file looks like from outside.

It saves time and nothing else: a table that is missing, damaged or cannot be written only means looking again.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

STAMP_BYTES = 16
# Fewer are looked at again within a second or two, and leave nothing behind.
WORTH_KEEPING = 256


def recall(path: Path, *, width: int) -> dict[bytes, bytes]:
    """A table of `width` bytes for each stamp of 16; empty where there is none that can be read."""
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return {}
    if table.dtype != np.uint8 or table.ndim != 2 or table.shape[1] != STAMP_BYTES + width:
        return {}
    return {row[:STAMP_BYTES]: row[STAMP_BYTES:] for row in (line.tobytes() for line in table)}


def remember(path: Path, found: Mapping[bytes, bytes]) -> None:
    """Write a table whole or not at all; silently not at all where the disk will not have it."""
    rows = b"".join(stamp + value for stamp, value in sorted(found.items()))
    table = np.frombuffer(rows, dtype=np.uint8).reshape(len(found), -1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, table)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError:
        return
