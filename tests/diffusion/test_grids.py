"""Time grids: their formulas, diffusers' and published lists, the clean end, refusals, and a million steps."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import pytest
import torch
from torch import Tensor

from ornstein.diffusion.grids import (
    Beta,
    Discrete,
    Exponential,
    Karras,
    Listed,
    LogSNR,
    Quadratic,
    Shifted,
    Uniform,
    make_grid,
)
from ornstein.diffusion.grids.base import PackedLevels
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Linear, NoiseSchedule
from ornstein.diffusion.schedules import Quadratic as ScaledLinear

# numpy's view of a tensor that diffusers takes of its own table
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

F64 = torch.float64
AYS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0]
RULES = {
    "uniform": Uniform(),
    "quadratic": Quadratic(),
    "sd3_shift": Shifted(),
    "beta": Beta(),
    "log_snr": LogSNR(),
    "karras": Karras(),
    "exponential": Exponential(),
    "trailing": Discrete(spacing="trailing"),
    "linspace": Discrete(spacing="linspace"),
    "leading-from-noise": Discrete(from_noise=True),
    "list": Listed([1.0, 0.75, 0.5, 0.25, 0.0], unit="time"),
    "ays": Listed(AYS),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("steps", [1, 2, 10, 37])
def test_grids_run_from_noise_to_data(schedule: NoiseSchedule, rule, steps: int) -> None:
    grid = make_grid(rule, schedule, steps)
    assert grid.steps == steps
    assert grid[0].t == 1.0
    assert grid[-1].t == 0.0
    assert all(a.t > b.t for a, b in itertools.pairwise(grid.levels))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_to_zero_adds_a_clean_level_where_noise_is_left(rule, steps: int) -> None:
    from dataclasses import replace

    plain, clean = rule, replace(rule, to_zero=True)
    grid = make_grid(clean, EDM(), steps)
    assert grid.steps == steps
    assert (grid[-1].t, grid[-1].alpha, grid[-1].sigma) == (0.0, 1.0, 0.0)
    if steps > 1:
        # Before it, the same rule with a step less, down to sigma_min.
        assert list(grid.levels[:-1]) == list(make_grid(plain, EDM(), steps - 1).levels)
        assert grid[-2].sigma == pytest.approx(0.002)
    # A schedule that reaches data is left as it is.
    assert list(make_grid(clean, Flow(), steps).levels) == list(make_grid(plain, Flow(), steps).levels)


def test_edm_to_zero_is_the_papers_grid() -> None:
    # Karras et al. 2022, eq. 5: N levels and sigma_N = 0.
    count, rho = 18, 7
    first, last = 80 ** (1 / rho), 0.002 ** (1 / rho)
    paper = [(first + i / (count - 1) * (last - first)) ** rho for i in range(count)] + [0.0]
    for rule in (Uniform(to_zero=True), Karras(to_zero=True)):
        assert [level.sigma for level in make_grid(rule, EDM(), count).levels] == pytest.approx(paper)


FORMULAS = {
    "quadratic": (Quadratic(), lambda u: u**2),
    "power": (
        Quadratic(power=3.0, t_max=0.8, t_min=0.1),
        lambda u: (0.1 ** (1 / 3) + u * (0.8 ** (1 / 3) - 0.1 ** (1 / 3))) ** 3,
    ),
    "shift": (Shifted(shift=3.0), lambda u: 3 * u / (1 + 2 * u)),
    "no-shift": (Shifted(shift=1.0), lambda u: u),
    "beta-uniform": (Beta(a=1.0, b=1.0), lambda u: u),
    "beta-arcsine": (Beta(a=0.5, b=0.5), lambda u: math.sin(math.pi * u / 2) ** 2),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_in_t(name: str) -> None:
    rule, formula = FORMULAS[name]
    times = [level.t for level in make_grid(rule, Cosine(), 12).levels]
    assert times == pytest.approx([formula(1 - i / 12) for i in range(13)], abs=1e-12)


def test_shift_moves_flow_by_a_constant_log_snr() -> None:
    plain, shifted = (make_grid(rule, Flow(), 10) for rule in (Uniform(), Shifted(shift=3.0)))
    for a, b in zip(plain.levels[1:-1], shifted.levels[1:-1], strict=True):
        moved = 2 * math.log((b.alpha / b.sigma) / (a.alpha / a.sigma))
        assert moved == pytest.approx(-2 * math.log(3))


def test_shift_is_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    # As its pipelines call it; without sigmas it shifts its own last level twice.
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 20, 20).tolist())
    ours = torch.tensor([level.sigma for level in make_grid(Shifted(shift=3.0), Flow(), 20).levels])
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
def test_ratio_grids_are_diffusers(kind: str) -> None:
    from diffusers import EulerDiscreteScheduler

    schedule = ScaledLinear(beta_start=0.00085, beta_end=0.012)
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **{f"use_{kind}_sigmas": True}
    )
    scheduler.set_timesteps(12)
    theirs = scheduler.sigmas.double()
    low, high = float(theirs[-2]), float(theirs[0])
    if kind == "beta":
        # They place quantiles in sigma, the paper and ours in t: the same numbers, between 0 and 1.
        ours = Beta().times(schedule, 11) * (high - low) + low
    else:
        rule = (Karras if kind == "karras" else Exponential)(u_min=low, u_max=high)
        ours = torch.tensor([v.sigma / v.alpha for v in make_grid(rule, schedule, 12).levels[:-1]], dtype=F64)
    torch.testing.assert_close(ours, theirs[:-1], rtol=2e-5, atol=1e-6)  # theirs is float32


def test_exponential_and_log_snr_are_even_in_log_snr() -> None:
    for rule in (Exponential(u_max=50.0), LogSNR()):
        levels = make_grid(rule, Flow(), 20).levels[1:-1]
        steps = torch.tensor([math.log(v.alpha / v.sigma) for v in levels]).diff()
        torch.testing.assert_close(steps, steps.mean().expand_as(steps))


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_log_snr_between_two_times(schedule: NoiseSchedule, steps: int) -> None:
    grid = make_grid(LogSNR(t_max=0.9, t_min=0.1, from_noise=False, to_data=False), schedule, steps)
    assert grid.steps == steps
    assert (grid[0].t, grid[-1].t) == (0.9, 0.1)
    found = [2 * math.log(level.alpha / level.sigma) for level in grid.levels]
    first, last = (float(schedule.log_snr(torch.tensor(t, dtype=F64))) for t in (0.9, 0.1))
    expected = [first + i / steps * (last - first) for i in range(steps + 1)]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)  # as near as time() inverts log_snr()


def test_each_end_of_log_snr_alone() -> None:
    noisy = make_grid(LogSNR(t_max=0.9, t_min=0.1, to_data=False), Linear(), 5)
    assert (noisy[0].t, noisy[-1].t) == (1.0, 0.1)
    clean = make_grid(LogSNR(t_max=0.9, t_min=0.1, from_noise=False), Linear(), 5)
    assert (clean[0].t, clean[-1].t) == (0.9, 0.0)
    assert clean[-2].t == pytest.approx(0.1)


def test_listed_indices_are_table_points_as_given() -> None:
    times = [level.t for level in make_grid(Listed(AYS), Linear(), 10).levels]
    assert times == [*((i + 1) / 1000 for i in AYS[:-1]), 0.0]
    ends_inside = make_grid(Listed(AYS, to_data=False), Linear(), 10)
    assert ends_inside[-1].t == 1 / 1000


def test_published_lists_agree_with_each_other() -> None:
    # The time steps and the sigmas that were published for Stable Diffusion are the same levels of its table.
    from diffusers.schedulers import AysSchedules

    schedule = ScaledLinear(beta_start=0.00085, beta_end=0.012)
    assert AYS[:-1] == AysSchedules["StableDiffusionTimesteps"]
    sigmas = AysSchedules["StableDiffusionSigmas"]
    by_index = make_grid(Listed(AYS), schedule, 10)
    by_sigma = make_grid(Listed(sigmas, unit="sigma"), schedule, 10)
    for a, b in zip(by_index.levels, by_sigma.levels, strict=True):
        assert a.t == pytest.approx(b.t, abs=1.5e-3)  # whole time steps against three digits of sigma


@pytest.mark.parametrize("steps", [5, 20, 33])
def test_listed_is_interpolated_in_log_sigma(steps: int) -> None:
    import numpy as np

    schedule = Linear()
    u = [level.sigma / level.alpha for level in make_grid(Listed(AYS, to_data=False), schedule, 10).levels]
    grid = make_grid(Listed(AYS, to_data=False), schedule, steps)
    expected = np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, 11), np.log(u)))
    assert [level.sigma / level.alpha for level in grid.levels] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        ([1.0, 0.6, 0.2, 0.0], "time"),
        ([-math.inf, -4.0, 2.0, 8.0, math.inf], "log_snr"),
        ([math.inf, 7.0, 0.5, 0.0], "sigma"),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_infinite_ends_of_a_list_stay(values: list[float], unit: str, steps: int) -> None:
    grid = make_grid(Listed(values, unit=unit), Flow(), steps)
    assert grid.steps == steps
    assert grid[0].t == 1.0
    assert grid[-1].t == 0.0
    if len(values) == steps + 1 and unit == "sigma":
        assert [v.sigma / v.alpha for v in grid.levels[1:]] == pytest.approx(values[1:])


class Fixed:
    def __init__(self, *values: float) -> None:
        self.values = torch.tensor(values, dtype=F64)

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        return self.values


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (lambda: make_grid(Uniform(), Linear(), 0), "sampler.steps=0: a sampler needs at least 1 step"),
        (lambda: make_grid(Uniform(), Linear(), -3), "sampler.steps=-3"),
        (lambda: make_grid(Fixed(1.0, 0.2, 0.5, 0.0), Linear(), 3), "4 strictly falling times"),
        (lambda: make_grid(Fixed(1.0, 0.5, 0.5, 0.0), Linear(), 3), "4 strictly falling times"),
        (lambda: make_grid(Fixed(1.0, math.nan, 0.0), Linear(), 2), "3 strictly falling times"),
        (lambda: make_grid(Fixed(1.0, 0.0), Linear(), 2), "3 strictly falling times"),
        (lambda: make_grid(Uniform(t_max=1.2), Linear(), 3), r"leaves \[0, 1\]"),
        (lambda: make_grid(Uniform(t_min=-0.1), Linear(), 3), r"leaves \[0, 1\]"),
        (lambda: Uniform(t_max=math.nan), r"sampler.grid.t_max=nan leaves \[0, 1\]"),
        (lambda: LogSNR(t_max=0.1, t_min=0.2), "sampler.grid.t_max=0.1 must be above sampler.grid.t_min=0.2"),
        (lambda: make_grid(LogSNR(t_max=1.0), Flow(), 3), "sampler.grid.t_max=1.0 has infinite log-SNR"),
        (lambda: make_grid(LogSNR(t_min=0.0), Flow(), 3), "sampler.grid.t_min=0.0 has infinite log-SNR"),
        (lambda: make_grid(Uniform(), Linear(), 2.5), "sampler.steps=2.5 must be a whole number"),
        (lambda: make_grid(Quadratic(t_min=-0.1), Linear(), 3), r"leaves \[0, 1\]"),
        (
            lambda: make_grid(Discrete(spacing="trailing"), Linear(), 1001),
            "sampler.steps=1001 exceeds sampler.grid.num_timesteps=1000",
        ),
        (lambda: Quadratic(power=0.0), "sampler.grid.power=0.0 must be positive"),
        (lambda: Shifted(shift=-1.0), "sampler.grid.shift=-1.0 must be positive"),
        (lambda: Beta(a=0.0), "sampler.grid.a=0.0 and sampler.grid.b=0.6 must be positive"),
        (lambda: LogSNR(to_zero=True, to_data=False), "sampler.grid.to_zero=true goes beyond t = 0"),
        (
            lambda: make_grid(LogSNR(t_min=0.9995), Linear(), 5),
            "sampler.grid.t_max=0.999 must be above sampler.grid.t_min=0.9995",
        ),
        (lambda: Karras(rho=0.0), "sampler.grid.rho=0.0 must be positive"),
        (lambda: Karras(u_min=90.0), "sampler.grid.u_min=90.0 and sampler.grid.u_max=80.0 must satisfy"),
        (lambda: Exponential(u_min=0.0), "sampler.grid.u_min=0.0 and sampler.grid.u_max=80.0 must satisfy"),
        (lambda: Listed([1.0]), "needs at least two strictly falling numbers"),
        (lambda: Listed([0.5, 0.9], unit="time"), "needs at least two strictly falling numbers"),
        (lambda: Listed([3.0, -3.0], unit="log_snr"), "needs at least two strictly rising numbers"),
        (lambda: Listed([1.0, math.nan], unit="time"), "needs at least two strictly falling numbers"),
        (lambda: Listed([1.0, 0.0], unit="beta"), "sampler.grid.unit='beta' is unknown: choose one of index, time"),
        (lambda: Listed([1.0, -0.5], unit="time"), "ends at -0.5, below data"),
        (lambda: Listed([1000, 0]), "starts at index 1000, beyond the last of sampler.grid.num_timesteps=1000"),
        (lambda: make_grid(Listed([1.5, 0.0], unit="time"), Linear(), 1), r"starts at t = 1.5: it leaves \[0, 1\]"),
        (lambda: make_grid(Listed([700.0, 1.0, 0.0], unit="sigma"), EDM(), 2), "beyond the schedule's -8.76 to 12.43"),
    ],
)
def test_bad_grids_are_one_sentence(run, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run()


def test_a_million_steps_fit() -> None:
    count = 1_000_000
    grid = make_grid(Uniform(), Flow(), count)
    assert grid.steps == count
    assert grid[count // 2].t == pytest.approx(0.5)
    # Five float64 numbers a level; tuples of Python floats would be six times that.
    assert isinstance(grid.levels, PackedLevels)
    assert grid.levels.values.itemsize * len(grid.levels.values) == 5 * 8 * (count + 1)


def test_long_grids_are_the_same_levels() -> None:
    count = 30_000
    tracemalloc.start()
    grid = make_grid(Uniform(to_zero=True), EDM(), count)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6  # 1.2 MB of levels, and ten thousand of them in passing
    expected = EDM().levels(torch.linspace(1, 0, count, dtype=F64))
    assert (grid[0], grid[-2], grid[12_345]) == (expected[0], expected[-1], expected[12_345])
    assert (grid[-1].t, grid[-1].alpha, grid[-1].sigma) == (0.0, 1.0, 0.0)
    assert list(grid.levels[5:8]) == list(expected[5:8])
    assert grid.levels[-3:][0] == grid[-3]
    with pytest.raises(IndexError):
        grid[count + 1]
