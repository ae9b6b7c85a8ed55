"""A denoiser: network + schedule + parameterization, with its conditioning bound in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ornstein.diffusion.parameterizations import Parameterization
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import Level, NoiseSchedule, Scalar
from ornstein.diffusion.schedules.base import log_snr_of


class Denoise(Protocol):
    """What samplers call: anything that turns (x_t, level) into a prediction on a known schedule.

    Attributes:
        cost: network evaluations per sample that the latest call took (an interval's guidance spends more inside it);
            before the first call, the most that one can take. Levels that differ by sample count every branch.
        renoises: predictions carry a renoising direction of their own (CFG++), which the sampler must honour.
        remembers: predictions depend on the steps before (momentum), so that there must be steps, each taken once.
    """

    @property
    def schedule(self) -> NoiseSchedule: ...

    @property
    def cost(self) -> int: ...

    @property
    def renoises(self) -> bool: ...

    @property
    def remembers(self) -> bool: ...

    def start(self) -> Denoise:
        """The denoiser for a new trajectory: what keeps momentum over the steps begins with none."""
        ...

    def __call__(self, x_t: Tensor, t: Scalar | Level, *, again: bool = False) -> Prediction:
        """The prediction for x_t at t; ``again`` says that this is not the step's first call (Heun's second)."""
        ...

    def predict(self, x_t: Tensor, t: Scalar | Level, *, again: bool = False) -> Prediction:
        """The same before :meth:`clip`: whoever wraps a denoiser changes this, then clips once."""
        ...

    def clip(self, prediction: Prediction) -> Prediction:
        """``clip_x0`` and ``dynamic_threshold`` of the innermost denoiser, as far as they are on."""
        ...


@dataclass(frozen=True)
class Denoiser:
    """Predicts x0 and eps from x_t at a time.

    Args:
        network: the NETWORK contract, ``(x_in, noise_cond, **conditioning) -> output``.
        schedule: where times become noise levels.
        parameterization: what the network's output means.
        cond: keyword tensors (B, ...) for the network.
        clip_x0: clamp the predicted x0 to [-clip_x0, clip_x0]; None is off. Ho et al. 2020's sampler clips to 1.
        dynamic_threshold: percentile in (0, 1] of |x0| per sample to which x0 is clamped and divided where it exceeds
            1; None is off. Source: Saharia et al. 2022 (arXiv 2205.11487), section 2.3.

    Raises:
        ValueError: a clip_x0 that is not positive, or a dynamic_threshold outside (0, 1].
    """

    network: nn.Module
    schedule: NoiseSchedule
    parameterization: Parameterization
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    clip_x0: float | None = None
    dynamic_threshold: float | None = None
    cost: int = 1

    def __post_init__(self) -> None:
        if self.clip_x0 is not None and self.clip_x0 <= 0:
            raise ValueError(f"clip_x0={self.clip_x0} must be positive, or null to leave x0 as predicted.")
        if self.dynamic_threshold is not None and not 0 < self.dynamic_threshold <= 1:
            raise ValueError(f"dynamic_threshold={self.dynamic_threshold} must lie in (0, 1], or be null for off.")

    @property
    def renoises(self) -> bool:
        """A network alone has no renoising direction of its own."""
        return False

    @property
    def remembers(self) -> bool:
        """A network alone knows x_t and the level, and nothing of the steps before."""
        return False

    def start(self) -> Denoise:
        """Itself: nothing is kept from call to call."""
        return self

    def bind(self, cond: Mapping[str, Tensor]) -> Denoiser:
        """The same denoiser with this batch's conditioning."""
        return replace(self, cond=cond)

    def output(self, x_t: Tensor, level: Level) -> Tensor:
        """The network's raw output at ``level``, (B, *shape), in x_t's dtype.

        Under autocast the network runs in half precision; what goes in and comes out of here does not.
        """
        cond = self.parameterization.noise_cond(level)
        network = self.network
        if isinstance(cond, Tensor):
            noise_cond = cond.reshape(-1).to(torch.float32).expand(x_t.shape[0])
        else:
            noise_cond = torch.full((x_t.shape[0],), cond, device=x_t.device)
            # Of a mixture of experts a batch at one level needs one; told by the number, nobody reads a tensor back.
            expert_at = getattr(network, "expert_at", None)
            network = network if expert_at is None else expert_at(cond)
        x_in = x_t
        # Nothing to bring down to unit scale but rounding, which a single level's tolerance leaves alone too.
        if self.parameterization.preconditions or not self.schedule.variance_preserving:
            x_in = self.parameterization.scale_input(x_t, level)
        return network(x_in, noise_cond, **self.cond).to(x_t.dtype)

    def __call__(self, x_t: Tensor, t: Scalar | Level, *, again: bool = False) -> Prediction:
        """The prediction for x_t (B, *shape) at a number, a (B,) tensor of times, or a level."""
        return self.clip(self.predict(x_t, t))

    def predict(self, x_t: Tensor, t: Scalar | Level, *, again: bool = False) -> Prediction:
        """What the network says, before clipping: guidance mixes these, then clips the mixture once."""
        level = t if isinstance(t, Level) else self.schedule.level(t, x_t.ndim)
        return self.parameterization.predict(self.output(x_t, level), x_t, level)

    def clip(self, prediction: Prediction) -> Prediction:
        """``clip_x0`` and ``dynamic_threshold`` applied to a prediction, as far as they are on."""
        if self.clip_x0 is not None:
            bound = self.clip_x0
            prediction = prediction.with_x0(lambda x0: x0.clamp(-bound, bound))
        if self.dynamic_threshold is not None:
            quantile = self.dynamic_threshold
            prediction = prediction.with_x0(lambda x0: _threshold(x0, quantile))
        return prediction


