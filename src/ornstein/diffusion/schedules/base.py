"""What a schedule is: levels, the kernels between them, and the contract that every schedule meets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

Scalar = float | Tensor


class Level(NamedTuple):
    """A noise level: a time with its coefficients, as Python floats (one level for a whole batch) or as tensors.

    ``d_alpha`` and ``d_sigma`` are derivatives with respect to t. Tensors have a shape that broadcasts against x.
    """

    t: Scalar
    alpha: Scalar
    sigma: Scalar
    d_alpha: Scalar
    d_sigma: Scalar

    def repeat(self, times: int) -> Level:
        """The level of a batch concatenated ``times`` times; one level for the whole batch stays as it is."""
        return Level(*(torch.cat([v] * times) if _per_sample(v) else v for v in self))

    def chunk(self, parts: int) -> list[Level]:
        """Undoes :meth:`repeat`."""
        columns = [v.chunk(parts) if _per_sample(v) else [v] * parts for v in self]
        return [Level(*row) for row in zip(*columns, strict=True)]


def _per_sample(value: Scalar) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] > 1


class Transition(NamedTuple):
    r"""Gaussian kernels between two levels s < t.

    Forward: :math:`q(x_t | x_s) = N(\text{forward\_scale}\, x_s, \text{forward\_variance})`.
    Posterior: :math:`q(x_s | x_t, x_0) = N(\text{on\_x\_t}\, x_t + \text{on\_x0}\, x_0, \text{variance})`.
    """

    forward_scale: Scalar
    forward_variance: Scalar
    on_x_t: Scalar
    on_x0: Scalar
    variance: Scalar


def transition_between(t: Level, s: Level) -> Transition:
    r"""The kernels between level t and a less noisy level s, both as floats or both as tensors.

    :math:`\sigma_{t|s}^2 = \sigma_t^2 (1 - \mathrm{SNR}_t/\mathrm{SNR}_s)` and the posterior of Kingma et al. 2021
    (arXiv 2107.00630, appendix A, eqs. 23-32). Finite at both ends: alpha_t = 0 and sigma_s = 0 are allowed.
    """
    scale = t.alpha / s.alpha
    kept = (scale * s.sigma / t.sigma) ** 2
    forward_variance = t.sigma**2 * (1 - kept)
    return Transition(
        forward_scale=scale,
        forward_variance=forward_variance,
        on_x_t=scale * (s.sigma / t.sigma) ** 2,
        on_x0=s.alpha * (1 - kept),
        variance=s.sigma**2 * (1 - kept),
    )


class NoiseSchedule(nn.Module, ABC):
    """Maps t in [0, 1] to signal and noise scales. Subclasses give ``coefficients`` and ``time``.

    The package's own schedules derive from :class:`~ornstein.diffusion.schedules.Modifiable`, which adds the options
    ``shift``, ``zero_terminal_snr`` and ``input_scale``.

    Attributes:
        zero_terminal_snr: alpha(1) is exactly 0, where eps and score predictions cannot give x0.
        variance_preserving: alpha**2 + sigma**2 = 1.
    """

    zero_terminal_snr: bool = False
    variance_preserving: bool = False

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha, sigma, d alpha/dt, d sigma/dt) at ``t``, a float32 or float64 tensor of any shape."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """The inverse of :meth:`log_snr`; values outside the schedule's range are clamped to its ends."""

    def alpha(self, t: Scalar) -> Tensor:
        """Signal scale at ``t``, same shape."""
        return self._at(t)[0]

    def sigma(self, t: Scalar) -> Tensor:
        """Noise scale at ``t``, same shape."""
        return self._at(t)[1]

    def log_snr(self, t: Scalar) -> Tensor:
        """2 ln(alpha / sigma) at ``t``, same shape; +inf where sigma = 0, -inf where alpha = 0."""
        alpha, sigma, _, _ = self._at(t)
        return log_snr_of(alpha, sigma)

    def d_log_snr(self, t: Scalar) -> Tensor:
        """Derivative of :meth:`log_snr` with respect to t (never positive), same shape."""
        alpha, sigma, d_alpha, d_sigma = self._at(t)
        return 2 * (d_alpha / alpha - d_sigma / sigma)

    @torch.no_grad()
    def log_snr_range(self) -> tuple[float, float]:
        """(log-SNR at t = 1, log-SNR at t = 0); either end may be infinite."""
        ends = self.log_snr(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
        return ends[0], ends[1]

    def level(self, t: Scalar, ndim: int | None = None) -> Level:
        """The noise level at ``t``.

        Args:
            t: a number in [0, 1] (gives Python floats, computed in float64 and without gradients), or a tensor, which
                carries the gradients of a learned schedule.
            ndim: for a (B,) tensor, the number of dimensions of x to broadcast against.

        Raises:
            ValueError: a number outside [0, 1].
        """
        if not isinstance(t, Tensor):
            if not 0.0 <= t <= 1.0:
                raise ValueError(f"time {t} is outside [0, 1], where 0 is data and 1 is noise.")
            return Level(float(t), *(float(value) for value in self._at(t)))
        t = at_least_float32(t)
        if ndim is not None:
            t = t.reshape(t.shape + (1,) * (ndim - t.ndim))
        return Level(t, *self.coefficients(t))

    @torch.no_grad()
    def levels(self, times: Tensor) -> tuple[Level, ...]:
        """The levels of a grid (N,) of times as Python floats: computed once, so that a sampler's loop never waits."""
        times = times.double().cpu()
        return tuple(map(Level, *(column.tolist() for column in (times, *self.coefficients(times)))))

    def _at(self, t: Scalar) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The coefficients at ``t``; at a number without gradients, which nobody asks of one."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and isinstance(t, Tensor)):
            return self.coefficients(at_least_float32(t))

    def perturb(self, x0: Tensor, eps: Tensor, t: Scalar | Level) -> Tensor:
        """alpha(t) x0 + sigma(t) eps, for x0 and eps of shape (B, *shape) and t a number, a (B,) tensor or a level."""
        level = t if isinstance(t, Level) else self.level(t, x0.ndim)
        return level.alpha * x0 + level.sigma * eps

    def transition(self, t: Scalar, s: Scalar) -> Transition:
        """The kernels q(x_t | x_s) and q(x_s | x_t, x0) for s < t, in float64."""
        t64, s64 = (torch.as_tensor(v, dtype=torch.float64) for v in (t, s))
        return transition_between(self.level(t64), self.level(s64))


def log_snr_of(alpha: Tensor, sigma: Tensor) -> Tensor:
    """2 ln(alpha / sigma), same shape; +inf where sigma = 0, -inf where alpha = 0."""
    return 2 * (torch.log(alpha) - torch.log(sigma))


def at_least_float32(t: Scalar) -> Tensor:
    """A number as float64, half precision as float32, the rest as it is."""
    if not isinstance(t, Tensor):
        return torch.tensor(t, dtype=torch.float64)
    return t if t.dtype in (torch.float32, torch.float64) else t.float()
