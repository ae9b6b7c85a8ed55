"""Every guidance against a closed form: a mixture whose components are classes, and a single Gaussian."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.grids import make_grid
from ornstein.diffusion.guidance import (
    AdaptiveProjected,
    Autoguidance,
    CFGPlusPlus,
    Classifier,
    ClassifierFree,
    Compose,
    Energy,
    Interval,
)
from ornstein.diffusion.noise import NoiseSource
from ornstein.diffusion.parameterizations import EDMPreconditioned, Parameterization, Sample, V
from ornstein.diffusion.samplers import DDIM, Heun
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Level, Linear, NoiseSchedule

TIMES = (0.05, 0.3, 0.6, 0.95)
LABEL = {"label": torch.tensor([0, 1, 2, 1])}
NULLS = {"label": torch.full((4,), 3)}


def mixture() -> GaussianMixture:
    """Three classes in two dimensions, of unequal weights and widths, float64."""
    means = torch.tensor([[-0.7, -0.5], [0.6, 0.7], [0.5, -0.8]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.3, 0.2, 0.4]).double(), torch.tensor([0.5, 0.3, 0.2]).double())


def component(of: GaussianMixture, number: int) -> GaussianMixture:
    """One class alone."""
    return GaussianMixture(of.means[number : number + 1], of.stds[number : number + 1])


class ClassDenoiser(Denoiser):
    """The ideal class-conditional denoiser: label k is component k, label K the whole mixture."""

    def output(self, x_t: Tensor, level: Level) -> Tensor:
        assert isinstance(self.network, GaussianMixture)
        classes = [component(self.network, k) for k in range(len(self.network.means))]
        every = torch.stack([each.posterior_mean(x_t, level) for each in [*classes, self.network]])
        label = self.cond.get("label", torch.full((len(x_t),), len(classes)))
        x0 = every[label, torch.arange(len(x_t))]
        return self.parameterization.target(x0, (x_t - level.alpha * x0) / level.sigma, level)


class ExactClassifier(nn.Module):
    """The mixture's own p(class | x_t), from x_t at unit scale and ln(sigma/alpha)/4."""

    def __init__(self, of: GaussianMixture) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        ratio = torch.exp(4 * noise_cond)
        alpha, sigma = 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
        variance = alpha[:, None] ** 2 * self.of.stds**2 + sigma[:, None] ** 2
        distance = ((x[:, None] - alpha[:, None, None] * self.of.means) ** 2).sum(2)
        return self.of.log_weights - 0.5 * distance / variance - 0.5 * x.shape[1] * variance.log()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def means(x: Tensor, schedule: NoiseSchedule, t: float) -> tuple[Tensor, Tensor]:
    """The conditional and the unconditional posterior mean."""
    level, data = schedule.level(t), mixture()
    each = [component(data, k).posterior_mean(x[i : i + 1], level) for i, k in enumerate(LABEL["label"].tolist())]
    return torch.cat(each), data.posterior_mean(x, level)


def denoiser_on(schedule: NoiseSchedule, parameterization: Parameterization | None = None) -> Denoiser:
    return ClassDenoiser(mixture(), schedule, parameterization or Sample(), LABEL)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-7) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_cfg_is_its_closed_form(cell: tuple[NoiseSchedule, Parameterization], x: Tensor, scale: float) -> None:
    guided = ClassifierFree(scale=scale)(denoiser_on(*cell), NULLS)
    for t in TIMES:
        cond, uncond = means(x, cell[0], t)
        # What eps at alpha = 1e-3 says of x0 has lost three digits, and a table at float32 three more.
        close(guided(x, t).x0, uncond + scale * (cond - uncond), 1e-6)


@pytest.mark.parametrize("per_sample", [False, True], ids=["one-time", "times"])
def test_the_exact_classifier_makes_the_unconditional_model_conditional(
    schedule: NoiseSchedule, x: Tensor, per_sample: bool
) -> None:
    """For every alpha and sigma, which a rule in eps alone, or one for variance-preserving schedules, would not."""
    data = denoiser_on(schedule)
    unconditional = ClassDenoiser(mixture(), schedule, Sample(), NULLS)
    for t in TIMES:
        times = torch.full((4,), t, dtype=torch.float64) if per_sample else t
        for number in range(3):
            guided = Classifier(ExactClassifier(mixture()), target=number)(unconditional, {})
            wanted = data.bind({"label": torch.full((4,), number)})(x, times).x0
            close(guided(x, times).x0, wanted, 1e-6)


