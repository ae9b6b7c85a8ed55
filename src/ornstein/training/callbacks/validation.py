"""The loss on held-out images, counted in optimizer steps."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from ornstein.training.base import TrainingModule
from ornstein.training.callbacks.lookup import data_of
from ornstein.training.callbacks.periodic import Periodic
from ornstein.training.callbacks.progress import progress_task
from ornstein.training.latents import batch_images
from ornstein.training.limits import check_limits
from ornstein.training.record import record


class Validation(Periodic):
    """Logs ``val/loss`` of the evaluation weights every ``every`` optimizer steps and at the end.

    Lightning's own validation loop counts batches of an epoch, and a run resumed in the middle of an endless
    epoch would validate at other steps than an undisturbed one; this one depends on the step alone.

    Args:
        every: optimizer steps between validations; null is never.
        max_batches: of the held-out split, from its start; null is all.

    Raises:
        OrnsteinError: a number < 1.
    """

    def __init__(self, *, every: int | None = 250, max_batches: int | None = None) -> None:
        check_limits("Validation", every=every, max_batches=max_batches)
        super().__init__(every=every, at_end=every is not None)
        self.max_batches = max_batches

    def act(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Validates: the mean over images, and over ranks, whose noise differs."""
        loader = data_of(trainer).val_dataloader()
        losses, sizes = [], []
        batches = len(loader) if self.max_batches is None else min(self.max_batches, len(loader))
        with progress_task(trainer, "validation", batches) as advance:
            for index, held_out in enumerate(loader):
                if index >= batches:
                    break
                held_out = module.transfer_batch_to_device(held_out, module.device, 0)
                losses.append(module.validation_step(held_out, index).float())
                sizes.append(batch_images(held_out))
                advance()
            if not losses:
                return
            weights = torch.tensor(sizes, dtype=torch.float32, device=module.device)
            mean = (torch.stack(losses) * weights).sum() / weights.sum()
            loss = float(trainer.strategy.reduce(mean, reduce_op="mean"))
        record(trainer, {"val/loss": loss})
