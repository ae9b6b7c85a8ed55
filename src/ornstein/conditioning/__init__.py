"""Conditioners: what a batch carries beside its images -> the keyword tensors that a network takes."""

from ornstein.conditioning.class_label import ClassLabel
from ornstein.conditioning.compose import Compose
from ornstein.conditioning.conditioner import Conditioner, NoConditioning
from ornstein.conditioning.image import Image, image_channels
from ornstein.conditioning.text import Text

__all__ = ["ClassLabel", "Compose", "Conditioner", "Image", "NoConditioning", "Text", "image_channels"]
