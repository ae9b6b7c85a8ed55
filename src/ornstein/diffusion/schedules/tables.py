"""Discrete tables of betas, made continuous."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ornstein.diffusion.schedules.families import Coefficients, VariancePreserving
from ornstein.diffusion.schedules.modifiers import Modifiable, Modifiers, Scaling


class BetaSchedule(Modifiable):
    r"""A discrete table of betas made continuous: exact at t = (i + 1)/T, ln alpha_bar linear in t between.

    .. math:: \bar\alpha_i = \prod_{j \le i} (1 - \beta_j), \qquad \alpha = \sqrt{\bar\alpha}

    Between grid points ln alpha_bar is linear, so its kinks cost integrators in t their order: integrate in log-SNR
    instead. With ``zero_terminal_snr`` the table of alpha is moved down to end at 0 and stretched so that its first
    entry stays, and in its last cell alpha itself is linear in t, so that derivatives stay finite.

    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 4; the rescale is algorithm 1 of Lin et al. 2023 (arXiv 2305.08891).
    When: a published table of betas that no other option holds.

    Args:
        betas: (T,) float64, each in (0, 1).
        zero_terminal_snr: end at alpha = 0.
        scaling: ``shift`` and ``input_scale`` of every schedule, see :class:`Modifiable`.

    Raises:
        ValueError: a table that is empty or has values outside (0, 1), or zero_terminal_snr on fewer than two betas.
    """

    family = VariancePreserving()

    def __init__(self, betas: Tensor, *, zero_terminal_snr: bool = False, **scaling: Unpack[Scaling]) -> None:
        super().__init__(**scaling)
        betas = betas.double()
        if betas.ndim != 1 or betas.numel() == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("a beta table must be one-dimensional with every beta in (0, 1): check the end points.")
        table = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)])
        if zero_terminal_snr:
            if betas.numel() < 2:
                raise ValueError("scheduler.zero_terminal_snr=true needs num_timesteps of at least 2: one must stay.")
            table = _faded(table)
        # Not buffers: a module cast to half precision would round the table.
        self._table = table
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.num_timesteps = betas.numel()
        self.zero_terminal_snr = bool(zero_terminal_snr)

    def _log_alpha_bar_table(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The table of ln alpha_bar at i/T, (T + 1,), and its steps (T,); with zero terminal SNR the last entry repeats
        the one before.
        """
        key = (like.device, like.dtype)
        if key not in self._tables:
            table = self._table.to(device=like.device, dtype=like.dtype)
            self._tables[key] = (table, table.diff())
        return self._tables[key]

    def alphas_cumprod(self) -> Tensor:
        """alpha_bar at the T grid points t = (i + 1)/T, (T,) float64."""
        table = self._table
        if not self.zero_terminal_snr and self._noise_factor == 1.0:
            return table[1:].exp()
        steps = torch.arange(1, self.num_timesteps + 1, dtype=torch.float64, device=table.device)
        return self.coefficients(steps / self.num_timesteps)[0] ** 2

    def curve(self, t: Tensor) -> Coefficients:
        table, slopes = self._log_alpha_bar_table(t)
        position = t * self.num_timesteps
        # A grid point belongs to the cell on its left, whose beta it is, also when t was rounded to float32:
        # at a kink, slopes left and right differ up to fivefold (cosine's last).
        slack = 4 * torch.finfo(t.dtype).eps * self.num_timesteps
        cell = (position - (1 + slack)).ceil().clamp(0, self.num_timesteps - 1)
        index = cell.long()
        left, slope = table.take(index), slopes.take(index)
        log_alpha_bar = torch.addcmul(left, (position - cell).clamp(max=1), slope)
        alpha = torch.exp(0.5 * log_alpha_bar)
        d_alpha = slope * (0.5 * self.num_timesteps) * alpha
        if self.zero_terminal_snr:
            return self._fading(alpha, log_alpha_bar, d_alpha, position, cell)
        sigma = torch.sqrt(-torch.expm1(log_alpha_bar))
        return alpha, sigma, d_alpha, -d_alpha * alpha / sigma

    def _fading(
        self, alpha: Tensor, log_alpha_bar: Tensor, d_alpha: Tensor, position: Tensor, cell: Tensor
    ) -> Coefficients:
        """Coefficients of a table that ends at alpha = 0: its last cell, flat in the table, falls linearly to there."""
        last = cell == self.num_timesteps - 1
        remaining = torch.where(last, (self.num_timesteps - position).clamp(0, 1), 1.0)
        d_alpha = torch.where(last, -self.num_timesteps * alpha, d_alpha)
        sigma = torch.sqrt(-torch.expm1(log_alpha_bar + 2 * torch.log(remaining)))
        alpha = alpha * remaining
        return alpha, sigma, d_alpha, -alpha * d_alpha / sigma

    def curve_time(self, log_snr: Tensor) -> Tensor:
        table, _ = self._log_alpha_bar_table(log_snr)
        cells = self.num_timesteps - 1 if self.zero_terminal_snr else self.num_timesteps
        wanted = -softplus(-log_snr, threshold=torch.inf)
        log_alpha_bar = -((-wanted).clamp(max=-table[-1]))
        # The table falls, so search its negative, which rises.
        cell = torch.searchsorted(-table, -log_alpha_bar.contiguous(), right=True).sub(1)
        cell = cell.clamp(0, cells - 1)
        left, right = table[cell], table[cell + 1]
        t = (cell + (log_alpha_bar - left) / (right - left)) / self.num_timesteps
        if self.zero_terminal_snr:
            remaining = torch.exp(0.5 * (wanted - table[-1]))
            t = torch.where(wanted < table[-1], 1 - remaining / self.num_timesteps, t)
        return t