def test_the_classifier_takes_each_samples_label(x: Tensor) -> None:
    cond, _ = means(x, Linear(), 0.4)
    base = denoiser_on(Linear())
    _, uncond = means(x, Linear(), 0.4)
    guided = Classifier(ExactClassifier(mixture()), scale=2.0)(base, NULLS)
    # On top of the conditional model: the step from mixture to class is taken twice more.
    close(guided(x, 0.4).x0, cond + 2 * (cond - uncond), 1e-6)
    assert guided.cost == 2


def test_classifier_guided_samples_are_the_classes(x: Tensor) -> None:
    noise = NoiseSource(0).bind(torch.arange(64), (2,))
    label = torch.full((64,), 1)
    conditional = ClassDenoiser(mixture(), Linear(), V(), {"label": label})
    unconditional = ClassDenoiser(mixture(), Linear(), V())
    guided = Classifier(ExactClassifier(mixture()), target=1)(unconditional, {})
    for sampler in (DDIM(steps=20), Heun(steps=8)):
        one, other = (sampler.sample(each, noise).x for each in (conditional, guided))
        close(one.double(), other.double(), 2e-3)  # float32 noise, and gradients in float32 over twenty steps
        assert float((other.mean(0) - mixture().means[1]).abs().max()) < 0.1


def test_the_classifier_is_left_out_where_there_is_no_signal(x: Tensor) -> None:
    base = denoiser_on(Flow())
    guided = Classifier(ExactClassifier(mixture()))(base, NULLS)
    assert torch.equal(guided(x, 1.0).x0, base(x, 1.0).x0)
    every = guided(x, torch.tensor([1.0, 0.5, 1.0, 0.3], dtype=torch.float64)).x0
    assert bool(every.isfinite().all())


def test_a_classifier_of_one_schedule_gets_its_times(x: Tensor) -> None:
    class Spy(ExactClassifier):
        def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
            seen.append((x.detach(), noise_cond))
            return super().forward(x, noise_cond / 1e4)

    seen: list[tuple[Tensor, Tensor]] = []
    for schedule in (Linear(), EDM()):
        Classifier(Spy(mixture()), conditioning="time")(denoiser_on(schedule), NULLS)(x, 0.4)
    assert torch.equal(seen[0][1], torch.full((4,), 400.0, dtype=torch.float64))
    close(seen[0][0], x)
    level = EDM().level(0.4)
    close(seen[1][0], x / (level.alpha**2 + level.sigma**2) ** 0.5)


@pytest.mark.parametrize("per_sample", [False, True], ids=["one-time", "times"])
@pytest.mark.parametrize("gradient", ["exact", "cheap"])
def test_a_quadratic_energy_on_gaussian_data(
    schedule: NoiseSchedule, gaussian: GaussianMixture, x: Tensor, gradient: str, per_sample: bool
) -> None:
    r"""Cov[x0 | x_t] = s^2 sigma^2 / (alpha^2 s^2 + sigma^2) I, so x0_hat moves by -scale Cov (x0_hat - y)."""
    wanted = torch.tensor([0.2, 0.9], dtype=torch.float64)
    energy = Energy(lambda x0: 0.5 * ((x0 - wanted) ** 2).sum(1), scale=1.7, gradient=gradient, sigma_data=0.5)
    base = gaussian.denoiser(schedule, Sample())
    for t in TIMES:
        level = schedule.level(t)
        covariance = 0.25 * level.sigma**2 / (0.25 * level.alpha**2 + level.sigma**2)
        mean = gaussian.posterior_mean(x, level)
        times = torch.full((4,), t, dtype=torch.float64) if per_sample else t
        p = energy(base, {})(x, times)
        close(p.x0, mean - 1.7 * covariance * (mean - wanted), 1e-6)
        close(level.alpha * p.x0 + level.sigma * p.eps, x)


