r"""Ground truth: Gaussian mixtures, whose denoiser, score and flow have closed forms under every schedule.

For :math:`x_0 \sim \sum_k w_k N(\mu_k, s_k^2 I)`, the noisy marginal is
:math:`x_t \sim \sum_k w_k N(\alpha \mu_k, (\alpha^2 s_k^2 + \sigma^2) I)` and the posterior mean of x0 is linear in
each component, weighted by the components' responsibilities (any text on Gaussian conditioning; Karras et al. 2022,
arXiv 2206.00364, appendix B.3 for the empirical case s = 0).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.parameterizations import Parameterization
from ornstein.diffusion.schedules import Level, NoiseSchedule


class GaussianMixture(nn.Module):
    """A mixture of isotropic Gaussians over tensors of any shape.

    Args:
        means: (K, *shape).
        stds: (K,) positive.
        weights: (K,) positive; normalised.

    Raises:
        ValueError: shapes that do not agree, or values that are not positive.
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor | None = None) -> None:
        super().__init__()
        weights = torch.ones_like(stds) if weights is None else weights
        if not (means.shape[0] == stds.shape[0] == weights.shape[0]):
            raise ValueError("means, stds and weights need one entry per component.")
        if not bool((stds > 0).all() and (weights > 0).all()):
            raise ValueError("stds and weights must be positive.")
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))

    def sample(self, size: int, *, generator: torch.Generator | None = None) -> Tensor:
        """(size, *shape) draws."""
        which = torch.multinomial(self.log_weights.exp(), size, replacement=True, generator=generator)
        eps = torch.randn(size, *self.means.shape[1:], generator=generator, dtype=self.means.dtype)
        return self.means[which] + self.stds[which].reshape(-1, *([1] * (self.means.ndim - 1))) * eps

    def posterior_mean(self, x_t: Tensor, level: Level) -> Tensor:
        """E[x0 | x_t], (B, *shape): the ideal denoiser. Finite at both ends of a schedule."""
        components = (1, -1, *([1] * (self.means.ndim - 1)))
        s2 = (self.stds**2).reshape(components)
        alpha, sigma = (torch.as_tensor(v, dtype=x_t.dtype, device=x_t.device) for v in (level.alpha, level.sigma))
        alpha, sigma = (v.reshape(-1, 1, *([1] * (self.means.ndim - 1))) for v in (alpha, sigma))
        variance = alpha**2 * s2 + sigma**2
        residual = x_t[:, None] - alpha * self.means[None]
        dims = tuple(range(2, residual.ndim))
        size = self.means[0].numel()
        flat_variance = variance.flatten(2).squeeze(2)
        logits = self.log_weights - 0.5 * (residual**2).sum(dims) / flat_variance - 0.5 * size * flat_variance.log()
        share = logits.softmax(1).reshape(x_t.shape[0], -1, *([1] * (self.means.ndim - 1)))
        conditional = self.means[None] + (alpha * s2 / variance) * residual
        return (share * conditional).sum(1)

    def denoiser(self, schedule: NoiseSchedule, parameterization: Parameterization) -> AnalyticDenoiser:
        """The ideal denoiser behind a parameterization, so that the parameterization is really exercised."""
        return AnalyticDenoiser(self, schedule, parameterization)


class AnalyticDenoiser(Denoiser):
    """The ideal denoiser, passed through ``target -> output -> x0`` of a parameterization."""

    def output(self, x_t: Tensor, level: Level) -> Tensor:
        """The parameterization's target for the ideal x0 and the eps that follows from it."""
        mixture = self.network
        assert isinstance(mixture, GaussianMixture)
        x0 = mixture.posterior_mean(x_t, level)
        eps = (x_t - level.alpha * x0) / level.sigma
        return self.parameterization.target(x0, eps, level)
