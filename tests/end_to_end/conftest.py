"""Runs as small as can be, in this process or as commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROOT = Path(__file__).parents[2]
SIZES = {
    "unet": ["model.network.base_channels=8", "model.network.channel_mults=[1,2]", "model.network.groups=4"],
    "dit": ["model.network.hidden_size=16", "model.network.depth=1", "model.network.heads=2"],
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., list[str]]:
    """Overrides that make the network of a model a few thousand weights, and everything around it quick."""

    def overrides(model: str = "class_unet") -> list[str]:
        return [
            f"model={model}",
            *SIZES[model.split("_")[-1]],
            "data.batch_size=4",
            "data.limit=16",
            "trainer.max_steps=3",
            "trainer.enable_progress_bar=false",
            "sampler.steps=3",
            "metrics=none",
            "logger=csv",
            "callbacks.log.every=1",
            "callbacks.validation.every=3",
            "callbacks.validation.max_batches=1",
            "callbacks.sample_grid.samples_per_class=1",
            "callbacks.sample_grid.num_samples=4",
            "~callbacks.trajectory",
            "~callbacks.schedule_plot",
        ]

    return overrides


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, compose_config: Callable[..., DictConfig], tiny: Callable[..., list[str]]
) -> Path:
    """A run of a small network that has learned something, with a best and a last checkpoint that differ; read only."""
    from hydra.core.hydra_config import HydraConfig

    from ornstein.cli.train import train

    folder = tmp_path_factory.mktemp("trained") / "run"
    overrides = [
        *tiny(),
        "data.limit=null",
        "data.batch_size=32",
        "trainer.max_steps=60",
        "lr_schedule=constant",
        "callbacks.log.every=10",
        "callbacks.validation.every=20",
        "callbacks.checkpoint.monitor=val/loss",
        # Of the negative loss the first figure is the best.
        "callbacks.checkpoint.mode=max",
    ]
    train(compose_config(*overrides, run_dir=folder))
    HydraConfig.instance().cfg = None
    return folder


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``command("train.py", "model=dit", cwd=folder)``: a command of the repository, in another folder."""

    def run(
        script: str, *arguments: str, cwd: Path, path: Sequence[Path] = (), environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        settings = {
            "PYTHONPATH": os.pathsep.join(map(str, [ROOT / "src", *path])),
            "COLUMNS": "200",
            "WANDB_MODE": "offline",
            **(environment or {}),
        }
        return subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=cwd,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run
