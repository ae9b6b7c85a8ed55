"""Parameterizations, predictions and the denoiser that holds them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.parameterizations import (
    EDMPreconditioned,
    Epsilon,
    LearnedVariance,
    Parameterization,
    Sample,
    Score,
    V,
    Velocity,
    convert,
)
from ornstein.diffusion.prediction import Prediction
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Level, Linear, NoiseSchedule

F64 = torch.float64
INSIDE = (0.0015, 0.25, 0.7, 0.999)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 5, dtype=F64, generator=generator), torch.randn(4, 3, 5, dtype=F64, generator=generator)


def round_trip(parameterization: Parameterization, level: Level, x0: Tensor, eps: Tensor) -> Prediction:
    x_t = level.alpha * x0 + level.sigma * eps
    return parameterization.predict(parameterization.target(x0, eps, level), x_t, level)


@pytest.mark.parametrize("t", INSIDE)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_output_and_x0_eps_convert_both_ways(
    schedule: NoiseSchedule, parameterization: Parameterization, pair: tuple[Tensor, Tensor], t: float, tensor: bool
) -> None:
    x0, eps = pair
    level = schedule.level(torch.full((4,), t, dtype=F64), 3) if tensor else schedule.level(t)
    p = round_trip(parameterization, level, x0, eps)
    # float64, where x0 from eps loses a factor sigma/alpha (1e4 at cosine's end) and eps from x0 one of alpha/sigma.
    torch.testing.assert_close(p.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(p.eps, eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(level.alpha * p.x0 + level.sigma * p.eps, p.x_t, rtol=1e-12, atol=1e-10)


# (parameterization, schedule, t) -> what it still gives at the end: "both", "x0" (sigma = 0), "eps" (alpha = 0).
# Left out: flow velocity at t = 0 of beta schedules, where sigma ~ sqrt(t) has infinite speed.
ENDS = [
    (Epsilon, Linear, 0.0, "both"),
    (Epsilon, Linear, 1.0, "both"),
    (Epsilon, Flow, 0.0, "both"),
    (Epsilon, Flow, 1.0, "eps"),
    (Epsilon, EDM, 0.0, "both"),
    (Epsilon, EDM, 1.0, "both"),
    (Score, Linear, 1.0, "both"),
    (Score, Flow, 1.0, "eps"),
    (Score, EDM, 0.0, "both"),
    (Sample, Linear, 0.0, "x0"),
    (Sample, Cosine, 1.0, "both"),
    (Sample, Flow, 0.0, "x0"),
    (Sample, Flow, 1.0, "both"),
    (Sample, EDM, 1.0, "both"),
    (V, Linear, 0.0, "both"),
    (V, Cosine, 1.0, "both"),
    (V, Flow, 0.0, "both"),
    (V, Flow, 1.0, "both"),
    (V, EDM, 1.0, "both"),
    (Velocity, Linear, 1.0, "both"),
    (Velocity, Cosine, 1.0, "both"),
    (Velocity, Flow, 0.0, "both"),
    (Velocity, Flow, 1.0, "both"),
    (Velocity, EDM, 0.0, "both"),
    (Velocity, EDM, 1.0, "both"),
    (EDMPreconditioned, Linear, 0.0, "x0"),
    (EDMPreconditioned, Cosine, 1.0, "both"),
    (EDMPreconditioned, Flow, 0.0, "x0"),
    (EDMPreconditioned, Flow, 1.0, "both"),
    (EDMPreconditioned, EDM, 0.0, "both"),
    (EDMPreconditioned, EDM, 1.0, "both"),
]


@pytest.mark.parametrize(("kind", "on", "t", "gives"), ENDS)
def test_ends(kind, on, t: float, gives: str, pair: tuple[Tensor, Tensor]) -> None:
    x0, eps = pair
    p = round_trip(kind(), on().level(t), x0, eps)
    if gives == "eps":
        with pytest.raises(ValueError, match="alpha = 0: choose objective="):
            _ = p.x0
    else:
        torch.testing.assert_close(p.x0, x0, rtol=1e-8, atol=1e-8)
    if gives == "x0":
        with pytest.raises(ValueError, match="sigma = 0"):
            _ = p.eps
    else:
        torch.testing.assert_close(p.eps, eps, rtol=1e-8, atol=1e-8)


def test_needs_signal_marks_who_fails_at_alpha_0(
    parameterization: Parameterization, pair: tuple[Tensor, Tensor]
) -> None:
    p = round_trip(parameterization, Flow().level(1.0), *pair)
    if parameterization.needs_signal:
        with pytest.raises(ValueError, match="alpha = 0"):
            _ = p.x0
    else:
        assert p.x0.isfinite().all()


@pytest.mark.parametrize("t", INSIDE)
def test_gain_is_the_slope_of_the_output(schedule: NoiseSchedule, parameterization: Parameterization, t: float) -> None:
    level = schedule.level(t)
    x_t = torch.tensor([0.7], dtype=F64)
    x0 = torch.tensor([0.2], dtype=F64, requires_grad=True)
    output = parameterization.target(x0, (x_t - level.alpha * x0) / level.sigma, level)
    (slope,) = torch.autograd.grad(output.sum(), x0)
    assert float(slope.abs()) == pytest.approx(float(parameterization.gain(level)), rel=1e-9)
    batch = parameterization.gain(schedule.level(torch.tensor([t, t], dtype=F64)))
    torch.testing.assert_close(batch, slope.abs().expand(2), rtol=1e-9, atol=0)


@pytest.mark.parametrize("sigma", [0.002, 0.3, 2.0, 80.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_table_1_of_the_paper(sigma: float, sigma_data: float, pair: tuple[Tensor, Tensor]) -> None:
    level = Level(0.5, 1.0, sigma, 0.0, 1.0)
    parameterization = EDMPreconditioned(sigma_data=sigma_data)
    x, output = pair
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / math.sqrt(sigma**2 + sigma_data**2)
    c_in = 1 / math.sqrt(sigma**2 + sigma_data**2)
    torch.testing.assert_close(parameterization.predict(output, x, level).x0, c_skip * x + c_out * output)
    torch.testing.assert_close(parameterization.scale_input(x, level), c_in * x)
    assert parameterization.noise_cond(level) == pytest.approx(math.log(sigma) / 4)
    # The paper's weight lambda = 1/c_out^2 on ||x0 - D||^2 is a plain squared error in F.
    assert parameterization.gain(level) == pytest.approx(1 / c_out)


@pytest.mark.parametrize("t", [0.001, 0.3, 1.0])
def test_edms_f_is_minus_v_on_variance_preserving_schedules(t: float, pair: tuple[Tensor, Tensor]) -> None:
    level = Cosine().level(t)
    f = EDMPreconditioned(sigma_data=1.0)
    torch.testing.assert_close(f.target(*pair, level), -V().target(*pair, level), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(f.scale_input(pair[0], level), pair[0], rtol=1e-12, atol=0)


def test_velocity(pair: tuple[Tensor, Tensor]) -> None:
    x0, eps = pair
    torch.testing.assert_close(Velocity().target(x0, eps, Flow().level(0.3)), eps - x0)
    # Off flow it is the time derivative of the path.
    h, schedule = 1e-6, Cosine()
    speed = (schedule.perturb(x0, eps, 0.3005 + h) - schedule.perturb(x0, eps, 0.3005 - h)) / (2 * h)
    torch.testing.assert_close(Velocity().target(x0, eps, schedule.level(0.3005)), speed, rtol=1e-6, atol=1e-6)


def test_numbers_and_tensors_agree(cell: tuple[NoiseSchedule, Parameterization], pair: tuple[Tensor, Tensor]) -> None:
    schedule, parameterization = cell
    times = [0.0, 0.2, 0.9, 1.0]
    level = schedule.level(torch.tensor(times, dtype=F64), 3)
    scaled, cond = parameterization.scale_input(pair[0], level), torch.as_tensor(parameterization.noise_cond(level))
    for i, t in enumerate(times):
        single = schedule.level(t)
        torch.testing.assert_close(scaled[i], parameterization.scale_input(pair[0], single)[i], rtol=1e-5, atol=0)
        assert float(cond.flatten()[i]) == pytest.approx(float(parameterization.noise_cond(single)), abs=1e-9)
    assert cond.isfinite().all()  # also where ln(sigma/alpha) is not


def test_network_input_has_at_most_unit_scale(cell: tuple[NoiseSchedule, Parameterization]) -> None:
    schedule, parameterization = cell
    for t in (0.001, 0.5, 1.0):
        level = schedule.level(t)
        sigma_data = getattr(parameterization, "sigma_data", 1.0)
        std = math.sqrt((level.alpha * sigma_data) ** 2 + level.sigma**2)
        scaled = float(parameterization.scale_input(torch.tensor([std], dtype=F64), level))
        assert scaled <= 1 + 1e-6
        if parameterization.name == "edm":
            assert scaled == pytest.approx(1.0)


class Halved(V):
    """Has a scale of its own."""

    def scale_input(self, x_t: Tensor, level: Level) -> Tensor:
        return 0.5 * x_t


class Seen(nn.Module):
    """Keeps what it is given to see."""

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        self.x = x
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("on", "parameterization", "untouched"),
    [
        (Cosine, V(), True),
        (Linear, LearnedVariance(Epsilon()), True),
        (EDM, V(), False),
        (Cosine, Halved(), False),
        (Cosine, EDMPreconditioned(), False),
        (Cosine, LearnedVariance(EDMPreconditioned()), False),
    ],
)
def test_network_sees_x_t_untouched_where_its_scale_is_1(
    on, parameterization: Parameterization, untouched: bool
) -> None:
    network, x_t = Seen(), 3 * torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(network, on(), parameterization)
    for t in (0.7, torch.linspace(0.01, 1, 64)):  # among many levels in float32 some squares sum to 1 + 1e-7
        level = denoiser.schedule.level(t, 4)
        denoiser.output(x_t, level)
        assert torch.equal(network.x, x_t) is untouched
        torch.testing.assert_close(network.x, parameterization.scale_input(x_t, level), rtol=1e-6, atol=0)


EVERY = {"eps": Epsilon, "x0": Sample, "v": V, "score": Score, "flow": Velocity, "edm": EDMPreconditioned}


@pytest.mark.parametrize("on", [Linear, Cosine, Flow, EDM])
@pytest.mark.parametrize("to", EVERY)
@pytest.mark.parametrize("source", EVERY)
def test_conversions_between_all(source: str, to: str, on, pair: tuple[Tensor, Tensor]) -> None:
    x0, eps = pair
    one, other = EVERY[source](), EVERY[to]()
    for t in INSIDE:
        for level in (on().level(t), on().level(torch.full((4,), t, dtype=F64), 3)):
            x_t = level.alpha * x0 + level.sigma * eps
            expected = other.target(x0, eps, level)
            ours = convert(one.target(x0, eps, level), x_t, level, source=one, to=other)
            # float64 less the factor between alpha and sigma, up to 1e4 (cosine's end) once each way.
            torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-8 * float(expected.abs().max()))
            back = convert(ours, x_t, level, source=other, to=one)
            original = one.target(x0, eps, level)
            torch.testing.assert_close(back, original, rtol=1e-7, atol=1e-7 * float(original.abs().max()))


def test_score_is_the_gradient_of_the_log_density() -> None:
    # Of N(0, 1/4) data, whose noisy density is N(0, alpha^2/4 + sigma^2): the ideal x0 gives its score.
    for schedule in (Linear(), EDM()):
        level = schedule.level(0.4)
        x_t, size = torch.tensor([[0.7]], dtype=F64), level.alpha**2 / 4 + level.sigma**2
        x0 = level.alpha / 4 / size * x_t
        score = Score().target(x0, (x_t - level.alpha * x0) / level.sigma, level)
        torch.testing.assert_close(score, -x_t / size, rtol=1e-9, atol=0)


def test_score_of_noiseless_data_says_nothing_of_eps(pair: tuple[Tensor, Tensor]) -> None:
    p = Score().predict(pair[1], pair[0], Linear().level(0.0))
    torch.testing.assert_close(p.x0, pair[0])
    with pytest.raises(ValueError, match="sigma = 0"):
        _ = p.eps


@pytest.mark.parametrize("mean", EVERY)
def test_learned_variance_is_its_mean_and_a_fraction(mean: str, pair: tuple[Tensor, Tensor]) -> None:
    x0, eps = pair
    inner, level = EVERY[mean](), Cosine().level(0.3)
    learned = LearnedVariance(inner)
    x_t = level.alpha * x0 + level.sigma * eps
    target = learned.target(x0, eps, level)
    assert torch.equal(target, inner.target(x0, eps, level))
    v = torch.linspace(-1, 1, x0.numel(), dtype=F64).reshape(x0.shape)
    output = torch.cat([target, v], dim=1)
    p, plain = learned.predict(output, x_t, level), inner.predict(target, x_t, level)
    assert torch.equal(p.x0, plain.x0) and torch.equal(p.eps, plain.eps)
    torch.testing.assert_close(p.variance_fraction, (v + 1) / 2)
    assert plain.variance_fraction is None
    assert learned.gain(level) == inner.gain(level)
    assert learned.noise_cond(level) == inner.noise_cond(level)
    assert torch.equal(learned.scale_input(x_t, level), inner.scale_input(x_t, level))
    assert (learned.outputs, inner.outputs, learned.needs_signal) == (2, 1, inner.needs_signal)
    # Conversions take the variance along, or leave it.
    other = convert(output, x_t, level, source=learned, to=LearnedVariance(V()))
    torch.testing.assert_close(other, torch.cat([V().target(x0, eps, level), v], dim=1), rtol=1e-9, atol=1e-9)
    dropped = convert(output, x_t, level, source=learned, to=Epsilon())
    torch.testing.assert_close(dropped, eps, rtol=1e-9, atol=1e-9)


def test_learned_variance_refuses(pair: tuple[Tensor, Tensor]) -> None:
    level = Cosine().level(0.3)
    with pytest.raises(ValueError, match="outputs=1: a learned variance takes 2"):
        LearnedVariance(V(), outputs=1)
    with pytest.raises(ValueError, match="has a learned variance already"):
        LearnedVariance(LearnedVariance(V()))
    with pytest.raises(ValueError, match="needs a network of 6 output channels, this one has 3"):
        LearnedVariance(V()).predict(pair[0], pair[1], level)
    with pytest.raises(ValueError, match="says nothing of a variance"):
        convert(pair[0], pair[1], level, source=V(), to=LearnedVariance(V()))


def test_prediction_needs_something() -> None:
    with pytest.raises(ValueError, match="needs x0 or eps"):
        Prediction(torch.zeros(1), Flow().level(0.5))


def test_edm_refuses_bad_sigma_data() -> None:
    with pytest.raises(ValueError, match=r"sigma_data=0\.0 must be positive"):
        EDMPreconditioned(sigma_data=0.0)


class Recorder(nn.Module):
    """Returns ``0.5 * x`` in a chosen dtype and remembers what it was called with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype, self.calls = dtype, []

    def forward(self, x: Tensor, noise_cond: Tensor, **cond: Tensor) -> Tensor:
        self.calls.append((x, noise_cond, cond))
        return (0.5 * x).to(self.dtype)


