"""The figures beside other libraries' on the same features, closed forms and the papers' definitions by brute force.

The promise is 1e-3 relative; what is asserted is what float32 (theirs) against float64 (ours) leaves, far below it.
KID near 0 has no relative accuracy: its absolute tolerance is 1e-6 of the kernel's own size.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from ornstein.metrics.features import FeatureBatch
from ornstein.metrics.figures import frechet, inception_score, kernel, manifold
from ornstein.metrics.statistics import Accumulator

WIDTH, CLASSES, SPATIAL = 24, 7, 5


@pytest.fixture
def space(make_pixels):
    """Never asked for features: they are given."""
    features = make_pixels(num_features=WIDTH, num_logits=CLASSES)
    features.num_spatial = SPATIAL
    return features


@pytest.fixture
def drawn():
    """Correlated features of generated and real images, about as large as Inception's."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    fake = torch.randn(700, WIDTH, generator=generator) @ mix + 0.2
    real = torch.randn(900, WIDTH, generator=generator) @ (0.9 * mix)
    return fake.abs(), real.abs()


def _statistics(space, features, **options):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(len(features), CLASSES, generator=generator) + features[:, :CLASSES]
    accumulator = Accumulator(space, spatial=True, **options)
    for start in range(0, len(features), 128):
        rows = slice(start, start + 128)
        accumulator.add(FeatureBatch(features[rows], logits[rows], features[rows, :SPATIAL]))
    return accumulator.statistics(), logits


def test_fid_kid_and_score_meet_torch_fidelity(space, drawn):
    fid_module = pytest.importorskip("torch_fidelity.metric_fid")
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    (fake, logits), (real, _) = (_statistics(space, each) for each in drawn)
    theirs = fid_module.fid_statistics_to_metric(
        *(fid_module.fid_features_to_statistics(each) for each in drawn), verbose=False
    )
    found = frechet.fid(fake, real)["fid"]
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    score = inception_score.inception_score(fake)["inception_score"]
    assert score == pytest.approx(isc_features_to_metric(logits, splits=1)["inception_score_mean"], rel=1e-5)
    # All images in one subset, as many on each side: no random part.
    options = {
        "kid_subsets": 1, "kid_subset_size": 700, "kid_kernel": "poly", "kid_kernel_poly_degree": 3,
        "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 0, "verbose": False,
    }  # fmt: skip
    expected = kid_features_to_metric(drawn[0], drawn[1][:700], **options)["kernel_inception_distance_mean"]
    same = _statistics(space, drawn[1][:700])[0]
    assert kernel.kid(fake, same, all_pairs=True)["kid"] == pytest.approx(expected, rel=1e-4)
    assert kernel.kid(fake, same, subsets=2, subset_size=700)["kid"] == pytest.approx(expected, rel=1e-4)
    # Between halves of one distribution KID is near 0: 1e-6 beside kernels of about 10.
    halves = [_statistics(space, half)[0] for half in drawn[0].split(350)]
    options["kid_subset_size"] = 350
    near = kid_features_to_metric(*drawn[0].split(350), **options)["kernel_inception_distance_mean"]
    assert kernel.kid(*halves, all_pairs=True)["kid"] == pytest.approx(near, abs=1e-5)


def test_precision_and_recall_meet_torch_fidelity(space, drawn):
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    fake, real = (_statistics(space, each)[0] for each in drawn)
    for k in (1, 3):
        theirs = prc.prc_features_to_metric(
            *drawn, prc_neighborhood=k, prc_batch_size=10_000, save_cpu_ram=False, verbose=False
        )
        found = manifold.precision_recall(fake, real, k=k).means()
        assert 0.05 < found["precision"] < 1 and 0.05 < found["recall"] < 1
        # Both are shares of images: equal but for one on the very edge of a ball.
        assert found["precision"] == pytest.approx(theirs["precision"], abs=1 / 700 + 1e-9)
        assert found["recall"] == pytest.approx(theirs["recall"], abs=1 / 900 + 1e-9)


def test_fid_kid_and_score_meet_torchmetrics(space, drawn):
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    class Given(torch.nn.Module):
        num_features = WIDTH

        def forward(self, features):
            return features

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fid = FrechetInceptionDistance(feature=Given())
        kid = KernelInceptionDistance(feature=Given(), subsets=10, subset_size=200)
        score = InceptionScore(feature=Given(), splits=1)
        (fake, logits), (real, _) = (_statistics(space, each) for each in drawn)
        for metric in (fid, kid):
            metric.update(drawn[0], real=False)
            metric.update(drawn[1], real=True)
        score.update(logits)
        torch.manual_seed(3)
        expected, mean = kid.compute(), float(score.compute()[0])
    assert frechet.fid(fake, real)["fid"] == pytest.approx(float(fid.compute()), rel=1e-4)
    found = kernel.kid(fake, real, subsets=10, subset_size=200, seed=3)
    assert found["kid"] == pytest.approx(float(expected[0]), rel=1e-4)
    assert found["kid_std"] == pytest.approx(float(expected[1]), rel=1e-3)
    assert inception_score.inception_score(fake)["inception_score"] == pytest.approx(mean, rel=1e-5)


