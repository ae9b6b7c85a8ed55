"""Codecs: data to the space being diffused and back. See :class:`ornstein.codecs.codec.Codec`."""

from ornstein.codecs.autoencoder import KLAutoencoder
from ornstein.codecs.codec import Codec, Identity
from ornstein.codecs.posterior import DiagonalGaussian
from ornstein.codecs.weights import bundled_path, load_kl, read_metadata, save_kl

__all__ = [
    "Codec",
    "DiagonalGaussian",
    "Identity",
    "KLAutoencoder",
    "bundled_path",
    "load_kl",
    "read_metadata",
    "save_kl",
]
