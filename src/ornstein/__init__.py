"""Ornstein: an experiment framework for diffusion models on Hydra and PyTorch Lightning.

Importing the package loads neither torch nor Lightning: ``ornstein.train`` and ``ornstein.load`` are looked up on
first use.
"""

from typing import TYPE_CHECKING, Any

from ornstein import torchvision_guard

if TYPE_CHECKING:
    from ornstein.cli.compose import train
    from ornstein.cli.load import load

__version__ = "0.1.0"
__all__ = ["__version__", "load", "train"]

torchvision_guard.install()


def __getattr__(name: str) -> Any:
    """Give ``ornstein.train`` and ``ornstein.load`` on first use.

    Raises:
        AttributeError: for every other unknown name.
    """
    if name == "load":
        from ornstein.cli.load import load

        return load
    if name == "train":
        from ornstein.cli.compose import train

        return train
    raise AttributeError(f"module 'ornstein' has no attribute {name!r}")
