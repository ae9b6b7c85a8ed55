"""Guidance on the command line: what it cannot go with, and what it needs beside numbers.

A second run, a classifier's weights, a decoder: ``equip`` fetches them once there is a model to guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ornstein.cli.check_conditions import never_drops, told_condition
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.training.module import DiffusionModule

_OPTIONS = {
    "ClassifierFree": "cfg",
    "CFGPlusPlus": "cfgpp",
    "AdaptiveProjected": "apg",
    "Interval": "interval",
    "Autoguidance": "autoguidance",
    "Classifier": "classifier",
    "Energy": "energy",
    "Compose": "compose",
}
_OWN = {"train": "none"}  # what a command takes where none is named; sample and evaluate take the run's


def check_guidance(guidance: Any, sampler: Any, cfg: DictConfig) -> None:
    """Refuses a guidance that the model, the data or the sampler cannot honour.

    Raises:
        OrnsteinError: names the option and a way out.
    """
    name = _OPTIONS.get(type(guidance).__name__, type(guidance).__name__)
    conditional = not OmegaConf.select(cfg, "conditioner._target_", default="").endswith("NoConditioning")
    needs_null = guidance.needs_null
    target = ", or give guidance.target=CLASS" if name == "classifier" else ""
    if (needs_null or getattr(guidance, "needs_condition", False)) and not conditional:
        raise OrnsteinError(
            f"guidance={name} steers a conditional model and this one has no condition: choose guidance=none{target}, "
            "or train with model=class_unet."
        )
    if needs_null and never_drops(cfg.conditioner):
        raise OrnsteinError(
            f"guidance={name} needs a model trained with label dropout and conditioner.dropout=0: choose "
            "guidance=none, or train with conditioner.dropout=0.1."
        )
    if getattr(guidance, "renoises", False) and not sampler.renoises:
        raise OrnsteinError(
            f"guidance={name} renoises in a direction of its own, which sampler={type(sampler).__name__} cannot: "
            "choose sampler=ddim or euler, or guidance=cfg."
        )
    from ornstein.diffusion.samplers.adaptive import NO_MOMENTUM, RK45

    if getattr(guidance, "remembers", False) and isinstance(sampler, RK45):
        raise OrnsteinError(f"guidance={name}: {NO_MOMENTUM}")
    for leaf in _leaves(guidance):
        if not getattr(leaf, "off", True):
            _check_leaf(leaf, cfg)


def equip(guidance: Any, module: DiffusionModule, cfg: DictConfig, *, trust_targets: Sequence[str] = ()) -> Any:
    """The guidance with what it needs to guide ``module``: the second model, the classifier's weights, the decoder.

    Args:
        guidance: as the config describes it.
        module: the model to guide.
        cfg: its config.
        trust_targets: prefixes of classes outside this package that a second run's config may name.

    Raises:
        OrnsteinError: the second run is missing or does not go with the first, or the weights do not fit.
    """
    from ornstein.diffusion.guidance import replaced

    return replaced(guidance, partial(_equipped, module=module, cfg=cfg, trust_targets=trust_targets))


def check_words(task: str, words: Sequence[str]) -> None:
    """Refuses ``guidance.KEY=`` where the chosen guidance has no such key: Hydra's own hint would be to add it.

    Args:
        task: train, sample or evaluate.
        words: the overrides.

    Raises:
        OrnsteinError: says which guidance has the key, or which keys the guidance has.
    """
    named = [word.partition("=")[2] for word in words if word.startswith("guidance=")]
    if not named and any(word.startswith(("experiment=", "hparams_search=", "resume=")) for word in words):
        return  # a recipe, or the run that is gone on with, may have chosen one
    chosen = named[-1] if named else _OWN.get(task, "run")
    keys = _keys(chosen)
    if keys is None or task not in ("train", "sample", "evaluate"):
        return
    for word in words:
        if not word.startswith("guidance."):
            continue
        key = word.partition("=")[0].split(".")[1]
        if key in keys:
            continue
        others = [option for option in _options() if key in (_keys(option) or ())]
        chosen_words = "the run's own guidance" if chosen == "run" else f"guidance={chosen}"
        if others:
            raise OrnsteinError(
                f"{word}: {chosen_words} has no {key}; {', '.join(others)} "
                f"{'have' if len(others) > 1 else 'has'} one: add guidance={'cfg' if 'cfg' in others else others[0]}."
            )
        raise OrnsteinError(f"{word}: {chosen_words} has no {key}; it has {', '.join(keys) or 'no keys'}.")


def _keys(option: str) -> list[str] | None:
    """The keys of an option of ours, or of the stored run's guidance; None where there is no such option."""
    from hydra.core.config_store import ConfigStore

    from ornstein.cli.launch import conf_dir

    if option == "run":
        node: Any = ConfigStore.instance().repo.get("guidance", {}).get("run.yaml")
        return None if node is None else [str(key) for key in node.node if not str(key).startswith("_")]
    path = conf_dir() / "guidance" / f"{option}.yaml"
    if not path.is_file():
        return None
    own = [str(key) for key in OmegaConf.load(path) if not str(key).startswith("_") and key != "defaults"]
    return [*own, "parts"] if option == "compose" else own


def _options() -> list[str]:
    from ornstein.cli.launch import conf_dir

    return sorted(path.stem for path in (conf_dir() / "guidance").glob("*.yaml"))


def _leaves(guidance: Any) -> list[Any]:
    from ornstein.diffusion.guidance import leaves

    return list(leaves(guidance))


