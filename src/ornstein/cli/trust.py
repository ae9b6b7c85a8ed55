"""Which classes a stored config may name: those of this package that a model, its data and its figures are made of, and
for training on also optimizers and what stands around training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ornstein.errors import OrnsteinError

# Groups that sampling and scoring build; callbacks, loggers and the like stay words there.
BUILT = ("data", "codec", "conditioner", "scheduler", "objective", "sampler", "guidance", "model", "adapter", "metrics")
_HOMES = (
    *(f"ornstein.{floor}." for floor in ("diffusion", "networks", "codecs", "conditioning", "data", "metrics")),
    "diffusers.schedulers.",
)
_FUNCTIONS = (
    "ornstein.codecs.load_kl",
    "ornstein.codecs.load_vq",
    "ornstein.metrics.features_by_name",
    "ornstein.data.hub_data",
)
# Groups that training builds beside those, with their homes; and functions of ours that make one.
_AROUND = {
    "adapter": ("ornstein.training.adapters.",),
    "optimizer": ("torch.optim.",),
    "lr_schedule": ("torch.optim.lr_scheduler.",),
    "ema": ("ornstein.training.ema.", "ornstein.training.power_ema."),
    "callbacks": ("ornstein.training.callbacks.", "lightning.pytorch.callbacks."),
    "logger": ("lightning.pytorch.loggers.",),
    "trainer": (
        *(f"lightning.pytorch.{part}." for part in ("accelerators", "plugins", "profilers", "strategies")),
        "ornstein.training.sharding.",
    ),
}
_AROUND_NAMES = (
    "lightning.pytorch.Trainer",
    "ornstein.experiment.CSVLogger",
    "ornstein.experiment.mlflow_logger",
    "ornstein.experiment.tensorboard_logger",
    "ornstein.experiment.wandb_logger",
    *(f"ornstein.training.lr_schedules.{name}" for name in ("constant", "cosine", "inverse_sqrt", "linear")),
)
TRAINED = (*BUILT, *_AROUND)


def targets(config: Any) -> Iterator[str]:
    """Every ``_target_`` in a nested config."""
    if isinstance(config, dict):
        target = config.get("_target_")
        if isinstance(target, str):
            yield target
        for value in config.values():
            yield from targets(value)
    elif isinstance(config, list):
        for value in config:
            yield from targets(value)


def check_targets(cfg: DictConfig, trusted: Sequence[str] = (), *, groups: Sequence[str] = BUILT) -> None:
    """Refuses a stored config that would call something this package does not know.

    Resolved, because an interpolation can make a target too. A name counts as ours when it is a class defined where it
    says, in one of the floors that models are made of: a path through one of our modules into another library does not
    pass, and neither does a function that writes files. Nothing that is not trusted is imported.

    Raises:
        OrnsteinError: names the target and the flag that allows it.
    """
    for group in groups:
        node = cfg.get(group)
        if not OmegaConf.is_config(node):
            continue
        for target in targets(OmegaConf.to_container(node, resolve=True)):
            if any(target == prefix or target.startswith(prefix.rstrip(".") + ".") for prefix in trusted):
                continue
            if target == "???":
                raise OrnsteinError(
                    f"{group}= names no class yet where its option asks for one: say which by its _target_, "
                    "metrics.features.module._target_=package.Class say."
                )
            if not _is_ours(target, group):
                raise OrnsteinError(
                    f"the run's config names {target}, which is not part of this package: if you trust it, add "
                    f"trust_targets=[{target.rpartition('.')[0]}]."
                )
    _check_commands(cfg, trusted)


def _check_commands(cfg: DictConfig, trusted: Sequence[str]) -> None:
    """Tar shards may be named by a command of the shell; one that somebody else wrote down is not run unasked."""
    for key in ("urls", "val_urls", "test_urls"):
        named = OmegaConf.select(cfg, f"data.{key}")
        for each in [named] if isinstance(named, str) else named or ():
            if "pipe:" in str(each) and "pipe" not in trusted:
                raise OrnsteinError(
                    f"the run's config runs a command of the shell, data.{key}={each}: if you trust it, add "
                    "trust_targets=[pipe]."
                )


def _is_ours(target: str, group: str) -> bool:
    from importlib import import_module

    if target in (_AROUND_NAMES if group in _AROUND else _FUNCTIONS):
        return True
    home = next((prefix for prefix in _AROUND.get(group, _HOMES) if target.startswith(prefix)), None)
    if home is None:
        return False
    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module_name), name)
    except (ImportError, AttributeError):
        return False
    return isinstance(found, type) and f"{found.__module__}.".startswith(home)