def test_an_exact_energy_follows_the_mixtures_covariance(x: Tensor) -> None:
    """The posterior covariance of a mixture has no isotropic form: exact differs from cheap, and is the Jacobian."""
    level, data = Linear().level(0.4), mixture()
    wanted = torch.tensor([0.2, 0.9], dtype=torch.float64)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda one: data.posterior_mean(one[None], level)[0], row) for row in x]
    )
    mean = data.posterior_mean(x, level)
    energy = Energy(lambda x0: 0.5 * ((x0 - wanted) ** 2).sum(1), gradient="exact")
    moved = torch.einsum("bij,bi->bj", jacobian, mean - wanted) * level.sigma**2 / level.alpha
    base = data.denoiser(Linear(), V())
    close(energy(base, {})(x, 0.4).x0, mean - moved, 1e-6)
    assert not torch.allclose(replace(energy, gradient="cheap")(base, {})(x, 0.4).x0, mean - moved, atol=1e-2)


def test_exact_is_cheap_where_there_is_no_signal(gaussian: GaussianMixture, x: Tensor) -> None:
    loss = lambda x0: (x0**2).sum(1)  # noqa: E731
    exact, cheap = (Energy(loss, gradient=name, sigma_data=0.5) for name in ("exact", "cheap"))
    base = gaussian.denoiser(Flow(), Sample())
    for t in (1.0, torch.tensor([1.0, 0.5, 1.0, 0.3], dtype=torch.float64)):
        close(exact(base, {})(x, t).x0, cheap(base, {})(x, t).x0, 1e-6)


def test_energy_samples_a_tilted_gaussian(gaussian: GaussianMixture) -> None:
    """p(x0) exp(-L) of a Gaussian and a quadratic is a Gaussian; guided samples go towards it, not beyond."""
    wanted, scale = 1.4, 2.0
    energy = Energy(lambda x0: 0.5 * ((x0 - wanted) ** 2).sum(1), scale=scale, sigma_data=0.5)
    noise = NoiseSource(0).bind(torch.arange(2000), (2,))
    plain, guided = (
        DDIM(steps=50).sample(each, noise).x
        for each in (gaussian.denoiser(Cosine(), Sample()), energy(gaussian.denoiser(Cosine(), Sample()), {}))
    )
    tilted = (gaussian.means[0] / 0.25 + scale * wanted) / (1 / 0.25 + scale)
    before, after = (float((sample.mean(0) - tilted).norm()) for sample in (plain, guided))
    assert after < 0.35 * before
    assert bool((guided.mean(0) > plain.mean(0)).all())


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_cfgpp_under_ddim_is_the_published_update(x: Tensor, scale: float) -> None:
    """Chung et al. 2024, algorithm 2, written out."""
    schedule, base = Linear(), denoiser_on(Linear(), V())
    noise = NoiseSource(0).bind(torch.arange(4), (2,))
    sampler = DDIM(steps=7)
    grid = make_grid(sampler.rule, schedule, 7)
    z = noise(0) * grid[0].sigma
    for t, s in zip(grid.levels, grid.levels[1:], strict=False):
        cond, uncond = base(z, t).eps, base.bind(NULLS)(z, t).eps
        tweedie = (z - t.sigma * (uncond + scale * (cond - uncond))) / t.alpha
        z = s.alpha * tweedie + s.sigma * uncond
    guided = CFGPlusPlus(scale=scale)(base, NULLS)
    close(sampler.sample(guided, noise).x.double(), z.double(), 1e-4)  # float32 noise, over seven steps
    assert guided.renoises and guided.cost == 2


def test_samplers_that_cannot_renoise_refuse_cfgpp(x: Tensor) -> None:
    guided = CFGPlusPlus()(denoiser_on(Linear()), NULLS)
    with pytest.raises(ValueError, match="Heun cannot renoise as guidance=cfgpp asks"):
        Heun(steps=3).sample(guided, NoiseSource(0).bind(torch.arange(4), (2,)))


def test_apg_without_its_options_is_cfg(cell: tuple[NoiseSchedule, Parameterization], x: Tensor) -> None:
    base = denoiser_on(*cell)
    apg = AdaptiveProjected(scale=3.0, eta=1.0, norm_threshold=None, momentum=0.0)(base, NULLS)
    for t in TIMES:
        close(apg(x, t).x0, ClassifierFree(scale=3.0)(base, NULLS)(x, t).x0, 1e-6)


