"""Samplers: each turns noise into data with a denoiser on a grid of times."""

from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.samplers.ddim import DDIM
from ornstein.diffusion.samplers.ddpm import DDPM
from ornstein.diffusion.samplers.dpmpp import DPMpp2M
from ornstein.diffusion.samplers.edm import Euler, Heun

__all__ = ["DDIM", "DDPM", "DPMpp2M", "Euler", "Heun", "Sampler", "State"]
