"""Variational bounds against closed forms, quadrature and diffusers; what hybrid trains; learned schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.densities import (
    DiscreteUniformTime,
    LossAdaptiveTime,
    ModeTime,
    UniformTime,
)
from ornstein.diffusion.objectives import VDM, VLB, Hybrid, Objective, TrainingNoise
from ornstein.diffusion.parameterizations import EDMPreconditioned, Epsilon, LearnedVariance, V
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Level, Linear, NoiseSchedule, VDMLearned, transition_between
from ornstein.diffusion.vlb import decoder_terms, prior_terms, reconstruction_terms, vlb_terms

F64 = torch.float64
LN2 = math.log(2)
MEAN, STD = 0.4, 0.5
DATA = GaussianMixture(torch.full((1, 1), MEAN, dtype=F64), torch.full((1,), STD, dtype=F64))
# The same in many dimensions, which average out: bits/dim stay what they are.
MANY = GaussianMixture(torch.full((1, 64), MEAN), torch.full((1,), STD))
ENTROPY = 0.5 * math.log(2 * math.pi * math.e * STD**2)


def training_noise(seed: int = 0) -> TrainingNoise:
    return TrainingNoise(torch.Generator().manual_seed(seed))


def gauss_hermite(count: int = 60) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(nodes, dtype=F64), torch.tensor(weights / weights.sum(), dtype=F64)


def expected(term) -> float:
    """E over x0 ~ the data and eps of ``term(x0, eps)``, (N,), by quadrature."""
    nodes, weights = gauss_hermite()
    x0, eps = torch.meshgrid(MEAN + STD * nodes, nodes, indexing="ij")
    return float((term(x0.reshape(-1, 1), eps.reshape(-1, 1)) * (weights[:, None] * weights).flatten()).sum())


def uncertainty(level: Level) -> float:
    """Variance of x0 given x_t: the ideal denoiser's squared error."""
    return STD**2 * level.sigma**2 / (level.alpha**2 * STD**2 + level.sigma**2)


def closed_step(t: Level, s: Level, variance: str, floor: float | None) -> float:
    """The expected term of one step in nats, by textbook Gaussians."""
    if s.sigma == 0:
        size = t.sigma**2 if variance == "forward" or floor is None else floor
        return 0.5 * (math.log(2 * math.pi * size) + uncertainty(t) / size)
    kernel = transition_between(t, s)
    ours = kernel.forward_variance if variance == "forward" else kernel.variance
    ratio = kernel.variance / ours
    return 0.5 * (-math.log(ratio) + ratio - 1 + kernel.on_x0**2 * uncertainty(t) / ours)


def closed_prior(level: Level) -> float:
    size = level.alpha**2 + level.sigma**2
    second = level.alpha**2 * (MEAN**2 + STD**2)
    return 0.5 * (math.log(size / level.sigma**2) + (level.sigma**2 + second) / size - 1)


