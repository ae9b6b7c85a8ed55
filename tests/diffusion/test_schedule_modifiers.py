"""Resolution shift, zero terminal SNR and input scale: on every schedule, and against the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch

from ornstein.diffusion.schedules import (
    EDM,
    VE,
    BetaSchedule,
    ContinuousCosine,
    Cosine,
    Flow,
    Linear,
    NoiseSchedule,
    ScaledLinear,
    SubVP,
)

from .test_schedules import EXPLODING, QUICK

F64 = torch.float64
T = torch.tensor([1e-6, 0.0005, 0.0105, 0.1235, 0.5005, 0.8765, 0.9905, 0.9995, 1.0], dtype=F64)
# N of each family, whose value is 1 on the schedule: what keeps its size while noise is scaled.
NORMS = {
    "flow": lambda alpha, sigma: alpha + sigma,
    "sub_vp": lambda alpha, sigma: alpha**2 + sigma,
    "edm": lambda alpha, sigma: alpha,
    "ve": lambda alpha, sigma: alpha,
}


def circle(alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return alpha**2 + sigma**2


@pytest.fixture(params=QUICK)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("shift", [0.25, 3.0])
@torch.no_grad()
def test_shift_lowers_log_snr_and_keeps_the_family(name: str, shift: float) -> None:
    plain, shifted = QUICK[name](), QUICK[name](shift=shift)
    # Hoogeboom et al. 2023, section 3.1: log-SNR of a lower resolution plus 2 ln(their ratio).
    torch.testing.assert_close(shifted.log_snr(T), plain.log_snr(T) - 2 * math.log(shift), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shifted.d_log_snr(T), plain.d_log_snr(T), rtol=1e-7, atol=0)
    norm = NORMS.get(name, circle)(shifted.alpha(T), shifted.sigma(T))
    torch.testing.assert_close(norm, torch.ones_like(T), rtol=1e-12, atol=0)
    assert shifted.variance_preserving == plain.variance_preserving == (name not in NORMS)
    assert shifted.zero_terminal_snr == plain.zero_terminal_snr


@pytest.mark.parametrize("scale", [0.3, 2.0])
@torch.no_grad()
def test_input_scale_scales_the_data(name: str, scale: float) -> None:
    plain, scaled = QUICK[name](), QUICK[name](input_scale=scale)
    alpha, sigma, _, _ = plain.coefficients(T)
    if name not in NORMS:
        # Chen 2023, section 2.3: b alpha x0 + sigma eps at unit variance.
        size = torch.sqrt((scale * alpha) ** 2 + sigma**2)
        torch.testing.assert_close(scaled.alpha(T), scale * alpha / size, rtol=1e-12, atol=0)
        torch.testing.assert_close(scaled.sigma(T), sigma / size, rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled.log_snr(T), plain.log_snr(T) + 2 * math.log(scale), rtol=1e-9, atol=1e-9)
    both = QUICK[name](input_scale=scale, shift=scale)
    assert torch.equal(torch.stack(both.coefficients(T)), torch.stack(plain.coefficients(T)))


@torch.no_grad()
def test_neutral_options_change_no_bit(name: str) -> None:
    plain, neutral = QUICK[name](), QUICK[name](shift=1.0, zero_terminal_snr=False, input_scale=1.0)
    for dtype in (torch.float32, F64):
        assert torch.equal(torch.stack(neutral.coefficients(T.to(dtype))), torch.stack(plain.curve(T.to(dtype))))
        log_snr = torch.linspace(-20, 20, 41, dtype=dtype)
        assert torch.equal(neutral.time(log_snr), plain.curve_time(log_snr))


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
def test_shift_on_flow_is_sd3s_time(shift: float) -> None:
    schedule = Flow(shift=shift)
    moved = shift * T / (1 + (shift - 1) * T)  # Esser et al. 2024, eq. 23
    torch.testing.assert_close(schedule.sigma(T), moved, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.alpha(T), 1 - moved, rtol=1e-9, atol=1e-15)
    # A schedule of its own right, still finite at both ends.
    assert schedule.levels(torch.tensor([1.0, 0.0]))[0] == pytest.approx((1.0, 0.0, 1.0, -1 / shift, 1 / shift))
    assert schedule.level(0.0) == pytest.approx((0.0, 1.0, 0.0, -shift, shift))


def test_shift_on_flow_is_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).sigmas.double()
    t = torch.arange(1000, 0, -1, dtype=F64) / 1000
    torch.testing.assert_close(Flow(shift=3.0).sigma(t), theirs, rtol=2e-6, atol=0)  # theirs is float32


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@torch.no_grad()
def test_zero_terminal_snr_is_exact_and_finite(name: str, dtype: torch.dtype) -> None:
    if name in EXPLODING:
        with pytest.raises(ValueError, match=r"scheduler.zero_terminal_snr=true has no meaning on (EDM|VE), whose"):
            QUICK[name](zero_terminal_snr=True)
        return
    schedule = QUICK[name](zero_terminal_snr=True)
    assert schedule.zero_terminal_snr
    for t in (torch.ones(1, dtype=dtype), torch.ones(37, dtype=dtype)):
        alpha, sigma, d_alpha, d_sigma = schedule.coefficients(t)
        assert bool((alpha == 0).all())
        torch.testing.assert_close(sigma, torch.ones_like(t))
        assert bool((d_alpha < 0).all()) and bool(d_alpha.isfinite().all())
        assert bool(d_sigma.isfinite().all())
        assert bool((schedule.log_snr(t) == -math.inf).all())
        assert bool((schedule.d_log_snr(t) == -math.inf).all())
    assert schedule.level(1.0).alpha == 0.0
    assert float(schedule.time(torch.tensor(-math.inf, dtype=dtype))) == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "cosine_continuous", "sub_vp", "vdm_learned"])
@torch.no_grad()
def test_alpha_ends_in_proportion_to_the_time_that_is_left(name: str) -> None:
    schedule = QUICK[name](zero_terminal_snr=True)
    left = torch.tensor([1e-7, 1e-5], dtype=F64)
    slope = float(schedule.level(1.0).d_alpha)
    # No jump: alpha = -slope * left, up to the curvature of the continuous ones over 1e-5.
    torch.testing.assert_close(schedule.alpha(1 - left), -slope * left, rtol=1e-3, atol=0)


@pytest.mark.parametrize("make", [ContinuousCosine, SubVP, QUICK["vdm_learned"], QUICK["laplace"]])
@torch.no_grad()
def test_zero_terminal_snr_is_linear_in_alpha(make) -> None:
    plain, rescaled = make().alpha(T), make(zero_terminal_snr=True).alpha(T)
    first, last = (float(make().alpha(t)) for t in (0.0, 1.0))
    # Lin et al. 2023, algorithm 1, with t = 0 in the place of the first step.
    torch.testing.assert_close(rescaled, first * (plain - last) / (first - last), rtol=1e-9, atol=1e-15)
    assert float(make(zero_terminal_snr=True).alpha(0.0)) == first


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (Linear, {"beta_schedule": "linear"}),
        (
            ScaledLinear,
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (Cosine, {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_zero_terminal_snr_meets_diffusers(make, config) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(rescale_betas_zero_snr=True, **config).alphas_cumprod.double()
    ours = make(zero_terminal_snr=True).alphas_cumprod()
    # Their sqrt(alpha_bar) is a float32 product, off by 3e-5 of itself, before sqrt(alpha_bar_T) is subtracted.
    torch.testing.assert_close(ours.sqrt(), theirs.sqrt(), rtol=7e-5, atol=1e-6)
    assert float(ours[-1]) == float(theirs[-1]) == 0.0
    assert float(ours[0]) == pytest.approx(float(make().alphas_cumprod()[0]), rel=1e-14)


def test_rescale_comes_before_scaling() -> None:
    both, rescaled = (Cosine(zero_terminal_snr=True, **extra) for extra in ({"shift": 2.0}, {}))
    inner = T[:-1]
    torch.testing.assert_close(both.log_snr(inner), rescaled.log_snr(inner) - 2 * math.log(2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        both.alphas_cumprod(), both.alpha(torch.arange(1, 1001, dtype=F64) / 1000) ** 2, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("options", [{"shift": 3.0}, {"zero_terminal_snr": True}, {"input_scale": 0.5}])
def test_modified_tables_are_in_agreement_over_dtypes(options) -> None:
    schedule = Cosine(**options)
    for half in (torch.float16, torch.bfloat16):
        t = torch.tensor([0.125, 0.5, 1.0], dtype=half)
        for value, exact in zip(schedule.coefficients(t.float()), schedule.coefficients(t.double()), strict=True):
            torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-6)
        assert schedule.alpha(t).dtype == torch.float32


class Straightened(NoiseSchedule):
    """A schedule of one's own, without modifiers."""

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return 1 - t / 2, t, torch.full_like(t, -0.5), torch.ones_like(t)

    def time(self, log_snr: torch.Tensor) -> torch.Tensor:
        return (1 / (0.5 + torch.exp(0.5 * log_snr))).clamp(0, 1)


