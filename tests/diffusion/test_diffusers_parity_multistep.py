"""Multistep and singlestep samplers against diffusers, step for step: the same network, noise and levels.

diffusers keeps its sigmas in float32; it is handed ours in float64, so that only the steps are compared. Its
DPMSolverMultistep casts every sample to float32, which sets the tolerance there.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.grids import Grid
from ornstein.diffusion.parameterizations import Epsilon, Sample, V, Velocity
from ornstein.diffusion.samplers import (
    DEIS,
    LMS,
    PNDM,
    DPMpp1S,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp3M,
    DPMpp3MSDE,
    Sampler,
    State,
    UniPC,
)
from ornstein.diffusion.samplers.multistep import half_log_snr
from ornstein.diffusion.schedules import Cosine, Flow, Linear, NoiseSchedule, Quadratic

# numpy's view of a tensor that diffusers takes of its own table; its own warning about scaled inputs
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*scale_model_input.*:UserWarning"),
]

F64 = torch.float64
SHAPE = (3, 2, 4, 4)
SCHEDULES = {"linear": Linear, "scaled_linear": Quadratic, "squaredcos_cap_v2": Cosine}
PREDICTIONS = {"epsilon": Epsilon, "sample": Sample, "v_prediction": V}
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}
DOUBLE = 1e-9  # float64 over 20 steps; x0 from eps divides by an alpha of 0.01 or so
SINGLE = 1e-4  # DPMSolverMultistep steps in float32


class Network(nn.Module):
    """A smooth function of x and the noise conditioning that no scheduler can guess."""

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        phase = (noise_cond.to(x.dtype) / 300).reshape(-1, 1, 1, 1)
        return torch.tanh(0.8 * x + torch.sin(phase)) + 0.1 * x.flip(-1)


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, dtype=F64, generator=torch.Generator().manual_seed(seed))


def noises(step: int, draw_index: int = 0) -> Tensor:
    return draw(100 + step)


def walk(sampler: Sampler, denoiser: Denoiser, grid: Grid, x: Tensor) -> list[Tensor]:
    """All states of a trajectory from a given x."""
    state, path = State(x, grid, noises), []
    for i in range(grid.steps):
        state = sampler.step(denoiser, state, i)
        path.append(state.x)
    return path


def grid_of(schedule: NoiseSchedule, timesteps: Tensor, final: str = "zero") -> Grid:
    """The levels of table indices, then sigma = 0 or, as ``final_sigmas_type="sigma_min"``, table index 0."""
    last = 0.0 if final == "zero" else 0.001
    times = torch.cat([(timesteps.double() + 1) / 1000, torch.tensor([last], dtype=F64)])
    return Grid(schedule.levels(times))


def give_sigmas(scheduler, grid: Grid) -> None:
    scheduler.sigmas = torch.tensor([level.sigma / level.alpha for level in grid.levels], dtype=F64)


def their_walk(scheduler, network: nn.Module, x: Tensor) -> list[Tensor]:
    path = []
    for t in scheduler.timesteps:
        cond = torch.full((SHAPE[0],), float(t) + 1)
        x = scheduler.step(network(scheduler.scale_model_input(x, t), cond), t, x).prev_sample
        path.append(x)
    return path


def patch_noise(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Diffusers draws where it stands: hand it the noise of step i + 1, as ours counts."""
    steps = iter(range(1, 10_000))
    monkeypatch.setattr(
        f"diffusers.schedulers.{module}.randn_tensor", lambda *a, **k: noises(next(steps)).to(k["dtype"])
    )


