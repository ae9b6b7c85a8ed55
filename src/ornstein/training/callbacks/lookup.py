"""What a callback finds of the others through the trainer."""

from __future__ import annotations

from typing import Any, TypeVar

import lightning.pytorch as pl

Kind = TypeVar("Kind", bound=pl.Callback)


def callbacks_of(trainer: pl.Trainer, kind: type[Kind]) -> list[Kind]:
    """The trainer's callbacks of one class, in their order."""
    every: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in every if isinstance(callback, kind)]


def data_of(trainer: pl.Trainer) -> Any:
    """The data module that the trainer was given; it has ``train`` and ``val``."""
    return trainer.datamodule  # type: ignore[attr-defined]
