"""Exact likelihood of data under a trained model, in bits/dim, along the probability flow.

Like the variational bound in :mod:`ornstein.diffusion.variational_bound`, it is a function of (denoiser, data, noise),
gives one value for each sample, and draws what is random in it from the counter-based source, so that a sample's value
depends on (seed, index) alone. Neither trains: gradients stop here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.noise import SampleNoise
from ornstein.diffusion.samplers.adaptive import Slope, Solution, dormand_prince
from ornstein.diffusion.schedules import Level, NoiseSchedule
from ornstein.diffusion.vlb import bits_per_dim

Watch = Callable[[float], None]

_MOST_EXACT = 1024  # dimensions up to which a trace by as many backward passes is bearable
_STRETCH = 4.0  # of log-SNR, the longest step
_BIN = 2 / 255  # width of a level of 8-bit data in [-1, 1]
_UNIFORM, _PROBES = 0, 1  # draws of the noise source, one for each use


@dataclass(frozen=True)
class FlowLikelihood:
    """What the probability flow says of a batch.

    Attributes:
        bits: (B,) bits/dim: of the 8-bit images if they were dequantised, of the density of the data if not.
        prior: (B,) nats, ln of the density that the latent has at the noisy end.
        volume: (B,) nats, what the flow's change of volume adds to it.
        latent: (B, *shape) where the flow takes the data: about standard normal.
        nfe_each: (B,) int64 network evaluations that each sample needed.
        nfe: those of the batch, which waits for its slowest sample.
    """

    bits: Tensor
    prior: Tensor
    volume: Tensor
    latent: Tensor
    nfe_each: Tensor
    nfe: int


class ProbabilityFlow:
    r"""Exact likelihood of the model whose samples the probability-flow ODE makes, in bits/dim.

    .. math::
        \ln p(x_0) = \ln N(z_1; 0, v_1 I) + \int_{\lambda_0}^{\lambda_1} \nabla \cdot \frac{dz}{d\lambda}\, d\lambda
        + D \ln \cos\varphi_0, \qquad
        \frac{dz}{d\lambda} = \tfrac12 \sin\varphi \cos\varphi\, (\sin\varphi\, \hat x_0 - \cos\varphi\, \hat\epsilon)

    with :math:`z = x/\sqrt{\alpha^2 + \sigma^2}`, :math:`\tan\varphi = \sigma/\alpha = e^{-\lambda/2}`, integrated in
    log-SNR, where kinks of a beta table in t are none, by Dormand-Prince with error control per sample. The data enter
    as :math:`z_0 = \cos\varphi_0\, x_0`, so that the value is the same under every schedule with the same ends.

    The ends are finite. Data: log-SNR at ``t_min``; what is scored there is the density smoothed by a noise of
    sigma/alpha, whose square over the data's smallest variance is about twice the error in nats a dimension. Noise:
    log-SNR at t = 1, or ``log_snr_min`` where the schedule goes below it; the density used there, of
    variance :math:`v_1 = \cos^2\varphi\, \sigma_{data}^2 + \sin^2\varphi`, is wrong on average by at most the prior's
    term of the variational bound, half of :math:`\mathrm{SNR}_1 \|x_0\|^2` in nats (3e-5 bits/dim for DDPM's linear
    table at unit data), and for one sample by about its root.

    A sample's value depends on (seed, index) alone up to the tolerance: in float32, rounding that differs with the
    batch can make the solver choose other steps.

    ``clip_x0`` and dynamic thresholding are left out: they are the sampler's, and would change the flow.

    Args:
        trace: ``hutchinson``, an unbiased estimate from ``probes`` products with random vectors; or ``exact``, by as
            many backward passes as there are dimensions, 1024 at most.
        probes: random vectors, the same along the whole trajectory of a sample.
        probe: their distribution, ``rademacher`` (signs, the least variance) or ``gaussian``.
        rtol: relative tolerance, per sample.
        atol: absolute tolerance.
        t_min: where the flow begins, in [0, 1); 0 only where the schedule keeps noise at t = 0.
        log_snr_min: where it ends at the latest.
        sigma_data: deviation of the data that the prior assumes; 1 makes it standard normal, as published.
        dequantize: ``uniform`` adds uniform noise of one level to 8-bit data in [-1, 1] and gives an upper bound on the
            bits/dim of the images, log2(127.5) above the density's; ``none`` takes the data as they are.
        max_steps: attempts of the solver at most, in each stretch of 4 of log-SNR, which no step leaves.

    Source: Song et al. 2021 (arXiv 2011.13456), eqs. 39 and 40; dequantisation Theis et al. 2016 (arXiv 1511.01844),
    section 3.1.
    When: comparing models by likelihood, with any schedule and objective, at some hundred evaluations an image.

    Raises:
        ValueError: an unknown option or one out of range; in a call, data out of range, a schedule without a finite
            stretch between the ends, a denoiser without a flow, or samples that do not arrive.
    """

    def __init__(
        self,
        *,
        trace: Literal["hutchinson", "exact"] = "hutchinson",
        probes: int = 1,
        probe: Literal["rademacher", "gaussian"] = "rademacher",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        t_min: float = 1e-5,
        log_snr_min: float = -20.0,
        sigma_data: float = 1.0,
        dequantize: Literal["uniform", "none"] = "uniform",
        max_steps: int = 1000,
    ) -> None:
        check_choice("trace", trace, ("hutchinson", "exact"))
        check_choice("probe", probe, ("rademacher", "gaussian"))
        check_choice("dequantize", dequantize, ("uniform", "none"))
        if probes < 1 or max_steps < 1:
            raise ValueError(f"likelihood.probes={probes} and likelihood.max_steps={max_steps} must be at least 1.")
        if not (rtol > 0 and atol > 0):
            raise ValueError(f"likelihood.rtol={rtol} and likelihood.atol={atol} must be positive, such as 1e-5.")
        if not 0 <= t_min < 1:
            raise ValueError(f"likelihood.t_min={t_min} must lie in [0, 1), such as 1e-5.")
        if not (math.isfinite(log_snr_min) and sigma_data > 0):
            raise ValueError(
                f"likelihood.log_snr_min={log_snr_min} must be finite and likelihood.sigma_data={sigma_data} positive."
            )
        self.trace, self.probes, self.probe = trace, probes, probe
        self.rtol, self.atol, self.max_steps = rtol, atol, max_steps
        self.t_min, self.log_snr_min, self.sigma_data = t_min, log_snr_min, sigma_data
        self.dequantize = dequantize

    @torch.no_grad()
    def __call__(
        self, denoise: Denoise, x0: Tensor, noise: SampleNoise, *, watch: Watch | None = None
    ) -> FlowLikelihood:
        """The likelihood of clean data x0 (B, *shape).

        Args:
            denoise: the denoiser with its conditioning bound.
            x0: data in the space being diffused; 8-bit levels in [-1, 1] for ``dequantize="uniform"``.
            noise: of the samples, for probes and dequantisation.
            watch: called with the share of the way, 0 to 1, that the slowest sample has gone.

        Raises:
            ValueError: see the class.
        """
        if denoise.renoises:
            raise ValueError("guidance=cfgpp follows no probability flow: a likelihood needs guidance=none or cfg.")
        if denoise.remembers:
            raise ValueError("guidance.momentum follows no probability flow: a likelihood needs guidance.momentum=0.")
        x0 = x0 if x0.dtype == torch.float64 else x0.float()
        self._check_size(x0)
        denoise, start, end = denoise.start(), *self.ends(denoise.schedule)
        x, offset = x0, 0.0
        if self.dequantize == "uniform":
            check_images(x0, "likelihood.dequantize=uniform", "likelihood.dequantize=none")
            x = x0 + _BIN * (torch.special.ndtr(noise(0, _UNIFORM).double()) - 0.5).to(x0)
            offset = -math.log2(_BIN)
        signal = math.sqrt(1 / (1 + math.exp(-start)))  # cos(phi) at the data's end
        calls = check_signal(denoise, x0)
        flow = self._augmented(denoise, x.shape, self._probe_vectors(x, noise), (start, end), watch)
        z = (signal * x).flatten(1)
        solution = self._solve(flow, torch.cat([z, z.new_zeros(len(z), 1)], dim=1), start, end)
        flat, dimensions = solution.y[:, :-1], x.shape[1:].numel()
        share = 1 / (1 + math.exp(-end))
        variance = share * self.sigma_data**2 + (1 - share)
        prior = -0.5 * (flat.double() ** 2 / variance + math.log(2 * math.pi * variance)).sum(1)
        volume = solution.y[:, -1].double() + dimensions * math.log(signal)
        return FlowLikelihood(
            bits=(bits_per_dim(-(prior + volume), x) + offset).to(x),
            prior=prior.to(x),
            volume=volume.to(x),
            latent=flat.reshape(x.shape),
            nfe_each=denoise.cost * (solution.evaluations + calls),
            nfe=denoise.cost * (solution.calls + calls),
        )

    def _solve(self, flow: Slope, y: Tensor, start: float, end: float) -> Solution:
        """From start to end in stretches, so that no step leaps over what it has not looked at."""
        count = math.ceil((start - end) / _STRETCH)
        marks = [start + (end - start) * i / count for i in range(count)] + [end]
        # What the network itself refuses is said here, in its own words.
        first = flow(y, torch.full((len(y),), start, dtype=torch.float64, device=y.device))
        spent, step = torch.ones(len(y), dtype=torch.int64, device=y.device), None
        calls = 1
        try:
            for u0, u1 in pairwise(marks):
                part = dormand_prince(
                    flow, y, u0, u1, rtol=self.rtol, atol=self.atol, max_steps=self.max_steps, step=step, first=first
                )
                y, step, first = part.y, part.step, part.slope
                spent, calls = spent + part.evaluations, calls + part.calls
        except ValueError as error:
            raise ValueError(
                f"the flow did not reach the noise within likelihood.max_steps={self.max_steps} attempts, or is not "
                "finite: raise it, loosen likelihood.rtol and likelihood.atol, or begin at a higher likelihood.t_min."
            ) from error
        return replace(part, evaluations=spent, calls=calls)

    def ends(self, schedule: NoiseSchedule) -> tuple[float, float]:
        """Log-SNR at the data's end and at the noise's: both finite, the first above the second.

        Raises:
            ValueError: the schedule has no such stretch.
        """
        with torch.no_grad():
            start, last = float(schedule.log_snr(self.t_min)), float(schedule.log_snr(1.0))
        end = max(last, self.log_snr_min)
        if not math.isfinite(start):
            raise ValueError(
                f"likelihood.t_min={self.t_min}: this schedule has no noise there, where a likelihood along the flow "
                "is not finite: choose likelihood.t_min=1e-5."
            )
        if end >= start:
            raise ValueError(
                f"likelihood.log_snr_min={self.log_snr_min} leaves no stretch below log-SNR {start:.3g} at "
                f"likelihood.t_min={self.t_min}: lower one of them."
            )
        return start, end

    def _check_size(self, x0: Tensor) -> None:
        if self.trace == "exact" and x0.shape[1:].numel() > _MOST_EXACT:
            raise ValueError(
                f"likelihood.trace=exact takes a backward pass for each of {x0.shape[1:].numel():,} dimensions and is "
                f"for {_MOST_EXACT} at most: choose likelihood.trace=hutchinson."
            )
        finest = 10 * torch.finfo(x0.dtype).eps
        if self.rtol < finest:
            raise ValueError(
                f"likelihood.rtol={self.rtol} is finer than {x0.dtype} resolves: choose at least {finest:.1e}."
            )

    def _probe_vectors(self, x: Tensor, noise: SampleNoise) -> list[Tensor]:
        if self.trace == "exact":
            return []
        draws = [noise(k, _PROBES).to(x) for k in range(self.probes)]
        return [torch.where(draw < 0, -1.0, 1.0).to(x) for draw in draws] if self.probe == "rademacher" else draws

    def _augmented(
        self,
        denoise: Denoise,
        shape: torch.Size,
        probes: list[Tensor],
        ends: tuple[float, float],
        watch: Watch | None,
    ) -> Slope:
        """The slope in log-SNR of (z, integral of the divergence), flattened to (B, D + 1)."""
        start, end = ends

        def slope(y: Tensor, log_snr: Tensor) -> Tensor:
            if watch is not None and len(y):
                watch(float((start - log_snr.max()) / (start - end)))
            with torch.enable_grad():
                z = y[:, :-1].detach().reshape(shape).requires_grad_()
                velocity = _velocity(denoise, z, log_snr)
                divergence = _traced(velocity, z, probes)
            return torch.cat([velocity.detach().flatten(1), divergence[:, None]], dim=1)

        return slope


def _velocity(denoise: Denoise, z: Tensor, log_snr: Tensor) -> Tensor:
    """dz/dlambda at log-SNRs (B,): the turn of the circle phi, times dphi/dlambda = -sin(phi) cos(phi) / 2."""
    level = denoise.schedule.level(denoise.schedule.time(log_snr), z.ndim)
    size = (torch.as_tensor(level.alpha) ** 2 + torch.as_tensor(level.sigma) ** 2).sqrt()
    cos, sin, size = (torch.as_tensor(v).detach().to(z) for v in (level.alpha / size, level.sigma / size, size))
    level = Level(*(torch.as_tensor(v).detach().to(z) for v in level))
    # Momentum of guidance would make the flow depend on the path: every call is another of the same step.
    p = denoise.predict(z * size, level, again=True)
    return 0.5 * sin * cos * (sin * p.x0 - cos * p.eps)


def _traced(velocity: Tensor, z: Tensor, probes: list[Tensor]) -> Tensor:
    """Trace of the Jacobian of each sample, (B,): by products with the probes, exact if there is none."""
    if probes:
        found = []
        for k, probe in enumerate(probes):
            keep = k + 1 < len(probes)
            (product,) = torch.autograd.grad(velocity, z, grad_outputs=probe, retain_graph=keep)
            found.append((product * probe).flatten(1).sum(1))
        return torch.stack(found).mean(0)
    rows = velocity.flatten(1)
    total = rows.new_zeros(len(rows))
    for i in range(rows.shape[1]):
        (row,) = torch.autograd.grad(rows[:, i].sum(), z, retain_graph=True)
        total = total + row.flatten(1)[:, i]
    return total


def check_signal(denoise: Denoise, x0: Tensor) -> int:
    """Refuses, in the prediction's own words, a network that cannot give x0 where the schedule reaches alpha = 0.

    Returns the evaluations that this took.

    Raises:
        ValueError: it cannot.
    """
    level = denoise.schedule.level(1.0)
    if level.alpha != 0 or not len(x0):
        return 0
    with torch.no_grad():
        _ = denoise.predict(torch.zeros_like(x0), level, again=True).x0
    return 1


def check_images(x0: Tensor, option: str, instead: str) -> None:
    """Refuses data beyond [-1, 1] for what counts in 8-bit levels.

    Raises:
        ValueError: names the option and the one to choose instead.
    """
    if len(x0) and float(x0.abs().max()) > 1 + 1e-4:
        raise ValueError(f"{option} is for 8-bit data in [-1, 1], and these reach beyond: choose {instead}.")


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses an unknown choice.

    Raises:
        ValueError: lists what there is.
    """
    if value not in choices:
        raise ValueError(f"likelihood.{key}={value} is unknown: choose {', '.join(choices[:-1])} or {choices[-1]}.")