def test_apg_turns_bounds_and_averages(x: Tensor) -> None:
    base = denoiser_on(Linear())
    cond, uncond = means(x, Linear(), 0.4)
    update = AdaptiveProjected(scale=2.0, eta=0.0, momentum=0.0)(base, NULLS)(x, 0.4).x0 - cond
    close((update * cond).sum(1), torch.zeros(4).double())
    parallel = ((cond - uncond) * cond).sum(1, keepdim=True) / (cond**2).sum(1, keepdim=True) * cond
    close(update, cond - uncond - parallel)
    bounded = AdaptiveProjected(scale=2.0, eta=1.0, norm_threshold=0.05, momentum=0.0)(base, NULLS)(x, 0.4).x0 - cond
    norms = (cond - uncond).norm(dim=1)
    close(bounded.norm(dim=1), norms.clamp(max=0.05))
    assert float(norms.max()) > 0.05


def test_apgs_average_runs_over_steps_and_starts_anew(x: Tensor) -> None:
    base = denoiser_on(Linear())
    guided = AdaptiveProjected(scale=2.0, eta=1.0, momentum=-0.5)(base, NULLS)
    update = {t: (lambda pair: pair[0] - pair[1])(means(x, Linear(), t)) for t in (0.8, 0.6, 0.4)}
    moved = lambda t, again=False: guided(x, t, again=again).x0 - means(x, Linear(), t)[0]  # noqa: E731
    close(moved(0.8), update[0.8])
    close(moved(0.6, again=True), update[0.6])  # the first step has nothing before it, in either of its calls
    close(moved(0.6), update[0.6] - 0.5 * update[0.8])
    close(moved(0.4, again=True), update[0.4] - 0.5 * update[0.8])  # what the step's first call added
    close(moved(0.4), update[0.4] - 0.5 * (update[0.6] - 0.5 * update[0.8]))
    guided = guided.start()
    close(moved(0.6), update[0.6])


def test_heun_asks_again(x: Tensor) -> None:
    """Two calls a step, one entry into the average: a run of Heun by hand with the average held over each step."""
    base = denoiser_on(Linear(), V())
    guided = AdaptiveProjected(scale=2.0, eta=1.0, momentum=-0.7)(base, NULLS)
    calls: list[bool] = []

    class Spy:
        schedule, renoises, cost = guided.schedule, False, 2

        def start(self) -> Spy:
            return self

        def __call__(self, x_t, t, *, again=False):  # type: ignore[no-untyped-def]
            calls.append(again)
            return guided(x_t, t, again=again)

    Heun(steps=3).sample(Spy(), NoiseSource(0).bind(torch.arange(4), (2,)))  # type: ignore[arg-type]
    assert calls == [False, True, False, True, False]


def test_autoguidance_mixes_in_x0(cell: tuple[NoiseSchedule, Parameterization], x: Tensor) -> None:
    """The weak model is a mixture of wider components; on another schedule and in another output it is the same."""
    wide = GaussianMixture(mixture().means, 2 * mixture().stds, mixture().log_weights.exp())
    schedule, parameterization = cell
    for own, meaning in ((schedule, Sample()), (Cosine(), V()), (EDM(), EDMPreconditioned())):
        weak = ClassDenoiser(wide, own, meaning)
        guided = Autoguidance(scale=2.0, denoiser=weak)(denoiser_on(schedule, parameterization), NULLS)
        assert guided.cost == 2
        for t in (0.3, 0.6):
            good = denoiser_on(schedule)(x, t).x0
            bad = ClassDenoiser(wide, schedule, Sample(), LABEL)(x, t).x0
            close(guided(x, t).x0, bad + 2 * (good - bad), 1e-6)


def test_autoguidance_by_other_conditions(x: Tensor) -> None:
    base, weak = denoiser_on(Linear()), ClassDenoiser(mixture(), Linear(), Sample())
    cond, uncond = means(x, Linear(), 0.4)
    for condition in ("null", None, "none"):  # None is what a command line makes of null
        guided = Autoguidance(scale=3.0, denoiser=weak, condition=condition)(base, NULLS)
        close(guided(x, 0.4).x0, uncond + 3 * (cond - uncond))
    assert Autoguidance(scale=1.0)(base, NULLS) is base
    close(Autoguidance(scale=3.0, denoiser=weak)(base, NULLS)(x, 0.4).x0, cond)


