"""What every noise schedule must hold: derivatives, inverse, precision, Gaussian algebra, ends, refusals."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from ornstein.diffusion.schedules import (
    EDM,
    VE,
    BetaSchedule,
    Constant,
    ContinuousCosine,
    Cosine,
    Exponential,
    Flow,
    Laplace,
    LaplaceTable,
    Linear,
    NoiseSchedule,
    Quadratic,
    ScaledLinear,
    Sigmoid,
    SNRSigmoid,
    SubVP,
    VDMLearned,
)

from .tables import SCHEDULES as SHARED

CONFIGS = Path(__file__).parents[2] / "conf" / "scheduler"
# Every option of conf/scheduler by its name, those of the shared table with it; test_schedule_configs.py checks that
# none is missing.
OPTIONS = {name: make for name, make in SHARED.items() if (CONFIGS / f"{name}.yaml").exists()} | {
    "vdm_learned": VDMLearned,  # at its own size; the table's is smaller
}
EXPLODING = {"edm", "ve"}  # alpha = 1: zero terminal SNR is refused
QUICK = OPTIONS | {"vdm_learned": partial(VDMLearned, hidden=32)}
# What every schedule must hold, plain and with all modifiers at once.
TABLE = (
    SHARED
    | QUICK
    | {
        f"{name}-modified": partial(make, shift=2.5, input_scale=0.8, zero_terminal_snr=name not in EXPLODING)
        for name, make in QUICK.items()
    }
)


@pytest.fixture(params=TABLE)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return TABLE[request.param]()


F64 = torch.float64
# Centres of cells of the 1000-step tables (their kinks are at i/1000), from data to noise.
OFF_KINKS = torch.tensor([0.0005, 0.0105, 0.1235, 0.5005, 0.8765, 0.9905, 0.9995], dtype=F64)


def test_derivatives_match_autograd_and_finite_differences(schedule: NoiseSchedule) -> None:
    t = OFF_KINKS.clone().requires_grad_()
    alpha, sigma, d_alpha, d_sigma = schedule.coefficients(t)
    for value, stated in ((alpha, d_alpha), (sigma, d_sigma), (schedule.log_snr(t), schedule.d_log_snr(t))):
        # The zero keeps EDM's constant alpha on the graph.
        (grad,) = torch.autograd.grad(value.sum() + 0 * t.sum(), t, retain_graph=True)
        torch.testing.assert_close(stated.detach(), grad, rtol=1e-9, atol=1e-12)
    h = 1e-6
    up, down = schedule.coefficients(OFF_KINKS + h), schedule.coefficients(OFF_KINKS - h)
    for stated, high, low in ((d_alpha, up[0], down[0]), (d_sigma, up[1], down[1])):
        # Central differences: truncation h^2 |f'''|, largest for sigma ~ sqrt(t) at t = 5e-4 and alpha at cosine's end.
        torch.testing.assert_close(stated.detach(), (high - low) / (2 * h), rtol=1e-5, atol=1e-7)
    assert (schedule.d_log_snr(OFF_KINKS) < 0).all()


@pytest.mark.parametrize("make", [Linear, Cosine])
def test_derivative_at_grid_points_is_the_step_that_ends_there(make) -> None:
    # Training draws grid points in float32, samplers walk them in float64; rounded up or down, both must see the slope
    # of the same step. Cosine's slope changes fivefold at its last kink.
    schedule = make()
    index = torch.arange(1, 1001)
    double = schedule.coefficients(index.double() / 1000)
    log_alpha_bar = torch.cat([torch.zeros(1, dtype=F64), schedule.alphas_cumprod().log()])
    # d ln alpha / dt = (1/2) d ln alpha_bar / dt over a cell of width 1/1000.
    torch.testing.assert_close(double[2] / double[0], 500 * log_alpha_bar.diff(), rtol=1e-9, atol=1e-12)
    for single in (schedule.coefficients(index.float() / 1000), schedule.coefficients(index.float() * 1e-3)):
        for a, b in zip(single, double, strict=True):
            # float32 t has 6e-5 of a cell of rounding, and cosine's last cell is 7 wide in ln alpha_bar.
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-7)


def test_time_inverts_log_snr(schedule: NoiseSchedule) -> None:
    t = torch.cat([OFF_KINKS, torch.tensor([0.001, 0.25, 0.999], dtype=F64)])
    torch.testing.assert_close(schedule.time(schedule.log_snr(t)), t, rtol=1e-9, atol=1e-12)
    single = t.float()
    # float32 log-SNR of size 20 is rounded by 1e-6, and at the flat spots of these schedules dt/dlog_snr <= t.
    torch.testing.assert_close(schedule.time(schedule.log_snr(single)), single, rtol=1e-5, atol=2e-6)


def test_time_clamps_and_ends_are_exact(schedule: NoiseSchedule) -> None:
    beyond = torch.tensor([math.inf, 1e4, -1e4, -math.inf], dtype=F64)
    torch.testing.assert_close(schedule.time(beyond), torch.tensor([0.0, 0, 1, 1], dtype=F64), rtol=0, atol=1e-12)
    assert schedule.time(beyond.float()).isfinite().all()
    least, most = schedule.log_snr_range()
    assert least < most
    assert float(schedule.log_snr(1.0).detach()) == least
    assert (float(schedule.alpha(1.0).detach()) == 0) == schedule.zero_terminal_snr


def test_log_snr_falls_and_flags_hold(schedule: NoiseSchedule) -> None:
    t = torch.linspace(0.0, 1.0, 4001, dtype=F64)
    assert (schedule.log_snr(t)[1:-1].diff() < 0).all()
    size = schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
    assert bool(((size - 1).abs() < 1e-12).all()) == schedule.variance_preserving


@pytest.mark.parametrize(
    ("given", "expected"),
    [(F64, F64), (torch.float32, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_precision(schedule: NoiseSchedule, given: torch.dtype, expected: torch.dtype) -> None:
    t = torch.tensor([[0.25, 0.5], [0.75, 1.0]], dtype=given)
    for method in (schedule.alpha, schedule.sigma, schedule.log_snr, schedule.d_log_snr):
        assert method(t).dtype == expected
        assert method(t).shape == t.shape
    level = schedule.level(t.flatten(), 3)
    assert {v.dtype for v in level} == {expected}
    assert level.alpha.shape == (4, 1, 1)
    assert schedule.time(torch.zeros(2, dtype=given)).dtype == expected
    assert all(isinstance(v, float) for v in schedule.level(0.25))


def test_copies_and_casts_do_not_round_tables(schedule: NoiseSchedule) -> None:
    t = torch.linspace(0, 1, 101, dtype=F64)
    before = torch.stack(schedule.coefficients(t))
    schedule.alpha(t.float())  # fills the float32 cache, which must not become the source of later casts
    others = [copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))]
    if not list(schedule.parameters()):
        assert not schedule.state_dict()
        others += [copy.deepcopy(schedule).half(), schedule.to(torch.bfloat16)]
    for other in others:
        assert torch.equal(torch.stack(other.coefficients(t)), before)


def test_cache_filled_in_inference_mode_serves_training() -> None:
    # Lightning's sanity check runs first and in inference mode.
    schedule = Linear()
    with torch.inference_mode():
        schedule.level(torch.rand(2), 2)
    weight = torch.ones(2, 1, requires_grad=True)
    level = schedule.level(torch.rand(2), 2)
    (level.alpha * weight).sum().backward()
    assert weight.grad is not None


PAIRS = [(0.5, 0.25), (1.0, 0.999), (1.0, 0.5), (0.002, 0.001), (0.8765, 0.1235), (0.3, 0.0)]


@pytest.mark.parametrize(("t", "s"), PAIRS)
@torch.no_grad()
def test_transition_is_gaussian_algebra(schedule: NoiseSchedule, t: float, s: float) -> None:
    kernel = schedule.transition(t, s)
    a_t, s_t, a_s, s_s = (
        float(v) for v in (schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s))
    )
    scale = a_t / a_s
    forward = s_t**2 - scale**2 * s_s**2
    assert kernel.forward_variance.dtype == F64
    assert float(kernel.forward_scale) == pytest.approx(scale, rel=1e-12)
    assert float(kernel.forward_variance) == pytest.approx(forward, rel=1e-9)
    # Bayes: precisions add. Written with sigma_s^2 multiplied through, so that s = 0 (a point mass) is allowed.
    shrink = forward / (forward + scale**2 * s_s**2)
    assert float(kernel.variance) == pytest.approx(s_s**2 * shrink, rel=1e-9)
    assert float(kernel.on_x0) == pytest.approx(a_s * shrink, rel=1e-9)
    assert float(kernel.on_x_t) == pytest.approx(scale * s_s**2 / (forward + scale**2 * s_s**2), rel=1e-9)
    # Averaged over x_t given x0, the posterior gives back the marginal of x_s.
    assert float(kernel.on_x_t) * a_t + float(kernel.on_x0) == pytest.approx(a_s, rel=1e-9)
    assert float(kernel.on_x_t) ** 2 * s_t**2 + float(kernel.variance) == pytest.approx(s_s**2, rel=1e-9)


@pytest.mark.parametrize("index", [1, 2, 500, 999])
def test_transition_is_ddpms_posterior(index: int) -> None:
    schedule = Linear()
    abar = schedule.alphas_cumprod()
    now, before = abar[index], abar[index - 1]
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=F64)[index]
    kernel = schedule.transition((index + 1) / 1000, index / 1000)
    # Ho et al. 2020, eq. 7.
    torch.testing.assert_close(kernel.on_x0, before.sqrt() * beta / (1 - now), rtol=1e-9, atol=0)
    torch.testing.assert_close(kernel.on_x_t, (1 - beta).sqrt() * (1 - before) / (1 - now), rtol=1e-9, atol=0)
    torch.testing.assert_close(kernel.variance, (1 - before) / (1 - now) * beta, rtol=1e-9, atol=0)
    torch.testing.assert_close(kernel.forward_variance, beta, rtol=1e-9, atol=0)


def test_perturb_takes_numbers_tensors_and_levels(schedule: NoiseSchedule) -> None:
    x0, eps = torch.randn(2, 3, 2, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0)).unbind(0)
    t = torch.tensor([0.1, 0.5, 1.0], dtype=F64)
    batch = schedule.perturb(x0, eps, t)
    for i, time in enumerate(t.tolist()):
        level = schedule.level(time)
        expected = level.alpha * x0[i] + level.sigma * eps[i]
        torch.testing.assert_close(batch[i], expected)
        torch.testing.assert_close(schedule.perturb(x0, eps, time)[i], expected)
        torch.testing.assert_close(schedule.perturb(x0, eps, schedule.level(time))[i], expected)


def test_grid_levels_are_the_levels(schedule: NoiseSchedule) -> None:
    times = torch.tensor([1.0, 0.5, 0.1], dtype=F64)
    for level, t in zip(schedule.levels(times), times.tolist(), strict=True):
        assert level == pytest.approx(schedule.level(t))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Linear(beta_start=0.0), "0 < beta_start <= beta_end < 1, got 0.0 and 0.02"),
        (lambda: Linear(beta_start=0.5, beta_end=0.1), "0 < beta_start <= beta_end < 1"),
        (lambda: Sigmoid(beta_end=1.0), "0 < beta_start <= beta_end < 1"),
        (lambda: Quadratic(num_timesteps=0), "num_timesteps=0 must be at least 1"),
        (lambda: Quadratic(form="cubic"), "'cubic' is unknown: choose sqrt_linear or squared_time"),
        (lambda: Cosine(num_timesteps=0), "num_timesteps=0 must be at least 1"),
        (lambda: Cosine(max_beta=1.0), "every beta in"),
        (lambda: BetaSchedule(torch.tensor([])), "beta table must be one-dimensional"),
        (lambda: BetaSchedule(torch.tensor([0.1, 1.5])), "every beta in"),
        (lambda: EDM(sigma_min=0.0), "edm needs 0 < sigma_min < sigma_max"),
        (lambda: EDM(sigma_min=2.0, sigma_max=1.0), "edm needs 0 < sigma_min < sigma_max"),
        (lambda: EDM(rho=0.0), "rho > 0"),
        (lambda: Exponential(rate=0.0), "scheduler.rate=0.0 must be positive"),
        (lambda: Exponential(num_timesteps=0), "num_timesteps=0 must be at least 1"),
        (lambda: Constant(beta=1.0), "scheduler.beta=1.0 must lie in"),
        (lambda: Constant(num_timesteps=0), "num_timesteps=0 must be at least 1"),
        (lambda: LaplaceTable(max_beta=1.5, num_timesteps=0), "num_timesteps=0 must be at least 1"),
        (lambda: ScaledLinear(beta_start=0.0), "0 < beta_start <= beta_end < 1"),
        (lambda: VE(sigma_min=0.0), "ve needs 0 < sigma_min < sigma_max"),
        (lambda: VE(sigma_max=math.inf), "ve needs 0 < sigma_min < sigma_max"),
        (lambda: SubVP(beta_min=0.0), "sub_vp needs 0 < beta_min <= beta_max"),
        (lambda: SubVP(beta_min=2.0, beta_max=1.0), "sub_vp needs 0 < beta_min <= beta_max"),
        (lambda: SNRSigmoid(start=3.0, end=-3.0), "snr_sigmoid needs start < end"),
        (lambda: SNRSigmoid(tau=0.0), "tau > 0"),
        (lambda: SNRSigmoid(tau=0.01), "at most 150"),
        (lambda: SNRSigmoid(gamma_min=0.0), "scheduler.zero_terminal_snr=true"),
        (lambda: ContinuousCosine(min_log_snr=5.0, max_log_snr=-5.0), "cosine_continuous needs finite min_log_snr <"),
        (lambda: ContinuousCosine(min_log_snr=-math.inf), "scheduler.zero_terminal_snr=true"),
        (lambda: Laplace(b=0.0), "laplace needs a finite mu, b > 0"),
        (lambda: Laplace(limit=31.0), "limit <= 60 b"),
        (lambda: VDMLearned(min_log_snr=math.nan), "vdm_learned needs finite"),
        (lambda: VDMLearned(hidden=0), "scheduler.hidden=0 must be at least 1"),
        (lambda: Flow().level(1.5), "time 1.5 is outside"),
        (lambda: Linear().level(-0.1), "time -0.1 is outside"),
        (lambda: Linear().level(math.nan), "time nan is outside"),
    ],
)
def test_bad_input_is_one_sentence(make, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_single_step_table() -> None:
    schedule = Linear(num_timesteps=1, beta_start=0.5, beta_end=0.5)
    assert float(schedule.alpha(1.0)) ** 2 == pytest.approx(0.5)
    assert float(schedule.time(schedule.log_snr(0.5))) == pytest.approx(0.5)


def test_levels_are_python_floats_in_one_order(schedule: NoiseSchedule) -> None:
    levels = schedule.levels(torch.linspace(1, 0, 11, dtype=torch.float32))
    assert all(type(value) is float for level in levels for value in level)
    assert [level.t for level in levels] == sorted((level.t for level in levels), reverse=True)
    assert not any(math.isnan(value) for level in levels for value in level)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@torch.no_grad()
def test_ends_are_numbers(schedule: NoiseSchedule, dtype: torch.dtype) -> None:
    ends = torch.stack(schedule.coefficients(torch.tensor([0.0, 1.0], dtype=dtype)))
    assert not ends.isnan().any()
    assert ends[:, 1].isfinite().all()
    # At t = 0, sigma of a variance-preserving table leaves 0 like sqrt(t), and nothing else is infinite.
    assert ends[:3, 0].isfinite().all()
    assert float(ends[0, 0]) == pytest.approx(1.0, abs=2e-5)  # clean data, up to the cut of log-SNR


MILLION = """
import resource, torch
from ornstein.diffusion.schedules import *
torch.set_num_threads(1)
t = torch.linspace(1, 0, 1_000_001, dtype=torch.float64)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for make in (Linear, SNRSigmoid, Laplace, EDM, lambda: VDMLearned(hidden=16)):
    schedule = make(shift=2.0) if isinstance(make, type) else make()
    with torch.no_grad():
        assert len(schedule.coefficients(t)) == 4
tensors = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(Linear().levels(t)) == 1_000_001
levels = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((tensors - start) // 1024, (levels - tensors) // 1024)
"""


def test_million_point_grid() -> None:
    # A process of its own, since the peak of this one is that of the tests before. A minute would be a hang.
    done = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    tensors, levels = map(int, done.stdout.split())
    # One float64 vector is 8 MiB: some twenty of them at once. The million Levels are 224 bytes each.
    assert tensors < 256
    assert levels < 400
