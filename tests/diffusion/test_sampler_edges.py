"""Samplers at the edges: few steps, odd shapes and layouts, half precision, gradients, purity, no waiting."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.grids import Discrete, Karras, LogSNR, Uniform, make_grid
from ornstein.diffusion.noise import NoiseSource, SampleNoise
from ornstein.diffusion.parameterizations import Epsilon, V, Velocity
from ornstein.diffusion.samplers import DDIM, DDPM, DPMpp2M, Euler, Heun, Sampler, State
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Linear, NoiseSchedule

from . import tables

# Every row of the table but what has tests of its own: diffusers' schedulers have no step of ours, and a learned
# variance needs a network that learns one. Name -> factory of a sampler from (steps, grid).
SAMPLERS = {
    name: row.make for name, row in tables.SAMPLERS.items() if name != "diffusers" and row.needs != "variance"
} | {"dpmpp_2m-lower": lambda n, grid=None: DPMpp2M(steps=n, lower_order_final=True, grid=grid)}
DETERMINISTIC = {name for name, row in tables.SAMPLERS.items() if row.error is not None} | {"dpmpp_2m-lower"}
LAST_STEP_IS_X0 = [name for name in SAMPLERS if name not in ("rk45", "annealed_langevin")]
FIXED_STEPS = [name for name in SAMPLERS if name != "rk45"]


@pytest.fixture(params=SAMPLERS)
def make(request: pytest.FixtureRequest):
    return SAMPLERS[request.param]


class Tanh(nn.Module):
    """Element by element, so that every shape and layout will do."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype, self.calls = dtype, 0
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        self.calls += 1
        output = torch.tanh(self.weight * x)
        return output if self.dtype is None else output.to(self.dtype)


def bound(count: int, shape: tuple[int, ...] = (2, 4, 4), first: int = 0) -> SampleNoise:
    return NoiseSource(3).bind(torch.arange(first, first + count), shape)


@pytest.mark.parametrize("rule", [Uniform(), LogSNR(), Karras()], ids=["uniform", "log_snr", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(make, schedule: NoiseSchedule, rule, steps: int) -> None:
    network = Tanh()
    state = make(steps, rule).sample(Denoiser(network, schedule, V()), bound(3))
    assert state.x.shape == (3, 2, 4, 4)
    assert state.x.isfinite().all()
    assert state.nfe == network.calls


@pytest.mark.parametrize("on", [Linear, Cosine, Flow])  # edm's t = 0 keeps sigma_min of noise
@pytest.mark.parametrize("name", LAST_STEP_IS_X0)  # an adaptive solver takes more steps, Langevin moves before it
def test_one_step_is_the_predicted_x0(name: str, on) -> None:
    make, schedule = SAMPLERS[name], on()
    denoiser = Denoiser(Tanh(), schedule, V())
    noise = bound(2)
    x = noise(0) * schedule.level(1.0).sigma
    x0 = denoiser(x, 1.0).x0
    # Churn at t = 1 has nowhere noisier to go, and the last step of every sampler lands on x0 (alpha = 1, sigma = 0).
    torch.testing.assert_close(make(1).sample(denoiser, noise).x, x0, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 2, 3, 2)], ids=["0d", "1d", "2d", "4d"])
def test_any_shape_and_an_empty_batch(make, shape: tuple[int, ...]) -> None:
    for count in (0, 1, 3):
        x = make(4).sample(Denoiser(Tanh(), Cosine(), V()), bound(count, shape)).x
        assert x.shape == (count, *shape)
        assert x.isfinite().all()


