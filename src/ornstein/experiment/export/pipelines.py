"""A run's denoiser as a folder that ``diffusers.DiffusionPipeline.from_pretrained`` opens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ornstein.codecs.codec import sides_of
from ornstein.diffusion.guidance import ClassifierFree, Guidance
from ornstein.errors import OrnsteinError
from ornstein.experiment.export.models import ModelSpec, codec_spec, network_spec
from ornstein.experiment.export.schedulers import SchedulerSpec, scheduler_for

if TYPE_CHECKING:
    from ornstein.training.module import DiffusionModule

TOLERANCE = 1e-3  # largest difference to our network, over its output's deviation, that an export may have
_TEMPLATE = Path(__file__).with_name("pipeline_template.txt")
_DIT_NULL = 1000  # the class that DiTPipeline takes for the null class, whatever the model


@dataclass(frozen=True)
class Pipeline:
    """What was written.

    Attributes:
        name: the pipeline's class.
        native: a class of diffusers, which needs no ``trust_remote_code``.
        components: name of each component -> its class.
        call: what a call must say for the run's own samples: steps, eta, guidance_scale.
        num_classes: None for an unconditional model.
        takes: further tensors that a call wants: prompt_embeds, pooled_prompt_embeds, conditioning.
        notes: sentences on what it does otherwise than the run's own sampler and guidance.
        error: largest difference of an output to ours, over the output's deviation.
    """

    name: str
    native: bool
    components: dict[str, str]
    call: dict[str, Any]
    num_classes: int | None
    takes: tuple[str, ...]
    notes: tuple[str, ...]
    error: float


def write_pipeline(folder: Path, module: DiffusionModule, arguments: Mapping[str, Any]) -> Pipeline:
    """Writes the pipeline of a run into an empty folder, opens it again, and compares.

    Args:
        folder: where to.
        module: the run's, with the weights to be exported, on the CPU; its own sampler, guidance and limits of x0 say
            which scheduler it is.
        arguments: of its network's constructor, as the run's config has them.

    Raises:
        OrnsteinError: something that diffusers cannot express; names it, and the formats that can.
    """
    conditioner = module.conditioner
    scheduler = scheduler_for(
        module.schedule,
        module.objective.parameterization,
        module.sampler,
        clip_x0=module.clip_x0,
        dynamic_threshold=module.dynamic_threshold,
    )
    network = network_spec(module.network, arguments, noise_offset=scheduler.noise_offset)
    vae = codec_spec(module.codec)
    name = native_name(network, vae, scheduler, classes=conditioner.num_classes, shape=module.latent_shape)
    scale, notes = _guidance(module.guidance, has_null=conditioner.has_null)
    if name == "DiTPipeline":
        network = network_spec(module.network, arguments, noise_offset=scheduler.noise_offset, null_class=_DIT_NULL)
    specs = [network] if vae is None else [network, vae]
    for spec in specs:
        spec.save(folder / spec.component)
    import diffusers

    getattr(diffusers, scheduler.name)(**scheduler.config).save_pretrained(folder / "scheduler")
    config: dict[str, Any] = {}
    if name is None:
        config = {
            "sample_shape": list(module.latent_shape),
            "num_classes": conditioner.num_classes,
            "guidance_scale": scale,
            "num_inference_steps": scheduler.steps,
            "step_options": scheduler.call,
            **network.pipeline,
            **(vae.pipeline if vae is not None else {}),
        }
        (folder / "pipeline.py").write_text(_TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    _write_index(folder, name, specs, scheduler, config)
    error = _compare(folder, module, specs, scheduler, config)
    # A pipeline of our own knows these; one of diffusers has to be told, and has defaults of its own.
    call = {"num_inference_steps": scheduler.steps, **scheduler.call} if name is not None else {}
    if name == "DiTPipeline":
        call = {"num_inference_steps": scheduler.steps, "guidance_scale": scale}
    return Pipeline(
        name=name or "OrnsteinPipeline",
        native=name is not None,
        components={spec.component: spec.name for spec in specs} | {"scheduler": scheduler.name},
        call=call,
        num_classes=conditioner.num_classes,
        takes=tuple(
            name
            for name, size in (
                ("prompt_embeds", conditioner.text_dim),
                ("pooled_prompt_embeds", conditioner.pooled_dim),
                ("conditioning", conditioner.concat_channels),
            )
            if size
        ),
        notes=(*scheduler.notes, *notes),
        error=error,
    )


@dataclass(frozen=True)
class Model:
    """An autoencoder that was written by itself.

    Attributes:
        name: its class in diffusers.
        channels: of its latents.
        notes: sentences on what a reader has to know.
        error: largest difference of its images to ours, over their deviation.
    """

    name: str
    channels: int
    notes: tuple[str, ...]
    error: float


@torch.no_grad()
def write_autoencoder(folder: Path, codec: Any) -> Model:
    """Writes an autoencoder of ours as diffusers' own into an empty folder, opens it again, and compares.

    Raises:
        OrnsteinError: it has no counterpart, or what was written computes something else.
    """
    import diffusers

    spec = codec_spec(codec)
    assert spec is not None
    spec.save(folder)
    loaded = getattr(diffusers, spec.name).from_pretrained(folder)
    height, width = sides_of(codec.size)
    h = torch.randn(2, codec.channels, height, width, generator=torch.Generator().manual_seed(0))
    inner = spec.pipeline
    ours = codec.decode((h - codec.shift) * codec.scale) if inner else codec.decode(h)
    error = _difference(loaded.decode(h).sample, ours)
    _check(error)
    told = (
        [f"unit-variance latents are (h - {inner['latents_mean']}) / {inner['latents_std']}, channel by channel"]
        if inner
        else ["its latents have unit variance: scaling_factor is 1"]
    )
    return Model(spec.name, codec.channels, tuple(told), error)


def native_name(
    network: ModelSpec,
    vae: ModelSpec | None,
    scheduler: SchedulerSpec,
    *,
    classes: int | None,
    shape: tuple[int, int, int],
) -> str | None:
    """The pipeline of diffusers that does all that this model needs; None where it takes one of our own."""
    doubled = network.config.get("out_channels") != network.config.get("in_channels")
    ancestral = scheduler.name == "DDPMScheduler"
    learned = scheduler.config.get("variance_type") == "learned_range"
    if network.pipeline or scheduler.name not in ("DDIMScheduler", "DDPMScheduler"):
        return None
    unconditional = classes is None and network.config.get("in_channels") == shape[0]
    if network.name == "UNet2DModel" and vae is None and unconditional and doubled == learned:
        return "DDPMPipeline" if ancestral else "DDIMPipeline"
    if network.name == "DiTTransformer2DModel" and vae is not None and vae.name == "AutoencoderKL" and not vae.pipeline:
        # It passes no options to the scheduler's step, and drops a learned variance.
        plain = not learned and not any(scheduler.call.values())
        if classes is not None and classes <= _DIT_NULL and shape[1] == shape[2] and plain:
            return "DiTPipeline"
    return None


def _guidance(guidance: Guidance, *, has_null: bool) -> tuple[float, list[str]]:
    """``guidance_scale`` of the run's guidance, and what of it stays behind."""
    if getattr(guidance, "off", False):
        return 1.0, []
    if type(guidance) is ClassifierFree and has_null and guidance.rescale == 0 and guidance.negative is None:
        return float(guidance.scale), []
    return 1.0, [f"the run's guidance {type(guidance).__name__} stays behind: guidance_scale is what a pipeline has"]


