"""Logs that go on where the checkpoint stands."""

import time
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import Logger

from ornstein.errors import OrnsteinError
from ornstein.experiment.csv_log import CSVLogger
from ornstein.experiment.run_dir import newest_whole_checkpoint
from ornstein.experiment.wandb_log import RunWandbLogger

_KEY = "ornstein_logs"


class ResumableLogs(pl.Callback):
    """Ties the loggers to the checkpoints, so that a run killed anywhere logs each step once.

    Lightning saves a step's checkpoint before it logs that step's row: killed in between, the row would be
    lost, as the resumed run begins with the next step. So when a checkpoint is made, the row goes to
    ``metrics.csv`` first, and at the start of a resumed fit the rows of later steps are cut away, W&B's too. The
    checkpoint also keeps the seconds of training so far. Put this into the trainer's callbacks of every
    run.
    """

    def __init__(self) -> None:
        """Takes no options."""
        self._elapsed_before = 0.0
        self._started = time.monotonic()
        self._resumed_from: int | None = 0  # a run killed before its first checkpoint starts over

    def elapsed(self) -> float:
        """Seconds of training behind the run as it stands, those before the checkpoint included."""
        return self._elapsed_before + time.monotonic() - self._started

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the step's row to the disk, and the time into ``checkpoint``."""
        for logger in _csv(trainer) if trainer.is_global_zero else ():
            try:
                _log_pending(trainer, logger)
                logger.sync()
            except OSError as error:
                raise OrnsteinError(
                    f"no checkpoint of step {trainer.global_step}: its row could not be written to {logger.path} "
                    f"({error.strerror or error}): make room or choose another folder; the last good checkpoint is "
                    f"{newest_whole_checkpoint(logger.path.parent / 'checkpoints') or 'none yet'}"
                ) from error
        checkpoint[_KEY] = {"elapsed_s": self.elapsed()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up where the checkpoint stands."""
        # Our callbacks log at global_step G, Lightning's own `self.log` at G - 1. A row G of Lightning's is
        # one step ahead and harmless: the resumed run writes the same values into it again.
        self._resumed_from = int(checkpoint["global_step"])
        self._elapsed_before = float(checkpoint.get(_KEY, {}).get("elapsed_s", 0.0))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells W&B where its rows end, before anything is logged."""
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, RunWandbLogger) and self._resumed_from is not None:
                logger.resume_from(self._resumed_from or -1)  # started over, also the rows of step 0 come again

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut the rows that the resumed run will write again; set the loggers' clocks."""
        self._started = time.monotonic()
        if self._resumed_from is not None:
            for file in _csv(trainer):
                file.truncate(self._resumed_from)
            self._resumed_from = None
        for logger in trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                logger.elapsed = self.elapsed


def _csv(trainer: pl.Trainer) -> list[CSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]


def _log_pending(trainer: pl.Trainer, logger: CSVLogger) -> None:
    """Write what Lightning has collected for the current batch and would log right after the checkpoint."""
    connector = trainer._logger_connector  # Lightning offers no public view of one batch's metrics
    results = trainer._results
    if results is None or not trainer.training or not isinstance(connector._first_loop_iter, bool):
        return
    if trainer.fit_loop._should_accumulate() or not connector.should_update_logs:
        return
    metrics = results.metrics(on_step=True)["log"]
    if metrics:
        rows = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        step = rows.pop("step", trainer.fit_loop.epoch_loop._batches_that_stepped)
        logger.log_metrics({"epoch": trainer.current_epoch, **rows}, step=int(step))


def close_loggers(loggers: Iterable[Logger]) -> None:
    """End the loggers of a run whose last figure is logged: files closed, the W&B run finished.

    Several runs in one process (a multirun) need this between them, or the next would log into the last
    one's W&B run.
    """
    for logger in loggers:
        close = getattr(logger, "close", None)
        if callable(close):
            close()
        else:
            logger.finalize("success")
