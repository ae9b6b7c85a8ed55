"""Likelihoods against Gaussian mixtures, whose own is known: along the flow exactly, the bound from above."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.guidance import AdaptiveProjected, CFGPlusPlus
from ornstein.diffusion.likelihood import ProbabilityFlow
from ornstein.diffusion.noise import NoiseSource, SampleNoise
from ornstein.diffusion.parameterizations import (
    EDMPreconditioned,
    Epsilon,
    LearnedVariance,
    Parameterization,
    Sample,
    V,
    Velocity,
)
from ornstein.diffusion.schedules import EDM, VE, Cosine, Flow, Linear, NoiseSchedule, SubVP
from ornstein.diffusion.variational_bound import Bound, VariationalBound

PLAIN: dict[str, Any] = {"dequantize": "none"}


@pytest.fixture
def mixture() -> GaussianMixture:
    """Three unequal components in two dimensions, float64, well inside [-1, 1]."""
    means = torch.tensor([[-0.4, -0.3], [0.3, 0.4], [0.3, -0.5]]).double()
    return GaussianMixture(means, torch.tensor([0.1, 0.1, 0.15]).double(), torch.tensor([0.5, 0.3, 0.2]).double())


def drawn(mixture: GaussianMixture, count: int) -> Tensor:
    return mixture.sample(count, generator=torch.Generator().manual_seed(0))


def noise_for(x: Tensor, *, seed: int = 0, first: int = 0) -> SampleNoise:
    return NoiseSource(seed).bind(torch.arange(first, first + len(x)), x.shape[1:])


def density_bits(mixture: GaussianMixture, x: Tensor) -> Tensor:
    return -mixture.log_prob(x) / (x[0].numel() * math.log(2))


def quantised(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def image_bits(mixture: GaussianMixture, q: Tensor) -> Tensor:
    """Exact bits/dim of 8-bit levels: the mixture's mass in their bins, the outermost two open."""
    low, high = torch.where(q < -0.999, -torch.inf, q - 1 / 255), torch.where(q > 0.999, torch.inf, q + 1 / 255)
    below, above = (torch.special.ndtr((end[:, None] - mixture.means) / mixture.stds[:, None]) for end in (low, high))
    mass = (above - below).prod(2) @ mixture.log_weights.exp()
    return -torch.log2(mass) / q[0].numel()


def standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


# ---- along the flow ---------------------------------------------------------------------------------------------

# Worst of 64 samples. At the noisy end the prior is off by about sqrt(SNR) |x0| a sample: 0.0125 for edm, 0.02 for ve;
# at the data's end ve smooths components of deviation 0.1 by 0.01. The 0.01 holds for the mean of all.
FLOWS: list[tuple[str, Callable[[], NoiseSchedule], Callable[[], Parameterization], float]] = [
    ("linear-eps", Linear, Epsilon, 0.01),
    ("linear-learned", Linear, lambda: LearnedVariance(V()), 0.01),
    ("cosine-v", Cosine, V, 0.01),
    ("sub_vp-x0", SubVP, Sample, 0.01),
    ("edm-edm", EDM, lambda: EDMPreconditioned(sigma_data=0.5), 0.01),
    ("ve-edm", VE, lambda: EDMPreconditioned(sigma_data=0.5), 0.03),
    ("flow-flow", Flow, Velocity, 0.01),
    ("flow_shift-v", lambda: Flow(shift=3.0), V, 0.01),
]


@pytest.mark.parametrize(
    ("schedule", "parameterization", "worst"), [row[1:] for row in FLOWS], ids=[r[0] for r in FLOWS]
)
def test_exact_trace_gives_the_mixtures_own_likelihood(
    mixture: GaussianMixture,
    schedule: Callable[[], NoiseSchedule],
    parameterization: Callable[[], Parameterization],
    worst: float,
) -> None:
    x = drawn(mixture, 64)
    denoise = mixture.denoiser(schedule(), parameterization())
    result = ProbabilityFlow(trace="exact", **PLAIN)(denoise, x, noise_for(x))
    error = result.bits - density_bits(mixture, x)
    assert error.abs().max() < worst
    assert error.mean().abs() < 0.002
    assert result.nfe_each.max() <= result.nfe and result.nfe_each.min() > 20


def test_float32_is_as_good(mixture: GaussianMixture) -> None:
    x = drawn(mixture, 32)
    flow = ProbabilityFlow(trace="exact", **PLAIN)
    result = flow(mixture.denoiser(Cosine(), V()), x.float(), noise_for(x))
    assert result.bits.dtype == torch.float32
    assert (result.bits - density_bits(mixture, x)).abs().max() < 0.01


