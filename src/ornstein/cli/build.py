"""From a composed config to live objects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from ornstein.cli.batch_size import OWN_KEYS
from ornstein.cli.guides import equip
from ornstein.cli.search import trial_callbacks
from ornstein.cli.start import build_network
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from ornstein.metrics import GenerativeMetrics
    from ornstein.training.module import DiffusionModule


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config in plain JSON types, without Hydra's own part."""
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    assert isinstance(resolved, dict)
    return {str(key): _jsonable(value) for key, value in resolved.items() if key != "hydra"}


def build_module(cfg: DictConfig, *, training: bool = True, fresh: bool = False) -> DiffusionModule:
    """The LightningModule; without optimizer when it is only to sample.

    Weights start from ``seed`` alone, and with ``fresh``, where training begins, from what ``init.from`` names.
    """
    import torch

    from ornstein.diffusion.noise import derive_seed
    from ornstein.training.module import DiffusionModule

    torch.manual_seed(derive_seed(int(cfg.seed), "init"))
    module = DiffusionModule(
        build_network(cfg, fresh=fresh),
        schedule=instantiate(cfg.scheduler),
        objective=instantiate(cfg.objective),
        codec=instantiate(cfg.codec),
        conditioner=instantiate(cfg.conditioner),
        sampler=instantiate(cfg.sampler),
        guidance=instantiate(cfg.guidance),
        optimizer=instantiate(cfg.optimizer) if training else None,
        lr_schedule=instantiate(cfg.lr_schedule) if training and cfg.lr_schedule else None,
        flip=bool(cfg.data.flip),
        seed=int(cfg.seed),
        clip_x0=cfg.get("clip_x0"),
        dynamic_threshold=cfg.get("dynamic_threshold"),
        compile=bool(cfg.model.get("compile", False)),
        config=plain(cfg) if training else None,
    )
    if training:  # who samples a finished run names the guidance anew, and equips that
        module.guidance = equip(module.guidance, module, cfg)
    return module


def build_data(cfg: DictConfig) -> Any:
    """The Lightning data module; nothing is read until it is set up."""
    return instantiate(cfg.data)


def build_callbacks(cfg: DictConfig) -> list[pl.Callback]:
    """EMA first, so that whoever follows sees the new averages; then the callbacks in the config's order."""
    nodes = [cfg.ema, *(cfg.callbacks or {}).values()]
    built = [instantiate(node) for node in nodes if node and "_target_" in node]
    if cfg.get("adapter"):
        from ornstein.training.adapters import AdapterFiles

        built.append(AdapterFiles(cfg.paths.run_dir))
    built += trial_callbacks()
    # A partial is a callback that makes its metrics when it first needs them: importing them takes seconds.
    factory = partial(build_metrics, cfg.metrics)
    return [each(metrics=factory) if isinstance(each, partial) else each for each in built]


def build_metrics(cfg: DictConfig) -> GenerativeMetrics | None:
    """The metrics of the config group; None where the data have no feature space.

    Raises:
        WeightsMissing: the feature space's weights are not at hand.
    """
    from hydra.errors import InstantiationException

    from ornstein.metrics import GenerativeMetrics

    try:
        # A CLIP may be named by a text alone, which the metrics then load.
        built = {key: instantiate(cfg[key]) for key in ("features", "clip") if OmegaConf.is_config(cfg.get(key))}
    except InstantiationException as error:
        # Whoever can do without figures looks for WeightsMissing, which Hydra wraps.
        if isinstance(error.__cause__, OrnsteinError):
            raise error.__cause__ from None
        raise
    if built.get("features") is None:
        return None
    return GenerativeMetrics(**{str(key): built.get(str(key), value) for key, value in cfg.items()})


def build_trainer(cfg: DictConfig, *, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Lightning's trainer with our checkpoint writer, and logs that a resumed run takes up where they belong.

    Without loggers: those write, and a trainer is built before anything may be written. Give them to ``loggers``.

    Bars and checkpoints are callbacks of ours or nobody's: Lightning puts none of its own where there is none.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    from ornstein.experiment import AtomicCheckpointIO, ResumableLogs
    from ornstein.training.hooks import leave_out_empty_hooks
    from ornstein.training.profiling import Unprofiled

    callbacks = [ResumableLogs(), *callbacks]
    if not cfg.trainer.get("enable_progress_bar", True):
        callbacks = [each for each in callbacks if not isinstance(each, pl.callbacks.ProgressBar)]
    for callback in callbacks:
        leave_out_empty_hooks(callback)
    on_slurm = SLURMEnvironment.detect() and "TORCHELASTIC_RUN_ID" not in os.environ
    trainer: pl.Trainer = instantiate(
        of_lightning(cfg.trainer),
        **({} if cfg.trainer.get("profiler") else {"profiler": Unprofiled()}),
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=any(isinstance(each, pl.callbacks.ProgressBar) for each in callbacks),
        enable_checkpointing=any(isinstance(each, pl.callbacks.Checkpoint) for each in callbacks),
        # Requeues are callbacks.preemption's: of that and Lightning's own handling exactly one is on.
        plugins=[AtomicCheckpointIO(), *([SLURMEnvironment(auto_requeue=False)] if on_slurm else [])],
        _convert_="all",
    )
    return trainer


def of_lightning(trainer: DictConfig) -> DictConfig:
    """The trainer's config without the keys that are ours."""
    node = deepcopy(trainer)
    with open_dict(node):
        for key in OWN_KEYS:
            node.pop(key, None)
    return node


@contextmanager
def matmul_precision(asked: str | None) -> Iterator[None]:
    """float32 matrix products at ``highest``, ``high`` or ``medium`` precision (torch's words); None changes nothing.

    Put back afterwards: the next run of a sweep in this process may ask for another.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    if asked is not None:
        torch.set_float32_matmul_precision(asked)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def build_loggers(cfg: DictConfig) -> list[Any]:
    """Every logger of the group; one that cannot start has said so and is left out, one that dies stops nothing.

    W&B does not come without ``metrics.csv``: rows that a killed run took along before W&B had written them are logged
    again from there, and reports are made of it.
    """
    from ornstein.experiment import CSVLogger
    from ornstein.experiment.logger_guard import survivable
    from ornstein.experiment.wandb_log import RunWandbLogger

    built = [instantiate(node) for node in (cfg.logger or {}).values() if node and "_target_" in node]
    loggers = [survivable(logger) for logger in built if logger is not None]
    to_wandb = [logger for logger in loggers if isinstance(logger, RunWandbLogger)]
    if to_wandb and not any(isinstance(logger, CSVLogger) for logger in loggers):
        loggers.insert(0, CSVLogger(Path(str(to_wandb[0].save_dir)) / "metrics.csv"))
    return loggers


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise OrnsteinError(f"the config holds {value!r}, which is not a plain value: write it as text or a number.")
