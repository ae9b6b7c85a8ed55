"""Objectives: their weightings meet in one reference; densities; distances."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.densities import (
    DiscreteUniformTime,
    LogitNormalTime,
    LogNormalSigma,
    LossAdaptiveTime,
    ModeTime,
    TimeDensity,
    UniformTime,
)
from ornstein.diffusion.distances import L1, L2, Huber, PseudoHuber, SmoothL1
from ornstein.diffusion.objectives import Objective, TrainingNoise
from ornstein.diffusion.parameterizations import (
    EDMPreconditioned,
    Epsilon,
    Parameterization,
    Sample,
    Score,
    V,
    Velocity,
)
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Level, Linear, NoiseSchedule
from ornstein.diffusion.weightings import ELBO, P2, SNR, EDMLambda, MinSNR, PerLogSNR, Sigmoid, Simple, Weighting

F64 = torch.float64
CPU = torch.device("cpu")


def training_noise(seed: int = 0, rank: int = 0, world_size: int = 1) -> TrainingNoise:
    return TrainingNoise(torch.Generator().manual_seed(seed), rank, world_size)


class FixedTimes:
    """Times and a density chosen by the test: N times at the quantiles of a density proportional to ``shape(t)``."""

    def __init__(self, shape) -> None:
        self.fine = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000 * 0.9 + 0.05
        weight = shape(self.fine)
        self.total = float(weight.mean() * 0.9)
        self.shape = shape
        self.cumulative = weight.cumsum(0) / weight.sum()

    def draw(self, size: int, schedule: NoiseSchedule, noise: TrainingNoise, device: torch.device) -> Tensor:
        u = (torch.arange(size, dtype=F64) + 0.5) / size
        return self.fine[torch.searchsorted(self.cumulative, u)].float()

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        return torch.where((t > 0.05) & (t < 0.95), self.shape(t) / self.total, 0.0)


class BiasedOracle(Denoiser):
    """Predicts x0 + bias(t): the gradient with respect to the bias is the gradient with respect to x0_hat."""

    def output(self, x_t: Tensor, level: Level) -> Tensor:
        assert isinstance(self.network, Basis)
        x0_hat = self.network(level)
        return self.parameterization.target(x0_hat, (x_t - level.alpha * x0_hat) / level.sigma, level)


class Basis(nn.Module):
    """x0_hat(t) = sum of c_k times bumps in log-SNR, so that gradients tell where on the axis the weight lies."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, level: Level) -> Tensor:
        log_snr = 2 * (torch.log(torch.as_tensor(level.alpha)) - torch.log(torch.as_tensor(level.sigma)))
        centres = torch.tensor([-4.0, -2.0, 0.0, 2.0, 4.0])
        return (torch.exp(-((log_snr.reshape(-1, 1) - centres) ** 2)) * self.c).sum(1, keepdim=True)


PAIRINGS = list(itertools.combinations(["eps", "x0", "v", "flow", "edm"], 2))
KINDS = {"eps": Epsilon, "x0": Sample, "v": V, "flow": Velocity, "edm": EDMPreconditioned}


def gradient(
    parameterization: Parameterization,
    schedule: NoiseSchedule,
    density: TimeDensity,
    size: int,
    weighting: Weighting | None = None,
) -> Tensor:
    basis = Basis()
    objective = Objective(parameterization, density, weighting=weighting)
    x0 = torch.zeros(size, 1)
    objective(BiasedOracle(basis, schedule, parameterization), x0, {}, training_noise()).loss.backward()
    assert basis.c.grad is not None
    return basis.c.grad


@pytest.mark.parametrize("on", [Cosine, Flow, EDM])
@pytest.mark.parametrize(("first", "second"), PAIRINGS)
def test_equal_effective_weights_have_equal_gradients(first: str, second: str, on) -> None:
    schedule, a, b = on(), KINDS[first](), KINDS[second]()

    def gain2(parameterization: Parameterization, t: Tensor) -> Tensor:
        return torch.as_tensor(parameterization.gain(schedule.level(t))) ** 2

    # Same weight up to a factor: densities proportional to w/gain_a^2 and w/gain_b^2, with w the geometric mean.
    densities = [
        FixedTimes(lambda t: (gain2(b, t) / gain2(a, t)).sqrt()),
        FixedTimes(lambda t: (gain2(a, t) / gain2(b, t)).sqrt()),
    ]
    log_snr = schedule.log_snr(torch.linspace(0.06, 0.94, 9, dtype=F64))
    weights = [Objective(p, d).effective_weight(schedule, log_snr) for p, d in zip((a, b), densities, strict=True)]
    factor = densities[1].total / densities[0].total
    torch.testing.assert_close(weights[0], factor * weights[1], rtol=1e-9, atol=0)
    grads = [gradient(p, schedule, d, 20_000) for p, d in zip((a, b), densities, strict=True)]
    # Quantile draws integrate to about 1/20,000 of each stratum's spread; densities here span a factor of 1e4.
    torch.testing.assert_close(grads[0], factor * grads[1], rtol=0.01, atol=0.01 * float(grads[0].abs().max()))


