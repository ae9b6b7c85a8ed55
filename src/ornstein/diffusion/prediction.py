"""What a denoiser says about a noisy batch: x0 and eps, consistent with each other and with x_t."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ornstein.diffusion.schedules import Level


class Prediction:
    r"""A denoiser's answer at one level. Give x0, eps or both; the other follows from x_t = alpha x0 + sigma eps.

    Args:
        x_t: (B, *shape), the noisy input.
        level: its noise level.
        x0: (B, *shape) predicted clean data.
        eps: (B, *shape) predicted noise.

    Raises:
        ValueError: neither is given; or, on reading, x0 is asked for where alpha = 0 or eps where sigma = 0 and the
            parameterization cannot give it there.
    """

    def __init__(self, x_t: Tensor, level: Level, *, x0: Tensor | None = None, eps: Tensor | None = None) -> None:
        if x0 is None and eps is None:
            raise ValueError("a Prediction needs x0 or eps.")
        self.x_t, self.level = x_t, level
        self._x0, self._eps = x0, eps

    @property
    def x0(self) -> Tensor:
        """Predicted clean data, (B, *shape)."""
        if self._x0 is None:
            if isinstance(self.level.alpha, float) and self.level.alpha == 0.0:
                raise ValueError("eps does not determine x0 where alpha = 0: choose objective=v, x0, flow or edm.")
            assert self._eps is not None
            self._x0 = (self.x_t - self.level.sigma * self._eps) / self.level.alpha
        return self._x0

    @property
    def eps(self) -> Tensor:
        """Predicted noise, (B, *shape)."""
        if self._eps is None:
            if isinstance(self.level.sigma, float) and self.level.sigma == 0.0:
                raise ValueError("x0 does not determine eps where sigma = 0: the trajectory has already ended there.")
            assert self._x0 is not None
            self._eps = (self.x_t - self.level.alpha * self._x0) / self.level.sigma
        return self._eps

    def with_x0(self, change: Callable[[Tensor], Tensor]) -> Prediction:
        """The same prediction with x0 changed (clipped, say) and eps made to follow."""
        return Prediction(self.x_t, self.level, x0=change(self.x0))

    def mix(self, other: Prediction, weight: float) -> Prediction:
        """Gives other + weight * (self - other), for two predictions of the same x_t."""
        if self._x0 is None or other._x0 is None:
            return Prediction(self.x_t, self.level, eps=other.eps + weight * (self.eps - other.eps))
        return Prediction(self.x_t, self.level, x0=other.x0 + weight * (self.x0 - other.x0))

    def split(self, parts: int) -> list[Prediction]:
        """The predictions of a batch that was made by concatenating ``parts`` equal ones."""
        x_t, level = self.x_t.chunk(parts), self.level.chunk(parts)
        x0 = self._x0.chunk(parts) if self._x0 is not None else [None] * parts
        eps = self._eps.chunk(parts) if self._eps is not None else [None] * parts
        return [Prediction(x_t[i], level[i], x0=x0[i], eps=eps[i]) for i in range(parts)]
