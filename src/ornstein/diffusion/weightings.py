r"""What a squared error weighs at each noise level, against one reference.

The reference is the weight on :math:`\|x_0 - \hat x_0\|^2`: per draw of a time (:meth:`Weighting.on_x0`), and per unit
of log-SNR with the density of the draws multiplied in
(:meth:`~ornstein.diffusion.objectives.Objective.effective_weight`). An error in the network's output is
``gain(level)`` times that in x0, so the loss in the output's space gets ``on_x0 / gain**2``, and published weights that
look different in eps, x0 and v are one object here. Two kinds exist: weights per draw, whose effect depends on where
the times are drawn (simple, min_snr, p2, ...), and weights per unit of log-SNR, which divide the density out again
(elbo, sigmoid, edm_monotonic: Kingma & Gao 2023, arXiv 2303.00848), so that the time density is importance
sampling and nothing else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ornstein.diffusion.parameterizations import Parameterization
from ornstein.diffusion.schedules import Level, Scalar


def snr(level: Level) -> Scalar:
    """(alpha / sigma)**2."""
    return (level.alpha / level.sigma) ** 2


class Weighting(ABC):
    """Weight of a draw at a level.

    Attributes:
        needs_density: ``on_x0`` divides by the density of the time drawn, which must then be given.
    """

    needs_density: bool = False

    @abstractmethod
    def on_x0(self, level: Level, parameterization: Parameterization, density: Scalar = 1.0) -> Scalar:
        """Weight on ||x0 - x0_hat||^2 of one draw at ``level``, whose time has ``density`` in t; the level's shape."""

    def on_output(self, level: Level, parameterization: Parameterization, density: Scalar = 1.0) -> Scalar:
        """The same weight on the squared error of the network's output."""
        return self.on_x0(level, parameterization, density) / parameterization.gain(level) ** 2


class Simple(Weighting):
    r"""Weight 1 on the squared error of the network's output, whatever the output means.

    .. math:: w_{output} = 1

    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 14; likewise the plain losses of v, flow matching and EDM's F.
    When: the default: each parameterization's own plain loss.
    """

    def on_x0(self, level: Level, parameterization: Parameterization, density: Scalar = 1.0) -> Scalar:
        return parameterization.gain(level) ** 2

    def on_output(self, level: Level, parameterization: Parameterization, density: Scalar = 1.0) -> Scalar:
        return 1.0


class SNR(Weighting):
    r"""The weight of the plain eps loss, for any parameterization.

    .. math:: w_{x_0} = \mathrm{SNR}

    On the score it is the weight :math:`\sigma^2` of denoising score matching.
    Source: Song & Ermon 2019 (arXiv 1907.05600), section 4.2 with lambda = sigma^2; Salimans & Ho 2022 (arXiv
    2202.00512), eq. 9. When: DDPM's loss with a network that gives x0, v or the score.
    """

    def on_x0(self, level: Level, parameterization: Parameterization, density: Scalar = 1.0) -> Scalar:
        return snr(level)


class TruncatedSNR(Weighting):
    r"""The eps loss, but never less than 1 on x0, so that the noisiest levels still count.

    .. math:: w_{x_0} = \max(\mathrm{SNR}, \text{least})

    Source: Salimans & Ho 2022 (arXiv 2202.00512), section 4, with least = 1.
    When: distillation and few-step models, where errors at high noise matter.

    Raises:
        ValueError: least is not positive.
    """

    def __init__(self, *, least: float = 1.0) -> None:
        if least <= 0:
            raise ValueError(f"objective.weighting.least={least} must be positive; weighting=snr has no floor.")
        self.least = least

    def on_x0(self, level: Level, parameterization: Parameterization, density: Scalar = 1.0) -> Scalar:
        value = snr(level)
        return value.clamp(min=self.least) if isinstance(value, Tensor) else max(value, self.least)


class MinSNR(Weighting):
    r"""Min-SNR-gamma: the eps loss with its emphasis on nearly clean levels capped.

    .. math:: w_{x_0} = \min(\mathrm{SNR}, \gamma)

    On eps this is min(SNR, gamma)/SNR, on v of a variance-preserving schedule min(SNR, gamma)/(SNR + 1).
    Source: Hang et al. 2023 (arXiv 2303.09556), section 3.4.
    When: faster convergence on images at no cost; the first weighting to try.

    Raises:
        ValueError: gamma is not positive.
    """

    def __init__(self, *, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"objective.weighting.gamma={gamma} must be positive, 5 in the paper.")
        self.gamma = gamma

    def on_x0(self, level: Level, parameterization: Parameterization, density: Scalar = 1.0) -> Scalar:
        value = snr(level)
        return value.clamp(max=self.gamma) if isinstance(value, Tensor) else min(value, self.gamma)


class P2(Weighting):
    r"""Perception-prioritised: the eps loss, with less on levels where only imperceptible detail is left to learn.

    .. math:: w_{x_0} = \mathrm{SNR} / (k + \mathrm{SNR})^\gamma

    On eps this is :math:`(k + \mathrm{SNR})^{-\gamma}`; gamma = 0 is the plain eps loss.
    Source: Choi et al. 2022 (arXiv 2204.00227), section 3, with k = 1 and gamma 0.5 or 1.
    When: perceptual quality of images on pixel models with beta schedules.

    Raises:
        ValueError: k is not positive or gamma negative.
    """

    def __init__(self, *, k: float = 1.0, gamma: float = 1.0) -> None:
        if k <= 0 or gamma < 0:
            raise ValueError(f"objective.weighting needs k > 0 and gamma >= 0, got k={k} and gamma={gamma}.")
        self.k, self.gamma = k, gamma

    def on_x0(self, level: Level, parameterization: Parameterization, density: Scalar = 1.0) -> Scalar:
        value = snr(level)
        return value * (self.k + value) ** -self.gamma


