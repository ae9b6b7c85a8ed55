"""Low-rank adapters: the network's weights stay as they are, and small factors beside some of them are trained.

peft does the work, inside the network: its class, its signature and its place in a config stay the same. A run's
checkpoints hold everything, so that it can be resumed and sampled from itself alone; beside them the run keeps
``adapter/``, peft's own format with nothing but the adapters, which ``peft.PeftModel.from_pretrained(network, folder)``
reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError
from ornstein.training.module import DiffusionModule
from ornstein.training.sharding import whole

FOLDER = "adapter"
_PREFIX = "base_model.model."  # what peft puts before every name in its files
_SHOWN = 10
_INITS: dict[str, bool | str] = {"kaiming": True, "gaussian": "gaussian"}


@dataclass(frozen=True)
class Lora:
    r"""Low-rank adaptation of linear layers and 1x1 convolutions.

    .. math:: W' = W + \frac{\alpha}{r} B A, \qquad A \in R^{r \times n},\ B \in R^{m \times r}

    with B zero at the start, so that the network begins as it was.
    Source: Hu et al. 2022 (arXiv 2106.09685), section 4.1.

    Attributes:
        rank: r, at least 1.
        alpha: the adapters' share is alpha / rank.
        dropout: of what enters an adapter, in [0, 1).
        target_modules: ``auto`` (every linear layer and 1x1 convolution of attention), ``all-linear`` (of the whole
            network), or names: full ones, or their ends.
        modules_to_save: names of layers that are trained in full beside the adapters, and saved with them.
        init: of A: ``kaiming`` or ``gaussian``.

    Raises:
        OrnsteinError: a number or name outside of these.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "auto"
    modules_to_save: Sequence[str] = ()
    init: str = "kaiming"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise OrnsteinError(f"adapter.rank={self.rank} must be a whole number of at least 1.")
        if not self.alpha > 0:
            raise OrnsteinError(f"adapter.alpha={self.alpha} must be above 0.")
        if not 0 <= self.dropout < 1:
            raise OrnsteinError(f"adapter.dropout={self.dropout} must lie in [0, 1).")
        if self.init not in _INITS:
            raise OrnsteinError(f"adapter.init={self.init} is unknown: choose {' or '.join(_INITS)}.")
        if isinstance(self.target_modules, str) and self.target_modules not in ("auto", "all-linear"):
            raise OrnsteinError(
                f"adapter.target_modules={self.target_modules} is unknown: choose auto, all-linear, or a list of names."
            )

    def add_to(self, network: nn.Module) -> tuple[str, ...]:
        """Puts adapters into ``network``, in place; gives the names of the layers that have one. All else is frozen.

        Raises:
            OrnsteinError: peft is not installed, a name that matches no layer, or no layer that could have one.
        """
        peft = _peft()
        names = self.targets(network)
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=_exactly(names, network),
            modules_to_save=[*self.modules_to_save] or None,
            init_lora_weights=_INITS[self.init],
        )
        peft.inject_adapter_in_model(config, network)
        return names

    def targets(self, network: nn.Module) -> tuple[str, ...]:
        """Full names of the layers that get an adapter.

        Raises:
            OrnsteinError: a name that matches no layer, or no layer that could have one.
        """
        modules = dict(network.named_modules())
        fitting = [name for name, module in modules.items() if _adaptable(module)]
        for name in self.modules_to_save:
            if not any(_ends(each, name) for each in modules):
                raise OrnsteinError(f"adapter.modules_to_save names {name}, and {_own(network)} has no such layer.")
        if self.target_modules == "auto":
            inside = [name for name in fitting if _attends(name, modules)]
            if not inside:
                raise OrnsteinError(
                    f"adapter.target_modules=auto: {_own(network)} has no plain linear layer or 1x1 convolution in "
                    "attention; choose adapter.target_modules=all-linear, name layers, or train some of its weights in "
                    "full: adapter=none init.train_only=[PATTERN]."
                )
            return tuple(inside)
        if self.target_modules == "all-linear":
            if not fitting:
                raise OrnsteinError(
                    f"{_own(network)} has no plain linear layer or 1x1 convolution for adapter=lora: choose "
                    "adapter=none and init.train_only=[PATTERN] instead."
                )
            return tuple(fitting)
        for name in self.target_modules:
            if not any(_ends(each, name) for each in fitting):
                raise OrnsteinError(
                    f"adapter.target_modules names {name}, and {_own(network)} has no linear layer or 1x1 convolution "
                    f"of that name; it has {_listed(fitting)}."
                )
        return tuple(each for each in fitting if any(_ends(each, name) for name in self.target_modules))