def test_classes_and_full_covariances() -> None:
    covariances = torch.tensor([[[0.04, 0.03], [0.03, 0.05]], [[0.02, -0.01], [-0.01, 0.03]]]).double()
    means = torch.tensor([[-0.3, 0.2], [0.4, -0.1]]).double()
    mixture = GaussianMixture(means, covariances=covariances, labels=torch.tensor([0, 1]))
    label = torch.arange(16) % 2
    x = mixture.sample(16, label=label, generator=torch.Generator().manual_seed(0))
    result = ProbabilityFlow(trace="exact", **PLAIN)(
        mixture.denoiser(Linear(), V()).bind({"label": label}), x, noise_for(x)
    )
    exact = -mixture.log_prob(x, label=label) / (2 * math.log(2))
    assert (result.bits - exact).abs().max() < 0.01


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_probes_are_unbiased(mixture: GaussianMixture, probe: Any) -> None:
    """The estimate's mean over 600 probes of one image is the exact trace's value, within 4 standard errors."""
    x = drawn(mixture, 1).expand(600, -1)
    denoise = mixture.denoiser(Linear(), V())
    exact = ProbabilityFlow(trace="exact", rtol=1e-4, atol=1e-4, **PLAIN)(denoise, x[:1], noise_for(x[:1]))
    found = ProbabilityFlow(probe=probe, rtol=1e-4, atol=1e-4, **PLAIN)(denoise, x, noise_for(x))
    error = standard_error(found.bits)
    assert 0 < error < 0.2
    # The tolerance of the solver is 1e-4 of some ten nats.
    assert abs(float(found.bits.mean() - exact.bits)) < 4 * error + 1e-3


def test_signs_are_exact_where_the_jacobian_is_diagonal() -> None:
    """Rademacher probes have no variance on a diagonal Jacobian: every probe gives the trace itself."""
    gaussian = GaussianMixture(torch.zeros(1, 3).double(), torch.tensor([[0.2, 0.5, 1.0]]).double())
    x = drawn(gaussian, 8)
    result = ProbabilityFlow(**PLAIN)(gaussian.denoiser(Cosine(), V()), x, noise_for(x))
    assert (result.bits - density_bits(gaussian, x)).abs().max() < 1e-3
    # A Gaussian's flow keeps the standardised position, so the latent is it: log-SNR -20 leaves 5e-5 of the data.
    torch.testing.assert_close(result.latent, x / torch.tensor([0.2, 0.5, 1.0]).double(), atol=1e-3, rtol=1e-3)


def test_more_probes_have_less_variance(mixture: GaussianMixture) -> None:
    x = drawn(mixture, 1).expand(200, -1)
    denoise = mixture.denoiser(Linear(), V())
    one, eight = (
        ProbabilityFlow(probes=count, rtol=1e-4, atol=1e-4, **PLAIN)(denoise, x, noise_for(x)).bits.var()
        for count in (1, 8)
    )
    # A ratio of 8 is expected; a variance from 200 draws is good to a tenth or so.
    assert 5 < float(one / eight) < 13


def test_uniform_dequantisation_bounds_the_images_bits(mixture: GaussianMixture) -> None:
    """Jensen's gap is positive and, for bins of 0.008 under deviations of 0.1, far below 0.001 bits."""
    q = quantised(drawn(mixture, 500))
    flow = ProbabilityFlow(trace="exact", rtol=1e-4, atol=1e-4)
    gap = flow(mixture.denoiser(Cosine(), V()), q, noise_for(q)).bits - image_bits(mixture, q)
    assert standard_error(gap) < 0.003
    assert abs(float(gap.mean())) < 4 * standard_error(gap) + 1e-3
    assert gap.std() > 0.01  # the noise is really there


