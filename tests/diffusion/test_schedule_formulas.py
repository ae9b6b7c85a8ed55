"""Noise schedules against diffusers' tables and their papers' formulas."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from ornstein.diffusion.schedules import (
    EDM,
    VE,
    Constant,
    ContinuousCosine,
    Cosine,
    Exponential,
    Flow,
    Laplace,
    LaplaceTable,
    Linear,
    Quadratic,
    ScaledLinear,
    Sigmoid,
    SNRSigmoid,
    SubVP,
)

F64 = torch.float64

DIFFUSERS = [
    ("linear", lambda: Linear(), {"beta_schedule": "linear"}),
    ("linear-short", lambda: Linear(beta_end=0.2, num_timesteps=100), {"beta_end": 0.2, "num_train_timesteps": 100}),
    ("scaled_linear", lambda: Quadratic(), {"beta_schedule": "scaled_linear"}),
    (
        "scaled_linear-sd",
        lambda: Quadratic(beta_start=0.00085, beta_end=0.012),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    ("sigmoid", lambda: Sigmoid(), {"beta_schedule": "sigmoid"}),
    ("cosine", lambda: Cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    (
        "squared_time",
        lambda: Quadratic(form="squared_time"),
        {"trained_betas": [1e-4 + (0.02 - 1e-4) * (i / 999) ** 2 for i in range(1000)]},
    ),
    ("scaled_linear-own", ScaledLinear, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    ("constant", Constant, {"beta_start": 0.02, "beta_end": 0.02}),
    ("laplace", LaplaceTable, {"beta_schedule": "laplace"}),
    ("exponential", Exponential, {"trained_betas": "exp"}),
]


@pytest.mark.parametrize(("make", "config"), [row[1:] for row in DIFFUSERS], ids=[row[0] for row in DIFFUSERS])
@pytest.mark.parametrize("peer", ["DDPMScheduler", "DDIMScheduler"])
def test_tables_meet_diffusers(make, config, peer: str) -> None:
    import diffusers

    if peer == "DDIMScheduler" and config.get("beta_schedule") in ("sigmoid", "laplace"):
        config = {"trained_betas": diffusers.DDPMScheduler(**config).betas.tolist()}
    if config.get("trained_betas") == "exp":
        from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar

        config = {"trained_betas": betas_for_alpha_bar(1000, alpha_transform_type="exp").tolist()}
    theirs = getattr(diffusers, peer)(**config).alphas_cumprod.double()
    schedule = make()
    steps = len(theirs)
    t = (torch.arange(steps, dtype=F64) + 1) / steps
    # Theirs is a float32 product of up to 1000 factors, each 1 - beta rounded by up to 6e-8: 6e-5 in all at worst.
    # Neighbouring entries differ by at least beta_start = 1e-4 relative, so an index off by one would show.
    torch.testing.assert_close(schedule.alpha(t) ** 2, theirs, rtol=7e-5, atol=0)
    torch.testing.assert_close(schedule.sigma(t) ** 2, 1 - theirs, rtol=1e-4, atol=3e-7)
    # In float64 nothing is lost between the table and the two coefficients.
    torch.testing.assert_close(schedule.alpha(t) ** 2, schedule.alphas_cumprod(), rtol=1e-12, atol=0)


RAMP = torch.linspace(0, 1, 1000, dtype=F64)
BETAS = [
    (Linear, 1e-4 + 0.0199 * RAMP),
    (ScaledLinear, (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * RAMP) ** 2),
    (Quadratic, (0.01 + (0.02**0.5 - 0.01) * RAMP) ** 2),
    (partial(Quadratic, form="squared_time"), 1e-4 + 0.0199 * RAMP**2),
    (Sigmoid, 1e-4 + 0.0199 / (1 + torch.exp(6 - 12 * RAMP))),
    (Constant, torch.full((1000,), 0.02, dtype=F64)),
]


@pytest.mark.parametrize(("make", "betas"), BETAS)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_tables_in_float64(make, betas: torch.Tensor, zero_terminal_snr: bool) -> None:
    if zero_terminal_snr:
        from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

        betas = rescale_zero_terminal_snr(betas)
    schedule = make(zero_terminal_snr=zero_terminal_snr)
    expected = torch.cumprod(1 - betas, 0)
    # Products of 1000 factors in either order: 1000 * 1e-16. The rescale subtracts sqrt(alpha_bar_T), which leaves the
    # last entries a part in 1e4 of what they were made from, and diffusers takes ratios of them.
    tolerance = {"rtol": 1e-8, "atol": 0} if zero_terminal_snr else {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(schedule.alphas_cumprod(), expected, **tolerance)
    t = (torch.arange(1000, dtype=F64) + 1) / 1000
    torch.testing.assert_close(schedule.alpha(t) ** 2, schedule.alphas_cumprod(), rtol=1e-12, atol=0)
    assert (float(schedule.alphas_cumprod()[-1]) == 0.0) == zero_terminal_snr


def test_formulas_of_alpha_bar() -> None:
    u = torch.arange(1, 1000, dtype=F64) / 1000
    # Cosine telescopes to f(i/T)/f(0) until betas are capped at the last step (Nichol & Dhariwal, eq. 17).
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(Cosine().alphas_cumprod()[:-1], f, rtol=1e-9, atol=0)
    torch.testing.assert_close(Exponential(rate=9.0).alphas_cumprod()[:-1], torch.exp(-9 * u), rtol=1e-12, atol=0)


def test_log_alpha_bar_is_linear_between_grid_points() -> None:
    schedule = Cosine(num_timesteps=10)
    left, right = (schedule.alpha(t).log() for t in (0.3, 0.4))
    torch.testing.assert_close(schedule.alpha(0.325).log(), 0.75 * left + 0.25 * right, rtol=1e-12, atol=0)


def test_flow_closed_form() -> None:
    t = torch.linspace(0, 1, 11, dtype=F64)
    alpha, sigma, d_alpha, d_sigma = Flow().coefficients(t)
    torch.testing.assert_close(alpha, 1 - t)
    torch.testing.assert_close(sigma, t)
    assert (d_alpha == -1).all()
    assert (d_sigma == 1).all()
    torch.testing.assert_close(Flow().log_snr(0.25), torch.tensor(2 * math.log(3), dtype=F64))
    assert Flow().log_snr_range() == (-math.inf, math.inf)


def test_edm_is_the_papers_ramp() -> None:
    schedule = EDM(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    steps = 18
    i = torch.arange(steps, dtype=F64)
    # Karras et al. 2022, eq. 5, written from sigma_max down.
    paper = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(schedule.sigma(1 - i / (steps - 1)), paper, rtol=1e-12, atol=0)
    assert (schedule.alpha(i / steps) == 1).all()
    lowest, highest = schedule.log_snr_range()
    assert lowest == pytest.approx(-2 * math.log(80))
    assert highest == pytest.approx(-2 * math.log(0.002))


T = torch.tensor([1e-6, 0.001, 0.123, 0.5, 0.75, 0.999, 1.0], dtype=F64)


def logistic(x: torch.Tensor | float) -> torch.Tensor:
    return 1 / (1 + torch.exp(-torch.as_tensor(x, dtype=F64)))


def test_ve_is_geometric() -> None:
    schedule = VE(sigma_min=0.01, sigma_max=50.0)
    # Song et al. 2021, appendix C: sigma_min (sigma_max/sigma_min)^t.
    torch.testing.assert_close(schedule.sigma(T), 0.01 * 5000.0**T, rtol=1e-12, atol=0)
    assert bool((schedule.alpha(T) == 1).all())


def test_sub_vp_is_the_papers_sde() -> None:
    alpha, sigma, _, _ = SubVP(beta_min=0.1, beta_max=20.0).coefficients(T)
    # Song et al. 2021, eq. 33 and the line below it.
    integral = 0.5 * T**2 * 19.9 + T * 0.1
    torch.testing.assert_close(alpha, torch.exp(-0.5 * integral), rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma, -torch.expm1(-integral), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("start", "end", "tau"), [(-3.0, 3.0, 1.0), (-3.0, 3.0, 0.3), (0.0, 3.0, 0.7), (-1.0, 4.0, 2.0)]
)
def test_snr_sigmoid_is_the_papers_gamma(start: float, end: float, tau: float) -> None:
    low, high = logistic(start / tau), logistic(end / tau)
    gamma = (high - logistic((T * (end - start) + start) / tau)) / (high - low)
    alpha, sigma, _, _ = SNRSigmoid(start=start, end=end, tau=tau).coefficients(T)
    # Chen 2023, algorithm 1, whose clip at 1e-9 is here a floor that gamma comes down to: 1e-9 apart at most.
    torch.testing.assert_close(alpha**2, gamma.clamp(min=1e-9), rtol=0, atol=1.01e-9)
    torch.testing.assert_close(sigma**2, 1 - gamma, rtol=0, atol=1.01e-9)


@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.5), (1.0, 1.5)])
def test_laplace_is_the_papers_quantile(mu: float, b: float) -> None:
    t = torch.tensor([0.01, 0.2, 0.5, 0.7, 0.99], dtype=F64)
    log_snr = mu - b * torch.sign(0.5 - t) * torch.log(1 - 2 * (t - 0.5).abs())
    schedule = Laplace(mu=mu, b=b)
    # The cut takes exp(-limit/b) of the law, 5e-5 for the wider one.
    torch.testing.assert_close(schedule.log_snr(t), log_snr, rtol=0, atol=b * 2 * math.exp(-15 / b) * 100 + 1e-12)
    assert schedule.log_snr_range() == pytest.approx((mu - 15, mu + 15), abs=1e-9)
    # Uniform times give the law itself: P(lambda > mu + b) = exp(-1)/2.
    assert float(schedule.time(torch.tensor(mu + b, dtype=F64))) == pytest.approx(0.5 * math.exp(-1), abs=1e-4)


def test_continuous_cosine_is_simple_diffusions() -> None:
    schedule = ContinuousCosine(min_log_snr=-15.0, max_log_snr=15.0)
    first, last = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
    # Hoogeboom et al. 2023: -2 ln tan(t_min + t (t_max - t_min)).
    log_snr = -2 * torch.log(torch.tan(first + T * (last - first)))
    torch.testing.assert_close(schedule.log_snr(T), log_snr, rtol=1e-9, atol=1e-12)
    # Nearly Nichol & Dhariwal's curve without its offset.
    torch.testing.assert_close(schedule.alpha(T), torch.cos(T * math.pi / 2), rtol=0, atol=1e-3)
