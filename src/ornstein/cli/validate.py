"""Refusing, before any data are read, what cannot work: one sentence that names both options and a way out.

Composing has already refused unknown keys and options; here the pieces are built without weights, so that each checks
its own numbers, and then the pairs are checked. Nothing here imports Lightning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ornstein.errors import OrnsteinError


def validate(cfg: DictConfig) -> None:
    """Checks a composed training config.

    Raises:
        OrnsteinError: a combination that cannot train or cannot sample.
    """
    choices = _choices()
    check_root(cfg, choices)
    fill_facts(cfg)
    check_conditioning(cfg, choices)
    check_codec(cfg, choices)
    schedule, objective = instantiate(cfg.scheduler), instantiate(cfg.objective)
    if objective.parameterization.needs_signal and schedule.zero_terminal_snr:
        raise OrnsteinError(
            f"objective={choices.get('objective', objective.parameterization.name)} cannot give x0 where the signal "
            f"is gone, and scheduler={choices.get('scheduler', type(schedule).__name__)} reaches zero SNR at t = 1: "
            "choose objective=v, x0, flow or edm, or a schedule that keeps some signal (linear, cosine, quadratic, "
            "sigmoid, edm)."
        )
    sampler, guidance = instantiate(cfg.sampler), instantiate(cfg.guidance)
    check_guidance(guidance.needs_null, cfg, choices)
    instantiate(cfg.conditioner)
    instantiate(cfg.codec)
    _build_network(cfg)
    if not isinstance(cfg.trainer.max_steps, int) or cfg.trainer.max_steps < 1:
        raise OrnsteinError(f"trainer.max_steps={cfg.trainer.max_steps} must be at least 1: it is what ends training.")
    check_grid(sampler, schedule)
    _check_limits(cfg, schedule, objective)
    _build_optimizer(cfg, choices)


def check_root(cfg: DictConfig, choices: dict[str, str]) -> None:
    """A folder of one's own images must be named, and be there."""
    if not OmegaConf.select(cfg, "data.dataset._target_", default="").endswith("ImageFolder"):
        return
    if cfg.data.root is None:
        raise OrnsteinError(f"data={choices.get('data', 'image_folder')} needs images: add data.root=FOLDER.")
    if not Path(str(cfg.data.root)).expanduser().is_dir():
        raise OrnsteinError(f"data.root={cfg.data.root}: there is no such folder; name one that holds images.")


def fill_facts(cfg: DictConfig) -> None:
    """Counts the classes of a folder where ``data.num_classes`` is ``auto``: a look at folder names, no decoding."""
    if cfg.data.get("num_classes") == "auto":
        from ornstein.data.describe import count_classes

        cfg.data.num_classes = count_classes(cfg.data.root)


def check_conditioning(cfg: DictConfig, choices: dict[str, str]) -> None:
    """A class-conditional model needs labelled data."""
    wants_labels = OmegaConf.select(cfg, "conditioner._target_", default="").endswith("ClassLabel")
    model, data = choices.get("model", "this model"), choices.get("data", "this data")
    if wants_labels and cfg.data.num_classes is None:
        raise OrnsteinError(
            f"model={model} is class-conditional and data={data} has no labels: choose model=pixel_unet "
            "(or conditioner=none), or data with classes (of image_folder with a sub-folder a class: "
            "data.num_classes=auto)."
        )


def check_codec(cfg: DictConfig, choices: dict[str, str]) -> None:
    """A codec with weights fits the data that they were trained on."""
    model = choices.get("model", "")
    if model.startswith("latent") and cfg.codec._target_.endswith("Identity"):
        raise OrnsteinError(
            f"model={model} diffuses latents and codec={choices.get('codec', 'identity')} has none: choose codec=kl, "
            f"or model={'dit' if 'dit' in model else 'class_unet'} for pixels."
        )
    fits = cfg.codec.get("fits")
    name = choices.get("data") or cfg.data.get("name")
    if fits is not None and name is not None and name not in fits:
        raise OrnsteinError(
            f"codec={choices.get('codec', 'kl')} holds weights for {', '.join(fits)}, not {name}: train one with "
            f"python -m ornstein.training.train_autoencoder --data {name} --out FILE and pass codec.weights=FILE "
            f"codec.fits=[{name}], or choose a pixel model such as model=class_unet."
        )


def check_guidance(needs_null: bool, cfg: DictConfig, choices: dict[str, str]) -> None:
    """Classifier-free guidance needs a model that has seen its condition dropped."""
    if not needs_null:
        return
    guidance = choices.get("guidance", "cfg")
    if not OmegaConf.select(cfg, "conditioner._target_", default="").endswith("ClassLabel"):
        raise OrnsteinError(
            f"guidance={guidance} steers a conditional model and this one has no condition: choose guidance=none, or "
            "train with model=class_unet."
        )
    if cfg.conditioner.dropout == 0:
        raise OrnsteinError(
            f"guidance={guidance} needs a model trained with label dropout and conditioner.dropout=0: choose "
            "guidance=none, or train with conditioner.dropout=0.1."
        )


def _build_network(cfg: DictConfig) -> None:
    import torch

    with torch.device("meta"):
        instantiate(cfg.model.network)


def check_grid(sampler: Any, schedule: Any) -> None:
    """The sampler's steps can be laid on the schedule."""
    from ornstein.diffusion.grids import make_grid

    try:
        make_grid(sampler.rule, schedule, sampler.steps)
    except ValueError as error:
        raise OrnsteinError(str(error)) from error


def _check_limits(cfg: DictConfig, schedule: Any, objective: Any) -> None:
    from torch import nn

    from ornstein.diffusion.denoiser import Denoiser

    limits = {"clip_x0": cfg.get("clip_x0"), "dynamic_threshold": cfg.get("dynamic_threshold")}
    try:
        Denoiser(nn.Identity(), schedule, objective.parameterization, **limits)
    except ValueError as error:
        raise OrnsteinError(str(error)) from error


def _build_optimizer(cfg: DictConfig, choices: dict[str, str]) -> None:
    """On one weight."""
    import torch

    try:
        optimizer = instantiate(cfg.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError) as error:
        raise OrnsteinError(f"optimizer={choices.get('optimizer', 'this one')} refuses its options: {error}") from error
    if cfg.lr_schedule:
        instantiate(cfg.lr_schedule)(optimizer)


def _choices() -> dict[str, Any]:
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return {}
    return {str(key): value for key, value in HydraConfig.get().runtime.choices.items()}
