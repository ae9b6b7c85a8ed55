r"""Ground truth: Gaussian mixtures, whose denoiser, score, flow and likelihood are known under every schedule.

For :math:`x_0 \sim \sum_k w_k N(\mu_k, C_k)`, the noisy marginal is
:math:`x_t \sim \sum_k w_k N(\alpha \mu_k, \alpha^2 C_k + \sigma^2 I)` and x0 given x_t is a mixture again, of the
components' conditional Gaussians weighted by their responsibilities (any text on Gaussian conditioning; Karras et al.
2022, arXiv 2206.00364, appendix B.3 for the empirical case C = 0). Everything is written so that it is finite at
sigma = 0 and at alpha = 0, for one level of a whole batch or a level for each sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.parameterizations import Parameterization
from ornstein.diffusion.samplers.adaptive import dormand_prince
from ornstein.diffusion.schedules import Level, NoiseSchedule, Scalar


class Posterior(NamedTuple):
    """What x_t says of the components, in their own axes (K components, D dimensions, flattened).

    ``share``: (B, K) responsibilities. ``log_density``: (B,) ln p_t(x_t). ``residual``: (B, K, D) x_t - alpha mu.
    ``variance``: (B or 1, K, D or 1) of x_t within a component.
    """

    share: Tensor
    log_density: Tensor
    residual: Tensor
    variance: Tensor
    alpha: Tensor
    sigma: Tensor


class GaussianMixture(nn.Module):
    r"""A mixture of Gaussians over tensors of any shape, with classes if its components are labelled.

    .. math:: E[x_0|x_t] = \sum_k r_k(x_t) \left(\mu_k + \alpha C_k (\alpha^2 C_k + \sigma^2)^{-1} (x_t - \alpha \mu_k)
              \right)

    Args:
        means: (K, *shape).
        stds: (K,) positive, isotropic; or (K, *shape), one for each element. Instead of ``covariances``.
        weights: (K,) positive; normalised. Equal unless given.
        labels: (K,) int64, the class of each component, 0 to classes - 1. ``cond["label"]`` then picks components;
            the number of classes, which is what a conditioner gives for a dropped label, picks all.
        covariances: (K, D, D) symmetric positive definite over the flattened elements, instead of ``stds``.

    Source: Bishop 2006, "Pattern recognition and machine learning", section 2.3.3, component by component.
    When: judging anything that samples, guides or scores against what is exactly right.

    Raises:
        ValueError: shapes that do not agree, both or neither of stds and covariances, or values that are not positive.
    """

    means: Tensor
    variances: Tensor
    log_weights: Tensor
    axes: Tensor | None
    labels: Tensor | None

    def __init__(
        self,
        means: Tensor,
        stds: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        covariances: Tensor | None = None,
    ) -> None:
        super().__init__()
        count, size = means.shape[0], means[0].numel()
        weights = means.new_ones(count) if weights is None else weights
        axes = None
        if (stds is None) == (covariances is None):
            raise ValueError("a GaussianMixture needs stds or covariances: give one of them.")
        if covariances is not None:
            if covariances.shape != (count, size, size):
                raise ValueError(f"covariances need shape {(count, size, size)}, got {tuple(covariances.shape)}.")
            variances, axes = torch.linalg.eigh(covariances)
        else:
            assert stds is not None
            if not (count == stds.shape[0] == weights.shape[0]) or (stds.ndim > 1 and stds.shape != means.shape):
                raise ValueError("means, stds and weights need one entry per component.")
            variances = stds.reshape(count, -1) ** 2 * (stds.reshape(count, -1) > 0)
        if weights.shape != (count,) or (labels is not None and labels.shape != (count,)):
            raise ValueError("means, weights and labels need one entry per component.")
        if not bool((variances > 0).all() and (weights > 0).all()):
            raise ValueError("stds and weights must be positive, and covariances positive definite.")
        self.register_buffer("means", means)
        self.register_buffer("variances", variances)
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))
        self.register_buffer("axes", axes)
        self.register_buffer("labels", labels)

    @property
    def stds(self) -> Tensor:
        """(K,) or (K, D) standard deviations along the components' own axes."""
        return self.variances.sqrt().squeeze(1) if self.variances.shape[1] == 1 else self.variances.sqrt()

    @property
    def classes(self) -> int:
        """The number of classes: also the label that stands for none."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def null(self, label: Tensor) -> Tensor:
        """The null class for each ``label`` (B,), as a conditioner gives it for a dropped one: all components."""
        return torch.full_like(label, self.classes)

    def sample(self, size: int, *, label: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """(size, *shape) draws; of the classes in ``label`` (size,) where it is given."""
        if label is None:
            which = torch.multinomial(self.log_weights.exp(), size, replacement=True, generator=generator)
        else:
            chances = self._log_weights(label, self.log_weights).exp()
            which = torch.multinomial(chances, 1, generator=generator).squeeze(1)
        eps = torch.randn(size, self.means[0].numel(), generator=generator, dtype=self.means.dtype)
        draws = self.variances[which].sqrt() * eps
        if self.axes is not None:
            draws = torch.einsum("bij,bj->bi", self.axes[which], draws)
        return self.means[which] + draws.reshape(size, *self.means.shape[1:])

    def posterior(self, x_t: Tensor, level: Level, *, label: Tensor | None = None) -> Posterior:
        """The components' posterior given x_t (B, *shape) at a level of floats or of tensors that broadcast."""
        x = x_t.flatten(1)
        means, variances = (v.to(x) for v in (self.means.flatten(1), self.variances))
        alpha, sigma = _coefficients(level, x)
        residual = x[:, None] - alpha * means
        if self.axes is not None:
            residual = torch.einsum("bki,kij->bkj", residual, self.axes.to(x))
        variance = alpha * alpha * variances + sigma * sigma
        repeats = x.shape[1] / variance.shape[2]  # one variance stands for all dimensions where it is isotropic
        exponent = (residual * residual / variance).sum(2) + repeats * variance.log().sum(2)
        log_joint = self._log_weights(label, x) - 0.5 * exponent
        log_density = log_joint.logsumexp(1)
        share = torch.exp(log_joint - log_density[:, None])
        log_density = log_density - 0.5 * x.shape[1] * math.log(2 * math.pi)
        return Posterior(share, log_density, residual, variance, alpha, sigma)

    def posterior_mean(self, x_t: Tensor, level: Level, *, label: Tensor | None = None) -> Tensor:
        """E[x0 | x_t], (B, *shape): the ideal denoiser. Finite at both ends of a schedule."""
        return self.moments(x_t, level, label=label)[0]

    def moments(self, x_t: Tensor, level: Level, *, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(E[x0 | x_t], E[eps | x_t]), each (B, *shape), each from its own formula: no division by alpha or sigma."""
        alpha, sigma = _coefficients(level, x_t)
        if self.axes is None and self.variances.shape[1] == 1 and alpha.shape[0] == 1:
            return self._isotropic_moments(x_t, alpha[0], sigma[0], label)
        p = self.posterior(x_t, level, label=label)
        scaled = p.residual / p.variance
        gain = p.alpha * self.variances.to(scaled) * scaled
        x0 = (p.share[:, :, None] * (self.means.flatten(1).to(scaled) + self._outward(gain))).sum(1)
        eps = (p.share[:, :, None] * self._outward(p.sigma * scaled)).sum(1)
        return x0.reshape(x_t.shape), eps.reshape(x_t.shape)

    def _isotropic_moments(
        self, x_t: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same at one level for a whole batch, in (B, K) rather than (B, K, D): samplers spend their time here."""
        x = x_t.flatten(1)
        means, variances = self.means.flatten(1).to(x), self.variances.to(x).T
        variance = alpha * alpha * variances + sigma * sigma
        distance = torch.cdist(x, alpha * means, compute_mode="donot_use_mm_for_euclid_dist")
        offset = self._log_weights(label, x) - 0.5 * x.shape[1] * variance.log()
        share = torch.softmax(offset - distance * distance * (0.5 / variance), 1) / variance
        pull = share @ means
        x0 = sigma * sigma * pull + x * (share @ (alpha * variances).T)
        eps = sigma * (x * share.sum(1, keepdim=True) - alpha * pull)
        return x0.reshape(x_t.shape), eps.reshape(x_t.shape)

    def score(self, x_t: Tensor, level: Level, *, label: Tensor | None = None) -> Tensor:
        """The gradient of ln p_t at x_t, (B, *shape), also at sigma = 0."""
        p = self.posterior(x_t, level, label=label)
        return -(p.share[:, :, None] * self._outward(p.residual / p.variance)).sum(1).reshape(x_t.shape)

    def posterior_covariance(self, x_t: Tensor, level: Level, *, label: Tensor | None = None) -> Tensor:
        """Cov[x0 | x_t] over the flattened elements, (B, D, D)."""
        p = self.posterior(x_t, level, label=label)
        variances = self.variances.to(p.share)
        centres = self.means.flatten(1).to(p.share) + self._outward(p.alpha * variances * p.residual / p.variance)
        within = (variances * p.sigma * p.sigma / p.variance).expand(*p.share.shape, centres.shape[2])
        if self.axes is None:
            inner = torch.diag_embed((p.share[:, :, None] * within).sum(1))
        else:
            axes = self.axes.to(p.share)
            inner = torch.einsum("bk,kil,bkl,kjl->bij", p.share, axes, within, axes)
        offset = centres - (p.share[:, :, None] * centres).sum(1, keepdim=True)
        return inner + torch.einsum("bk,bki,bkj->bij", p.share, offset, offset)

    def log_prob(self, x_t: Tensor, level: Level | None = None, *, label: Tensor | None = None) -> Tensor:
        """Log-density of p_t at x_t, (B,) nats; of clean data unless a level is given."""
        return self.posterior(x_t, DATA if level is None else level, label=label).log_density

    def flow(self, x: Tensor, t: Level, s: Level, *, label: Tensor | None = None, tolerance: float = 1e-9) -> Tensor:
        r"""Carries x (B, *shape) along the probability flow from level t to level s, towards data or noise.

        A single Gaussian keeps its standardised position: closed form. A mixture is integrated with Dormand-Prince to
        ``tolerance`` on the circle :math:`\tan\varphi = \sigma/\alpha`, where the flow of
        :math:`z = x/\sqrt{\alpha^2 + \sigma^2}` is the same under every schedule and finite at both ends:
        :math:`dz/d\varphi = \cos\varphi\, \hat\epsilon - \sin\varphi\, \hat x_0`. Levels are of floats.
        """
        if len(self.means) == 1:
            return self._gaussian_flow(x, t, s)

        def slope(z: Tensor, phi: Tensor) -> Tensor:
            level = circle(phi.reshape(-1, *([1] * (z.ndim - 1))))
            x0, eps = self.moments(z, level, label=label)
            return level.alpha.to(z) * eps - level.sigma.to(z) * x0  # type: ignore[union-attr]

        sizes = [math.hypot(float(level.alpha), float(level.sigma)) for level in (t, s)]
        ends = [math.atan2(float(level.sigma), float(level.alpha)) for level in (t, s)]
        if ends[0] == ends[1]:
            return x * (sizes[1] / sizes[0])
        result = dormand_prince(slope, x / sizes[0], *ends, rtol=tolerance, atol=tolerance, max_steps=20_000)
        return result.y * sizes[1]

    def denoiser(
        self, schedule: NoiseSchedule, parameterization: Parameterization, *, variance_fraction: float = 0.0
    ) -> AnalyticDenoiser:
        """The ideal denoiser behind a parameterization, so that the parameterization is really exercised."""
        return AnalyticDenoiser(self, schedule, parameterization, variance_fraction=variance_fraction)

    def consistency(self, schedule: NoiseSchedule, parameterization: Parameterization) -> ConsistencyDenoiser:
        """The exact consistency function, which maps x_t to the end of its own trajectory."""
        return ConsistencyDenoiser(self, schedule, parameterization)

    def _gaussian_flow(self, x: Tensor, t: Level, s: Level) -> Tensor:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (_coefficients(level, x.flatten(1)) for level in (t, s))
        variances, means = self.variances.to(x), self.means.flatten(1).to(x)
        ratio = ((alpha_s**2 * variances + sigma_s**2) / (alpha_t**2 * variances + sigma_t**2)).sqrt()
        offset = x.flatten(1)[:, None] - alpha_t * means
        if self.axes is not None:
            offset = torch.einsum("bki,kij->bkj", offset, self.axes.to(x))
        return (alpha_s * means + self._outward(ratio * offset)).reshape(x.shape)

    def _outward(self, inner: Tensor) -> Tensor:
        """(B, K, D) along the components' axes, back along those of the data."""
        return inner if self.axes is None else torch.einsum("bkj,kij->bki", inner, self.axes.to(inner))

    def _log_weights(self, label: Tensor | None, like: Tensor) -> Tensor:
        """(K,), or (B, K) with what is not of the class at -inf; normalised within the class."""
        weights = self.log_weights.to(like)
        if label is None:
            return weights
        if self.labels is None:
            raise ValueError("this mixture has no classes: give GaussianMixture labels=, or bind no label.")
        taken = (label[:, None] == self.labels) | (label[:, None] == self.classes)
        chosen = torch.where(taken, weights, -torch.inf)
        return chosen - chosen.logsumexp(1, keepdim=True)


@dataclass(frozen=True)
class AnalyticDenoiser(Denoiser):
    """The ideal denoiser, passed through a parameterization's input scaling and ``target -> output -> x0``.

    ``variance_fraction`` is what it says of the reverse variance where the parameterization learns one. In the limit of
    small steps any is right; with a finite step, what is left between the posterior's variance (0) and the best
    isotropic one is the spread of x0 given x_t.
    """

    variance_fraction: float = 0.0

    def output(self, x_t: Tensor, level: Level) -> Tensor:
        """The parameterization's target for the ideal x0 and eps."""
        x0, eps = self.ideal(through_scaling(self.parameterization, x_t, level), level)
        target = self.parameterization.target(x0, eps, level)
        if self.parameterization.outputs == 1:
            return target
        return torch.cat([target, torch.full_like(target, 2 * self.variance_fraction - 1)], dim=1)

    def ideal(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """(x0, eps) as the best network would know them."""
        mixture = self.network
        assert isinstance(mixture, GaussianMixture)
        return mixture.moments(x_t, level, label=self.cond.get("label"))


@dataclass(frozen=True)
class ConsistencyDenoiser(AnalyticDenoiser):
    """The exact consistency model of a mixture: x0 is where the probability flow takes x_t, not its posterior mean."""

    tolerance: float = 1e-7

    def ideal(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """(x0, eps) of the trajectory through x_t, at one level for the whole batch."""
        mixture = self.network
        assert isinstance(mixture, GaussianMixture)
        x0 = mixture.flow(x_t, level, DATA, label=self.cond.get("label"), tolerance=self.tolerance)
        return x0, (x_t - level.alpha * x0) / level.sigma


DATA = Level(0.0, 1.0, 0.0, 0.0, 1.0)


def circle(phi: Tensor) -> Level:
    """The levels alpha = cos(phi), sigma = sin(phi), whose coordinate t is phi itself."""
    cos, sin = torch.cos(phi), torch.sin(phi)
    return Level(phi, cos, sin, -sin, cos)


def _coefficients(level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) as (B or 1, 1, 1) in x's dtype."""
    return _column(level.alpha, x), _column(level.sigma, x)


def _column(value: Scalar, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(-1, 1, 1)


def through_scaling(parameterization: Parameterization, x_t: Tensor, level: Level) -> Tensor:
    """x_t as a network would have it back after the input scaling, which is linear and must not lose it."""
    return parameterization.scale_input(x_t, level) / parameterization.scale_input(torch.ones_like(x_t[:1]), level)
