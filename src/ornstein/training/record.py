"""One way to log from callbacks: to every logger and to ``trainer.callback_metrics``, at a step of our choosing."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch

from ornstein.training.base import TrainingModule


def record(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Logs scalars at the current optimizer step, beside ``images_seen`` and ``time/wall_s``, the other axes that they
    may be drawn over: images of all starts so far and, where a callback keeps the time, seconds of all starts so far.

    Checkpoints can monitor them by name.
    """
    module = trainer.lightning_module
    row = dict(values)
    if isinstance(module, TrainingModule):
        row["images_seen"] = float(module.images_seen)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "wall_seconds"):  # Throughput, which logs by this function
            row["time/wall_s"] = round(callback.wall_seconds(), 3)
    for logger in trainer.loggers:
        logger.log_metrics(row, step=trainer.global_step)
    # float64, so that a summary repeats the rows' figures digit for digit.
    figures = torch.tensor(list(values.values()), dtype=torch.float64).unbind()
    trainer.callback_metrics.update(zip(values, figures, strict=True))


def due(step: int, every: int | None) -> bool:
    """Whether an action repeated every ``every`` optimizer steps is due after step number ``step``; None is never."""
    return every is not None and step > 0 and step % every == 0
