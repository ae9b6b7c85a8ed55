"""One short run on two CPU processes with every callback: ``python two_processes.py FOLDER`` (test_distributed.py)."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch

import ornstein  # isort: skip  # noqa: F401  (its guard comes before Lightning imports torchvision)
import lightning.pytorch as pl

from ornstein.codecs import Identity
from ornstein.conditioning import ClassLabel
from ornstein.data import DataModule, Digits
from ornstein.diffusion.objectives import Objective
from ornstein.diffusion.parameterizations import V
from ornstein.diffusion.samplers import DDIM
from ornstein.diffusion.schedules import Cosine
from ornstein.experiment import CSVLogger
from ornstein.metrics import DigitsFeatures, GenerativeMetrics
from ornstein.networks import UNet
from ornstein.training.callbacks import (
    Checkpoint,
    GenerativeEvaluation,
    NonFiniteGuard,
    ProgressBar,
    SampleGrid,
    SchedulePlot,
    Throughput,
    TrainingLog,
    Trajectory,
    Validation,
)
from ornstein.training.ema import EMA
from ornstein.training.module import DiffusionModule
from ornstein.training.scoring import draw_into, memorisation, set_references


def make_metrics() -> GenerativeMetrics:
    return GenerativeMetrics(
        DigitsFeatures(),
        num_samples=41,
        kid_subsets=3,
        kid_subset_size=20,
        precision_recall=True,
        bootstrap=20,
        keep_features=30,
    )


def main(folder: Path) -> None:
    torch.manual_seed(0)
    module = DiffusionModule(
        UNet(1, image_size=8, base_channels=8, channel_mults=(1,), num_blocks=1, groups=4, num_classes=10),
        schedule=Cosine(),
        objective=Objective(V()),
        codec=Identity(1, 8, sigma_data=0.75),
        conditioner=ClassLabel(10),
        sampler=DDIM(steps=2),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
    )
    throughput = Throughput()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=6,
        max_epochs=-1,
        limit_val_batches=0,
        logger=CSVLogger(folder / "metrics.csv"),
        default_root_dir=folder,
        enable_model_summary=False,
        callbacks=[
            EMA(),
            NonFiniteGuard(every=2),
            ProgressBar(),
            SchedulePlot(folder),
            TrainingLog(every=2, levels_every=3),
            Validation(every=3),
            SampleGrid(folder, every=3, samples_per_class=2),
            Trajectory(folder, samples_per_class=2),
            GenerativeEvaluation(
                folder,
                every=3,
                batch_size=8,
                metrics=make_metrics,
            ),
            throughput,
            Checkpoint(folder, every=2, keep_every=True, monitor="val/loss"),
        ],
    )
    trainer.fit(module, DataModule(Digits, batch_size=16))
    weights = torch.cat([p.detach().flatten() for p in module.evaluation_network().parameters()])
    facts = {
        "weights": weights.sum().item(),
        "figures": {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if not name.startswith(("time/", "system/"))
        },
        "images_seen": throughput.summary()["images_seen"],
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()
    if trainer.global_rank == 0:  # alone now, with the same weights, in one batch
        metrics = make_metrics()
        set_references(metrics, trainer.datamodule.train)
        drawn = draw_into(metrics, module, range(41), dataset=trainer.datamodule.train)
        alone = metrics.compute()
        near = memorisation(metrics, drawn.images, held_out=trainer.datamodule.val)
        (folder / "alone.json").write_text(json.dumps(alone | {"memorised_share": near["share"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
