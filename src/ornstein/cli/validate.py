"""Refusing, before any data are read, what cannot work: one sentence that names both options and a way out.

Composing has already refused unknown keys and options; here the pieces are built without weights, so that each checks
its own numbers, and then the pairs are checked. Nothing here imports Lightning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from ornstein.cli.autoencoder import (
    check_autoencoder,
    check_codec_fits,
    check_own_callbacks,
    check_pretrained_named,
    trains_autoencoder,
    typed_words,
)
from ornstein.cli.batch_size import check_batch_size
from ornstein.cli.buckets import fill_buckets
from ornstein.cli.check_conditions import check_conditions, targets_of
from ornstein.cli.check_sharded import check_sharded
from ornstein.cli.guides import check_guidance
from ornstein.cli.latents import check_alone, check_latents
from ornstein.data.options import check_options
from ornstein.errors import OrnsteinError

# Data sets whose options need no look of their own: to ask a class costs importing torch.
_WITHOUT_CHECKS = ("Digits", "MNIST", "FashionMNIST", "Emoji")
MATMUL_PRECISIONS = ("highest", "high", "medium")


def validate(cfg: DictConfig) -> None:
    """Checks a composed training config.

    Raises:
        OrnsteinError: a combination that cannot train or cannot sample.
    """
    choices = _choices()
    check_root(cfg, choices)
    fill_facts(cfg)
    check_alone(cfg)
    # What needs no torch comes first: its sentence comes at once.
    _check_callbacks(cfg)
    _check_loggers(cfg)
    check_batch_size(cfg)
    _check_precision(cfg)
    check_sharded(cfg)
    if trains_autoencoder(cfg):
        check_autoencoder(cfg, choices, typed_words())
        _check_training(cfg, choices)
        return
    check_pretrained_named(cfg, choices)
    check_conditioning(cfg, choices)
    check_conditions(cfg, choices)
    check_codec(cfg, choices)
    check_own_callbacks(cfg)
    schedule, objective = instantiate(cfg.scheduler), instantiate(cfg.objective)
    _check_objective(objective, schedule, cfg, choices)
    _check_noise_embedding(cfg, schedule, objective, choices)
    check_scheduler_name(cfg)
    sampler, guidance = instantiate(cfg.sampler), instantiate(cfg.guidance)
    check_guidance(guidance, sampler, cfg)
    check_sampler(sampler, schedule, objective)
    conditioner, codec = instantiate(cfg.conditioner), instantiate(cfg.codec)
    check_latents(cfg, codec, conditioner)
    _check_x0_limits(cfg, schedule, objective)
    _check_training(cfg, choices, codec=codec, conditioner=conditioner)


def _check_training(cfg: DictConfig, choices: dict[str, str], **parts: Any) -> None:
    """What is the same whatever is trained; of a denoiser with its ``codec`` and ``conditioner``."""
    fill_buckets(cfg, choices, _build_network(cfg), **parts)
    if not isinstance(cfg.trainer.max_steps, int) or cfg.trainer.max_steps < 1:
        raise OrnsteinError(f"trainer.max_steps={cfg.trainer.max_steps} must be at least 1: it is what ends training.")
    _build_optimizer(cfg, choices)
    _check_metrics(cfg)


def check_root(cfg: DictConfig, choices: dict[str, str]) -> None:
    """A folder of one's own images must be named, and be there; and what is asked of the data can be meant."""
    if isinstance(cfg.seed, bool) or not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise OrnsteinError(f"seed={cfg.seed}: give a whole number of at least 0.")
    check_options(dict(cfg.data))
    kind = str(OmegaConf.select(cfg, "data.dataset._target_", default="")).rpartition(".")[2]
    if kind in _WITHOUT_CHECKS:
        return
    if kind != "ImageFolder":
        own = _dataset_of(cfg)
        if hasattr(own, "check"):
            own.check(OmegaConf.to_container(cfg.data, resolve=True))
        return
    if cfg.data.root is None:
        raise OrnsteinError(f"data={choices.get('data', 'image_folder')} needs images: add data.root=FOLDER.")
    if not Path(str(cfg.data.root)).expanduser().is_dir():
        raise OrnsteinError(f"data.root={cfg.data.root}: there is no such folder; name one that holds images.")


def fill_facts(cfg: DictConfig) -> None:
    """Counts the classes of data where ``data.num_classes`` is ``auto``: a look at names and tables, no decoding."""
    if cfg.data.get("num_classes") == "auto":
        own = _dataset_of(cfg)
        if hasattr(own, "count_classes"):
            cfg.data.num_classes = own.count_classes(OmegaConf.to_container(cfg.data, resolve=True))
            return
        from ornstein.data.describe import count_classes

        cfg.data.num_classes = count_classes(cfg.data.root)


