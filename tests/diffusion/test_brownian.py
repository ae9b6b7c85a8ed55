"""The Brownian path: variances and covariances of increments, consistency, and one path for every step count."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.brownian import BrownianPath
from ornstein.diffusion.grids import Grid, Uniform, make_grid
from ornstein.diffusion.noise import NoiseSource, SampleNoise
from ornstein.diffusion.parameterizations import V
from ornstein.diffusion.samplers import EulerAncestral, State
from ornstein.diffusion.schedules import Cosine, Flow, Linear

COUNT, SHAPE = 400, (5, 10)
SIZE = COUNT * math.prod(SHAPE)


def bound(count: int = COUNT, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> SampleNoise:
    return NoiseSource(seed).bind(torch.arange(count), shape)


def raw(path: BrownianPath, a: float, b: float) -> Tensor:
    return path.increment(a, b).double() * abs(b - a) ** 0.5


INTERVALS = [(0.0, 1.0), (0.0, 0.5), (0.25, 0.375), (0.3, 0.7), (0.123, 0.1311), (0.9, 1.0), (0.6, 0.2), (0.5, 0.50002)]


@pytest.mark.parametrize(("a", "b"), INTERVALS)
def test_increments_are_standard_normal(a: float, b: float) -> None:
    from scipy import stats

    z = BrownianPath(bound(), 0.0, 1.0).increment(a, b)
    assert z.shape == (COUNT, *SHAPE)
    assert z.dtype == torch.float32
    assert abs(float(z.mean())) < 5 / SIZE**0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / SIZE) ** 0.5  # deviation of a sample variance
    assert stats.kstest(z.flatten().double().numpy(), "norm").pvalue > 1e-3  # a fixed draw


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0.0, 0.4), (0.2, 0.9)),
        ((0.1, 0.2), (0.2, 0.3)),
        ((0.1, 0.9), (0.3, 0.31)),
        ((0.7, 0.2), (0.1, 0.5)),
        ((0.333, 0.3331), (0.3331, 0.3332)),
    ],
)
def test_covariance_is_the_overlap(first: tuple[float, float], second: tuple[float, float]) -> None:
    path = BrownianPath(bound(), 0.0, 1.0)
    (a, b), (c, d) = sorted(first), sorted(second)
    signs = math.copysign(1, (first[1] - first[0]) * (second[1] - second[0]))
    expected = signs * max(0.0, min(b, d) - max(a, c)) / math.sqrt((b - a) * (d - c))
    found = float((path.increment(*first).double() * path.increment(*second)).mean())
    # Deviation of the mean of products of correlated normals: sqrt((1 + rho^2)/n). Points are rounded to 2**-20, which
    # is 1e-2 of the shortest interval here.
    assert found == pytest.approx(expected, abs=5 * ((1 + expected**2) / SIZE) ** 0.5 + 1e-3)


@pytest.mark.parametrize(("a", "b", "c"), [(0.0, 0.5, 1.0), (0.1, 0.37, 0.8), (0.9, 0.4, 0.6), (0.25, 0.25001, 0.5)])
def test_increments_add_up(a: float, b: float, c: float) -> None:
    levels = 20
    path = BrownianPath(bound(8), 0.0, 1.0, levels=levels)
    # On the tree's own points nothing is rounded.
    a, b, c = (round(v * 2**levels) / 2**levels for v in (a, b, c))
    torch.testing.assert_close(raw(path, a, b) + raw(path, b, c), raw(path, a, c), rtol=0, atol=1e-6)  # float32
    torch.testing.assert_close(raw(path, a, b), -raw(path, b, a), rtol=0, atol=1e-6)


def test_a_path_of_many_increments_is_the_path_of_few() -> None:
    path = BrownianPath(bound(8), 1.0, 0.0)
    for parts in (2, 16, 64):
        edges = torch.linspace(1, 0, parts + 1, dtype=torch.float64).tolist()
        total = sum(raw(path, a, b) for a, b in itertools.pairwise(edges))
        torch.testing.assert_close(total, raw(path, 1.0, 0.0), rtol=0, atol=1e-5)


def test_depth_refines_the_same_path() -> None:
    coarse, fine = (BrownianPath(bound(8), 0.0, 1.0, levels=levels) for levels in (6, 25))
    torch.testing.assert_close(coarse.increment(0.25, 0.75), fine.increment(0.25, 0.75))


def test_the_path_scales_with_its_interval_and_runs_either_way() -> None:
    short, long = BrownianPath(bound(8), 0.0, 1.0), BrownianPath(bound(8), 10.0, -30.0)
    torch.testing.assert_close(short.increment(0.25, 0.75), long.increment(0.0, -20.0))


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 2, 2)])
def test_a_sample_depends_on_its_number_alone(shape: tuple[int, ...]) -> None:
    whole = BrownianPath(bound(6, shape), 0.0, 1.0).increment(0.2, 0.7)
    assert whole.shape == (6, *shape)
    part = BrownianPath(NoiseSource(0).bind(torch.tensor([5, 1]), shape), 0.0, 1.0).increment(0.2, 0.7)
    torch.testing.assert_close(part, whole[[5, 1]], rtol=1e-6, atol=1e-6)
    assert BrownianPath(bound(0, shape), 0.0, 1.0).increment(0.2, 0.7).shape == (0, *shape)


def test_the_path_is_apart_from_the_samplers_draws_and_from_other_seeds() -> None:
    noise = bound()
    path = BrownianPath(noise, 0.0, 1.0).increment(0.0, 1.0)
    others = [noise(step, draw) for step in range(4) for draw in range(3)]
    others.append(BrownianPath(bound(seed=1), 0.0, 1.0).increment(0.0, 1.0))
    for other in others:
        assert abs(float((path * other).mean())) < 5 / SIZE**0.5


def ornstein_uhlenbeck(steps: int, path: BrownianPath) -> Tensor:
    """Euler-Maruyama of dx = -3x (1 + x^2/10) dt + dW over [0, 1]."""
    x, h = torch.zeros(path.noise.index.shape[0], dtype=torch.float64), 1.0 / steps
    for i in range(steps):
        x = x - 3 * x * (1 + 0.1 * x**2) * h + h**0.5 * path.increment(i * h, (i + 1) * h).double()
    return x


def test_strong_convergence_under_step_halving() -> None:
    path = BrownianPath(bound(300, ()), 0.0, 1.0)
    counts = (16, 32, 64, 512)
    *coarse, exact = [ornstein_uhlenbeck(steps, path) for steps in counts]
    errors = [float((x - exact).abs().mean()) for x in coarse]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    # Additive noise: Euler-Maruyama is of strong order 1. Fresh noise at each step count would not converge at all.
    assert all(slope > 0.85 for slope in slopes), (errors, slopes)


@pytest.mark.parametrize("on", [Linear, Cosine, Flow])
def test_an_sde_sampler_converges_sample_by_sample(gaussian: GaussianMixture, on) -> None:
    # One path for every step count, from t = 0.9 to t = 0.1, where log-SNR is finite.
    schedule, path = on(), BrownianPath(bound(150, (2,)), 0.9, 0.1)
    x = schedule.level(0.9).sigma * bound(150, (2,))(0).double()
    denoiser, ends = gaussian.denoiser(schedule, V()), []
    for steps in (16, 32, 64, 512):
        # One level more than is walked: last steps may leave the noise out.
        grid = Grid((*make_grid(Uniform(t_max=0.9, t_min=0.1), schedule, steps).levels, schedule.level(0.0)))

        def noise(step: int, draw: int = 0, grid: Grid = grid) -> Tensor:
            return path.increment(grid[step - 1].t, grid[step].t)

        state = State(x, grid, noise)
        for i in range(steps):
            state = EulerAncestral(steps=steps).step(denoiser, state, i)
        ends.append(state.x)
    errors = [float((end - ends[-1]).abs().mean()) for end in ends[:-1]]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    # Additive noise: strong order 1.
    assert all(slope > 0.8 for slope in slopes), (errors, slopes)


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (lambda: BrownianPath(bound(1), 0.0, math.inf), "two finite, different ends"),
        (lambda: BrownianPath(bound(1), 0.5, 0.5), "two finite, different ends"),
        (lambda: BrownianPath(bound(1), 0.0, 1.0, levels=0), "1 to 30 levels, not 0"),
        (lambda: BrownianPath(bound(1), 0.0, 1.0, levels=31), "1 to 30 levels, not 31"),
        (lambda: BrownianPath(bound(1), 0.0, 1.0).increment(0.5, 1.1), "1.1 lies outside the Brownian path"),
        (lambda: BrownianPath(bound(1), 0.0, 1.0, levels=4).increment(0.5, 0.501), "closer than .* 4 levels resolves"),
    ],
)
def test_bad_input_is_one_sentence(run, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run()