@pytest.mark.parametrize("size", [64])
def test_edm_at_unit_sigma_data_and_v_are_the_same_objective(size: int) -> None:
    # F = -v on a variance-preserving schedule: same draws, same loss, same gradient.
    grads = [gradient(p, Cosine(), UniformTime(), size) for p in (V(), EDMPreconditioned(sigma_data=1.0))]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


class FlowMatching(PerLogSNR):
    """Uniform times on flow, as a weight on eps (Kingma & Gao 2023, table 1)."""

    def on_eps(self, log_snr: Tensor) -> Tensor:
        return 0.5 * torch.exp(-0.5 * log_snr)


EDM_SCHEDULES, VP = [Linear, Cosine, Flow, EDM], [Linear, Cosine]
# The same weight on x0 at every draw, said in two ways.
MATCHED = {
    "eps is x0 by snr": ((Epsilon(), None), (Sample(), SNR()), EDM_SCHEDULES),
    "score by sigma^2 is eps": ((Score(), SNR()), (Epsilon(), Simple()), EDM_SCHEDULES),
    "v is x0 by snr + 1": ((V(), None), (Sample(), EDMLambda(sigma_data=1.0)), VP),
    "edm's F is x0 by its lambda": ((EDMPreconditioned(), None), (Sample(), EDMLambda()), EDM_SCHEDULES),
    "edm's F is eps by its lambda": ((EDMPreconditioned(), None), (Epsilon(), EDMLambda()), EDM_SCHEDULES),
    "min_snr of eps and v": ((Epsilon(), MinSNR()), (V(), MinSNR()), EDM_SCHEDULES),
    "min_snr of x0 and flow": ((Sample(), MinSNR()), (Velocity(), MinSNR()), EDM_SCHEDULES),
    "p2 of eps and edm": ((Epsilon(), P2()), (EDMPreconditioned(), P2()), EDM_SCHEDULES),
    "flow matching per log-snr": ((Velocity(), None), (V(), FlowMatching()), [Flow]),
}


@pytest.mark.parametrize(("name", "on"), [(name, on) for name, row in MATCHED.items() for on in row[2]])
def test_matched_weightings_have_equal_gradients_draw_by_draw(name: str, on) -> None:
    first, second, _ = MATCHED[name]
    # Times away from the ends, where an oracle's eps loses its digits in float32.
    density = FixedTimes(torch.ones_like)
    if name.startswith("flow matching"):
        density.density = UniformTime(t_min=0.0).density
    grads = [gradient(p, on(), density, 256, weighting) for p, weighting in (first, second)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5 * float(grads[0].abs().max()))


@pytest.mark.parametrize("weighting", [ELBO(), Sigmoid()], ids=["elbo", "sigmoid"])
@pytest.mark.parametrize("on", [Cosine, Flow])
def test_density_is_importance_sampling_for_weights_per_log_snr(on, weighting: Weighting) -> None:
    # Different densities, parameterizations and weights with the same product: equal expected gradients.
    densities: list[TimeDensity] = [UniformTime(), LogitNormalTime(std=1.5), ModeTime(), LossAdaptiveTime()]
    grads = [
        gradient(p, on(), density, 30_000, weighting)
        for p, density in zip((V(), Sample(), EDMPreconditioned(), V()), densities, strict=True)
    ]
    for other in grads[1:]:
        # 30,000 stratified draws: integrals over a basis of bumps, 1% of the largest.
        torch.testing.assert_close(other, grads[0], rtol=0.01, atol=0.01 * float(grads[0].abs().max()))


# From the code as it was before weightings and couplings came in (2026-11-21): loss, and per_sample[3], of 0.5 x + 1e-4
# times the noise conditioning, on 8 samples of linspace(-1, 1), at seed 0. On x86 they are equal to the bit.
BEFORE = {
    "v": (V, LogitNormalTime, Cosine, 0.5719780921936035, 0.2239014357328415),
    "eps": (Epsilon, UniformTime, Linear, 0.41578224301338196, 0.3202460706233978),
    "x0": (Sample, UniformTime, Cosine, 0.32434403896331787, 0.09987353533506393),
    "flow": (Velocity, LogitNormalTime, Flow, 1.2030428647994995, 0.6469297409057617),
    "edm": (EDMPreconditioned, LogNormalSigma, EDM, 1.580087661743164, 1.3019623756408691),
}


