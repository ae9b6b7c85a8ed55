"""Weightings against their published formulae, in every space that a paper gives them in."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ornstein.diffusion.densities import LogNormalSigma, ModeTime, UniformTime
from ornstein.diffusion.objectives import Objective
from ornstein.diffusion.parameterizations import EDMPreconditioned, Epsilon, Sample, Score, V, Velocity
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Level, Linear
from ornstein.diffusion.weightings import (
    ELBO,
    P2,
    SNR,
    EDMLambda,
    EDMMonotonic,
    MinSNR,
    Sigmoid,
    Simple,
    TruncatedSNR,
    Weighting,
    snr,
)

F64 = torch.float64
T = torch.linspace(0.02, 0.98, 13, dtype=F64)
Formula = Callable[[Tensor], Tensor]

# (weighting, parameterization, weight on its output's squared error by SNR, on a variance-preserving schedule).
PUBLISHED: list[tuple[Weighting, type, Formula]] = [
    (MinSNR(), Epsilon, lambda s: s.clamp(max=5) / s),
    (MinSNR(), Sample, lambda s: s.clamp(max=5)),
    (MinSNR(), V, lambda s: s.clamp(max=5) / (s + 1)),
    (MinSNR(gamma=1.0), Sample, lambda s: s.clamp(max=1)),
    (P2(), Epsilon, lambda s: 1 / (1 + s)),
    (P2(k=2.0, gamma=0.5), Epsilon, lambda s: (2 + s) ** -0.5),
    (P2(gamma=0.0), V, lambda s: s / (s + 1)),
    (TruncatedSNR(), Sample, lambda s: s.clamp(min=1)),
    (TruncatedSNR(), Epsilon, lambda s: s.clamp(min=1) / s),
    (TruncatedSNR(), V, lambda s: s.clamp(min=1) / (s + 1)),
    (SNR(), Sample, lambda s: s),
    (SNR(), Epsilon, torch.ones_like),
    (SNR(), Score, lambda s: 1 / (1 + s)),  # sigma^2, Song & Ermon's lambda
    (EDMLambda(sigma_data=1.0), V, torch.ones_like),
    (EDMLambda(sigma_data=0.5), EDMPreconditioned, torch.ones_like),
    (Simple(), V, torch.ones_like),
    (Simple(), Score, torch.ones_like),
]


@pytest.mark.parametrize("on", [Linear, Cosine])
@pytest.mark.parametrize(("weighting", "kind", "formula"), PUBLISHED)
def test_published_weights(weighting: Weighting, kind, formula: Formula, on) -> None:
    level = on().level(T)
    ratio = torch.as_tensor(snr(level))
    ours = torch.as_tensor(weighting.on_output(level, kind()), dtype=F64).expand_as(ratio)
    torch.testing.assert_close(ours, formula(ratio), rtol=1e-9, atol=0)
    # Levels as numbers give the same.
    for i in (0, 6, 12):
        single = weighting.on_output(Level(*(float(v[i]) for v in level)), kind())
        assert float(single) == pytest.approx(float(ours[i]), rel=1e-9)


@pytest.mark.parametrize("on", [Linear, Cosine, Flow, EDM])
@pytest.mark.parametrize("kind", [Epsilon, Sample, V, Velocity, EDMPreconditioned, Score])
def test_simple_on_x0_is_the_gain_squared(kind, on) -> None:
    level = on().level(T)
    gain = torch.as_tensor(kind().gain(level))
    torch.testing.assert_close(torch.as_tensor(Simple().on_x0(level, kind())), gain**2)


def test_edms_lambda_is_table_1() -> None:
    level = EDM().level(T)
    sigma = torch.as_tensor(level.sigma)
    published = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    torch.testing.assert_close(torch.as_tensor(EDMLambda(sigma_data=0.5).on_x0(level, Sample())), published)


@pytest.mark.parametrize("on", [Linear, Cosine, Flow, EDM])
def test_elbo_is_half_the_fall_of_snr(on) -> None:
    # Kingma et al. 2021, eq. 17, by central differences at points off the beta tables' kinks (multiples of 1/1000).
    schedule, h = on(), 1e-6
    t = T + 0.0003
    fall = (torch.as_tensor(snr(schedule.level(t - h))) - torch.as_tensor(snr(schedule.level(t + h)))) / (2 * h)
    ours = torch.as_tensor(ELBO().on_x0(schedule.level(t), V(), 0.7))
    torch.testing.assert_close(ours, 0.5 * fall / 0.7, rtol=1e-6, atol=0)


EDM_PEAK = EDMMonotonic()


def edm_tilde(log_snr: Tensor) -> Tensor:
    normal = torch.exp(-0.5 * ((log_snr - 2.4) / 2.4) ** 2) / (2.4 * math.sqrt(2 * math.pi))
    return normal * (torch.exp(-log_snr) + 0.25) / 0.25


PER_LOG_SNR = [
    (ELBO(), lambda x: torch.full_like(x, 0.5)),
    (Sigmoid(), lambda x: 1 / (1 + torch.exp(x - 2))),
    (Sigmoid(bias=-1.0), lambda x: 1 / (1 + torch.exp(x + 1))),
    (EDM_PEAK, lambda x: edm_tilde(x.clamp(min=EDM_PEAK.peak))),
]


@pytest.mark.parametrize("time", [UniformTime(t_min=0.0), LogNormalSigma(), ModeTime()])
@pytest.mark.parametrize("on", [Linear, Cosine, Flow, EDM])
@pytest.mark.parametrize("kind", [Epsilon, V, EDMPreconditioned])
@pytest.mark.parametrize(("weighting", "formula"), PER_LOG_SNR)
def test_weights_per_log_snr_do_not_see_schedule_density_or_parameterization(
    weighting: Weighting, formula: Formula, kind, on, time
) -> None:
    log_snr = torch.linspace(-4, 4, 9, dtype=F64)
    ours = Objective(kind(), time, weighting=weighting).effective_weight(on(), log_snr)
    # 1e-6: log-SNR -> time -> level on a beta table, then differences of it.
    torch.testing.assert_close(ours, formula(log_snr) * log_snr.exp(), rtol=1e-6, atol=0)


def test_edm_monotonic_is_edms_effective_weight_down_to_its_maximum() -> None:
    log_snr = torch.linspace(EDM_PEAK.peak + 0.01, 10, 50, dtype=F64)
    edm = Objective(EDMPreconditioned(sigma_data=0.5), LogNormalSigma()).effective_weight(EDM(), log_snr)
    monotonic = Objective(V(), weighting=EDM_PEAK).effective_weight(EDM(), log_snr)
    torch.testing.assert_close(monotonic, edm, rtol=1e-6, atol=0)
    weight = EDM_PEAK.on_eps(torch.linspace(-15, 15, 3001, dtype=F64))
    # Never rises with log-SNR; the maximum sits within a grid cell, whose height is off by its square.
    assert float(weight.diff().max()) <= 1e-9
    finest = edm_tilde(torch.linspace(-15, 15, 300_001, dtype=F64)).max()
    torch.testing.assert_close(weight.max(), finest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", [Sigmoid(), ELBO(), EDM_PEAK], ids=["sigmoid", "elbo", "edm_monotonic"])
def test_weights_per_log_snr_are_finite_at_zero_snr(weighting: Weighting) -> None:
    level = Flow().level(torch.ones(1, dtype=F64))
    assert torch.as_tensor(weighting.on_output(level, V())).isfinite().all()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MinSNR(gamma=0.0), r"weighting\.gamma=0\.0 must be positive"),
        (lambda: P2(k=0.0), "k > 0 and gamma >= 0"),
        (lambda: P2(gamma=-1.0), "k > 0 and gamma >= 0"),
        (lambda: TruncatedSNR(least=0.0), r"weighting\.least=0\.0 must be positive"),
        (lambda: EDMLambda(sigma_data=0.0), r"weighting\.sigma_data=0\.0 must be positive"),
        (lambda: EDMMonotonic(p_std=0.0), "must both be positive"),
    ],
)
def test_bad_input_is_one_sentence(make, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
