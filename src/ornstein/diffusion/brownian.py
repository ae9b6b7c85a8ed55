"""A Brownian path that any number of steps reads off alike, for samplers that solve an SDE."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ornstein.diffusion.noise import SampleNoise

_DRAW = 0x42726F77  # far from the small numbers by which samplers count their own draws within a step
_MAX_LEVELS = 30  # a node's number has to fit the counter's 32 bits


class BrownianPath:
    r"""A virtual Brownian tree: W is fixed by (seed, sample index) alone, whatever the steps that ask for it.

    Lévy's construction on dyadic midpoints of [start, end], each with its own counter-based normal:

    .. math::
        W(u) = u\, z_{end} + \sum_{l < L} 2^{-l/2 - 1} \Lambda_{l,k}(u)\, z_{l,k},
        \qquad \Lambda_{l,k}(u) = 1 - |2^{l+1} u - 2k - 1|, \quad k = \lfloor 2^l u \rfloor

    in units of the interval. Points are rounded to multiples of 2**-levels of it, where the sum is exact: increments
    over intervals that do not overlap are independent, and W(c) - W(a) = (W(c) - W(b)) + (W(b) - W(a)). Halving a
    sampler's steps refines the same path, so that an SDE sampler converges sample by sample. One increment costs up to
    2 ``levels`` normals a value, where fresh noise costs one, and on an accelerator the host waits for each increment.

    Any strictly monotone clock will do; t itself is bounded on every schedule.
    Source: Lévy 1948; Li et al. 2020 (arXiv 2001.01328), section 4.
    When: comparing SDE samplers or step counts on the same noise.

    Args:
        noise: the batch's counter-based noise. The path's own numbers never meet those that samplers draw from it.
        start: one end of the clock, finite.
        end: the other end, above or below it.
        levels: depth of the tree, 1 to 30.

    Raises:
        ValueError: ends that are equal or not finite, or levels outside [1, 30].
    """

    def __init__(self, noise: SampleNoise, start: float, end: float, *, levels: int = 20) -> None:
        if not (math.isfinite(start) and math.isfinite(end) and start != end):
            raise ValueError(f"a Brownian path needs two finite, different ends, got {start} and {end}.")
        if not 1 <= levels <= _MAX_LEVELS:
            raise ValueError(f"a Brownian path has 1 to {_MAX_LEVELS} levels, not {levels}.")
        self.noise, self.start, self.end, self.levels = noise, start, end, levels

    def increment(self, a: float, b: float) -> Tensor:
        """(W(b) - W(a)) / sqrt(|b - a|), (B, *shape) float32: standard normal, to be scaled by the caller's step.

        Raises:
            ValueError: a or b lies outside the path, or they are closer than it resolves.
        """
        first, second = self._cell(a), self._cell(b)
        if first == second:
            raise ValueError(f"{a} and {b} are closer than a Brownian path of {self.levels} levels resolves: use more.")
        weights = self._weights(second)
        for node, weight in self._weights(first).items():
            weights[node] = weights.get(node, 0.0) - weight
        weights = {node: weight for node, weight in weights.items() if weight != 0.0}
        length = abs(second - first) * 2.0**-self.levels
        index = self.noise.index
        row = torch.tensor([list(weights), list(weights.values())], dtype=torch.float64, device=index.device)
        values = self.noise.source.noises(index, row[0].long(), _DRAW, shape=self.noise.shape)
        return torch.einsum("n,n...->...", row[1] * length**-0.5, values).float()

    def _cell(self, at: float) -> int:
        u = (at - self.start) / (self.end - self.start)
        # A grid's ends may miss the path's by rounding; the rounding to cells takes that up.
        if not -1e-9 <= u <= 1 + 1e-9:
            raise ValueError(f"{at} lies outside the Brownian path from {self.start} to {self.end}.")
        return round(u * 2**self.levels)

    def _weights(self, cell: int) -> dict[int, float]:
        """W at a cell's edge as a sum over nodes: 0 stands for the end, 2**l + k for midpoint k of level l."""
        weights = {0: cell * 2.0**-self.levels}
        for level in range(self.levels):
            width = 2 ** (self.levels - level)
            k, within = divmod(cell, width)
            if within == 0:  # an edge of this level, and so of every deeper one, where the tents are zero
                break
            weights[2**level + k] = 2.0 ** (-level / 2 - 1) * (1 - abs(2 * within / width - 1))
        return weights
