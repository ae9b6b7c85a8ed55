r"""Noise schedules: :math:`x_t = \alpha(t) x_0 + \sigma(t) \epsilon`, with t in [0, 1], 0 data and 1 noise.

Every schedule meets every other in one coordinate, :math:`\lambda(t) = 2 \ln(\alpha / \sigma)`, the log-SNR
(Kingma et al. 2021, arXiv 2107.00630). Coefficients are computed in float64 where the input is float64 or a Python
number, otherwise in float32 at least; half-precision times are refused nowhere and never stay half precision.
"""

from __future__ import annotations

import math
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
    (arXiv 2107.00630, appendix A.2, eqs. 25-32). Finite at both ends: alpha_t = 0 and sigma_s = 0 are allowed.
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
        return self.coefficients(_at_least_float32(t))[0]

    def sigma(self, t: Scalar) -> Tensor:
        """Noise scale at ``t``, same shape."""
        return self.coefficients(_at_least_float32(t))[1]

    def log_snr(self, t: Scalar) -> Tensor:
        """2 ln(alpha / sigma) at ``t``, same shape; +inf where sigma = 0, -inf where alpha = 0."""
        alpha, sigma, _, _ = self.coefficients(_at_least_float32(t))
        return 2 * (torch.log(alpha) - torch.log(sigma))

    def d_log_snr(self, t: Scalar) -> Tensor:
        """Derivative of :meth:`log_snr` with respect to t (never positive), same shape."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(_at_least_float32(t))
        return 2 * (d_alpha / alpha - d_sigma / sigma)

    def log_snr_range(self) -> tuple[float, float]:
        """(log-SNR at t = 1, log-SNR at t = 0); either end may be infinite."""
        ends = self.log_snr(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
        return ends[0], ends[1]

    def level(self, t: Scalar, ndim: int | None = None) -> Level:
        """The noise level at ``t``.

        Args:
            t: a number in [0, 1] (gives Python floats, computed in float64), or a tensor.
            ndim: for a (B,) tensor, the number of dimensions of x to broadcast against.

        Raises:
            ValueError: a number outside [0, 1].
        """
        if not isinstance(t, Tensor):
            if not 0.0 <= t <= 1.0:
                raise ValueError(f"time {t} is outside [0, 1], where 0 is data and 1 is noise.")
            values = self.coefficients(torch.tensor(t, dtype=torch.float64))
            return Level(float(t), *(float(value) for value in values))
        t = _at_least_float32(t)
        if ndim is not None:
            t = t.reshape(t.shape + (1,) * (ndim - t.ndim))
        return Level(t, *self.coefficients(t))

    def levels(self, times: Tensor) -> tuple[Level, ...]:
        """The levels of a grid (N,) of times as Python floats: computed once, so that a sampler's loop never waits."""
        times = times.double().cpu()
        rows = torch.stack([times, *self.coefficients(times)], dim=-1).tolist()
        return tuple(Level(*row) for row in rows)

    def perturb(self, x0: Tensor, eps: Tensor, t: Scalar | Level) -> Tensor:
        """alpha(t) x0 + sigma(t) eps, for x0 and eps of shape (B, *shape) and t a number, a (B,) tensor or a level."""
        level = t if isinstance(t, Level) else self.level(t, x0.ndim)
        return level.alpha * x0 + level.sigma * eps

    def transition(self, t: Scalar, s: Scalar) -> Transition:
        """The kernels q(x_t | x_s) and q(x_s | x_t, x0) for s < t, in float64."""
        t64, s64 = (torch.as_tensor(v, dtype=torch.float64) for v in (t, s))
        return transition_between(self.level(t64), self.level(s64))


def _at_least_float32(t: Scalar) -> Tensor:
    if not isinstance(t, Tensor):
        return torch.tensor(t, dtype=torch.float64)
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


class BetaSchedule(NoiseSchedule):
    r"""A discrete table of betas made continuous: exact at t = (i + 1)/T, ln alpha_bar linear in t between.

    :math:`\bar\alpha_i = \prod_{j \le i} (1 - \beta_j)`, alpha = sqrt(alpha_bar) (Ho et al. 2020, arXiv 2006.11239,
    eq. 4). Between grid points ln alpha_bar is linear, so its kinks cost integrators in t their order: integrate in
    log-SNR instead.

    Args:
        betas: (T,) float64, each in (0, 1).

    Raises:
        ValueError: a table that is empty or has values outside (0, 1).
    """

    variance_preserving = True

    def __init__(self, betas: Tensor) -> None:
        super().__init__()
        betas = betas.double()
        if betas.ndim != 1 or betas.numel() == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("a beta table must be one-dimensional with every beta in (0, 1): check the end points.")
        table = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)])
        # Not buffers: a module cast to half precision would round the table.
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {(table.device, table.dtype): table}
        self.num_timesteps = betas.numel()

    def _log_alpha_bar_table(self, like: Tensor) -> Tensor:
        key = (like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = next(iter(self._tables.values())).to(device=like.device, dtype=like.dtype)
        return self._tables[key]

    def alphas_cumprod(self) -> Tensor:
        """alpha_bar at the T grid points t = (i + 1)/T, (T,) float64."""
        return next(iter(self._tables.values()))[1:].exp()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        table = self._log_alpha_bar_table(t)
        position = t * self.num_timesteps
        # A grid point belongs to the cell on its left, whose beta it is, also when t was rounded to float32:
        # at a kink, slopes left and right differ up to fivefold (cosine's last).
        slack = 4 * torch.finfo(t.dtype).eps * self.num_timesteps
        cell = (position - slack).ceil().sub(1).clamp(0, self.num_timesteps - 1).long()
        left = table[cell]
        slope = table[cell + 1] - left
        log_alpha_bar = left + (position - cell).clamp(max=1) * slope
        d_log_alpha_bar = slope * self.num_timesteps
        alpha = torch.exp(0.5 * log_alpha_bar)
        sigma = torch.sqrt(-torch.expm1(log_alpha_bar))
        return alpha, sigma, 0.5 * d_log_alpha_bar * alpha, -0.5 * d_log_alpha_bar * alpha**2 / sigma

    def time(self, log_snr: Tensor) -> Tensor:
        log_snr = _at_least_float32(log_snr)
        table = self._log_alpha_bar_table(log_snr)
        log_alpha_bar = -torch.nn.functional.softplus(-log_snr, threshold=torch.inf).clamp(max=-table[-1])
        # The table falls, so search its negative, which rises.
        cell = torch.searchsorted(-table, -log_alpha_bar.contiguous(), right=True).sub(1)
        cell = cell.clamp(0, self.num_timesteps - 1)
        left, right = table[cell], table[cell + 1]
        return (cell + (log_alpha_bar - left) / (right - left)) / self.num_timesteps


def _check_betas(beta_start: float, beta_end: float, num_timesteps: int) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}.")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps={num_timesteps} must be at least 1.")


