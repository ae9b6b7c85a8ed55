"""``ornstein.load``: a run, ready to sample and score, from Python."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from ornstein.cli.autoencoder import build_autoencoder, refuse_samples, trains_autoencoder
from ornstein.cli.buckets import sample_size
from ornstein.cli.guides import check_guidance, equip
from ornstein.cli.launch import as_ours, conf_dir, register_resolvers, store_run
from ornstein.cli.prompts import conditions_of, held_out_of
from ornstein.cli.stored import StoredRun, open_run
from ornstein.cli.trust import check_targets
from ornstein.cli.validate import check_sampler, check_scheduler_name
from ornstein.cli.words import check_words
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    import torch

    from ornstein.training.module import DiffusionModule


def load(
    run: str | Path,
    *,
    checkpoint: str = "last",
    weights: str = "ema",
    device: str | None = None,
    trust_targets: Sequence[str] = (),
) -> Run:
    """Opens a run folder or a checkpoint.

    Args:
        run: ``outputs/train/<date>/<time>`` or a ``.ckpt`` file.
        checkpoint: last or best, where ``run`` is a folder.
        weights: ema (averaged where the run has averages), model, or the length of a power-function average (0.1) of a
            run with ema=power.
        device: such as cuda; the GPU where there is one unless given.
        trust_targets: prefixes of classes outside this package that the run's config may name.

    Raises:
        OrnsteinError: nothing is there, it is damaged, or its config names classes that are not trusted.
    """
    stored = open_run(str(run))
    cfg = compose_for(stored, "sample", [f"run={_quoted(run)}"])
    with as_ours():
        module = restore(
            stored, cfg, checkpoint=checkpoint, weights=weights, trust_targets=trust_targets, device=device
        )
    return Run(stored, module, cfg)


@dataclass(frozen=True)
class Run:
    """A loaded run.

    Attributes:
        stored: what is on disk.
        module: the LightningModule with its weights, in eval mode.
        config: its config.
    """

    stored: StoredRun
    module: DiffusionModule
    config: DictConfig

    def sample(
        self,
        num_samples: int,
        *,
        sampler: str = "run",
        steps: int | None = None,
        guidance: str = "run",
        scale: float | None = None,
        labels: Sequence[int] | None = None,
        prompts: Sequence[str] | str | None = None,
        negative_prompt: str | None = None,
        condition_images: str | Path | None = None,
        size: int | Sequence[int] | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 256,
        watch: Callable[..., None] | None = None,
    ) -> torch.Tensor:
        """uint8 (num_samples, C, H, W), on the CPU.

        Args:
            num_samples: how many.
            sampler: an option of the group; ``run`` is the run's own.
            steps: of the sampler.
            guidance: an option of the group.
            scale: of the guidance.
            labels: class numbers, repeated as needed; balanced unless given.
            prompts: captions, repeated as needed, of a model that reads them; those of held-out data unless given.
            negative_prompt: what guidance steers away from.
            condition_images: a folder of images, repeated as needed, of a model that is conditioned on images; held-out
                ones unless given.
            size: one side in pixels, or (height, width); the run's ``data.image_size`` unless given.
            seed: sample i depends on (seed, i) alone.
            first_index: the number of the first sample.
            batch_size: samples at once.
            watch: called with (step, state) after each step.

        Raises:
            OrnsteinError: an option that does not exist, or that this run cannot honour.
        """
        import torch

        if num_samples < 1:
            raise OrnsteinError(f"num_samples={num_samples} must be at least 1.")
        overrides = [f"run={_quoted(self.stored.checkpoint or self.stored.folder)}"]
        overrides += [f"sampler={sampler}", f"guidance={guidance}"]
        overrides += [f"sampler.steps={steps}"] if steps is not None else []
        overrides += [f"guidance.scale={scale}"] if scale is not None else []
        overrides += [f"negative_prompt={_quoted(negative_prompt)}"] if negative_prompt is not None else []
        overrides += [f"condition_images={_quoted(condition_images)}"] if condition_images is not None else []
        overrides += [f"size={size if isinstance(size, int) else list(size)}"] if size is not None else []
        cfg = compose_for(self.stored, "sample", overrides)
        refuse_samples(cfg)
        asked = [prompts] if isinstance(prompts, str) else prompts
        batches = self.module.generate(
            range(first_index, first_index + num_samples),
            **sampling_options(self.module, cfg, labels=labels, count=num_samples, prompts=asked),
            seed=seed,
            batch_size=batch_size,
            watch=watch,
        )
        return torch.cat([batch.images.cpu() for batch in batches])

    def evaluate(self, num_samples: int = 1000, **options: Any) -> dict[str, float]:
        """FID and the run's other figures on ``num_samples`` fresh samples; options as for :meth:`sample`."""
        from ornstein.cli.autoencoder import score_autoencoder
        from ornstein.cli.evaluate import score

        overrides = [f"run={_quoted(self.stored.checkpoint or self.stored.folder)}", f"num_samples={num_samples}"]
        names = {"steps": "sampler.steps", "scale": "guidance.scale"}
        overrides += [
            f"{names.get(key, key)}={list(value) if isinstance(value, tuple) else value}"
            for key, value in options.items()
        ]
        cfg = compose_for(self.stored, "evaluate", overrides)
        if trains_autoencoder(cfg):
            return dict(score_autoencoder(self.module, cfg)[0].values)
        return dict(score(self.module, cfg).values)


