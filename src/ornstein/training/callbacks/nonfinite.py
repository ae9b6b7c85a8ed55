"""Stops a run whose loss or gradient is no longer a number."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.training.base import TrainingModule
from ornstein.training.callbacks.lookup import callbacks_of
from ornstein.training.limits import check_limits
from ornstein.training.record import due
from ornstein.training.sharding import local

_NAMED = 10  # images of the bad batch that the message names
_LOSS, _GRADIENT = 0, 1


class NonFiniteGuard(pl.Callback):
    """Stops at a loss or a gradient that is infinite or not a number, naming the step, the batch and the last
    good checkpoint.

    On one CPU every loss is checked, and the norm of every step's gradients, before they reach the weights. On
    accelerators, and over several devices, a flag is kept beside them without waiting for them, and read every
    ``every`` optimizer steps and before each checkpoint, so that none is written with bad weights. The norm is
    the one that clipping takes, or where that takes none, one more. Gradients of ``16-mixed`` are its scaler's
    matter, which leaves steps out whose gradients are too large.

    Args:
        every: optimizer steps between readings of the flag.

    Raises:
        OrnsteinError: every < 1; and in training, for a loss, gradient or weights that are not finite.
    """

    def __init__(self, *, every: int = 10) -> None:
        check_limits("NonFiniteGuard", every=every)
        self.every = every
        self._indices: Tensor | None = None
        # (2 + _NAMED,): step of the first bad value, or -1, which it is, then the first indices of its batch.
        self._first: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has itself told the gradients' norms."""
        assert isinstance(pl_module, TrainingModule)
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            pl_module.watch_gradients = partial(self._look_at_gradients, trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks no more."""
        assert isinstance(pl_module, TrainingModule)
        pl_module.watch_gradients = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Keeps the batch's indices at hand."""
        self._indices = batch.get("index")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Notes the first bad loss; on one CPU stops at it."""
        assert isinstance(pl_module, TrainingModule) and pl_module.last_output is not None
        # Not the argument, which mixed precision has scaled.
        self._look(trainer, pl_module.last_output.loss, _LOSS)

    def _look_at_gradients(self, trainer: pl.Trainer, module: pl.LightningModule, norm: Tensor | None) -> None:
        """Notes the first bad gradient before the optimizer's step; on one CPU stops at it."""
        if norm is None:
            own = [local(p.grad) for p in module.parameters() if p.grad is not None]
            if not own:
                return
            norm = torch.nn.utils.get_total_norm(own)
        self._look(trainer, norm, _GRADIENT)

    def _look(self, trainer: pl.Trainer, value: Tensor, kind: int) -> None:
        if value.device.type == "cpu" and trainer.world_size == 1:
            if not math.isfinite(value.item()):
                named = [] if self._indices is None else self._indices[:_NAMED].tolist()
                raise self._error(trainer, trainer.global_step + 1, kind, named)
            return
        self._note(value.detach(), trainer.global_step + 1, kind)

    @torch.no_grad()
    def _note(self, value: Tensor, step: int, kind: int) -> None:
        if self._first is None or self._first.device != value.device:
            self._first = torch.full((2 + _NAMED,), -1, dtype=torch.int64, device=value.device)
        now = torch.full_like(self._first, -1)
        now[0], now[1] = step, kind
        if self._indices is not None:
            named_now = self._indices[:_NAMED]
            now[2 : 2 + len(named_now)] = named_now
        self._first = torch.where(~torch.isfinite(value) & (self._first[0] < 0), now, self._first)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads the flag where that is due."""
        if self._first is not None and due(trainer.global_step, self.every):
            self.check(trainer)

    def check(self, trainer: pl.Trainer) -> None:
        """Raises an OrnsteinError if a bad value has been noted, on all ranks alike."""
        if self._first is None:
            return
        step, kind, *named = self._first.tolist()
        bad = step >= 0
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            raise self._error(trainer, step, kind, [index for index in named if index >= 0])

    def check_before_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raises an OrnsteinError if a bad value has been noted or a weight is not finite."""
        self.check(trainer)
        own = [local(p.detach()) for p in module.parameters() if p.is_floating_point()]
        floating = [p for p in own if p.numel()]
        finite = not floating or bool(torch.isfinite(torch.stack(torch._foreach_norm(floating, torch.inf))).all())
        if trainer.world_size > 1:  # where each has a shard, one alone may see it
            finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
        if not finite:
            raise OrnsteinError(
                f"at step {trainer.global_step} the weights hold values that are not finite, though each "
                f"loss was: {_way_out(trainer)}"
            )

    def _error(self, trainer: pl.Trainer, step: int, kind: int, named: list[int]) -> OrnsteinError:
        where = f"at step {step}" if step >= 0 else "on another device"
        images = f", in a batch that begins with images {', '.join(map(str, named))}" if named else ""
        what = "gradient is not finite, though the loss is," if kind == _GRADIENT else "loss is not finite"
        return OrnsteinError(f"the {what} {where}{images}: {_way_out(trainer)}")


def _way_out(trainer: pl.Trainer) -> str:
    from ornstein.training.callbacks.checkpoint import Checkpoint

    written = [callback.last_path for callback in callbacks_of(trainer, Checkpoint) if callback.last_path]
    good = written[0] if written else trainer.ckpt_path
    resume = f"the last good checkpoint is {good}" if good else "no checkpoint had been written yet"
    return f"lower optimizer.lr, lengthen its warm-up or train with trainer.precision=32-true; {resume}."
