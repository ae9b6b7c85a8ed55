"""Data workers that die, of too little memory say: new ones read on where they were, and the batches are the same."""

from __future__ import annotations

import re
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ornstein.errors import OrnsteinError

MAX_DEATHS = 3
# So many batches after the last death, earlier ones are forgotten: a run of weeks may lose a worker now and then.
FORGOTTEN_AFTER = 10_000
_DEATH = re.compile(
    r"^DataLoader worker \(pid\(?s?\)? ?[\d, ]+\) (exited unexpectedly|is killed by signal)"
    r"|^Pin memory thread exited unexpectedly"
)
# A batch that stood in the queue already is fetched from its worker's own hands.
_LOST = (ConnectionError, EOFError, FileNotFoundError)
Batch = TypeVar("Batch")


class WorkersDied(OrnsteinError):
    """Data workers died so often that training stops; it stands between two batches, so a checkpoint may be written."""


def surviving(begin: Callable[[], Iterator[Batch]], again: Callable[[int], Iterator[Batch]]) -> Iterator[Batch]:
    """The batches of ``begin()``; where a worker process of theirs dies, those of ``again(batches so far)`` follow.

    A death is told in one line. It is found when the next batch is asked for, within some five seconds: torch's own way
    is to raise wherever the main process happens to be, in the midst of an optimizer's step say.

    Args:
        begin: starts the workers.
        again: starts others, which leave out that many batches.

    Raises:
        WorkersDied: more than ``MAX_DEATHS`` died, with fewer than ``FORGOTTEN_AFTER`` batches between them.
    """
    given = deaths = last = 0
    batches: Iterator[Batch] | None = None
    while True:
        try:
            if batches is None:
                with _no_exceptions_from_signals():
                    batches = again(given) if deaths else begin()
                    batch = next(batches)
            else:
                batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, *_LOST) as error:
            if not _is_death(error):
                raise
            deaths, last = (deaths if given - last < FORGOTTEN_AFTER else 0) + 1, given
            if deaths > MAX_DEATHS:
                raise WorkersDied(
                    f"data workers died {deaths} times, the last after batch {given}, killed by the system perhaps as "
                    "memory ran out: lower data.num_workers (0 reads in the training process itself, in the same "
                    "order; a stream needs data.exact_resume=false for it) or data.batch_size."
                ) from None
            warnings.warn(
                f"a data worker died after batch {given} ({deaths} of {MAX_DEATHS} that may): new ones read on, the "
                "batches are the same",
                stacklevel=2,
            )
            batches = None  # which ends the other workers
            continue
        yield batch
        given += 1


def _is_death(error: Exception) -> bool:
    """Whether an exception of torch's loader means that a worker is gone, and not that it met with an error."""
    if not isinstance(error, RuntimeError):
        # What a worker itself ran into is raised anew by torch, not by what processes speak to each other with.
        return Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent.name == "multiprocessing"
    return _DEATH.search(str(error)) is not None


@contextmanager
def _no_exceptions_from_signals() -> Iterator[None]:
    """Takes torch's handler of SIGCHLD away again, which raises a worker's death out of whatever the process does."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        now = signal.getsignal(signal.SIGCHLD)
        if getattr(now, "__module__", "") == "torch.utils.data._utils.signal_handling":
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if now is before or before is None else before)