class Linear(BetaSchedule):
    """Betas linear from ``beta_start`` to ``beta_end`` over T steps. Source: Ho et al. 2020, section 4."""

    def __init__(self, *, beta_start: float = 1e-4, beta_end: float = 0.02, num_timesteps: int = 1000) -> None:
        _check_betas(beta_start, beta_end, num_timesteps)
        super().__init__(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))


class Quadratic(BetaSchedule):
    r"""The two published quadratic tables.

    ``form="sqrt_linear"``: squares of linearly spaced square roots (Song et al. 2021, arXiv 2010.02502, and diffusers'
    ``scaled_linear``). ``form="squared_time"``:
    :math:`\beta_i = \beta_{start} + (\beta_{end} - \beta_{start}) (i/(T-1))^2`.

    Raises:
        ValueError: an unknown form, or betas that do not satisfy 0 < beta_start <= beta_end < 1.
    """

    def __init__(
        self,
        *,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_timesteps: int = 1000,
        form: str = "sqrt_linear",
    ) -> None:
        _check_betas(beta_start, beta_end, num_timesteps)
        ramp = torch.linspace(0, 1, num_timesteps, dtype=torch.float64)
        if form == "sqrt_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
        elif form == "squared_time":
            betas = beta_start + (beta_end - beta_start) * ramp**2
        else:
            raise ValueError(f"quadratic form {form!r} is unknown: choose sqrt_linear or squared_time.")
        super().__init__(betas)


class Sigmoid(BetaSchedule):
    """Betas on a logistic curve over [-6, 6], as GeoDiff (Xu et al. 2022, arXiv 2203.02923) and diffusers have it."""

    def __init__(self, *, beta_start: float = 1e-4, beta_end: float = 0.02, num_timesteps: int = 1000) -> None:
        _check_betas(beta_start, beta_end, num_timesteps)
        ramp = torch.linspace(-6, 6, num_timesteps, dtype=torch.float64)
        super().__init__(torch.sigmoid(ramp) * (beta_end - beta_start) + beta_start)


class Cosine(BetaSchedule):
    r"""alpha_bar on a squared cosine, betas capped. Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17.

    :math:`f(u) = \cos^2\left(\frac{u + s}{1 + s} \frac{\pi}{2}\right)`, beta_i = 1 - f((i+1)/T)/f(i/T) up to
    ``max_beta``, which keeps the terminal SNR above zero.
    """

    def __init__(self, *, offset: float = 0.008, max_beta: float = 0.999, num_timesteps: int = 1000) -> None:
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps={num_timesteps} must be at least 1.")
        u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        f = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        super().__init__((1 - f[1:] / f[:-1]).clamp(max=max_beta))


class Flow(NoiseSchedule):
    """Rectified flow: alpha = 1 - t, sigma = t. Zero SNR at t = 1, so eps cannot be predicted there.

    Source: Liu et al. 2023 (arXiv 2209.03003), eq. 1; Lipman et al. 2023 (arXiv 2210.02747).
    """

    zero_terminal_snr = True

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(t)
        return 1 - t, t, -one, one

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * _at_least_float32(log_snr))


class EDM(NoiseSchedule):
    r"""Variance exploding, alpha = 1: sigma runs over [sigma_min, sigma_max] along EDM's rho-warped ramp.

    :math:`\sigma(t) = (\sigma_{min}^{1/\rho} + t (\sigma_{max}^{1/\rho} - \sigma_{min}^{1/\rho}))^\rho`, so that a
    grid uniform in t is the paper's grid. Source: Karras et al. 2022 (arXiv 2206.00364), eq. 5 and table 1.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and rho > 0.
    """

    def __init__(self, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        super().__init__()
        if not (0 < sigma_min < sigma_max and rho > 0):
            raise ValueError(
                f"edm needs 0 < sigma_min < sigma_max and rho > 0, got sigma_min={sigma_min}, "
                f"sigma_max={sigma_max}, rho={rho}."
            )
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self._low = sigma_min ** (1 / rho)
        self._span = sigma_max ** (1 / rho) - self._low

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        root = self._low + t * self._span
        sigma = root**self.rho
        return torch.ones_like(t), sigma, torch.zeros_like(t), self.rho * self._span * sigma / root

    def time(self, log_snr: Tensor) -> Tensor:
        sigma = torch.exp(-0.5 * _at_least_float32(log_snr)).clamp(self.sigma_min, self.sigma_max)
        return ((sigma ** (1 / self.rho) - self._low) / self._span).clamp(0, 1)