def _faded(log_alpha_bar: Tensor) -> Tensor:
    """Algorithm 1 of Lin et al. 2023 on ln alpha_bar (T + 1,); the last entry, -inf, repeats its neighbour instead."""
    alpha = torch.exp(0.5 * log_alpha_bar[1:])
    inner = 2 * torch.log(alpha[0] * (alpha[:-1] - alpha[-1]) / (alpha[0] - alpha[-1]))
    return torch.cat([log_alpha_bar[:2], inner[1:], inner[-1:]])


def _check_betas(beta_start: float, beta_end: float, num_timesteps: int) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}.")
    _check_steps(num_timesteps)


def _check_steps(num_timesteps: int) -> None:
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps={num_timesteps} must be at least 1.")


def _betas_along(alpha_bar: Tensor, max_beta: float) -> Tensor:
    """The betas (T,) whose products follow alpha_bar (T + 1,), capped."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)


def _sqrt_linear(beta_start: float, beta_end: float, num_timesteps: int) -> Tensor:
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2


class Linear(BetaSchedule):
    r"""Betas linear from ``beta_start`` to ``beta_end`` over T steps.

    .. math:: \beta_i = \beta_{start} + (\beta_{end} - \beta_{start}) \frac{i}{T - 1}

    Source: Ho et al. 2020 (arXiv 2006.11239), section 4.
    When: a comparison with DDPM, or small images in pixels.

    Raises:
        ValueError: betas that do not satisfy 0 < beta_start <= beta_end < 1, or no steps.
    """

    def __init__(
        self,
        *,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_timesteps: int = 1000,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        _check_betas(beta_start, beta_end, num_timesteps)
        super().__init__(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64), **modifiers)


class ScaledLinear(BetaSchedule):
    r"""Betas are squares of linearly spaced square roots, between Stable Diffusion's ends.

    .. math:: \beta_i = \left(\sqrt{\beta_{start}}
              + (\sqrt{\beta_{end}} - \sqrt{\beta_{start}}) \frac{i}{T - 1}\right)^2

    The curve of :class:`Quadratic`'s ``form="sqrt_linear"``; diffusers' ``scaled_linear``.
    Source: Rombach et al. 2022 (arXiv 2112.10752), in its released configurations; the form is that of Song et al. 2021
    (arXiv 2010.02502), ``quad`` in its released code.
    When: latent diffusion, or weights that were trained as Stable Diffusion's were.

    Raises:
        ValueError: betas that do not satisfy 0 < beta_start <= beta_end < 1, or no steps.
    """

    def __init__(
        self,
        *,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_timesteps: int = 1000,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        _check_betas(beta_start, beta_end, num_timesteps)
        super().__init__(_sqrt_linear(beta_start, beta_end, num_timesteps), **modifiers)


class Quadratic(BetaSchedule):
    r"""The two published quadratic tables.

    .. math::
        \text{sqrt\_linear:}\quad \sqrt{\beta_i} = \sqrt{\beta_{start}}
        + (\sqrt{\beta_{end}} - \sqrt{\beta_{start}}) \frac{i}{T - 1}
        \qquad
        \text{squared\_time:}\quad \beta_i = \beta_{start} + (\beta_{end} - \beta_{start})
        \left(\frac{i}{T - 1}\right)^2

    Source: Song et al. 2021 (arXiv 2010.02502), ``quad`` in its released code, for ``form="sqrt_linear"`` (diffusers'
    ``scaled_linear``).
    When: noise should grow slowly at first.

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
        **modifiers: Unpack[Modifiers],
    ) -> None:
        _check_betas(beta_start, beta_end, num_timesteps)
        if form == "sqrt_linear":
            betas = _sqrt_linear(beta_start, beta_end, num_timesteps)
        elif form == "squared_time":
            ramp = torch.linspace(0, 1, num_timesteps, dtype=torch.float64)
            betas = beta_start + (beta_end - beta_start) * ramp**2
        else:
            raise ValueError(f"quadratic form {form!r} is unknown: choose sqrt_linear or squared_time.")
        super().__init__(betas, **modifiers)


