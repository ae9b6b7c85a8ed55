"""Our networks and codecs as models of diffusers: class, config, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ornstein.codecs import Codec, Identity
from ornstein.errors import OrnsteinError
from ornstein.experiment.export.schedulers import WAY_OUT


@dataclass(frozen=True)
class ModelSpec:
    """One model of diffusers, not built yet.

    Attributes:
        component: its name in the pipeline: unet, transformer or vae.
        name: its class.
        config: its constructor's arguments.
        state: its weights.
        pipeline: what a pipeline does around it, as arguments of :class:`OrnsteinPipeline`; empty where a pipeline of
            diffusers itself will do.
    """

    component: str
    name: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    pipeline: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """The model with its weights, in eval mode, on the CPU.

        Raises:
            RuntimeError: the weights are not those of the config.
        """
        import diffusers

        model: Any = getattr(diffusers, self.name).from_config(self.config)
        model.load_state_dict({key: value.detach().cpu() for key, value in self.state.items()})
        return model.eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Writes ``config.json`` and the weights, as safetensors, into ``folder``."""
        self.build().save_pretrained(folder, safe_serialization=True)


def network_spec(
    network: nn.Module, arguments: Mapping[str, Any], *, noise_offset: float, null_class: int | None = None
) -> ModelSpec:
    """A denoising network of ours as diffusers'.

    Args:
        network: with its weights.
        arguments: of its constructor, as the run's config has them.
        noise_offset: our noise condition minus the time step that diffusers will give it.
        null_class: number that a transformer's null class is to have; None: the number of classes, as ours.

    Raises:
        OrnsteinError: it has no counterpart; names the option that stands in the way, and the formats without one.
    """
    kind = type(network).__name__
    make = _NETWORKS.get(kind)
    if make is None:
        raise OrnsteinError(f"model.network={kind} has no counterpart in diffusers: {WAY_OUT}.")
    try:
        shape = {name: getattr(network, name) for name in ("in_channels", "out_channels", "image_size", "num_classes")}
        if null_class is not None:
            return _dit(network, {**arguments, **shape}, noise_offset, null_class=null_class)
        return make(network, {**arguments, **shape}, noise_offset)
    except OrnsteinError as error:
        told = str(error).rstrip(".")
        raise error if WAY_OUT in told else OrnsteinError(f"{told}; {WAY_OUT}.") from error


def _unet(network: Any, arguments: Mapping[str, Any], noise_offset: float) -> ModelSpec:
    from ornstein.networks.layouts import diffusers_unet

    config, state = diffusers_unet.to_diffusers(
        network.state_dict(), {**arguments, "patch_size": network.patch_size}, noise_offset=noise_offset
    )
    around: dict[str, Any] = {} if network.patch_size == 1 else {"patch_size": network.patch_size}
    if network.label_image is not None:
        around["label_channels"] = network.label_image.table.weight.tolist()
    return ModelSpec("unet", "UNet2DModel", config, state, around)


def _dit(network: Any, arguments: Mapping[str, Any], noise_offset: float, null_class: int | None = None) -> ModelSpec:
    """A DiT, whose time features diffusers spaces as noise_embedding=ddpm does, unless it is told otherwise."""
    from ornstein.networks.layouts import diffusers_dit

    arguments = {**arguments, "patch_size": network.patch_size}
    config, state = diffusers_dit.to_diffusers(arguments, network.state_dict(), shift=noise_offset, classes=null_class)
    spaced_as_theirs = arguments.get("noise_embedding") == "ddpm"
    around: dict[str, Any] = {} if spaced_as_theirs else {"frequency_shift": 0.0}
    return ModelSpec("transformer", "DiTTransformer2DModel", config, state, around)