def test_denoiser_calls_the_network_by_its_contract() -> None:
    network, label = Recorder(), torch.tensor([3, 1])
    denoiser = Denoiser(network, Linear(), Epsilon()).bind({"label": label})
    x = torch.randn(2, 1, 4, 4)
    for t, expected in ((0.25, [250.0, 250.0]), (torch.tensor([0.1, 0.7]), [100.0, 700.0])):
        prediction = denoiser(x, t)
        seen, noise_cond, cond = network.calls[-1]
        assert torch.equal(seen, x)
        torch.testing.assert_close(noise_cond, torch.tensor(expected))
        assert noise_cond.dtype == torch.float32
        assert cond["label"] is label
        torch.testing.assert_close(prediction.eps, 0.5 * x)


def test_half_precision_output_does_not_lower_the_coefficients() -> None:
    denoiser = Denoiser(Recorder(torch.bfloat16), Cosine(), V())
    x = torch.randn(2, 1, 4, 4)
    level = denoiser.schedule.level(0.3)
    p = denoiser(x, 0.3)
    assert p.x0.dtype == p.eps.dtype == torch.float32
    output = (0.5 * x).bfloat16().float()
    torch.testing.assert_close(p.x0, level.alpha * x - level.sigma * output)
    assert denoiser(x, torch.tensor([0.3, 0.3])).x0.dtype == torch.float32


