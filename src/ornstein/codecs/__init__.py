"""Codecs: data to the space being diffused and back. See :class:`ornstein.codecs.codec.Codec`."""

from ornstein.codecs.autoencoder import Autoencoder, Coded
from ornstein.codecs.codec import Codec, Identity
from ornstein.codecs.discriminator import PatchDiscriminator
from ornstein.codecs.kl import KLAutoencoder
from ornstein.codecs.posterior import DiagonalGaussian
from ornstein.codecs.pretrained import DiffusersCodec
from ornstein.codecs.quantiser import VectorQuantiser
from ornstein.codecs.scaled import ScaledCodec
from ornstein.codecs.vq import VQAutoencoder
from ornstein.codecs.weights import FILE_NAME, bundled_path, load_kl, load_vq, read_metadata, save_codec

__all__ = [
    "FILE_NAME",
    "Autoencoder",
    "Codec",
    "Coded",
    "DiagonalGaussian",
    "DiffusersCodec",
    "Identity",
    "KLAutoencoder",
    "PatchDiscriminator",
    "ScaledCodec",
    "VQAutoencoder",
    "VectorQuantiser",
    "bundled_path",
    "load_kl",
    "load_vq",
    "read_metadata",
    "save_codec",
]
