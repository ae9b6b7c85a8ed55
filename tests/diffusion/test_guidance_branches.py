"""How guidances are carried out: what is evaluated, how often and in which batch; clipping, gradients, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ornstein.diffusion.denoiser import Denoise, Denoiser, Rescheduled
from ornstein.diffusion.guidance import (
    AdaptiveProjected,
    Autoguidance,
    CFGPlusPlus,
    Classifier,
    ClassifierFree,
    Colour,
    Compose,
    Energy,
    Interval,
    NoGuidance,
    leaves,
    replaced,
)
from ornstein.diffusion.noise import NoiseSource
from ornstein.diffusion.parameterizations import Epsilon, LearnedVariance, Sample, V
from ornstein.diffusion.samplers import DDIM, Euler
from ornstein.diffusion.schedules import EDM, Cosine, Flow, Linear

NULL = 10
LABEL, NULLS = {"label": torch.tensor([1, 5, 9])}, {"label": torch.full((3,), NULL)}
SHAPE = (3, 4, 4)


class Labelled(nn.Module):
    """Output depends on x, noise and label; counts its calls and the rows they had."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.shift = shift

    def forward(self, x: Tensor, noise_cond: Tensor, label: Tensor | None = None) -> Tensor:
        self.rows.append(x.shape[0])
        moved = self.shift + noise_cond.to(x.dtype) / 2000 + (0 if label is None else label.to(x.dtype) / 10)
        return torch.tanh(x + moved.reshape(-1, 1, 1, 1))


class Votes(nn.Module):
    """A classifier whose logits are means of the image's parts."""

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        return x.flatten(1)[:, :NULL] * (1 + noise_cond.to(x.dtype).reshape(-1, 1))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def squares(x0: Tensor) -> Tensor:
    return (x0**2).sum((1, 2, 3))


def weak(shift: float = 0.3) -> Denoiser:
    return Denoiser(Labelled(shift), Linear(), V())


# Guidance of a labelled network (`None` stands for the network itself), rows of each call on it, and their number.
BATCHES: list[tuple[str, Callable[[Denoiser], Any], list[int]]] = [
    ("cfg", lambda base: ClassifierFree(3.0), [6]),
    ("cfg twice", lambda base: Compose([ClassifierFree(3.0), ClassifierFree(2.0)]), [6]),
    ("cfg and apg", lambda base: Compose({"a": ClassifierFree(3.0), "b": AdaptiveProjected()}), [6]),
    ("cfg, negative", lambda base: ClassifierFree(3.0, negative=4), [6]),
    ("cfg and cfg of a class", lambda base: Compose([ClassifierFree(3.0), ClassifierFree(2.0, negative=4)]), [9]),
    ("negative null", lambda base: Compose([ClassifierFree(3.0), ClassifierFree(2.0, negative=NULL)]), [6]),
    ("cfgpp", lambda base: CFGPlusPlus(), [6]),
    ("off", lambda base: Compose([ClassifierFree(1.0), NoGuidance()]), [3]),
    ("itself as the weak one", lambda base: Autoguidance(2.0, denoiser=base, condition="null"), [6]),
    ("itself", lambda base: Autoguidance(2.0, denoiser=base), [3]),
    ("energy", lambda base: Energy(squares), [3]),
    ("energy and cfg", lambda base: Compose([ClassifierFree(3.0), Energy(squares, gradient="exact")]), [6]),
]


@pytest.mark.parametrize(("build", "rows"), [row[1:] for row in BATCHES], ids=[row[0] for row in BATCHES])
def test_one_batch_and_every_condition_once(x: Tensor, build: Callable[[Denoiser], Any], rows: list[int]) -> None:
    base = Denoiser(Labelled(), Linear(), V(), LABEL)
    guided = build(base)(base, NULLS)
    assert guided.cost == sum(rows) // 3  # before any call: the most
    guided(x, 0.4)
    assert base.network.rows == rows
    assert guided.cost == sum(rows) // 3
    base.network.rows.clear()
    state = DDIM(steps=4).sample(guided, NoiseSource(0).bind(torch.arange(3), SHAPE))
    assert sum(base.network.rows) == 3 * state.nfe


