"""A schedule that is trained with the model."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ornstein.diffusion.schedules.families import Coefficients, VariancePreserving
from ornstein.diffusion.schedules.modifiers import Modifiable, Modifiers, variance_preserving_at

_STEEPNESS = 10.0  # of the hidden units at first: each spans about a third of [0, 1]
_VALUES_AT_ONCE = 2**22  # hidden values: 32 MiB in float64, whatever the number of times
_HALVINGS = 20  # of [0, 1], to where Newton's method doubles its digits at every step
_NEWTON_STEPS = 4


class VDMLearned(Modifiable):
    r"""log-SNR is a monotone network of t, trained with the model.

    .. math::
        \lambda(t) = \lambda_{max} - (\lambda_{max} - \lambda_{min})
        \frac{\tilde\gamma(t) - \tilde\gamma(0)}{\tilde\gamma(1) - \tilde\gamma(0)}, \qquad
        \tilde\gamma(t) = l_1(t) + l_3(\mathrm{sigmoid}(l_2(l_1(t))))

    with three linear layers whose weights are positive (here by softplus), the middle one of ``hidden`` units. Starts
    close to a straight line, and with ``learn_ends`` the two ends are parameters too. Only the variational bound makes
    its ends comparable from one schedule to another: under a simple loss it learns whatever noise is easiest.

    Source: Kingma et al. 2021 (arXiv 2107.00630), section 3.2 and appendix H.
    When: likelihoods, with objective=vlb.

    Args:
        min_log_snr: log-SNR at t = 1, at first.
        max_log_snr: log-SNR at t = 0, at first.
        hidden: units of the middle layer.
        learn_ends: train the two ends with the rest.
        modifiers: of every schedule, see :class:`Modifiable`.

    Raises:
        ValueError: unless min_log_snr < max_log_snr, both finite, and hidden is at least 1.
    """

    family = VariancePreserving()

    def __init__(
        self,
        *,
        min_log_snr: float = -5.0,
        max_log_snr: float = 13.3,
        hidden: int = 1024,
        learn_ends: bool = True,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        super().__init__(**modifiers)
        if not -math.inf < min_log_snr < max_log_snr < math.inf:
            raise ValueError(
                f"vdm_learned needs finite min_log_snr < max_log_snr, got {min_log_snr} and {max_log_snr}."
            )
        if hidden < 1:
            raise ValueError(f"scheduler.hidden={hidden} must be at least 1.")
        # Steps of the network spread evenly over [0, 1]. No draw of random numbers: a run's other weights stay as
        # they would be with another schedule.
        centres = (torch.arange(hidden) + 0.5) / hidden
        self.first_weight = nn.Parameter(_before_softplus(torch.ones(())))
        self.first_bias = nn.Parameter(torch.zeros(()))
        self.middle_weight = nn.Parameter(_before_softplus(torch.full((hidden,), _STEEPNESS)))
        self.middle_bias = nn.Parameter(-_STEEPNESS * centres)
        self.last_weight = nn.Parameter(_before_softplus(torch.full((hidden,), 1 / hidden)))
        self.max_log_snr, self.min_log_snr = float(max_log_snr), float(min_log_snr)
        # Offsets from what was asked for, at first met exactly; a softplus keeps the ends from changing places.
        self.top = nn.Parameter(torch.zeros(()), requires_grad=learn_ends)
        self.span = nn.Parameter(torch.zeros(()), requires_grad=learn_ends)

    def curve(self, t: Tensor) -> Coefficients:
        log_snr, d_log_snr = self._log_snr(t)
        return variance_preserving_at(log_snr, d_log_snr)

    def _log_snr(self, t: Tensor) -> tuple[Tensor, Tensor]:
        ends, _ = self._network(torch.linspace(0, 1, 2, dtype=t.dtype, device=t.device))
        height = ends[1] - ends[0]
        value, slope = self._network(t)
        # The same network may round differently alone and in a batch: the ends are exact, not nearly.
        fraction = torch.where(t <= 0, 0.0, torch.where(t >= 1, 1.0, (value - ends[0]) / height))
        stretch = softplus(self.span.to(t)) / math.log(2)
        top, span = self.max_log_snr + self.top.to(t), (self.max_log_snr - self.min_log_snr) * stretch
        return top - span * fraction, -span * slope / height

    def _network(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The unnormalised network and its derivative, same shape as t; parameters follow t's device and dtype."""
        first, middle, last = (softplus(w.to(t)) for w in (self.first_weight, self.middle_weight, self.last_weight))
        first_bias, middle_bias = self.first_bias.to(t), self.middle_bias.to(t)
        values, slopes = [], []
        for part in t.reshape(-1).split(max(1, _VALUES_AT_ONCE // middle.numel())):
            inner = first * part + first_bias
            hidden = torch.sigmoid(inner[:, None] * middle + middle_bias)
            values.append(inner + hidden @ last)
            slopes.append(first * (1 + (hidden * (1 - hidden)) @ (middle * last)))
        return torch.cat(values).reshape(t.shape), torch.cat(slopes).reshape(t.shape)

    @torch.no_grad()
    def curve_time(self, log_snr: Tensor) -> Tensor:
        """The inverse by bisection in float64, polished by Newton's method; it has no gradient."""
        wanted = log_snr.double()
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            above = self._log_snr(middle)[0] > wanted
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        t = 0.5 * (low + high)
        for _ in range(_NEWTON_STEPS):
            value, slope = self._log_snr(t)
            t = torch.clamp(t - (value - wanted) / slope, low, high)
        most, least = self._log_snr(torch.linspace(0, 1, 2, dtype=wanted.dtype, device=wanted.device))[0]
        t = torch.where(wanted >= most, 0.0, torch.where(wanted <= least, 1.0, t))
        return t.to(log_snr.dtype)


def _before_softplus(value: Tensor) -> Tensor:
    """The inverse of softplus at positive values."""
    return value + torch.log(-torch.expm1(-value))
