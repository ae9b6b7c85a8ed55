"""The sampler contract: ``init`` and ``step`` are pure, and the state holds all that a step needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import Grid, GridRule, Uniform, make_grid
from ornstein.diffusion.grids.base import check_steps
from ornstein.diffusion.noise import SampleNoise
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True)
class State:
    """Where a trajectory stands.

    Attributes:
        x: (B, *shape), float32 or float64.
        grid: the whole grid, so that last steps may lower their order.
        noise: the batch's counter-based noise.
        history: what a multistep method keeps, newest first.
        nfe: network evaluations per sample so far; the most of any sample, where they differ.
        nfe_each: (B,) int64 evaluations of each sample, where an adaptive solver spends them unequally.
        prediction: the newest prediction, for whoever watches.
    """

    x: Tensor
    grid: Grid
    noise: SampleNoise
    history: tuple[Tensor, ...] = ()
    nfe: int = 0
    nfe_each: Tensor | None = None
    prediction: Prediction | None = None

    def advance(
        self, x: Tensor, *, nfe: int, prediction: Prediction | None = None, history: tuple[Tensor, ...] = ()
    ) -> State:
        """The state after a step that took ``nfe`` network evaluations per sample."""
        return State(x, self.grid, self.noise, history, self.nfe + nfe, self.nfe_each, prediction)


class Sampler(ABC):
    """Base of fixed-step samplers.

    Args:
        steps: number of steps, at least 1.
        grid: the rule that places them; uniform in t unless given.

    Attributes:
        order: order of convergence in the step size, None where a sampler is stochastic.
        renoises: its steps renoise with ``Prediction.renoise_eps``, as CFG++ needs; others refuse such a denoiser.

    Raises:
        ValueError: steps < 1 or not whole, or a grid that is none.
    """

    order: int | None = None  # of convergence; a subclass may set it by instance, where an option makes it stochastic
    renoises: bool = False

    def __init__(self, *, steps: int = 50, grid: GridRule | None = None) -> None:
        check_steps(steps)
        if not hasattr(grid, "times") and grid is not None:
            raise ValueError(f"sampler.grid={grid} is no grid: choose sampler/grid={grid}.")
        self.steps = steps
        self.rule: GridRule = grid if grid is not None else Uniform()

    @property
    def stochastic(self) -> bool:
        """Whether steps draw fresh noise, which is right only where the noise that was trained on is independent."""
        return self.order is None

    def check(self, schedule: NoiseSchedule) -> None:
        """Refuses a schedule that this sampler cannot run on, before anything is trained or drawn.

        Raises:
            ValueError: the grid cannot be laid on the schedule, or the sampler has no meaning there.
        """
        make_grid(self.rule, schedule, self.steps)

    def begin(self, denoise: Denoise) -> Denoise:
        """The denoiser for a new trajectory.

        Raises:
            ValueError: it renoises in a direction of its own, which this sampler's step cannot honour.
        """
        if denoise.renoises and not self.renoises:
            raise ValueError(
                f"{type(self).__name__} cannot renoise as guidance=cfgpp asks: choose sampler=ddim, euler or "
                "euler_ancestral, or guidance=cfg."
            )
        return denoise.start()

    def init(self, grid: Grid, noise: SampleNoise) -> State:
        """Pure noise at the grid's first level: x = sigma * noise(0), as if its signal were 0 (alpha_1 is about 0)."""
        return State(noise(0) * grid[0].sigma, grid, noise)

    @abstractmethod
    def step(self, denoise: Denoise, state: State, i: int) -> State:
        """From ``grid[i]`` to ``grid[i + 1]``; noise for it is ``state.noise(i + 1)``."""

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoise,
        noise: SampleNoise,
        *,
        start: Tensor | None = None,
        watch: Callable[[int, State], None] | None = None,
    ) -> State:
        """Runs the whole grid and returns the last state, whose x is the sample.

        Args:
            denoise: the (guided) denoiser with its conditioning bound.
            noise: the batch's noise; says batch size, shape and device.
            start: (B, *shape) at the grid's first level, float32 or float64, in place of pure noise.
            watch: called with (i, state) after each step.
        """
        denoise = self.begin(denoise)
        grid = make_grid(self.rule, denoise.schedule, self.steps)
        noise = noise.expect(grid.steps)
        state = self.init(grid, noise) if start is None else State(start, grid, noise)
        for i in range(grid.steps):
            state = self.step(denoise, state, i)
            if watch is not None:
                watch(i, state)
        return state
