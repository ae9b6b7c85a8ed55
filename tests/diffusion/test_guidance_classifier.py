"""``guidance=classifier`` with the package's own classifier: where its gradient is worth following, and that it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ornstein.data import Digits
from ornstein.diffusion.analytic import GaussianMixture
from ornstein.diffusion.denoiser import Denoiser
from ornstein.diffusion.guidance import Classifier, Compose, Energy, Interval, NoGuidance, Part
from ornstein.diffusion.noise import NoiseSource
from ornstein.diffusion.parameterizations import Sample, V
from ornstein.diffusion.samplers import DDIM
from ornstein.diffusion.schedules import EDM, Cosine, Level, Linear
from ornstein.networks import NoisyClassifier
from ornstein.networks.noisy_classifier import load_classifier
from ornstein.training.train_classifier import arrays, noisy

RANGE = NoisyClassifier.log_ratio_range


class Votes(nn.Module):
    """Logits that are an image's elements: a gradient everywhere. Counts its calls."""

    log_ratio_range = (-1.0, 2.0)

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        self.calls += 1
        return x.flatten(1)


class Scans(Denoiser):
    """The ideal unconditional denoiser of a set of images, each with a little noise."""

    def output(self, x_t: Tensor, level: Level) -> Tensor:
        assert isinstance(self.network, GaussianMixture)
        x0 = self.network.posterior_mean(x_t.flatten(1), level).reshape(x_t.shape)
        return self.parameterization.target(x0, (x_t - level.alpha * x0) / level.sigma, level)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    x, y = arrays(Digits(split="train"))
    return x[:600], y[:600]


@pytest.fixture(scope="module")
def bundled() -> nn.Module:
    return load_classifier(NoisyClassifier(1, 10), "bundled")


def at(log_ratio: float) -> float:
    """The time of Cosine at ln(sigma/alpha)."""
    return float(Cosine().time(torch.tensor(-2 * log_ratio, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("log_ratio", "inside"), [(-1.1, False), (-0.9, True), (0.0, True), (1.9, True), (2.1, False), (9.0, False)]
)
def test_outside_the_networks_range_its_gradient_counts_nothing(log_ratio: float, inside: bool) -> None:
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = Votes()
    base, part = Denoiser(nn.Tanh(), Cosine(), Sample()), Classifier(network, target=1)
    base.network.forward = lambda x, noise_cond: torch.tanh(x)  # type: ignore[method-assign]
    everywhere = Classifier(Votes(), target=1)
    everywhere.network.log_ratio_range = (-math.inf, math.inf)
    for guidance in (part, Compose([part]), Interval(part=part, sigma_min=None, sigma_max=None)):
        guided, network.calls = guidance(base, {}), 0
        assert guided.cost == 2  # the most
        wanted = (everywhere if inside else Compose([]))(base, {})(x, at(log_ratio)).x0
        assert torch.equal(guided(x, at(log_ratio)).x0, wanted)
        assert (guided.cost, network.calls) == ((2, 1) if inside else (1, 0))
        # A level for each sample: all are evaluated, each is guided as it would be alone.
        times = torch.tensor([at(0.5), at(log_ratio), at(9.5)], dtype=torch.float64)
        each = guided(x, times).x0
        torch.testing.assert_close(each[1], wanted[1], rtol=1e-6, atol=1e-6)
        assert torch.equal(each[2], base(x, times).x0[2]) and not torch.equal(each[0], base(x, times).x0[0])


@pytest.mark.parametrize("schedule", [Cosine(), EDM(), Linear()], ids=["cosine", "edm", "linear"])
def test_at_the_noisy_end_of_its_range_it_points_at_the_class(schedule, digits, bundled) -> None:  # type: ignore[no-untyped-def]
    """E[x0 | y] - E[x0] is the exact change of x0 where x_t tells nothing. Off by several times beyond the range."""
    x, y = digits
    log_ratio = torch.full((len(x),), RANGE[1] - 0.01)
    x_t = noisy(x, log_ratio, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    level = schedule.level(float(schedule.time(-2 * log_ratio[:1].double())))
    x_t = x_t * (level.alpha**2 + level.sigma**2) ** 0.5
    base = Scans(GaussianMixture(x.flatten(1), torch.full((len(x),), 0.1)), schedule, Sample(), {"label": y})
    change = (Classifier(bundled)(base, {})(x_t, level).x0 - base(x_t, level).x0).detach()
    for k in range(10):
        wanted = (x[y == k].mean(0) - x.mean(0)).flatten()
        share = float(change[y == k].mean(0).flatten() @ wanted / (wanted @ wanted))
        # A small network, trained for a minute: 0.5 to 1.2 of the way; at ln(sigma/alpha) = 6 it is ten times the way.
        assert 0.4 < share < 1.4, (k, share)


@pytest.mark.parametrize("steps", [20, 100])
@pytest.mark.parametrize(("scale", "least"), [(1.0, 0.45), (3.0, 0.85)])  # a small network: 0.6 and 0.92 measured
def test_the_default_sampler_makes_the_class_that_was_asked_for(  # type: ignore[no-untyped-def]
    scale: float, least: float, steps: int, digits, bundled
) -> None:
    """Cosine goes to ln(sigma/alpha) = 10, where sigma**2/alpha is 2e4: any gradient there whites images out."""
    x, y = digits
    base = Scans(GaussianMixture(x.flatten(1), torch.full((len(x),), 0.1)), Cosine(), V())
    noise = NoiseSource(0).bind(torch.arange(100), (1, 8, 8))

    def share(part: Part) -> float:
        image = DDIM(steps=steps).sample(part(base, {}), noise).x
        nearest = torch.cdist(image.flatten(1), x.flatten(1)).min(1)
        # Scans lie 5 to 10 apart and 0.1 of noise in 64 elements is 0.8; without the range these are 2.8 to 27.
        assert float(nearest.values.max()) < 2.0
        return float((y[nearest.indices] == 3).float().mean())

    guided = Classifier(bundled, scale=scale, target=3)
    assert share(NoGuidance()) < 0.2
    assert share(guided) > least
    assert share(Compose([guided, Energy(lambda x0: 0 * x0.flatten(1).sum(1))])) > least