def _dataset_of(cfg: DictConfig) -> Any:
    """The class of the data set, which may ``check`` its options and ``count_classes`` by them."""
    target = OmegaConf.select(cfg, "data.dataset._target_") or OmegaConf.select(cfg, "data._target_")
    return None if target is None else get_object(str(target))


def check_conditioning(cfg: DictConfig, choices: dict[str, str]) -> None:
    """A class-conditional model needs labelled data."""
    wants_labels = "ClassLabel" in targets_of(cfg.conditioner)
    model, data = choices.get("model", "this model"), choices.get("data", "this data")
    if wants_labels and cfg.data.num_classes is None:
        raise OrnsteinError(
            f"model={model} is class-conditional and data={data} has no labels: choose model=pixel_unet "
            "(or conditioner=none), or data with classes (of image_folder with a sub-folder a class: "
            "data.num_classes=auto)."
        )


def check_codec(cfg: DictConfig, choices: dict[str, str]) -> None:
    """A codec with weights fits the data that they were trained on, one without changes no shape."""
    model = choices.get("model", "")
    if OmegaConf.is_list(cfg.data.get("image_size")):
        raise OrnsteinError(f"data.image_size={cfg.data.image_size}: images are read as squares, so give one number.")
    if model.startswith("latent") and cfg.codec._target_.endswith("Identity"):
        raise OrnsteinError(
            f"model={model} diffuses latents and codec={choices.get('codec', 'identity')} has none: choose codec=kl, "
            f"or model={'dit' if 'dit' in model else 'class_unet'} for pixels."
        )
    if cfg.codec._target_.endswith("Identity"):
        for own, of_data in (("channels", "channels"), ("size", "image_size")):
            given = cfg.codec.get(own)
            if set(given if OmegaConf.is_list(given) else [given]) != {cfg.data.get(of_data)}:
                raise OrnsteinError(
                    f"codec.{own}={given} and data.{of_data}={cfg.data.get(of_data)} differ: "
                    f"codec={choices.get('codec', 'identity')} diffuses the images as they are, so leave codec.{own} "
                    f"out and set data.{of_data} instead."
                )
    check_codec_fits(cfg, choices)


def _build_network(cfg: DictConfig) -> Any:
    import torch

    from ornstein.cli.start import check_start

    with torch.device("meta"):
        network = instantiate(cfg.model.network)
        check_start(cfg, network, goes_on=cfg.get("resume") not in (None, "auto"))
    return network


def _check_objective(objective: Any, schedule: Any, cfg: DictConfig, choices: dict[str, str]) -> None:
    """The schedule gives what the objective predicts, and pixels what its bound counts."""
    if objective.parameterization.needs_signal and schedule.zero_terminal_snr:
        rescaled = "scheduler.zero_terminal_snr=false, " if cfg.scheduler.get("zero_terminal_snr") else ""
        raise OrnsteinError(
            f"objective={choices.get('objective', objective.parameterization.name)} cannot give x0 where the signal "
            f"is gone, and scheduler={choices.get('scheduler', type(schedule).__name__)} reaches zero SNR at t = 1: "
            f"choose {rescaled}objective=v, x0, flow or edm, or a schedule that keeps some signal (linear, cosine, "
            "quadratic, sigmoid, edm)."
        )
    try:
        objective.check(schedule)
    except ValueError as error:
        raise OrnsteinError(str(error)) from error
    if getattr(objective, "last", None) == "discrete" and not cfg.codec._target_.endswith("Identity"):
        raise OrnsteinError(
            f"objective={choices.get('objective', 'vlb')} ends in the likelihood of 8-bit pixels and "
            f"codec={choices.get('codec', 'kl')} diffuses latents: set objective.last=gaussian, or take a pixel model."
        )


def _check_noise_embedding(cfg: DictConfig, schedule: Any, objective: Any, choices: dict[str, str]) -> None:
    """Random Fourier features tell conditions of order one apart; of those up to 1000 they make noise."""
    inner = cfg.model.network.get("network")
    network = inner if OmegaConf.is_config(inner) else cfg.model.network
    kind = network.get("noise_embedding")
    if kind in ("fourier", "ncsnpp") and float(objective.parameterization.noise_cond(schedule.level(1.0))) > 100:
        raise OrnsteinError(
            f"model.network{'.network' if network is inner else ''}.noise_embedding={kind} is for noise conditions of "
            f"order one, and objective={choices.get('objective', objective.parameterization.name)} conditions on 1000 "
            "times the time: choose objective=edm, or noise_embedding=sinusoidal."
        )


