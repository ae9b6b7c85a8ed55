"""What happens every so many optimizer steps."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from typing import Any, ClassVar

import lightning.pytorch as pl

from ornstein.errors import OrnsteinError
from ornstein.training.base import TrainingModule
from ornstein.training.callbacks.unwritten import pictures_may_fail
from ornstein.training.record import due
from ornstein.training.sharding import gathered


class Periodic(pl.Callback):
    """Calls :meth:`act` after every ``every``-th optimizer step and, with ``at_end``, after the last one.

    The last step's turn comes within that step, before its checkpoint: a run killed between the two does it
    again. Where training ends before ``max_steps`` (a time limit, early stopping), the turn comes when it has
    ended.

    Args:
        every: optimizer steps; null is never.
        at_end: also at the end.

    Raises:
        OrnsteinError: every < 1.
    """

    pictures: ClassVar[bool] = False  # whether it writes nothing but pictures, which a run can do without

    def __init__(self, *, every: int | None, at_end: bool) -> None:
        if every is not None and every < 1:
            raise OrnsteinError(
                f"{type(self).__name__}: every={every} counts optimizer steps: at least 1, or null for never."
            )
        self.every, self.at_end = every, at_end
        self._seen = self._acted = -1

    @abstractmethod
    def act(self, trainer: pl.Trainer, module: Any) -> None:
        """Does it with a ``TrainingModule``, at ``trainer.global_step``; on every rank."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes up the count where a checkpoint left it."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Acts where it is due; an accumulated step's micro-batches count once."""
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        if due(step, self.every) or (self.at_end and step == trainer.max_steps):
            self._act(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Acts where training ended before its last planned step."""
        if self.at_end and trainer.global_step > 0:
            self._act(trainer, pl_module)

    def _act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._acted != trainer.global_step:
            self._acted = trainer.global_step
            assert isinstance(pl_module, TrainingModule)
            # Whoever draws does it alone, or more often than others: no shards then.
            may_fail = pictures_may_fail(self) if self.pictures else nullcontext()
            with gathered(pl_module.evaluation_network()), may_fail:
                self.act(trainer, pl_module)
