"""Pictures that cannot be written: told once, and training goes on without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

_told: WeakSet[pl.Callback] = WeakSet()


@contextmanager
def pictures_may_fail(owner: pl.Callback) -> Iterator[None]:
    """Within it, what the file system refuses (a full disk, a folder that is gone) is a warning, one of each ``owner``.

    For pictures alone: figures and checkpoints that cannot be written end a run.
    """
    try:
        yield
    except OSError as error:
        if owner not in _told:
            _told.add(owner)
            reason = error.strerror or " ".join(str(error).split())
            where = f" to {error.filename}" if error.filename else ""
            rank_zero_warn(
                f"{type(owner).__name__}: a picture could not be written{where} ({reason}); training goes on without "
                "it, and tries again at the next"
            )
