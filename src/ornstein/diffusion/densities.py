"""Where training times are drawn, and with what density."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ornstein.diffusion.schedules import NoiseSchedule

if TYPE_CHECKING:
    from ornstein.diffusion.objectives import TrainingNoise


class TimeDensity(Protocol):
    """Draws (B,) float32 times in [0, 1] and knows their density in t."""

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor: ...

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor: ...


@runtime_checkable
class AdaptiveTimeDensity(Protocol):
    """A density that draws from a moving proposal, and weighs its draws so that the expectation stays that of
    ``density``.
    """

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor: ...

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor: ...

    def importance(self, t: Tensor) -> Tensor:
        """(B,) density over proposal, by which the losses at the times just drawn are multiplied."""
        ...

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learns from the (B,) losses, before importance, at the times just drawn."""
        ...


LowDiscrepancy = bool | Literal["shared"]


class _Stratified:
    """Uniform numbers, optionally one in each of B equal strata: lower variance of the loss.

    ``True`` gives every stratum its own jitter; ``"shared"`` all strata the same one, as Kingma et al. 2021
    (arXiv 2107.00630), appendix I.1, have it: evenly spaced draws, shifted at random. Ranks interleave, so that
    together they are stratified, each with jitters of its own.

    Raises:
        ValueError: anything else.
    """

    def __init__(self, low_discrepancy: LowDiscrepancy) -> None:
        if low_discrepancy not in (True, False, "shared"):
            raise ValueError(f"objective.time.low_discrepancy={low_discrepancy!r}: choose true, false or shared.")
        self.low_discrepancy = low_discrepancy

    def unit(self, size: int, noise: TrainingNoise, device: torch.device) -> Tensor:
        u = noise.uniform(size, device)
        if not self.low_discrepancy:
            return u
        if self.low_discrepancy == "shared":
            u = u[:1]
        total = size * noise.world_size
        return ((_strata(size, noise.world_size, noise.rank, device) + u) / total).clamp(max=1 - 2**-24)


@lru_cache(maxsize=8)
def _strata(size: int, world_size: int, rank: int, device: torch.device) -> Tensor:
    """(size,) float32 numbers of a rank's strata: every step's are the same."""
    return (torch.arange(size, device=device) * world_size + rank).float()


class UniformTime(_Stratified):
    r"""Uniform on [t_min, 1].

    .. math:: p(t) = 1 / (1 - t_{min})

    Args:
        t_min: keeps draws away from sigma = 0; the first of T = 1000 steps unless given.
        low_discrepancy: one draw in each of B strata; ``"shared"`` with one jitter for all.

    Source: Kingma et al. 2021 (arXiv 2107.00630), section 5.3 and appendix I.1.
    When: the default, and whenever losses are to be compared with a paper's.

    Raises:
        ValueError: t_min outside [0, 1).
    """

    def __init__(self, *, t_min: float = 1e-3, low_discrepancy: LowDiscrepancy = True) -> None:
        super().__init__(low_discrepancy)
        if not 0 <= t_min < 1:
            raise ValueError(f"objective.time.t_min={t_min} must lie in [0, 1).")
        self.t_min = t_min

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor:
        return self.t_min + (1 - self.t_min) * self.unit(size, noise, device)

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        return torch.where(t >= self.t_min, 1 / (1 - self.t_min), 0.0)


