"""Samplers against diffusers, step for step: the same network, the same noise, the same time steps.

diffusers tabulates in float32. Where its scheduler takes a float64 table it gets ours, so that only the step is
compared; where it casts inside, the tolerance is float32's. Its grids are taken as they are, through ``Times``.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.grids import Discrete, Grid, Karras, Shifted, Uniform, make_grid
from ornstein.diffusion.parameterizations import EDMPreconditioned, Epsilon, Sample, V, Velocity
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.samplers import DDIM, DDPM, LCM, DPMpp2M, Euler, EulerAncestral, Heun, Sampler, State
from ornstein.diffusion.schedules import EDM, BetaSchedule, Cosine, Flow, Level, Linear, NoiseSchedule, Quadratic

# numpy's view of a tensor that diffusers takes of its own table
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

F64 = torch.float64
SHAPE = (5, 2, 4, 4)
SCHEDULES = {"linear": Linear, "scaled_linear": Quadratic, "squaredcos_cap_v2": Cosine}
PREDICTIONS = {"epsilon": Epsilon, "sample": Sample, "v_prediction": V}


@dataclass(frozen=True)
class Times:
    """A grid rule with fixed times."""

    values: Tensor

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        return self.values


class Network(nn.Module):
    """A smooth function of x and the noise conditioning that no scheduler can guess."""

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        phase = (noise_cond.to(x.dtype) / 300).reshape(-1, 1, 1, 1)
        return torch.tanh(0.8 * x + torch.sin(phase)) + 0.1 * x.flip(-1)


def at(index: Tensor | float) -> Tensor:
    """The noise conditioning of table index i, which stands at t = (i + 1)/1000."""
    return torch.full((SHAPE[0],), float(index) + 1)


def draw(seed: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def noises(step: int, draw_index: int = 0) -> Tensor:
    return draw(100 + step)


def walk(sampler: Sampler, denoiser: Denoiser, grid: Grid, x: Tensor, noise=noises) -> list[Tensor]:
    """All states of a trajectory from a given x."""
    state = State(x, grid, noise)
    path = []
    for i in range(grid.steps):
        state = sampler.step(denoiser, state, i)
        path.append(state.x)
    return path


def their_grid(schedule: NoiseSchedule, timesteps: Tensor) -> Grid:
    times = torch.cat([(timesteps.double() + 1) / 1000, torch.zeros(1, dtype=F64)])
    return make_grid(Times(times), schedule, len(timesteps))


def with_our_table(scheduler, schedule: BetaSchedule):
    scheduler.alphas_cumprod = schedule.alphas_cumprod()
    return scheduler


def patch_noise(monkeypatch: pytest.MonkeyPatch, module: str, offset: int = 1) -> None:
    """Diffusers draws where it stands: hand it the noise of step i + 1, as ours counts."""
    count = iter(range(offset, 10_000))
    monkeypatch.setattr(
        f"diffusers.schedulers.{module}.randn_tensor", lambda *a, **k: noises(next(count)).to(k["dtype"])
    )


def assert_paths_meet(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddpm(monkeypatch: pytest.MonkeyPatch, name: str, prediction: str, variance: str, spacing: str) -> None:
    from diffusers import DDPMScheduler

    schedule = SCHEDULES[name]()
    scheduler = DDPMScheduler(
        beta_schedule=name,
        prediction_type=prediction,
        variance_type=variance,
        timestep_spacing=spacing,
        clip_sample=False,
    )
    with_our_table(scheduler, schedule).set_timesteps(10)
    network, x = Network(), draw(0)
    ours = walk(
        DDPM(steps=10, variance=variance),
        Denoiser(network, schedule, PREDICTIONS[prediction]()),
        their_grid(schedule, scheduler.timesteps),
        x,
    )
    if spacing == "trailing":
        # diffusers leaves the noise out at table index 0 only, which a trailing grid never visits: its last step then
        # adds noise to the sample. Ours adds none at the last step (algorithm 2 of the paper).
        ours.pop()
    patch_noise(monkeypatch, "scheduling_ddpm")
    theirs = []
    for t in scheduler.timesteps[: len(ours)]:
        x = scheduler.step(network(x, at(t)), t, x).prev_sample
        theirs.append(x)
    # float64 throughout; x0 from eps divides by cosine's alpha of 5e-5.
    assert_paths_meet(ours, theirs, 1e-8)


def test_ddpm_clips_like_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDPMScheduler

    schedule, network, x = Linear(), Network(), draw(0)
    scheduler = with_our_table(DDPMScheduler(clip_sample=True, clip_sample_range=0.7), schedule)
    scheduler.set_timesteps(10)
    ours = walk(
        DDPM(steps=10),
        Denoiser(network, schedule, Epsilon(), clip_x0=0.7),
        their_grid(schedule, scheduler.timesteps),
        x,
    )
    patch_noise(monkeypatch, "scheduling_ddpm")
    theirs = []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, at(t)), t, x).prev_sample
        theirs.append(x)
    assert_paths_meet(ours, theirs, 1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(name: str, prediction: str, eta: float, spacing: str) -> None:
    from diffusers import DDIMScheduler

    schedule = SCHEDULES[name]()
    scheduler = DDIMScheduler(
        beta_schedule=name, prediction_type=prediction, timestep_spacing=spacing, clip_sample=False
    )
    with_our_table(scheduler, schedule).set_timesteps(10)
    network, x = Network(), draw(0)
    # 10 divides 1000: elsewhere diffusers' DDIM steps by 1000 // steps instead of to its own next time step.
    grid = make_grid(Discrete(spacing=spacing), schedule, 10)
    ours = walk(DDIM(steps=10, eta=eta), Denoiser(network, schedule, PREDICTIONS[prediction]()), grid, x)
    theirs = []
    for i, t in enumerate(scheduler.timesteps):
        fresh = noises(i + 1) if eta > 0 else None
        x = scheduler.step(network(x, at(t)), t, x, eta=eta, variance_noise=fresh).prev_sample
        theirs.append(x)
    assert_paths_meet(ours, theirs, 1e-8)


def test_ddim_clips_like_diffusers() -> None:
    from diffusers import DDIMScheduler

    schedule, network, x = Cosine(), Network(), draw(0)
    scheduler = with_our_table(DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample_range=0.7), schedule)
    scheduler.set_timesteps(10)
    grid = make_grid(Discrete(), schedule, 10)
    ours = walk(DDIM(steps=10), Denoiser(network, schedule, Epsilon(), clip_x0=0.7), grid, x)
    theirs = []
    for t in scheduler.timesteps:
        # Ours keeps x_t = alpha x0 + sigma eps; diffusers leaves eps unclipped unless asked.
        x = scheduler.step(network(x, at(t)), t, x, use_clipped_model_output=True).prev_sample
        theirs.append(x)
    assert_paths_meet(ours, theirs, 1e-9)


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
@pytest.mark.parametrize("steps", [2, 7, 10, 50, 999])
def test_discrete_grid_is_diffusers_timestep_spacing(spacing: str, offset: int, steps: int) -> None:
    from diffusers import DDIMScheduler, DDPMScheduler

    for peer in (DDPMScheduler, DDIMScheduler):
        scheduler = peer(timestep_spacing=spacing, steps_offset=offset)
        scheduler.set_timesteps(steps)
        grid = make_grid(Discrete(spacing=spacing, offset=offset), Linear(), steps)
        index = [round(1000 * level.t) - 1 for level in grid.levels]
        assert index == [*scheduler.timesteps.tolist(), -1]


def sigma_space(ours: list[Tensor], grid: Grid) -> list[Tensor]:
    """x/alpha, in which diffusers' k-diffusion family keeps its samples."""
    return [x / level.alpha for x, level in zip(ours, grid.levels[1:], strict=True)]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
