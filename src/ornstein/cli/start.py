"""``init.from=`` and ``adapter=``: what the network begins with, and which of its parameters are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ornstein.training.start import Fit

_NONE: dict[str, Any] = {"from": None, "weights": "ema", "partial": False, "freeze": [], "train_only": []}
# Arguments that change what a network computes and leave no trace in the shapes of its weights.
_UNSEEN = ("heads", "head_dim", "norm_eps", "skip_scale", "noise_embedding", "resampling", "resample_filter")


@dataclass(frozen=True)
class Start:
    """What ``init.from=`` names, read.

    Attributes:
        state: tensors by our network's names.
        told: what it is, for the announcement.
    """

    state: dict[str, Tensor]
    told: str


def build_network(cfg: DictConfig, *, fresh: bool = False) -> nn.Module:
    """The network of a config, with its adapters, its frozen parameters frozen.

    Args:
        cfg: the config.
        fresh: training begins here, so that the weights of ``init.from`` are loaded; where a checkpoint of this run
            follows, they are in it. What was loaded is told by the network's attribute ``begun``.

    Raises:
        OrnsteinError: what :func:`check_start` refuses.
    """
    network: nn.Module = instantiate(cfg.model.network)
    init = _options(cfg)
    if fresh and init["from"] is not None:
        from ornstein.training.start import load_fitting

        start, found = _fitted(cfg, network)
        load_fitting(network, start.state, found)
        network.__dict__["begun"] = (
            start.told if found.exact else f"{start.told}; left out or started afresh: {found.described()}"
        )
    return _narrow(network, cfg)


def check_start(cfg: DictConfig, network: nn.Module, *, goes_on: bool) -> None:
    """Whether ``init`` and ``adapter`` can be honoured; reads names and shapes of tensors.

    Args:
        cfg: the config.
        network: the one it describes, on the meta device; adapters are put into it.
        goes_on: the run goes on from its own checkpoint, and does not need the source any more.

    Raises:
        OrnsteinError: nothing is there, it is of another architecture, a pattern that matches nothing, or options that
            mean nothing together.
    """
    init, adapted = _options(cfg), bool(cfg.get("adapter"))
    unknown = [key for key in init if key not in _NONE]
    if unknown:
        raise OrnsteinError(f"init.{unknown[0]}: there is no such key; init has {', '.join(_NONE)}.")
    if init["weights"] not in ("ema", "model"):
        raise OrnsteinError(f"init.weights={init['weights']} is unknown: choose ema or model.")
    narrowed = [f"init.{key}" for key in ("freeze", "train_only") if init[key]]
    if init["from"] is None and (narrowed or adapted):
        what = narrowed[0] if narrowed else "adapter=lora"
        raise OrnsteinError(
            f"{what} keeps weights as they are, and without init.from= they are random: name what to start from, "
            "init.from=outputs/train/<date>/<time> say, or leave it out."
        )
    if adapted and narrowed:
        raise OrnsteinError(
            f"{narrowed[0]} beside adapter=lora, which freezes all but the adapters: leave it out, and name layers "
            "that are to be trained in full in adapter.modules_to_save."
        )
    if init["from"] is not None and not goes_on:
        import torch

        with torch.device("cpu"):  # what is read is no part of a network without weights
            _fitted(cfg, network)
    _narrow(network, cfg)


def describe_start(network: nn.Module) -> dict[str, str]:
    """Rows of the announcement: what the weights start from, and how many are trained if not all."""
    from ornstein.training.start import trainable

    begun = network.__dict__.get("begun")
    rows = {"init": f"starts from {begun}"} if begun is not None else {}
    trained, total = trainable(network)
    if trained < total:
        rows["trainable"] = f"{trained:,} of {total:,} parameters ({100 * trained / total:.3g} %)"
    return rows


def _fitted(cfg: DictConfig, network: nn.Module) -> tuple[Start, Fit]:
    from ornstein.training.start import check_fit, fit

    init = _options(cfg)
    start = read_start(cfg, network)
    found = fit(network, start.state)
    check_fit(network, found, source=f"init.from={init['from']}", partial=bool(init["partial"]))
    return start, found


def read_start(cfg: DictConfig, network: nn.Module) -> Start:
    """The tensors that ``init.from=`` names, by the names of ``network``; it may be on the meta device.

    Raises:
        OrnsteinError: nothing is there, it is damaged, or of another library and another network than this one.
    """
    init = _options(cfg)
    named, weights = str(init["from"]), str(init["weights"])
    place = Path(named).expanduser()
    if not place.exists():
        raise OrnsteinError(f"init.from={named}: there is no such file or folder.")
    if (place / "model_index.json").is_file():
        from ornstein.cli.convert import denoiser_of

        place = denoiser_of(place)
    if place.is_dir() and ((place / "checkpoints").is_dir() or not any(place.glob("*.safetensors"))):
        from ornstein.cli.stored import open_run

        place = open_run(named, key="init.from").checkpoint_path("last")
    start = _read_own(place, weights) if place.suffix == ".ckpt" else None
    if start is None:
        start = _read_foreign(place, cfg, weights, network)
    experts = getattr(network, "experts", None)
    if experts is not None and not any(name.startswith("experts.") for name in start.state):
        shared = {f"experts.{i}.{name}": value for i in range(len(experts)) for name, value in start.state.items()}
        return Start(shared, f"{start.told}, into each expert")
    return start


def _options(cfg: DictConfig) -> dict[str, Any]:
    """The init group; a run of before there was one has none."""
    given: Mapping[Any, Any] = cfg.get("init") or {}
    return {**_NONE, **{str(key): value for key, value in given.items()}}


def _narrow(network: nn.Module, cfg: DictConfig) -> nn.Module:
    """Adapters in, or parameters out."""
    init = _options(cfg)
    if cfg.get("adapter"):
        instantiate(cfg.adapter).add_to(network)
    elif init["freeze"] or init["train_only"]:
        from ornstein.training.start import freeze

        freeze(network, patterns=list(init["freeze"]), train_only=list(init["train_only"]))
    return network


def _read_own(path: Path, weights: str) -> Start | None:
    """A checkpoint of ours, adapters merged; None where the file is another's."""
    from ornstein.networks.layouts.reading import read_pickle

    held = read_pickle(path)
    if "ornstein" not in held or "state_dict" not in held:
        return None
    averaged = (held.get("callbacks") or {}).get("EMA", {}).get("network") or {}
    state = {
        name.removeprefix("network."): value
        for name, value in held["state_dict"].items()
        if name.startswith("network.")
    }
    kind = "averaged" if weights == "ema" and averaged else "trained"
    if kind == "averaged":
        state = dict(averaged)
    if any(".lora_A." in name for name in state):
        from ornstein.training.adapters import merged_state

        state = merged_state(state, alpha=float(held["ornstein"]["config"]["adapter"]["alpha"]))
    return Start(state, f"{path}, {kind} weights at step {int(held.get('global_step', 0)):,}")


