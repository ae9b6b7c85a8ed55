"""Conditioners: what a batch carries beside its images -> the keyword tensors that a network takes."""

from ornstein.conditioning.class_label import ClassLabel
from ornstein.conditioning.conditioner import Conditioner, NoConditioning

__all__ = ["ClassLabel", "Conditioner", "NoConditioning"]