@pytest.mark.parametrize("kind", ["euler", "heun"])
def test_k_diffusion_family(name: str, prediction: str, kind: str) -> None:
    import diffusers

    schedule = SCHEDULES[name]()
    make = {"euler": diffusers.EulerDiscreteScheduler, "heun": diffusers.HeunDiscreteScheduler}[kind]
    scheduler = make(
        beta_schedule=name,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=prediction,
        timestep_spacing="leading",
    )
    with_our_table(scheduler, schedule).set_timesteps(12)
    denoiser = Denoiser(Network(), schedule, PREDICTIONS[prediction]())
    visited = scheduler.timesteps[:1].tolist() + scheduler.timesteps[1 :: 2 if kind == "heun" else 1].tolist()
    grid = their_grid(schedule, torch.tensor(visited))
    sampler = Heun(steps=12, coordinate="sigma") if kind == "heun" else Euler(steps=12)
    start = draw(0)
    ours = sigma_space(walk(sampler, denoiser, grid, start), grid)
    x, theirs = (start / grid[0].alpha).float(), []
    for i, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(x, t)
        x = scheduler.step(denoiser.network(model_input, at(t)), t, x).prev_sample
        # Heun's calls alternate between the Euler guess and its correction; the last step is Euler's alone.
        if kind == "euler" or i % 2 == 1 or i + 1 == len(scheduler.timesteps):
            theirs.append(x)
    # Their samples are float32 and start at sigma = 150: absolute rounding of 150 * 6e-8 a step.
    assert_paths_meet(ours, theirs, 1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpmpp_2m(name: str, prediction: str, steps: int, final: str) -> None:
    from diffusers import DPMSolverMultistepScheduler

    schedule = SCHEDULES[name]()
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule=name,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=prediction,
        timestep_spacing="leading",
        final_sigmas_type=final,
    )
    with_our_table(scheduler, schedule).set_timesteps(steps)
    grid = their_grid(schedule, scheduler.timesteps)
    if final == "sigma_min":
        # Their last step ends at table index 0, and lowers its order in runs of fewer than 15 steps.
        grid = Grid((*grid.levels[:-1], schedule.level(0.001)))
    sampler = DPMpp2M(steps=steps, lower_order_final=final == "sigma_min" and steps < 15)
    denoiser = Denoiser(Network(), schedule, PREDICTIONS[prediction]())
    start = draw(0)
    ours = walk(sampler, denoiser, grid, start)
    x, theirs = start.float(), []
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser.network(x, at(t)), t, x).prev_sample
        theirs.append(x)
    # Their update runs in float32, on coefficients that come from a float32 sigma.
    assert_paths_meet(ours, theirs, 2e-4 if name == "squaredcos_cap_v2" else 5e-5)