def test_a_second_network_has_a_batch_of_its_own(x: Tensor) -> None:
    base, other = Denoiser(Labelled(), Linear(), V(), LABEL), weak()
    parts = [
        ClassifierFree(3.0),
        Autoguidance(2.0, denoiser=other),
        Autoguidance(1.5, denoiser=other, condition="null"),
    ]
    guided = Compose(parts)(base, NULLS)
    p = guided(x, 0.4)
    assert (base.network.rows, other.network.rows, guided.cost) == ([6], [6], 4)
    c, n = base(x, 0.4).x0, base.bind(NULLS)(x, 0.4).x0
    wc, wn = (other.bind(cond)(x, 0.4).x0 for cond in (LABEL, NULLS))
    torch.testing.assert_close(p.x0, c + 2 * (c - n) + (c - wc) + 0.5 * (c - wn))


def test_a_schedule_loaded_twice_is_one_schedule(x: Tensor) -> None:
    base = Denoiser(Labelled(), Cosine(), V(), LABEL)
    for schedule, same in ((Cosine(), True), (Linear(), False), (EDM(), False)):
        guided = Autoguidance(denoiser=Denoiser(Labelled(0.2), schedule, V()))(base, NULLS)
        (_, (call, _)) = next(iter([guided._plan(None).calls]))
        assert isinstance(call, Rescheduled) is not same


def test_only_what_the_interval_needs_is_evaluated_and_counted(x: Tensor) -> None:
    base = Denoiser(Labelled(), Linear(), V(), LABEL)
    guided = Interval(3.0, sigma_min=0.3, sigma_max=2.0)(base, NULLS)
    for sampler in (DDIM(steps=20), Euler(steps=20)):
        base.network.rows.clear()
        state = sampler.sample(guided, NoiseSource(0).bind(torch.arange(3), SHAPE))
        assert set(base.network.rows) == {3, 6}
        assert sum(base.network.rows) == 3 * state.nfe


def test_an_interval_of_several_guidances(x: Tensor) -> None:
    base = Denoiser(Labelled(), Linear(), V(), LABEL)
    inner = Compose([ClassifierFree(3.0), Classifier(Votes()), Energy(squares)])
    guided = Interval(part=inner, sigma_min=0.3, sigma_max=2.0)(base, NULLS)
    assert torch.equal(guided(x, 0.3).x0, inner(base, NULLS)(x, 0.3).x0)
    assert guided.cost == 3
    assert torch.equal(guided(x, 0.9).x0, base(x, 0.9).x0)
    assert guided.cost == 1
    outer = Compose([guided.part, ClassifierFree(1.5)])(base, NULLS)
    torch.testing.assert_close(outer(x, 0.9).x0, ClassifierFree(1.5)(base, NULLS)(x, 0.9).x0)
    assert [type(leaf).__name__ for leaf in leaves(guided.part)] == ["ClassifierFree", "Classifier", "Energy"]
    stronger = replaced(guided.part, lambda leaf: replace(leaf, scale=9.0))
    assert [leaf.scale for leaf in leaves(stronger)] == [9.0, 9.0, 9.0]


