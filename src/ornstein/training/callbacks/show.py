"""Pictures to whichever loggers take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from PIL import Image


def show_image(trainer: pl.Trainer, name: str, image: Image.Image) -> None:
    """Logs a picture at the current optimizer step: W&B and TensorBoard take it, a CSV file does not."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[image], step=trainer.global_step)
        elif isinstance(logger, pl.loggers.TensorBoardLogger):
            import numpy

            logger.experiment.add_image(name, numpy.asarray(image), global_step=trainer.global_step, dataformats="HWC")


def show_table(trainer: pl.Trainer, name: str, *, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Logs a table, Pillow images among its values, at the current optimizer step where a logger takes one (W&B)."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(
                key=name, columns=list(columns), data=[list(row) for row in rows], step=trainer.global_step
            )


def show_animation(trainer: pl.Trainer, name: str, path: Path) -> None:
    """Logs a GIF or MP4 at the current optimizer step where a logger takes one (W&B)."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_video"):
            logger.log_video(key=name, videos=[str(path)], step=trainer.global_step, format=[path.suffix[1:]])