class Half(nn.Module):
    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        return 0.5 * x + 1e-4 * noise_cond.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("name", BEFORE)
def test_plain_losses_are_what_they_were(name: str) -> None:
    kind, density, on, loss, fourth = BEFORE[name]
    parameterization, schedule = kind(), on()
    x0 = torch.linspace(-1, 1, 8 * 3 * 4 * 4).reshape(8, 3, 4, 4)
    denoiser = Denoiser(Half(), schedule, parameterization)
    out = Objective(parameterization, density())(denoiser, x0, {}, training_noise())
    # Other processors may sum in another order: a few units in the last place.
    assert float(out.loss) == pytest.approx(loss, rel=1e-6)
    assert float(out.per_sample[3]) == pytest.approx(fourth, rel=1e-6)
    # To the bit: one draw of times, then of noise, a plain mean of squares, no weight.
    noise = training_noise()
    level = schedule.level(density().draw(8, schedule, noise, CPU), 4)
    eps = noise.normal(x0)
    output = denoiser.output(level.alpha * x0 + level.sigma * eps, level)
    plain = (output - parameterization.target(x0, eps, level)).square().flatten(1).mean(1)
    assert torch.equal(out.per_sample, plain)
    assert torch.equal(out.loss, plain.mean())
    assert out.terms == {}


DENSITIES = {
    "uniform": lambda: UniformTime(low_discrepancy=False),
    "uniform-from-0.2": lambda: UniformTime(t_min=0.2, low_discrepancy=False),
    "uniform-low-discrepancy": lambda: UniformTime(),
    "discrete": lambda: DiscreteUniformTime(),
    "discrete-low-discrepancy": lambda: DiscreteUniformTime(low_discrepancy=True),
    "log-normal": lambda: LogNormalSigma(low_discrepancy=False),
    "log-normal-low-discrepancy": lambda: LogNormalSigma(p_mean=-0.4, p_std=1.0),
    "logit-normal": lambda: LogitNormalTime(low_discrepancy=False),
    "logit-normal-low-discrepancy": lambda: LogitNormalTime(mean=0.5, std=0.7),
    "uniform-shared-jitter": lambda: UniformTime(low_discrepancy="shared"),
    "mode": lambda: ModeTime(low_discrepancy=False),
    "mode-both-ends": lambda: ModeTime(scale=-1.0),
    "adaptive": lambda: LossAdaptiveTime(),
}


@pytest.mark.parametrize("on", [Linear, Cosine, Flow, EDM])
@pytest.mark.parametrize("name", DENSITIES)
def test_densities_integrate_to_1_and_match_their_draws(name: str, on) -> None:
    schedule, density = on(), DENSITIES[name]()
    # Finer towards t = 0, where a beta schedule's log-SNR runs away; centres of cells, so never on an end or a kink.
    edges = torch.linspace(0, 1, 60_001, dtype=F64) ** 3
    centres, widths = (edges[1:] + edges[:-1]) / 2, edges.diff()
    mass = density.density(centres, schedule) * widths
    # The clamp at the ends of edm's range holds 2e-5 of the log-normal's mass; the rest is quadrature over kinks.
    assert float(mass.sum()) == pytest.approx(1.0, abs=2e-3)
    t = density.draw(20_000, schedule, training_noise(), CPU)
    assert t.dtype == torch.float32
    assert t.shape == (20_000,)
    assert 0 <= float(t.min()) <= float(t.max()) <= 1
    # Deciles by the density hold a tenth of the draws each: five deviations of sqrt(0.09/20000) = 0.002.
    cumulative = mass.cumsum(0)
    cuts = centres[torch.searchsorted(cumulative, torch.linspace(0.1, 0.9, 9, dtype=F64))]
    share = (t[:, None].double() <= cuts).double().mean(0)
    torch.testing.assert_close(share, torch.linspace(0.1, 0.9, 9, dtype=F64), rtol=0, atol=0.011)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("size", [1, 7, 128])
def test_low_discrepancy_draws_are_stratified_over_all_ranks(world_size: int, size: int) -> None:
    density = UniformTime(t_min=0.0)
    draws = [density.draw(size, Flow(), training_noise(rank, rank, world_size), CPU) for rank in range(world_size)]
    strata = (torch.cat(draws).double() * size * world_size).floor().long()
    assert sorted(strata.tolist()) == list(range(size * world_size))
    # Each rank alone spans the range as well as it can.
    assert all(float(t.double().mean()) == pytest.approx(0.5, abs=1 / size) for t in draws)


