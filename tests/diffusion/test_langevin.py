"""Langevin dynamics, predictor-corrector, ancestral and consistency sampling: closed forms, counts, draws and edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.grids import Grid, Karras, LogSNR, Uniform, make_grid
from ornstein.diffusion.noise import NoiseSource, SampleNoise
from ornstein.diffusion.parameterizations import Epsilon, V
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.samplers import (
    DDIM,
    DDPM,
    LCM,
    AnnealedLangevin,
    Euler,
    EulerAncestral,
    PredictorCorrector,
    Sampler,
    State,
)
from ornstein.diffusion.samplers.langevin import langevin_move
from ornstein.diffusion.samplers.predictor_corrector import size_by_norm
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Level, Linear, NoiseSchedule, transition_between

F64 = torch.float64
SCHEDULES = {"linear": Linear, "cosine": Cosine, "flow": Flow, "edm": EDM}
SAMPLERS = {
    "langevin": lambda n, grid=None: AnnealedLangevin(steps=n, steps_per_level=2, grid=grid),
    "pc": lambda n, grid=None: PredictorCorrector(steps=n, grid=grid),
    "pc-expected": lambda n, grid=None: PredictorCorrector(steps=n, norm="expected", corrector_steps=2, grid=grid),
    "pc-reverse": lambda n, grid=None: PredictorCorrector(steps=n, predictor="reverse_diffusion", grid=grid),
    "pc-alone": lambda n, grid=None: PredictorCorrector(steps=n, corrector_steps=0, grid=grid),
    "euler_ancestral": lambda n, grid=None: EulerAncestral(steps=n, grid=grid),
    "euler_ancestral-2": lambda n, grid=None: EulerAncestral(steps=n, eta=2.0, s_noise=1.1, grid=grid),
    "lcm": lambda n, grid=None: LCM(steps=n, grid=grid),
    "lcm-boundary": lambda n, grid=None: LCM(steps=n, boundary=True, grid=grid),
}


@pytest.fixture(params=SAMPLERS)
def make(request: pytest.FixtureRequest):
    return SAMPLERS[request.param]


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(0.7 * x)


class Learned(nn.Module):
    """Answers with a prediction whose variance fraction is given."""

    schedule, cost, renoises = Linear(), 1, False

    def __init__(self, fraction: float) -> None:
        super().__init__()
        self.fraction = fraction

    def forward(self, x: Tensor, t: Level, *, again: bool = False) -> Prediction:
        return Prediction(x, t, x0=torch.tanh(x), variance_fraction=torch.full_like(x, self.fraction))


def bound(count: int, shape: tuple[int, ...] = (2, 4, 4), first: int = 0, seed: int = 3) -> SampleNoise:
    return NoiseSource(seed).bind(torch.arange(first, first + count), shape)


@pytest.mark.parametrize("rule", [Uniform(), Karras(to_zero=True)])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("on", SCHEDULES)
def test_few_steps_are_finite_and_counted(make, on: str, rule, steps: int) -> None:
    network = Tanh()
    seen: list[int] = []
    state = make(steps, rule).sample(
        Denoiser(network, SCHEDULES[on](), V()), bound(3), watch=lambda i, state: seen.append(state.nfe)
    )
    assert state.x.shape == (3, 2, 4, 4)
    assert state.x.isfinite().all()
    assert state.nfe == network.calls == seen[-1]
    assert len(seen) == steps


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 2, 3, 2)], ids=["0d", "1d", "2d", "4d"])
def test_any_shape_and_an_empty_batch(make, shape: tuple[int, ...]) -> None:
    for count in (0, 1, 3):
        x = make(4).sample(Denoiser(Tanh(), Cosine(), V()), bound(count, shape)).x
        assert x.shape == (count, *shape)
        assert x.dtype == torch.float32
        assert x.isfinite().all()


def test_sample_i_does_not_depend_on_its_batch(make) -> None:
    denoiser = Denoiser(Tanh(), Linear(), V())
    whole = make(5).sample(denoiser, bound(6)).x
    torch.testing.assert_close(make(5).sample(denoiser, bound(2, first=4)).x, whole[4:], rtol=1e-5, atol=1e-5)


def test_step_is_pure_and_keeps_double_precision(make) -> None:
    denoiser, sampler = Denoiser(Tanh(), Linear(), V()), make(4)
    grid = make_grid(Uniform(), denoiser.schedule, 4)
    state = State(torch.randn(2, 2, 4, 4, dtype=F64), grid, bound(2))
    for i in range(4):
        first, again = sampler.step(denoiser, state, i), sampler.step(denoiser, state, i)
        assert torch.equal(first.x, again.x)
        assert first.x.dtype == F64
        state = first


def test_no_two_draws_of_a_trajectory_are_the_same(make) -> None:
    asked: list[tuple[int, int]] = []
    source = bound(1)

    def noise(step: int, draw: int = 0) -> Tensor:
        asked.append((step, draw))
        return source(step, draw)

    denoiser = Denoiser(Tanh(), Linear(), V())
    grid = make_grid(Uniform(), denoiser.schedule, 5)
    state = State(noise(0), grid, noise)
    for i in range(5):
        state = make(5).step(denoiser, state, i)
    assert len(asked) == len(set(asked))
    assert len(asked) >= 5


# Enough steps for each method's own bias; what the limits mean is in test_samplers_ground_truth.
STATISTICAL = {
    "langevin": lambda: AnnealedLangevin(steps=100, step_size=0.2, grid=LogSNR()),
    "langevin-karras": lambda: AnnealedLangevin(steps=100, step_size=0.2, grid=Karras()),
    "pc": lambda: PredictorCorrector(steps=100),
    "pc-expected": lambda: PredictorCorrector(steps=100, norm="expected"),
    "pc-reverse": lambda: PredictorCorrector(steps=200, predictor="reverse_diffusion", norm="expected"),
    "euler_ancestral": lambda: EulerAncestral(steps=100),
    "euler_ancestral-half": lambda: EulerAncestral(steps=80, eta=0.5),
    "euler_ancestral-flow-like": lambda: EulerAncestral(steps=100, eta=1.5),
}
COUNT = 1500


class Truth:
    """How far sets of real draws lie from the mixture, in sliced Wasserstein-1."""

    def __init__(self, mixture: GaussianMixture) -> None:
        generator = torch.Generator().manual_seed(0)
        angle = torch.arange(8) * math.pi / 8
        self.directions = torch.stack([angle.cos(), angle.sin()])
        fresh = mixture.sample(50 * COUNT, generator=generator) @ self.directions
        self.quantiles = fresh.sort(0).values.reshape(COUNT, 50, -1).mean(1)
        real = torch.tensor([self.distance(mixture.sample(COUNT, generator=generator)) for _ in range(100)])
        self.limit = float(real.mean() + 6 * real.std())  # for some 40 tries and the bias of finitely many steps

    def distance(self, x: Tensor) -> float:
        return float(((x @ self.directions).sort(0).values - self.quantiles).abs().mean())


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(three_components())


def three_components() -> GaussianMixture:
    means = torch.tensor([[-0.7, -0.5], [0.6, 0.7], [0.5, -0.8]])
    return GaussianMixture(means, torch.tensor([0.2, 0.15, 0.25]), torch.tensor([0.5, 0.3, 0.2]))


@pytest.mark.parametrize("on", SCHEDULES)
@pytest.mark.parametrize("name", STATISTICAL)
def test_samples_match_fresh_draws(truth: Truth, on: str, name: str) -> None:
    noise = bound(COUNT, (2,), seed=0)
    x = STATISTICAL[name]().sample(three_components().denoiser(SCHEDULES[on](), V()), noise).x
    assert truth.distance(x) < truth.limit


@pytest.mark.parametrize("on", SCHEDULES)
@pytest.mark.parametrize("t", [0.9, 0.5, 0.05])
def test_langevin_leaves_the_marginal_alone(gaussian: GaussianMixture, on: str, t: float) -> None:
    # Stationary under small steps: start from the exact marginal, move 200 times, and it is still there.
    schedule = SCHEDULES[on]()
    level, count = schedule.level(t), 4000
    generator = torch.Generator().manual_seed(0)
    x0 = gaussian.sample(count, generator=generator)
    x = level.alpha * x0 + level.sigma * torch.randn(count, 2, dtype=F64, generator=generator)
    denoiser = gaussian.denoiser(schedule, V())
    std = math.sqrt(level.alpha**2 * 0.25 + level.sigma**2)
    for _ in range(200):
        noise = torch.randn(count, 2, dtype=F64, generator=generator)
        x = langevin_move(x, denoiser(x, level), level, noise, size=0.02)
    # A chain of step delta inflates variance by 1/(1 - delta/2) at most; 5 deviations of a sample's mean and variance.
    assert float((x.mean(0) - level.alpha * gaussian.means[0]).abs().max()) < 5 * std / count**0.5
    assert float((x.var(0) / std**2 - 1).abs().max()) < 5 * (2 / count) ** 0.5 + 0.01


def test_langevin_carries_x_over_alpha_and_ends_denoised() -> None:
    denoiser, sampler = Denoiser(Tanh(), Linear(), V()), AnnealedLangevin(steps=3, steps_per_level=2, step_size=0.1)
    grid, noise = make_grid(Uniform(), denoiser.schedule, 3), bound(2)
    x = torch.randn(2, 2, 4, 4, dtype=F64)
    expected = x
    for number in range(2):
        eps, sigma = denoiser(expected, grid[1]).eps, grid[1].sigma
        expected = expected - 0.1 * sigma * eps + math.sqrt(0.2) * sigma * noise(2, number)
    moved = sampler.step(denoiser, State(x, grid, noise), 1)
    torch.testing.assert_close(moved.x, grid[2].alpha / grid[1].alpha * expected)
    assert moved.nfe == 2
    assert sampler.step(denoiser, State(x, grid, noise), 2).nfe == 3


def test_langevin_starts_flow_as_noise_without_a_call() -> None:
    grid, network = make_grid(Uniform(), Flow(), 4), Tanh()
    x = torch.randn(2, 3)
    state = AnnealedLangevin(steps=4).step(Denoiser(network, Flow(), V()), State(x, grid, bound(2, (3,))), 0)
    torch.testing.assert_close(state.x, x * grid[1].sigma / grid[0].sigma)
    assert network.calls == state.nfe == 0


@pytest.mark.parametrize("on", ["linear", "edm"])
def test_reverse_diffusion_predictor_is_the_papers(on: str) -> None:
    # Algorithm 4 for VP with its beta, algorithm 2 for VE with its sigmas.
    schedule = SCHEDULES[on]()
    denoiser = Denoiser(Tanh(), schedule, V())
    grid, noise = make_grid(Uniform(), schedule, 1000), bound(2)
    x = torch.randn(2, 2, 4, 4, dtype=F64)
    i = 300
    t, s = grid[i], grid[i + 1]
    score = -denoiser(x, t).eps / t.sigma
    if on == "linear":
        beta = 1 - (t.alpha / s.alpha) ** 2
        expected = (2 - math.sqrt(1 - beta)) * x + beta * score + math.sqrt(beta) * noise(i + 1)
    else:
        variance = t.sigma**2 - s.sigma**2
        expected = x + variance * score + math.sqrt(variance) * noise(i + 1)
    sampler = PredictorCorrector(steps=1000, predictor="reverse_diffusion", corrector_steps=0)
    torch.testing.assert_close(sampler.step(denoiser, State(x, grid, noise), i).x, expected)


def test_corrector_steps_by_each_samples_own_norm() -> None:
    eps = torch.randn(3, 2, 4, 4, dtype=F64) * torch.tensor([1.0, 3.0, 0.01], dtype=F64).reshape(3, 1, 1, 1)
    size = size_by_norm(eps, 0.16)
    assert size.shape == (3, 1, 1, 1)
    expected = 2 * (0.16 * math.sqrt(32) / eps.flatten(1).norm(dim=1)) ** 2
    torch.testing.assert_close(size[:2].flatten(), expected[:2])
    assert float(size[2]) == pytest.approx(4 * 2 * 0.16**2)  # cut, where the score is next to nothing
    torch.testing.assert_close(size_by_norm(eps[1:2], 0.16), size[1:2])


def test_predictor_alone_is_ddpm() -> None:
    denoiser = Denoiser(Tanh(), Cosine(), V())
    ours = PredictorCorrector(steps=6, corrector_steps=0).sample(denoiser, bound(2)).x
    torch.testing.assert_close(ours, DDPM(steps=6).sample(denoiser, bound(2)).x)


@pytest.mark.parametrize("on", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_euler_ancestral_is_ddim_of_the_same_eta(on: str, eta: float) -> None:
    denoiser = Denoiser(Tanh(), SCHEDULES[on](), V())
    ours = EulerAncestral(steps=6, eta=eta).sample(denoiser, bound(2)).x
    torch.testing.assert_close(ours, DDIM(steps=6, eta=eta).sample(denoiser, bound(2)).x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on", SCHEDULES)
@pytest.mark.parametrize("eta", [0.5, 1.0, 3.0])
def test_euler_ancestral_keeps_the_noise_of_its_level(on: str, eta: float) -> None:
    # A denoiser that knows x0 and eps: whatever the step, x_s has to have sigma_s of noise on alpha_s x0.
    schedule, size = SCHEDULES[on](), 200_000
    grid = make_grid(Uniform(), schedule, 4)
    eps = torch.randn(1, size, generator=torch.Generator().manual_seed(0))

    class Knows:
        cost = 1

        def __call__(self, x: Tensor, t: Level, *, again: bool = False) -> Prediction:
            return Prediction(x, t, x0=torch.full_like(x, 0.3), eps=eps)

    for i in range(3):
        t, s = grid[i], grid[i + 1]
        state = State(t.alpha * 0.3 + t.sigma * eps, grid, bound(1, (size,)))
        x = EulerAncestral(steps=4, eta=eta).step(Knows(), state, i).x
        assert float(x.mean() - s.alpha * 0.3) == pytest.approx(0, abs=5 * s.sigma / size**0.5)
        assert float(x.std()) == pytest.approx(s.sigma, rel=5 / (2 * size) ** 0.5 + 1e-4)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_learned_variance_lies_between_the_fixed_ones(fraction: float) -> None:
    grid, noise = make_grid(Uniform(), Linear(), 7), bound(2)
    x = torch.randn(2, 2, 4, 4, dtype=F64)
    denoise, state = Learned(fraction), State(x, grid, noise)
    kernel = transition_between(grid[2], grid[3])
    # Improved DDPM, eq. 15, on the respaced step's own betas.
    variance = kernel.forward_variance**fraction * kernel.variance ** (1 - fraction)
    mean = kernel.on_x_t * x + kernel.on_x0 * torch.tanh(x)
    ours = DDPM(steps=7, variance="learned").step(denoise, state, 2).x
    torch.testing.assert_close(ours, mean + variance**0.5 * noise(3))
    if fraction in (0.0, 1.0):
        fixed = DDPM(steps=7, variance="fixed_large" if fraction else "fixed_small")
        torch.testing.assert_close(ours, fixed.step(denoise, state, 2).x)
    # The last step is the mean, sigma = 0 and its vanishing posterior included.
    last = transition_between(grid[6], grid[7])
    ours = DDPM(steps=7, variance="learned").step(denoise, state, 6).x
    torch.testing.assert_close(ours, last.on_x_t * x + last.on_x0 * torch.tanh(x))


class FlowMap:
    """The exact flow map of N(mu, s^2 I) to data: an ideal consistency model."""

    cost, renoises = 1, False

    def __init__(self, gaussian: GaussianMixture, schedule: NoiseSchedule) -> None:
        self.mu, self.std, self.schedule = gaussian.means[0].float(), float(gaussian.stds[0]), schedule

    def start(self) -> FlowMap:
        return self

    def __call__(self, x: Tensor, t: Level, *, again: bool = False) -> Prediction:
        scale = self.std / math.sqrt((t.alpha * self.std) ** 2 + t.sigma**2)
        return Prediction(x, t, x0=self.mu + scale * (x - t.alpha * self.mu))


@pytest.mark.parametrize("on", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_lcm_with_the_exact_flow_map_samples_the_data(gaussian: GaussianMixture, on: str, steps: int) -> None:
    count = 20_000
    sampler = LCM(steps=steps, grid=Karras())
    x = sampler.sample(FlowMap(gaussian, SCHEDULES[on]()), bound(count, (2,))).x
    # Five deviations of a sample's mean and standard deviation. The start has no signal: linear's has 0.0064 of it.
    assert float((x.mean(0) - gaussian.means[0]).abs().max()) < 5 * 0.5 / count**0.5 + 0.005
    assert float((x.std(0) - 0.5).abs().max()) < 5 * 0.5 / (2 * count) ** 0.5 + 1e-3


def test_lcm_with_a_posterior_mean_loses_variance(gaussian: GaussianMixture) -> None:
    # What the docstring warns of: an ordinary denoiser is no consistency model.
    x = LCM(steps=1).sample(gaussian.float().denoiser(Cosine(), V()), bound(2000, (2,))).x
    assert float(x.std(0).max()) < 0.05


def test_lcm_scalings_are_the_identity_at_the_boundary() -> None:
    sampler = LCM(boundary=True)
    assert sampler.scalings(Linear().level(0.001)) == (1.0, 0.0)
    skip, out = sampler.scalings(Linear().level(1.0))
    assert skip < 1e-8
    assert out == pytest.approx(1.0)


@pytest.mark.parametrize("cls", [EulerAncestral, LCM, AnnealedLangevin, PredictorCorrector])
def test_stochastic_samplers_claim_no_order(cls: type[Sampler]) -> None:
    assert cls().order is None
    assert EulerAncestral(eta=0.0).order == Euler().order == 1


def one_step(sampler: Sampler, denoiser: Denoiser) -> None:
    sampler.sample(denoiser, bound(1))


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (lambda: EulerAncestral(eta=-0.1), "sampler.eta=-0.1 and sampler.s_noise=1.0 must not be negative"),
        (lambda: EulerAncestral(s_noise=-1.0), "sampler.s_noise=-1.0 must not be negative"),
        (lambda: LCM(sigma_data=0.0), "sampler.sigma_data=0.0, .* must be positive"),
        (lambda: AnnealedLangevin(steps_per_level=0), "sampler.steps_per_level=0 must be at least 1"),
        (lambda: AnnealedLangevin(step_size=1.0), r"sampler.step_size=1.0 must lie in \(0, 1\)"),
        (lambda: PredictorCorrector(corrector_steps=-1), "sampler.corrector_steps=-1 must not be negative"),
        (
            lambda: PredictorCorrector(predictor="heun"),
            "sampler.predictor='heun' is unknown: choose one of reverse_dif",
        ),
        (lambda: PredictorCorrector(norm="batch"), "sampler.norm='batch' is unknown: choose one of sample, expected"),
        (lambda: PredictorCorrector(snr=0.0), "sampler.snr=0.0 must be positive"),
        (
            lambda: DDPM(variance="wide"),
            "sampler.variance='wide' is unknown: choose one of fixed_small, fixed_large, le",
        ),
        (
            lambda: one_step(DDPM(steps=3, variance="learned"), Denoiser(Tanh(), Linear(), V())),
            "sampler.variance=learned needs a network that predicts its variance",
        ),
        (
            lambda: one_step(PredictorCorrector(steps=3), Denoiser(Tanh(), Flow(), Epsilon())),
            "eps does not determine x0 where alpha = 0: choose objective=v",
        ),
        (
            lambda: one_step(LCM(steps=3), Denoiser(Tanh(), Flow(), Epsilon())),
            "eps does not determine x0 where alpha = 0: choose objective=v",
        ),
    ],
)
def test_bad_input_is_one_sentence(run, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run()


def test_final_level_of_edm_is_clean() -> None:
    # EDM's algorithm ends at sigma = 0, where DDPM's mean is the predicted data itself.
    grid = make_grid(Uniform(to_zero=True), EDM(), 5)
    assert (grid[5].alpha, grid[5].sigma) == (1.0, 0.0)
    denoiser = Denoiser(Tanh(), EDM(), V())
    x = torch.randn(2, 3)
    state = State(x, Grid(grid.levels), bound(2, (3,)))
    torch.testing.assert_close(DDPM(steps=5).step(denoiser, state, 4).x, denoiser(x, grid[4]).x0)
