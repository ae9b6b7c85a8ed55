"""A run as small as can be: a few pixels, a network of some dozens of weights, everything else real."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ornstein  # isort: skip  # noqa: F401  (its guard comes before Lightning imports torchvision)
import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import Logger

from ornstein.codecs import Identity
from ornstein.conditioning import ClassLabel, NoConditioning
from ornstein.data import DataModule, ImageDataset
from ornstein.diffusion.objectives import Objective, TrainingNoise
from ornstein.diffusion.parameterizations import V
from ornstein.diffusion.samplers import DDIM
from ornstein.diffusion.schedules import Cosine, NoiseSchedule
from ornstein.training.module import DiffusionModule

CLASSES, SIZE, IMAGES = 3, 4, 24


class Network(nn.Module):
    def __init__(self, num_classes: int | None = CLASSES) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 1, 3, padding=1)
        self.label = nn.Embedding(num_classes + 1, 1) if num_classes is not None else None

    def forward(self, x: Tensor, noise_cond: Tensor, label: Tensor | None = None) -> Tensor:
        out = self.mix(x) * (noise_cond / 1000).reshape(-1, 1, 1, 1)
        return out if self.label is None or label is None else out + self.label(label)[:, :, None, None]


class Learned(NoiseSchedule):
    """Variance preserving, log-SNR = slope * (1 - 2 t), whose slope is a parameter."""

    variance_preserving = True

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(8.0))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slope = self.slope.to(t)
        log_snr = slope * (1 - 2 * t)
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        return alpha, sigma, -alpha * sigma**2 * slope, sigma * alpha**2 * slope

    def time(self, log_snr: Tensor) -> Tensor:
        return ((1 - log_snr / self.slope.to(log_snr)) / 2).clamp(0, 1)


class Remembering(nn.Module):
    """A time density that learns: times up to a bound that follows the mean of those drawn so far, in a buffer."""

    bound: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bound", torch.tensor(1.0))

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor:
        t = noise.uniform(size, device) * self.bound
        if self.training:
            self.bound.lerp_(0.5 + t.mean() / 2, 0.5)
        return t

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        return (t <= self.bound) / self.bound


class Rows(Logger):
    """Keeps what is logged: step -> {name: value}, pictures by name and step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}
        self.pictures: list[tuple[str, int]] = []

    name = version = "rows"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.pictures.append((key, step))

    def log_video(self, key: str, videos: list[str], step: int, format: list[str]) -> None:
        assert Path(videos[0]).is_file() and format == ["gif"]
        self.pictures.append((key, step))

    def without_times(self) -> dict[int, dict[str, float]]:
        kept = {
            step: {name: value for name, value in row.items() if not name.startswith(("time/", "system/"))}
            for step, row in self.rows.items()
        }
        return {step: row for step, row in kept.items() if row}


def tiny_dataset(*, split: str, labels: bool = True) -> ImageDataset:
    pixels = np.random.default_rng(0 if split == "train" else 1).integers(0, 256, (IMAGES, 1, SIZE, SIZE))
    return ImageDataset(
        pixels.astype(np.uint8),
        name="tiny",
        split=split,  # type: ignore[arg-type]
        labels=np.arange(IMAGES) % CLASSES if labels else None,
        class_names=["red", "green", "blue"],
    )


@pytest.fixture
def make_module() -> Callable[..., DiffusionModule]:
    """A DiffusionModule; with ``classes=None`` an unconditional one."""

    def make(
        *,
        network: nn.Module | None = None,
        classes: int | None = CLASSES,
        lr: float = 0.05,
        kind: type[DiffusionModule] = DiffusionModule,
        **options: Any,
    ) -> DiffusionModule:
        torch.manual_seed(0)
        settings: dict[str, Any] = {
            "schedule": Cosine(),
            "objective": Objective(V()),
            "codec": Identity(1, SIZE, sigma_data=0.5),
            "conditioner": NoConditioning() if classes is None else ClassLabel(classes),
            "sampler": DDIM(steps=4),
            "optimizer": partial(torch.optim.AdamW, lr=lr),
        }
        return kind(Network(classes) if network is None else network, **(settings | options))

    return make


@pytest.fixture
def make_data() -> Callable[..., DataModule]:
    def make(*, classes: int | None = CLASSES, batch_size: int = 4) -> DataModule:
        return DataModule(
            tiny_dataset,
            batch_size=batch_size,
            num_classes=classes,
            class_names=["red", "green", "blue"] if classes is not None else None,
        )

    return make


@pytest.fixture
def rows() -> Callable[[], Rows]:
    """A logger that keeps its rows."""
    return Rows


@pytest.fixture
def fit(
    make_module: Callable[..., DiffusionModule], make_data: Callable[..., DataModule], tmp_path: Path
) -> Callable[..., pl.Trainer]:
    """Trains for ``steps`` and gives the trainer, whose ``lightning_module`` is what was trained."""

    def run(
        callbacks: list[pl.Callback],
        *,
        steps: int = 4,
        module: DiffusionModule | None = None,
        data: DataModule | None = None,
        logger: Logger | None = None,
        ckpt: Path | None = None,
        **options: Any,
    ) -> pl.Trainer:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            logger=logger if logger is not None else False,
            callbacks=callbacks,
            default_root_dir=tmp_path,
            enable_progress_bar=any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks),
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
            **options,
        )
        trainer.fit(
            make_module() if module is None else module,
            make_data() if data is None else data,
            ckpt_path=None if ckpt is None else str(ckpt),
            weights_only=True,
        )
        return trainer

    return run