class DiscreteUniformTime(_Stratified):
    r"""Uniform over the T grid points t = (i + 1)/T.

    .. math:: P(t = (i + 1)/T) = 1/T, \quad i = 0, \dots, T - 1

    Source: Ho et al. 2020 (arXiv 2006.11239), algorithm 1.
    When: discrete-time models as published, and the discrete bound (vlb, hybrid).

    Raises:
        ValueError: num_timesteps < 1.
    """

    def __init__(self, *, num_timesteps: int = 1000, low_discrepancy: LowDiscrepancy = False) -> None:
        super().__init__(low_discrepancy)
        if num_timesteps < 1:
            raise ValueError(f"objective.time.num_timesteps={num_timesteps} must be at least 1.")
        self.num_timesteps = num_timesteps

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor:
        index = (self.unit(size, noise, device) * self.num_timesteps).floor()
        return (index + 1) / self.num_timesteps

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The continuous density that the grid points approach."""
        return torch.ones_like(t)


class LogNormalSigma(_Stratified):
    r"""EDM's density: ln(sigma/alpha) normal with mean ``p_mean`` and deviation ``p_std``, clamped to the schedule.

    .. math:: \ln(\sigma/\alpha) \sim N(p_{mean}, p_{std}^2)

    Source: Karras et al. 2022 (arXiv 2206.00364), table 1.
    When: objective=edm, or to aim at the noise levels that matter on any schedule.

    Raises:
        ValueError: p_std is not positive.
    """

    def __init__(self, *, p_mean: float = -1.2, p_std: float = 1.2, low_discrepancy: LowDiscrepancy = True) -> None:
        super().__init__(low_discrepancy)
        if p_std <= 0:
            raise ValueError(f"objective.time.p_std={p_std} must be positive.")
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

    .. math:: \mathrm{logit}(t) \sim N(m, s^2)

    Source: Esser et al. 2024 (arXiv 2403.03206), eq. 19.
    When: flow matching on images; learns faster than uniform times.

    Raises:
        ValueError: std is not positive.
    """

    def __init__(self, *, mean: float = 0.0, std: float = 1.0, low_discrepancy: LowDiscrepancy = True) -> None:
        super().__init__(low_discrepancy)
        if std <= 0:
            raise ValueError(f"objective.time.std={std} must be positive.")
        self.mean, self.std = mean, std

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor:
        u = self.unit(size, noise, device).double().clamp(1e-9, 1 - 1e-9)
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)).float()

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-0.5 * z**2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


class ModeTime(_Stratified):
    r"""Uniform numbers bent toward the middle (``scale`` > 0) or both ends (``scale`` < 0) of the trajectory.

    .. math:: t = 1 - u - s \left(\cos^2\left(\tfrac{\pi}{2} u\right) - 1 + u\right), \quad u \sim U[0, 1]

    Source: Esser et al. 2024 (arXiv 2403.03206), section 3.1.
    When: as logit_normal, but never starving the ends, whose density stays positive.

    Raises:
        ValueError: scale outside [-1, 2/(pi - 2)], where the map is not monotonic.
    """

    def __init__(self, *, scale: float = 1.29, low_discrepancy: LowDiscrepancy = True) -> None:
        super().__init__(low_discrepancy)
        most = 2 / (math.pi - 2)
        if not -1 <= scale <= most:
            raise ValueError(f"objective.time.scale={scale} must lie in [-1, {most:.4f}] for the mode density.")
        self.scale = scale

    def _bend(self, u: Tensor) -> Tensor:
        return 1 - u - self.scale * (torch.cos(0.5 * math.pi * u) ** 2 - 1 + u)

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor:
        return self._bend(self.unit(size, noise, device).double()).clamp(0, 1).float()

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        t64 = t.double()
        low, high = torch.zeros_like(t64), torch.ones_like(t64)
        for _ in range(52):  # the map falls: halve [0, 1] down to float64's spacing
            middle = 0.5 * (low + high)
            above = self._bend(middle) > t64
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        slope = 1 + self.scale * (1 - 0.5 * math.pi * torch.sin(math.pi * 0.5 * (low + high)))
        return (1 / slope).to(t.dtype)


