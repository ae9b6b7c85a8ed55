"""Samplers against closed forms: the flow of one Gaussian, and fresh draws of a mixture."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.denoiser import Rescheduled
from ornstein.diffusion.grids import Grid, Karras, LogSNR, Uniform, make_grid
from ornstein.diffusion.noise import NoiseSource
from ornstein.diffusion.parameterizations import Parameterization, V
from ornstein.diffusion.samplers import DDIM, DDPM, DPMpp2M, Euler, Heun, Sampler, State
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Level, Linear, NoiseSchedule

F64 = torch.float64


@dataclass(frozen=True)
class FiniteLogSNR:
    """Uniform in log-SNR from t = 0.9 to t = 0.1: where orders of convergence mean something."""

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        first, last = float(schedule.log_snr(0.9)), float(schedule.log_snr(0.1))
        return schedule.time(torch.linspace(first, last, steps + 1, dtype=F64))


# name, factory of steps, order of convergence
DETERMINISTIC = [
    ("ddim", lambda n: DDIM(steps=n), 1),
    ("euler", lambda n: Euler(steps=n), 1),
    ("heun", lambda n: Heun(steps=n), 2),
    ("heun-sigma", lambda n: Heun(steps=n, coordinate="sigma"), 2),
    ("dpmpp_2m", lambda n: DPMpp2M(steps=n), 2),
]
NAMES = [row[0] for row in DETERMINISTIC]


def exact_flow(gaussian: GaussianMixture, x: Tensor, t: Level, s: Level) -> Tensor:
    """The probability flow of N(mu, s^2): the standardised position is kept."""
    mu, var = gaussian.means[0], float(gaussian.stds[0]) ** 2
    ratio = math.sqrt((s.alpha**2 * var + s.sigma**2) / (t.alpha**2 * var + t.sigma**2))
    return s.alpha * mu + ratio * (x - t.alpha * mu)


def no_noise(step: int, draw: int = 0) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def walk(sampler: Sampler, denoise, grid: Grid, x: Tensor) -> Tensor:
    state = State(x, grid, no_noise)
    for i in range(grid.steps):
        state = sampler.step(denoise, state, i)
    return state.x


def start(gaussian: GaussianMixture, level: Level) -> Tensor:
    """Positions two deviations around the noisy marginal."""
    spread = math.sqrt(level.alpha**2 * float(gaussian.stds[0]) ** 2 + level.sigma**2)
    offsets = torch.linspace(-2, 2, 10, dtype=F64).reshape(5, 2)
    return level.alpha * gaussian.means[0] + spread * offsets


@pytest.mark.parametrize(("make", "order"), [row[1:] for row in DETERMINISTIC], ids=NAMES)
@pytest.mark.parametrize("on", [Linear, Cosine, EDM, Flow])
def test_order_of_convergence(gaussian: GaussianMixture, make, order: int, on) -> None:
    schedule = on()
    assert make(8).order == order
    errors = []
    for steps in (32, 64, 128):
        grid = make_grid(FiniteLogSNR(), schedule, steps)
        x = start(gaussian, grid[0])
        result = walk(make(steps), gaussian.denoiser(schedule, V()), grid, x)
        errors.append(float((result - exact_flow(gaussian, x, grid[0], grid[-1])).abs().max()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    # The next term of the error expansion bends the last slope by O(h): a tenth or two here, never half an order.
    assert slopes[-1] > order - 0.2, (errors, slopes)
    # An order higher than claimed on all schedules would be a wrong claim too, but a lucky cancellation on one is not.
    assert slopes[-1] < order + 1.2, (errors, slopes)


@pytest.mark.parametrize(("make", "order"), [row[1:] for row in DETERMINISTIC], ids=NAMES)
def test_every_cell_follows_the_exact_flow(
    gaussian: GaussianMixture, cell: tuple[NoiseSchedule, Parameterization], make, order: int
) -> None:
    schedule, parameterization = cell
    grid = make_grid(FiniteLogSNR(), schedule, 64)
    x = start(gaussian, grid[0])
    result = walk(make(64), gaussian.denoiser(schedule, parameterization), grid, x)
    # The leading error is C h^order with h up to 20/64 in log-SNR and C of the size of x (up to 1 at t = 0.1).
    tolerance = 0.04 if order == 1 else 0.01
    torch.testing.assert_close(result, exact_flow(gaussian, x, grid[0], grid[-1]), rtol=0, atol=tolerance)
    # The parameterization is a change of variables: the path is the same to rounding.
    reference = walk(make(64), gaussian.denoiser(schedule, V()), grid, x)
    torch.testing.assert_close(result, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("make", "order"), [row[1:] for row in DETERMINISTIC], ids=NAMES)
def test_whole_trajectory_follows_the_exact_flow(
    gaussian: GaussianMixture, schedule: NoiseSchedule, make, order: int
) -> None:
    grid = make_grid(Karras(), schedule, 200)  # from t = 1 to t = 0, infinite ends of log-SNR included
    x = start(gaussian, grid[0])
    result = walk(make(200), gaussian.denoiser(schedule, V()), grid, x)
    expected = exact_flow(gaussian, x, grid[0], grid[-1])
    # Data of spread 1 over 200 steps of about 0.1 in log-SNR. Heun in sigma/alpha pays for one step from cosine's
    # ratio of 2e4 down to the grid's 80.
    torch.testing.assert_close(result, expected, rtol=0, atol=0.03 if order == 1 else 0.008)


COUNT = 1500
# Everything that draws or not, at step counts whose discretisation error stays below the spread of real draws.
SAMPLERS = {
    "ddpm": lambda: DDPM(steps=100),
    "ddpm-large": lambda: DDPM(steps=120, variance="fixed_large"),
    "ddim-eta-1": lambda: DDIM(steps=100, eta=1.0),
    "ddim-eta-half": lambda: DDIM(steps=80, eta=0.5),
    "euler-churn": lambda: Euler(steps=60, s_churn=4.0, grid=LogSNR()),
    "heun-churn": lambda: Heun(steps=30, s_churn=6.0, grid=LogSNR()),
    "ddim": lambda: DDIM(steps=60),
    "euler": lambda: Euler(steps=60),
    "heun": lambda: Heun(steps=30),
    # In sigma/alpha a grid uniform in t opens with one step over most of the range where alpha is nearly 0.
    "heun-sigma": lambda: Heun(steps=40, coordinate="sigma", grid=Karras()),
    "dpmpp_2m": lambda: DPMpp2M(steps=40),
}


class Truth:
    """Fresh draws of the mixture and how far a set of as many real draws lies from them."""

    def __init__(self, mixture: GaussianMixture) -> None:
        generator = torch.Generator().manual_seed(0)
        angle = torch.arange(8) * math.pi / 8
        self.directions = torch.stack([angle.cos(), angle.sin()])
        fresh = mixture.sample(50 * COUNT, generator=generator)
        # Quantiles of the projections: the exact one-dimensional optimal transport plan.
        self.quantiles = (fresh @ self.directions).sort(0).values.reshape(COUNT, 50, -1).mean(1)
        self.mean, self.cov = fresh.mean(0), fresh.T.cov()
        real = [self.distances(mixture.sample(COUNT, generator=generator)) for _ in range(100)]
        table = torch.tensor(real)
        # 374 cells, though all start from the same noise: six deviations allow for that many tries and for the bias of
        # finitely many steps.
        self.limits = (table.mean(0) + 6 * table.std(0)).tolist()

    def distances(self, x: Tensor) -> tuple[float, float, float]:
        """Sliced Wasserstein-1, error of the mean, error of the covariance."""
        sliced = ((x @ self.directions).sort(0).values - self.quantiles).abs().mean()
        return float(sliced), float((x.mean(0) - self.mean).norm()), float((x.T.cov() - self.cov).norm())


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(three_components())


def three_components() -> GaussianMixture:
    means = torch.tensor([[-0.7, -0.5], [0.6, 0.7], [0.5, -0.8]])
    return GaussianMixture(means, torch.tensor([0.2, 0.15, 0.25]), torch.tensor([0.5, 0.3, 0.2]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_match_fresh_draws(truth: Truth, cell: tuple[NoiseSchedule, Parameterization], name: str) -> None:
    noise = NoiseSource(0).bind(torch.arange(COUNT), (2,))
    state = SAMPLERS[name]().sample(three_components().denoiser(*cell), noise)
    distances = truth.distances(state.x)
    assert all(d < limit for d, limit in zip(distances, truth.limits, strict=True)), (distances, truth.limits)


def test_the_limits_notice_a_wrong_sampler(truth: Truth) -> None:
    # A tenth too much spread must not pass.
    mixture = three_components()
    generator = torch.Generator().manual_seed(5)
    draws = mixture.sample(COUNT, generator=generator)
    assert truth.distances(draws)[0] < truth.limits[0]
    assert truth.distances(mixture.means.mean(0) + 1.1 * (draws - mixture.means.mean(0)))[0] > truth.limits[0]


@pytest.mark.parametrize("trained_on", [Linear, Cosine, Flow, EDM])
@pytest.mark.parametrize("sampled_on", [Linear, Cosine, Flow, EDM])
@pytest.mark.parametrize("make", [lambda n: DDIM(steps=n), lambda n: Heun(steps=n)], ids=["ddim", "heun"])
def test_rescheduled_denoiser_follows_the_other_schedule(
    gaussian: GaussianMixture, parameterization: Parameterization, trained_on, sampled_on, make
) -> None:
    own, other = trained_on(), sampled_on()
    grid = make_grid(FiniteLogSNR(), other, 40)
    x = start(gaussian, grid[0])
    moved = walk(make(40), Rescheduled(gaussian.denoiser(own, parameterization), other), grid, x)
    direct = walk(make(40), gaussian.denoiser(other, V()), grid, x)
    # The same denoiser seen through two schedules: equal up to the inverse of log-SNR. The log-SNR between t = 0.9
    # and t = 0.1 of each of these lies within all the others' range.
    torch.testing.assert_close(moved, direct, rtol=1e-7, atol=1e-7)
    exact = exact_flow(gaussian, x, grid[0], grid[-1])
    torch.testing.assert_close(moved, exact, rtol=0, atol=0.06 if make(40).order == 1 else 0.02)


def test_rescheduled_denoiser_takes_times_per_sample(gaussian: GaussianMixture) -> None:
    x = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    moved = Rescheduled(gaussian.denoiser(Linear(), V()), Flow())
    assert moved.cost == 1
    batch = moved(x, torch.tensor([0.2, 0.5, 0.8], dtype=F64))
    for i, t in enumerate((0.2, 0.5, 0.8)):
        single = moved(x, t)
        torch.testing.assert_close(batch.x0[i], single.x0[i])
        torch.testing.assert_close(batch.eps[i], single.eps[i])


def test_rescheduled_denoiser_starts_where_the_other_schedule_has_no_signal(mixture: GaussianMixture) -> None:
    # Flow at t = 1 lies beyond linear's log-SNR: the network is asked at its own noisiest level.
    noise = NoiseSource(0).bind(torch.arange(16), (2,))
    x = Heun(steps=20).sample(Rescheduled(mixture.denoiser(Linear(), V()), Flow()), noise).x
    direct = Heun(steps=20).sample(mixture.denoiser(Flow(), V()), noise).x
    # x0 at linear's end differs from the prior mean by alpha = 0.0064 of the data's spread.
    torch.testing.assert_close(x, direct, rtol=0, atol=0.02)


def test_posterior_mean_against_brute_force(mixture: GaussianMixture) -> None:
    # E[x0 | x_t] by weighing many draws of x0 with the likelihood of x_t.
    level = Cosine().level(0.5)
    x0 = mixture.sample(400_000, generator=torch.Generator().manual_seed(0))
    x_t = torch.tensor([[0.1, -0.2], [0.8, 0.5]])
    for row, mean in zip(x_t, mixture.posterior_mean(x_t, level), strict=True):
        weight = torch.softmax(-0.5 * ((row - level.alpha * x0) ** 2).sum(1) / level.sigma**2, 0)
        # 400,000 draws, of which the likelihood keeps about a fifth: deviation 0.6 / sqrt(8e4) = 0.002.
        torch.testing.assert_close((weight[:, None] * x0).sum(0), mean, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((torch.zeros(2, 1), torch.ones(3)), "one entry per component"),
        ((torch.zeros(2, 1), torch.tensor([1.0, 0.0])), "must be positive"),
    ],
)
def test_mixture_refuses(arguments: tuple[Tensor, Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GaussianMixture(*arguments)


@pytest.mark.parametrize("rule", [Uniform(), LogSNR(), Karras()], ids=["uniform", "log_snr", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_grids_run_from_noise_to_data(schedule: NoiseSchedule, rule, steps: int) -> None:
    grid = make_grid(rule, schedule, steps)
    assert grid.steps == steps
    assert grid[0].t == 1.0
    assert grid[-1].t == 0.0
