r"""The terms of the variational bound, exact, per sample, in nats: what training estimates and evaluation adds up.

On a grid :math:`0 = t_0 < \dots < t_T = 1`, with :math:`s = t_{i-1}`, :math:`t = t_i`,

.. math:: -\ln p(x_0) \le \mathrm{KL}(q(x_1|x_0)\,\|\,p(x_1)) + \sum_i E\, \mathrm{KL}(q(x_s|x_t, x_0)\,\|\,p(x_s|x_t))
          - E \ln p(x_0|x_{t_1})

where the last term stands in for the last KL if sigma(0) = 0. Where sigma(0) > 0 (edm, ve, learned schedules) every
step has its KL, and :func:`reconstruction_terms` follows. Source: Ho et al. 2020 (arXiv 2006.11239), eqs. 5-13; Kingma
et al. 2021 (arXiv 2107.00630), eq. 11 and appendix A.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import Level, Scalar, transition_between

Variance = Literal["posterior", "forward", "learned"]
Last = Literal["discrete", "gaussian"]

_LN2 = math.log(2.0)


def vlb_terms(
    prediction: Prediction,
    x0: Tensor,
    t: Level,
    s: Level,
    *,
    variance: Variance = "posterior",
    last: Last = "discrete",
    floor: Scalar | None = None,
) -> Tensor:
    r"""One step's term of the bound, from level t to the less noisy level s, (B,) nats, summed over dimensions.

    Where sigma_s > 0, :math:`\mathrm{KL}(q(x_s|x_t,x_0)\,\|\,p(x_s|x_t))` (Ho et al. 2020, eq. 8); where sigma_s = 0,
    :math:`-\ln p(x_0|x_t)` with mean x0_hat (eq. 13). The two reverse means differ by ``on_x0 (x0 - x0_hat)``.

    Args:
        prediction: what the denoiser says of x_t, (B, *shape).
        x0: (B, *shape) clean data, in [-1, 1] for ``last="discrete"``.
        t, s: the levels, both floats, or both tensors that broadcast against x0 (float64 keeps long grids exact:
            coefficients are computed in their dtype, then cast to that of x0).
        variance: of p(x_s|x_t): the posterior's, the forward kernel's, or between the two on the log scale as the
            network's second half says (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.1).
        last: ``discrete`` integrates the Gaussian over the bins of 8-bit data, ``gaussian`` is its density.
        floor: stands in for the posterior's variance where sigma_s = 0 makes it 0. sigma_t**2 unless given; the
            published tables take the second step's, ``schedule.transition(2 / T, 1 / T).variance``.

    Raises:
        ValueError: an unknown option, or ``variance="learned"`` for a prediction without one.
    """
    if variance not in ("posterior", "forward", "learned"):
        raise ValueError(f"variance={variance!r} is unknown: choose posterior, forward or learned.")
    fraction: Scalar = 1.0 if variance == "forward" else 0.0
    if variance == "learned":
        if prediction.variance_fraction is None:
            raise ValueError(
                "variance=learned needs a network that learns its variance: choose objective=hybrid or "
                "objective.parameterization=LearnedVariance, or variance=posterior."
            )
        fraction = prediction.variance_fraction
    ends = s.sigma == 0
    if isinstance(ends, bool):
        return _decoder(prediction, x0, t, s, fraction, last, floor) if ends else _kl(prediction, x0, t, s, fraction)
    # Both forms for every sample, each with a level at which it is finite, so that no gradient is.
    inside = s._replace(sigma=torch.where(ends, 0.5 * t.sigma, s.sigma))
    nats = _kl(prediction, x0, t, inside, fraction)
    return torch.where(ends.flatten(), _decoder(prediction, x0, t, s, fraction, last, floor), nats)


def _kl(prediction: Prediction, x0: Tensor, t: Level, s: Level, fraction: Scalar) -> Tensor:
    kernel = transition_between(t, s)
    # ln of the forward kernel's variance over the posterior's is ln(sigma_t^2 / sigma_s^2) on any schedule.
    log_ratio = fraction * _like(2 * _log(t.sigma / s.sigma), x0)
    pull = _like(kernel.on_x0 * kernel.on_x0 / kernel.variance, x0)
    squared = pull * (x0 - prediction.x0) ** 2
    if isinstance(log_ratio, float) and log_ratio == 0.0:
        return 0.5 * squared.flatten(1).sum(1)
    log_ratio = torch.as_tensor(log_ratio, dtype=x0.dtype, device=x0.device)
    return 0.5 * (log_ratio + torch.expm1(-log_ratio) + squared * torch.exp(-log_ratio)).flatten(1).sum(1)


def _decoder(
    prediction: Prediction, x0: Tensor, t: Level, s: Level, fraction: Scalar, last: Last, floor: Scalar | None
) -> Tensor:
    size = t.sigma / s.alpha
    log_least = _like(_log(size * size if floor is None else floor / (s.alpha * s.alpha)), x0)
    log_most = _like(_log(size * size), x0)
    log_variance = log_least + fraction * (log_most - log_least)
    return decoder_terms(x0, prediction.x0, log_variance, last=last)


def decoder_terms(x0: Tensor, mean: Tensor, log_variance: Scalar, *, last: Last = "discrete") -> Tensor:
    r"""-ln of the likelihood of x0 under N(mean, exp(log_variance)), (B,) nats.

    ``discrete``: of the bin of width 2/255 around x0, the outermost two open (Ho et al. 2020, eq. 13), by
    differences of logarithms that stay exact in the tails. ``gaussian``: of the density.

    Raises:
        ValueError: an unknown ``last``.
    """
    log_variance = torch.as_tensor(log_variance, dtype=x0.dtype, device=x0.device)
    gap = x0 - mean
    if last == "gaussian":
        nats = 0.5 * (gap**2 * torch.exp(-log_variance) + log_variance + math.log(2 * math.pi))
        return nats.expand_as(x0).flatten(1).sum(1)
    if last != "discrete":
        raise ValueError(f"last={last!r} is unknown: choose discrete (8-bit data) or gaussian.")
    inverse_std = torch.exp(-0.5 * log_variance)
    upper, lower = (gap + 1 / 255) * inverse_std, (gap - 1 / 255) * inverse_std
    # The bin's mirror image has the same mass, and lies in the left tail, where logarithms of the cdf are exact.
    mirrored = lower + upper > 0
    left, right = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    log_right = _log_cdf(right)
    inner = log_right + torch.log(-torch.expm1(_log_cdf(left) - log_right))
    outer = torch.where(x0 < 0, _log_cdf(upper), _log_cdf(-lower))
    return -torch.where(x0.abs() > 1 - 1 / 255, outer, inner).flatten(1).sum(1)


def prior_terms(x0: Tensor, level: Level) -> Tensor:
    r""":math:`\mathrm{KL}(q(x_1|x_0)\,\|\,N(0, (\alpha_1^2 + \sigma_1^2) I))`, (B,) nats: the bound's first term, L_T.

    On variance-preserving schedules the prior is standard normal, as published (Ho et al. 2020, eq. 5).
    """
    size = level.alpha * level.alpha + level.sigma * level.sigma
    log_ratio = _like(_log(size / (level.sigma * level.sigma)), x0)
    share = _like(level.sigma * level.sigma / size - 1, x0)
    mean = _like(level.alpha * level.alpha / size, x0) * x0**2
    return 0.5 * (log_ratio + share + mean).flatten(1).sum(1)


def reconstruction_terms(x0: Tensor, z: Tensor, level: Level, *, last: Last = "discrete") -> Tensor:
    r"""-ln p(x0|z) for z drawn at a level whose sigma is not 0: a Gaussian with mean z/alpha, deviation sigma/alpha.

    (B,) nats, of the bin (``discrete``) or the density (``gaussian``). Source: Kingma et al. 2021, eq. 8.
    """
    ratio = level.sigma / level.alpha
    return decoder_terms(x0, z / level.alpha, _like(2 * _log(ratio), x0), last=last)


def bits_per_dim(nats: Tensor, x0: Tensor) -> Tensor:
    """(B,) nats over all dimensions of x0 as bits for each."""
    return nats / (x0.shape[1:].numel() * _LN2)


def _log_cdf(x: Tensor) -> Tensor:
    """Log of the standard normal cdf; its asymptotic series below -20, where torch's gradient loses its digits."""
    far = x.clamp(max=-20.0)
    y = far**-2
    series = -y * (1 - y * (3 - y * (15 - y * (105 - y * 945))))
    tail = -0.5 * far**2 - torch.log(-far) - 0.5 * math.log(2 * math.pi) + torch.log1p(series)
    return torch.where(x < -20, tail, torch.special.log_ndtr(x.clamp(min=-20.0)))


def _log(value: Scalar) -> Scalar:
    return torch.log(value) if isinstance(value, Tensor) else math.log(value)


def _like(value: Scalar, x0: Tensor) -> Scalar:
    return value.to(x0) if isinstance(value, Tensor) else value
