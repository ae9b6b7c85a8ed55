"""Denoisers on another schedule's grid, against the exact flow of one Gaussian."""

from __future__ import annotations

import pytest
import torch

from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.denoiser import Rescheduled
from ornstein.diffusion.grids import Karras, LogSNR, Uniform, make_grid
from ornstein.diffusion.noise import NoiseSource
from ornstein.diffusion.parameterizations import Parameterization, V
from ornstein.diffusion.samplers import DDIM, Heun
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Linear, NoiseSchedule

from .test_convergence import finite, positions, walk

F64 = torch.float64


@pytest.mark.parametrize("trained_on", [Linear, Cosine, Flow, EDM])
@pytest.mark.parametrize("sampled_on", [Linear, Cosine, Flow, EDM])
@pytest.mark.parametrize("make", [lambda n: DDIM(steps=n), lambda n: Heun(steps=n)], ids=["ddim", "heun"])
def test_rescheduled_denoiser_follows_the_other_schedule(
    gaussian: GaussianMixture, parameterization: Parameterization, trained_on, sampled_on, make
) -> None:
    own, other = trained_on(), sampled_on()
    grid = make_grid(finite(other), other, 40)
    x = positions(gaussian, grid[0])
    moved = walk(make(40), Rescheduled(gaussian.denoiser(own, parameterization), other), grid, x)
    direct = walk(make(40), gaussian.denoiser(other, V()), grid, x)
    # The same denoiser seen through two schedules: equal up to the inverse of log-SNR.
    torch.testing.assert_close(moved, direct, rtol=1e-7, atol=1e-7)
    exact = gaussian.flow(x, grid[0], grid[-1])
    torch.testing.assert_close(moved, exact, rtol=0, atol=0.03 if make(40).order == 1 else 0.003)


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


@pytest.mark.parametrize("rule", [Uniform(), LogSNR(), Karras()], ids=["uniform", "log_snr", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_grids_run_from_noise_to_data(schedule: NoiseSchedule, rule, steps: int) -> None:
    grid = make_grid(rule, schedule, steps)
    assert grid.steps == steps
    assert grid[0].t == 1.0
    assert grid[-1].t == 0.0