def test_cfgpp_in_an_interval_renoises_as_usual_outside(x: Tensor) -> None:
    base = Denoiser(Labelled(), Linear(), V(), LABEL)
    guided = Interval(part=CFGPlusPlus(), sigma_min=0.3, sigma_max=2.0)(base, NULLS)
    assert guided.renoises
    uncond = base.bind(NULLS)
    torch.testing.assert_close(guided(x, 0.3).renoise_eps, uncond(x, 0.3).eps)
    torch.testing.assert_close(guided(x, 0.9).renoise_eps, base(x, 0.9).eps)
    times = torch.tensor([0.3, 0.9, 0.3], dtype=torch.float64)
    p = guided(x, times).renoise_eps
    for i, (which, t) in enumerate(((uncond, 0.3), (base, 0.9), (uncond, 0.3))):
        torch.testing.assert_close(p[i], which(x, t).eps[i], rtol=1e-6, atol=1e-6)
    energetic = Compose([CFGPlusPlus(), Energy(squares)])(base, NULLS)
    torch.testing.assert_close(energetic(x, 0.3).renoise_eps, uncond(x, 0.3).eps)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_is_that_of_the_networks_output(x: Tensor, rescale: float) -> None:
    """Lin et al. 2023, eqs. 14 to 16, on v as they have it."""
    base = Denoiser(Labelled(), Linear(), V(), LABEL)
    level = Linear().level(0.4)
    outputs = [each.output(x, level) for each in (base, base.bind(NULLS))]
    v = outputs[1] + 5 * (outputs[0] - outputs[1])
    ratio = outputs[0].std((1, 2, 3), keepdim=True) / v.std((1, 2, 3), keepdim=True)
    v = rescale * v * ratio + (1 - rescale) * v
    p = ClassifierFree(5.0, rescale=rescale)(base, NULLS)(x, level)
    torch.testing.assert_close(p.x0, level.alpha * x - level.sigma * v)
    if rescale == 0.0:
        cond, uncond = (each.predict(x, level) for each in (base, base.bind(NULLS)))
        assert torch.equal(p.x0, cond.mix(uncond, 5.0).x0)  # to the bit what it was before there was a rescale


def test_rescale_in_x0_does_not_ask_what_the_network_gives(x: Tensor) -> None:
    class Ideal(Denoiser):
        def output(self, x_t, level):  # type: ignore[no-untyped-def]
            x0 = super().output(x_t, level)
            return self.parameterization.target(x0, (x_t - level.alpha * x0) / level.sigma, level)

    guided = ClassifierFree(5.0, rescale=0.7, rescale_in="x0")
    first, second = (guided(Ideal(Labelled(), Linear(), p, LABEL), NULLS)(x, 0.4).x0 for p in (V(), Sample()))
    torch.testing.assert_close(first, second)
    cond = Ideal(Labelled(), Linear(), Sample(), LABEL)(x, 0.4).x0
    plain = ClassifierFree(5.0)(Ideal(Labelled(), Linear(), Sample(), LABEL), NULLS)(x, 0.4).x0
    factor = 0.7 * cond.std((1, 2, 3), keepdim=True) / plain.std((1, 2, 3), keepdim=True) + 0.3
    torch.testing.assert_close(first, plain * factor)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rescale_in", ["output", "x0"])
@pytest.mark.parametrize("size", [0, 3])
def test_rescale_leaves_samples_without_spread(rescale_in: str, size: int) -> None:
    """One element has no standard deviation, and neither has an empty batch: no nan, and nothing said about it."""
    label = LABEL["label"][:size]
    base, null = Denoiser(Labelled(), Linear(), V(), {"label": label}), {"label": NULLS["label"][:size]}
    x = torch.linspace(-1, 1, 3, dtype=torch.float64).reshape(3, 1, 1, 1)[:size]
    rescaled = ClassifierFree(5.0, rescale=0.7, rescale_in=rescale_in)(base, null)(x, 0.4)
    torch.testing.assert_close(rescaled.x0, ClassifierFree(5.0)(base, null)(x, 0.4).x0)