def test_low_discrepancy_lowers_the_variance_of_the_loss() -> None:
    def spread(density: TimeDensity) -> float:
        means = [density.draw(64, Flow(), training_noise(seed), CPU).square().mean() for seed in range(50)]
        return float(torch.stack(means).std())

    assert spread(UniformTime()) < 0.1 * spread(UniformTime(low_discrepancy=False))


def test_discrete_times_are_grid_points_and_all_of_them() -> None:
    t = DiscreteUniformTime(num_timesteps=10).draw(1000, Linear(), training_noise(), CPU)
    assert sorted(set((t * 10).round().int().tolist())) == list(range(1, 11))
    torch.testing.assert_close(t * 10, (t * 10).round())


@pytest.mark.parametrize("on", [Cosine, Flow, EDM])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", ["uniform-from-0.2", "log-normal", "logit-normal"])
def test_effective_weight_is_what_monte_carlo_finds(kind: str, density: str, on) -> None:
    schedule, parameterization = on(), KINDS[kind]()
    objective = Objective(parameterization, DENSITIES[density]())
    count = 40_000
    t = objective.time_density.draw(count, schedule, training_noise(), CPU).double()
    # A denoiser that errs by 1 everywhere pays the weight at the log-SNR it was asked at.
    level = schedule.level(t)
    error = (torch.as_tensor(parameterization.gain(level)) ** 2).expand(count)
    log_snr = schedule.log_snr(t)
    edges = torch.linspace(-2.0, 2.0, 5, dtype=F64)
    for low, high in itertools.pairwise(edges.tolist()):
        inside = (log_snr >= low) & (log_snr < high)
        brute = float(error[inside].sum()) / count
        fine = torch.linspace(low, high, 2001, dtype=F64)
        stated = float(torch.trapezoid(objective.effective_weight(schedule, fine), fine))
        # Counts of n draws in a bin: four deviations of sqrt(n), plus the spread of the weight within the bin.
        n = max(int(inside.sum()), 1)
        assert stated == pytest.approx(brute, rel=8 / n**0.5, abs=1e-3)


def test_effective_weight_is_0_where_the_schedule_never_goes() -> None:
    schedule = EDM()
    least, most = schedule.log_snr_range()
    beyond = torch.tensor([least - 1, most + 1, -math.inf, math.inf], dtype=F64)
    assert Objective(Epsilon(), LogNormalSigma()).effective_weight(schedule, beyond).tolist() == [0.0] * 4


def test_known_weights() -> None:
    log_snr = torch.linspace(-6, 6, 13, dtype=F64)
    # Karras et al. 2022: EDM's weight on x0 per log sigma is its density; per log-SNR, half of it over c_out^2.
    sigma = torch.exp(-log_snr / 2)
    normal = torch.exp(-0.5 * ((sigma.log() + 1.2) / 1.2) ** 2) / (1.2 * math.sqrt(2 * math.pi))
    c_out2 = (sigma * 0.5) ** 2 / (sigma**2 + 0.25)
    ours = Objective(EDMPreconditioned(sigma_data=0.5), LogNormalSigma()).effective_weight(EDM(), log_snr)
    torch.testing.assert_close(ours, 0.5 * normal / c_out2, rtol=1e-9, atol=0)
    # Flow matching with uniform t falls exponentially in log-SNR when read as a weight on eps (Kingma & Gao 2023).
    eps_weight = Objective(Velocity(), UniformTime(t_min=0.0)).effective_weight(Flow(), log_snr) / log_snr.exp()
    # On flow, |v - v_hat|^2 = |eps - eps_hat|^2 / alpha^2, and p(log_snr) = alpha sigma / 2.
    torch.testing.assert_close(eps_weight, 0.5 * torch.exp(-log_snr / 2), rtol=1e-9, atol=0)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, noise_cond: Tensor, label: Tensor) -> Tensor:
        return self.factor * x + label.to(x.dtype).reshape(-1, 1, 1, 1) + noise_cond.reshape(-1, 1, 1, 1) / 1000


