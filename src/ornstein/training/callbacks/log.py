"""The rows of a run's metrics: loss, gradient norm, learning rate, speed, and the loss by noise level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ornstein.diffusion.objectives import LossOutput
from ornstein.diffusion.schedules.base import Scalar, log_snr_of
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

_AT_ONCE = 128


class TrainingLog(pl.Callback):
    """Logs a row every ``every`` optimizer steps, and the loss by noise level every ``levels_every``.

    ``train/loss`` (mean over all micro-batches since the last row), ``train/grad_norm`` (of this step, before
    clipping), ``train/lr`` (that this step used), ``train/ema_decay``, ``time/images_per_s``,
    ``time/data_wait_share``, ``time/tflops`` and ``time/mfu`` where they are known, ``system/...`` (see
    :class:`DeviceMeter`); then ``loss_by_log_snr/<bin>``, the mean loss of the examples whose noise level
    fell in the bin, empty bins left out; and ``effective_batch`` once, at step 0. Losses stay on the device
    until a row is due, which adds them up; those not yet in a row are part of the checkpoint. The ``time/``
    columns need a :class:`Throughput` among the callbacks.

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
        self._losses, self._levels = _Sum(_loss_sums, vectors=1), _Sum(_level_sums, vectors=3)
        self.history = LevelHistory(len(LEVEL_NAMES))
        self._meter = DeviceMeter()
        self._grad_norm: Tensor | None = None
        self._lr = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes up the count where a checkpoint left it."""
        self._seen = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Logs the effective batch before the first step."""
        if batch_idx == 0 and trainer.global_step == 0:
            images = batch_images(batch) * trainer.accumulate_grad_batches * trainer.world_size
            record(trainer, {"effective_batch": float(images)})

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Takes the gradients' norm on steps that will be logged, unless clipping is about to."""
        assert isinstance(pl_module, TrainingModule)
        if (trainer.global_step + 1) % self.every == 0:
            self._grad_norm = None
            if not pl_module.clips_by_norm():
                self._grad_norm = total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
            self._lr = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the micro-batch up, and logs where a row is due."""
        assert isinstance(pl_module, TrainingModule)
        output = pl_module.last_output
        assert output is not None
        # Only kept: to bin and add them up takes a third of a millisecond, which a step need not pay.
        self._losses.add(output.loss.detach())
        if self.levels_every is not None and isinstance(output, LossOutput):
            self._levels.add(output.per_sample, *map(_detached, (output.level.alpha, output.level.sigma)))
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        row: dict[str, float] = {}
        if due(step, self.every):
            row |= self._row(trainer, pl_module)
        if due(step, self.levels_every):
            row |= self._level_row(trainer, pl_module)
        if row:
            record(trainer, row)

    def _row(self, trainer: pl.Trainer, module: TrainingModule) -> dict[str, float]:
        total, count = self._losses.take(module.device)
        mean = trainer.strategy.reduce((total / count).reshape(1), reduce_op="mean")
        grad_norm = module.gradient_norm if self._grad_norm is None else self._grad_norm
        assert grad_norm is not None
        loss, norm = torch.cat([mean, grad_norm.float().reshape(1).to(mean.device)]).tolist()
        row = {"train/loss": loss, "train/grad_norm": norm, "train/lr": self._lr}
        for averages in callbacks_of(trainer, EMA):
            row["train/ema_decay"] = averages.current_decay()
        for clock in callbacks_of(trainer, Throughput):
            lap = clock.lap(module)
            row |= lap.row()
        return row | self._meter.figures(module.device)

    def _level_row(self, trainer: pl.Trainer, module: TrainingModule) -> dict[str, float]:
        both = self._levels.take(module.device)
        losses, counts = trainer.strategy.reduce(both, reduce_op="sum").tolist()
        self.history.add(trainer.global_step, losses, counts)
        return {
            f"loss_by_log_snr/{name}": loss / count
            for name, loss, count in zip(LEVEL_NAMES, losses, counts, strict=True)
            if count > 0
        }

    def state_dict(self) -> dict[str, Any]:
        """Losses since the last rows, and the history of the losses by noise level."""
        return {
            "losses": self._losses.state_dict(),
            "levels": self._levels.state_dict(),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        if "levels" in state_dict:  # in checkpoints of before there are sums of another form: the next rows begin anew
            self._losses.load_state_dict(state_dict["losses"])
            self._levels.load_state_dict(state_dict["levels"])
        if "history" in state_dict:
            self.history.load_state_dict(state_dict["history"])


def _loss_sums(losses: Tensor) -> Tensor:
    """Sum and number of the losses (N,)."""
    return torch.stack([losses.sum(), torch.full_like(losses, 1.0).sum()])


def _level_sums(per_sample: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """(2, bins): sum and number of the losses (N,) whose log-SNR, at scales (N,), fell in each bin."""
    log_snr = log_snr_of(alpha, sigma)
    # One-hot sums rather than scattered adds: those have no fixed order on a GPU.
    level = torch.bucketize(log_snr, torch.tensor(LEVEL_EDGES, device=log_snr.device))
    member = (level[:, None] == torch.arange(len(LEVEL_NAMES), device=level.device)).float()
    return torch.stack([per_sample @ member, member.sum(0)])


def _detached(scale: Scalar) -> Tensor:
    """A scale without the gradient that a learned schedule's has."""
    kept = torch.as_tensor(scale)
    return kept.detach() if kept.requires_grad else kept


class _Sum:
    """What ``add_up`` makes of all vectors that were added: called for many at a time, of which few are kept."""

    def __init__(self, add_up: Callable[..., Tensor], *, vectors: int) -> None:
        self._add_up, self._vectors = add_up, vectors
        self._parts: list[tuple[Tensor, ...]] = []
        self._count = 0
        self._total: Tensor | None = None

    def add(self, *values: Tensor) -> None:
        self._parts.append(values)  # of any shape: columns are put together flat
        self._count += 1
        if self._count % _AT_ONCE == 0:  # at the same counts in a run that was stopped in between
            self._total = self._sum(values[0].device)
            self._parts = []

    def take(self, device: torch.device) -> Tensor:
        total = self._sum(device)
        self._parts, self._count, self._total = [], 0, None
        return total

    def state_dict(self) -> dict[str, Any]:
        """The sum so far, and what is not in it yet as one vector each."""
        joined = [_flat(column).float().cpu() for column in zip(*self._parts, strict=True)]
        total = None if self._total is None else self._total.cpu()
        return {"total": total, "parts": joined, "count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        self._total, self._count = state_dict["total"], int(state_dict["count"])
        parts = tuple(state_dict["parts"])
        # Checkpoints of before levels came as scales hold log-SNRs: what is not in a sum yet is left out.
        self._parts = [parts] if len(parts) == self._vectors else []

    def _sum(self, device: torch.device) -> Tensor:
        parts = [(torch.zeros(0),) * self._vectors, *self._parts]
        columns = [_flat([part.to(device).float() for part in column]) for column in zip(*parts, strict=True)]
        added = self._add_up(*columns)
        return added if self._total is None else self._total.to(device) + added


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
