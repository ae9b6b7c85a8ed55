"""What the benchmarks share: ours as ``python train.py`` builds it, a clock around its training, and tables."""

from __future__ import annotations

import logging
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ornstein  # noqa: F401  (first: lets torchvision be imported beside any build of torch)

# isort: split
import lightning.pytorch as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict
from torch import nn

from ornstein.cli.build import build_callbacks, build_data, build_loggers, build_module, of_lightning
from ornstein.cli.launch import conf_dir, register_resolvers
from ornstein.cli.validate import validate
from ornstein.networks.cost import count_flops
from ornstein.training.module import DiffusionModule

# Training alone is timed, so nothing happens around it but the averages (ema). The CPU, since the peers' loops know
# no other device; Lightning's own progress bar and checkpoints are the stock ones, which `python train.py` replaces.
TIMED = (
    "callbacks=none",
    "logger=none",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "+trainer.enable_checkpointing=false",
)


def compose_train(overrides: Sequence[str], *, run_dir: str | Path = "outputs/benchmarks/run") -> DictConfig:
    """The config that ``python train.py OVERRIDES`` would train, validated as there."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        words = [*overrides, f"paths.run_dir='{run_dir}'"]
        cfg = compose("train", overrides=words, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)  # the run's name and the messages ask it which options were chosen
    with open_dict(cfg):
        del cfg["hydra"]
    validate(cfg)
    return cfg


class Ours:
    """A module, its data and a Lightning Trainer, built from a composed config in the order of ``train.py``."""

    def __init__(self, cfg: DictConfig, *, extra: Sequence[pl.Callback] = ()) -> None:
        self.data = build_data(cfg)
        self.data.setup()
        self.module: DiffusionModule = build_module(cfg)
        # Last in the list: what a step does in other callbacks (averages, logs) lies within the step.
        callbacks = [*build_callbacks(cfg), *extra]
        with quiet():
            self.trainer: pl.Trainer = instantiate(
                of_lightning(cfg.trainer), logger=build_loggers(cfg) or False, callbacks=callbacks, _convert_="all"
            )

    def fit(self) -> None:
        """Train until ``trainer.max_steps`` or until a callback stops it."""
        with quiet():
            self.trainer.fit(self.module, self.data)


class TrainingClock(pl.Callback):
    """Seconds of training from its start to the end of each step; stops where the next step would overrun.

    Args:
        budget: seconds that training may take; None: as long as it likes.
        watch: called after each step with (seconds, steps).
    """

    def __init__(self, budget: float | None = None, *, watch: Callable[[float, int], None] | None = None) -> None:
        self.budget, self.watch = budget, watch
        self.ends: list[float] = []
        self._started = 0.0

    @property
    def seconds(self) -> float:
        """Seconds from the start of training to the end of its last step."""
        return self.ends[-1] if self.ends else 0.0

    def step_seconds(self, skip: int) -> float:
        """Mean duration of a step, the first ``skip`` left out."""
        return (self.ends[-1] - self.ends[skip - 1]) / (len(self.ends) - skip)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the time, and stops training if another step like the last ten would not fit."""
        self.ends.append(time.perf_counter() - self._started)
        recent = self.ends[-11:]
        step = (recent[-1] - recent[0]) / max(1, len(recent) - 1)
        if self.budget is not None and self.seconds + step > self.budget:
            trainer.should_stop = True
        if self.watch is not None:
            self.watch(self.seconds, len(self.ends))


def timed_step(overrides: Sequence[str], *, warm: int = 5, steps: int = 15, seconds: float = 0.0) -> float:
    """Seconds a training step takes, measured on a model that is thrown away.

    ``warm`` steps, then at least ``steps`` and at least ``seconds``.
    """
    cfg = compose_train([*overrides, *TIMED, "trainer.max_steps=1000000"])
    clock = TrainingClock()

    class Enough(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            done = len(clock.ends) - warm
            if done >= steps and clock.ends[-1] - clock.ends[warm - 1] >= seconds:
                trainer.should_stop = True

    Ours(cfg, extra=[clock, Enough()]).fit()
    return clock.step_seconds(warm)


def image_flops(network: nn.Module, shape: tuple[int, int, int], **cond: torch.Tensor) -> float:
    """FLOPs of one forward pass of one image, 2 a multiply-add; all networks here take (x, t, **cond)."""
    return count_flops(network, torch.zeros(1, *shape), torch.zeros(1), **cond)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's advice on workers, devices and loggers, which no benchmark follows."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def use_threads(threads: int | None) -> int:
    """All cores unless told otherwise, for every side alike."""
    count = threads if threads is not None else (os.cpu_count() or 1)
    torch.set_num_threads(count)
    return count


def environment(threads: int) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    import diffusers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "diffusers": diffusers.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
    }


def median(values: Sequence[float]) -> float:
    """The median, NaN of nothing."""
    return statistics.median(values) if values else math.nan


def finite(value: Any) -> Any:
    """``value`` for JSON: a NaN or an infinity, at any depth, becomes null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures and stand to the right."""
    lines = [
        "| " + " | ".join(header) + " |",
        "| --- |" + " ---: |" * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The same on the terminal, by rich."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number > 0)
    for row in rows:
        table.add_row(*row)
    # A pipe has no width of its own: leave the figures whole there.
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)


def write(path: str | Path, text: str) -> None:
    """Writes a file and its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
