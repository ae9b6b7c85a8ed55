"""Autoencoder weights on disk: safetensors whose header says what they are."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ornstein.codecs.autoencoder import KLAutoencoder
from ornstein.codecs.codec import as_size
from ornstein.errors import OrnsteinError

FORMAT = "ornstein.kl_autoencoder.1"


def bundled_path() -> Path:
    """The digits autoencoder that the package carries (32x32 grey images, latents (4, 8, 8))."""
    return Path(__file__).parent / "assets" / "kl_digits.safetensors"


def save_kl(model: KLAutoencoder, path: str | Path, *, metadata: Mapping[str, Any]) -> None:
    """Write weights (float16), scale and shift (float32) and a JSON header, atomically.

    ``metadata`` holds plain JSON values, among them ``data`` (the name of the data set trained on, compared
    with ``data.name``). The architecture is added as ``config``; ``scale`` and ``shift`` are repeated in
    the header for the reader's eye, those that count are the tensors.
    """
    path = Path(path)
    exact = ("scale", "shift")
    tensors = {
        name: value.cpu().to(torch.float32 if name in exact else torch.float16).contiguous()
        for name, value in model.state_dict().items()
    }
    header = {
        **metadata,
        "config": model.config,
        "scale": model.scale.flatten().tolist(),
        "shift": model.shift.flatten().tolist(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    # One entry, sorted: safetensors writes several in an order that changes from run to run.
    save_file(tensors, partial, metadata={FORMAT: json.dumps(header, sort_keys=True)})
    os.replace(partial, path)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The JSON header of an autoencoder file: config, scale, shift, data, and what its trainer noted.

    Raises: ValueError if the file is missing or is not an autoencoder of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise OrnsteinError(
            f"no autoencoder weights at {path}; train some with "
            "`python -m ornstein.training.train_autoencoder --out FILE`, or say codec.weights=bundled."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise OrnsteinError(f"{path} is not a whole safetensors file ({error}); fetch or train it again.") from error
    if FORMAT not in header:
        raise OrnsteinError(
            f"{path} holds no autoencoder of this package (its header lacks {FORMAT!r}); "
            "codec=kl takes files written by ornstein.training.train_autoencoder."
        )
    return json.loads(header[FORMAT])


def load_kl(
    weights: str | Path = "bundled",
    fits: Sequence[str] | None = None,
    *,
    image_channels: int | None = None,
    image_size: int | Sequence[int] | None = None,
    downsample: int | None = None,
    channels: int | None = None,
    size: int | Sequence[int] | None = None,
    sigma_data: float = 1.0,
    sample_posterior: bool = False,
) -> KLAutoencoder:
    """A trained, frozen :class:`KLAutoencoder`, checked against what the config says of it.

    Args:
        weights: ``bundled`` or a file of :func:`save_kl`.
        fits: names of data sets these weights are meant for; must name the one they were trained on.
        image_channels, image_size, downsample, channels, size: what the config expects; None is not checked.
        sigma_data: must be 1, as latents are scaled to unit variance.
        sample_posterior: ``encode`` draws from the posterior instead of taking its mean.

    Raises: ValueError, one sentence, if the file is missing, foreign or damaged, or does not fit the rest.
    """
    path = bundled_path() if str(weights) == "bundled" else Path(weights)
    metadata = read_metadata(path)
    config = metadata["config"]
    actual = {
        "image_channels": config["image_channels"],
        "image_size": as_size(config["image_size"]),
        "downsample": 2 ** (len(config["multipliers"]) - 1),
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
                f"the autoencoder in {path.name} was trained with {key}={actual[key]}, "
                f"but {owner} is {value}; "
                f"set {owner}={actual[key]} or give other weights (codec.weights=FILE)."
            )
    if fits is not None and metadata["data"] not in fits:
        raise OrnsteinError(
            f"the autoencoder in {path.name} was trained on {metadata['data']}, which "
            f"codec.fits={list(fits)} does not name; set codec.fits=[{metadata['data']}] or "
            "give other weights (codec.weights=FILE)."
        )
    if sigma_data != 1.0:
        raise OrnsteinError(f"codec=kl scales its latents to unit variance: codec.sigma_data is 1.0, not {sigma_data}.")
    model = KLAutoencoder(**config, sample_posterior=sample_posterior)
    if size is not None and as_size(size) != model.size:
        raise OrnsteinError(
            f"the autoencoder in {path.name} has latents of size {model.size}, but codec.size is {size}; "
            f"set codec.size={model.size}."
        )
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        model.load_state_dict(state)
    except (RuntimeError, SafetensorError) as error:
        raise OrnsteinError(
            f"the tensors in {path.name} do not fit the architecture in its own header; fetch or train it again."
        ) from error
    return model.eval().requires_grad_(False)