def test_flow_match_euler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    sigmas = torch.linspace(1.0, 0.1, 10, dtype=F64)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    denoiser = Denoiser(Network(), Flow(), Velocity())
    grid = make_grid(Times(torch.cat([sigmas, torch.zeros(1, dtype=F64)])), Flow(), 10)
    start = draw(0)
    ours = walk(Euler(steps=10), denoiser, grid, start)
    x, theirs = start.float(), []
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser.network(x, t.expand(SHAPE[0])), t, x).prev_sample
        theirs.append(x)
    assert_paths_meet(ours, theirs, 1e-5)  # theirs is float32


@pytest.mark.parametrize("s_churn", [0.0, 3.0])
def test_edm_euler(monkeypatch: pytest.MonkeyPatch, s_churn: float) -> None:
    from diffusers import EDMEulerScheduler

    steps, s_tmax = 12, 30.0
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(steps)
    schedule = EDM()
    grid = make_grid(Uniform(to_zero=True), schedule, steps)  # EDM's grid goes on from sigma_min to 0
    denoiser = Denoiser(Network(), schedule, EDMPreconditioned(sigma_data=0.5))
    start = draw(0) * 80
    # Churn stays below sigma_max: past it, ours stops at the schedule's end and theirs goes on.
    sampler = Euler(steps=steps, s_churn=s_churn, s_tmin=0.05, s_tmax=s_tmax, s_noise=1.003)
    ours = walk(sampler, denoiser, grid, start)
    # Ours numbers noise by step; theirs draws only where it churns.
    churned = [i + 1 for i in range(steps) if 0.05 <= grid[i].sigma <= s_tmax]
    draws = iter(churned)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_edm_euler.randn_tensor", lambda *a, **k: noises(next(draws)).to(k["dtype"])
    )
    x, theirs = start.float(), []
    for i, t in enumerate(scheduler.timesteps):
        # diffusers' interface asks the network at the level before churn, the paper after it. Here it is handed the
        # paper's answer, so that the step alone is compared.
        gamma = min(s_churn / steps, 2**0.5 - 1) if i + 1 in churned else 0.0
        sigma_hat = grid[i].sigma * (1 + gamma)
        x_hat = x.double() + (noises(i + 1) * 1.003 * (sigma_hat**2 - grid[i].sigma ** 2) ** 0.5 if gamma else 0.0)
        output = denoiser.output(x_hat, Level(0.0, 1.0, sigma_hat, 0.0, 1.0))
        scheduler.scale_model_input(x, t)
        x = scheduler.step(output.float(), t, x, s_churn=s_churn, s_tmin=0.05, s_tmax=s_tmax, s_noise=1.003).prev_sample
        theirs.append(x)
    assert_paths_meet(ours, theirs, 3e-5)  # theirs is float32 and starts at size 80