def test_loss_is_its_definition(cell: tuple[NoiseSchedule, Parameterization]) -> None:
    schedule, parameterization = cell
    x0 = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    cond = {"label": torch.arange(6)}
    network = Scale()
    denoiser = Denoiser(network, schedule, parameterization, clip_x0=0.1)  # clipping never touches the loss
    out = Objective(parameterization, UniformTime(), distance=L1())(denoiser, x0, cond, training_noise(3))
    noise = training_noise(3)
    t = UniformTime().draw(6, schedule, noise, CPU)
    eps = noise.normal(x0)
    expected = []
    for i in range(6):
        level = schedule.level(t[i : i + 1], 4)
        x_t = schedule.perturb(x0[i : i + 1], eps[i : i + 1], level)
        noise_cond = torch.as_tensor(parameterization.noise_cond(level)).reshape(1)
        output = network(parameterization.scale_input(x_t, level), noise_cond, torch.tensor([i]))
        expected.append((output - parameterization.target(x0[i : i + 1], eps[i : i + 1], level)).abs().mean())
    torch.testing.assert_close(out.per_sample, torch.stack(expected).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)
    assert torch.equal(out.t, t)
    torch.testing.assert_close(out.log_snr, schedule.log_snr(t))
    assert not out.per_sample.requires_grad
    out.loss.backward()
    assert network.factor.grad is not None


def test_same_seed_same_loss() -> None:
    x0, denoiser = torch.ones(4, 1, 2, 2), Denoiser(Scale(), Linear(), V())
    cond = {"label": torch.zeros(4, dtype=torch.int64)}
    first, again, other = (Objective(V())(denoiser, x0, cond, training_noise(s)).per_sample for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (L2(), F.mse_loss),
        (L1(), F.l1_loss),
        (Huber(), F.smooth_l1_loss),
        (Huber(delta=0.3), lambda a, b, reduction: F.huber_loss(a, b, reduction=reduction, delta=0.3)),
        (SmoothL1(beta=0.3), lambda a, b, reduction: F.smooth_l1_loss(a, b, reduction=reduction, beta=0.3)),
        (Huber(delta=0.3), lambda a, b, reduction: 0.3 * SmoothL1(beta=0.3)(a, b)),
    ],
    ids=["l2", "l1", "huber-1", "huber-0.3", "smooth_l1", "huber-is-smooth_l1"],
)
def test_distances_are_torchs(ours, theirs) -> None:
    a, b = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)).mul(2).unbind(0)
    torch.testing.assert_close(ours(a, b), theirs(a, b, reduction="none"))


def test_pseudo_huber_is_the_papers_metric_of_whole_samples() -> None:
    a, b = torch.randn(2, 5, 3, 4, dtype=F64, generator=torch.Generator().manual_seed(0)).unbind(0)
    squared = (a - b).square().flatten(1).sum(1)
    for distance, c in ((PseudoHuber(), 0.00054 * math.sqrt(12)), (PseudoHuber(c=2.0), 2.0)):
        ours = distance(a, b).flatten(1).sum(1)
        torch.testing.assert_close(ours, torch.sqrt(squared + c**2) - c, rtol=1e-9, atol=0)
    # Smooth at 0, where a norm is not.
    a.requires_grad_()
    PseudoHuber()(a, a.detach()).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_shared_jitter_is_vdms_evenly_spaced_draw() -> None:
    t = UniformTime(t_min=0.0, low_discrepancy="shared").draw(64, Flow(), training_noise(), CPU)
    torch.testing.assert_close(t.diff(), torch.full((63,), 1 / 64), rtol=1e-4, atol=0)


def test_mode_density_is_eq_20() -> None:
    u = torch.linspace(0.001, 0.999, 999, dtype=F64)
    t = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    ours = ModeTime().density(t, Flow())
    slope = -torch.gradient(t, spacing=(u,))[0]
    # Central differences of a step of 1/1000: errors of 1e-6 times the third derivative.
    torch.testing.assert_close(ours[1:-1], 1 / slope[1:-1], rtol=1e-4, atol=0)
    assert float(ModeTime(scale=0.0).density(torch.tensor(0.3, dtype=F64), Flow())) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Huber(delta=0.0), "huber needs delta > 0"),
        (lambda: UniformTime(t_min=1.0), r"t_min=1.0 must lie in \[0, 1\)"),
        (lambda: DiscreteUniformTime(num_timesteps=0), "num_timesteps=0 must be at least 1"),
        (lambda: LogNormalSigma(p_std=0.0), "p_std=0.0 must be positive"),
        (lambda: LogitNormalTime(std=-1.0), "std=-1.0 must be positive"),
        (lambda: ModeTime(scale=2.0), "scale=2.0 must lie in"),
        (lambda: UniformTime(low_discrepancy="yes"), "choose true, false or shared"),
        (lambda: SmoothL1(beta=0.0), "smooth_l1 needs beta > 0"),
        (lambda: PseudoHuber(c=0.0), "pseudo_huber needs c > 0"),
    ],
)
def test_bad_input_is_one_sentence(make, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
