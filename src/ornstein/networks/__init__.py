"""Denoising networks: `(x_in, noise_cond, **conditioning) -> output`. They know nothing of schedules."""

from ornstein.networks.annotated import AnnotatedUNet
from ornstein.networks.cost import count_flops, count_parameters
from ornstein.networks.diffusers_text_unet import DiffusersUNet2DCondition
from ornstein.networks.diffusers_unet import DiffusersUNet2D
from ornstein.networks.dit import DiT
from ornstein.networks.edm2 import EDM2UNet
from ornstein.networks.embeddings import check_labels
from ornstein.networks.experts import Experts
from ornstein.networks.lucidrains import LucidrainsUNet
from ornstein.networks.noisy_classifier import NoisyClassifier
from ornstein.networks.unet import UNet

__all__ = [
    "AnnotatedUNet",
    "DiT",
    "DiffusersUNet2D",
    "DiffusersUNet2DCondition",
    "EDM2UNet",
    "Experts",
    "LucidrainsUNet",
    "NoisyClassifier",
    "UNet",
    "check_labels",
    "count_flops",
    "count_parameters",
]