def test_sample_i_does_not_depend_on_its_batch(make) -> None:
    denoiser = Denoiser(Tanh(), Linear(), V())
    whole = make(5).sample(denoiser, bound(6)).x
    # The noise is equal to the bit; element-wise arithmetic on CPU may use other vector lanes by batch size.
    torch.testing.assert_close(make(5).sample(denoiser, bound(2, first=4)).x, whole[4:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [1.0, 0.5])
def test_memory_layout_does_not_matter(make, t: float) -> None:
    denoiser = Denoiser(Tanh(), Cosine(), V())
    sampler = make(3)
    grid = make_grid(Uniform(t_max=t), denoiser.schedule, 3)
    plain = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    noise = bound(2, (3, 4, 4))
    layouts = {
        "channels_last": plain.to(memory_format=torch.channels_last),
        "transposed": plain.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": torch.stack([plain, plain], dim=-1)[..., 0],
    }
    expected = sampler.step(denoiser, State(plain, grid, noise), 0).x
    for x in layouts.values():
        torch.testing.assert_close(sampler.step(denoiser, State(x, grid, noise), 0).x, expected)


def test_half_precision_network_leaves_the_trajectory_in_float32(make) -> None:
    half = make(10, Karras()).sample(Denoiser(Tanh(torch.bfloat16), Cosine(), V()), bound(3))
    full = make(10, Karras()).sample(Denoiser(Tanh(), Cosine(), V()), bound(3))
    assert half.x.dtype == torch.float32
    # bf16 keeps 8 bits of each of about 10 outputs of size 1; coefficients in bf16 would be off by far more than that
    # at cosine's ends.
    torch.testing.assert_close(half.x, full.x, rtol=0, atol=0.05)


def test_double_precision_stays(make) -> None:
    denoiser = Denoiser(Tanh(), Cosine(), V())
    grid = make_grid(Uniform(), denoiser.schedule, 3)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    assert make(3).step(denoiser, State(x, grid, bound(2)), 0).x.dtype == torch.float64


def test_gradients_flow_through_steps(make) -> None:
    network = Tanh()
    denoiser = Denoiser(network, Linear(), V())
    sampler = make(3)
    state = sampler.init(make_grid(Uniform(), denoiser.schedule, 3), bound(2))
    x = state.x.requires_grad_()
    for i in range(3):
        state = sampler.step(denoiser, state, i)
    state.x.square().mean().backward()
    assert network.weight.grad is not None
    assert network.weight.grad.isfinite()
    assert float(x.grad.abs().sum()) > 0


def test_sample_builds_no_graph(make) -> None:
    assert not make(3).sample(Denoiser(Tanh(), Linear(), V()), bound(2)).x.requires_grad


def test_step_is_pure(make) -> None:
    denoiser = Denoiser(Tanh(), Linear(), V())
    sampler = make(4)
    state = sampler.init(make_grid(Uniform(), denoiser.schedule, 4), bound(2))
    for i in range(4):
        kept = state.x.clone(), tuple(h.clone() for h in state.history), state.nfe
        first, again = sampler.step(denoiser, state, i), sampler.step(denoiser, state, i)
        assert torch.equal(first.x, again.x)
        assert torch.equal(state.x, kept[0])
        assert all(torch.equal(a, b) for a, b in zip(state.history, kept[1], strict=True))
        assert state.nfe == kept[2]
        state = first
    assert torch.equal(sampler.sample(denoiser, bound(2)).x, state.x)
    assert torch.equal(copy.deepcopy(sampler).sample(denoiser, bound(2)).x, state.x)


def test_watch_sees_every_step(make) -> None:
    seen: list[tuple[int, int]] = []
    final = make(4).sample(
        Denoiser(Tanh(), Linear(), V()), bound(2), watch=lambda i, state: seen.append((i, state.nfe))
    )
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    assert seen[-1][1] == final.nfe
    assert final.prediction is not None
    assert final.prediction.x0.shape == final.x.shape


class Waits(TorchDispatchMode):
    """Counts the operators that make the host wait for a device."""

    WAITING = ("aten._local_scalar_dense", "aten._to_copy", "aten.nonzero", "aten.is_nonzero", "aten.equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removesuffix(".default")
        # _to_copy waits only when it crosses devices; a cast on the spot is free of that.
        crossing = name != "aten._to_copy" or (kwargs or {}).get("device") is not None
        if name in self.WAITING and crossing:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in FIXED_STEPS if "churn" not in name])
@pytest.mark.parametrize("on", [Cosine, Flow, EDM])
def test_no_step_waits_for_the_device(name: str, on) -> None:
    # Churn asks the schedule for raised levels as it goes (on the CPU, whatever x lives on) and is left out.
    denoiser = Denoiser(Tanh(), on(), V())
    sampler = SAMPLERS[name](6)
    state = sampler.init(make_grid(Uniform(), denoiser.schedule, 6), bound(2))
    with torch.no_grad(), Waits() as waits:
        for i in range(6):
            state = sampler.step(denoiser, state, i)
    assert waits.seen == []


def test_the_counter_of_waits_counts() -> None:
    with Waits() as waits:
        torch.ones(3).sum().item()
    assert waits.seen == ["aten._local_scalar_dense"]


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_predictions_at_both_ends_of_flow(t: float) -> None:
    x = torch.randn(2, 3)
    p = Denoiser(Tanh(), Flow(), Velocity())(x, t)
    velocity = torch.tanh(0.7 * x)
    # At t = 0 x is the data, at t = 1 the noise; the velocity eps - x0 gives the other.
    data, noise = (x, x + velocity) if t == 0.0 else (x - velocity, x)
    torch.testing.assert_close(p.x0, data)
    torch.testing.assert_close(p.eps, noise)


# Langevin begins where there is some signal, and does not ask at alpha = 0.
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "annealed_langevin"])
def test_eps_on_flow_is_refused_at_its_first_step(name: str) -> None:
    with pytest.raises(ValueError, match="eps does not determine x0 where alpha = 0: choose objective=v"):
        SAMPLERS[name](4).sample(Denoiser(Tanh(), Flow(), Epsilon()), bound(2))