def _read_foreign(place: Path, cfg: DictConfig, weights: str, network: nn.Module) -> Start:
    """A file or folder of tensors, ours or in another library's layout."""
    from ornstein.networks.layouts import convert, find_layout, listed
    from ornstein.networks.layouts.reading import read_foreign

    foreign = read_foreign(place, weights=weights)
    kind = {"ema": ", averaged weights", "model": ", trained weights", "only": ""}[foreign.weights]
    layout = find_layout(foreign.state, config=foreign.config)
    if layout is None:
        return Start(foreign.state, f"{place}{kind}")
    converted = convert(foreign.state, layout=layout, config=foreign.config)
    if converted.unmapped:
        raise OrnsteinError(
            f"init.from={place} is laid out as {layout}, and these have no place in our network: "
            f"{listed(converted.unmapped)}. Convert it first, `ornstein convert {place} --out FOLDER --partial`, and "
            "name that folder."
        )
    node = cfg.model.network
    experts: Any = getattr(network, "experts", None)
    if experts is not None:
        network, node = experts[0], node.network
    theirs = converted.target.rpartition(".")[2]
    if theirs != type(network).__name__:
        raise OrnsteinError(
            f"init.from={place} is a {layout} checkpoint, a {theirs} of ours, and model.network is "
            f"{type(network).__name__}: choose another model= or model/network=."
        )
    differing = [
        f"{key}={converted.arguments[key]} (here {node[key]})"
        for key in _UNSEEN
        if key in converted.arguments and key in node and not _same(converted.arguments[key], node[key])
    ]
    if differing:
        guessed = any(each.startswith("head") for each in differing) and foreign.config is None
        told = (
            f", or say how it was trained: `ornstein convert {place} --out FOLDER --fact head_dim=...` and name FOLDER"
        )
        raise OrnsteinError(
            f"init.from={place} is a {layout} checkpoint that computes something else than model.network, by what no "
            f"shape shows: set {', '.join(f'model.network.{each}' for each in differing)}"
            f"{told if guessed else ''}."
        )
    return Start(converted.state, f"{place}{kind}, converted from {layout}")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple):
        return list(one) == list(other)
    if isinstance(one, float) and isinstance(other, int | float):
        return abs(one - other) <= 1e-9 * abs(one)
    return bool(one == other)