class AdapterFiles(pl.Callback):
    """Writes ``adapter/`` of the run whenever a checkpoint is written: averaged adapters where there are averages.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / FOLDER

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Writes the folder; on rank zero alone, where devices have shards with the help of all."""
        if isinstance(pl_module, DiffusionModule):
            network = pl_module.evaluation_network()
            state = whole(adapter_state(network))
            if trainer.is_global_zero:
                save_adapter(network, self.folder, state)


def save_adapter(network: nn.Module, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes a network's adapters in peft's format: ``adapter_model.safetensors`` and ``adapter_config.json``.

    Args:
        network: of which they are.
        folder: made where it is missing.
        state: :func:`adapter_state` of a network in shards, gathered.

    Raises:
        OrnsteinError: the network has none.
    """
    from safetensors.torch import save_file

    config = getattr(network, "peft_config", {}).get("default")
    if config is None:
        raise OrnsteinError(f"{_own(network)} has no adapters to save.")
    state = adapter_state(network) if state is None else state
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "adapter_model.safetensors"
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, file)
    if not (folder / "adapter_config.json").is_file():
        config.save_pretrained(str(folder))


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapters of a network and its layers of ``modules_to_save``, under the names of peft's files."""
    state = _peft().get_peft_model_state_dict(network, save_embedding_layers=False)
    return {f"{_PREFIX}{name}": value for name, value in state.items()}


@torch.no_grad()
def merged_state(state: Mapping[str, Tensor], *, alpha: float) -> dict[str, Tensor]:
    """A state dict with adapters as one of the plain network: each weight with its adapter's share added.

    Args:
        state: of a network that :meth:`Lora.add_to` has been at; one without adapters comes back as it is.
        alpha: of those adapters; their rank is seen from their shapes.
    """
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        owner = name.removesuffix(".base_layer.weight")
        if owner != name and f"{owner}.lora_A.default.weight" in state:
            down, up = (state[f"{owner}.lora_{factor}.default.weight"].double() for factor in "AB")
            share = alpha / down.shape[0] * (up.flatten(1) @ down.flatten(1))
            value = (value.double() + share.reshape(value.shape)).to(value.dtype)
        merged[plain] = value
    return merged


def merge(network: nn.Module) -> nn.Module:
    """Adds every adapter's share to its layer's weight and takes the adapters out, in place; gives the network."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            plain = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            plain = module.modules_to_save["default"]
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, plain)
    if hasattr(network, "peft_config"):
        del network.peft_config
    return network


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise OrnsteinError(
            "adapter=lora needs peft, which is not installed: pip install 'ornstein[finetune]'."
        ) from error
    return peft


def _adaptable(module: nn.Module) -> bool:
    # Exactly these: a subclass may change its weight before it uses it, and what is added to it would change too.
    if type(module) is nn.Conv2d:
        return module.kernel_size == (1, 1) and module.groups == 1
    return type(module) is nn.Linear


def _attends(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer is one of attention: a class above it says so, or it is its block's ``qkv`` or ``out``."""
    parts = name.split(".")
    above = [modules[".".join(parts[:end])] for end in range(1, len(parts))]
    if any("attention" in type(module).__name__.lower() for module in above):
        return True
    return parts[-1] in ("qkv", "out") and len(above) > 0 and hasattr(above[-1], "qkv")


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _exactly(names: Sequence[str], network: nn.Module) -> list[str] | str:
    """Names as peft takes them: a list where their ends match nothing else, else a pattern of them alone."""
    others = [name for name, _ in network.named_modules() if name not in set(names)]
    if not any(_ends(other, name) for other in others for name in names):
        return [*names]
    return "|".join(name.replace(".", r"\.") for name in names)


def _own(network: nn.Module) -> str:
    return f"this network ({type(network).__name__})"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
