"""Data sets as uint8 arrays, their splits and order, and the Lightning data module that serves them.

Names load on first use, so that counting the classes of a folder does not import Lightning.
"""

import importlib
from typing import Any

_HOME = {
    "DataModule": "datamodule",
    "Digits": "digits",
    "Emoji": "emoji",
    "EndlessBatches": "sampling",
    "FashionMNIST": "mnist",
    "ImageDataset": "base",
    "ImageFolder": "folder",
    "MNIST": "mnist",
    "OrderedBatches": "sampling",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import the module that a public name lives in, and give the name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
