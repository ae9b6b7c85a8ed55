r"""What a network's output means, and how its input is scaled.

Each parameterization is a linear change of variables on :math:`x_t = \alpha x_0 + \sigma \epsilon`. It works on a
:class:`~ornstein.diffusion.schedules.Level`, never on a schedule, so any of them goes with any schedule; where one
cannot give x0 (eps at alpha = 0) it says so in ``needs_signal`` and such pairs are refused before training. Wherever
neither alpha nor sigma is 0, :func:`convert` takes any of them into any other.
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
        outputs: channels of the network's output for each channel of x: 2 where it learns a variance.
    """

    name: str
    needs_signal: bool = False
    outputs: int = 1

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

    @property
    def preconditions(self) -> bool:
        """Whether :meth:`scale_input` may do more than bring noise down to unit scale: any of a subclass's own."""
        return type(self).scale_input is not Parameterization.scale_input

    def noise_cond(self, level: Level) -> Scalar:
        """The noise conditioning number: 1000 t, the scale of DDPM's time steps."""
        return 1000.0 * level.t


class Epsilon(Parameterization):
    r"""The network predicts the noise, :math:`\epsilon`. Not on schedules that reach zero SNR.

    Source: Ho et al. 2020 (arXiv 2006.11239), eqs. 11-14.
    When: the classic choice, to repeat or compare with DDPM and what came of it.
    """

    name = "eps"
    needs_signal = True

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return eps

    def predict(self, output: Tensor, x_t: Tensor, level: Level) -> Prediction:
        return Prediction(x_t, level, eps=output)

    def gain(self, level: Level) -> Scalar:
        return level.alpha / level.sigma


class Sample(Parameterization):
    r"""The network predicts the clean data, :math:`x_0` (diffusers' ``sample``).

    Source: Ho et al. 2020 (arXiv 2006.11239), section 3.2; Salimans & Ho 2022 (arXiv 2202.00512), section 4.
    When: data with hard structure, few steps, or a loss that must see the clean image.
    """

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
    When: the safe default, well scaled at both ends and sound at zero SNR.
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

    Source: Lipman et al. 2023 (arXiv 2210.02747), section 4; Albergo et al. 2023 (arXiv 2303.08797), section 2.
    When: flow matching, with scheduler=flow; off it, the speed grows without bound where the schedule's does.
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


class Score(Parameterization):
    r"""The network gives the score, :math:`\nabla_x \ln p_t(x_t) \approx -\epsilon/\sigma`. Not at zero SNR.

    Its output grows as 1/sigma, so it is for networks and studies that want the score itself; eps is the same, scaled.

    Source: Song & Ermon 2019 (arXiv 1907.05600), section 4.2; Song et al. 2021 (arXiv 2011.13456), eq. 7.
    When: score-based models in their own terms: Langevin dynamics, reverse SDEs, energy-shaped networks.
    """

    name = "score"
    needs_signal = True

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return eps * (-1 / level.sigma)

    def predict(self, output: Tensor, x_t: Tensor, level: Level) -> Prediction:
        if isinstance(level.sigma, float) and level.sigma == 0.0:
            return Prediction(x_t, level, x0=x_t / level.alpha)  # a score of noiseless data says nothing of eps
        return Prediction(x_t, level, eps=output * -level.sigma)

    def gain(self, level: Level) -> Scalar:
        return level.alpha / level.sigma**2


class EDMPreconditioned(Parameterization):
    r"""EDM's F, with the preconditioning written for any (alpha, sigma).

    With :math:`D = \sigma^2 + \alpha^2 \sigma_{data}^2`:
    :math:`x_0 = \frac{\alpha \sigma_{data}^2}{D} x_t + \frac{\sigma \sigma_{data}}{\sqrt D} F(x_t / \sqrt D)`,
    noise conditioning :math:`\frac14 \ln(\sigma/\alpha)`. At alpha = 1 these are table 1 of Karras et al. 2022
    (arXiv 2206.00364); at unit sigma_data on a variance-preserving schedule F = -v.

    Source: Karras et al. 2022 (arXiv 2206.00364), eq. 7 and table 1.
    When: variance-exploding schedules, or data whose deviation is known and is not 1.

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


class LearnedVariance(Parameterization):
    r"""Any other parameterization, from a network of twice the channels whose second half learns the variance.

    The second half v says where the reverse variance stands between the posterior's and the forward kernel's:

    .. math:: \ln \Sigma = f \ln \sigma_{t|s}^2 + (1 - f) \ln \tilde\sigma_{s|t}^2, \quad f = (v + 1)/2

    v is not clamped, as published; :attr:`Prediction.variance_fraction` carries f. ``target``, ``gain`` and the scaling
    of the input are those of the mean, on the first half of the channels (dimension 1).

    Args:
        mean: what the first half means.
        outputs: 2, for the network's config to read: its output channels over the data's.

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.1.
    When: likelihood, or few ancestral steps; needs an objective with a bound in it (hybrid, vlb).

    Raises:
        ValueError: outputs is not 2, a mean that has a learned variance already, or, in ``predict``, an output whose
            channels are not twice those of x_t.
    """

    def __init__(self, mean: Parameterization, outputs: int = 2) -> None:
        if outputs != 2:
            raise ValueError(f"objective.parameterization.outputs={outputs}: a learned variance takes 2, mean and v.")
        if mean.outputs != 1:
            raise ValueError("objective.parameterization.mean has a learned variance already: give it eps, x0, v, ...")
        self.mean, self.outputs = mean, outputs
        self.name, self.needs_signal = f"{mean.name} with variance", mean.needs_signal

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return self.mean.target(x0, eps, level)

    def predict(self, output: Tensor, x_t: Tensor, level: Level) -> Prediction:
        mean, v = self.halves(output, x_t)
        prediction = self.mean.predict(mean, x_t, level)
        prediction.variance_fraction = (v + 1) / 2
        return prediction

    def halves(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """The mean's output and v, each shaped like x_t."""
        if output.shape[1] != 2 * x_t.shape[1]:
            raise ValueError(
                f"a learned variance needs a network of {2 * x_t.shape[1]} output channels, this one has "
                f"{output.shape[1]}: set model.network.out_channels, or choose an objective without one."
            )
        mean, v = output.chunk(2, dim=1)
        return mean, v

    def gain(self, level: Level) -> Scalar:
        return self.mean.gain(level)

    def scale_input(self, x_t: Tensor, level: Level) -> Tensor:
        return self.mean.scale_input(x_t, level)

    @property
    def preconditions(self) -> bool:
        return self.mean.preconditions

    def noise_cond(self, level: Level) -> Scalar:
        return self.mean.noise_cond(level)


def convert(output: Tensor, x_t: Tensor, level: Level, *, source: Parameterization, to: Parameterization) -> Tensor:
    """What a network of parameterization ``to`` would have said where one of ``source`` said ``output``.

    Exact wherever neither alpha nor sigma is 0. A learned variance goes along into another, and is dropped by a
    parameterization without one.

    Raises:
        ValueError: ``to`` learns a variance and ``source`` gives none; at an end of the schedule, a conversion that
            does not exist there.
    """
    prediction = source.predict(output, x_t, level)
    target = to.target(prediction.x0, prediction.eps, level)
    if not isinstance(to, LearnedVariance):
        return target
    if prediction.variance_fraction is None:
        raise ValueError(f"{source.name} says nothing of a variance: it cannot be converted to {to.name}.")
    return torch.cat([target, 2 * prediction.variance_fraction - 1], dim=1)