EVERY = {
    "cfg": ClassifierFree(5.0),
    "rescaled": ClassifierFree(5.0, rescale=0.7),
    "cfgpp": CFGPlusPlus(),
    "apg": AdaptiveProjected(5.0),
    "interval": Interval(5.0, sigma_min=0.3, sigma_max=5.0),
    "autoguidance": Autoguidance(5.0, denoiser=Denoiser(Labelled(0.3), Cosine(), Epsilon())),
    "classifier": Classifier(Votes(), scale=3.0),
    "cheap": Energy(squares, scale=-0.3),
    "exact": Energy(squares, scale=-0.3, gradient="exact"),
    "compose": Compose([ClassifierFree(5.0), Energy(squares, scale=-0.3, gradient="exact")]),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_guidance_clips_its_result_once(x: Tensor, name: str) -> None:
    loose = Denoiser(Labelled(), Linear(), Sample(), LABEL)
    guided, clipped = (EVERY[name](replace(loose, clip_x0=bound), NULLS) for bound in (None, 1.0))
    raw = guided(x, 0.4)
    assert bool((raw.x0.abs() > 1).any()) or name == "cfgpp"  # an interpolation
    torch.testing.assert_close(clipped(x, 0.4).x0, raw.x0.clamp(-1, 1))
    assert torch.equal(clipped.start().predict(x, 0.4).x0, raw.x0)
    level = Linear().level(0.4)
    torch.testing.assert_close(level.alpha * raw.x0 + level.sigma * raw.eps, x)


@pytest.mark.parametrize("name", EVERY)
def test_every_guidance_takes_times_levels_and_any_batch(x: Tensor, name: str) -> None:
    base = Denoiser(Labelled(), Linear(), V(), LABEL)
    times = torch.tensor([0.25, 0.4, 0.6], dtype=torch.float64)
    together = EVERY[name](base, NULLS)(x, times)
    assert torch.equal(EVERY[name](base, NULLS)(x, Linear().level(times, 4)).x0, together.x0)
    for i in range(3):
        # One sample alone is guided as it is in a batch: nothing is averaged over samples.
        own = EVERY[name](base.bind({"label": LABEL["label"][i : i + 1]}), {"label": NULLS["label"][:1]})
        torch.testing.assert_close(own(x[i : i + 1], float(times[i])).x0[0], together.x0[i], rtol=1e-5, atol=1e-5)
        alone = own.start()(x[i : i + 1], times[i : i + 1])
        torch.testing.assert_close(alone.x0[0], together.x0[i], rtol=1e-9, atol=1e-9)
    nobody = {"label": torch.zeros(0, dtype=torch.int64)}
    assert EVERY[name](base.bind(nobody), nobody)(x[:0], 0.4).x0.shape == (0, *SHAPE)


@pytest.mark.parametrize("name", EVERY)
def test_every_guidance_samples_without_leaving_a_graph(name: str) -> None:
    """Gradients that a guidance takes are its own: sampling runs without, and in inference mode."""
    base = Denoiser(Labelled(), Linear(), V(), LABEL)
    noise = NoiseSource(0).bind(torch.arange(3), SHAPE)
    guided = EVERY[name](base, NULLS)
    image = DDIM(steps=5).sample(guided, noise).x
    assert not image.requires_grad and bool(image.isfinite().all())
    with torch.inference_mode():
        assert torch.equal(DDIM(steps=5).sample(guided, noise).x, image)  # and nothing of the first run is left
    assert all(not kept.requires_grad for kept in guided.memory.values())


@pytest.mark.parametrize("name", EVERY)
def test_gradients_flow_through_every_guidance(x: Tensor, name: str) -> None:
    """For whoever differentiates through a sampler: against finite differences."""
    guided = EVERY[name](Denoiser(Labelled(), Linear(), V(), LABEL), NULLS)
    point = x.clone().requires_grad_()
    guided.start()(point, 0.4).x0.sum().backward()
    step = 1e-6 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        change = guided.start()(x + step, 0.4).x0.sum() - guided.start()(x - step, 0.4).x0.sum()
    # The networks see float32 noise levels, the sums have 144 terms.
    torch.testing.assert_close((2 * step * point.grad).sum(), change, rtol=1e-4, atol=1e-10)


def test_a_learned_variance_stays_the_conditional_branchs(x: Tensor) -> None:
    class Twice(Labelled):
        def forward(self, x: Tensor, noise_cond: Tensor, label: Tensor | None = None) -> Tensor:
            mean = super().forward(x, noise_cond, label)
            return torch.cat([mean, 0.5 * mean], dim=1)

    base = Denoiser(Twice(), Linear(), LearnedVariance(Epsilon()), LABEL)
    own = base(x, 0.4).variance_fraction
    for name in EVERY:
        assert torch.equal(EVERY[name](base, NULLS)(x, 0.4).variance_fraction, own), name


def test_guidance_of_any_denoiser(x: Tensor) -> None:
    """What needs no condition of its own guides what is guided already, and what has another schedule."""
    base = Denoiser(Labelled(), Linear(), V(), LABEL)
    once = ClassifierFree(3.0)(base, NULLS)
    energy = Energy(squares, scale=0.2)
    torch.testing.assert_close(
        energy(once, {})(x, 0.4).x0, Compose([ClassifierFree(3.0), energy])(base, NULLS)(x, 0.4).x0
    )
    moved: Denoise = Rescheduled(base, Flow())
    for part in (energy, replace(energy, gradient="exact"), Classifier(Votes(), target=2)):
        assert bool(part(moved, {})(x, 0.4).x0.isfinite().all())
    momentum = AdaptiveProjected(3.0)(base, NULLS)
    twice = Energy(squares)(momentum, {})
    twice(x, 0.5)
    assert momentum.memory and not twice.start().denoiser.memory


def test_a_decoder_stands_before_the_loss(x: Tensor) -> None:
    base = Denoiser(Labelled(), Linear(), Sample(), LABEL)
    energy = Energy(squares, scale=0.2)
    doubled = replace(energy, decode=lambda z: 2 * z)
    one, other = (each(base, NULLS)(x, 0.4).x0 - base(x, 0.4).x0 for each in (energy, doubled))
    torch.testing.assert_close(other, 4 * one)


def test_colour_moves_the_mean_whatever_the_size() -> None:
    target = torch.tensor([0.1, 0.9, 0.5]) * 2 - 1
    for size in (4, 16):
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size)).requires_grad_()
        (slope,) = torch.autograd.grad(Colour()(images).sum(), images)
        wanted = images.detach().mean((2, 3)) - target
        torch.testing.assert_close(slope, wanted[:, :, None, None].expand_as(slope), rtol=1e-4, atol=1e-5)
    noise = NoiseSource(0).bind(torch.arange(8), (3, 8, 8))
    base = Denoiser(nn.Identity(), Cosine(), Sample())
    base.network.forward = lambda x, noise_cond: 0.5 * torch.tanh(x)  # type: ignore[method-assign]
    plain, green = (DDIM(steps=20).sample(each, noise).x for each in (base, Energy(Colour(), scale=5.0)(base, {})))
    before, after = ((image.mean((0, 2, 3)) - target).abs().max() for image in (plain, green))
    assert float(after) < 0.65 * float(before)