def test_a_schedule_of_ones_own_needs_no_modifiers() -> None:
    schedule = Straightened()
    assert float(schedule.time(schedule.log_snr(0.3))) == pytest.approx(0.3)
    assert schedule.level(1.0) == (1.0, 0.5, 1.0, -0.5, 1.0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Linear(shift=0.0), r"scheduler.shift=0.0 must be positive and finite: 1 leaves"),
        (lambda: Flow(shift=math.inf), r"scheduler.shift=inf must be positive and finite"),
        (lambda: SubVP(shift=math.nan), r"scheduler.shift=nan must be positive and finite"),
        (lambda: EDM(input_scale=-1.0), r"scheduler.input_scale=-1.0 must be positive and finite"),
        (lambda: EDM(zero_terminal_snr=True), r"choose scheduler=linear, cosine, flow or sub_vp"),
        (lambda: VE(zero_terminal_snr=True), r"whose signal never fades"),
        (lambda: Linear(num_timesteps=1, zero_terminal_snr=True), r"needs num_timesteps of at least 2"),
        (lambda: BetaSchedule(torch.tensor([0.1]), zero_terminal_snr=True), r"needs num_timesteps of at least 2"),
    ],
)
def test_bad_options_get_one_sentence(make, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_table_of_two_steps_fades() -> None:
    schedule = Linear(num_timesteps=2, beta_start=0.1, beta_end=0.5, zero_terminal_snr=True)
    torch.testing.assert_close(schedule.alphas_cumprod(), torch.tensor([0.9, 0.0], dtype=F64))
    t = torch.tensor([0.25, 0.5, 0.6, 0.9], dtype=F64)
    torch.testing.assert_close(schedule.time(schedule.log_snr(t)), t)
    assert float(schedule.alpha(0.75)) == pytest.approx(0.5 * 0.9**0.5)
