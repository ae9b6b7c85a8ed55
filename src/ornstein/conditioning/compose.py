"""Several conditioners at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ornstein.conditioning.conditioner import Conditioner, checked_dropout, drop
from ornstein.errors import OrnsteinError


class Compose(Conditioner):
    """The keyword tensors of several conditioners together: a class and a caption, a class and an image.

    Each part drops its own condition by its own ``dropout``, independently; ``dropout`` here drops all of them at once.
    Guidance's null form is that of every part that was ever dropped; a part with no null form (its own dropout 0, no
    joint one) keeps its condition in both branches, as the low resolution of super-resolution should.
    Source: Ho & Salimans 2022 (arXiv 2207.12598), algorithm 1, for one part; Brooks et al. 2023 (arXiv 2211.09800),
    section 3.2.1, for independent and joint drops of two.

    Args:
        parts: conditioners by a name of one's own; no two may give the same keyword.
        dropout: probability in [0, 1] that all parts are dropped together, beside their own drops.
        num_classes, text_dim, pooled_dim, concat_channels: what the network is told, checked against the parts.

    Raises:
        OrnsteinError: no parts, two that give the same keyword, or sizes that are not the parts'.
    """

    def __init__(
        self,
        parts: Mapping[str, Conditioner],
        *,
        dropout: float = 0.0,
        num_classes: int | None = None,
        text_dim: int | None = None,
        pooled_dim: int | None = None,
        concat_channels: int = 0,
    ) -> None:
        super().__init__()
        if not parts:
            raise OrnsteinError("conditioner.parts is empty: name at least one part, or choose conditioner=none.")
        self.parts = nn.ModuleDict(dict(parts))
        self.dropout = checked_dropout(dropout)
        told = {
            "num_classes": num_classes,
            "text_dim": text_dim,
            "pooled_dim": pooled_dim,
            "concat_channels": concat_channels,
        }
        for key, said in told.items():
            given = [getattr(part, key) for part in self.each if getattr(part, key)]
            if len(given) > 1:
                raise OrnsteinError(f"two of conditioner.parts give {key}: keep one of them.")
            found = given[0] if given else None
            if (said or None) != found:
                raise OrnsteinError(f"conditioner.{key}={said} and conditioner.parts give {found}: set it to that.")
            setattr(self, key, said)
        self.needs = tuple(dict.fromkeys(key for part in self.each for key in part.needs))
        self.has_null = self.dropout > 0 or any(part.has_null for part in self.each)

    @property
    def each(self) -> Sequence[Conditioner]:
        """The parts in order."""
        return [part for part in self.parts.values() if isinstance(part, Conditioner)]

    def training_cond(self, batch: Mapping[str, Any], *, generator: torch.Generator | None) -> dict[str, Tensor]:
        """The parts' tensors, each dropped as its part has it, then all together."""
        cond = _merged(part.training_cond(batch, generator=generator) for part in self.each)
        if self.dropout == 0:
            return cond
        first = next(iter(cond.values()))
        null = _merged(part.null_form(len(first), first.device) for part in self.each)
        return drop(cond, null, self.dropout, generator)

    def cond(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """The parts' tensors, none dropped."""
        return _merged(part.cond(given) for part in self.each)

    def null_form(self, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
        """The null form of every part."""
        return _merged(part.null_form(batch_size, device) for part in self.each)

    def null(self, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
        """The null form of the parts that were dropped in training; the others' keywords are left out.

        Raises: OrnsteinError if none ever was.
        """
        if not self.has_null:
            return super().null(batch_size, device)
        dropped = [part for part in self.each if self.dropout > 0 or part.has_null]
        return _merged(part.null_form(batch_size, device) for part in dropped)

    def prepare(self, captions: Sequence[str], *, device: torch.device | str = "cpu") -> None:
        """Every part's own preparation."""
        for part in self.each:
            part.prepare(captions, device=device)

    def pictures(self, cond: Mapping[str, Tensor]) -> Tensor | None:
        """Those of the first part that has any."""
        found = (part.pictures(cond) for part in self.each)
        return next((picture for picture in found if picture is not None), None)


def _merged(conds: Any) -> dict[str, Tensor]:
    return {name: value for cond in conds for name, value in cond.items()}
