"""Classifier-free guidance: its formula, its cost, its one batch, and where clipping comes in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion.denoiser import Denoiser, Rescheduled
from ornstein.diffusion.guidance import (
    AdaptiveProjected,
    Autoguidance,
    CFGPlusPlus,
    Classifier,
    ClassifierFree,
    Energy,
    Interval,
    NoGuidance,
)
from ornstein.diffusion.noise import NoiseSource
from ornstein.diffusion.parameterizations import Parameterization, Sample, V
from ornstein.diffusion.samplers import DDIM, DPMpp2M, Heun
from ornstein.diffusion.schedules import Cosine, Linear, NoiseSchedule

NULL = 10


class Labelled(nn.Module):
    """Output depends on x, noise and label; counts its calls and the rows they had."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor, noise_cond: Tensor, label: Tensor) -> Tensor:
        self.rows.append(x.shape[0])
        shift = (label.to(x.dtype) / 10 + noise_cond.to(x.dtype) / 2000).reshape(-1, 1, 1, 1)
        return torch.tanh(x + shift)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


LABEL, NULLS = {"label": torch.tensor([1, 5, 9])}, {"label": torch.full((3,), NULL)}


@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5, -1.0])
@pytest.mark.parametrize("per_sample", [False, True], ids=["one-time", "times"])
def test_formula_in_one_batch(
    cell: tuple[NoiseSchedule, Parameterization], x: Tensor, scale: float, per_sample: bool
) -> None:
    schedule, parameterization = cell
    network = Labelled()
    denoiser = Denoiser(network, schedule, parameterization)
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64) if per_sample else 0.4
    cond, uncond = denoiser.bind(LABEL)(x, t), denoiser.bind(NULLS)(x, t)
    network.rows.clear()
    guided = ClassifierFree(scale=scale)(denoiser.bind(LABEL), NULLS)
    p = guided(x, t)
    assert network.rows == [6]
    assert guided.cost == 2
    # Linear in the prediction, so the formula holds in x0, in eps and in every output space alike.
    torch.testing.assert_close(p.x0, uncond.x0 + scale * (cond.x0 - uncond.x0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(p.eps, uncond.eps + scale * (cond.eps - uncond.eps), rtol=1e-5, atol=1e-6)
    level = schedule.level(t, 4)
    torch.testing.assert_close(level.alpha * p.x0 + level.sigma * p.eps, x, rtol=1e-9, atol=1e-9)


def test_a_level_per_sample_is_accepted(x: Tensor) -> None:
    guided = ClassifierFree(scale=3.0)(Denoiser(Labelled(), Cosine(), V(), LABEL), NULLS)
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    torch.testing.assert_close(guided(x, guided.schedule.level(t, 4)).x0, guided(x, t).x0)
    one = torch.tensor([0.5], dtype=torch.float64)
    torch.testing.assert_close(guided(x, one).x0, guided(x, 0.5).x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("scale", "stands_for"), [(1.0, LABEL), (0.0, NULLS)])
def test_scales_1_and_0_cost_one_evaluation(x: Tensor, scale: float, stands_for: dict[str, Tensor]) -> None:
    network = Labelled()
    denoiser = Denoiser(network, Linear(), V(), LABEL)
    guided = ClassifierFree(scale=scale)(denoiser, NULLS)
    assert guided.cost == 1
    assert torch.equal(guided(x, 0.4).x0, denoiser.bind(stands_for)(x, 0.4).x0)
    assert network.rows == [3, 3]


def test_needs_null_unless_off() -> None:
    assert [ClassifierFree(scale=s).needs_null for s in (0.0, 1.0, 2.0)] == [True, False, True]
    assert not NoGuidance().needs_null
    denoiser = Denoiser(Labelled(), Linear(), V(), LABEL)
    assert NoGuidance()(denoiser, NULLS) is denoiser


@pytest.mark.parametrize(("scale", "shown"), [(math.nan, "nan"), (-math.inf, "-inf"), ("x", "'x'"), (None, "null")])
@pytest.mark.parametrize(
    "build",
    [
        ClassifierFree,
        CFGPlusPlus,
        AdaptiveProjected,
        Interval,
        Autoguidance,
        lambda **scale: Classifier(Labelled(), **scale),
        Energy,
    ],
)
def test_a_scale_is_a_finite_number(build: Callable[..., Any], scale: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=f"guidance.scale={shown} must be a finite number"):
        build(scale=scale)


def test_unconditional_models_are_refused() -> None:
    with pytest.raises(ValueError, match="guidance=cfg needs a conditional model: use guidance=none"):
        ClassifierFree(scale=2.0)(Denoiser(Labelled(), Linear(), V()), {})


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [(DDIM(steps=5), 5), (Heun(steps=5), 9), (DPMpp2M(steps=5), 5)],
    ids=["ddim", "heun", "dpmpp_2m"],
)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_nfe_counts_both_branches(sampler, evaluations: int, scale: float) -> None:
    network = Labelled()
    guided = ClassifierFree(scale=scale)(Denoiser(network, Linear(), V(), LABEL), NULLS)
    state = sampler.sample(guided, NoiseSource(0).bind(torch.arange(3), (2, 4, 4)))
    assert state.nfe == evaluations * guided.cost
    assert sum(network.rows) == state.nfe * 3  # nfe is per sample


def test_clipping_acts_on_the_guided_x0(x: Tensor) -> None:
    # Thresholding exists because guidance overshoots (Saharia et al. 2022): clipping each branch would not stop it.
    class Constant(nn.Module):
        def forward(self, x: Tensor, noise_cond: Tensor, label: Tensor) -> Tensor:
            return torch.where(label == NULL, -0.9, 0.9).to(x).reshape(-1, 1, 1, 1).expand_as(x)

    for options, bound in (({"clip_x0": 1.0}, 1.0), ({"dynamic_threshold": 0.99}, 1.0), ({}, 8.1)):
        denoiser = Denoiser(Constant(), Linear(), Sample(), LABEL, **options)
        p = ClassifierFree(scale=5.0)(denoiser, NULLS)(x, 0.4)
        assert float(p.x0.abs().max()) == pytest.approx(bound)
        level = Linear().level(0.4)
        torch.testing.assert_close(level.alpha * p.x0 + level.sigma * p.eps, x)


def test_guidance_works_under_another_schedule(x: Tensor) -> None:
    guided = ClassifierFree(scale=2.0)(Denoiser(Labelled(), Linear(), V(), LABEL), NULLS)
    moved = Rescheduled(guided, Cosine())
    assert moved.cost == 2
    times = torch.tensor([0.3, 0.5, 0.6], dtype=torch.float64)
    for i, t in enumerate(times.tolist()):
        torch.testing.assert_close(moved(x, times).x0[i], moved(x, t).x0[i], rtol=1e-5, atol=1e-6)


def test_empty_batch() -> None:
    empty = {"label": torch.zeros(0, dtype=torch.int64)}
    guided = ClassifierFree(scale=2.0)(Denoiser(Labelled(), Linear(), V(), empty), empty)
    state = DDIM(steps=3).sample(guided, NoiseSource(0).bind(torch.arange(0), (2, 4, 4)))
    assert state.x.shape == (0, 2, 4, 4)