@pytest.mark.parametrize("per_sample", [False, True], ids=["one-time", "times"])
def test_the_interval_is_cfg_inside_and_the_model_outside(schedule: NoiseSchedule, x: Tensor, per_sample: bool) -> None:
    base = denoiser_on(schedule)
    guided = Interval(3.0, sigma_min=0.3, sigma_max=2.0)(base, NULLS)
    inside = 0
    times = torch.linspace(0.02, 0.98, 25, dtype=torch.float64).tolist()
    for t in times:
        level = schedule.level(t)
        within = 0.3 < level.sigma / level.alpha <= 2.0
        cond, uncond = means(x, schedule, t)
        wanted = uncond + 3 * (cond - uncond) if within else cond
        p = guided(x, torch.full((4,), t, dtype=torch.float64) if per_sample else t)
        close(p.x0, wanted, 1e-6)
        assert guided.cost == (2 if within or per_sample else 1)
        inside += within
    assert 0 < inside < len(times)


def test_bounds_in_log_snr_are_the_same_bounds(x: Tensor) -> None:
    log_snr = [-2 * math.log(2.0), -2 * math.log(0.3)]
    one = Interval(sigma_min=0.3, sigma_max=2.0)
    other = Interval(sigma_min=None, sigma_max=None, log_snr_min=log_snr[0], log_snr_max=log_snr[1])
    assert one.bounds == pytest.approx(other.bounds)
    assert Interval(sigma_min=None, sigma_max=None).bounds == (0.0, math.inf)


def test_each_sample_has_its_own_interval_and_average(x: Tensor) -> None:
    """Levels that differ over the batch: what is outside is neither guided nor enters the average."""
    schedule = Linear()
    guided = Interval(part=AdaptiveProjected(2.0, eta=1.0, momentum=-0.5), sigma_min=0.3, sigma_max=2.0)(
        denoiser_on(schedule), NULLS
    )
    first, second = (torch.tensor(values, dtype=torch.float64) for values in ([0.3, 0.99, 0.3, 0.99], [0.25] * 4))
    guided(x, first)
    moved = guided(x, second).x0
    for i in range(4):
        cond, uncond = (each[i] for each in means(x, schedule, 0.25))
        before = (lambda pair: (pair[0] - pair[1])[i])(means(x, schedule, 0.3)) if i % 2 == 0 else 0.0
        close(moved[i], cond + (cond - uncond) - 0.5 * before, 1e-6)


def test_changes_of_x0_add_up_and_an_energy_sees_what_came_before(x: Tensor) -> None:
    """cfg, autoguidance and the classifier commute; an energy after them is taken at their sum."""
    schedule = Linear()
    base = denoiser_on(schedule)
    wide = GaussianMixture(mixture().means, 2 * mixture().stds, mixture().log_weights.exp())
    weak = ClassDenoiser(wide, schedule, V())
    cond, uncond = means(x, schedule, 0.4)
    bad = weak.bind(LABEL)(x, 0.4).x0
    parts = [ClassifierFree(3.0), Autoguidance(2.0, denoiser=weak), Classifier(ExactClassifier(mixture()), scale=0.5)]
    wanted = cond + 2 * (cond - uncond) + (cond - bad) + 0.5 * (cond - uncond)
    for order in (parts, parts[::-1]):
        close(Compose(order)(base, NULLS)(x, 0.4).x0, wanted, 1e-6)
    target = torch.tensor([0.2, 0.9], dtype=torch.float64)
    energy = Energy(lambda x0: 0.5 * ((x0 - target) ** 2).sum(1), scale=2.0, sigma_data=0.5)
    level = schedule.level(0.4)
    share = 2.0 * 0.25 * level.sigma**2 / (0.25 * level.alpha**2 + level.sigma**2)
    close(Compose([*parts, energy])(base, NULLS)(x, 0.4).x0, wanted - share * (wanted - target), 1e-6)
    close(Compose([energy, *parts])(base, NULLS)(x, 0.4).x0, wanted - share * (cond - target), 1e-6)