def test_ddpm_adds_no_noise_at_the_last_step() -> None:
    denoiser = Denoiser(Tanh(), EDM(), V())  # whose last level is not clean, so that a variance would be there

    def refuse(step: int, draw: int = 0) -> Tensor:
        raise AssertionError("noise at the last step")

    grid = make_grid(Uniform(), denoiser.schedule, 4)
    for variance in ("fixed_small", "fixed_large"):
        DDPM(steps=4, variance=variance).step(denoiser, State(torch.ones(1, 2), grid, refuse), 3)


def test_churn_raises_the_noise_level_by_gamma() -> None:
    # Karras et al. 2022, algorithm 2: sigma_hat = sigma (1 + min(S_churn/N, sqrt(2) - 1)), noise to match.
    denoiser, sampler = Denoiser(Tanh(), EDM(), V()), Euler(steps=10, s_churn=2.0, s_noise=1.1)
    state = State(torch.ones(2, 3), make_grid(Uniform(), EDM(), 10), bound(2, (3,)))
    x, level = sampler.churn(denoiser, state, 4)
    sigma = state.grid[4].sigma
    assert level.sigma == pytest.approx(1.2 * sigma, rel=1e-9)
    torch.testing.assert_close(x, 1 + 1.1 * (1.2**2 - 1) ** 0.5 * sigma * bound(2, (3,))(5))
    capped = Euler(steps=10, s_churn=100.0)
    assert capped.churn(denoiser, state, 4)[1].sigma == pytest.approx(2**0.5 * sigma, rel=1e-9)
    # At the noisiest level, and outside [s_tmin, s_tmax], nothing is added.
    assert sampler.churn(denoiser, state, 0)[1] == state.grid[0]
    for bounds in ({"s_tmin": 1.01 * sigma}, {"s_tmax": 0.99 * sigma}):
        assert Euler(steps=10, s_churn=2.0, **bounds).churn(denoiser, state, 4)[1] == state.grid[4]


@pytest.mark.parametrize("on", [Linear, Flow])
def test_churn_lands_on_the_schedule(on) -> None:
    schedule = on()
    denoiser = Denoiser(Tanh(), schedule, V())
    state = State(torch.zeros(1, 3), make_grid(Uniform(), schedule, 10), bound(1, (3,)))
    x, level = Euler(steps=10, s_churn=2.0).churn(denoiser, state, 5)
    t = state.grid[5]
    assert level.sigma / level.alpha == pytest.approx(1.2 * t.sigma / t.alpha, rel=1e-9)
    # Signal alpha x0 = 0 here, so x is noise alone; its scale is what the added variance says.
    added = (level.sigma**2 - (level.alpha / t.alpha * t.sigma) ** 2) ** 0.5
    torch.testing.assert_close(x, added * bound(1, (3,))(6), rtol=1e-5, atol=1e-6)


class Rising:
    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        return torch.linspace(0, 1, steps + 1)


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (lambda: DDIM(steps=0), "sampler.steps=0: a sampler needs at least 1 step"),
        (lambda: DDIM(eta=-0.1), r"sampler.eta=-0.1 must lie in \[0, 1\]"),
        (lambda: DDIM(eta=1.1), r"sampler.eta=1.1 must lie in \[0, 1\]"),
        (lambda: DDPM(variance="wide"), "sampler.variance='wide' is unknown: choose one of fixed_small"),
        (lambda: Heun(coordinate="time"), "coordinate='time' is unknown: choose one of path, sigma"),
        (lambda: Euler(s_churn=-1.0), "s_churn=-1.0 and s_noise=1.0 must not be negative"),
        (lambda: Discrete(spacing="even"), "spacing='even' is unknown: choose one of leading, trailing, linspace"),
        (lambda: make_grid(Discrete(), Linear(), 1001), "sampler.steps=1001 exceeds sampler.grid.num_timesteps=1000"),
        (lambda: make_grid(Discrete(offset=1), Linear(), 1000), r"leaves \[0, 1\]"),
        (lambda: make_grid(Uniform(), Linear(), 0), "sampler.steps=0"),
        (lambda: make_grid(Rising(), Linear(), 3), "4 strictly falling times"),
        (lambda: make_grid(Uniform(t_max=1.2), Linear(), 3), r"leaves \[0, 1\]"),
    ],
)
def test_bad_input_is_one_sentence(run, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run()


def test_orders() -> None:
    built = {name: factory(5) for name, factory in SAMPLERS.items()}
    assert {name for name, sampler in built.items() if not sampler.stochastic} == DETERMINISTIC & built.keys()
    # An adaptive solver's error follows its tolerance, not the number of steps.
    assert {name for name, sampler in built.items() if sampler.order is not None} == DETERMINISTIC & built.keys() - {
        "rk45"
    }
    assert all(isinstance(sampler, Sampler) for sampler in built.values())