def check_scheduler_name(cfg: DictConfig) -> None:
    """A scheduler of diffusers is one that ``sampler=diffusers`` can drive; told before anything of it is imported.

    Raises:
        OrnsteinError: names the class and those that are supported.
    """
    if not str(OmegaConf.select(cfg, "sampler._target_", default="")).endswith(".DiffusersSampler"):
        return
    from ornstein.diffusion.samplers.diffusers import check_supported

    name = str(OmegaConf.select(cfg, "sampler.scheduler._target_", default="")).rpartition(".")[2]
    if name[:1].islower():  # a function that makes one: the sampler looks at what it has made
        return
    try:
        check_supported(name)
    except ValueError as error:
        raise OrnsteinError(str(error)) from error


def check_sampler(sampler: Any, schedule: Any, objective: Any) -> None:
    """The sampler runs on the schedule, and asks of the model only what it was trained for.

    Raises:
        OrnsteinError: steps that cannot be laid on the schedule, fresh noise after training on coupled noise, or a
            learned variance that there is none of.
    """
    import torch

    try:
        with torch.no_grad():
            sampler.check(schedule)
    except ValueError as error:
        raise OrnsteinError(str(error)) from error
    if sampler.stochastic and not objective.coupling.independent:
        raise OrnsteinError(
            f"{type(sampler).__name__} adds fresh noise, and objective/coupling={type(objective.coupling).__name__} "
            "trains on noise that depends on the data, which only deterministic samplers follow: choose sampler=euler, "
            "heun or ddim, or objective/coupling=independent."
        )
    if getattr(sampler, "variance", None) == "learned" and objective.parameterization.outputs == 1:
        raise OrnsteinError(
            "sampler.variance=learned and this model learns none: choose sampler.variance=fixed_small or fixed_large, "
            "or train with objective=hybrid."
        )


def _check_x0_limits(cfg: DictConfig, schedule: Any, objective: Any) -> None:
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


def _check_callbacks(cfg: DictConfig) -> None:
    """Their numbers, those of the averages too, without importing Lightning; training builds them before it begins."""
    from ornstein.training.limits import check_limits

    for node in (cfg.ema, *(cfg.callbacks or {}).values()):
        home, _, name = str(node.get("_target_") if node else "").rpartition(".")
        if home.startswith("ornstein.training"):
            check_limits(name, **{str(key): value for key, value in node.items()})


def _check_loggers(cfg: DictConfig) -> None:
    from ornstein.experiment.logger_options import check_mlflow, check_tensorboard, check_wandb_mode, check_wandb_model

    for node in (cfg.logger or {}).values():
        target = str(node.get("_target_") if node else "")
        if target.endswith(".wandb_logger"):
            check_wandb_mode(node.get("mode"))
            check_wandb_model(node.get("log_model", False))
        elif target.endswith(".tensorboard_logger"):
            check_tensorboard()
        elif target.endswith(".mlflow_logger"):
            check_mlflow(node.get("tracking_uri"))


def _check_metrics(cfg: DictConfig) -> None:
    """What would otherwise be refused at the end of training, when figures are first taken."""
    from ornstein.metrics import (
        check_feature_options,
        check_features_name,
        check_further_spaces,
        check_metric_numbers,
        check_published,
    )

    node = cfg.metrics
    if not node:
        return
    if OmegaConf.select(node, "features._target_", default="").endswith(".features_by_name"):
        check_features_name(node.features.name)
    if OmegaConf.is_dict(node.get("features")):
        check_feature_options(node.features)
    check_metric_numbers(**{str(key): value for key, value in node.items() if key not in ("features", "clip")})
    check_further_spaces(node.get("also") or {})
    if node.get("reference"):
        target = str(OmegaConf.select(node, "features._target_", default="")).rpartition(".")[2]
        named = {"InceptionFeatures": "inception", "features_by_name": OmegaConf.select(node, "features.name")}
        check_published(str(node.reference), str(named.get(target, target)))


def _check_precision(cfg: DictConfig) -> None:
    asked = cfg.model.get("matmul_precision")
    if asked not in (None, *MATMUL_PRECISIONS):
        raise OrnsteinError(
            f"model.matmul_precision={asked} is unknown: choose {', '.join(MATMUL_PRECISIONS)}, or null to leave it as "
            "torch has it."
        )


def _choices() -> dict[str, Any]:
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return {}
    return {str(key): value for key, value in HydraConfig.get().runtime.choices.items()}