@pytest.mark.parametrize("kind", [ProbabilityFlow(rtol=1e-4), VariationalBound(steps=12), VariationalBound(terms=5)])
def test_a_value_depends_on_seed_and_index_alone(mixture: GaussianMixture, kind: Any) -> None:
    q = quantised(drawn(mixture, 6))
    denoise = mixture.denoiser(Cosine(), V())
    whole = kind(denoise, q, noise_for(q)).bits
    parts = [kind(denoise, q[i : i + 2], noise_for(q[i : i + 2], first=i)).bits for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(kind(denoise, q, noise_for(q, seed=1)).bits, whole, atol=1e-3)


def test_no_step_leaps_over_what_it_has_not_looked_at() -> None:
    """All of this flow lies within a few of log-SNR, far below where it begins: a tolerance must not overlook it."""
    gaussian = GaussianMixture(torch.zeros(1, 2).double(), torch.tensor([30.0]).double())
    x = drawn(gaussian, 4)
    result = ProbabilityFlow(trace="exact", rtol=1e-2, atol=1e-2, **PLAIN)(
        gaussian.denoiser(Flow(), V()), x, noise_for(x)
    )
    # The prior, 4.5e-5 of 30 off at log-SNR -20, is all that the tolerance is not; unseen, the turn is 5 bits/dim.
    assert (result.bits - density_bits(gaussian, x)).abs().max() < 0.2


def test_it_needs_no_gradients_around_it_and_leaves_none(mixture: GaussianMixture) -> None:
    x = drawn(mixture, 2)
    denoise = mixture.denoiser(Cosine(), V())
    with torch.no_grad():
        off = ProbabilityFlow(rtol=1e-3, **PLAIN)(denoise, x, noise_for(x))
    on = ProbabilityFlow(rtol=1e-3, **PLAIN)(denoise, x.requires_grad_(), noise_for(x))
    assert torch.equal(on.bits, off.bits) and not on.bits.requires_grad and not on.latent.requires_grad


@pytest.mark.parametrize("kind", [ProbabilityFlow(), VariationalBound(steps=3)])
def test_an_empty_batch(mixture: GaussianMixture, kind: Any) -> None:
    x = drawn(mixture, 3)[:0]
    assert kind(mixture.denoiser(Flow(), V()), x, noise_for(x)).bits.shape == (0,)


def test_images_have_their_shape_and_progress_is_told() -> None:
    mixture = GaussianMixture(torch.zeros(2, 1, 2, 3), torch.tensor([0.3, 0.5]))
    x = quantised(drawn(mixture, 4))
    for kind in (ProbabilityFlow(rtol=1e-3), VariationalBound(steps=5)):
        told: list[float] = []
        result = kind(mixture.denoiser(Cosine(), V()), x, noise_for(x), watch=told.append)
        assert result.bits.shape == (4,)
        assert told == sorted(told) or isinstance(kind, ProbabilityFlow)
        assert min(told) >= 0 and max(told) == pytest.approx(1)


# ---- the bound --------------------------------------------------------------------------------------------------

BOUNDS: list[tuple[str, Callable[[], NoiseSchedule], float, float]] = [
    # Gap in bits/dim at 128 steps, about twice what is seen; edm on images keeps what sigma_min below a bin costs.
    ("linear", Linear, 0.4, 0.4),
    ("cosine", Cosine, 0.3, 0.3),
    ("edm", EDM, 1.0, 1.2),
    ("flow", Flow, 0.3, 0.3),
]


@pytest.mark.parametrize("last", ["gaussian", "discrete"])
@pytest.mark.parametrize(("schedule", "density", "images"), [row[1:] for row in BOUNDS], ids=[r[0] for r in BOUNDS])
def test_the_bound_is_above_and_falls_as_steps_grow(
    mixture: GaussianMixture, schedule: Callable[[], NoiseSchedule], density: float, images: float, last: Any
) -> None:
    x = drawn(mixture, 1500)
    x = quantised(x) if last == "discrete" else x
    exact = image_bits(mixture, x) if last == "discrete" else density_bits(mixture, x)
    denoise = mixture.denoiser(schedule(), V())
    gaps = [
        VariationalBound(steps=steps, variance="forward", last=last, decoder_variance="first_step")(
            denoise, x, noise_for(x)
        ).bits
        - exact
        for steps in (8, 32, 128)
    ]
    for looser, tighter in pairwise(gaps):
        assert float((looser - tighter).mean()) > 3 * standard_error(looser - tighter)
    # Above the entropy of the data by more than chance, and close to it in the end.
    assert float(gaps[-1].mean()) > 2 * standard_error(gaps[-1]) > 0
    assert float(gaps[-1].mean()) < (images if last == "discrete" else density)


@pytest.mark.parametrize("variance", ["posterior", "forward", "learned", "auto"])
@pytest.mark.parametrize("decoder", ["second_step", "first_step"])
def test_every_variance_bounds(mixture: GaussianMixture, variance: Any, decoder: Any) -> None:
    q = quantised(drawn(mixture, 1000))
    parameterization = LearnedVariance(V()) if variance in ("learned", "auto") else V()
    denoise = mixture.denoiser(Linear(), parameterization, variance_fraction=0.5)
    bound = VariationalBound(steps=50, variance=variance, decoder_variance=decoder)(denoise, q, noise_for(q))
    gap = bound.bits - image_bits(mixture, q)
    assert float(gap.mean()) > 3 * standard_error(gap)
    if variance == "auto":
        learned = VariationalBound(steps=50, variance="learned", decoder_variance=decoder)(denoise, q, noise_for(q))
        assert torch.equal(bound.bits, learned.bits)


@pytest.mark.parametrize("schedule", [Cosine(), EDM()], ids=["cosine", "edm"])
@pytest.mark.parametrize("terms", [None, 7])
def test_the_parts_sum_to_the_whole(mixture: GaussianMixture, schedule: NoiseSchedule, terms: int | None) -> None:
    q = quantised(drawn(mixture, 20))
    bound = VariationalBound(steps=30, terms=terms)(mixture.denoiser(schedule, V()), q, noise_for(q))
    count = terms or 30
    assert bound.terms.shape == bound.steps.shape == (20, count) and bound.nfe == count
    summed = sum(bound.weight[:, k] * bound.terms[:, k] for k in range(count))
    torch.testing.assert_close(bound.bits, bound.prior + summed + bound.reconstruction)
    assert bool((bound.steps.diff(dim=1) >= 0).all()) and bound.steps.min() >= 1 and bound.steps.max() <= 30
    assert bool((bound.reconstruction == 0).all()) == (float(schedule.sigma(0.0)) == 0)


def test_each_step_is_its_own_kl() -> None:
    """On one Gaussian the expected KL of every step is in closed form: half of on_x0^2/variance times the MMSE."""
    spread, steps = 0.3, 10
    gaussian = GaussianMixture(torch.zeros(1, 4).double(), torch.tensor([spread]).double())
    x, schedule = drawn(gaussian, 4000), Cosine()
    bound = VariationalBound(steps=steps, last="gaussian", variance="posterior")(
        gaussian.denoiser(schedule, V()), x, noise_for(x)
    )
    for step in range(2, steps + 1):
        level, kernel = schedule.level(step / steps), schedule.transition(step / steps, (step - 1) / steps)
        alpha, sigma = float(level.alpha), float(level.sigma)
        mmse = spread**2 * sigma**2 / (alpha**2 * spread**2 + sigma**2)
        expected = 0.5 * float(kernel.on_x0**2 / kernel.variance) * mmse / math.log(2)
        found = bound.terms[:, step - 1]
        assert float(found.mean()) == pytest.approx(expected, abs=4 * standard_error(found)), step


def test_a_subset_of_the_steps_is_unbiased(mixture: GaussianMixture) -> None:
    q = quantised(drawn(mixture, 4000))
    denoise = mixture.denoiser(Cosine(), V())
    whole, part = (
        VariationalBound(steps=25, terms=terms, variance="forward")(denoise, q, noise_for(q)) for terms in (None, 4)
    )
    difference = part.bits - whole.bits
    assert abs(float(difference.mean())) < 4 * standard_error(difference)
    assert standard_error(difference) < 0.25 * float(whole.bits.mean().abs())
    assert part.nfe == 4 and set(part.steps.flatten().tolist()) == set(range(1, 26))


def test_levels_of_tensors_give_what_levels_of_floats_give(
    mixture: GaussianMixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were every step as likely, as many terms as steps would be a stratum each, and the sum the whole bound."""
    monkeypatch.setattr(VariationalBound, "_chances", lambda self, like: torch.full((12,), 1 / 12).double())
    q = quantised(drawn(mixture, 20))
    denoise = mixture.denoiser(Cosine(), LearnedVariance(V()), variance_fraction=0.3)
    one, other = (VariationalBound(steps=12, terms=terms)(denoise, q, noise_for(q)) for terms in (None, 12))
    assert isinstance(one, Bound) and torch.equal(one.steps, other.steps)
    torch.testing.assert_close(one.terms, other.terms, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(one.bits, other.bits, rtol=1e-6, atol=1e-6)


# ---- refused ----------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[Callable[[], object], str]] = [
    (lambda: ProbabilityFlow(trace="sum"), "likelihood.trace=sum is unknown: choose hutchinson or exact"),  # type: ignore[arg-type]
    (lambda: ProbabilityFlow(probe="sign"), "likelihood.probe=sign"),  # type: ignore[arg-type]
    (lambda: ProbabilityFlow(dequantize="yes"), "likelihood.dequantize=yes"),  # type: ignore[arg-type]
    (lambda: ProbabilityFlow(probes=0), "likelihood.probes=0"),
    (lambda: ProbabilityFlow(max_steps=0), "likelihood.max_steps=0"),
    (lambda: ProbabilityFlow(rtol=0.0), "likelihood.rtol=0.0"),
    (lambda: ProbabilityFlow(atol=-1.0), "likelihood.atol=-1.0"),
    (lambda: ProbabilityFlow(t_min=1.0), "likelihood.t_min=1.0"),
    (lambda: ProbabilityFlow(log_snr_min=-math.inf), "likelihood.log_snr_min=-inf"),
    (lambda: ProbabilityFlow(sigma_data=0.0), "likelihood.sigma_data=0.0"),
    (lambda: VariationalBound(steps=0), "likelihood.steps=0"),
    (lambda: VariationalBound(steps=10, terms=11), "likelihood.terms=11"),
    (lambda: VariationalBound(terms=0), "likelihood.terms=0"),
    (lambda: VariationalBound(variance="large"), "posterior, forward or learned"),  # type: ignore[arg-type]
    (lambda: VariationalBound(last="bins"), "likelihood.last=bins"),  # type: ignore[arg-type]
    (lambda: VariationalBound(decoder_variance="own"), "likelihood.decoder_variance=own"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "words"), OPTIONS, ids=[row[1] for row in OPTIONS])
def test_options_out_of_range_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        make()


CALLS: list[tuple[Any, NoiseSchedule, Parameterization, float, str]] = [
    (ProbabilityFlow(), Cosine(), V(), 3.0, "likelihood.dequantize=uniform is for 8-bit data"),
    (VariationalBound(steps=2), Cosine(), V(), 3.0, "likelihood.last=discrete is for 8-bit data"),
    (VariationalBound(steps=2, variance="learned"), Cosine(), V(), 0.5, "variance=learned needs a network"),
    (ProbabilityFlow(t_min=0.0), Cosine(), V(), 0.5, "choose likelihood.t_min=1e-5"),
    (ProbabilityFlow(log_snr_min=20.0), Cosine(), V(), 0.5, "likelihood.log_snr_min=20.0 leaves no stretch"),
    (ProbabilityFlow(), Flow(), Epsilon(), 0.5, "eps does not determine x0 where alpha = 0"),
    (VariationalBound(terms=2), Flow(), Epsilon(), 0.5, "eps does not determine x0 where alpha = 0"),
    (ProbabilityFlow(max_steps=1), Cosine(), V(), 0.5, "within likelihood.max_steps=1 attempts"),
    (ProbabilityFlow(rtol=1e-9), Cosine(), V(), 0.5, "likelihood.rtol=1e-09 is finer than torch.float32 resolves"),
]


@pytest.mark.parametrize(("kind", "schedule", "parameterization", "size", "words"), CALLS, ids=[r[4] for r in CALLS])
def test_calls_without_meaning_are_refused(
    mixture: GaussianMixture,
    kind: Any,
    schedule: NoiseSchedule,
    parameterization: Parameterization,
    size: float,
    words: str,
) -> None:
    x = torch.full((2, 2), size)
    # The parameterization alone: the ideal denoiser of eps on flow would itself divide by alpha = 0.
    denoise = Denoiser(_Silent(), schedule, parameterization)
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        kind(denoise, x, noise_for(x))


class _Silent(torch.nn.Module):
    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        return torch.tanh(3 * x)


def test_many_dimensions_have_no_exact_trace() -> None:
    x = torch.zeros(1, 1025)
    with pytest.raises(ValueError, match=r"1,025 dimensions .* likelihood\.trace=hutchinson"):
        ProbabilityFlow(trace="exact")(Denoiser(_Silent(), Cosine(), V()), x, noise_for(x))


def test_a_renoising_guidance_has_no_flow(mixture: GaussianMixture) -> None:
    labelled = GaussianMixture(mixture.means, mixture.stds, labels=torch.arange(3))
    x = drawn(mixture, 2)
    conditional = labelled.denoiser(Cosine(), V()).bind({"label": torch.tensor([0, 1])})
    guided = CFGPlusPlus(scale=0.5)(conditional, {"label": torch.tensor([3, 3])})
    with pytest.raises(ValueError, match="guidance=cfgpp follows no probability flow"):
        ProbabilityFlow(**PLAIN)(guided, x, noise_for(x))
    moved = AdaptiveProjected(momentum=-0.5)(conditional, {"label": torch.tensor([3, 3])})
    with pytest.raises(ValueError, match=r"guidance\.momentum follows no probability flow"):
        ProbabilityFlow(**PLAIN)(moved, x, noise_for(x))
