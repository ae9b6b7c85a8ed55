"""Stops a run whose loss is no longer a number."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.training.base import TrainingModule
from ornstein.training.callbacks.lookup import callbacks_of
from ornstein.training.limits import check_limits
from ornstein.training.record import due

_NAMED = 10  # images of the bad batch that the message names


class NonFiniteGuard(pl.Callback):
    """Stops at a loss that is infinite or not a number, naming the step, the batch and the last good
    checkpoint.

    On one CPU every loss is checked before it reaches the weights. On accelerators, and over several devices,
    a flag is kept beside the loss without waiting for it, and read every ``every`` optimizer steps and before
    each checkpoint, so that none is written with bad weights.

    Args:
        every: optimizer steps between readings of the flag.

    Raises:
        OrnsteinError: every < 1; and in training, for a loss or weights that are not finite.
    """

    def __init__(self, *, every: int = 10) -> None:
        check_limits("NonFiniteGuard", every=every)
        self.every = every
        self._indices: Tensor | None = None
        # (1 + _NAMED,): step of the first bad loss, or -1, then the first indices of its batch.
        self._first: Tensor | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Keeps the batch's indices at hand."""
        self._indices = batch.get("index")

    @torch.no_grad()
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Notes the first bad loss; on one CPU stops at it."""
        assert isinstance(pl_module, TrainingModule) and pl_module.last_output is not None
        # Not the argument, which mixed precision has scaled.
        value = pl_module.last_output.loss.detach()
        step = trainer.global_step + 1
        if value.device.type == "cpu" and trainer.world_size == 1:
            if not bool(torch.isfinite(value)):
                named = [] if self._indices is None else self._indices[:_NAMED].tolist()
                raise self._error(trainer, step, named)
            return
        if self._first is None or self._first.device != value.device:
            self._first = torch.full((1 + _NAMED,), -1, dtype=torch.int64, device=value.device)
        now = torch.full_like(self._first, -1)
        now[0] = step
        if self._indices is not None:
            named_now = self._indices[:_NAMED]
            now[1 : 1 + len(named_now)] = named_now
        self._first = torch.where(~torch.isfinite(value) & (self._first[0] < 0), now, self._first)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads the flag where that is due."""
        if due(trainer, self.every):
            self.check(trainer)

    def check(self, trainer: pl.Trainer) -> None:
        """Raises an OrnsteinError if a bad loss has been noted, on all ranks alike."""
        if self._first is None:
            return
        step, *named = self._first.tolist()
        bad = step >= 0
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            raise self._error(trainer, step, [index for index in named if index >= 0])

    def check_before_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raises an OrnsteinError if a bad loss has been noted or a weight is not finite."""
        self.check(trainer)
        floating = [p.detach() for p in module.parameters() if p.is_floating_point() and p.numel()]
        if floating and not bool(torch.isfinite(torch.stack(torch._foreach_norm(floating, torch.inf))).all()):
            raise OrnsteinError(
                f"at step {trainer.global_step} the weights hold values that are not finite, though each "
                f"loss was: {_way_out(trainer)}"
            )

    def _error(self, trainer: pl.Trainer, step: int, named: list[int]) -> OrnsteinError:
        where = f"at step {step}" if step >= 0 else "on another device"
        images = f", in a batch that begins with images {', '.join(map(str, named))}" if named else ""
        return OrnsteinError(f"the loss is not finite {where}{images}: {_way_out(trainer)}")


def _way_out(trainer: pl.Trainer) -> str:
    from ornstein.training.callbacks.checkpoint import Checkpoint

    written = [callback.last_path for callback in callbacks_of(trainer, Checkpoint) if callback.last_path]
    good = written[0] if written else trainer.ckpt_path
    resume = f"the last good checkpoint is {good}" if good else "no checkpoint had been written yet"
    return f"lower optimizer.lr, lengthen its warm-up or train with trainer.precision=32-true; {resume}."