def assert_paths_meet(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def compare(
    make,
    ours: Sampler,
    name: str,
    prediction: str,
    steps: int,
    final: str,
    tolerance: float,
    *,
    ends_in_nan=False,
    **options,
):
    """Both trajectories from one start, on the levels of diffusers' own time steps."""
    schedule = SCHEDULES[name]()
    scheduler = make(beta_schedule=name, prediction_type=prediction, final_sigmas_type=final, **BETAS, **options)
    scheduler.set_timesteps(steps)
    grid = grid_of(schedule, scheduler.timesteps, final)
    give_sigmas(scheduler, grid)
    denoiser = Denoiser(Network(), schedule, PREDICTIONS[prediction]())
    mine, theirs = walk(ours, denoiser, grid, draw(0)), their_walk(scheduler, Network(), draw(0))
    if ends_in_nan:
        assert theirs.pop().isnan().all()
        assert mine.pop().isfinite().all()
    assert_paths_meet(mine, theirs, tolerance)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(
    ("order", "solver_type", "steps"),
    [(1, "midpoint", 10), (2, "midpoint", 10), (2, "heun", 10), (3, "midpoint", 10), (3, "heun", 20)],
)
def test_dpm_solver_multistep(name: str, prediction: str, final: str, order: int, solver_type: str, steps: int) -> None:
    from diffusers import DPMSolverMultistepScheduler

    lower = steps < 15  # what their lower_order_final means
    if order == 1:
        ours: Sampler = DPMpp1S(steps=steps)
    elif order == 2:
        ours = DPMpp2M(steps=steps, lower_order_final=lower, solver_type=solver_type)
    else:
        ours = DPMpp3M(steps=steps, form="published", bootstrap=False, lower_order_final=lower, solver_type=solver_type)
    # "leading" starts below pure noise: from cosine's alpha of 5e-5 their float32 would carry x0 as large as 1e4.
    compare(
        DPMSolverMultistepScheduler,
        ours,
        name,
        prediction,
        steps,
        final,
        SINGLE,
        solver_order=order,
        solver_type=solver_type,
        timestep_spacing="leading",
    )


def test_euler_at_final_is_lower_order_final() -> None:
    from diffusers import DPMSolverMultistepScheduler

    options = {"euler_at_final": True, "lower_order_final": False, "timestep_spacing": "leading"}
    ours = DPMpp2M(steps=20, lower_order_final=True)
    compare(DPMSolverMultistepScheduler, ours, "linear", "epsilon", 20, "sigma_min", SINGLE, **options)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(("order", "solver_type"), [(1, "midpoint"), (2, "midpoint"), (2, "heun")])
def test_dpm_solver_multistep_sde(
    monkeypatch: pytest.MonkeyPatch, name: str, prediction: str, final: str, order: int, solver_type: str
) -> None:
    from diffusers import DPMSolverMultistepScheduler

    patch_noise(monkeypatch, "scheduling_dpmsolver_multistep")
    ours = DPMpp1S(steps=20, eta=1.0) if order == 1 else DPMpp2MSDE(steps=20, solver_type=solver_type)
    compare(
        DPMSolverMultistepScheduler,
        ours,
        name,
        prediction,
        20,
        final,
        SINGLE,
        algorithm_type="sde-dpmsolver++",
        solver_order=order,
        solver_type=solver_type,
        timestep_spacing="leading",
    )


def test_third_order_sde_differs_from_diffusers_by_one_term() -> None:
    # Their weight of D2 has -1/2 where the integral has +1/2: -alpha_s D2 over ours, at every step.
    from diffusers import DPMSolverMultistepScheduler

    schedule = Linear()
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3)
    scheduler.set_timesteps(20)
    grid = grid_of(schedule, scheduler.timesteps)
    give_sigmas(scheduler, grid)
    scheduler._step_index = 10
    seen = [draw(k) for k in range(3)]  # x0 at steps 10, 9 and 8

    class Fixed(nn.Module):
        def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
            return seen[0]

    x, noise = draw(5), noises(11)
    theirs = scheduler.multistep_dpm_solver_third_order_update(seen[::-1], sample=x, noise=noise)
    state = State(x, grid, noises, history=(seen[1], seen[2]))
    ours = DPMpp3MSDE(steps=20, form="published").step(Denoiser(Fixed(), schedule, Sample()), state, 10).x
    ell = [half_log_snr(level) for level in grid.levels[8:12]]
    h = ell[3] - ell[2]
    first, second = (seen[0] - seen[1]) * h / (ell[2] - ell[1]), (seen[1] - seen[2]) * h / (ell[1] - ell[0])
    d2 = (first - second) * h / (ell[2] - ell[0])
    torch.testing.assert_close(theirs, ours - grid[11].alpha * d2, rtol=DOUBLE, atol=DOUBLE)
    assert float((theirs - ours).abs().max()) > 0.1


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(("steps", "final"), [(10, "zero"), (11, "zero"), (10, "sigma_min"), (11, "sigma_min")])
def test_dpm_solver_singlestep(name: str, prediction: str, solver_type: str, steps: int, final: str) -> None:
    from diffusers import DPMSolverSinglestepScheduler

    # Their grid has no leading spacing; -5.1 is the clip that their documentation advises for cosine.
    ours = DPMpp2S(steps=steps, nodes="grid", solver_type=solver_type, lower_order_final=True)
    compare(
        DPMSolverSinglestepScheduler,
        ours,
        name,
        prediction,
        steps,
        final,
        1e-8,
        solver_order=2,
        solver_type=solver_type,
        lower_order_final=True,
        lambda_min_clipped=-5.1,
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_unipc(name: str, prediction: str, solver_type: str, order: int, final: str) -> None:
    from diffusers import UniPCMultistepScheduler

    ours = UniPC(steps=12, solver_order=order, solver_type=solver_type, lower_order_final=True)
    compare(
        UniPCMultistepScheduler,
        ours,
        name,
        prediction,
        12,
        final,
        1e-6,  # they solve for rho in float32
        ends_in_nan=solver_type == "bh1" and final == "zero",  # their B(h) = -h is infinite there, and met by a zero
        solver_order=order,
        solver_type=solver_type,
        timestep_spacing="leading",
    )


def test_unip_is_unipc_without_its_corrector() -> None:
    from diffusers import UniPCMultistepScheduler

    ours = UniPC(steps=12, solver_order=3, corrector=False, lower_order_final=True)
    options = {"solver_order": 3, "disable_corrector": list(range(12)), "timestep_spacing": "leading"}
    compare(UniPCMultistepScheduler, ours, "linear", "epsilon", 12, "zero", 1e-6, **options)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("order", "steps"), [(1, 10), (2, 10), (3, 10), (3, 20)])
