"""Training objectives; see :class:`Objective`."""

from ornstein.diffusion.objectives.base import Drawn, Losses, LossOutput, Objective, TrainingNoise
from ornstein.diffusion.objectives.hybrid import Hybrid
from ornstein.diffusion.objectives.vdm import VDM
from ornstein.diffusion.objectives.vlb import VLB

__all__ = ["VDM", "VLB", "Drawn", "Hybrid", "LossOutput", "Losses", "Objective", "TrainingNoise"]