class LossAdaptiveTime(nn.Module):
    r"""Uniform in expectation, but drawn more often where the loss has been large, and weighted down by as much.

    [t_min, 1] is cut into ``bins``, each of which keeps its last ``history`` losses:

    .. math:: q_b \propto \sqrt{E_b[L^2]}, \quad \text{loss of a draw in } b: \; L / (\text{bins} \cdot q_b)

    Uniform until every bin's history is full, and mixed with ``uniform_prob`` of uniform for good, so that no bin dies
    out. Losses of all ranks enter every rank's history, which belongs to the checkpoint; under ``no_grad`` or in
    evaluation nothing is learnt and draws are uniform, so that validation losses compare over time. ``density`` is that
    of the expectation, so the objective's effective weighting does not move.

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.3 (one bin a step there, history 10).
    When: objective=vlb, whose terms differ by orders of magnitude; otherwise the gain is small.

    Raises:
        ValueError: t_min outside [0, 1), bins or history below 1, or uniform_prob outside (0, 1].
    """

    losses: Tensor
    counts: Tensor

    def __init__(
        self,
        *,
        bins: int = 100,
        history: int = 10,
        uniform_prob: float = 0.001,
        t_min: float = 1e-3,
        low_discrepancy: LowDiscrepancy = True,
    ) -> None:
        super().__init__()
        if not 0 <= t_min < 1:
            raise ValueError(f"objective.time.t_min={t_min} must lie in [0, 1).")
        if bins < 1 or history < 1 or not 0 < uniform_prob <= 1:
            raise ValueError(
                f"objective.time=loss_adaptive needs bins >= 1, history >= 1 and uniform_prob in (0, 1], "
                f"got {bins}, {history} and {uniform_prob}."
            )
        self.strata = _Stratified(low_discrepancy)
        self.bins, self.history, self.uniform_prob, self.t_min = bins, history, uniform_prob, t_min
        self.register_buffer("losses", torch.zeros(bins, history))
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """(bins,) float64: how often each bin is drawn now."""
        size = self.losses.double().square().mean(1).sqrt()
        adapted = (1 - self.uniform_prob) * size / size.sum().clamp(min=1e-300) + self.uniform_prob / self.bins
        # Not a branch in Python: it would wait for the device at every step.
        ready = (self.counts >= self.history).all() & (size.sum() > 0) & self.training
        return torch.where(ready, adapted, torch.full_like(adapted, 1 / self.bins))

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor:
        probabilities = self.probabilities()
        ends = probabilities.cumsum(0)
        u = self.strata.unit(size, noise, device).double()
        which = torch.searchsorted(ends, u, right=True).clamp(max=self.bins - 1)
        share = probabilities[which]
        within = (1 - (ends[which] - u) / share).clamp(0, 1 - 1e-6)  # 1 would be the next bin's
        return (self.t_min + (1 - self.t_min) * (which + within) / self.bins).float()

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        return torch.where(t >= self.t_min, 1 / (1 - self.t_min), 0.0)

    def _bin(self, t: Tensor) -> Tensor:
        return ((t.double() - self.t_min) / (1 - self.t_min) * self.bins).long().clamp(0, self.bins - 1)

    def importance(self, t: Tensor) -> Tensor:
        """(B,) float32 uniform over drawn probability of each time's bin."""
        return (1 / (self.bins * self.probabilities()[self._bin(t)])).float()

    @torch.no_grad()
    def _remember(self, t: Tensor, losses: Tensor) -> None:
        which, losses = _of_all_ranks(self._bin(t)), _of_all_ranks(losses.detach().to(self.losses.dtype))
        which, order = which.sort(stable=True)
        losses, place = losses[order], torch.arange(len(order), device=which.device)
        rank = place - torch.searchsorted(which, which)
        newest = place >= torch.searchsorted(which, which, right=True) - self.history
        # More losses than a bin can keep go to a spare column, so that no slot is written twice.
        slot = torch.where(newest, (self.counts[which] + rank) % self.history, self.history)
        wider = torch.cat([self.losses, torch.zeros_like(self.losses[:, :1])], dim=1)
        wider[which, slot] = losses
        self.losses.copy_(wider[:, :-1])
        self.counts.index_add_(0, which, torch.ones_like(which))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Puts the (B,) losses into the history, in training with gradients only; a collective call over ranks."""
        if self.training and torch.is_grad_enabled():
            self._remember(t, losses)


def _of_all_ranks(values: Tensor) -> Tensor:
    """(B,) values of this rank -> those of all ranks, in their order; every rank's batch has the same size."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    gathered = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, values.contiguous())
    return torch.cat(gathered)
