"""Guidance turns a denoiser into another denoiser, so that every sampler takes every guidance, and guidances compose.

``guidance(denoiser, null)`` takes the denoiser with its conditioning bound and the null (dropped) form of it.
"""

from ornstein.diffusion.guidance.apg import AdaptiveProjected
from ornstein.diffusion.guidance.autoguidance import Autoguidance
from ornstein.diffusion.guidance.base import Call, Guidance, Guided, Part
from ornstein.diffusion.guidance.classifier import Classifier
from ornstein.diffusion.guidance.compose import Compose, leaves, replaced
from ornstein.diffusion.guidance.energy import Colour, Energy
from ornstein.diffusion.guidance.free import CFGPlusPlus, ClassifierFree, NoGuidance
from ornstein.diffusion.guidance.interval import Interval

__all__ = [
    "AdaptiveProjected",
    "Autoguidance",
    "CFGPlusPlus",
    "Call",
    "Classifier",
    "ClassifierFree",
    "Colour",
    "Compose",
    "Energy",
    "Guidance",
    "Guided",
    "Interval",
    "NoGuidance",
    "Part",
    "leaves",
    "replaced",
]
