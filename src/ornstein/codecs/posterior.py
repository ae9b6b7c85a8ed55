"""The Gaussian that a variational encoder puts out."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# exp(-30) and exp(20) are far outside what trained encoders put out, and keep exp finite in float32.
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class DiagonalGaussian:
    """q(z | x) = N(mean, diag(exp(logvar))), both (B, C, H, W); logvar is clamped to [-30, 20]."""

    mean: Tensor
    raw_logvar: Tensor

    @cached_property
    def logvar(self) -> Tensor:
        """Log-variance, (B, C, H, W), in [-30, 20]."""
        return self.raw_logvar.clamp(*LOGVAR_RANGE)

    @cached_property
    def std(self) -> Tensor:
        """Standard deviation, (B, C, H, W)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, mean + std * eps, differentiable in both; ``generator`` is on the tensors' device."""
        mean = self.mean
        eps = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + self.std * eps

    def kl(self) -> Tensor:
        r"""KL(q || N(0, I)) in nats, (B,).

        .. math:: \tfrac12 \sum_j \mu_j^2 + \sigma_j^2 - 1 - \ln \sigma_j^2

        Source: Kingma & Welling 2014 (arXiv 1312.6114), appendix B.
        """
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(dim=1)
