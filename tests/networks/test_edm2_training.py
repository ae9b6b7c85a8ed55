"""EDM2 in our training: averages, checkpoints and resumption with weights that are put back at every step."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

import ornstein  # isort: skip  # noqa: F401  (its guard comes before Lightning imports torchvision)
import lightning.pytorch as pl

from ornstein.codecs import Identity
from ornstein.conditioning import ClassLabel
from ornstein.data import DataModule, ImageDataset
from ornstein.diffusion.objectives import Objective
from ornstein.diffusion.parameterizations import EDMPreconditioned
from ornstein.diffusion.samplers import DDIM
from ornstein.diffusion.schedules import EDM
from ornstein.networks import EDM2UNet
from ornstein.training.ema import EMA
from ornstein.training.module import DiffusionModule

from .conftest import SMALL_EDM2

STEPS = 6


def bars(*, split: str, labels: bool = True) -> ImageDataset:
    """Two classes of 8x8 images: light left or light right."""
    side = np.arange(32) % 2
    pixels = np.full((32, 1, 8, 8), 32, dtype=np.uint8)
    pixels[side == 0, :, :, :4] = 224
    pixels[side == 1, :, :, 4:] = 224
    return ImageDataset(pixels, name="bars", split=split, labels=side, class_names=["left", "right"])  # type: ignore


def make_module() -> DiffusionModule:
    torch.manual_seed(0)
    return DiffusionModule(
        EDM2UNet(1, num_classes=2, dropout=0.1, **SMALL_EDM2),
        schedule=EDM(),
        objective=Objective(EDMPreconditioned(sigma_data=0.5)),
        codec=Identity(1, 8, sigma_data=0.5),
        conditioner=ClassLabel(2),
        sampler=DDIM(steps=8),
        optimizer=partial(torch.optim.Adam, lr=0.01),
    )


def fit(folder: Path, *, steps: int, ckpt: Path | None = None) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        callbacks=[EMA(decay=0.9)],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = DataModule(bars, batch_size=8, num_classes=2, class_names=["left", "right"], overlap="allow")
    trainer.fit(make_module(), data, ckpt_path=None if ckpt is None else str(ckpt), weights_only=True)
    return trainer


def state_of(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    module = trainer.lightning_module
    assert isinstance(module, DiffusionModule)
    averages = {f"ema.{name}": value for name, value in module.evaluation_network().state_dict().items()}
    return {**module.network.state_dict(), **averages}


def test_resumed_from_a_checkpoint_it_is_the_same_to_the_bit(tmp_path):
    whole = state_of(fit(tmp_path, steps=STEPS))
    half = fit(tmp_path, steps=STEPS // 2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = state_of(fit(tmp_path, steps=STEPS, ckpt=tmp_path / "half.ckpt"))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    # Averages are of their own, and none of the two stands where it began.
    begin = make_module().network.state_dict()
    assert not torch.equal(whole["out.weight"], whole["ema.out.weight"])
    assert not torch.equal(whole["out.weight"], begin["out.weight"])


def test_it_learns_which_side_each_class_is_light_on(tmp_path):
    module = fit(tmp_path, steps=60).lightning_module
    assert isinstance(module, DiffusionModule)
    images = torch.cat([batch.images for batch in module.generate(range(16))]).float()
    left, right = images[..., :4].mean((1, 2, 3)), images[..., 4:].mean((1, 2, 3))
    labels = torch.arange(16) % 2
    assert ((left > right) == (labels == 0)).all(), (left, right)
