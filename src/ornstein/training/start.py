"""Beginning a network at weights that exist: what of them fits, and which parameters are left to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError

SHOWN = 10  # names that a sentence holds


@dataclass(frozen=True)
class Fit:
    """How a state dict lies on a network.

    Attributes:
        loaded: names that both have, of one shape.
        missing: names that only the network has.
        unexpected: names that only the state dict has.
        misshaped: names with (its shape, the network's shape) where they differ.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def exact(self) -> bool:
        """Whether nothing is left over on either side."""
        return not (self.missing or self.unexpected or self.misshaped)

    def described(self) -> str:
        """What does not fit, up to ten names of each kind."""
        shapes = [f"{name} {given} for {wanted}" for name, (given, wanted) in self.misshaped.items()]
        parts = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": shapes}
        return "; ".join(f"{what}: {_listed(names)}" for what, names in parts.items() if names)


def fit(network: nn.Module, state: Mapping[str, Tensor]) -> Fit:
    """Compares names and shapes; the network may be on the meta device."""
    wanted = network.state_dict()
    both = [name for name in wanted if name in state]
    misshaped = {
        name: (tuple(state[name].shape), tuple(wanted[name].shape))
        for name in both
        if state[name].shape != wanted[name].shape
    }
    return Fit(
        loaded=tuple(name for name in both if name not in misshaped),
        missing=tuple(name for name in wanted if name not in state),
        unexpected=tuple(name for name in state if name not in wanted),
        misshaped=misshaped,
    )


def check_fit(network: nn.Module, found: Fit, *, source: str, partial: bool = False) -> None:
    """Refuses weights that do not fit, or of which nothing fits where a part of them would do.

    Args:
        network: the network, for its class and its tables.
        found: the comparison.
        source: what the user wrote, ``init.from=PATH``.
        partial: whether a part will do.

    Raises:
        OrnsteinError: names what is missing, unexpected and of another shape.
    """
    name = type(network).__name__
    if not found.loaded:
        raise OrnsteinError(
            f"{source} is of another architecture than model.network ({name}): none of its tensors has a name and "
            f"shape that fit ({found.described()}). Choose the model=, model/network= and sizes that it was made with."
        )
    if found.exact or partial:
        return
    named = len(found.loaded) + len(found.misshaped)
    if 4 * named < named + len(found.missing):
        # A few names that any two networks share are no reason to load them.
        raise OrnsteinError(
            f"{source} is of another architecture than model.network ({name}): only {named} of its "
            f"{named + len(found.missing)} tensors are there ({found.described()}). Choose the model=, model/network= "
            "and sizes that it was made with."
        )
    hint = ""
    tables = [f"{each}.weight" for each, module in network.named_modules() if isinstance(module, nn.Embedding)]
    if any(table in found.misshaped for table in tables):
        hint = " The number of classes differs (data.num_classes)."
    raise OrnsteinError(
        f"{source} does not fit model.network ({name}); {found.described()}.{hint} Choose the model and sizes that it "
        "was made with, or init.partial=true to load what fits and start the rest afresh."
    )


@torch.no_grad()
def load_fitting(network: nn.Module, state: Mapping[str, Tensor], found: Fit) -> None:
    """Copies what fits into the network, whatever its dtype."""
    own = network.state_dict()
    for name in found.loaded:
        own[name].copy_(state[name])


def freeze(network: nn.Module, *, patterns: Sequence[str] = (), train_only: Sequence[str] = ()) -> None:
    """Takes parameters out of training by their names.

    Args:
        network: whose parameters.
        patterns: shell patterns of names that are frozen (``*`` also matches dots).
        train_only: shell patterns of the names that alone are trained; ``patterns`` may freeze some of those again.

    Raises:
        OrnsteinError: a pattern that matches no parameter, or nothing left to train.
    """
    parameters = dict(network.named_parameters())
    for option, given in (("init.freeze", patterns), ("init.train_only", train_only)):
        for pattern in given:
            if not any(fnmatchcase(name, pattern) for name in parameters):
                raise OrnsteinError(
                    f"{option}={list(given)}: {pattern} matches no parameter of {type(network).__name__}; its names "
                    f"are {_listed(list(parameters))}."
                )
    for name, parameter in parameters.items():
        kept = not train_only or any(fnmatchcase(name, pattern) for pattern in train_only)
        frozen = any(fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(parameter.requires_grad and kept and not frozen)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise OrnsteinError(
            f"init.freeze={list(patterns)} and init.train_only={list(train_only)} leave no parameter to train: name "
            "fewer patterns."
        )


def trainable(network: nn.Module) -> tuple[int, int]:
    """How many numbers of a network are trained, and how many it has."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