def _diffusers_unet(network: Any, arguments: Mapping[str, Any], noise_offset: float) -> ModelSpec:
    """The library's own, as it is but for the first layer of the time embedding."""
    from ornstein.networks.layouts.diffusers_unet import shift_first_layer

    config = _plain(network.model.config)
    state = {key: value.detach().clone() for key, value in network.model.state_dict().items()}
    name = "time_embedding.linear_1.weight"
    spacing = {key: config[key] for key in ("flip_sin_to_cos", "freq_shift") if key in config}
    state[name] = shift_first_layer(state[name], by=noise_offset, **spacing)
    beside = "time_embedding.cond_proj.weight"
    if beside in state:
        # Its output is added before that layer and has to be turned back: a rotation's inverse is its transpose.
        state[beside] = shift_first_layer(state[beside].t(), by=noise_offset, **spacing).t().contiguous()
    return ModelSpec("unet", type(network.model).__name__, config, state)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what diffusers notes for itself, and with lists for whatever kind of list it was given."""
    listed = {
        key: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for key, value in config.items()
    }
    return {key: value for key, value in listed.items() if not key.startswith("_")}


def _diffusers_text_unet(network: Any, arguments: Mapping[str, Any], noise_offset: float) -> ModelSpec:
    """The library's own; tokens that ours adds to the caption's are the pipeline's business."""
    spec = _diffusers_unet(network, arguments, noise_offset)
    around: dict[str, Any] = {}
    if network.classes is not None:
        around["label_tokens"] = network.classes.weight.tolist()
    elif network.constant is not None:
        around["constant_token"] = network.constant.flatten().tolist()
    return ModelSpec(spec.component, spec.name, spec.config, spec.state, around)


_NETWORKS: dict[str, Callable[..., ModelSpec]] = {
    "UNet": _unet,
    "DiT": _dit,
    "DiffusersUNet2D": _diffusers_unet,
    "DiffusersUNet2DCondition": _diffusers_text_unet,
}


def codec_spec(codec: Codec) -> ModelSpec | None:
    """A codec of ours as diffusers' autoencoder; None where images are diffused as they are.

    Raises:
        OrnsteinError: it has no counterpart.
    """
    if isinstance(codec, Identity):
        return None
    make = _CODECS.get(type(codec).__name__)
    if make is None:
        raise OrnsteinError(f"codec={type(codec).__name__} has no counterpart in diffusers: {WAY_OUT}.")
    return make(codec)


def _kl(codec: Any) -> ModelSpec:
    return _folded(codec.state_dict(), codec.config)


def _folded(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> ModelSpec:
    """With scale and shift in its convolutions, so that pipelines that know neither decode what we diffuse."""
    from ornstein.networks.layouts import kl

    folded, without = kl.fold_scale(state, arguments)
    config, theirs = kl.to_diffusers(folded, without)
    # They are in the weights now: whoever read them here would apply them twice.
    config |= {"latents_mean": None, "latents_std": None}
    return ModelSpec("vae", "AutoencoderKL", config, theirs)


def _vq(codec: Any) -> ModelSpec:
    """Its latents are compared with the codes before they are decoded, so that their scale cannot be folded in."""
    from ornstein.networks.layouts import kl

    config, state = kl.vq_to_diffusers(codec.state_dict(), codec.config)
    return ModelSpec("vae", "VQModel", config, state, _scaling(codec))


def _diffusers_codec(codec: Any) -> ModelSpec:
    from ornstein.networks.layouts import kl

    model = codec.__dict__["model"]
    config = _plain(model.config)
    state = {key: value.float() for key, value in model.state_dict().items()}
    if codec.kind == "AutoencoderKL":
        try:
            found = kl.convert(state, config=config)
        except OrnsteinError:  # blocks of another kind: as it is, then
            found = None
        if found is not None and not found.unmapped:
            scale = {name: getattr(codec, name) for name in ("scale", "shift")}
            return _folded({**found.state, **scale}, found.arguments)
    return ModelSpec("vae", codec.kind, config, state, _scaling(codec))


def _scaling(codec: Any) -> dict[str, Any]:
    scale, shift = codec.scale.double().flatten(), codec.shift.double().flatten()
    return {"latents_std": (1 / scale).tolist(), "latents_mean": shift.tolist()}


_CODECS: dict[str, Callable[..., ModelSpec]] = {
    "KLAutoencoder": _kl,
    "VQAutoencoder": _vq,
    "DiffusersCodec": _diffusers_codec,
}
