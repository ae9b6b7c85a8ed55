"""Where training times are drawn, and with what density."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ornstein.diffusion.schedules import NoiseSchedule

if TYPE_CHECKING:
    from ornstein.diffusion.objectives import TrainingNoise


class TimeDensity(Protocol):
    """Draws (B,) float32 times in [0, 1] and knows their density in t."""

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor: ...

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor: ...


class _Stratified:
    """Uniform numbers, optionally one in each of B equal strata (each with its own jitter): lower variance of the loss.

    The idea is that of Kingma et al. 2021 (arXiv 2107.00630), appendix I.1, who share one jitter. Ranks interleave, so
    that together they are stratified.
    """

    def __init__(self, low_discrepancy: bool) -> None:
        self.low_discrepancy = low_discrepancy

    def unit(self, size: int, noise: TrainingNoise, device: torch.device) -> Tensor:
        u = noise.uniform(size, device)
        if not self.low_discrepancy:
            return u
        total = size * noise.world_size
        strata = torch.arange(size, device=device) * noise.world_size + noise.rank
        return ((strata + u) / total).clamp(max=1 - 2**-24)


class UniformTime(_Stratified):
    """Uniform on [t_min, 1].

    Args:
        t_min: keeps draws away from sigma = 0; the first of T = 1000 steps unless given.
        low_discrepancy: one draw in each of B strata.

    Raises:
        ValueError: t_min outside [0, 1).
    """

    def __init__(self, *, t_min: float = 1e-3, low_discrepancy: bool = True) -> None:
        super().__init__(low_discrepancy)
        if not 0 <= t_min < 1:
            raise ValueError(f"t_min={t_min} must lie in [0, 1).")
        self.t_min = t_min

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor:
        return self.t_min + (1 - self.t_min) * self.unit(size, noise, device)

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        return torch.where(t >= self.t_min, 1 / (1 - self.t_min), 0.0)


class DiscreteUniformTime(_Stratified):
    """Uniform over the T grid points t = (i + 1)/T. Source: Ho et al. 2020 (arXiv 2006.11239), algorithm 1.

    Raises:
        ValueError: num_timesteps < 1.
    """

    def __init__(self, *, num_timesteps: int = 1000, low_discrepancy: bool = False) -> None:
        super().__init__(low_discrepancy)
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps={num_timesteps} must be at least 1.")
        self.num_timesteps = num_timesteps

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor:
        index = (self.unit(size, noise, device) * self.num_timesteps).floor()
        return (index + 1) / self.num_timesteps

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The continuous density that the grid points approach."""
        return torch.ones_like(t)


class LogNormalSigma(_Stratified):
    r"""EDM's density: ln(sigma/alpha) normal with mean ``p_mean`` and deviation ``p_std``, clamped to the schedule.

    Source: Karras et al. 2022 (arXiv 2206.00364), table 1.

    Raises:
        ValueError: p_std is not positive.
    """

    def __init__(self, *, p_mean: float = -1.2, p_std: float = 1.2, low_discrepancy: bool = True) -> None:
        super().__init__(low_discrepancy)
        if p_std <= 0:
            raise ValueError(f"p_std={p_std} must be positive.")
        self.p_mean, self.p_std = p_mean, p_std

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor:
        u = self.unit(size, noise, device).double().clamp(1e-9, 1 - 1e-9)
        log_ratio = self.p_mean + self.p_std * torch.special.ndtri(u)
        return schedule.time(-2 * log_ratio).float()

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        log_ratio = -0.5 * schedule.log_snr(t)
        z = (log_ratio - self.p_mean) / self.p_std
        normal = torch.exp(-0.5 * z**2) / (self.p_std * math.sqrt(2 * math.pi))
        return normal * 0.5 * schedule.d_log_snr(t).abs()


class LogitNormalTime(_Stratified):
    r"""logit(t) normal: the middle of the trajectory more often.

    Source: Esser et al. 2024 (arXiv 2403.03206), eq. 19.

    Raises:
        ValueError: std is not positive.
    """

    def __init__(self, *, mean: float = 0.0, std: float = 1.0, low_discrepancy: bool = True) -> None:
        super().__init__(low_discrepancy)
        if std <= 0:
            raise ValueError(f"std={std} must be positive.")
        self.mean, self.std = mean, std

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor:
        u = self.unit(size, noise, device).double().clamp(1e-9, 1 - 1e-9)
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)).float()

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-0.5 * z**2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
