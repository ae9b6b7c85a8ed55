"""Multistep sampling of consistency models."""

from __future__ import annotations

from ornstein.diffusion.denoiser import Denoise
from ornstein.diffusion.grids import GridRule
from ornstein.diffusion.prediction import combine
from ornstein.diffusion.samplers.base import Sampler, State
from ornstein.diffusion.schedules import Level


class LCM(Sampler):
    r"""Jumps to data with a consistency model, adds fresh noise, jumps again.

    .. math:: x_s = \alpha_s f(x_t, t) + \sigma_s z

    Needs a consistency model: f has to be the flow's end point, the exact map from x_t to data, as consistency
    training or distillation gives it. The posterior mean of an ordinary denoiser is not that map, and its samples come
    out blurred: each jump would lose variance. Steps without noise at the last. Stochastic, one evaluation a step.
    ``boundary`` puts LCM's scalings around the prediction, which a latent consistency model is trained with:

    .. math::
        f = c_{skip}(t) x_t + c_{out}(t) \hat x_0, \qquad
        c_{skip} = \frac{d^2}{\tau^2 + d^2}, \quad c_{out} = \frac{\tau}{\sqrt{\tau^2 + d^2}}

    with d = ``sigma_data`` and tau = ``timestep_scaling`` times the index of t among ``num_timesteps``.
    Source: Song et al. 2023 (arXiv 2303.01469), section 3; Luo et al. 2023 (arXiv 2310.04378), section 4; diffusers'
    LCMScheduler.
    When: one to eight steps of a consistency model.

    Args:
        steps: number of steps.
        boundary: put the scalings around the prediction.
        sigma_data: d of the scalings.
        timestep_scaling: how fast they leave the boundary.
        num_timesteps: T of the discrete time steps that the scalings count in.
        grid: the rule that places the steps.

    Raises:
        ValueError: sigma_data or timestep_scaling is not positive.
    """

    def __init__(
        self,
        *,
        steps: int = 4,
        boundary: bool = False,
        sigma_data: float = 0.5,
        timestep_scaling: float = 10.0,
        num_timesteps: int = 1000,
        grid: GridRule | None = None,
    ) -> None:
        super().__init__(steps=steps, grid=grid)
        if sigma_data <= 0 or timestep_scaling <= 0 or num_timesteps < 1:
            raise ValueError(
                f"sampler.sigma_data={sigma_data}, sampler.timestep_scaling={timestep_scaling} and "
                f"sampler.num_timesteps={num_timesteps} must be positive."
            )
        self.boundary, self.sigma_data = boundary, sigma_data
        self.timestep_scaling, self.num_timesteps = timestep_scaling, num_timesteps

    def scalings(self, t: Level) -> tuple[float, float]:
        """(c_skip, c_out) at a level; (1, 0) at the first table index and below."""
        tau = self.timestep_scaling * max(self.num_timesteps * float(t.t) - 1, 0.0)
        size = tau**2 + self.sigma_data**2
        return self.sigma_data**2 / size, tau / size**0.5

    def step(self, denoise: Denoise, state: State, i: int) -> State:
        t, s = state.grid[i], state.grid[i + 1]
        p = denoise(state.x, t)
        skip, out = self.scalings(t) if self.boundary else (0.0, 1.0)
        x = p.blend(x_t=s.alpha * skip, x0=s.alpha * out)
        if i + 1 < state.grid.steps and s.sigma > 0:
            x = combine(1.0, x, s.sigma, state.noise(i + 1))
        return state.advance(x, nfe=denoise.cost, prediction=p)
