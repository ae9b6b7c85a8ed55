"""The ground truth itself: closed forms against brute force, derivatives and each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ornstein.diffusion.analytic import DATA, GaussianMixture
from ornstein.diffusion.guidance import ClassifierFree
from ornstein.diffusion.parameterizations import LearnedVariance, V
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Level, Linear, NoiseSchedule

from .tables import PARAMETERIZATIONS, REFUSED, SCHEDULES

F64 = torch.float64
CELLS = [(s, p) for s in SCHEDULES for p in PARAMETERIZATIONS if (s, p) not in REFUSED]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


MEANS = torch.tensor([[-0.7, -0.5], [0.6, 0.7], [0.5, -0.8]], dtype=F64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
FACTORS = 0.3 * draw(3, 2, 2, seed=1)
KINDS = {
    "isotropic": lambda: GaussianMixture(MEANS, torch.tensor([0.2, 0.15, 0.25], dtype=F64), WEIGHTS),
    "diagonal": lambda: GaussianMixture(MEANS, 0.1 + 0.2 * draw(3, 2).abs(), WEIGHTS),
    "full": lambda: GaussianMixture(
        MEANS, weights=WEIGHTS, covariances=FACTORS @ FACTORS.mT + 0.02 * torch.eye(2, dtype=F64)
    ),
}


@pytest.fixture(params=KINDS)
def any_mixture(request: pytest.FixtureRequest) -> GaussianMixture:
    return KINDS[request.param]()


def test_moments_against_brute_force(any_mixture: GaussianMixture) -> None:
    # E and Cov of x0 given x_t by weighing many draws of x0 with the likelihood of x_t.
    level = Cosine().level(0.5)
    x0 = any_mixture.sample(400_000, generator=torch.Generator().manual_seed(0))
    x_t = torch.tensor([[0.1, -0.2], [0.8, 0.5]], dtype=F64)
    means, covariances = any_mixture.posterior_mean(x_t, level), any_mixture.posterior_covariance(x_t, level)
    for row, mean, covariance in zip(x_t, means, covariances, strict=True):
        weight = torch.softmax(-0.5 * ((row - level.alpha * x0) ** 2).sum(1) / level.sigma**2, 0)
        centre = (weight[:, None] * x0).sum(0)
        # 400,000 draws, of which the likelihood keeps about a fifth: deviation 0.6 / sqrt(8e4) = 0.002.
        torch.testing.assert_close(centre, mean, rtol=0, atol=0.01)
        offset = x0 - centre
        torch.testing.assert_close(torch.einsum("n,ni,nj->ij", weight, offset, offset), covariance, rtol=0, atol=0.01)


def test_score_is_the_gradient_of_the_density(any_mixture: GaussianMixture, schedule: NoiseSchedule) -> None:
    for t in (0.01, 0.3, 0.9):
        level = schedule.level(t)
        x = (level.alpha + level.sigma) * draw(7, 2)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(any_mixture.log_prob(x, level).sum(), x)
        score = any_mixture.score(x, level)
        torch.testing.assert_close(score, gradient)
        x0, eps = any_mixture.moments(x, level)
        torch.testing.assert_close(-eps / level.sigma, gradient)  # Tweedie's formula
        torch.testing.assert_close(level.alpha * x0 + level.sigma * eps, x)


def test_covariance_is_the_denoisers_derivative(any_mixture: GaussianMixture) -> None:
    # Cov[x0|x_t] = sigma^2/alpha d E[x0|x_t]/d x_t, the second-order Tweedie formula.
    level = Linear().level(0.4)
    x = draw(3, 2)
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda v: any_mixture.posterior_mean(v[None], level)[0], x[i])
        expected = level.sigma**2 / level.alpha * jacobian
        torch.testing.assert_close(any_mixture.posterior_covariance(x, level)[i], expected)


def test_density_integrates_to_one(any_mixture: GaussianMixture) -> None:
    axis = torch.linspace(-5, 5, 401, dtype=F64)
    points = torch.cartesian_prod(axis, axis)
    for level in (DATA, Flow().level(0.5), Cosine().level(0.9)):
        mass = any_mixture.log_prob(points, level).exp().sum() * (10 / 400) ** 2
        assert float(mass) == pytest.approx(1, abs=1e-4)  # five deviations of unit noise stay inside


def test_kinds_agree() -> None:
    """The same mixture written three ways."""
    stds = torch.tensor([0.2, 0.15, 0.25], dtype=F64)
    forms = [
        GaussianMixture(MEANS, stds, WEIGHTS),
        GaussianMixture(MEANS, stds[:, None].expand(3, 2), WEIGHTS),
        GaussianMixture(MEANS, weights=WEIGHTS, covariances=stds[:, None, None] ** 2 * torch.eye(2, dtype=F64)),
    ]
    x, level = draw(20, 2), Cosine().level(0.6)
    for other in forms[1:]:
        for name in ("moments", "score", "posterior_covariance", "log_prob"):
            torch.testing.assert_close(getattr(other, name)(x, level), getattr(forms[0], name)(x, level))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_levels_per_sample_and_both_ends(any_mixture: GaussianMixture, dtype: torch.dtype) -> None:
    x, times = draw(4, 2).to(dtype), torch.tensor([0.0, 0.2, 0.8, 1.0], dtype=dtype)
    batch = any_mixture.moments(x, Flow().level(times, 2))
    for i, t in enumerate(times.tolist()):
        single = any_mixture.moments(x[i : i + 1], Flow().level(round(t, 6)))
        for ours, theirs in zip(batch, single, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours[i], theirs[0], rtol=1e-4 if dtype == torch.float32 else 1e-7, atol=1e-6)
    torch.testing.assert_close(batch[0][0], x[0], rtol=1e-4, atol=1e-5)  # sigma = 0: x_t is x0
    mean = (WEIGHTS[:, None] * MEANS).sum(0).to(dtype)
    torch.testing.assert_close(batch[0][3], mean, rtol=1e-4, atol=1e-6)  # alpha = 0: x_t says nothing
    torch.testing.assert_close(batch[1][3], x[3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("schedule_name", "parameterization_name"), CELLS)
def test_denoiser_in_every_parameterization(schedule_name: str, parameterization_name: str) -> None:
    mixture, schedule = KINDS["isotropic"](), SCHEDULES[schedule_name]()
    denoiser = mixture.denoiser(schedule, PARAMETERIZATIONS[parameterization_name](), variance_fraction=0.25)
    for t in (0.05, 0.5, 0.95):
        level = schedule.level(t)
        x = (level.alpha + level.sigma) * draw(5, 2)
        p = denoiser(x, t)
        x0, eps = mixture.moments(x, level)
        torch.testing.assert_close(p.x0, x0, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(p.eps, eps, rtol=1e-7, atol=1e-7)
        if parameterization_name.startswith("learned"):
            torch.testing.assert_close(p.variance_fraction, torch.full_like(x, 0.25))


def test_flow_of_one_gaussian_against_the_solver() -> None:
    covariance = FACTORS[:1] @ FACTORS[:1].mT + 0.02 * torch.eye(2, dtype=F64)
    one = GaussianMixture(MEANS[:1], covariances=covariance)
    # Twice the same component is a mixture, and is integrated.
    two = GaussianMixture(MEANS[[0, 0]], covariances=covariance.expand(2, 2, 2))
    for schedule in (Linear(), EDM(), Flow()):
        x = schedule.level(1.0).sigma * draw(6, 2)
        ends = schedule.level(1.0), schedule.level(0.0)
        closed = one.flow(x, *ends)
        torch.testing.assert_close(two.flow(x, *ends), closed, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.flow(closed, *reversed(ends)), x)


def test_flow_carries_the_density(any_mixture: GaussianMixture) -> None:
    """Draws of p_t, carried to data and back; in one dimension the flow is the map of quantiles."""
    line = GaussianMixture(torch.tensor([[-0.6], [0.5]], dtype=F64), torch.tensor([0.2, 0.3], dtype=F64))
    t, s = Cosine().level(0.7), Cosine().level(0.1)

    def cdf(x: Tensor, level: Level) -> Tensor:
        spread = (level.alpha**2 * line.stds**2 + level.sigma**2).sqrt()
        return (line.log_weights.exp() * torch.special.ndtr((x - level.alpha * line.means.T) / spread)).sum(1)

    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    torch.testing.assert_close(cdf(line.flow(x, t, s), s), cdf(x, t), rtol=0, atol=1e-7)
    start = draw(8, 2)
    there = any_mixture.flow(start, Flow().level(1.0), DATA)
    torch.testing.assert_close(any_mixture.flow(there, DATA, Flow().level(1.0)), start, rtol=1e-4, atol=1e-5)


def test_consistency_denoiser_gives_the_end_of_the_trajectory() -> None:
    mixture = KINDS["isotropic"]()
    x = draw(5, 2)
    p = mixture.consistency(Cosine(), V())(x, 0.6)
    level = Cosine().level(0.6)
    torch.testing.assert_close(p.x0, mixture.flow(x, level, DATA), rtol=1e-5, atol=1e-5)
    assert float((p.x0 - mixture.posterior_mean(x, level)).abs().max()) > 0.05


def labelled() -> GaussianMixture:
    return GaussianMixture(MEANS, torch.tensor([0.2, 0.15, 0.25], dtype=F64), WEIGHTS, labels=torch.tensor([0, 1, 1]))


def test_labels_pick_components() -> None:
    mixture, level = labelled(), Cosine().level(0.5)
    assert mixture.classes == 2
    parts = [
        GaussianMixture(MEANS[:1], torch.tensor([0.2], dtype=F64)),
        GaussianMixture(MEANS[1:], torch.tensor([0.15, 0.25], dtype=F64), WEIGHTS[1:]),
        KINDS["isotropic"](),  # the null label: all of them
    ]
    x, label = draw(3, 2), torch.tensor([0, 1, 2])
    for name in ("posterior_mean", "score", "log_prob", "posterior_covariance"):
        ours = getattr(mixture, name)(x, level, label=label)
        for i, part in enumerate(parts):
            torch.testing.assert_close(ours[i], getattr(part, name)(x[i : i + 1], level)[0])
    draws = mixture.sample(3000, label=torch.tensor([1]).expand(3000), generator=torch.Generator().manual_seed(0))
    expected = (WEIGHTS[1:, None] * MEANS[1:]).sum(0) / WEIGHTS[1:].sum()
    # Deviation up to 0.75 over 3000 draws: 0.014.
    torch.testing.assert_close(draws.mean(0), expected, rtol=0, atol=0.06)


def test_labels_reach_the_denoiser_through_guidance() -> None:
    mixture, level = labelled(), Cosine().level(0.5)
    x, label = draw(4, 2), torch.tensor([0, 1, 0, 1])
    null = mixture.null(label)
    denoiser = mixture.denoiser(Cosine(), V()).bind({"label": label})
    guided = ClassifierFree(scale=3.0)(denoiser, {"label": null})(x, 0.5)
    cond, uncond = (mixture.posterior_mean(x, level, label=v) for v in (label, null))
    torch.testing.assert_close(guided.x0, uncond + 3 * (cond - uncond))


def test_images_and_many_dimensions() -> None:
    mixture = GaussianMixture(draw(2, 3, 8, 8), torch.tensor([0.5, 0.3], dtype=F64))
    x, level = draw(4, 3, 8, 8, seed=2), Flow().level(0.4)
    x0, eps = mixture.moments(x, level)
    assert x0.shape == eps.shape == x.shape
    torch.testing.assert_close(level.alpha * x0 + level.sigma * eps, x)
    # The nearest of a few components in 192 dimensions takes all: a single Gaussian's density.
    nearest = mixture.log_prob(mixture.means)
    alone = -96 * torch.log(2 * math.pi * mixture.stds**2) + math.log(0.5)
    torch.testing.assert_close(nearest, alone)


def test_learned_variance_doubles_the_channels() -> None:
    mixture = KINDS["isotropic"]()
    output = mixture.denoiser(Cosine(), LearnedVariance(V())).output(draw(3, 2), Cosine().level(0.5))
    assert output.shape == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((torch.zeros(2, 1), torch.ones(3)), {}, "one entry per component"),
        ((torch.zeros(2, 1), torch.ones(2), torch.ones(3)), {}, "one entry per component"),
        ((torch.zeros(2, 1), torch.ones(2)), {"labels": torch.zeros(1)}, "one entry per component"),
        ((torch.zeros(2, 1), torch.ones(2, 3)), {}, "one entry per component"),
        ((torch.zeros(2, 1), torch.tensor([1.0, 0.0])), {}, "must be positive"),
        ((torch.zeros(2, 1), torch.tensor([1.0, -1.0])), {}, "must be positive"),
        ((torch.zeros(2, 1),), {}, "stds or covariances"),
        ((torch.zeros(2, 2),), {"covariances": torch.eye(2)}, "covariances need shape"),
        ((torch.zeros(1, 2),), {"covariances": -torch.eye(2)[None]}, "positive definite"),
    ],
)
def test_mixture_refuses(arguments: tuple[Tensor, ...], options: dict[str, Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GaussianMixture(*arguments, **options)


def test_a_mixture_without_classes_refuses_labels() -> None:
    with pytest.raises(ValueError, match="has no classes"):
        KINDS["isotropic"]().posterior_mean(draw(1, 2), DATA, label=torch.tensor([0]))
