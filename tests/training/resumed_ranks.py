"""Two CPU processes that train, or go on: ``python resumed_ranks.py FOLDER STEPS`` (test_resume_ranks.py)."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ornstein  # isort: skip  # noqa: F401  (its guard comes before Lightning imports torchvision)
import lightning.pytorch as pl

from ornstein.codecs import Identity
from ornstein.conditioning import ClassLabel
from ornstein.data import DataModule, Digits
from ornstein.diffusion.densities import LossAdaptiveTime
from ornstein.diffusion.objectives import Objective
from ornstein.diffusion.parameterizations import V
from ornstein.diffusion.samplers import DDIM
from ornstein.diffusion.schedules import Cosine
from ornstein.networks import UNet
from ornstein.training.callbacks import Checkpoint
from ornstein.training.ema import EMA
from ornstein.training.module import DiffusionModule


class Told(pl.Callback):
    """Writes down what each rank drew at each micro-batch; dies with all ranks in the middle of a step."""

    def __init__(self, folder: Path, *, die_at: int | None) -> None:
        self.folder, self.die_at, self.drawn = folder, die_at, dict[int, Any]()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        output = pl_module.last_output
        self.drawn[pl_module.micro_batches_seen] = [batch["index"].tolist(), output.t.tolist(), float(output.loss)]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step + 1 == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
        name = f"rank{trainer.global_rank}.json"
        weights = [value.tolist() for value in pl_module.state_dict().values()]
        (self.folder / name).write_text(json.dumps({"drawn": self.drawn, "weights": weights}))


def main(folder: Path, die_at: int | None) -> None:
    torch.manual_seed(0)
    network = UNet(
        1, image_size=8, base_channels=8, channel_mults=(1,), num_blocks=1, groups=4, num_classes=10, dropout=0.2
    )
    module = DiffusionModule(
        network,
        schedule=Cosine(),
        objective=Objective(V(), LossAdaptiveTime(bins=4, history=2)),
        codec=Identity(1, 8, sigma_data=0.75),
        conditioner=ClassLabel(10),
        sampler=DDIM(steps=2),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        flip=True,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=8,
        max_epochs=-1,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        logger=False,
        default_root_dir=folder,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[EMA(), Told(folder, die_at=die_at), Checkpoint(folder, every=3, monitor=None)],
    )
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(
        module, DataModule(Digits, batch_size=8), ckpt_path=str(last) if last.exists() else None, weights_only=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
