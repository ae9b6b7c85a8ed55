"""The variational bound of a trained model on given data, in bits/dim, in total and step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.likelihood import Watch, check_choice, check_images, check_signal
from ornstein.diffusion.noise import SampleNoise
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import Level, NoiseSchedule, Scalar
from ornstein.diffusion.vlb import Last, Variance, bits_per_dim, prior_terms, reconstruction_terms, vlb_terms

_TERMS, _POSITIONS = 0, 1  # draws of the noise source, one for each use


@dataclass(frozen=True)
class Bound:
    """What the variational bound says of a batch: ``bits = prior + (weight * terms).sum(1) + reconstruction``.

    Attributes:
        bits: (B,) bits/dim.
        prior: (B,) bits/dim, the KL at t = 1.
        terms: (B, K) bits/dim of the steps in ``steps``; step i goes from t = i/T to (i - 1)/T, step 1 is the decoder
            where sigma(0) = 0.
        steps: (B, K) int64 step numbers, 1 to T, never falling; a subset may hold one twice.
        weight: (B, K), 1 where all T steps are there, else 1/(K p) for a step that is drawn with chance p.
        reconstruction: (B,) bits/dim, 0 where sigma(0) = 0.
        nfe: network evaluations per sample.
    """

    bits: Tensor
    prior: Tensor
    terms: Tensor
    steps: Tensor
    weight: Tensor
    reconstruction: Tensor
    nfe: int


class VariationalBound:
    r"""The variational bound of the T-step model, in bits/dim, in total and step by step.

    .. math:: L = L_T + \sum_{i>1} \mathrm{KL}(q(x_{i-1}|x_i, x_0)\,\|\,p_\theta(x_{i-1}|x_i)) - \ln p_\theta(x_0|x_1)

    One draw of x_i for each step, independent over steps. Where sigma(0) > 0 (edm, ve, learned schedules) all T steps
    have their KL and a reconstruction from t = 0 follows. As T grows it falls towards the likelihood from above where
    ``variance`` and ``decoder_variance`` fit the data, as ``forward`` and ``first_step`` do for continuous data.

    Args:
        steps: T; 1000 is DDPM's own, fewer make another, respaced model with a looser bound.
        terms: how many steps stand for all T, drawn for each sample by importance, half of them evenly and half as 1/i,
            which is about how the bits lie, and stratified; the bound stays unbiased. null takes all of them.
        variance: of the reverse steps: the ``posterior``'s (fixed-small), the ``forward`` kernel's (fixed-large),
            ``learned``, or ``auto``: learned where the network learns it, else the posterior's.
        last: ``discrete`` for 8-bit data in [-1, 1], ``gaussian`` for the density of continuous data.
        decoder_variance: of the first step, whose posterior variance is 0: the ``second_step``'s, as published, or the
            noise of the ``first_step``, which fits data with structure finer than it and has no gap as T grows.

    Source: Ho et al. 2020 (arXiv 2006.11239), eqs. 5-13; Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.
    When: bits/dim beside DDPM's and Improved DDPM's, or seeing which noise levels they are spent on.

    Raises:
        ValueError: an unknown option or one out of range; in a call, data out of range or a learned variance that the
            network does not have.
    """

    def __init__(
        self,
        *,
        steps: int = 1000,
        terms: int | None = None,
        variance: Literal["auto", "posterior", "forward", "learned"] = "auto",
        last: Last = "discrete",
        decoder_variance: Literal["second_step", "first_step"] = "second_step",
    ) -> None:
        check_choice("variance", variance, ("auto", "posterior", "forward", "learned"))
        check_choice("last", last, ("discrete", "gaussian"))
        check_choice("decoder_variance", decoder_variance, ("second_step", "first_step"))
        if steps < 1:
            raise ValueError(f"likelihood.steps={steps} must be at least 1.")
        if terms is not None and not 1 <= terms <= steps:
            raise ValueError(f"likelihood.terms={terms} must be between 1 and likelihood.steps={steps}, or null.")
        self.steps, self.terms, self.variance, self.last = steps, terms, variance, last
        self.decoder_variance = decoder_variance

    @torch.no_grad()
    def __call__(self, denoise: Denoise, x0: Tensor, noise: SampleNoise, *, watch: Watch | None = None) -> Bound:
        """The bound for clean data x0 (B, *shape).

        Args:
            denoise: the denoiser with its conditioning bound; its clipping, if it has any, is part of the model.
            x0: data in the space being diffused, in [-1, 1] for ``last="discrete"``.
            noise: of the samples.
            watch: called with the share of the terms that is done.

        Raises:
            ValueError: see the class.
        """
        x0 = x0 if x0.dtype == torch.float64 else x0.float()
        if self.last == "discrete":
            check_images(x0, "likelihood.last=discrete", "likelihood.last=gaussian")
        denoise, schedule = denoise.start(), denoise.schedule
        calls = check_signal(denoise, x0)
        floor: Scalar | None = None
        if self.decoder_variance == "second_step" and self.steps > 1:
            floor = float(schedule.transition(2 / self.steps, 1 / self.steps).variance)
        count = self.steps if self.terms is None else self.terms
        found, drawn = [], self._drawn(noise)
        for k in range(count):
            t, s, eps = self._step(schedule, drawn, k, noise, x0)
            p = denoise(_cast(t.alpha, x0) * x0 + _cast(t.sigma, x0) * eps, _level_like(t, x0), again=True)
            nats = vlb_terms(p, x0, t, s, variance=self._variance(p), last=self.last, floor=floor)
            found.append(bits_per_dim(nats, x0))
            if watch is not None:
                watch((k + 1) / count)
        terms, weight = torch.stack(found, dim=1), self._weight(drawn).to(x0)
        prior = bits_per_dim(prior_terms(x0, schedule.level(1.0)), x0)
        reconstruction = self._reconstruction(schedule, x0, noise)
        return Bound(
            bits=prior + (weight * terms).sum(1) + reconstruction,
            prior=prior,
            terms=terms,
            steps=drawn,
            weight=weight,
            reconstruction=reconstruction,
            nfe=denoise.cost * (count + calls),
        )

    def _drawn(self, noise: SampleNoise) -> Tensor:
        """(B, K) int64 numbers of the steps that are taken."""
        if self.terms is None:
            return torch.arange(1, self.steps + 1, device=noise.index.device).expand(len(noise.index), -1)
        normal = noise.source.noise(noise.index, 0, _POSITIONS, shape=(self.terms,)).double()
        stratum = torch.arange(self.terms, device=normal.device)
        place = ((stratum + torch.special.ndtr(normal)) / self.terms).contiguous()
        return torch.searchsorted(self._chances(normal).cumsum(0), place).clamp(max=self.steps - 1) + 1

    def _weight(self, drawn: Tensor) -> Tensor:
        if self.terms is None:
            return torch.ones_like(drawn)
        return 1 / (self.terms * self._chances(drawn)[drawn - 1])

    def _chances(self, like: Tensor) -> Tensor:
        """(T,) float64: how likely each step is to stand for all."""
        inverse = 1 / torch.arange(1, self.steps + 1, dtype=torch.float64, device=like.device)
        return 0.5 / self.steps + 0.5 * inverse / inverse.sum()

    def _step(
        self, schedule: NoiseSchedule, drawn: Tensor, k: int, noise: SampleNoise, x0: Tensor
    ) -> tuple[Level, Level, Tensor]:
        """The k-th term's levels, of floats where all samples share them, and its noise."""
        eps = noise(k + 1, _TERMS).to(x0)
        if self.terms is None:
            return schedule.level((k + 1) / self.steps), schedule.level(k / self.steps), eps
        i = drawn[:, k].double()
        return schedule.level(i / self.steps, x0.ndim), schedule.level((i - 1) / self.steps, x0.ndim), eps

    def _variance(self, prediction: Prediction) -> Variance:
        if self.variance == "auto":
            return "posterior" if prediction.variance_fraction is None else "learned"
        return self.variance

    def _reconstruction(self, schedule: NoiseSchedule, x0: Tensor, noise: SampleNoise) -> Tensor:
        level = schedule.level(0.0)
        if level.sigma == 0:
            return x0.new_zeros(len(x0))
        z = level.alpha * x0 + level.sigma * noise(0, _TERMS).to(x0)
        return bits_per_dim(reconstruction_terms(x0, z, level, last=self.last), x0)


def _cast(value: Scalar, like: Tensor) -> Scalar:
    return value.to(like) if isinstance(value, Tensor) else value


def _level_like(level: Level, like: Tensor) -> Level:
    return Level(*(_cast(value, like) for value in level))