def test_ddim_is_euler(cell) -> None:
    schedule, parameterization = cell
    denoiser = Denoiser(Network(), schedule, parameterization)
    grid = make_grid(Times(torch.linspace(1, 0, 6, dtype=F64)), schedule, 5)
    paths = [walk(sampler, denoiser, grid, draw(0)) for sampler in (DDIM(steps=5), Euler(steps=5))]
    assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True))


@pytest.mark.parametrize("sampler", [DDIM(steps=5), Euler(steps=5)], ids=["ddim", "euler"])
def test_euler_steps_are_straight_in_sigma_over_alpha(sampler: Sampler) -> None:
    # The textbook form that both stand for: x/alpha moves by (difference of sigma/alpha) * eps.
    schedule = Linear()
    denoiser = Denoiser(Network(), schedule, Epsilon())
    grid = make_grid(Times(torch.linspace(1, 0, 6, dtype=F64)), schedule, 5)
    x = draw(0)
    for i, ours in enumerate(walk(sampler, denoiser, grid, x)):
        t, s = grid[i], grid[i + 1]
        expected = s.alpha * (x / t.alpha + (s.sigma / s.alpha - t.sigma / t.alpha) * denoiser(x, t).eps)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        x = ours


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_euler_ancestral(monkeypatch: pytest.MonkeyPatch, name: str, prediction: str) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    schedule, steps = SCHEDULES[name](), 12
    scheduler = EulerAncestralDiscreteScheduler(
        beta_schedule=name,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=prediction,
        timestep_spacing="leading",
    )
    with_our_table(scheduler, schedule).set_timesteps(steps)
    denoiser = Denoiser(Network(), schedule, PREDICTIONS[prediction]())
    grid = their_grid(schedule, scheduler.timesteps)
    start = draw(0)
    ours = sigma_space(walk(EulerAncestral(steps=steps), denoiser, grid, start), grid)
    patch_noise(monkeypatch, "scheduling_euler_ancestral_discrete")
    x, theirs = (start / grid[0].alpha).float(), []
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser.network(scheduler.scale_model_input(x, t), at(t)), t, x).prev_sample
        theirs.append(x)
    # Their samples are float32 and start at sigma = 150.
    assert_paths_meet(ours, theirs, 1e-4)


@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddpm_learned_variance(monkeypatch: pytest.MonkeyPatch, name: str, steps: int) -> None:
    from diffusers import DDPMScheduler

    schedule = SCHEDULES[name]()
    scheduler = DDPMScheduler(beta_schedule=name, variance_type="learned_range", clip_sample=False)
    with_our_table(scheduler, schedule).set_timesteps(steps)
    network = Network()

    def between(x: Tensor, index: Tensor | float) -> Tensor:
        return torch.sin(3 * x + float(index) / 100)  # diffusers' convention: -1 is the posterior's, 1 the kernel's

    class Learned(Denoiser):
        def predict(self, x_t: Tensor, t, *, again: bool = False) -> Prediction:
            level = t if isinstance(t, Level) else self.schedule.level(t)
            fraction = (between(x_t, round(1000 * level.t) - 1) + 1) / 2
            return Prediction(x_t, level, eps=self.output(x_t, level), variance_fraction=fraction)

    grid = their_grid(schedule, scheduler.timesteps)
    sampler, denoiser = DDPM(steps=steps, variance="learned"), Learned(network, schedule, Epsilon())
    # Of the full grid the first and the last steps will do: what is special lies there.
    shown = [*range(min(steps, 4)), *range(max(4, steps - 5), steps)]
    count = iter(i + 1 for i in shown)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: noises(next(count)).to(k["dtype"])
    )
    for i in shown:
        x, t = draw(i), scheduler.timesteps[i]
        ours = sampler.step(denoiser, State(x, grid, noises), i).x
        output = torch.cat([network(x, at(t)), between(x, float(t))], dim=1)
        theirs = scheduler.step(output, t, x).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm(monkeypatch: pytest.MonkeyPatch, prediction: str, steps: int) -> None:
    from diffusers import LCMScheduler

    schedule, network, x = Quadratic(beta_start=0.00085, beta_end=0.012), Network(), draw(0)
    scheduler = LCMScheduler(prediction_type=prediction, clip_sample=False)
    with_our_table(scheduler, schedule).set_timesteps(steps)
    grid = their_grid(schedule, scheduler.timesteps)
    ours = walk(LCM(steps=steps, boundary=True), Denoiser(network, schedule, PREDICTIONS[prediction]()), grid, x)
    patch_noise(monkeypatch, "scheduling_lcm")
    theirs = []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, at(t)), t, x).prev_sample
        theirs.append(x)
    assert_paths_meet(ours, theirs, 1e-6)  # their scalings come from a float32 time step


