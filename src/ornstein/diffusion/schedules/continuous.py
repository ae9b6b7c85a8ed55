"""Schedules given by a formula in t."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ornstein.diffusion.schedules.families import (
    Coefficients,
    Straight,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)
from ornstein.diffusion.schedules.modifiers import Modifiable, Modifiers, variance_preserving_at


class Flow(Modifiable):
    r"""Rectified flow: a straight line from data to noise.

    .. math:: \alpha = 1 - t, \qquad \sigma = t

    Zero SNR at t = 1, so eps cannot be predicted there.

    Source: Liu et al. 2023 (arXiv 2209.03003), section 2; Lipman et al. 2023 (arXiv 2210.02747).
    When: a new model, trained with objective=flow and sampled in few steps.
    """

    family = Straight()
    zero_terminal_snr = True

    def curve(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return 1 - t, t, -one, one

    def curve_time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr)


class EDM(Modifiable):
    r"""Variance exploding along EDM's rho-warped ramp of sigma.

    .. math:: \alpha = 1, \qquad
              \sigma(t) = (\sigma_{min}^{1/\rho} + t (\sigma_{max}^{1/\rho} - \sigma_{min}^{1/\rho}))^\rho

    so that a grid uniform in t is the paper's grid.

    Source: Karras et al. 2022 (arXiv 2206.00364), eq. 5 and table 1.
    When: objective=edm, or the heun sampler with few steps.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and rho > 0.
    """

    family = VarianceExploding()

    def __init__(
        self,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        super().__init__(**modifiers)
        if not (0 < sigma_min < sigma_max and rho > 0):
            raise ValueError(
                f"edm needs 0 < sigma_min < sigma_max and rho > 0, got sigma_min={sigma_min}, "
                f"sigma_max={sigma_max}, rho={rho}."
            )
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self._low = sigma_min ** (1 / rho)
        self._span = sigma_max ** (1 / rho) - self._low

    def curve(self, t: Tensor) -> Coefficients:
        root = self._low + t * self._span
        sigma = root**self.rho
        return torch.ones_like(t), sigma, torch.zeros_like(t), self.rho * self._span * sigma / root

    def curve_time(self, log_snr: Tensor) -> Tensor:
        sigma = torch.exp(-0.5 * log_snr).clamp(self.sigma_min, self.sigma_max)
        return ((sigma ** (1 / self.rho) - self._low) / self._span).clamp(0, 1)


class VE(Modifiable):
    r"""Variance exploding, sigma geometric in t: the NCSN ladder made continuous.

    .. math:: \alpha = 1, \qquad \sigma(t) = \sigma_{min} \left(\frac{\sigma_{max}}{\sigma_{min}}\right)^t

    Source: Song et al. 2021 (arXiv 2011.13456), section 3.4 and appendix C.
    When: score matching and the annealed Langevin or predictor-corrector samplers.

    Args:
        sigma_min: noise at t = 0, in units of the data.
        sigma_max: noise at t = 1; about the largest distance between two data points.
        modifiers: of every schedule, see :class:`Modifiable`.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.
    """

    family = VarianceExploding()

    def __init__(self, *, sigma_min: float = 0.01, sigma_max: float = 50.0, **modifiers: Unpack[Modifiers]) -> None:
        super().__init__(**modifiers)
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"ve needs 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}.")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self._low, self._span = math.log(sigma_min), math.log(sigma_max) - math.log(sigma_min)

    def curve(self, t: Tensor) -> Coefficients:
        sigma = torch.exp(self._low + t * self._span)
        return torch.ones_like(t), sigma, torch.zeros_like(t), self._span * sigma

    def curve_time(self, log_snr: Tensor) -> Tensor:
        return ((-0.5 * log_snr - self._low) / self._span).clamp(0, 1)


class SubVP(Modifiable):
    r"""Sub-variance-preserving SDE: never more noise than the variance-preserving one of the same drift.

    .. math:: \alpha = e^{-\frac12 B(t)}, \quad \sigma = 1 - e^{-B(t)}, \quad
              B(t) = \int_0^t \beta = \beta_{min} t + \tfrac12 (\beta_{max} - \beta_{min}) t^2

    Source: Song et al. 2021 (arXiv 2011.13456), section 3.4 and appendix C.
    When: likelihoods of score models, where the paper has its best figures.

    Raises:
        ValueError: unless 0 < beta_min <= beta_max.
    """

    family = SubVariancePreserving()

    def __init__(self, *, beta_min: float = 0.1, beta_max: float = 20.0, **modifiers: Unpack[Modifiers]) -> None:
        super().__init__(**modifiers)
        if not 0 < beta_min <= beta_max < math.inf:
            raise ValueError(f"sub_vp needs 0 < beta_min <= beta_max, got beta_min={beta_min}, beta_max={beta_max}.")
        self.beta_min, self.beta_max = beta_min, beta_max

    def curve(self, t: Tensor) -> Coefficients:
        rise = self.beta_max - self.beta_min
        integral, beta = t * (self.beta_min + 0.5 * rise * t), self.beta_min + rise * t
        alpha = torch.exp(-0.5 * integral)
        return alpha, -torch.expm1(-integral), -0.5 * beta * alpha, beta * alpha**2

    def curve_time(self, log_snr: Tensor) -> Tensor:
        alpha, sigma = self.family.pair(log_snr)
        # -ln alpha^2 from whichever of the two is not close to 1.
        integral = torch.where(sigma < 0.5, -torch.log1p(-sigma), -2 * torch.log(alpha))
        total = 0.5 * (self.beta_min + self.beta_max)
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral) ** 0.5
        return torch.where(integral < total, (2 * integral / (self.beta_min + root)).clamp(0, 1), 1.0)


class SNRSigmoid(Modifiable):
    r"""alpha squared on a stretch of a logistic curve, from 1 down to ``gamma_min``.

    .. math:: \alpha^2 = \gamma_{min} + (1 - \gamma_{min})
              \frac{S(e/\tau) - S((s + t (e - s))/\tau)}{S(e/\tau) - S(s/\tau)}, \qquad S = \mathrm{sigmoid}

    with s, e the ``start`` and ``end``. The papers clip alpha squared at 1e-9 instead of ending there, which is the
    same to within 1e-9 and has no inverse.

    Source: Jabri et al. 2022 (arXiv 2212.11972), section 3; Chen 2023 (arXiv 2301.10972), section 2.
    When: high resolutions, with ``tau`` above 1 or ``input_scale`` below 1 for more noise.

    Args:
        start: left end of the stretch.
        end: right end of the stretch.
        tau: temperature: the smaller, the steeper.
        gamma_min: alpha squared at t = 1.
        modifiers: of every schedule, see :class:`Modifiable`.

    Raises:
        ValueError: unless start < end, tau > 0, (end - start)/tau <= 150 and 0 < gamma_min < 1.
    """

    family = VariancePreserving()

    def __init__(
        self,
        *,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
        gamma_min: float = 1e-9,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        super().__init__(**modifiers)
        if not (start < end and tau > 0 and (end - start) / tau <= 150):
            raise ValueError(
                f"snr_sigmoid needs start < end and tau > 0 with (end - start)/tau at most 150, got start={start}, "
                f"end={end}, tau={tau}."
            )
        if not 0 < gamma_min < 1:
            raise ValueError(
                f"scheduler.gamma_min={gamma_min} must lie in (0, 1): for no signal at t = 1 set "
                "scheduler.zero_terminal_snr=true."
            )
        self.start, self.end, self.tau, self.gamma_min = start, end, tau, gamma_min
        self._low, self._width = start / tau, (end - start) / tau

    def curve(self, t: Tensor) -> Coefficients:
        # S(a) - S(b) = sinh((a - b)/2) / (2 cosh(a/2) cosh(b/2)) gives both 1 - gamma and gamma without cancellation.
        half = 0.5 * self._width
        low, high = math.cosh(0.5 * self._low), math.cosh(0.5 * (self._low + self._width))
        here = math.sinh(half) * torch.cosh(0.5 * (self._low + t * self._width))
        kept = 1 - self.gamma_min
        gamma = self.gamma_min + kept * torch.sinh((1 - t) * half) * (low / here)
        variance = kept * torch.sinh(t * half) * (high / here)
        d_gamma = -kept * half * low * high * math.sinh(half) / here**2
        alpha, sigma = gamma.sqrt(), variance.sqrt()
        return alpha, sigma, 0.5 * d_gamma / alpha, -0.5 * d_gamma / sigma

    def curve_time(self, log_snr: Tensor) -> Tensor:
        half = 0.5 * self._width
        low, high = math.cosh(0.5 * self._low), math.cosh(0.5 * (self._low + self._width))
        # The odds (1 - gamma)/gamma of the stretch itself, then t from sinh(t h) / sinh((1 - t) h) = e^odds.
        stretch = (torch.sigmoid(log_snr) - self.gamma_min).clamp(min=0)
        odds = (logsigmoid(-log_snr) - torch.log(stretch) + math.log(low / high)).clamp(-1e3, 1e3)
        zero = torch.zeros_like(odds)
        t = (torch.logaddexp(odds + half, zero) - torch.logaddexp(odds - half, zero)) / self._width
        return t.clamp(0, 1)


class ContinuousCosine(Modifiable):
    r"""The cosine schedule in continuous time, between two log-SNRs.

    .. math:: \lambda(t) = -2 \ln \tan(a_0 + t (a_1 - a_0)), \qquad
              \alpha = \cos(a_0 + t (a_1 - a_0)), \quad \sigma = \sin(a_0 + t (a_1 - a_0))

    where a0 and a1 are the angles of ``max_log_snr`` and ``min_log_snr``.

    Source: Hoogeboom et al. 2023 (arXiv 2301.11093), sections 2 and 3.1; Salimans & Ho 2022 (arXiv 2202.00512).
    When: objective=v in continuous time, with ``shift`` set to the image size over 64 (simple diffusion).

    Raises:
        ValueError: unless min_log_snr < max_log_snr, both finite.
    """

    family = VariancePreserving()

    def __init__(
        self, *, min_log_snr: float = -15.0, max_log_snr: float = 15.0, **modifiers: Unpack[Modifiers]
    ) -> None:
        super().__init__(**modifiers)
        if not -math.inf < min_log_snr < max_log_snr < math.inf:
            raise ValueError(
                f"cosine_continuous needs finite min_log_snr < max_log_snr, got {min_log_snr} and {max_log_snr}: "
                "for no signal at t = 1 set scheduler.zero_terminal_snr=true."
            )
        self.min_log_snr, self.max_log_snr = min_log_snr, max_log_snr
        # Angles of sigma at t = 0 and of alpha at t = 1: both are small, and neither is found by subtraction.
        self._first, self._last = math.atan(math.exp(-0.5 * max_log_snr)), math.atan(math.exp(0.5 * min_log_snr))
        self._span = 0.5 * math.pi - self._first - self._last

    def curve(self, t: Tensor) -> Coefficients:
        alpha, sigma = torch.sin(self._last + (1 - t) * self._span), torch.sin(self._first + t * self._span)
        return alpha, sigma, -self._span * sigma, self._span * alpha

    def curve_time(self, log_snr: Tensor) -> Tensor:
        return ((torch.atan(torch.exp(-0.5 * log_snr)) - self._first) / self._span).clamp(0, 1)


class Laplace(Modifiable):
    r"""log-SNR is the falling quantile function of a Laplace law, so that uniform times dwell around its centre.

    .. math:: \lambda(t) = \mu - b\, \mathrm{sgn}(\tfrac12 - u) \ln(1 - 2 |u - \tfrac12|), \qquad
              u = \delta + (1 - 2 \delta) t, \quad \delta = \tfrac12 e^{-\mathrm{limit}/b}

    cut at ``limit`` to either side of mu, where the paper's is infinite. Both tails are steep in t, and low
    noise is all within the first thousandth: sample on sampler/grid=karras.

    Source: Hang & Gu 2024 (arXiv 2407.03297).
    When: training should spend its steps around log-SNR = mu, with no weighting beside it.

    Args:
        mu: centre of the law.
        b: its scale.
        limit: largest distance of log-SNR from mu.
        modifiers: of every schedule, see :class:`Modifiable`.

    Raises:
        ValueError: a mu that is not finite, a b or limit that is not positive, or a limit above 60 b.
    """

    family = VariancePreserving()

    def __init__(self, *, mu: float = 0.0, b: float = 0.5, limit: float = 15.0, **modifiers: Unpack[Modifiers]) -> None:
        super().__init__(**modifiers)
        if not (math.isfinite(mu) and b > 0 and 0 < limit <= 60 * b):
            raise ValueError(
                f"laplace needs a finite mu, b > 0 and 0 < limit <= 60 b, got mu={mu}, b={b}, limit={limit}: beyond, "
                "float32 times cannot tell its tails apart."
            )
        self.mu, self.b, self.limit = mu, b, limit
        self._tail = 0.5 * math.exp(-limit / b)

    def curve(self, t: Tensor) -> Coefficients:
        inner = 1 - 2 * self._tail
        # Distances of u from 0 and from 1, each exact at its own end.
        below, above = self._tail + inner * t, self._tail + inner * (1 - t)
        nearer = torch.minimum(below, above)
        side = torch.where(below < above, self.b, -self.b)
        return variance_preserving_at(self.mu - side * torch.log(2 * nearer), -self.b * inner / nearer)

    def curve_time(self, log_snr: Tensor) -> Tensor:
        distance = log_snr - self.mu
        nearer = 0.5 * torch.exp(-distance.abs() / self.b)
        from_end = ((nearer - self._tail) / (1 - 2 * self._tail)).clamp(min=0)
        return torch.where(distance >= 0, from_end, 1 - from_end)
