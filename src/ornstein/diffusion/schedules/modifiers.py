"""Options that every schedule has: resolution shift, zero terminal SNR, input scale."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, TypedDict

import torch
from torch import Tensor

from ornstein.diffusion.schedules.base import NoiseSchedule, at_least_float32
from ornstein.diffusion.schedules.families import Coefficients, Fading, Family, VariancePreserving


class Scaling(TypedDict, total=False):
    """The options that scale noise against signal."""

    shift: float
    input_scale: float


class Modifiers(Scaling, total=False):
    """The options of every schedule, in a subclass's ``**modifiers``."""

    zero_terminal_snr: bool


class Modifiable(NoiseSchedule):
    r"""A schedule with a resolution shift, a zero-terminal-SNR rescale and an input scale, all neutral unless given.

    Subclasses give the unmodified ``curve`` with its inverse ``curve_time``, and name their ``family``. The rescale
    comes first, the scaling last:

    .. math::
        \alpha \mapsto \alpha(0) \frac{\alpha - \alpha(1)}{\alpha(0) - \alpha(1)}, \qquad
        \lambda \mapsto \lambda - 2 \ln(\mathrm{shift} / \mathrm{input\_scale})

    Both stay on the family's curve (alpha**2 + sigma**2 = 1, alpha + sigma = 1, ...), so that ``variance_preserving``
    holds, x is clean data at t = 0 where it was before, and only what the schedule ends at changes.

    Args:
        shift: ratio of noise to signal against the unmodified schedule; on flow this is
            :math:`t \mapsto s t / (1 + (s - 1) t)`. Source: Hoogeboom et al. 2023 (arXiv 2301.11093), section 3.1;
            Esser et al. 2024 (arXiv 2403.03206), eq. 23.
        zero_terminal_snr: rescale alpha linearly so that it ends at exactly 0. Source: Lin et al. 2023 (arXiv
            2305.08891), algorithm 1, on the table of a :class:`BetaSchedule` and from t = 0 elsewhere.
        input_scale: scale b of the data before noise is added, with x normalised again afterwards. Since only the
            ratio of the two matters once x is normalised, ``input_scale=b`` is ``shift=1/b``, and below 1 it means
            more noise. Source: Chen 2023 (arXiv 2301.10972), section 2.

    Raises:
        ValueError: a shift or input_scale that is not positive and finite, or zero_terminal_snr where alpha is always
            1 (ve, edm).
    """

    family: ClassVar[Family]

    def __init__(self, *, shift: float = 1.0, zero_terminal_snr: bool = False, input_scale: float = 1.0) -> None:
        super().__init__()
        for name, value in (("shift", shift), ("input_scale", input_scale)):
            if not 0 < value < math.inf:
                raise ValueError(
                    f"scheduler.{name}={value} must be positive and finite: 1 leaves the schedule as it is."
                )
        already = self.zero_terminal_snr
        if zero_terminal_snr and not already and not isinstance(self.family, Fading):
            raise ValueError(
                f"scheduler.zero_terminal_snr=true has no meaning on {type(self).__name__}, whose signal never fades "
                "(alpha = 1): raise sigma_max for more noise, or choose scheduler=linear, cosine, flow or sub_vp."
            )
        self.shift, self.input_scale = float(shift), float(input_scale)
        self._noise_factor = self.shift / self.input_scale
        self._rescaled = bool(zero_terminal_snr) and not already
        self.zero_terminal_snr = already or self._rescaled
        self.variance_preserving = isinstance(self.family, VariancePreserving)

    @abstractmethod
    def curve(self, t: Tensor) -> Coefficients:
        """The unmodified :meth:`coefficients`."""

    @abstractmethod
    def curve_time(self, log_snr: Tensor) -> Tensor:
        """The inverse of the unmodified log-SNR, at float32 or float64 values, clamped to [0, 1]."""

    def coefficients(self, t: Tensor) -> Coefficients:
        values = self.curve(t)
        if self._rescaled:
            values = self._to_zero(values, t)
        if self._noise_factor != 1.0:
            values = self.family.scale_noise(values, self._noise_factor)
        return values

    def time(self, log_snr: Tensor) -> Tensor:
        log_snr = at_least_float32(log_snr)
        if self._noise_factor != 1.0:
            log_snr = log_snr + 2 * math.log(self._noise_factor)
        if self._rescaled:
            log_snr = self._before_zero(log_snr)
        return self.curve_time(log_snr)

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha(0), alpha(1), 1 - alpha(0)) of the unmodified curve; a linspace, so that no value crosses devices."""
        assert isinstance(self.family, Fading)
        alpha, sigma, _, _ = self.curve(torch.linspace(0, 1, 2, dtype=like.dtype, device=like.device))
        return alpha[0], alpha[1], self.family.gap(alpha[0], sigma[0])

    def _to_zero(self, values: Coefficients, t: Tensor) -> Coefficients:
        assert isinstance(self.family, Fading)
        alpha, sigma, d_alpha, _ = values
        first, last, first_gap = self._ends(alpha)
        # Two evaluations of the same curve may differ in their last bit: the end is 0, not nearly.
        kept = torch.where(t >= 1, 0.0, alpha - last)
        rescaled = first * (kept / (first - last))
        gap = (first * self.family.gap(alpha, sigma) - last * first_gap) / (first - last)
        d_alpha = first / (first - last) * d_alpha
        sigma = self.family.sigma_at(rescaled, gap)
        return rescaled, sigma, d_alpha, self.family.d_sigma_at(rescaled, sigma, d_alpha)

    def _before_zero(self, log_snr: Tensor) -> Tensor:
        assert isinstance(self.family, Fading)
        rescaled, sigma = self.family.pair(log_snr)
        first, last, first_gap = self._ends(rescaled)
        alpha = last + rescaled * ((first - last) / first)
        gap = (self.family.gap(rescaled, sigma) * (first - last) + last * first_gap) / first
        before = 2 * (torch.log(alpha) - torch.log(self.family.sigma_at(alpha, gap)))
        # No signal is t = 1 exactly, not up to the rounding of the level before the rescale.
        return torch.where(log_snr == -torch.inf, log_snr, before)


def variance_preserving_at(log_snr: Tensor, d_log_snr: Tensor) -> Coefficients:
    """Variance-preserving coefficients at a log-SNR with its derivative."""
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    return alpha, sigma, 0.5 * alpha * sigma**2 * d_log_snr, -0.5 * sigma * alpha**2 * d_log_snr
