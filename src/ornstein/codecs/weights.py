"""Autoencoder weights on disk: safetensors whose header says what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ornstein.codecs.autoencoder import Autoencoder
from ornstein.codecs.codec import as_size
from ornstein.codecs.kl import KLAutoencoder
from ornstein.codecs.vq import VQAutoencoder
from ornstein.errors import OrnsteinError

FORMAT = "ornstein.autoencoder.2"
FILE_NAME = "codec.safetensors"
KINDS: dict[str, type[Autoencoder]] = {"kl": KLAutoencoder, "vq": VQAutoencoder}
_EXACT = ("scale", "shift")  # never rounded
_TRAINING = ("quantiser.share", "quantiser.sums")  # what only training needs

Kind = TypeVar("Kind", bound=Autoencoder)


class Expected(TypedDict, total=False):
    """What a config says of the autoencoder that it names; see :func:`check_fit`."""

    fits: Sequence[str] | None
    image_channels: int | None
    image_size: int | Sequence[int] | None
    downsample: int | None
    channels: int | None
    size: int | Sequence[int] | None
    sigma_data: float


def bundled_path(kind: str = "kl") -> Path:
    """The digits autoencoder that the package carries (32x32 grey images, latents (4, 8, 8)); kind is kl or vq."""
    return Path(__file__).parent / "assets" / f"{kind}_digits.safetensors"


def weights_path(weights: str | Path, kind: str) -> Path:
    """The file that ``codec.weights=`` names: ``bundled``, a file, or a run folder that holds ``codec.safetensors``.

    Raises: OrnsteinError for a folder without that file.
    """
    if str(weights) == "bundled":
        return bundled_path(kind)
    path = Path(weights).expanduser()
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise OrnsteinError(
                f"codec.weights={weights} holds no {FILE_NAME}, which a run of model=autoencoder_{kind} writes when it "
                "ends: go on with it by resume=, or name another."
            )
        path = path / FILE_NAME
    return path


def save_codec(
    model: Autoencoder, path: str | Path, *, metadata: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write weights, scale and shift (float32 whatever ``dtype`` is) and a JSON header, atomically.

    ``metadata`` holds plain JSON values, among them ``data`` (the name of the data set trained on). Kind and
    architecture are added as ``kind`` and ``config``; ``scale`` and ``shift`` are repeated in the header for the
    reader's eye, those that count are the tensors.
    """
    path = Path(path)
    tensors = {
        name: value.detach().cpu().to(torch.float32 if name in _EXACT else dtype).contiguous()
        for name, value in model.state_dict().items()
        if name not in _TRAINING
    }
    header = {
        **metadata,
        "kind": kind_of(model),
        "config": model.config,
        "scale": model.scale.flatten().tolist(),
        "shift": model.shift.flatten().tolist(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    # One entry, sorted: safetensors writes several in an order that changes from run to run.
    save_file(tensors, partial, metadata={FORMAT: json.dumps(header, sort_keys=True)})
    os.replace(partial, path)


def kind_of(model: Autoencoder) -> str:
    """The kind of an autoencoder: kl or vq."""
    return next(kind for kind, own in KINDS.items() if isinstance(model, own))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The JSON header of an autoencoder file: kind, config, scale, shift, data, and what its training noted.

    Raises: OrnsteinError if the file is missing or is not an autoencoder of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise OrnsteinError(
            f"no autoencoder weights at {path}: train some with `python train.py model=autoencoder_kl` and name its "
            "run folder by codec.weights=, or say codec.weights=bundled."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise OrnsteinError(f"{path} is not a whole safetensors file ({error}); fetch or train it again.") from error
    if FORMAT not in header:
        raise OrnsteinError(
            f"{path} holds no autoencoder of this package (its header lacks {FORMAT!r}): codec=kl and vq take what "
            "`python train.py model=autoencoder_kl` and autoencoder_vq write."
        )
    return dict(json.loads(header[FORMAT]))


def codec_fact(kind: str, weights: str | Path, name: str) -> Any:
    """A fact of an autoencoder file for a config to interpolate: ``channels`` or ``downsample``.

    Raises: OrnsteinError if there is no such file.
    """
    config = read_metadata(weights_path(weights, kind))["config"]
    return 2 ** (len(config["multipliers"]) - 1) if name == "downsample" else config[name]


def load_kl(
    weights: str | Path = "bundled", *, sample_posterior: bool = False, **expected: Unpack[Expected]
) -> KLAutoencoder:
    """A trained, frozen :class:`KLAutoencoder`, checked against what the config says of it.

    Args:
        weights: ``bundled``, a file of :func:`save_codec`, or the folder of a run that has written one.
        sample_posterior: ``encode`` draws from the posterior instead of taking its mean.
        expected: as for :func:`check_fit`.

    Raises: OrnsteinError, one sentence, if the file is missing, foreign or damaged, or does not fit the rest.
    """
    return _load(KLAutoencoder, "kl", weights, expected, sample_posterior=sample_posterior)


def load_vq(
    weights: str | Path = "bundled", *, quantise_latents: bool = False, **expected: Unpack[Expected]
) -> VQAutoencoder:
    """A trained, frozen :class:`VQAutoencoder`; as :func:`load_kl`.

    ``quantise_latents``: diffuse the codes themselves, instead of the vectors that they replace.
    """
    return _load(VQAutoencoder, "vq", weights, expected, quantise_latents=quantise_latents)


def check_fit(
    metadata: Mapping[str, Any],
    path: Path,
    *,
    fits: Sequence[str] | None = None,
    image_channels: int | None = None,
    image_size: int | Sequence[int] | None = None,
    downsample: int | None = None,
    channels: int | None = None,
    size: int | Sequence[int] | None = None,
    sigma_data: float = 1.0,
) -> None:
    """Whether a file's header is what the config says.

    Args:
        metadata: of :func:`read_metadata`.
        path: its file.
        fits: names of data sets these weights are meant for; must name the one they were trained on.
        image_channels, image_size, downsample, channels, size: what the config expects; None is not checked.
        sigma_data: must be 1, as latents are scaled to unit variance.

    Raises: OrnsteinError: names the option, its value and what the file has.
    """
    config = metadata["config"]
    factor = 2 ** (len(config["multipliers"]) - 1)
    actual = {
        "image_channels": config["image_channels"],
        "image_size": as_size(config["image_size"]),
        "downsample": factor,
        "channels": config["channels"],
    }
    expected = {
        "image_channels": image_channels,
        "image_size": None if image_size is None else as_size(image_size),
        "downsample": downsample,
        "channels": channels,
    }
    for key, value in expected.items():
        if value is not None and value != actual[key]:
            owner = {"image_channels": "data.channels", "image_size": "data.image_size"}.get(key, f"codec.{key}")
            raise OrnsteinError(
                f"the autoencoder in {path.name} was trained with {key}={actual[key]}, but {owner} is {value}; "
                f"set {owner}={actual[key]} or give other weights (codec.weights=FILE)."
            )
    if fits is not None and metadata["data"] not in fits:
        raise OrnsteinError(
            f"the autoencoder in {path.name} was trained on {metadata['data']}, which codec.fits={list(fits)} does not "
            f"name; set codec.fits=[{metadata['data']}] or give other weights (codec.weights=FILE)."
        )
    if sigma_data != 1.0:
        raise OrnsteinError(f"latents are scaled to unit variance: codec.sigma_data is 1.0, not {sigma_data}.")
    sides = actual["image_size"] if isinstance(actual["image_size"], tuple) else (actual["image_size"],) * 2
    own_size = as_size([side // factor for side in sides])
    if size is not None and as_size(size) != own_size:
        raise OrnsteinError(
            f"the autoencoder in {path.name} has latents of size {own_size}, but codec.size is {size}; "
            f"set codec.size={own_size}."
        )


def _load(cls: type[Kind], kind: str, weights: str | Path, expected: Expected, **options: Any) -> Kind:
    path = weights_path(weights, kind)
    metadata = read_metadata(path)
    if metadata["kind"] != kind:
        raise OrnsteinError(f"{path} holds a {metadata['kind']} autoencoder: choose codec={metadata['kind']}.")
    check_fit(metadata, path, **expected)
    model = cls(**metadata["config"], **options)
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        kept = {name: value for name, value in model.state_dict().items() if name in _TRAINING}
        model.load_state_dict(state | kept)
    except (RuntimeError, SafetensorError) as error:
        raise OrnsteinError(
            f"the tensors in {path.name} do not fit the architecture in its own header; fetch or train it again."
        ) from error
    return model.eval().requires_grad_(False)