def test_clipping_moves_eps_along() -> None:
    x = torch.tensor([[3.0, -3.0, 0.1, 0.0]])
    p = Denoiser(Recorder(), Cosine(), Sample(), clip_x0=1.0)(x, 0.4)
    level = Cosine().level(0.4)
    torch.testing.assert_close(p.x0, torch.tensor([[1.0, -1.0, 0.05, 0.0]]))
    torch.testing.assert_close(level.alpha * p.x0 + level.sigma * p.eps, x)


def test_dynamic_threshold_is_imagens() -> None:
    from diffusers import DDPMScheduler

    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 2, 8]).reshape(
        3, 1, 1, 1
    )
    ours = Denoiser(Recorder(), Cosine(), Sample(), dynamic_threshold=0.9)(x, 0.4).x0
    theirs = DDPMScheduler(dynamic_thresholding_ratio=0.9, sample_max_value=1e9)._threshold_sample(0.5 * x)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours[0], 0.5 * x[0])  # nothing exceeds 1 by its quantile: left alone


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"clip_x0": 0.0}, "clip_x0=0.0 must be positive"),
        ({"dynamic_threshold": 1.5}, r"dynamic_threshold=1.5 must lie in \(0, 1\]"),
        ({"dynamic_threshold": 0.0}, "dynamic_threshold=0.0 must lie"),
    ],
)
def test_denoiser_refuses(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Denoiser(Recorder(), Linear(), Epsilon(), **options)
