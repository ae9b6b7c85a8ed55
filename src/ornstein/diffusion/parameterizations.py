r"""What a network's output means, and how its input is scaled.

Each parameterization is a linear change of variables on :math:`x_t = \alpha x_0 + \sigma \epsilon`. It works on a
:class:`~ornstein.diffusion.schedules.Level`, never on a schedule, so any of them goes with any schedule; where one
cannot give x0 (eps at alpha = 0) it says so in ``needs_signal`` and such pairs are refused before training.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import Level, Scalar

_LOG_RATIO_LIMIT = 20.0  # ln(sigma/alpha) that EDM's noise conditioning is clamped to: finite at both ends of flow


class Parameterization(ABC):
    """Subclasses define ``target``, ``predict`` and ``gain``.

    Attributes:
        name: as in the config group.
        needs_signal: x0 cannot be given where alpha = 0.
    """

    name: str
    needs_signal: bool = False

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """What the network should output, (B, *shape)."""

    @abstractmethod
    def predict(self, output: Tensor, x_t: Tensor, level: Level) -> Prediction:
        """The prediction of x0 and eps that a network's output stands for."""

    @abstractmethod
    def gain(self, level: Level) -> Scalar:
        """|d output / d x0| at fixed x_t: a squared error in the output is gain**2 times that in x0."""

    def scale_input(self, x_t: Tensor, level: Level) -> Tensor:
        """x_t as the network sees it: as it is up to unit scale, and brought down to it where noise explodes."""
        size = level.alpha**2 + level.sigma**2
        if isinstance(size, Tensor):
            return x_t * size.clamp(min=1.0).rsqrt()
        # The tolerance keeps variance-preserving schedules, whose squares sum to 1 up to rounding, untouched.
        return x_t if size <= 1.0 + 1e-6 else x_t * size**-0.5

    def noise_cond(self, level: Level) -> Scalar:
        """The noise conditioning number: 1000 t, the scale of DDPM's time steps."""
        return 1000.0 * level.t


class Epsilon(Parameterization):
    """The network predicts the noise. Source: Ho et al. 2020 (arXiv 2006.11239), eqs. 11-14."""

    name = "eps"
    needs_signal = True

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return eps

    def predict(self, output: Tensor, x_t: Tensor, level: Level) -> Prediction:
        return Prediction(x_t, level, eps=output)

    def gain(self, level: Level) -> Scalar:
        return level.alpha / level.sigma


class Sample(Parameterization):
    """The network predicts the clean data x0 (diffusers' ``sample``)."""

    name = "x0"

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return x0

    def predict(self, output: Tensor, x_t: Tensor, level: Level) -> Prediction:
        return Prediction(x_t, level, x0=output)

    def gain(self, level: Level) -> Scalar:
        return torch.ones_like(level.alpha) if isinstance(level.alpha, Tensor) else 1.0


class V(Parameterization):
    r"""v-prediction, :math:`v = \alpha \epsilon - \sigma x_0`. Source: Salimans & Ho 2022 (arXiv 2202.00512), app. D.

    Off variance-preserving schedules its inversion divides by alpha**2 + sigma**2.
    """

    name = "v"

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return level.alpha * eps - level.sigma * x0

    def predict(self, output: Tensor, x_t: Tensor, level: Level) -> Prediction:
        size = level.alpha**2 + level.sigma**2
        x0 = (level.alpha / size) * x_t - (level.sigma / size) * output
        eps = (level.sigma / size) * x_t + (level.alpha / size) * output
        return Prediction(x_t, level, x0=x0, eps=eps)

    def gain(self, level: Level) -> Scalar:
        return (level.alpha**2 + level.sigma**2) / level.sigma


class Velocity(Parameterization):
    r"""Flow velocity, :math:`dx_t/dt = \alpha'(t) x_0 + \sigma'(t) \epsilon`; on flow it is eps - x0.

    Source: Lipman et al. 2023 (arXiv 2210.02747), eq. 20; Albergo et al. 2023 (arXiv 2303.08797), eq. 2.10.
    """

    name = "flow"

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return level.d_alpha * x0 + level.d_sigma * eps

    def predict(self, output: Tensor, x_t: Tensor, level: Level) -> Prediction:
        turn = self._turn(level)
        x0 = (level.d_sigma / turn) * x_t - (level.sigma / turn) * output
        eps = (level.alpha / turn) * output - (level.d_alpha / turn) * x_t
        return Prediction(x_t, level, x0=x0, eps=eps)

    def gain(self, level: Level) -> Scalar:
        return self._turn(level) / level.sigma

    @staticmethod
    def _turn(level: Level) -> Scalar:
        # Wronskian alpha sigma' - alpha' sigma: positive as long as the SNR falls.
        return level.alpha * level.d_sigma - level.d_alpha * level.sigma


class EDMPreconditioned(Parameterization):
    r"""EDM's F, with the preconditioning written for any (alpha, sigma).

    With :math:`D = \sigma^2 + \alpha^2 \sigma_{data}^2`:
    :math:`x_0 = \frac{\alpha \sigma_{data}^2}{D} x_t + \frac{\sigma \sigma_{data}}{\sqrt D} F(x_t / \sqrt D)`,
    noise conditioning :math:`\frac14 \ln(\sigma/\alpha)`. At alpha = 1 these are table 1 of Karras et al. 2022
    (arXiv 2206.00364); at unit sigma_data on a variance-preserving schedule F = -v.

    Raises:
        ValueError: sigma_data is not positive.
    """

    name = "edm"

    def __init__(self, *, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(f"sigma_data={sigma_data} must be positive: it is the data's standard deviation.")
        self.sigma_data = sigma_data

    def _norm2(self, level: Level) -> Scalar:
        return level.sigma**2 + (level.alpha * self.sigma_data) ** 2

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        scale = 1 / (self.sigma_data * self._norm2(level) ** 0.5)
        return (level.sigma * scale) * x0 - (self.sigma_data**2 * level.alpha * scale) * eps

    def predict(self, output: Tensor, x_t: Tensor, level: Level) -> Prediction:
        norm2 = self._norm2(level)
        skip = level.alpha * self.sigma_data**2 / norm2
        out = level.sigma * self.sigma_data / norm2**0.5
        return Prediction(x_t, level, x0=skip * x_t + out * output)

    def gain(self, level: Level) -> Scalar:
        return self._norm2(level) ** 0.5 / (level.sigma * self.sigma_data)

    def scale_input(self, x_t: Tensor, level: Level) -> Tensor:
        return x_t * self._norm2(level) ** -0.5

    def noise_cond(self, level: Level) -> Scalar:
        if isinstance(level.sigma, Tensor):
            log_ratio = torch.log(level.sigma) - torch.log(torch.as_tensor(level.alpha))
            return 0.25 * log_ratio.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
        if level.sigma == 0 or level.alpha == 0:
            return 0.25 * math.copysign(_LOG_RATIO_LIMIT, level.sigma - level.alpha)
        return 0.25 * max(-_LOG_RATIO_LIMIT, min(_LOG_RATIO_LIMIT, math.log(level.sigma / level.alpha)))
