"""The times at which a sampler calls its denoiser: N + 1 of them, falling from noise to data."""

from ornstein.diffusion.grids.base import Grid, GridRule, make_grid
from ornstein.diffusion.grids.continuous import Beta, Exponential, Karras, LogSNR, Quadratic, Shifted, Uniform
from ornstein.diffusion.grids.discrete import Discrete, Listed

__all__ = [
    "Beta",
    "Discrete",
    "Exponential",
    "Grid",
    "GridRule",
    "Karras",
    "Listed",
    "LogSNR",
    "Quadratic",
    "Shifted",
    "Uniform",
    "make_grid",
]
