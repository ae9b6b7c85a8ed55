"""The adaptive solver: tolerances that are met, error control by sample, honest counts, and its edges."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.denoiser import Denoiser, Rescheduled
from ornstein.diffusion.grids import Grid, Karras, LogSNR, Uniform, make_grid
from ornstein.diffusion.guidance import AdaptiveProjected, ClassifierFree, Compose, Energy, Interval, Part
from ornstein.diffusion.noise import NoiseSource, SampleNoise
from ornstein.diffusion.parameterizations import Epsilon, V
from ornstein.diffusion.samplers import RK45, State
from ornstein.diffusion.samplers.adaptive import dormand_prince
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Level, Linear, NoiseSchedule

F64 = torch.float64


def bound(count: int, shape: tuple[int, ...] = (2,), first: int = 0) -> SampleNoise:
    return NoiseSource(3).bind(torch.arange(first, first + count), shape)


def exact_flow(gaussian: GaussianMixture, x: Tensor, t: Level, s: Level) -> Tensor:
    """The probability flow of N(mu, s^2): the standardised position is kept."""
    mu, var = gaussian.means[0], float(gaussian.stds[0]) ** 2
    ratio = math.sqrt((s.alpha**2 * var + s.sigma**2) / (t.alpha**2 * var + t.sigma**2))
    return s.alpha * mu + ratio * (x - t.alpha * mu)


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(0.7 * x + 0.001 * noise_cond.reshape(-1, *([1] * (x.ndim - 1))))


class Broken(nn.Module):
    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        return x * math.nan


# Textbook problems: slope, y(0), exact y(u).
PROBLEMS = {
    "decay": (lambda y, u: -2 * y, 1.0, lambda u: math.exp(-2 * u)),
    "forced": (lambda y, u: torch.cos(u)[:, None] - y, 0.0, lambda u: (math.cos(u) + math.sin(u) - math.exp(-u)) / 2),
    "logistic": (lambda y, u: y * (1 - y), 0.1, lambda u: 1 / (1 + 9 * math.exp(-u))),
    "polynomial": (lambda y, u: 5 * u[:, None] ** 4, 0.0, lambda u: u**5),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("tolerance", [1e-4, 1e-7, 1e-10])
def test_textbook_problems(name: str, tolerance: float) -> None:
    slope, start, exact = PROBLEMS[name]
    y = torch.full((2, 3), start, dtype=F64)
    there = dormand_prince(slope, y, 0.0, 2.0, rtol=tolerance, atol=tolerance, max_steps=1000)
    # The controller bounds the error of a step; a hundred of them on problems that do not amplify errors.
    torch.testing.assert_close(there.y, torch.full_like(y, exact(2.0)), rtol=0, atol=100 * tolerance)
    back = dormand_prince(slope, there.y, 2.0, 0.0, rtol=tolerance, atol=tolerance, max_steps=1000)
    # On the way back decay grows by e**4.
    torch.testing.assert_close(back.y, y, rtol=0, atol=100 * 60 * tolerance)


def test_agrees_with_scipy_at_the_same_tolerance() -> None:
    from scipy.integrate import solve_ivp

    peer = solve_ivp(lambda u, y: [y[1], -math.sin(y[0])], (0, 5), [1.0, 0.0], rtol=1e-8, atol=1e-8)
    ours = dormand_prince(
        lambda y, u: torch.stack([y[:, 1], -y[:, 0].sin()], 1),
        torch.tensor([[1.0, 0.0]], dtype=F64),
        0.0,
        5.0,
        rtol=1e-8,
        atol=1e-8,
        max_steps=1000,
    )
    torch.testing.assert_close(ours.y[0], torch.as_tensor(peer.y[:, -1]), rtol=0, atol=1e-6)
    # The same pair and much the same controller: about as many evaluations.
    assert 0.7 < int(ours.evaluations[0]) / peer.nfev < 1.4
    assert ours.calls == int(ours.evaluations[0])


def test_the_error_falls_with_the_fifth_power_of_work() -> None:
    work, errors = [], []
    for tolerance in (1e-6, 1e-9, 1e-12):
        out = dormand_prince(
            lambda y, u: torch.cos(5 * u)[:, None] * y,
            torch.ones(1, 1, dtype=F64),
            0.0,
            3.0,
            rtol=tolerance,
            atol=tolerance,
            max_steps=5000,
        )
        work.append(out.calls)
        errors.append(abs(float(out.y) - math.exp(math.sin(15) / 5)))
    slope = math.log(errors[0] / errors[-1]) / math.log(work[-1] / work[0])
    assert slope > 4.5, (work, errors)


@pytest.mark.parametrize(("tolerance", "limit"), [(1e-3, 3e-2), (1e-7, 3e-6)])
def test_every_schedule_and_parameterization_meets_the_tolerance(
    gaussian: GaussianMixture, cell, tolerance: float, limit: float
) -> None:
    schedule, parameterization = cell
    t, s = schedule.level(0.95), schedule.level(0.05)
    x = t.alpha * gaussian.means[0] + torch.linspace(-2, 2, 10, dtype=F64).reshape(5, 2) * t.sigma
    sampler = RK45(rtol=tolerance, atol=tolerance)
    solution = sampler.solve(gaussian.denoiser(schedule, parameterization), x, 0.95, 0.05)
    # Data of size 1: the tolerance is of each of ten or so steps. EDM's x is up to 120 in size and its error with it.
    expected = exact_flow(gaussian, x, t, s)
    torch.testing.assert_close(solution.y, expected, rtol=0, atol=limit)
    back = sampler.solve(gaussian.denoiser(schedule, parameterization), solution.y, 0.05, 0.95)
    torch.testing.assert_close(back.y / t.sigma, x / t.sigma, rtol=0, atol=30 * limit)


@pytest.mark.parametrize("on", [Linear, Cosine, Flow, EDM])
def test_kinks_of_a_table_cost_nothing(mixture: GaussianMixture, on) -> None:
    # As many evaluations on beta tables as on smooth schedules, over the same range of log-SNR.
    schedule = on()
    ends = [float(schedule.time(torch.tensor(v, dtype=F64))) for v in (-6.0, 6.0)]
    first = schedule.level(ends[0])
    x = first.sigma * torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    solution = RK45(rtol=1e-6, atol=1e-6).solve(mixture.double().denoiser(schedule, V()), x, *ends)
    assert solution.calls < 400


def test_samples_do_not_depend_on_their_batch(mixture: GaussianMixture) -> None:
    denoiser = mixture.denoiser(Cosine(), V())
    whole = RK45().sample(denoiser, bound(6))
    part = RK45().sample(denoiser, bound(2, first=4))
    torch.testing.assert_close(part.x, whole.x[4:], rtol=1e-5, atol=1e-5)
    assert torch.equal(part.nfe_each, whole.nfe_each[4:])
    assert len(set(whole.nfe_each.tolist())) > 1, "every sample took the same steps: nothing was adapted"
    assert whole.nfe >= int(whole.nfe_each.max())
    assert whole.nfe_each.dtype == torch.int64


@pytest.mark.parametrize("steps", [1, 4])
def test_evaluations_are_those_that_were_made(steps: int) -> None:
    network = Tanh()
    state = RK45(steps=steps, rtol=1e-3, atol=1e-3).sample(Denoiser(network, Linear(), V()), bound(3, (2, 4, 4)))
    assert state.nfe == network.calls
    single = Tanh()
    alone = RK45(steps=steps, rtol=1e-3, atol=1e-3).sample(Denoiser(single, Linear(), V()), bound(1, (2, 4, 4)))
    assert alone.nfe == single.calls == int(alone.nfe_each[0])
    # A denoiser of two branches counts twice.
    twice = Denoiser(Tanh(), Linear(), V(), cost=2)
    assert RK45(steps=steps, rtol=1e-3, atol=1e-3).sample(twice, bound(1, (2, 4, 4))).nfe == 2 * alone.nfe


@pytest.mark.parametrize(
    ("rule", "steps"), [(Uniform(), 1), (Uniform(), 25), (Karras(), 2), (Karras(to_zero=True), 1), (LogSNR(), 5)]
)
@pytest.mark.parametrize("on", [Linear, Cosine, Flow, EDM])
def test_the_grid_only_shows(gaussian: GaussianMixture, on, rule, steps: int) -> None:
    schedule: NoiseSchedule = on()
    denoiser = gaussian.denoiser(schedule, V())
    seen: list[int] = []
    sampler = RK45(steps=steps, grid=rule)
    state = sampler.sample(denoiser, bound(4), watch=lambda i, s: seen.append(s.nfe))
    assert len(seen) == steps
    assert seen == sorted(seen)
    grid = state.grid
    x = bound(4)(0) * grid[0].sigma
    # The last step from t_min is first order: sigma there is 0.01, and its error the square of it.
    torch.testing.assert_close(state.x.double(), exact_flow(gaussian, x, grid[0], grid[-1]), rtol=0, atol=5e-4)
    assert state.prediction is not None
    assert state.prediction.x0.shape == state.x.shape


def test_tighter_tolerance_takes_more_and_ends_nearer(gaussian: GaussianMixture) -> None:
    schedule, found = Flow(), []
    x = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = exact_flow(gaussian, x, schedule.level(1.0), schedule.level(1e-3))
    for tolerance in (1e-3, 1e-6, 1e-9):
        out = RK45(rtol=tolerance, atol=tolerance).solve(gaussian.denoiser(schedule, V()), x, 1.0, 1e-3)
        found.append((float((out.y - expected).abs().max()), out.calls))
    assert found[0][0] > found[1][0] > found[2][0]
    assert found[0][1] < found[1][1] < found[2][1]


def test_a_hard_sample_does_not_slow_the_easy_ones() -> None:
    # One sample's slope oscillates a hundred times faster.
    rate = torch.tensor([1.0, 100.0], dtype=F64)
    out = dormand_prince(
        lambda y, u: (rate * torch.cos(rate * u))[:, None].expand_as(y),
        torch.zeros(2, 1, dtype=F64),
        0.0,
        1.0,
        rtol=1e-6,
        atol=1e-6,
        max_steps=1000,
    )
    torch.testing.assert_close(out.y[:, 0], torch.sin(rate), rtol=0, atol=1e-4)
    easy, hard = out.evaluations.tolist()
    assert hard > 10 * easy
    assert out.calls == hard


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 2, 3, 2)], ids=["0d", "1d", "2d", "4d"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_shape_and_an_empty_batch(shape: tuple[int, ...], count: int) -> None:
    x = RK45(rtol=1e-3, atol=1e-3).sample(Denoiser(Tanh(), Cosine(), V()), bound(count, shape)).x
    assert x.shape == (count, *shape)
    assert x.dtype == torch.float32
    assert x.isfinite().all()


def test_steps_are_pure_and_the_sampler_can_be_used_again() -> None:
    denoiser, sampler = Denoiser(Tanh(), Linear(), V()), RK45(steps=3, rtol=1e-3, atol=1e-3)
    state = sampler.init(make_grid(Uniform(), denoiser.schedule, 3), bound(2))
    for i in range(3):
        first, again = sampler.step(denoiser, state, i), sampler.step(denoiser, state, i)
        assert torch.equal(first.x, again.x)
        assert first.nfe == again.nfe
        state = first
    assert torch.equal(copy.deepcopy(sampler).sample(denoiser, bound(2)).x, state.x)


def test_a_step_that_starts_beyond_t_min_is_one_call() -> None:
    network = Tanh()
    denoiser = Denoiser(network, Cosine(), V())
    grid = Grid((denoiser.schedule.level(5e-4), denoiser.schedule.level(0.0)))
    state = RK45(t_min=1e-3).step(denoiser, State(torch.ones(2, 3), grid, bound(2, (3,))), 0)
    assert network.calls == state.nfe == 1
    torch.testing.assert_close(state.x, denoiser(torch.ones(2, 3), 5e-4).x0)


def test_gradients_flow_through_a_solution() -> None:
    x = torch.full((2, 3), 0.3, dtype=F64, requires_grad=True)
    denoiser = Denoiser(Tanh(), Cosine(), V())
    RK45(rtol=1e-6, atol=1e-6).solve(denoiser, x, 0.8, 0.1).y.sum().backward()
    shifted = [
        RK45(rtol=1e-9, atol=1e-9).solve(denoiser, x.detach() + h, 0.8, 0.1).y.sum().detach() for h in (3e-3, -3e-3)
    ]
    # A central difference, h**2 = 1e-5; the noise conditioning is float32, which jitters by 1e-7 / h.
    torch.testing.assert_close(x.grad.sum(), (shifted[0] - shifted[1]) / 6e-3, rtol=3e-4, atol=0)


DENOISER = Denoiser(Tanh(), Linear(), V())


class Labelled(Tanh):
    def forward(self, x: Tensor, noise_cond: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + label.reshape(-1, *([1] * (x.ndim - 1))), noise_cond)


MOMENTUM = AdaptiveProjected(3.0, momentum=-0.5)
GUIDANCES: dict[str, tuple[Part, bool]] = {
    "apg": (MOMENTUM, True),
    "in an interval": (Interval(part=MOMENTUM), True),
    "composed": (Compose([ClassifierFree(2.0), MOMENTUM]), True),
    "without momentum": (AdaptiveProjected(3.0, momentum=0.0), False),
    "off": (AdaptiveProjected(1.0), False),
    "cfg": (Compose([ClassifierFree(2.0), Interval(3.0)]), False),
}


@pytest.mark.parametrize(("guidance", "remembers"), GUIDANCES.values(), ids=GUIDANCES)
def test_momentum_over_discarded_steps_is_refused(guidance: Part, remembers: bool) -> None:
    """A slope that depends on the path is no differential equation's; where there is none, the solution is its own."""
    label = {"label": torch.ones(2)}
    guided = guidance(Denoiser(Labelled(), Cosine(), V(), label), {"label": torch.zeros(2)})
    sampler = RK45(steps=2, rtol=1e-4, atol=1e-4)
    for denoise in (guided, guided.start(), Rescheduled(guided, Linear()), Energy(lambda x0: x0.sum(1))(guided, {})):
        assert denoise.remembers == remembers
        runs = (
            lambda d=denoise: sampler.sample(d, bound(2)).x,
            lambda d=denoise: sampler.solve(d, bound(2)(0), 0.1, 0.5).y,
        )
        for run in runs:
            if remembers:
                with pytest.raises(ValueError, match=r"sampler=rk45 .* choose guidance\.momentum=0, or a fixed-step"):
                    run()
            else:
                assert bool(run().isfinite().all())


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (lambda: RK45(rtol=0.0), "sampler.rtol=0.0 and sampler.atol=1e-05 must be positive"),
        (lambda: RK45(atol=math.nan), "sampler.atol=nan must be positive"),
        (lambda: RK45(t_min=0.0), r"sampler.t_min=0.0 must lie in \(0, 1\)"),
        (lambda: RK45(max_steps=0), "sampler.max_steps=0 must be at least 1"),
        (lambda: RK45(steps=0), "sampler.steps=0: a sampler needs at least 1 step"),
        (lambda: RK45().solve(DENOISER, torch.ones(1, 2), 1.0, 0.0), "undefined at sigma = 0"),
        (lambda: RK45(rtol=1e-9).solve(DENOISER, torch.ones(1, 2), 1.0, 0.1), "finer than torch.float32 resolves"),
        (
            lambda: RK45(steps=1, max_steps=2).sample(DENOISER, bound(3)),
            "3 of 3 samples did not arrive within sampler.max_steps=2 attempts: raise it",
        ),
        (
            lambda: RK45().sample(Denoiser(Tanh(), Flow(), Epsilon()), bound(1)),
            "eps does not determine x0 where alpha = 0: choose objective=v",
        ),
        (lambda: RK45().sample(Denoiser(Broken(), Linear(), V()), bound(1)), "step fell to nothing: predictions are"),
    ],
)
def test_bad_input_is_one_sentence(run, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run()
