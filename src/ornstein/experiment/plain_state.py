"""Checkpoints hold tensors and plain types, nothing that must be unpickled by a class's own code."""

import os
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

from ornstein.errors import OrnsteinError

_SCALARS = (type(None), bool, int, float, str)


def to_plain(value: Any, where: str = "checkpoint") -> Any:
    """A copy of ``value`` that ``torch.load(weights_only=True)`` reads; tensors are shared, not copied.

    Kept: tensors, None, bool, int, float, str, list, tuple (optimizers keep pairs), dict with str or int
    keys. Turned into those, because nothing is lost: other mappings (``OrderedDict``, ``Counter``), named
    tuples and ``torch.Size``, parameters, NumPy scalars, enums of plain values, subclasses of the scalars,
    paths.

    Raises:
        OrnsteinError: for anything else, with the keys that lead to it.
    """
    kind = type(value)
    if kind in _SCALARS or kind is torch.Tensor:
        return value
    if isinstance(value, torch.nn.Parameter):
        return value.detach()
    if isinstance(value, Mapping):
        return {_plain_key(key, where): to_plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list):
        return [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return tuple(to_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(value, Enum):
        return to_plain(value.value, where)
    scalar = _plain_scalar(value)
    if scalar is not None:
        return scalar
    raise OrnsteinError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, and checkpoints hold tensors and plain types "
        "only: have its owner save a tensor, number, text, list or dict instead"
    )


def _plain_scalar(value: Any) -> bool | int | float | str | None:
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # an np.float64 is a float too, but pickles as NumPy's
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else None


def _plain_key(key: Any, where: str) -> str | int:
    if type(key) in (str, int):
        return key
    plain = _plain_scalar(key)
    if isinstance(plain, str | int) and not isinstance(plain, bool):
        return plain
    raise OrnsteinError(
        f"{where} has a key of type {type(key).__qualname__} ({key!r}), and checkpoints take text and whole "
        "numbers as keys only: have its owner save another key"
    )
