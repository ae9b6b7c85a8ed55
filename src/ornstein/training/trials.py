"""Where a search keeps its trials, and what decides that one is not worth going on with.

A training that is a trial reports to the same storage, from whatever process it runs in. Optuna is imported when it is
first needed: it is an extra, and takes a while.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.journal"
PRUNERS = ("median", "hyperband")


def check_optuna() -> None:
    """Raises ``OrnsteinError`` where Optuna is not installed."""
    if find_spec("optuna") is None:
        raise OrnsteinError(
            "hydra/sweeper=optuna needs the package optuna: pip install 'ornstein[search]', or leave hparams_search= "
            "out and list values, objective=v,x0."
        )


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna without its log of every trial and its notes on what of it may change."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def place_of(storage: str | None, folder: str | os.PathLike[str]) -> str:
    """Where the trials are kept: ``storage`` as it was given, or the journal in the sweep's folder.

    Args:
        storage: a database's URL (``sqlite:///trials.db``), the path of a journal, or None.
        folder: the sweep's.
    """
    if storage is None:
        return str((Path(folder) / JOURNAL).absolute())
    return storage if "://" in storage else str(Path(storage).expanduser().absolute())


def open_storage(place: str) -> optuna.storages.BaseStorage:
    """The storage at ``place``, made where there is none.

    A journal is a file that is only appended to, under a lock that network file systems keep too: several processes,
    on several machines, may write to it.

    Raises:
        OrnsteinError: it cannot be opened or read.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    try:
        if "://" in place:
            return optuna.storages.RDBStorage(place)
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(place))
    except Exception as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OrnsteinError(
            f"hydra.sweeper.storage={place} cannot be opened ({told}): name a file for a journal, or a database's URL "
            "such as sqlite:///trials.db."
        ) from error


def build_pruner(asked: Any, *, n_startup_trials: int) -> optuna.pruners.BasePruner:
    """The pruner of ``hydra.sweeper.pruner``.

    Args:
        asked: ``median``, ``hyperband``, None for none, or an instance of Optuna's.
        n_startup_trials: trials that end undisturbed before any is judged by them.

    Raises:
        OrnsteinError: another name.
    """
    import optuna

    if asked is None:
        return optuna.pruners.NopPruner()
    if isinstance(asked, optuna.pruners.BasePruner):
        return asked
    if asked == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=n_startup_trials)
    if asked == "hyperband":
        return optuna.pruners.HyperbandPruner()
    raise OrnsteinError(
        f"hydra.sweeper.pruner={asked if not isinstance(asked, Mapping) else dict(asked)} is unknown: choose "
        f"{', '.join(PRUNERS)} or null, or give {{_target_: optuna.pruners....}}."
    )
