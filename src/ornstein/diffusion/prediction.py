"""What a denoiser says about a noisy batch: x0 and eps, consistent with each other and with x_t."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ornstein.diffusion.schedules import Level, Scalar


def combine(a: Scalar, x: Tensor, b: Scalar, y: Tensor) -> Tensor:
    """The sum a x + b y, in as few kernels as it takes: what nearly every step of every sampler ends with.

    Args:
        a: a number, or a tensor that broadcasts against x.
        x: (B, *shape).
        b: as ``a``.
        y: (B, *shape).
    """
    scaled = x if isinstance(a, float) and a == 1.0 else a * x
    if isinstance(b, float):
        if b == 0.0:
            return scaled
        return torch.add(scaled, y, alpha=b)
    return scaled + b * y


def _is_zero(value: Scalar) -> bool:
    return isinstance(value, float) and value == 0.0


class Prediction:
    r"""A denoiser's answer at one level. Give x0, eps or both; the other follows from x_t = alpha x0 + sigma eps.

    Args:
        x_t: (B, *shape), the noisy input.
        level: its noise level.
        x0: (B, *shape) predicted clean data.
        eps: (B, *shape) predicted noise.
        variance_fraction: (B, *shape) where a learned reverse variance stands between the posterior's (0) and the
            forward kernel's (1), on the log scale (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.1); None where
            the network does not learn one.
        renoise_eps: (B, *shape) the noise direction that a step renoises with, where it is not ``eps`` (CFG++).

    Raises:
        ValueError: neither is given; or, on reading, x0 is asked for where alpha = 0 or eps where sigma = 0 and the
            parameterization cannot give it there.
    """

    __slots__ = ("_eps", "_renoise_eps", "_x0", "level", "variance_fraction", "x_t")

    def __init__(
        self,
        x_t: Tensor,
        level: Level,
        *,
        x0: Tensor | None = None,
        eps: Tensor | None = None,
        variance_fraction: Tensor | None = None,
        renoise_eps: Tensor | None = None,
    ) -> None:
        if x0 is None and eps is None:
            raise ValueError("a Prediction needs x0 or eps.")
        self.x_t, self.level = x_t, level
        self._x0, self._eps = x0, eps
        self.variance_fraction, self._renoise_eps = variance_fraction, renoise_eps

    @property
    def x0(self) -> Tensor:
        """Predicted clean data, (B, *shape)."""
        if self._x0 is None:
            if isinstance(self.level.alpha, float) and self.level.alpha == 0.0:
                raise ValueError("eps does not determine x0 where alpha = 0: choose objective=v, x0, flow or edm.")
            assert self._eps is not None
            self._x0 = combine(1.0, self.x_t, -self.level.sigma, self._eps) / self.level.alpha
        return self._x0

    @property
    def eps(self) -> Tensor:
        """Predicted noise, (B, *shape)."""
        if self._eps is None:
            if isinstance(self.level.sigma, float) and self.level.sigma == 0.0:
                raise ValueError("x0 does not determine eps where sigma = 0: the trajectory has already ended there.")
            assert self._x0 is not None
            self._eps = combine(1.0, self.x_t, -self.level.alpha, self._x0) / self.level.sigma
        return self._eps

    @property
    def renoise_eps(self) -> Tensor:
        """The noise that a sampler adds back, (B, *shape): ``eps`` unless a guidance set another (CFG++)."""
        return self.eps if self._renoise_eps is None else self._renoise_eps

    def blend(self, *, x_t: Scalar = 0.0, x0: Scalar = 0.0, eps: Scalar = 0.0) -> Tensor:
        """The sum of x_t, x0 and the renoising eps with these coefficients, (B, *shape): what a step ends with.

        Where only one of x0 and eps is known, the other is a sum of it and x_t, and two kernels do for all.
        """
        alpha, sigma = self.level.alpha, self.level.sigma
        if self._renoise_eps is None and isinstance(alpha, float) and isinstance(sigma, float):
            if self._x0 is None and self._eps is not None and alpha > 0:
                return combine(x_t + x0 / alpha, self.x_t, eps - x0 * sigma / alpha, self._eps)
            if self._eps is None and self._x0 is not None and sigma > 0:
                return combine(x_t + eps / sigma, self.x_t, x0 - eps * alpha / sigma, self._x0)
        known = x0 * self.x0 if _is_zero(eps) else combine(x0, self.x0, eps, self.renoise_eps)
        return known if _is_zero(x_t) else combine(1.0, known, x_t, self.x_t)

    def with_x0(self, change: Callable[[Tensor], Tensor]) -> Prediction:
        """The same prediction with x0 changed (clipped, guided) and eps made to follow; the rest stays."""
        return Prediction(
            self.x_t,
            self.level,
            x0=change(self.x0),
            variance_fraction=self.variance_fraction,
            renoise_eps=self._renoise_eps,
        )

    def with_renoise_eps(self, eps: Tensor) -> Prediction:
        """The same prediction, renoised with ``eps``."""
        return Prediction(
            self.x_t,
            self.level,
            x0=self._x0,
            eps=self._eps,
            variance_fraction=self.variance_fraction,
            renoise_eps=eps,
        )

    def mix(self, other: Prediction, weight: float) -> Prediction:
        """Gives other + weight * (self - other) of the means, for two predictions of the same x_t.

        Guidance mixes means only: variance and renoising direction stay those of ``self``.
        """
        kept = {"variance_fraction": self.variance_fraction, "renoise_eps": self._renoise_eps}
        if self._x0 is None or other._x0 is None:
            return Prediction(self.x_t, self.level, eps=other.eps + weight * (self.eps - other.eps), **kept)
        return Prediction(self.x_t, self.level, x0=other.x0 + weight * (self.x0 - other.x0), **kept)

    def split(self, parts: int) -> list[Prediction]:
        """The predictions of a batch that was made by concatenating ``parts`` equal ones."""
        x_t, level = self.x_t.chunk(parts), self.level.chunk(parts)
        x0, eps, fraction, renoise = (
            value.chunk(parts) if value is not None else [None] * parts
            for value in (self._x0, self._eps, self.variance_fraction, self._renoise_eps)
        )
        return [
            Prediction(x_t[i], level[i], x0=x0[i], eps=eps[i], variance_fraction=fraction[i], renoise_eps=renoise[i])
            for i in range(parts)
        ]
