"""A training that is a trial of a search: its figures are reported, and it ends where they are not worth going on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from ornstein.errors import Pruned
from ornstein.metrics.figures.naming import same_figure
from ornstein.training.callbacks.checkpoint import Checkpoint
from ornstein.training.callbacks.lookup import callbacks_of

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)


class TrialPruning(pl.Callback):
    """Reports a figure to the trial's storage each time it is logged, and ends training where the pruner says so.

    The figure is read at the end of a step, after the callbacks that log it. Training then ends by :class:`Pruned`,
    raised by the checkpoint callback after it has written the state of that step. The first of several processes asks,
    and all do what it was told. The last step's figure is reported and ends nothing. A storage that does not answer is
    told of once, and training goes on.

    Args:
        monitor: the figure's name; ``val/fid`` finds ``val/fid_1k`` too, as ``Checkpoint`` does.
        open_trial: opens the trial, with the study's pruner; called by the first process when there is something to
            report.
    """

    def __init__(self, monitor: str, *, open_trial: Callable[[], optuna.Trial]) -> None:
        self.monitor = monitor
        self._open_trial: Callable[[], optuna.Trial] | None = open_trial
        self._trial: optuna.Trial | None = None
        self._reported: Any = None
        self._seen = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes up the count where a checkpoint left it."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reports a figure that was logged in this step, and has training end where it is to."""
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        name = same_figure(self.monitor, trainer.callback_metrics)
        # The same number logged anew is another tensor.
        if name is None or trainer.callback_metrics[name] is self._reported:
            return
        self._reported = trainer.callback_metrics[name]
        hopeless = trainer.is_global_zero and self._report(float(self._reported), step)
        if trainer.world_size > 1:
            hopeless = bool(trainer.strategy.broadcast(hopeless, src=0))
        if not hopeless or step == trainer.max_steps:
            return
        stop = Pruned(f"pruned at step {step:,} with {name} {float(self._reported):.4g}")
        for checkpoint in callbacks_of(trainer, Checkpoint):
            checkpoint.stop_with(stop)
            return
        raise stop

    def _report(self, value: float, step: int) -> bool:
        """Whether the trial is to end."""
        if self._open_trial is None or not math.isfinite(value):
            return False
        try:
            if self._trial is None:
                self._trial = self._open_trial()
            self._trial.report(value, step)
            return self._trial.should_prune()
        except Exception as error:  # whatever a storage may raise: a training is worth more than its report
            self._open_trial = None
            log.warning("this trial cannot be reported, and will not be pruned (%s)", error)
            return False