@pytest.mark.parametrize("variance", ["posterior", "forward"])
@pytest.mark.parametrize("steps", [4, 50])
@pytest.mark.parametrize("on", [Linear, Cosine, Flow, EDM])
def test_terms_are_numerical_integrals_of_a_gaussian(on, steps: int, variance: str) -> None:
    schedule = on()
    floor = float(schedule.transition(2 / steps, 1 / steps).variance)
    levels = [schedule.level(i / steps) for i in range(steps + 1)]
    denoise = DATA.denoiser(schedule, V())
    for i in (1, 2, steps // 2, steps):
        t, s = levels[i], levels[i - 1]

        def term(x0: Tensor, eps: Tensor, t: Level = t, s: Level = s) -> Tensor:
            p = denoise(t.alpha * x0 + t.sigma * eps, t)
            return vlb_terms(p, x0, t, s, variance=variance, last="gaussian", floor=floor)

        # Quadratic integrands: exact by quadrature, up to cancellation between levels of like SNR.
        assert expected(term) == pytest.approx(closed_step(t, s, variance, floor), rel=1e-6)
    prior = expected(lambda x0, eps: prior_terms(x0, levels[-1]))
    assert prior == pytest.approx(closed_prior(levels[-1]), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("on", [Linear, Flow, EDM])
def test_levels_as_tensors_give_what_numbers_give(on) -> None:
    schedule = on()
    times = torch.tensor([0.1, 0.2, 0.7, 1.0], dtype=F64)
    x0 = torch.linspace(-1, 1, 4 * 6, dtype=F64).reshape(4, 6)
    t, s = schedule.level(times, 2), schedule.level(times - 0.1, 2)
    x_t = schedule.perturb(x0, torch.ones_like(x0), t)
    fraction = torch.linspace(-0.5, 1.5, 24, dtype=F64).reshape(4, 6)
    for variance in ("posterior", "forward", "learned"):
        for last in ("discrete", "gaussian"):
            p = Prediction(x_t, t, x0=0.9 * x0, variance_fraction=fraction)
            ours = vlb_terms(p, x0, t, s, variance=variance, last=last)
            for i, time in enumerate(times.tolist()):
                # 0.1 - 0.1 and the like: the same numbers as the tensor's.
                single = Prediction(x_t[[i]], t, x0=0.9 * x0[[i]], variance_fraction=fraction[[i]])
                pair = schedule.level(time), schedule.level(float(times[i] - 0.1))
                one = vlb_terms(single, x0[[i]], *pair, variance=variance, last=last)
                torch.testing.assert_close(ours[i], one[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("std", [0.001, 0.01, 1.0, 30.0])
@pytest.mark.parametrize("mean", [-1.2, -0.3, 0.0041, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_discrete_decoder_is_a_distribution_over_the_bins(std: float, mean: float, dtype: torch.dtype) -> None:
    bins = (2 * torch.arange(256, dtype=dtype) / 255 - 1).reshape(256, 1)
    nats = decoder_terms(bins, torch.full_like(bins, mean), 2 * math.log(std))
    assert nats.isfinite().all()
    # A bin's probability is a difference of cdfs: at std 30 it keeps 1e-4 of them, so 3 digits in float32.
    assert float(torch.exp(-nats).sum()) == pytest.approx(1, abs=1e-3 if dtype == torch.float32 else 1e-9)
    # Each is the integral of the density over its bin, which the Gaussian's is nearly where it is smooth.
    if std >= 1:
        inner = slice(1, -1)
        density = decoder_terms(bins, torch.full_like(bins, mean), 2 * math.log(std), last="gaussian")[inner]
        torch.testing.assert_close(nats[inner], density - math.log(2 / 255), rtol=0, atol=2e-3)


def test_discrete_decoder_has_gradients_far_out() -> None:
    x0 = torch.tensor([[-1.0, 1.0, 0.0, 127 / 255, 0.5]])
    mean = torch.tensor([[50.0, -50.0, -40.0, 0.5, 3.0]], requires_grad=True)
    log_variance = torch.full((1, 5), 2 * math.log(1e-3), requires_grad=True)
    decoder_terms(x0, mean, log_variance).sum().backward()
    assert mean.grad.isfinite().all() and log_variance.grad.isfinite().all()
    assert mean.grad[0, :3].sign().tolist() == [1.0, -1.0, -1.0]


class Wide(nn.Module):
    """An ideal denoiser's output and a constant v beside it, for a learned variance; without v where it is None."""

    def __init__(self, schedule: NoiseSchedule, mean, v: float | None) -> None:
        super().__init__()
        self.ideal, self.v = MANY.denoiser(schedule, mean), v


class Ideal(Denoiser):
    def output(self, x_t: Tensor, level: Level) -> Tensor:
        assert isinstance(self.network, Wide)
        mean = self.network.ideal.output(x_t, level)
        v = self.network.v
        return mean if v is None else torch.cat([mean, torch.full_like(mean, v)], dim=1)


def mean_and_error(objective: Objective, schedule: NoiseSchedule, v: float | None, size: int = 3000):
    """Loss on fresh data, and its standard error."""
    parameterization = objective.parameterization
    mean = parameterization.mean if isinstance(parameterization, LearnedVariance) else parameterization
    x0 = MANY.sample(size, generator=torch.Generator().manual_seed(1))
    out = objective(Ideal(Wide(schedule, mean, v), schedule, parameterization), x0, {}, training_noise())
    return float(out.loss.detach()), float(out.per_sample.std()) / size**0.5, out


def closed_bound(schedule: NoiseSchedule, steps: int, variance: str) -> float:
    levels = [schedule.level(i / steps) for i in range(steps + 1)]
    floor = float(schedule.transition(2 / steps, 1 / steps).variance)
    nats = closed_prior(levels[-1])
    nats += sum(closed_step(levels[i], levels[i - 1], variance, floor) for i in range(1, steps + 1))
    if levels[0].sigma > 0:
        nats += 0.5 * math.log(2 * math.pi * math.e * (levels[0].sigma / levels[0].alpha) ** 2)
    return nats


DENSITIES = {
    "discrete": lambda steps: DiscreteUniformTime(num_timesteps=steps),
    "uniform": lambda steps: UniformTime(t_min=0.0),
    "adaptive": lambda steps: LossAdaptiveTime(bins=steps, t_min=0.0),
    "mode": lambda steps: ModeTime(scale=-0.8),
}


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(
    ("variance", "v"), [("posterior", None), ("forward", None), ("learned", -1.0), ("learned", 1.0)]
)
@pytest.mark.parametrize("on", [Linear, Flow, EDM])
def test_vlb_is_the_bound_of_a_gaussian_whatever_its_times(on, variance: str, v: float | None, density: str) -> None:
    schedule, steps = on(), 20
    parameterization = V() if v is None else LearnedVariance(V())
    objective = VLB(
        parameterization, DENSITIES[density](steps), num_timesteps=steps, variance=variance, last="gaussian"
    )
    loss, error, out = mean_and_error(objective, schedule, v)
    # v = -1 is the posterior's variance, v = 1 the forward kernel's: eq. 15 of Nichol & Dhariwal 2021.
    fixed = {-1.0: "posterior", 1.0: "forward"}.get(v, variance)
    bound = closed_bound(schedule, steps, fixed) / LN2
    assert loss == pytest.approx(bound, abs=5 * error + 1e-4)
    assert bound > ENTROPY / LN2  # it is a bound
    assert sum(float(term) for term in out.terms.values()) == pytest.approx(loss, rel=1e-5)
    assert set(out.terms) == {"diffusion", "prior"} | ({"reconstruction"} if on is EDM else set())
    grid = (out.t.double() * steps).round()
    torch.testing.assert_close(out.t.double() * steps, grid, rtol=1e-6, atol=0)


def test_vlb_nears_the_entropy_with_steps() -> None:
    # Where sigma(0) > 0, as elsewhere the ratio of SNRs over the first steps does not shrink with their number.
    gaps = [closed_bound(EDM(), steps, "posterior") - ENTROPY for steps in (10, 100, 1000)]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2] > 0


class UniformLogSNR:
    """Uniform over log-SNR from t_min on, where the bound's integrand is at most 1/2 of a chi-squared: low variance."""

    def __init__(self, t_min: float) -> None:
        self.t_min = t_min

    def _span(self, schedule: NoiseSchedule) -> tuple[float, float]:
        ends = schedule.log_snr(torch.tensor([0.9999, self.t_min], dtype=F64)).tolist()
        return ends[0], ends[1] - ends[0]

    @torch.no_grad()
    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor:
        least, span = self._span(schedule)
        u = (torch.arange(size, dtype=F64) + 0.5) / size
        return schedule.time(least + span * u).float()

    @torch.no_grad()
    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        return schedule.d_log_snr(t).abs() / self._span(schedule)[1]


@pytest.mark.parametrize("density", [UniformLogSNR, UniformTime])
@pytest.mark.parametrize("on", [Linear, Cosine, Flow, EDM, VDMLearned])
@torch.no_grad()
def test_vdm_is_the_entropy_for_the_ideal_denoiser(on, density) -> None:
    # In continuous time the ideal reverse process is exact, so the bound is tight but for prior and decoder. What lies
    # beyond t = 0.9999 holds nothing: SNR there is below 1e-4 of the integral.
    schedule = VDMLearned(hidden=16) if on is VDMLearned else on()
    least = 0.0 if on in (EDM, VDMLearned) else 1e-3
    t_min = schedule.level(least)
    objective = VDM(V(), density(t_min=least), t_min=least, last="gaussian")
    objective.check(schedule)
    loss, error, out = mean_and_error(objective, schedule, None)
    # The decoder's and the prior's share that the ideal reverse process would not pay.
    top = schedule.level(1.0)
    decoder = 0.5 * math.log((t_min.sigma / t_min.alpha) ** 2 / uncertainty(t_min))
    marginal = top.alpha**2 * STD**2 + top.sigma**2
    size = top.alpha**2 + top.sigma**2
    prior = 0.5 * (math.log(size / marginal) + (marginal + top.alpha**2 * MEAN**2) / size - 1)
    # One draw in each of 3000 equal cells: what is left is the spread within a cell, where terms of about 10 bits vary
    # by sqrt(2/64), so 0.03; draws uniform in t are not even in log-SNR, and get the plain standard error.
    tolerance = 0.1 if density is UniformLogSNR else 5 * error
    assert loss == pytest.approx((ENTROPY + decoder + prior) / LN2, abs=tolerance)
    assert set(out.terms) == {"diffusion", "prior", "reconstruction"}


@pytest.mark.parametrize("learned", [-1.0, -0.3, 0.4, 1.0])
@pytest.mark.parametrize("index", [1, 300, 999])
def test_learned_variance_is_diffusers_learned_range(learned: float, index: int) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(variance_type="learned_range", beta_schedule="linear")
    log_variance = theirs._get_variance(index, predicted_variance=torch.tensor(learned, dtype=F64))
    schedule = Linear()
    t, s = schedule.level((index + 1) / 1000), schedule.level(index / 1000)
    x0, x_t = torch.tensor([[0.3]], dtype=F64), torch.tensor([[0.1]], dtype=F64)
    p = LearnedVariance(V()).predict(torch.tensor([[0.2, learned]], dtype=F64), x_t, t)
    kernel = transition_between(t, s)
    squared = float((kernel.on_x0 * (x0 - p.x0)) ** 2)
    small, large = kernel.variance, math.exp(float(log_variance))
    kl = 0.5 * (math.log(large / small) + small / large + squared / large - 1)
    # diffusers' tables are float32, and the log of their ratio keeps 5 digits.
    assert float(vlb_terms(p, x0, t, s, variance="learned")) == pytest.approx(kl, rel=2e-3, abs=1e-6)
    # Log-linear in between, to the last digit.
    exact = math.log(kernel.variance) * (1 - learned) / 2 + math.log(kernel.forward_variance) * (1 + learned) / 2
    assert float(log_variance) == pytest.approx(exact, rel=1e-4)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.v = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        return torch.cat([self.mean * x, self.v + 0.2 * x], dim=1)


class OneHead(TwoHeads):
    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        return self.mean * x


def gradients(objective: Objective, network: nn.Module) -> dict[str, float]:
    network.zero_grad()
    x0 = torch.linspace(-1, 1, 32 * 12).reshape(32, 3, 2, 2)
    denoiser = Denoiser(network, Cosine(), objective.parameterization)
    objective(denoiser, x0, {}, training_noise()).loss.backward()
    return {name: float(p.grad) for name, p in network.named_parameters() if p.grad is not None}


def test_hybrid_trains_the_mean_by_the_simple_loss_and_the_variance_by_the_bound() -> None:
    learned, time = LearnedVariance(Epsilon()), DiscreteUniformTime(num_timesteps=100)
    hybrid = gradients(Hybrid(learned, time, num_timesteps=100), TwoHeads())
    simple = gradients(Objective(Epsilon(), time), OneHead())
    bound = gradients(VLB(learned, time, num_timesteps=100), TwoHeads())
    assert hybrid["mean"] == pytest.approx(simple["mean"], rel=1e-5)
    assert hybrid["v"] == pytest.approx(0.001 * bound["v"], rel=1e-5)
    assert gradients(Hybrid(learned, time, num_timesteps=100, vlb_weight=0.0), TwoHeads())["v"] == 0.0
    assert hybrid["v"] != 0.0


def test_hybrids_terms_add_up() -> None:
    learned, time = LearnedVariance(Epsilon()), DiscreteUniformTime(num_timesteps=100)
    x0 = torch.linspace(-1, 1, 32 * 12).reshape(32, 3, 2, 2)
    out = Hybrid(learned, time, num_timesteps=100)(Denoiser(TwoHeads(), Cosine(), learned), x0, {}, training_noise())
    plain = Objective(Epsilon(), time)(Denoiser(OneHead(), Cosine(), Epsilon()), x0, {}, training_noise())
    assert float(out.terms["simple"]) == pytest.approx(float(plain.loss.detach()), rel=1e-6)
    assert float(out.terms["simple"] + out.terms["vlb"]) == pytest.approx(float(out.loss.detach()), rel=1e-6)


class Still(nn.Module):
    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        return 0.3 * x


@pytest.mark.parametrize("make", [lambda: VDM(V()), lambda: VLB(V(), num_timesteps=50, variance="posterior")])
def test_a_learned_schedules_ends_get_the_bounds_gradient(make) -> None:
    schedule, objective = VDMLearned(hidden=16), make()
    objective.check(schedule)
    x0 = torch.linspace(-1, 1, 64 * 12).reshape(64, 3, 2, 2)

    def loss() -> Tensor:
        return objective(Denoiser(Still(), schedule, V()), x0, {}, training_noise()).loss

    loss().backward()
    for parameter in (schedule.top, schedule.span):
        with torch.no_grad():
            parameter += 0.02
            above = float(loss())
            parameter -= 0.04
            below = float(loss())
            parameter += 0.02
        # Same draws on both sides; central differences in float32 losses of about 10 keep three digits.
        assert float(parameter.grad) == pytest.approx((above - below) / 0.04, rel=0.02, abs=2e-3)
        assert abs(float(parameter.grad)) > 1e-3


def test_only_bounds_train_a_schedule() -> None:
    with pytest.raises(ValueError, match="objective=vdm or vlb"):
        Objective(V()).check(VDMLearned(hidden=16))
    with pytest.raises(ValueError, match="eps with variance does not determine x0"):
        VLB(LearnedVariance(Epsilon())).check(Flow())
    with pytest.raises(ValueError, match=r"objective\.t_min=0 makes the bound infinite"):
        VDM(V(), UniformTime(t_min=0.0), t_min=0.0).check(Cosine())
    VDM(V()).check(Cosine())


@pytest.mark.parametrize("objective", [VLB(LearnedVariance(V()), num_timesteps=4000), VDM(V())], ids=["vlb", "vdm"])
def test_effective_weight_is_half_snr_in_bits(objective: Objective) -> None:
    # Many steps are nearly continuous time.
    log_snr = torch.linspace(-4, 4, 9, dtype=F64)
    schedule = Cosine(num_timesteps=4000)
    torch.testing.assert_close(
        objective.effective_weight(schedule, log_snr), 0.5 * log_snr.exp() / LN2, rtol=5e-3, atol=0
    )


def test_reconstruction_of_a_level() -> None:
    level = EDM().level(0.0)
    z = torch.tensor([[0.301]], dtype=F64)
    nats = float(reconstruction_terms(torch.tensor([[0.3]], dtype=F64), z, level, last="gaussian"))
    assert nats == pytest.approx(0.5 * (0.25 + math.log(2 * math.pi * 0.002**2)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Objective(LearnedVariance(V())), "choose objective=hybrid or vlb"),
        (lambda: VDM(LearnedVariance(V())), "choose objective=hybrid or vlb"),
        (lambda: Hybrid(V()), "objective/parameterization=learned_variance"),
        (lambda: Hybrid(LearnedVariance(V()), vlb_weight=-1.0), "vlb_weight=-1.0 must not be negative"),
        (lambda: VLB(V()), "variance=learned does not fit"),
        (lambda: VLB(LearnedVariance(V()), variance="posterior"), "variance=posterior does not fit"),
        (lambda: VLB(V(), variance="none"), "choose posterior, forward or learned"),
        (lambda: VLB(V(), variance="forward", last="soft"), "choose discrete"),
        (lambda: VLB(V(), variance="forward", num_timesteps=0), "num_timesteps=0 must be at least 1"),
        (lambda: VLB(V(), DiscreteUniformTime(), num_timesteps=10, variance="forward"), "make them equal"),
        (lambda: VLB(V(), UniformTime(), variance="forward"), r"set objective\.time\.t_min=0"),
        (lambda: VDM(V(), t_min=1.0), r"t_min=1.0 must lie in \[0, 1\)"),
        (lambda: VDM(V(), UniformTime(t_min=0.1)), "leaves out part of the bound"),
        (lambda: decoder_terms(torch.zeros(1, 1), torch.zeros(1, 1), 0.0, last="soft"), "choose discrete"),
        (
            lambda: vlb_terms(
                Prediction(torch.zeros(1, 1), Flow().level(0.5), x0=torch.zeros(1, 1)),
                torch.zeros(1, 1),
                Flow().level(0.5),
                Flow().level(0.4),
                variance="learned",
            ),
            "a network that learns its variance",
        ),
    ],
)
def test_bad_input_is_one_sentence(make, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_edm_trains_a_bound_too() -> None:
    objective = VDM(EDMPreconditioned(sigma_data=STD), last="gaussian")
    loss, error, _ = mean_and_error(objective, Linear(), None)
    reference, other, _ = mean_and_error(VDM(V(), last="gaussian"), Linear(), None)
    assert loss == pytest.approx(reference, abs=5 * (error + other))