def compose_for(stored: StoredRun, task: str, overrides: list[str]) -> DictConfig:
    """Composes ``sample`` or ``evaluate`` on top of a stored run, as the command line does."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_resolvers()
    store_run(stored.config)
    check_words(task, overrides)
    # A running command has its own Hydra: set it aside and put it back.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with as_ours(), initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            return compose(config_name=task, overrides=overrides)
    finally:
        GlobalHydra.instance().hydra = outer


def restore(
    stored: StoredRun,
    cfg: DictConfig,
    *,
    checkpoint: str = "last",
    weights: str = "ema",
    trust_targets: Sequence[str] = (),
    device: str | None = None,
) -> DiffusionModule:
    """Builds the run's module and loads its weights.

    Raises:
        OrnsteinError: an unknown kind of weights, a checkpoint that does not fit, or targets that are not trusted.
    """
    import torch

    from ornstein.cli.build import build_module
    from ornstein.experiment import AtomicCheckpointIO
    from ornstein.training.posthoc import averaged_weights

    std = power_length(weights)
    check_scheduler_name(cfg)
    check_targets(cfg, trust_targets)
    path = stored.checkpoint_path(checkpoint)
    state = _read_converted(path) if path == stored.converted else AtomicCheckpointIO().load_checkpoint(path)
    module: Any
    if trains_autoencoder(cfg):
        module = build_autoencoder(cfg, training=False)
    else:
        module = build_module(cfg, training=False)
        module.held_out = held_out_of(cfg)
    averages = state.get("callbacks", {}).get("EMA", {}) if weights == "ema" else {}
    if std is not None:
        averages = {part: _whole(module, part, found) for part, found in averaged_weights(stored.folder, std).items()}
    try:
        if path == stored.converted:
            module.network.load_state_dict(state["network"])
        else:
            module.load_state_dict(state["state_dict"])
        if averages.get("network"):
            module.network.load_state_dict(averages["network"])
        if averages.get("schedule"):  # a learned one belongs to the weights that it was averaged with
            module.schedule.load_state_dict(averages["schedule"])
    except RuntimeError as error:
        raise OrnsteinError(
            f"{path} is of another network than the run's config describes: has its config.yaml been changed, or was "
            "the run made by another version of this package?"
        ) from error
    module.images_seen = int(state["ornstein"]["images_seen"])
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    restored: DiffusionModule = module.to(target).eval().requires_grad_(False)
    return restored


def power_length(weights: str | float) -> float | None:
    """The length that ``weights=0.1`` asks for; None for ``ema`` and ``model``.

    Raises:
        OrnsteinError: none of these.
    """
    if weights in ("ema", "model"):
        return None
    try:
        return float(weights)
    except ValueError:
        raise OrnsteinError(
            f"weights={weights} is unknown: choose ema, model, or the length of an average, such as 0.1, of a run with "
            "ema=power."
        ) from None


def _whole(module: Any, part: str, averaged: dict[str, Any]) -> dict[str, Any]:
    """Averages hold what can be averaged; counters and the like are the model's."""
    return getattr(module, part).state_dict() | averaged


def _read_converted(path: Path) -> dict[str, Any]:
    """What ``ornstein convert`` wrote, as a checkpoint of a run that has seen no images."""
    from ornstein.networks.layouts.reading import read_foreign

    return {"network": read_foreign(path).state, "ornstein": {"images_seen": 0}}


def sampling_options(
    module: DiffusionModule,
    cfg: DictConfig,
    *,
    labels: Sequence[int] | None,
    count: int,
    prompts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Sampler, guidance and conditions of a composed config, as ``DiffusionModule.generate`` takes them.

    Raises:
        OrnsteinError: an option that this run cannot honour.
    """
    check_scheduler_name(cfg)
    with as_ours():
        sampler, guidance = instantiate(cfg.sampler), instantiate(cfg.guidance)
    check_guidance(guidance, sampler, cfg)
    check_sampler(sampler, module.schedule, module.objective)
    guidance = equip(guidance, module, cfg, trust_targets=list(cfg.get("trust_targets") or ()))
    if cfg.get("negative_prompt") is not None and "caption" in module.conditioner.needs and not guidance.needs_null:
        raise OrnsteinError(
            "negative_prompt is what guidance steers away from, and this guidance has no such branch: add guidance=cfg."
        )
    size = sample_size(module, cfg)
    given = conditions_of(module, cfg, labels=labels, count=count, prompts=prompts, size=size)
    return {"sampler": sampler, "guidance": guidance, "size": size, **given}


def check_labels(labels: Sequence[int] | None, module: DiffusionModule, count: int) -> list[int] | None:
    """One label a sample, those given repeated as needed; None stays None, which means balanced.

    Raises:
        OrnsteinError: labels for an unconditional model, or outside its classes.
    """
    if labels is None:
        return None
    classes = module.conditioner.num_classes
    if classes is None:
        other = "has no classes" if module.conditioner.needs else "is unconditional"
        raise OrnsteinError(f"labels were given and this model {other}: leave them out.")
    try:
        numbers = [operator.index(label) for label in labels]
    except TypeError:
        numbers = []
    if not numbers or any(not 0 <= number < classes for number in numbers):
        raise OrnsteinError(f"labels={list(labels)}: each must be a class number from 0 to {classes - 1}.")
    return [numbers[i % len(numbers)] for i in range(count)]


def _quoted(path: object) -> str:
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