def _check_leaf(leaf: Any, cfg: DictConfig) -> None:
    from ornstein.cli.stored import open_run
    from ornstein.diffusion.guidance import Autoguidance, Classifier, ClassifierFree, Colour, Energy
    from ornstein.diffusion.guidance.autoguidance import NO_RUN
    from ornstein.diffusion.guidance.energy import NO_LOSS

    if isinstance(leaf, Autoguidance) and leaf.denoiser is None:
        if leaf.run is None:
            raise OrnsteinError(NO_RUN)
        open_run(leaf.run, key="guidance.run")
    elif isinstance(leaf, Energy) and leaf.loss is None:
        raise OrnsteinError(NO_LOSS)
    elif isinstance(leaf, Energy) and isinstance(leaf.loss, Colour) and cfg.data.channels != 3:
        raise OrnsteinError(
            f"guidance=colour steers RGB images and data.channels={cfg.data.channels}: choose guidance=none, or data "
            "in colour, such as data=emoji."
        )
    elif isinstance(leaf, Classifier):
        _check_classes("target", leaf.target, cfg)
        _check_classifier(leaf, cfg)
    elif isinstance(leaf, ClassifierFree):
        _check_classes("negative", leaf.negative, cfg)


def _check_classes(key: str, value: int | None, cfg: DictConfig) -> None:
    classes = cfg.data.num_classes
    if value is not None and isinstance(classes, int) and value >= classes:
        raise OrnsteinError(f"guidance.{key}={value} must be a class number from 0 to {classes - 1}.")


def _check_classifier(leaf: Any, cfg: DictConfig) -> None:
    from ornstein.networks import NoisyClassifier
    from ornstein.networks.noisy_classifier import load_classifier, read_metadata

    way_out = "train one with python -m ornstein.training.train_classifier --data NAME --out FILE"
    if leaf.weights is None:
        if isinstance(leaf.network, NoisyClassifier):
            raise OrnsteinError(
                f"guidance=classifier needs a trained network: {way_out} and add guidance.weights=FILE."
            )
        return
    header = read_metadata(leaf.weights)
    size = cfg.codec.size
    shape = [cfg.codec.channels, *([size, size] if isinstance(size, int) else size)]
    dataset = str(OmegaConf.select(cfg, "data.dataset._target_", default="")).rpartition(".")[2]
    for what, own, of_run in (("data", header.get("dataset"), dataset), ("shape", header.get("shape"), shape)):
        if own is not None and own != of_run:
            raise OrnsteinError(
                f"guidance.weights={leaf.weights} classifies {what} {own} and this model makes {of_run}: {way_out} and "
                "add guidance.weights=FILE, or choose another guidance."
            )
    load_classifier(leaf.network, leaf.weights)


def _equipped(leaf: Any, *, module: DiffusionModule, cfg: DictConfig, trust_targets: Sequence[str]) -> Any:
    from ornstein.codecs import Identity
    from ornstein.diffusion.guidance import Autoguidance, Classifier, Energy
    from ornstein.networks.noisy_classifier import load_classifier

    if getattr(leaf, "off", True):
        return leaf
    if isinstance(leaf, Autoguidance) and leaf.denoiser is None:
        return replace(leaf, denoiser=_weak_denoiser(leaf, module, cfg, trust_targets))
    if isinstance(leaf, Classifier):
        if leaf.weights is not None:
            load_classifier(leaf.network, leaf.weights)
        leaf.network.eval().requires_grad_(False)
    if isinstance(leaf, Energy) and not isinstance(module.codec, Identity):
        return replace(leaf, decode=module.codec.decode)
    return leaf


def _weak_denoiser(leaf: Any, module: DiffusionModule, cfg: DictConfig, trust_targets: Sequence[str]) -> Any:
    from ornstein.cli.load import restore
    from ornstein.cli.stored import open_run

    if leaf.run is None:
        return None
    stored = open_run(leaf.run, key="guidance.run")
    # Not composed again: that would take the place of the run that is being sampled in Hydra's store.
    weak_cfg = OmegaConf.create(stored.config)
    assert isinstance(weak_cfg, DictConfig)
    weak = restore(
        stored,
        weak_cfg,
        checkpoint=leaf.checkpoint,
        weights=leaf.weights,
        trust_targets=trust_targets,
        device=str(module.device),
    )
    named = f"guidance.run={Path(str(leaf.run))}"
    if weak.latent_shape != module.latent_shape or _codec(weak_cfg) != _codec(cfg):
        raise OrnsteinError(
            f"{named} diffuses another space ({_space(weak, weak_cfg)}) than this run ({_space(module, cfg)}): name a "
            "run on the same data, size and codec."
        )
    wanted = "unconditional" if leaf.condition == "none" else told_condition(module.conditioner)
    of_weak = told_condition(weak.conditioner)
    if of_weak != wanted:
        raise OrnsteinError(
            f"{named} is {of_weak}, which guidance.condition={leaf.condition} does not allow beside this run: "
            + ("add guidance.condition=none." if of_weak == "unconditional" else "name a run with the same condition.")
        )
    if leaf.condition == "null" and not weak.conditioner.has_null:
        raise OrnsteinError(f"{named} was trained without label dropout: choose guidance.condition=same.")
    return weak.denoiser(evaluation=True)


def _codec(cfg: DictConfig) -> tuple[Any, ...]:
    return cfg.codec._target_, cfg.codec.get("weights")


def _space(module: DiffusionModule, cfg: DictConfig) -> str:
    return f"{'x'.join(map(str, module.latent_shape))}, {cfg.codec._target_.rpartition('.')[2]}"
