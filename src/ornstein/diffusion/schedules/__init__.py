r"""Noise schedules: :math:`x_t = \alpha(t) x_0 + \sigma(t) \epsilon`, with t in [0, 1], 0 data and 1 noise.

Every schedule meets every other in one coordinate, :math:`\lambda(t) = 2 \ln(\alpha / \sigma)`, the log-SNR
(Kingma et al. 2021, arXiv 2107.00630). Coefficients are computed in float64 where the input is float64 or a Python
number, otherwise in float32 at least; half-precision times are refused nowhere and never stay half precision.
"""

from ornstein.diffusion.schedules.base import Level, NoiseSchedule, Scalar, Transition, transition_between
from ornstein.diffusion.schedules.continuous import EDM, VE, ContinuousCosine, Flow, Laplace, SNRSigmoid, SubVP
from ornstein.diffusion.schedules.learned import VDMLearned
from ornstein.diffusion.schedules.modifiers import Modifiable, Modifiers
from ornstein.diffusion.schedules.tables import (
    BetaSchedule,
    Constant,
    Cosine,
    Exponential,
    LaplaceTable,
    Linear,
    Quadratic,
    ScaledLinear,
    Sigmoid,
)

__all__ = [
    "EDM",
    "VE",
    "BetaSchedule",
    "Constant",
    "ContinuousCosine",
    "Cosine",
    "Exponential",
    "Flow",
    "Laplace",
    "LaplaceTable",
    "Level",
    "Linear",
    "Modifiable",
    "Modifiers",
    "NoiseSchedule",
    "Quadratic",
    "SNRSigmoid",
    "Scalar",
    "ScaledLinear",
    "Sigmoid",
    "SubVP",
    "Transition",
    "VDMLearned",
    "transition_between",
]
