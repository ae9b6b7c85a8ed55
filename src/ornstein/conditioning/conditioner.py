"""The conditioner contract and its empty case."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError


class Conditioner(nn.Module, ABC):
    """A batch's labels, captions or images -> the keyword tensors that a network takes, and their null form.

    Attributes:
        num_classes: the number of real classes, or None where there are none.
        has_null: whether the null form was seen in training, without which classifier-free guidance has nothing to
            push away from.
        needs: what it reads of a batch, among ``label``, ``caption``, ``image`` and ``condition``.
        text_dim, pooled_dim: size of a caption's tokens and of its one vector, None where it gives none.
        concat_channels: channels of the image that joins the network's input, 0 where there is none.
    """

    num_classes: int | None = None
    has_null: bool = False
    needs: tuple[str, ...] = ()
    text_dim: int | None = None
    pooled_dim: int | None = None
    concat_channels: int = 0

    @abstractmethod
    def training_cond(self, batch: Mapping[str, Any], *, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Conditioning of a training batch, with some of it dropped to the null form.

        ``generator`` lives on the device of the batch's tensors and supplies the drops.
        """

    @abstractmethod
    def cond(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Conditioning on what is given, none of it dropped.

        Args:
            given: the keys of a data batch, those in ``needs`` at least: ``label`` int64 (B,), ``caption`` B texts,
                ``image`` uint8 (B, C, H, W), ``condition`` uint8 (B, C', H, W), ``index`` int64 (B,), the samples'
                numbers; also ``seed``, the sampling seed. What is not needed is not looked at.

        Returns:
            Tensors on the device of those that are given.
        """

    @abstractmethod
    def null_form(self, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
        """The null conditioning for ``batch_size`` samples, whether or not training ever showed it to the network."""

    def null(self, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
        """The null conditioning for ``batch_size`` samples; what has none (a part that is never dropped) is left out.

        Raises:
            OrnsteinError: nothing was dropped in training, so that the network never saw the null form.
        """
        if not self.has_null and self.needs:
            raise OrnsteinError(
                "the null condition was never trained because conditioner.dropout is 0; train with "
                "conditioner.dropout=0.1 (or so), or use guidance=none."
            )
        return self.null_form(batch_size, device)

    def prepare(self, captions: Sequence[str], *, device: torch.device | str = "cpu") -> None:
        """Does once what later batches with these captions need; a conditioner that reads none has nothing to do."""
        return None

    def pictures(self, cond: Mapping[str, Tensor]) -> Tensor | None:
        """What a person should see of the condition, uint8 (B, 1 or 3, h, w); None where it is no image."""
        return None


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

    def training_cond(self, batch: Mapping[str, Any], *, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Nothing: an unconditional model does not look at the batch's labels."""
        return {}

    def cond(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Nothing, whatever is given."""
        return {}

    def null_form(self, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
        """Nothing: there is no condition to drop."""
        return {}


def checked_dropout(dropout: float, *, name: str = "conditioner.dropout") -> float:
    """``dropout`` as a float. Raises OrnsteinError unless it is a probability."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0.0 <= dropout <= 1.0:
        raise OrnsteinError(f"{name} is a probability in [0, 1], not {dropout!r}.")
    return float(dropout)


def needed(batch: Mapping[str, Any], key: str, *, option: str, way_out: str) -> Any:
    """``batch[key]``. Raises OrnsteinError if the batch has none."""
    value = batch.get(key)
    if value is None:
        raise OrnsteinError(f"the batch has no '{key}' but {option} needs one for every sample; {way_out}.")
    return value


def device_of(given: Mapping[str, Any]) -> torch.device:
    """The device of the tensors in a batch; the CPU where there are none."""
    return next((value.device for value in given.values() if isinstance(value, Tensor)), torch.device("cpu"))


def drop(
    cond: Mapping[str, Tensor], null: Mapping[str, Tensor], dropout: float, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Each sample's tensors replaced by the null form, all together, with probability ``dropout``."""
    first = next(iter(cond.values()))
    dropped = torch.rand(len(first), generator=generator, device=first.device) < dropout
    return {
        name: torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), null[name].to(value.dtype), value)
        for name, value in cond.items()
    }