def test_networks_beside_the_guided_one_follow_it_to_its_device(x: Tensor) -> None:
    class Weighted(Labelled):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    main, second = Weighted().to("meta"), Weighted()
    Autoguidance(denoiser=Denoiser(second, Linear(), V()))(Denoiser(main, Linear(), V(), LABEL), NULLS)
    assert second.weight.device.type == "meta"


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: ClassifierFree(rescale=1.5), "guidance.rescale=1.5"),
    (lambda: ClassifierFree(rescale_in="eps"), "guidance.rescale_in='eps' is unknown: choose output or x0"),
    (lambda: ClassifierFree(negative=-1), "guidance.negative=-1"),
    (lambda: CFGPlusPlus(scale=2.0), "guidance.scale=2.0 of cfgpp"),
    (lambda: AdaptiveProjected(eta=-1.0), "guidance.eta=-1.0"),
    (lambda: AdaptiveProjected(norm_threshold=0.0), "guidance.norm_threshold=0.0"),
    (lambda: AdaptiveProjected(momentum=1.0), "guidance.momentum=1.0"),
    (lambda: Interval(sigma_min=2.0, sigma_max=1.0), "no level between"),
    (lambda: Interval(log_snr_min=-2.0), "one bound in two units"),
    (lambda: Interval(log_snr_max=2.0), "one bound in two units"),
    (lambda: Interval(part=3), "guidance.part=3 is no guidance"),
    (lambda: Compose([ClassifierFree(), "cfg"]), "guidance.parts holds 'cfg'"),
    (lambda: Autoguidance(condition="any"), "guidance.condition='any'"),
    (lambda: Classifier(Votes(), conditioning="eps"), "guidance.conditioning='eps'"),
    (lambda: Classifier(Votes(), target=-2), "guidance.target=-2"),
    (lambda: Energy(squares, gradient="none"), "guidance.gradient='none'"),
    (lambda: Energy(squares, sigma_data=0.0), "guidance.sigma_data=0.0"),
    (lambda: AdaptiveProjected(eta=math.nan), "guidance.eta=nan must be a finite number"),
    (lambda: AdaptiveProjected(norm_threshold=math.inf), "guidance.norm_threshold=inf must be a finite number"),
    (lambda: Energy(squares, sigma_data=math.inf), "guidance.sigma_data=inf must be a finite number"),
    (lambda: ClassifierFree(rescale="half"), "guidance.rescale='half' must be a finite number"),
    (lambda: Colour([0.1, 0.9]), "guidance.loss.target"),
    (lambda: Colour([0.1, 0.9, 7]), "guidance.loss.target"),
]


