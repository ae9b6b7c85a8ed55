"""Training on images of several shapes: ``python bucketed_processes.py FOLDER DEVICES BATCH`` (test_distributed.py)."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ornstein  # isort: skip  # noqa: F401  (its guard comes before Lightning imports torchvision)
import lightning.pytorch as pl

from ornstein.codecs import Identity
from ornstein.conditioning import NoConditioning
from ornstein.data import DataModule, ImageDataset
from ornstein.data.bucketed import BucketedImages
from ornstein.diffusion.objectives import Objective
from ornstein.diffusion.parameterizations import V
from ornstein.diffusion.samplers import DDIM
from ornstein.diffusion.schedules import Cosine
from ornstein.networks import UNet
from ornstein.training.callbacks import SampleGrid, Validation
from ornstein.training.module import DiffusionModule

SHAPES = ((4, 16), (8, 8), (16, 4))
COUNTS = (5, 30, 17)


def dataset(*, split: str, labels: bool, **facts: Any) -> ImageDataset:
    """Noise of three shapes, shuffled."""
    bucket = np.random.default_rng(0).permutation(np.repeat(np.arange(3), COUNTS))
    rng = np.random.default_rng(1 if split == "train" else 2)
    rows = [np.flatnonzero(bucket == number) for number in range(3)]
    parts = [rng.integers(0, 256, (len(own), 1, *SHAPES[n]), dtype=np.uint8) for n, own in enumerate(rows)]
    images = BucketedImages(parts, rows, image_size=8)
    return ImageDataset(images, name="mixed", split=split)  # type: ignore[arg-type]


class Notes(pl.Callback):
    """Which images, of which shape, each step trained on."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note them."""
        self.steps.append({"shape": list(batch["image"].shape[2:]), "index": batch["index"].tolist()})


def main(folder: Path, devices: int, batch_size: int) -> None:
    torch.manual_seed(0)
    module = DiffusionModule(
        UNet(1, image_size=8, base_channels=8, channel_mults=(1, 2), num_blocks=1, groups=4),
        schedule=Cosine(),
        objective=Objective(V()),
        codec=Identity(1, 8, sigma_data=0.58),
        conditioner=NoConditioning(),
        sampler=DDIM(steps=2),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
    )
    notes = Notes()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=12,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[notes, Validation(every=6), SampleGrid(folder, every=12, num_samples=9)],
    )
    data = DataModule(dataset, batch_size=batch_size, num_classes=None, num_workers=1, seed=3)
    trainer.fit(module, data)
    weights = torch.cat([p.detach().flatten() for p in module.network.parameters()]).double().sum().item()
    facts = {"steps": notes.steps, "weights": weights, "val": float(trainer.callback_metrics["val/loss"])}
    (folder / f"rank{trainer.global_rank}of{devices}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
