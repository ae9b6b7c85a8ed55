"""Data sets as uint8 arrays, their splits and order, and the Lightning data module that serves them.

Names load on first use, so that counting the classes of a folder does not import Lightning.
"""

from ornstein.lazy import lazy_names

_HOME = {
    "AFHQ": "published_folders",
    "BalancedBatches": "sampling",
    "Butterflies": "published_hub",
    "CIFAR10": "published_cifar",
    "CIFAR100": "published_cifar",
    "CelebA": "published_faces",
    "BucketBatches": "bucket_order",
    "BucketedImages": "bucketed",
    "DataModule": "datamodule",
    "Digits": "digits",
    "Emoji": "emoji",
    "EndlessBatches": "sampling",
    "FFHQ": "published_ffhq",
    "FashionMNIST": "mnist",
    "HubShards": "hf_stream",
    "HuggingFace": "hf",
    "ImageArrays": "arrays",
    "ImageDataset": "base",
    "ImageFolder": "folder",
    "ImageNet": "published_folders",
    "ImageZip": "archive",
    "LSUN": "published_lsun",
    "LatentFolder": "encoded",
    "MNIST": "mnist",
    "OrderedBatches": "sampling",
    "Pairs": "pairs",
    "Prepared": "prepared",
    "StreamModule": "stream_module",
    "TarShards": "tar_shards",
    "hub_data": "hf",
}
__all__ = list(_HOME)
__getattr__, __dir__ = lazy_names(__name__, _HOME)