def test_fid_of_a_gaussian_pair_is_the_closed_form(space):
    generator = torch.Generator().manual_seed(2)
    scales = torch.rand(WIDTH, generator=generator) + 0.5
    shift = torch.full((WIDTH,), 0.3)
    first = torch.randn(20_000, WIDTH, generator=generator)
    fake, real = (_statistics(space, each)[0] for each in (first * scales + shift, first[:10_000].flip(1)))
    exact = float((shift**2).sum() + ((scales - 1) ** 2).sum())
    # 20,000 draws: the error of FID is its bias, about D / n, and sqrt(FID * 4 / n) at one standard deviation.
    assert frechet.fid(fake, real)["fid"] == pytest.approx(exact, abs=WIDTH / 10_000 * 3 + 4 * math.sqrt(exact / 5_000))


def test_sfid_is_the_distance_of_the_spatial_features(space, drawn):
    import scipy.linalg

    fake, real = (_statistics(space, each)[0] for each in drawn)
    first, second = (each[:, :SPATIAL].double().numpy() for each in drawn)
    covs = [np.cov(each, rowvar=False) for each in (first, second)]
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(
        covs[0] + covs[1] - 2 * scipy.linalg.sqrtm(covs[0] @ covs[1]).real
    )
    assert frechet.sfid(fake, real)["sfid"] == pytest.approx(expected, rel=1e-8)
    without = Accumulator(space)
    without.add(FeatureBatch(drawn[0], None, None))
    assert frechet.sfid(without.statistics(), real) == {}


@pytest.mark.parametrize("k", [2, 5])
def test_density_and_coverage_are_the_papers_definition(space, drawn, k):
    """Naeem et al. 2020, one pair of images at a time."""
    some, others = drawn[0][:80], drawn[1][:90]
    found = manifold.density_coverage(*(_statistics(space, each)[0] for each in (some, others)), k=k).means()
    fake, real = some.double().numpy(), others.double().numpy()
    radius = [sorted(np.linalg.norm(real - each, axis=1))[k] for each in real]
    inside = np.array([[np.linalg.norm(x - y) < r for y, r in zip(real, radius, strict=True)] for x in fake])
    assert found["density"] == pytest.approx(inside.sum() / (k * len(fake)), rel=1e-12) and found["density"] > 0
    assert found["coverage"] == pytest.approx(inside.any(0).mean(), rel=1e-12) and 0 < found["coverage"] < 1


def test_cmmd_is_the_papers_definition(space, drawn):
    """Jayasumana et al. 2024: the V-statistic of exp(-|x - y|^2 / 200) of unit vectors, times 1,000."""
    some, others = drawn[0][:60], drawn[1][:70]
    x, y = ((each / each.norm(dim=1, keepdim=True)).double().numpy() for each in (some, others))

    def mean(a, b):
        return np.mean([math.exp(-(((p - q) ** 2).sum()) / 200) for p in a for q in b])

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    found = kernel.cmmd(*(_statistics(space, each)[0] for each in (some, others)))["cmmd"]
    assert found == pytest.approx(expected, rel=1e-4)  # sums of 1's that cancel to 1e-3; the norms are float32


def test_the_standard_error_of_kid_is_the_jackknife_by_leaving_out(drawn):
    some, others = drawn[0][:12].double(), drawn[1][:15].double()

    def statistic(x, y):
        return kernel.unbiased(kernel.pair_sums(x, y, kernel.polynomial))

    square = 0.0
    for side, n in ((0, 12), (1, 15)):
        left = []
        for i in range(n):
            keep = [j for j in range(n) if j != i]
            left.append(statistic(some[keep], others) if side == 0 else statistic(some, others[keep]))
        square += (n - 1) / n * sum((value - sum(left) / n) ** 2 for value in left)
    found = kernel.jackknife_error(kernel.pair_sums(some, others, kernel.polynomial))
    assert found == pytest.approx(math.sqrt(square), rel=1e-9)


def test_the_standard_error_of_kid_is_what_kid_scatters_by(space, make_pixels):
    """Of 60 pairs of data sets, the standard deviation of KID, beside the mean of its standard errors."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(60):
        fake, real = torch.randn(150, WIDTH, generator=generator) * 1.3, torch.randn(150, WIDTH, generator=generator)
        sides = (_statistics(space, each)[0] for each in (fake, real))
        found.append(kernel.kid(*sides, subsets=10, subset_size=60))
    values = np.array([each["kid"] for each in found])
    errors = np.array([each["kid_se"] for each in found])
    # A standard deviation of 60 draws is known to 1 / sqrt(120) = 9 %: three of them, and the jackknife's bias.
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.35)


def test_split_scores_are_those_of_the_parts(space, drawn):
    fake, logits = _statistics(space, drawn[0], splits=4)
    parts = [_score(logits[torch.arange(700) % 4 == split]) for split in range(4)]
    found = inception_score.inception_score(fake)
    assert found["inception_score"] == pytest.approx(np.mean(parts), rel=1e-9)
    assert found["inception_score_std"] == pytest.approx(np.std(parts, ddof=1), rel=1e-9)
    assert fake.inception_score == pytest.approx(_score(logits), rel=1e-9)


def _score(logits):
    p = logits.double().softmax(1)
    return float((p * (p / p.mean(0)).log()).sum(1).mean().exp())


@pytest.mark.parametrize("rows, expected", [(100 * torch.eye(5).repeat(4, 1), 5.0), (torch.zeros(20, 5), 1.0)])
def test_the_score_counts_classes(make_pixels, rows, expected):
    accumulator = Accumulator(make_pixels(num_features=5, num_logits=5))
    accumulator.add(FeatureBatch(torch.rand(20, 5), rows))
    assert accumulator.statistics().inception_score == pytest.approx(expected)
