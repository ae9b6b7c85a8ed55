"""Data sets as uint8 arrays, their splits and order, and the Lightning data module that serves them.

Names load on first use, so that counting the classes of a folder does not import Lightning.
"""

from ornstein.lazy import lazy_names

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
__getattr__, __dir__ = lazy_names(__name__, _HOME)
