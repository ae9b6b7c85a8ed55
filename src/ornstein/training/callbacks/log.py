"""The rows of a run's metrics: loss, gradient norm, learning rate, speed, and the loss by noise level."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ornstein.diffusion.objectives import LossOutput
from ornstein.training.base import TrainingModule
from ornstein.training.callbacks.device_stats import DeviceMeter
from ornstein.training.callbacks.level_history import LevelHistory
from ornstein.training.callbacks.lookup import callbacks_of
from ornstein.training.callbacks.throughput import Throughput
from ornstein.training.ema import EMA
from ornstein.training.latents import batch_images
from ornstein.training.limits import check_limits
from ornstein.training.record import due, record
from ornstein.training.sharding import total_norm

LEVEL_EDGES = (-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0)
"""Edges of the ten bins of log-SNR: fixed, so that runs of any schedule compare."""
LEVEL_NAMES = (
    "below_-8",
    *(f"{low:g}_to_{high:g}" for low, high in pairwise(LEVEL_EDGES)),
    "above_8",
)


class TrainingLog(pl.Callback):
    """Logs a row every ``every`` optimizer steps, and the loss by noise level every ``levels_every``.

    ``train/loss`` (mean over all micro-batches since the last row), ``train/grad_norm`` (of this step, before
    clipping), ``train/lr`` (that this step used), ``train/ema_decay``, ``time/images_per_s``,
    ``time/data_wait_share``, ``time/tflops`` and ``time/mfu`` where they are known, ``system/...`` (see
    :class:`DeviceMeter`); then ``loss_by_log_snr/<bin>``, the mean loss of the examples whose noise level
    fell in the bin, empty bins left out; and ``effective_batch`` once, at step 0. Sums stay on the device and
    are read when a row is due; they are part of the checkpoint. The ``time/`` columns need a
    :class:`Throughput` among the callbacks.

    Args:
        every: optimizer steps between rows.
        levels_every: optimizer steps between rows by noise level; null is never.

    Attributes:
        history: the losses by noise level of all rows so far, for the picture.

    Raises:
        OrnsteinError: an interval < 1.
    """

    def __init__(self, *, every: int = 10, levels_every: int | None = 100) -> None:
        check_limits("TrainingLog", every=every, levels_every=levels_every)
        self.every, self.levels_every = every, levels_every
        self._seen = -1
        self._losses = _Sum(1)
        self._level_losses, self._level_counts = _Sum(len(LEVEL_NAMES)), _Sum(len(LEVEL_NAMES))
        self.history = LevelHistory(len(LEVEL_NAMES))
        self._meter = DeviceMeter()
        self._micro_batches = 0
        self._edges, self._bins = torch.tensor(LEVEL_EDGES), torch.arange(len(LEVEL_NAMES))
        self._grad_norm: Tensor | None = None
        self._lr = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes up the count where a checkpoint left it."""
        self._seen = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Logs the effective batch before the first step."""
        if trainer.global_step == 0 and batch_idx == 0:
            images = batch_images(batch) * trainer.accumulate_grad_batches * trainer.world_size
            record(trainer, {"effective_batch": float(images)})

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Takes the gradients' norm before they are clipped, on steps that will be logged."""
        if (trainer.global_step + 1) % self.every == 0:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._grad_norm = total_norm(gradients)
            self._lr = float(optimizer.param_groups[0]["lr"])

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the micro-batch up, and logs where a row is due."""
        assert isinstance(pl_module, TrainingModule)
        output = pl_module.last_output
        assert output is not None
        self._losses.add(output.loss.detach().float().reshape(1))
        self._micro_batches += 1
        if self.levels_every is not None and isinstance(output, LossOutput):
            # One-hot sums rather than scattered adds: those have no fixed order on a GPU.
            level = torch.bucketize(output.log_snr, self._edges_on(output.log_snr.device))
            member = (level[:, None] == self._bins).float()
            self._level_losses.add(output.per_sample.float() @ member)
            self._level_counts.add(member.sum(0))
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        row: dict[str, float] = {}
        if due(trainer, self.every):
            row |= self._row(trainer, pl_module)
        if due(trainer, self.levels_every):
            row |= self._levels(trainer)
        if row:
            record(trainer, row)

    def _row(self, trainer: pl.Trainer, module: TrainingModule) -> dict[str, float]:
        mean = self._losses.take() / self._micro_batches
        self._micro_batches = 0
        mean = trainer.strategy.reduce(mean, reduce_op="mean")
        assert self._grad_norm is not None
        loss, norm = torch.cat([mean, self._grad_norm.float().reshape(1).to(mean.device)]).tolist()
        row = {"train/loss": loss, "train/grad_norm": norm, "train/lr": self._lr}
        for averages in callbacks_of(trainer, EMA):
            row["train/ema_decay"] = averages.current_decay()
        for clock in callbacks_of(trainer, Throughput):
            lap = clock.lap(module)
            row |= lap.row()
        return row | self._meter.figures(module.device)

    def _levels(self, trainer: pl.Trainer) -> dict[str, float]:
        both = torch.stack([self._level_losses.take(), self._level_counts.take()])
        losses, counts = trainer.strategy.reduce(both, reduce_op="sum").tolist()
        self.history.add(trainer.global_step, losses, counts)
        return {
            f"loss_by_log_snr/{name}": loss / count
            for name, loss, count in zip(LEVEL_NAMES, losses, counts, strict=True)
            if count > 0
        }

    def _edges_on(self, device: torch.device) -> Tensor:
        if self._edges.device != device:
            self._edges, self._bins = self._edges.to(device), self._bins.to(device)
        return self._edges

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last rows, and the history of the losses by noise level."""
        return {
            "losses": self._losses.value(),
            "level_losses": self._level_losses.value(),
            "level_counts": self._level_counts.value(),
            "micro_batches": self._micro_batches,
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the sums back."""
        self._losses.set(state_dict["losses"])
        self._level_losses.set(state_dict["level_losses"])
        self._level_counts.set(state_dict["level_counts"])
        self._micro_batches = int(state_dict["micro_batches"])
        if "history" in state_dict:  # checkpoints of before have none
            self.history.load_state_dict(state_dict["history"])


class _Sum:
    """A float32 vector (size,) that lives wherever what is added to it lives."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._total = torch.zeros(size)

    def add(self, values: Tensor) -> None:
        if self._total.device != values.device:
            self._total = self._total.to(values.device)
        self._total += values

    def take(self) -> Tensor:
        total, self._total = self._total, torch.zeros_like(self._total)
        return total

    def value(self) -> Tensor:
        return self._total.detach().clone().cpu()

    def set(self, values: Tensor) -> None:
        self._total = values.clone()