@pytest.mark.parametrize("steps", [3, 8, 20])
def test_edm_dpm_solver(steps: int) -> None:
    from diffusers import EDMDPMSolverMultistepScheduler

    scheduler = EDMDPMSolverMultistepScheduler()
    scheduler.set_timesteps(steps)
    schedule = EDM()
    grid = make_grid(Karras(to_zero=True), schedule, steps)
    denoiser = Denoiser(Network(), schedule, EDMPreconditioned(sigma_data=0.5))
    start = draw(0) * 80
    # Their second order second-to-last step falls to first in short runs, and the last always does.
    ours = walk(DPMpp2M(steps=steps), denoiser, grid, start)
    x, theirs = start.float(), []
    for i, t in enumerate(scheduler.timesteps):
        output = denoiser.output(x.double(), grid[i])
        x = scheduler.step(output.float(), t, x).prev_sample
        theirs.append(x)
    assert_paths_meet(ours, theirs, 3e-5)  # theirs is float32 and starts at size 80


@pytest.mark.parametrize("steps", [1, 4, 15])
def test_edm_heun_ends_at_zero_as_the_paper_does(steps: int) -> None:
    # Karras et al. 2022, algorithm 1, written out.
    schedule = EDM()
    denoiser = Denoiser(Network(), schedule, EDMPreconditioned(sigma_data=0.5))
    x = start = draw(0) * 80
    ours = walk(Heun(steps=steps), denoiser, make_grid(Uniform(to_zero=True), schedule, steps), start)
    ramp = torch.linspace(0, 1, steps, dtype=F64) if steps > 1 else torch.zeros(1, dtype=F64)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigmas = [*((high + ramp * (low - high)) ** 7).tolist(), 0.0]
    for i in range(steps):
        t, s = sigmas[i], sigmas[i + 1]
        slope = (x - denoiser(x, Level(0.0, 1.0, t, 0.0, 1.0)).x0) / t
        euler = x + (s - t) * slope
        if s > 0:
            other = (euler - denoiser(euler, Level(0.0, 1.0, s, 0.0, 1.0)).x0) / s
            euler = x + (s - t) * 0.5 * (slope + other)
        x = euler
        # The noise conditioning is float32.
        torch.testing.assert_close(ours[i], x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["euler", "heun"])
def test_flow_match_on_shifted_grids(kind: str, shift: float) -> None:
    import diffusers

    steps = 10
    if kind == "euler":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
        grid = make_grid(Shifted(shift=shift), Flow(), steps)
    else:
        # Its Heun takes no sigmas and ends a step before data: its own levels are used.
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        grid = Grid(Flow().levels(scheduler.sigmas.double().unique().flip(0)))
    sampler = Euler(steps=steps) if kind == "euler" else Heun(steps=steps)
    denoiser, start = Denoiser(Network(), Flow(), Velocity()), draw(0)
    ours = walk(sampler, denoiser, grid, start)
    x, theirs = start.float(), []
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(denoiser.network(x, t.expand(SHAPE[0])), t, x).prev_sample
        if kind == "euler" or i % 2 == 1 or i + 1 == len(scheduler.timesteps):
            theirs.append(x)
    assert_paths_meet(ours, theirs, 1e-5)  # theirs is float32
