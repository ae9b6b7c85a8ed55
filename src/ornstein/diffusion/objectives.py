r"""Training objectives: parameterization + time density + weighting + distance.

All weightings meet in one reference, the effective weight on :math:`\|x_0 - \hat x_0\|^2` per unit of log-SNR, density
included (Kingma & Gao 2023, arXiv 2303.00848, section 3): :meth:`Objective.effective_weight` gives it, and
objectives that agree in it have the same gradients under L2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.densities import TimeDensity, UniformTime
from ornstein.diffusion.distances import L2, Distance
from ornstein.diffusion.parameterizations import Parameterization
from ornstein.diffusion.schedules import Level, NoiseSchedule


@dataclass(frozen=True)
class LossOutput:
    """A batch's loss.

    Attributes:
        loss: scalar, the mean of ``per_sample``.
        per_sample: (B,) detached weighted losses.
        t: (B,) times drawn.
        log_snr: (B,) log-SNR at those times.
        terms: named scalars that make up the loss, detached.
    """

    loss: Tensor
    per_sample: Tensor
    t: Tensor
    log_snr: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingNoise:
    """The randomness of one training step: one generator, and the rank that low-discrepancy draws are offset by."""

    generator: torch.Generator
    rank: int = 0
    world_size: int = 1

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal values shaped like a float32 tensor."""
        return torch.randn(like.shape, generator=self.generator, device=like.device, dtype=like.dtype)

    def uniform(self, size: int, device: torch.device) -> Tensor:
        """(size,) float32 values uniform in [0, 1)."""
        return torch.rand(size, generator=self.generator, device=device)


class Objective(nn.Module):
    """The training loss.

    Args:
        parameterization: what the network predicts.
        time: the density that times are drawn from.
        distance: between output and target, per element.

    The weight is 1 in the space of the network's output, as each paper's simple loss has it; the distance and the
    mean over elements run in float32.
    """

    def __init__(
        self,
        parameterization: Parameterization,
        time: TimeDensity | None = None,
        *,
        distance: Distance | None = None,
    ) -> None:
        super().__init__()
        self.parameterization = parameterization
        self.time_density = time if time is not None else UniformTime()
        self.distance = distance if distance is not None else L2()

    def forward(self, denoiser: Denoiser, x0: Tensor, cond: Mapping[str, Tensor], noise: TrainingNoise) -> LossOutput:
        """The loss on clean data x0 (B, *shape) with the conditioning ``cond``."""
        t = self.time_density.draw(x0.shape[0], denoiser.schedule, noise, x0.device)
        level = denoiser.schedule.level(t, x0.ndim)
        eps = noise.normal(x0)
        x_t = level.alpha * x0 + level.sigma * eps
        output = denoiser.bind(cond).output(x_t, level)
        target = self.parameterization.target(x0, eps, level)
        per_sample = self.distance(output.float(), target.float()).flatten(1).mean(1)
        log_snr = 2 * (torch.log(torch.as_tensor(level.alpha)) - torch.log(torch.as_tensor(level.sigma)))
        return LossOutput(per_sample.mean(), per_sample.detach(), t, log_snr.reshape(-1).expand(t.shape[0]))

    def effective_weight(self, schedule: NoiseSchedule, log_snr: Tensor) -> Tensor:
        """Weight on ||x0 - x0_hat||^2 per unit of log-SNR under L2, density included, same shape as ``log_snr``.

        0 outside the schedule's range of log-SNR, and at its ends.
        """
        least, most = schedule.log_snr_range()
        t = schedule.time(log_snr.double())
        level: Level = schedule.level(t)
        density = self.time_density.density(t, schedule) / schedule.d_log_snr(t).abs()
        weight = torch.as_tensor(self.parameterization.gain(level)) ** 2 * density
        return torch.where((log_snr > least) & (log_snr < most), weight, 0.0)
