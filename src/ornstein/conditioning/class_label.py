"""Conditioning on one class a sample."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ornstein.conditioning.conditioner import Conditioner, checked_dropout, needed
from ornstein.errors import OrnsteinError


class ClassLabel(Conditioner):
    """Class labels in [0, num_classes), with index ``num_classes`` as the null class.

    In training each label becomes the null class with probability ``dropout``, so that one network learns the
    conditional and the unconditional model that classifier-free guidance mixes.
    Source: Ho & Salimans 2022 (arXiv 2207.12598), algorithm 1.

    Args:
        num_classes: number of real classes, at least 1.
        dropout: probability in [0, 1] that a training label is dropped; 0 leaves no null form (``has_null``
            False).

    Raises: ValueError for a missing ``num_classes`` (unlabelled data) and for a dropout outside [0, 1].
    """

    num_classes: int
    needs = ("label",)

    def __init__(self, num_classes: int | None, dropout: float = 0.1) -> None:
        super().__init__()
        if num_classes is None:
            raise OrnsteinError(
                "conditioner=class_label needs classes but this data has none (data.num_classes is null); "
                "choose conditioner=none or labelled data."
            )
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise OrnsteinError(f"conditioner.num_classes must be a whole number of at least 1, not {num_classes!r}.")
        self.num_classes = num_classes
        self.dropout = checked_dropout(dropout)
        self.has_null = self.dropout > 0.0

    def training_cond(self, batch: Mapping[str, Any], *, generator: torch.Generator | None) -> dict[str, Tensor]:
        """``{"label": int64 (B,)}`` from ``batch["label"]``, each dropped with probability ``dropout``.

        Draws on the labels' device and reads nothing back. Labels on an accelerator are therefore not
        checked for their range here (the embedding's own device-side check remains); on the CPU they are.

        Raises: ValueError for labels that are missing, floating, not (B,), or out of range.
        """
        label = needed(
            batch, "label", option="conditioner=class_label", way_out="use labelled data or conditioner=none"
        )
        label = self._checked(label, read_back=False)
        if not self.has_null:
            return {"label": label}
        drop = torch.rand(label.shape, generator=generator, device=label.device) < self.dropout
        return {"label": label.masked_fill(drop, self.num_classes)}

    def cond(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """``{"label": int64 (B,)}`` for ``given["label"]`` in [0, num_classes).

        Raises: ValueError for labels that are missing, floating, not (B,), or out of range.
        """
        label = given.get("label")
        if label is None:
            raise OrnsteinError(
                "this model is class-conditional and needs a label for every sample, "
                f"each in [0, {self.num_classes - 1}]; pass labels, or null() for the unconditional model."
            )
        return {"label": self._checked(label, read_back=True)}

    def null_form(self, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
        """``{"label": int64 (B,)}``, all the null class ``num_classes``."""
        return {"label": torch.full((batch_size,), self.num_classes, dtype=torch.int64, device=device)}

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_classes={self.num_classes}, dropout={self.dropout}"

    def _checked(self, label: Tensor, *, read_back: bool) -> Tensor:
        if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
            raise OrnsteinError(f"class labels must be whole numbers (int64), not {label.dtype}.")
        if label.ndim != 1:
            raise OrnsteinError(f"class labels must have shape (B,), one a sample, not {tuple(label.shape)}.")
        label = label.to(torch.int64)
        # Comparing on an accelerator makes the host wait for it: not in the training step.
        if (read_back or label.device.type == "cpu") and label.numel():
            values = label.tolist()
            low, high = min(values), max(values)
            if low < 0 or high >= self.num_classes:
                raise OrnsteinError(
                    f"class labels must be in [0, {self.num_classes - 1}] for {self.num_classes} classes, "
                    f"but these reach from {low} to {high}; check data.num_classes."
                )
        return label
