"""Weights alone, as safetensors: the network's, and the codec's where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ornstein.codecs import Autoencoder, Identity, save_codec

if TYPE_CHECKING:
    from ornstein.training.module import DiffusionModule


def write_tensors(folder: Path, module: DiffusionModule, metadata: dict[str, str]) -> list[str]:
    """Writes ``network.safetensors`` and, for a latent model, ``codec.safetensors``; gives their names.

    A codec that has a file format of its own, by which the package's ``codec=`` options read it, keeps that; others are
    a plain state dict.
    """
    if isinstance(module.network, Autoencoder):
        _save_codec(module.network, folder / "codec.safetensors", metadata)
        return ["codec.safetensors"]
    _save(module.network, folder / "network.safetensors", metadata)
    if isinstance(module.codec, Identity):
        return ["network.safetensors"]
    _save_codec(module.codec, folder / "codec.safetensors", metadata)
    return ["network.safetensors", "codec.safetensors"]


def opens_by_itself(module: DiffusionModule) -> bool:
    """Whether a run's config and its network's weights alone give the run back: no other part of it has learned.

    A schedule that is learned, and latents whose scale was measured by the run, are in its checkpoints only.
    """
    bundled = isinstance(module.codec, Identity | Autoencoder)
    return bundled and not list(module.schedule.parameters())


def _save(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    # Two names of one tensor become two tensors: safetensors keeps no ties.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, path, metadata=metadata)


def _save_codec(codec: Any, path: Path, metadata: dict[str, str]) -> None:
    if isinstance(codec, Autoencoder):
        save_codec(codec, path, metadata={"data": metadata["data"]})
    else:
        _save(codec, path, metadata)