class EDMLambda(Weighting):
    r"""EDM's lambda, which makes the error of its preconditioned F weigh 1, for any parameterization.

    .. math:: w_{x_0} = \frac{\sigma^2 + \alpha^2 \sigma_{data}^2}{(\sigma\, \sigma_{data})^2}
              = \mathrm{SNR} + \sigma_{data}^{-2}

    Source: Karras et al. 2022 (arXiv 2206.00364), table 1, written for any (alpha, sigma).
    When: EDM's loss with a network that is not preconditioned; at sigma_data = 1 it is the plain v loss.

    Raises:
        ValueError: sigma_data is not positive.
    """

    def __init__(self, *, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(f"objective.weighting.sigma_data={sigma_data} must be positive: the data's deviation.")
        self.sigma_data = sigma_data

    def on_x0(self, level: Level, parameterization: Parameterization, density: Scalar = 1.0) -> Scalar:
        return snr(level) + self.sigma_data**-2


class PerLogSNR(Weighting):
    r"""A weight w on the eps loss per unit of log-SNR, whatever density times are drawn from.

    .. math:: w_{x_0} = \frac{w(\lambda)}{p(t)}\, \mathrm{SNR} \left|\frac{d\lambda}{dt}\right|
              = \frac{w(\lambda)}{p(t)} \frac{2 \alpha (\alpha \sigma' - \alpha' \sigma)}{\sigma^3}

    whose second form is finite where alpha = 0. Source: Kingma & Gao 2023 (arXiv 2303.00848).
    """

    needs_density = True

    @abstractmethod
    def on_eps(self, log_snr: Tensor) -> Tensor:
        """w, same shape as ``log_snr``, which may be infinite."""

    def on_x0(self, level: Level, parameterization: Parameterization, density: Scalar = 1.0) -> Scalar:
        alpha, sigma = torch.as_tensor(level.alpha), torch.as_tensor(level.sigma)
        turn = level.alpha * level.d_sigma - level.d_alpha * level.sigma
        weight = self.on_eps(2 * (torch.log(alpha) - torch.log(sigma)))
        return weight * (2 * alpha * turn / sigma**3) / density


class ELBO(PerLogSNR):
    r"""The continuous-time variational bound's weight: the same for every schedule between the same ends.

    .. math:: w(\lambda) = 1/2, \quad w_{x_0} = -\frac{1}{2 p(t)} \frac{d\, \mathrm{SNR}}{dt}

    In nats, per squared error. Source: Kingma et al. 2021 (arXiv 2107.00630), eqs. 17 and 18.
    When: likelihood; objective=vdm adds the bound's other terms.
    """

    def on_eps(self, log_snr: Tensor) -> Tensor:
        return torch.full_like(log_snr, 0.5)


@dataclass(frozen=True)
class Sigmoid(PerLogSNR):
    r"""VDM++'s sigmoid weighting: the bound's emphasis on low noise rolled off, and monotonic, so still a bound.

    .. math:: w(\lambda) = \mathrm{sigmoid}(b - \lambda)

    Source: Kingma & Gao 2023 (arXiv 2303.00848), section 5; Hoogeboom et al. 2024 (arXiv 2410.19324), section 3.
    When: large pixel models; raise ``bias`` with resolution, since more pixels need more noise to hide an image.
    """

    bias: float = 2.0

    def on_eps(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(self.bias - log_snr)


class EDMMonotonic(PerLogSNR):
    r"""EDM's weighting, made monotonic: constant below the log-SNR where EDM's own has its maximum.

    .. math:: w(\lambda) = \tilde w(\max(\lambda, \lambda^*)), \quad
              \tilde w(\lambda) = N(\lambda;\, -2 p_{mean},\, 4 p_{std}^2)\,
              (e^{-\lambda} + \sigma_{data}^2) / \sigma_{data}^2, \quad \lambda^* = \arg\max \tilde w

    Source: Kingma & Gao 2023 (arXiv 2303.00848), section 5; EDM's from Karras et al. 2022
    (arXiv 2206.00364), table 1. When: EDM's image quality with a weighting that is a bound on noisy data.

    Raises:
        ValueError: p_std or sigma_data is not positive.
    """

    def __init__(self, *, p_mean: float = -1.2, p_std: float = 1.2, sigma_data: float = 0.5) -> None:
        if p_std <= 0 or sigma_data <= 0:
            raise ValueError(f"objective.weighting.p_std={p_std} and sigma_data={sigma_data} must both be positive.")
        self.mean, self.std, self.sigma_data = -2 * p_mean, 2 * p_std, sigma_data
        # The maximum is flat: a grid of a thousandth of a deviation has it to a millionth.
        grid = torch.linspace(self.mean - 10 * self.std, self.mean + 10 * self.std, 20_001, dtype=torch.float64)
        self.peak = float(grid[self._edm(grid).argmax()])

    def _edm(self, log_snr: Tensor) -> Tensor:
        log_normal = -0.5 * ((log_snr - self.mean) / self.std) ** 2 - math.log(self.std * math.sqrt(2 * math.pi))
        return torch.exp(log_normal) + torch.exp(log_normal - log_snr - 2 * math.log(self.sigma_data))

    def on_eps(self, log_snr: Tensor) -> Tensor:
        return self._edm(log_snr.clamp(min=self.peak))
