"""Loggers that may die: whichever raises is told of once and logs no more, and the run goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from ornstein.experiment.csv_log import CSVLogger

_METHODS = ("after_save_checkpoint", "close", "finalize", "save", "sync")


def survivable(logger: Logger) -> Logger:
    """``logger`` itself, none of whose methods raises from now on: after the first failure they do nothing.

    Methods are those whose names begin with ``log_`` and ``save``, ``sync``, ``finalize``, ``close``. ``metrics.csv``
    is left as it is: it is the record of the run, and a disk that refuses it stops the run.
    """
    if isinstance(logger, CSVLogger):
        return logger
    for name in dir(type(logger)):
        if (name.startswith("log_") or name in _METHODS) and callable(getattr(type(logger), name)):
            setattr(logger, name, _guarded(logger, getattr(logger, name)))
    return logger


def _guarded(logger: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        if getattr(logger, "dead", False):
            return None
        try:
            return method(*arguments, **options)
        except Exception as error:  # whatever a logger trips over, the training is worth more
            logger.dead = True
            name = type(logger).__name__.removeprefix("Run").removesuffix("Logger")
            warnings.warn(f"{name} stopped logging ({reason(error)}): this run goes on without it", stacklevel=2)
            return None

    return call


def reason(error: BaseException) -> str:
    """An exception on one line of at most about 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")