class Sigmoid(BetaSchedule):
    r"""Betas on a logistic curve over [-6, 6], as GeoDiff and diffusers have it.

    .. math:: \beta_i = \beta_{start} + (\beta_{end} - \beta_{start})\,
              \mathrm{sigmoid}\left(-6 + 12 \frac{i}{T - 1}\right)

    Source: Xu et al. 2022 (arXiv 2203.02923), in its released code.
    When: a comparison with molecular models, or betas that settle at both ends.

    Raises:
        ValueError: betas that do not satisfy 0 < beta_start <= beta_end < 1, or no steps.
    """

    def __init__(
        self,
        *,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_timesteps: int = 1000,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        _check_betas(beta_start, beta_end, num_timesteps)
        ramp = torch.linspace(-6, 6, num_timesteps, dtype=torch.float64)
        super().__init__(torch.sigmoid(ramp) * (beta_end - beta_start) + beta_start, **modifiers)


class Cosine(BetaSchedule):
    r"""alpha_bar on a squared cosine, betas capped.

    .. math:: f(u) = \cos^2\left(\frac{u + s}{1 + s} \frac{\pi}{2}\right), \qquad
              \beta_i = 1 - \frac{f((i + 1)/T)}{f(i/T)}

    up to ``max_beta``, which keeps the terminal SNR above zero.

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17.
    When: images up to 64 pixels wide, with any objective; for larger ones raise ``shift``.

    Raises:
        ValueError: no steps, or a max_beta or offset that puts a beta outside (0, 1).
    """

    def __init__(
        self,
        *,
        offset: float = 0.008,
        max_beta: float = 0.999,
        num_timesteps: int = 1000,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        _check_steps(num_timesteps)
        u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        super().__init__(_betas_along(alpha_bar, max_beta), **modifiers)


class Exponential(BetaSchedule):
    r"""alpha_bar decays exponentially in t; diffusers' ``exp``.

    .. math:: \bar\alpha_i = e^{-r (i + 1)/T}

    Every beta is the same, 1 - exp(-r/T): :class:`Constant` is this curve said by its beta.

    Source: ``betas_for_alpha_bar`` with ``exp`` in diffusers, where r = 12.
    When: a baseline whose drift does not change over time, the plain Ornstein-Uhlenbeck process.

    Args:
        rate: -ln alpha_bar at t = 1.
        num_timesteps: T.
        modifiers: of every schedule, see :class:`Modifiable`.

    Raises:
        ValueError: a rate that is not positive, or no steps.
    """

    def __init__(self, *, rate: float = 12.0, num_timesteps: int = 1000, **modifiers: Unpack[Modifiers]) -> None:
        _check_steps(num_timesteps)
        if not 0 < rate < math.inf:
            raise ValueError(f"scheduler.rate={rate} must be positive and finite: it is -ln alpha_bar at t = 1.")
        beta = -math.expm1(-rate / num_timesteps)
        super().__init__(torch.full((num_timesteps,), beta, dtype=torch.float64), **modifiers)


class Constant(BetaSchedule):
    r"""The same beta at every step.

    .. math:: \beta_i = \beta

    Source: Ho et al. 2020 (arXiv 2006.11239), appendix B, which chose among constant, linear and quadratic betas.
    When: an ablation of the shape of the noise schedule.

    Raises:
        ValueError: a beta outside (0, 1), or no steps.
    """

    def __init__(self, *, beta: float = 0.02, num_timesteps: int = 1000, **modifiers: Unpack[Modifiers]) -> None:
        _check_steps(num_timesteps)
        if not 0 < beta < 1:
            raise ValueError(f"scheduler.beta={beta} must lie in (0, 1): it is the variance added at each step.")
        super().__init__(torch.full((num_timesteps,), beta, dtype=torch.float64), **modifiers)


class LaplaceTable(BetaSchedule):
    r"""diffusers' table named ``laplace``, which is not the paper's curve (:class:`Laplace` is).

    .. math:: f(u) = \sqrt{\mathrm{sigmoid}(\lambda(u))}, \qquad
              \lambda(u) = -\tfrac12 \mathrm{sgn}(\tfrac12 - u) \ln(1 - 2 |\tfrac12 - u| + 10^{-6}), \qquad
              \beta_i = 1 - \frac{f((i + 1)/T)}{f(i/T)}

    It takes alpha for alpha_bar, starts from f(0) = 1 whatever f(0) is, and so keeps far more signal at the end.

    Source: ``betas_for_alpha_bar`` with ``laplace`` in diffusers.
    When: weights that were trained under diffusers' table.

    Raises:
        ValueError: no steps, or a max_beta outside (0, 1).
    """

    def __init__(self, *, max_beta: float = 0.999, num_timesteps: int = 1000, **modifiers: Unpack[Modifiers]) -> None:
        _check_steps(num_timesteps)
        centred = 0.5 - torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        log_snr = -0.5 * torch.sign(centred) * torch.log(1 - 2 * centred.abs() + 1e-6)
        super().__init__(_betas_along(torch.sigmoid(log_snr).sqrt(), max_beta), **modifiers)
