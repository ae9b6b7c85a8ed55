"""What a run folder or a checkpoint holds, as sample, evaluate, resume and ``ornstein.load`` need it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ornstein.errors import OrnsteinError


@dataclass(frozen=True)
class StoredRun:
    """A run on disk.

    Attributes:
        folder: its folder, or the one a lone checkpoint lies in.
        config: its config; interpolations are kept where the run folder has them, resolved in a lone checkpoint.
        checkpoint: the file named, None where ``run`` named a folder.
    """

    folder: Path
    config: dict[str, Any]
    checkpoint: Path | None

    @property
    def converted(self) -> Path | None:
        """The weights of a folder that ``ornstein convert`` wrote, which has no checkpoints; None in a run."""
        weights = self.folder / "network.safetensors"
        return weights if weights.is_file() and not (self.folder / "checkpoints").is_dir() else None

    def checkpoint_path(self, which: str = "last") -> Path:
        """``checkpoints/last.ckpt``, or the newest best one; the only weights that a converted folder has.

        Raises:
            OrnsteinError: the run has no such checkpoint, or ``which`` is neither last nor best.
        """
        if self.checkpoint is not None:
            return self.checkpoint
        if which not in ("last", "best"):
            raise OrnsteinError(f"checkpoint={which} is unknown: choose last or best.")
        if self.converted is not None:
            return self.converted
        found = sorted((self.folder / "checkpoints").glob(f"{which}*.ckpt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise OrnsteinError(f"{self.folder} has no {which} checkpoint: let it train longer, or name another run.")
        return found[-1]


def open_run(path: str, *, key: str = "run") -> StoredRun:
    """Reads a run folder, or a checkpoint (whose config it carries). ``key``: what the user wrote before ``=``.

    Raises:
        OrnsteinError: nothing is there, or what is there is no run.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return StoredRun(place.parent.parent, _config_of_checkpoint(place), place)
    if not place.is_dir():
        raise OrnsteinError(f"{key}={path}: there is no such folder or checkpoint.")
    for name in (".hydra/config.yaml", "config.yaml"):
        if (place / name).is_file():
            config = _read(place / name)
            # Its name follows from the options that the run was started with: only their result is on disk. What its
            # data said of themselves is kept as well, since they need not be at hand to draw samples.
            if (place / "config.yaml").is_file():
                resolved = _read(place / "config.yaml")
                config["name"] = resolved.get("name")
                config["data"] = _with_facts(config.get("data"), resolved.get("data"))
            return StoredRun(place, config, None)
    raise OrnsteinError(f"{key}={path} holds no config.yaml: name a run's folder, outputs/train/<date>/<time> say.")


def _with_facts(data: Any, resolved: Any) -> Any:
    """A data config with the values that were counted or read from files when the run began."""
    if not isinstance(data, dict) or not isinstance(resolved, dict):
        return data
    asked = {key for key, value in data.items() if value == "auto" or "${data_fact:" in str(value)}
    return data | {key: resolved[key] for key in asked & resolved.keys()}


def _read(path: Path) -> dict[str, Any]:
    config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def _config_of_checkpoint(path: Path) -> dict[str, Any]:
    import pickle

    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return dict(checkpoint["ornstein"]["config"])
    except (KeyError, TypeError, RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise OrnsteinError(f"{path} is not a checkpoint of this package, or is damaged: name another.") from error
