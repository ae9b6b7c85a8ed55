"""Tensors out of the files that others write, without running anybody's code."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError

# Where trainers keep weights in a checkpoint: averaged ones, then those being trained.
_AVERAGED = ("ema", "model_ema", "ema_state_dict", "state_dict_ema")
_TRAINED = ("model", "state_dict", "model_state_dict", "network")
# What wrappers put before every name: distributed training, torch.compile, and the module that an EMA copies.
_PREFIXES = ("module.", "_orig_mod.", "ema_model.")
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors", "network.safetensors", "codec.safetensors")
_INDEX = "diffusion_pytorch_model.safetensors.index.json"


@dataclass(frozen=True)
class Foreign:
    """What a file or folder holds.

    Attributes:
        state: tensors by name, wrappers taken off.
        config: the folder's ``config.json``, None where there is none.
        weights: ``ema`` or ``model``: which of a checkpoint's sets these are; ``only`` where it has one.
    """

    state: dict[str, Tensor]
    config: dict[str, Any] | None
    weights: str


def read_foreign(path: str | Path, *, weights: str = "ema", mmap: bool = True) -> Foreign:
    """Reads ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` with tensors, or a diffusers folder.

    Args:
        path: the file or folder.
        weights: which set of a training checkpoint: ``ema`` (averaged, where it has them) or ``model``.
        mmap: leave tensors on the disk until they are used.

    Raises:
        OrnsteinError: nothing is there, it holds no tensors, or only code of unknown origin could read it.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _read_folder(place)
    if not place.is_file():
        raise OrnsteinError(f"{path}: there is no such file or folder.")
    if place.suffix == ".safetensors":
        return Foreign(unwrap(_read_safetensors(place)), None, "only")
    held = read_pickle(place, mmap=mmap)
    state, which = choose(held, weights=weights)
    if not state:
        raise OrnsteinError(f"{place} holds no tensors under the names that trainers use: save a state dict alone.")
    return Foreign(unwrap(state), None, which)


def read_pickle(path: Path, *, mmap: bool = True) -> Mapping[str, Any]:
    """What ``torch.save`` wrote, tensors and plain types only (and the ``Namespace`` that holds a trainer's options).

    Raises:
        OrnsteinError: it holds classes, or is damaged.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle that nothing is to be read from
            try:
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            except RuntimeError:  # files of before torch 1.6 cannot be mapped
                held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler that meets something else may raise anything
        raise OrnsteinError(
            f"{path} holds more than tensors (a pickled network, as NVlabs publishes them), or is damaged; reading it "
            "would run its code. In a clone of the repository that made it, load it and write its weights alone: "
            "torch.save(pickle.load(open(FILE, 'rb'))['ema'].state_dict(), 'weights.pt'); then give weights.pt."
        ) from error
    if not isinstance(held, Mapping):
        raise OrnsteinError(f"{path} holds a {type(held).__name__}, not tensors by name: save a state dict.")
    return held


def choose(held: Mapping[str, Any], *, weights: str) -> tuple[dict[str, Tensor], str]:
    """The state dict in a checkpoint, and which of its sets it is: ``ema``, ``model`` or ``only``."""
    averaged = next((found for name in _AVERAGED if (found := _tensors(held.get(name)))), {})
    trained = next((found for name in _TRAINED if (found := _tensors(held.get(name)))), {})
    # An EMA of lucidrains keeps the network that it follows beside its copy.
    inner = {name: value for name, value in averaged.items() if name.startswith("ema_model.")}
    averaged = inner or averaged
    if averaged and (weights == "ema" or not trained):
        return averaged, "ema"
    if trained:
        return trained, "model" if averaged else "only"
    return _tensors(held), "only"


def unwrap(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put before every one of them."""
    names = list(state)
    while prefix := next((each for each in _PREFIXES if names and all(name.startswith(each) for name in names)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        names = list(state)
    return dict(state)


def _tensors(held: Any) -> dict[str, Tensor]:
    """The tensors of a state dict; empty for anything that is none."""
    if not isinstance(held, Mapping):
        return {}
    return {str(name): value for name, value in held.items() if isinstance(value, Tensor)}


def _read_folder(folder: Path) -> Foreign:
    config_file = folder / "config.json"
    # Beside a latent model's network lies its codec, which is another's business.
    files = [folder / name for name in _WEIGHTS if (folder / name).is_file()][:1]
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    if not files:
        inside = [name for name in ("unet", "transformer", "vae") if (folder / name / "config.json").is_file()]
        if inside:
            raise OrnsteinError(
                f"{folder} is a pipeline of several models: name one of its folders, {folder / inside[0]} say."
            )
        raise OrnsteinError(
            f"{folder} holds none of {', '.join(_WEIGHTS)}: name the folder of one model of diffusers, with its "
            "config.json, or a file of tensors."
        )
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _read_safetensors(file)
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else None
    return Foreign(unwrap(state), config, "only")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise OrnsteinError(f"{path} is not a whole safetensors file ({error}): fetch it again.") from error
