r"""The curves on which schedules keep (alpha, sigma), and how noise is scaled without leaving them.

Scaling noise against signal changes a schedule's log-SNR by a constant, but says nothing of the size of x. What does
is a schedule's family: :math:`N(\alpha, \sigma) = 1` for an N that is homogeneous of degree 1, so that

.. math:: (\alpha, \sigma) \mapsto \frac{(\alpha, k \sigma)}{N(\alpha, k \sigma)}

stays on the curve and lowers the log-SNR by :math:`2 \ln k`. For any such N, with the Wronskian
:math:`W = \alpha \sigma' - \alpha' \sigma` of what is divided, :math:`(\alpha/N)' = -N_\sigma W / N^2` and
:math:`(\sigma/N)' = N_\alpha W / N^2`, by Euler's :math:`N = \alpha N_\alpha + \sigma N_\sigma`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]


class Family(ABC):
    """One curve, with its norm N."""

    @abstractmethod
    def norm(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """N(alpha, sigma), which is 1 on the curve."""

    @abstractmethod
    def scale_noise(self, values: Coefficients, factor: float) -> Coefficients:
        """Coefficients on the curve with sigma/alpha multiplied by ``factor``."""

    def pair(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) on the curve at a log-SNR, finite where that is infinite."""
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        norm = self.norm(alpha, sigma)
        return alpha / norm, sigma / norm


class Fading(Family):
    """A curve whose alpha can be lowered to 0; subclasses say how sigma follows from alpha."""

    @abstractmethod
    def gap(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """1 - alpha without its cancellation, for a point on the curve."""

    @abstractmethod
    def sigma_at(self, alpha: Tensor, gap: Tensor) -> Tensor:
        """The sigma that goes with an alpha, given with its ``gap`` 1 - alpha."""

    @abstractmethod
    def d_sigma_at(self, alpha: Tensor, sigma: Tensor, d_alpha: Tensor) -> Tensor:
        """Derivative of that sigma."""


class VariancePreserving(Fading):
    """alpha**2 + sigma**2 = 1."""

    def norm(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.sqrt(alpha**2 + sigma**2)

    def scale_noise(self, values: Coefficients, factor: float) -> Coefficients:
        alpha, sigma, d_alpha, d_sigma = values
        sigma = factor * sigma
        norm = self.norm(alpha, sigma)
        # The Wronskian of a point on the circle is -d_alpha/sigma = d_sigma/alpha: in these terms sigma = 0, where
        # d_sigma may be infinite, and alpha = 0 need no care.
        return alpha / norm, sigma / norm, factor**2 * d_alpha / norm**3, factor * d_sigma / norm**3

    def gap(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma**2 / (1 + alpha)

    def sigma_at(self, alpha: Tensor, gap: Tensor) -> Tensor:
        return torch.sqrt(gap * (1 + alpha))

    def d_sigma_at(self, alpha: Tensor, sigma: Tensor, d_alpha: Tensor) -> Tensor:
        return -alpha * d_alpha / sigma


class Straight(Family):
    """alpha + sigma = 1."""

    def norm(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha + sigma

    def scale_noise(self, values: Coefficients, factor: float) -> Coefficients:
        alpha, sigma, d_alpha, d_sigma = values
        norm = alpha + factor * sigma
        turn = factor * (alpha * d_sigma - d_alpha * sigma) / norm**2
        return alpha / norm, factor * sigma / norm, -turn, turn


class SubVariancePreserving(Fading):
    """alpha**2 + sigma = 1: sigma is what a variance-preserving schedule would have as its variance."""

    def norm(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * (sigma + torch.sqrt(sigma**2 + 4 * alpha**2))

    def scale_noise(self, values: Coefficients, factor: float) -> Coefficients:
        alpha, sigma, d_alpha, d_sigma = values[0], factor * values[1], values[2], factor * values[3]
        root = torch.sqrt(sigma**2 + 4 * alpha**2)
        norm = 0.5 * (sigma + root)
        turn = (alpha * d_sigma - d_alpha * sigma) / norm**2
        return alpha / norm, sigma / norm, -0.5 * (1 + sigma / root) * turn, 2 * alpha / root * turn

    def gap(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / (1 + alpha)

    def sigma_at(self, alpha: Tensor, gap: Tensor) -> Tensor:
        return gap * (1 + alpha)

    def d_sigma_at(self, alpha: Tensor, sigma: Tensor, d_alpha: Tensor) -> Tensor:
        return -2 * alpha * d_alpha


class VarianceExploding(Family):
    """alpha = 1."""

    def norm(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha

    def scale_noise(self, values: Coefficients, factor: float) -> Coefficients:
        alpha, sigma, d_alpha, d_sigma = values
        return alpha, factor * sigma, d_alpha, factor * d_sigma