@pytest.mark.parametrize(("build", "told"), REFUSED, ids=[row[1] for row in REFUSED])
def test_bad_numbers_are_refused(build: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("[", r"\[")):
        build()


UNCONDITIONAL = Denoiser(Labelled(), Linear(), V())
REFUSED_WHEN_CALLED: list[tuple[Any, Denoiser, dict[str, Tensor], str]] = [
    (ClassifierFree(), UNCONDITIONAL, {}, "guidance=cfg needs a conditional model"),
    (CFGPlusPlus(), UNCONDITIONAL, {}, "guidance=cfgpp needs a conditional model"),
    (AdaptiveProjected(), UNCONDITIONAL, {}, "guidance=apg needs a conditional model"),
    (Interval(), UNCONDITIONAL, {}, "guidance=cfg needs a conditional model"),
    (ClassifierFree(), UNCONDITIONAL.bind(LABEL), {}, "needs the null form"),
    (ClassifierFree(negative=2), UNCONDITIONAL.bind({"text": torch.zeros(3, 1)}), {}, "guidance.negative=2"),
    (Autoguidance(), UNCONDITIONAL, {}, "add guidance.run="),
    (Autoguidance(condition="null", denoiser=UNCONDITIONAL), UNCONDITIONAL.bind(LABEL), {}, "guidance.condition=null"),
    (Classifier(Votes()), UNCONDITIONAL, {}, "add guidance.target=CLASS"),
    (Energy(), UNCONDITIONAL, {}, "guidance=energy needs a loss"),
    (Energy(lambda x0: x0.mean()), UNCONDITIONAL, {}, "one number a sample"),
]


@pytest.mark.parametrize(
    ("guidance", "base", "null", "told"), REFUSED_WHEN_CALLED, ids=[row[3] for row in REFUSED_WHEN_CALLED]
)
def test_what_cannot_guide_this_model_is_refused(x, guidance, base, null, told) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=told):
        guidance(base, null)(x, 0.4)


def test_colour_refuses_grey_images() -> None:
    with pytest.raises(ValueError, match="guidance=colour needs RGB images"):
        Colour()(torch.zeros(2, 1, 4, 4))