def test_deis(name: str, prediction: str, order: int, steps: int) -> None:
    from diffusers import DEISMultistepScheduler

    schedule = SCHEDULES[name]()
    scheduler = DEISMultistepScheduler(
        beta_schedule=name,
        prediction_type=prediction,
        solver_order=order,
        timestep_spacing="leading",
        **BETAS,
    )
    scheduler.set_timesteps(steps)
    grid = grid_of(schedule, scheduler.timesteps, "sigma_min")  # the only end that theirs is given
    give_sigmas(scheduler, grid)
    ours = DEIS(steps=steps, solver_order=order, lower_order_final=steps < 15)
    path = walk(ours, Denoiser(Network(), schedule, PREDICTIONS[prediction]()), grid, draw(0))
    assert_paths_meet(path, their_walk(scheduler, Network(), draw(0)), DOUBLE)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", ["runge_kutta", "heun"])
def test_pndm(name: str, prediction: str, warmup: str) -> None:
    from diffusers import PNDMScheduler

    schedule, steps = SCHEDULES[name](), 10
    scheduler = PNDMScheduler(
        beta_schedule=name,
        prediction_type=prediction,
        skip_prk_steps=warmup == "heun",
        set_alpha_to_one=True,
        **BETAS,
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod()
    scheduler.set_timesteps(steps)
    grid = grid_of(schedule, torch.arange(900, -1, -100))
    denoiser = Denoiser(Network(), schedule, PREDICTIONS[prediction]())
    if prediction == "v_prediction":
        # They average v and turn the mean into eps where each step starts; we average eps. One evaluation tells no
        # difference, so what meets is the first step of their series.
        theirs = their_walk(scheduler, Network(), draw(0))[:1]
        ours = [denoised_step(denoiser, draw(0), grid, schedule, warmup)]
        assert_paths_meet(ours, theirs, DOUBLE)
        return
    ours = walk(PNDM(steps=steps, warmup=warmup), denoiser, grid, draw(0))
    theirs = their_walk(scheduler, Network(), draw(0))
    # Runge-Kutta: their calls 4, 8 and 12 end a step of ours; Heun's start: their second call does.
    ends = theirs[3:12:4] + theirs[12:] if warmup == "runge_kutta" else theirs[1:]
    assert_paths_meet(ours, ends, DOUBLE)


def denoised_step(denoiser: Denoiser, x: Tensor, grid: Grid, schedule: NoiseSchedule, warmup: str) -> Tensor:
    """DDIM's way from the first level to where their first call goes: the middle of the step, or its end."""
    p = denoiser(x, grid[0])
    end = schedule.level((grid[0].t + grid[1].t) / 2) if warmup == "runge_kutta" else grid[1]
    return end.alpha * p.x0 + end.sigma * p.eps


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_lms(name: str, prediction: str) -> None:
    from diffusers import LMSDiscreteScheduler

    schedule, steps = SCHEDULES[name](), 12
    scheduler = LMSDiscreteScheduler(
        beta_schedule=name, prediction_type=prediction, timestep_spacing="leading", **BETAS
    )
    scheduler.set_timesteps(steps)
    grid = grid_of(schedule, scheduler.timesteps)
    give_sigmas(scheduler, grid)
    denoiser = Denoiser(Network(), schedule, PREDICTIONS[prediction]())
    ours = walk(LMS(steps=steps), denoiser, grid, draw(0))
    theirs = their_walk(scheduler, Network(), draw(0) / grid[0].alpha)
    scaled = [x / level.alpha for x, level in zip(ours, grid.levels[1:], strict=True)]  # they keep x/alpha
    assert_paths_meet(scaled, theirs, 1e-6)  # their integrals are a quadrature, of polynomials it takes exactly


class Timeless(nn.Module):
    """Takes no note of the noise conditioning, which diffusers rounds to whole numbers on flow."""

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        return torch.tanh(0.8 * x) + 0.1 * x.flip(-1)


@pytest.mark.parametrize("kind", ["2m", "3m", "2s", "unipc", "deis"])
def test_on_flow(kind: str) -> None:
    import diffusers

    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    steps = 20
    make, ours, more, tolerance = {
        "2m": (diffusers.DPMSolverMultistepScheduler, DPMpp2M(steps=steps), {}, SINGLE),
        "3m": (
            diffusers.DPMSolverMultistepScheduler,
            DPMpp3M(steps=steps, form="published", bootstrap=False),
            {"solver_order": 3},
            SINGLE,
        ),
        "2s": (
            diffusers.DPMSolverSinglestepScheduler,
            DPMpp2S(steps=steps, nodes="grid", lower_order_final=True),
            {"lower_order_final": True},
            1e-8,
        ),
        "unipc": (diffusers.UniPCMultistepScheduler, UniPC(steps=steps, lower_order_final=True), {}, 1e-6),
        "deis": (diffusers.DEISMultistepScheduler, DEIS(steps=steps), {"solver_order": 3}, 1e-8),
    }[kind]
    scheduler = make(**options, **more)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas = scheduler.sigmas.double()
    if kind == "deis":  # its last two sigmas are equal on flow: a step of no length, which a grid of ours refuses
        assert sigmas[-1] == sigmas[-2]
        sigmas, scheduler.timesteps = sigmas[:-1], scheduler.timesteps[:-1]
    mine = walk(ours, Denoiser(Timeless(), Flow(), Velocity()), Grid(Flow().levels(sigmas)), draw(0))
    assert_paths_meet(mine, their_walk(scheduler, Timeless(), draw(0)), tolerance)