def _threshold(x0: Tensor, quantile: float) -> Tensor:
    size = torch.quantile(x0.float().abs().flatten(1), quantile, dim=1).clamp(min=1.0)
    size = size.reshape(-1, *([1] * (x0.ndim - 1))).to(x0.dtype)
    return x0.clamp(-size, size) / size


@dataclass(frozen=True)
class Rescheduled:
    r"""A denoiser on another schedule's grid: it matches log-SNR and rescales x by the ratio of scales.

    At equal log-SNR, :math:`x^{(a)} = (\alpha_a/\alpha_b)\, x^{(b)}`, and the ratio of sigmas is the same number, which
    serves where alpha = 0. Source: Karras et al. 2022 (arXiv 2206.00364), section 2 and appendix B.
    """

    denoiser: Denoise
    schedule: NoiseSchedule

    @property
    def cost(self) -> int:
        return self.denoiser.cost

    @property
    def renoises(self) -> bool:
        return self.denoiser.renoises

    @property
    def remembers(self) -> bool:
        return self.denoiser.remembers

    def start(self) -> Denoise:
        return Rescheduled(self.denoiser.start(), self.schedule)

    def clip(self, prediction: Prediction) -> Prediction:
        return self.denoiser.clip(prediction)

    def __call__(self, x_t: Tensor, t: Scalar | Level, *, again: bool = False) -> Prediction:
        return self._rescaled(self.denoiser.__call__, x_t, t, again)

    def predict(self, x_t: Tensor, t: Scalar | Level, *, again: bool = False) -> Prediction:
        return self._rescaled(self.denoiser.predict, x_t, t, again)

    def _rescaled(self, call: Callable[..., Prediction], x_t: Tensor, t: Scalar | Level, again: bool) -> Prediction:
        level = t if isinstance(t, Level) else self.schedule.level(t, x_t.ndim)
        alpha, sigma = (torch.as_tensor(v, dtype=torch.float64) for v in (level.alpha, level.sigma))
        own_time = self.denoiser.schedule.time(log_snr_of(alpha, sigma))
        scalar = isinstance(level.t, float)
        own = self.denoiser.schedule.level(float(own_time) if scalar else own_time)
        ratio = (own.alpha**2 + own.sigma**2) ** 0.5 / (level.alpha**2 + level.sigma**2) ** 0.5
        if isinstance(ratio, Tensor):
            own = Level(*(torch.as_tensor(v).to(x_t) for v in own))
            ratio = ratio.to(x_t)
        inner = call(x_t * ratio, own, again=again)
        # x0 and the noise are the same on both schedules; only x_t is scaled.
        renoise = inner.renoise_eps if self.renoises else None
        return Prediction(x_t, level, x0=inner.x0, variance_fraction=inner.variance_fraction, renoise_eps=renoise)