def _write_index(
    folder: Path, name: str | None, specs: list[ModelSpec], scheduler: SchedulerSpec, config: Mapping[str, Any]
) -> None:
    import diffusers

    index: dict[str, Any] = {
        "_class_name": name if name is not None else ["pipeline", "OrnsteinPipeline"],
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", scheduler.name],
    }
    if name is None:
        index |= {component: [None, None] for component in ("unet", "transformer", "vae")}
    index |= {spec.component: ["diffusers", spec.name] for spec in specs}
    (folder / "model_index.json").write_text(json.dumps({**index, **config}, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _compare(
    folder: Path,
    module: DiffusionModule,
    specs: list[ModelSpec],
    scheduler: SchedulerSpec,
    config: Mapping[str, Any],
) -> float:
    """Largest difference between what was written, read again, and our network and decoder.

    Raises:
        OrnsteinError: it is larger than rounding.
    """
    import diffusers

    loaded: dict[str, Any] = {
        spec.component: getattr(diffusers, spec.name).from_pretrained(folder / spec.component) for spec in specs
    }
    stepper = getattr(diffusers, scheduler.name).from_pretrained(folder / "scheduler")
    space: dict[str, Any] = {"__name__": "pipeline"}
    exec(compile(_TEMPLATE.read_text(encoding="utf-8"), "pipeline.py", "exec"), space)
    facts = {"num_classes": module.conditioner.num_classes, "sample_shape": list(module.latent_shape)}
    around = {key: value for spec in specs for key, value in spec.pipeline.items()}
    theirs = space["OrnsteinPipeline"](scheduler=stepper, **loaded, **{**facts, **around, **config})
    given = _example(module)
    errors = []
    for t in (0.001, 0.5, 0.999):
        level = module.schedule.level(t)
        noise_cond = float(module.objective.parameterization.noise_cond(level))
        noise_cond = round(noise_cond) if scheduler.noise_offset else noise_cond
        ours = module.network(given["x"], torch.full((len(given["x"]),), noise_cond), **_keywords(given))
        step = torch.tensor(noise_cond - scheduler.noise_offset)
        errors.append(
            _difference(theirs._output(_network(theirs), given["x"], step, _their_keywords(given, theirs)), ours)
        )
    if "vae" in loaded:
        errors.append(_difference(theirs._decode(given["x"]), module.codec.decode(given["x"])))
    error = max(errors)
    _check(error)
    return error


def _check(error: float) -> None:
    if not error <= TOLERANCE:
        raise OrnsteinError(
            f"what diffusers computes from this export differs from the run's own by {error:.2g} of its output's "
            "deviation, so nothing was written: please report the run's config."
        )


def _difference(given: Tensor, expected: Tensor) -> float:
    """Largest difference, over the deviation of what is expected (or over 1e-3, where that is next to nothing)."""
    return float((given - expected).abs().max() / expected.std().clamp(min=1e-3))


def _network(pipeline: Any) -> nn.Module:
    return pipeline.transformer if pipeline.transformer is not None else pipeline.unet


def _example(module: DiffusionModule) -> dict[str, Tensor]:
    from ornstein.experiment.export.graphs import example_inputs

    return example_inputs(module.conditioner, module.latent_shape, batch=2)


def _keywords(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in given.items() if key not in ("x", "noise_cond")}


def _their_keywords(given: Mapping[str, Tensor], pipeline: Any) -> dict[str, Any]:
    text = (given.get("text"), given.get("text_mask"), given.get("pooled"))
    return pipeline._branches(len(given["x"]), given.get("label"), text, (None,) * 3, given.get("concat"), 1.0)[0]
