"""The conditioner contract and its empty case."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError


class Conditioner(nn.Module, ABC):
    """A batch's labels, text or images -> the keyword tensors that a network takes, and their null form.

    ``num_classes`` is the number of real classes, or None where there are none. ``has_null`` says whether the
    null form was seen in training, without which classifier-free guidance has nothing to push away from.
    """

    num_classes: int | None
    has_null: bool

    @abstractmethod
    def training_cond(self, batch: Mapping[str, Any], *, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Conditioning of a training batch, with some of it dropped to the null form.

        ``generator`` lives on the device of the batch's tensors and supplies the drops.
        """

    @abstractmethod
    def cond(self, labels: Tensor | None) -> dict[str, Tensor]:
        """Conditioning on the given labels, integer (B,), none of them dropped."""

    @abstractmethod
    def null(self, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
        """The null conditioning for ``batch_size`` samples."""


class NoConditioning(Conditioner):
    """Unconditional: no keyword tensors at all, whatever the batch holds.

    ``num_classes`` is there for the config, from which networks read it, and must be None.

    Raises: ValueError if ``num_classes`` is a number.
    """

    def __init__(self, num_classes: None = None) -> None:
        super().__init__()
        if num_classes is not None:
            raise OrnsteinError(
                f"conditioner=none takes no num_classes but got {num_classes}; "
                "choose conditioner=class_label to condition on classes."
            )
        self.num_classes = None
        self.has_null = False

    def training_cond(self, batch: Mapping[str, Any], *, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Nothing: an unconditional model does not look at the batch's labels."""
        return {}

    def cond(self, labels: Tensor | None) -> dict[str, Tensor]:
        """Nothing.

        Raises: ValueError if labels are asked for, which an unconditional model cannot honour.
        """
        if labels is not None:
            raise OrnsteinError(
                "labels were asked of an unconditional model (conditioner=none), which cannot follow them; "
                "leave them out, or train with conditioner=class_label."
            )
        return {}

    def null(self, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
        """Nothing: there is no condition to drop."""
        return {}
