"""Names, intervals, FID-infinity and what is left out."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureBatch
from ornstein.metrics.figures import frechet, intervals, kernel
from ornstein.metrics.figures.naming import count_suffix, figure_name, main_figure, same_figure
from ornstein.metrics.figures.scores import Choice, figure_ticks, figures_of
from ornstein.metrics.frechet import frechet_distance
from ornstein.metrics.numbers import check_metric_numbers
from ornstein.metrics.spaces import check_further_spaces, further_spaces
from ornstein.metrics.statistics import Accumulator


@pytest.mark.parametrize(
    "count, suffix", [(1000, "_1k"), (2500, "_2500"), (60, "_60"), (10_000, "_10k"), (50_000, ""), (60_000, "")]
)
def test_few_samples_are_told_by_name(count, suffix):
    assert count_suffix(count, 50_000) == suffix


@pytest.mark.parametrize(
    "base, suffix, count, name",
    [
        ("fid", "", 1000, "fid_1k"),
        ("fid", "", 50_000, "fid"),
        ("fid", "_dinov2", 1000, "fd_dinov2_1k"),
        ("fid", "_dinov2", 50_000, "fd_dinov2"),
        ("sfid", "", 2500, "sfid_2500"),
        ("inception_score", "", 1000, "inception_score_1k"),
        ("kid", "_efficientnet", 1000, "kid_efficientnet"),
        ("precision", "", 10, "precision"),
        ("fid_infinity", "", 10, "fid_infinity"),
        ("fid_infinity", "_clip", 10, "fd_clip_infinity"),
        ("cmmd", "_clip", 10, "cmmd"),
        ("cmmd", "", 10, "cmmd_pixels"),
    ],
)
def test_names(pixels, base, suffix, count, name):
    pixels.suffix, pixels.agreed_samples = suffix, 50_000
    assert figure_name(base, pixels, count) == name


@pytest.mark.parametrize(
    "asked, names, found",
    [
        ("val/fid", ["val/kid", "val/fid"], "val/fid"),
        ("val/fid", ["val/fid_low", "val/fid_1k"], "val/fid_1k"),
        ("val/fid", ["val/fid_1k_low", "val/fid_floor"], None),
        ("val/fid", ["val/fd_dinov2_floor", "val/fd_dinov2_infinity", "val/fd_dinov2_2500"], "val/fd_dinov2_2500"),
        ("val/kid", ["val/kid_std"], None),
        ("val/inception_score", ["val/inception_score_std", "val/inception_score_5k"], "val/inception_score_5k"),
        ("val/loss", ["val/fid"], None),
    ],
)
def test_a_monitored_figure_is_found_under_its_full_name(asked, names, found):
    assert same_figure(asked, names) == found


def test_the_main_figure_is_the_first_frechet_distance():
    assert main_figure(["kid", "fid_floor", "fid_1k", "fd_dinov2"]) == "fid_1k"
    assert main_figure(["fd_x_low", "fd_x_1k_high", "fd_x_1k"]) == "fd_x_1k"
    assert main_figure(["sfid", "fid_infinity"]) is None


def _statistics(space, values, **options):
    accumulator = Accumulator(space, rows=True, spatial=True, **options)
    accumulator.add(FeatureBatch(values, values[:, :3]))
    return accumulator.statistics()


def _normal(count, seed, *, scale=1.0, width=6):
    return scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def space(make_pixels):
    return make_pixels(num_features=6)


def test_a_weighted_distance_is_that_of_the_repeated_rows(space):
    real = _statistics(space, _normal(300, 1)).moments
    for rows, width in ((40, 6), (10, 30)):  # more rows than features, and fewer
        values = _normal(rows, 2, scale=1.2, width=width)
        moments = real if width == 6 else _statistics(type(space)(num_features=30), _normal(300, 3, width=30)).moments
        weights = intervals.resample_weights(rows, 3, seed=4)
        assert weights.sum(1).tolist() == [rows] * 3
        found = frechet.resampled(values, moments, weights)
        for each, figure in zip(weights, found, strict=True):
            repeated = values.double().repeat_interleave(each.long(), dim=0)
            expected = frechet_distance(repeated.mean(0), repeated.T.cov(), mean2=moments.mean, cov2=moments.cov)
            assert float(figure) == pytest.approx(expected, rel=1e-6)  # roots of eigenvalues that are 0


def test_a_resampled_kid_leaves_out_pairs_of_one_image_with_itself():
    values, real = _normal(15, 1).double(), _normal(20, 2).double()
    weights = intervals.resample_weights(15, 2, seed=3)
    sums = kernel.pair_sums(values, real, kernel.polynomial, weights=weights)
    for each, found in zip(weights.double(), kernel.resampled_unbiased(sums, weights), strict=True):
        k = kernel.polynomial(values, values).fill_diagonal_(0)
        cross = kernel.polynomial(values, real).mean(1)
        within = each @ k @ each / (each.sum() ** 2 - each.square().sum())
        mine = kernel.polynomial(real, real).fill_diagonal_(0).sum() / (20 * 19)
        assert float(found) == pytest.approx(float(within + mine - 2 * each @ cross / 15), rel=1e-9)


def test_intervals_hold_what_they_promise(space):
    """Of 60 draws of 150 samples, how often the 95 % interval holds the mean figure of such draws."""
    reference = _statistics(space, _normal(500, 0))
    choice = Choice(kid=False, bootstrap=40, precision_recall=True)
    draws = [_statistics(space, _normal(150, seed, scale=1.3)) for seed in range(1, 61)]
    found = [figures_of(space, each, reference, choice) for each in draws]
    for name in ("fid", "inception_score", "precision"):
        centre = np.mean([each[name] for each in found])
        share = np.mean([each[f"{name}_low"] <= centre <= each[f"{name}_high"] for each in found])
        # 95 % but for the noise of 60 draws (2.8 %, 4 of them) and of 40 resamples' outer values (about 4 %).
        assert 0.8 <= share <= 1, name


def test_intervals_shrink_where_only_some_features_are_kept(space):
    values, reference = _normal(2000, 1, scale=1.3), _statistics(space, _normal(3000, 0))
    choice = Choice(kid=False, inception_score=False, bootstrap=100)
    widths = []
    for keep in (2000, 500):
        found = figures_of(space, _statistics(space, values, keep=keep), reference, choice)
        widths.append(found["fid_high"] - found["fid_low"])
    assert widths[1] == pytest.approx(widths[0], rel=0.5)  # unscaled they would be twice as wide


def test_fid_infinity_takes_the_bias_of_few_samples_away(space):
    # Like the reference's own distribution: FID of 400 samples is all bias, about 6 * 7 / 2 / 400 / 2.
    real = _statistics(space, _normal(50_000, 0))
    pairs = [_statistics(space, _normal(400, seed)) for seed in range(1, 13)]
    plain = np.mean([frechet.fid(each, real)["fid"] for each in pairs])
    infinity = np.mean([frechet.fid_infinity(each, real)["fid_infinity"] for each in pairs])
    assert plain > 0.02 and abs(infinity) < plain / 3
    with pytest.raises(OrnsteinError, match="20 samples"):
        frechet.fid_infinity(_statistics(space, _normal(19, 0)), real)


def test_what_there_is_nothing_for_is_left_out_with_one_line(space, caplog):
    fake, real = _statistics(space, _normal(4, 0)), _statistics(space, _normal(50, 1))
    choice = Choice(precision_recall=True, neighbours=4, density_coverage=True, fid_infinity=True, sfid=True)
    ticks = []
    with caplog.at_level(logging.WARNING):
        found = figures_of(space, fake, real, choice, advance=lambda: ticks.append(1))
    assert not any(name.startswith(("precision", "density", "fid_infinity")) for name in found)
    assert len(caplog.records) == 3 and len(ticks) == choice.bootstrap <= figure_ticks(choice, 1)
    caplog.clear()
    published = replace(real, features=torch.empty(0, 6), index=torch.empty(0, dtype=torch.int64))
    found = figures_of(space, fake, published, Choice(bootstrap=0))
    assert set(found) == {"fid", "inception_score"} and "moments alone" in caplog.text


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kid_subsets": 0}, "kid_subsets=0"),
        ({"kid_subset_size": 1.5}, "kid_subset_size=1.5"),
        ({"inception_splits": 0}, "inception_splits=0"),
        ({"neighbours": 0}, "neighbours=0"),
        ({"density_neighbours": "x"}, "density_neighbours=x"),
        ({"num_samples": 1}, "num_samples=1"),
        ({"keep_features": 1}, "keep_features=1"),
        ({"bootstrap": 5}, "bootstrap=5"),
        ({"bootstrap": -1}, "bootstrap=-1"),
        ({"kid": "maybe"}, "kid=maybe must be true or false"),
        ({"text_alignment": 1}, "text_alignment=1 must be true or false"),
        ({"precision_recall": True, "num_samples": 3, "neighbours": 3}, "lower it"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, words):
    check_metric_numbers(num_samples=0, bootstrap=0, inception_splits=None, kid=True)
    with pytest.raises(OrnsteinError, match=words):
        check_metric_numbers(**options)


@pytest.mark.parametrize(
    "also, words",
    [({"resnet": True}, "unknown"), ({"efficientnet": "folder"}, "true or false"), ({"dinov2": True}, "folder or hub")],
)
def test_further_spaces_that_cannot_be_are_refused(also, words):
    check_further_spaces({"efficientnet": False, "dinov2": None, "clip": "folder"})
    assert further_spaces(None) == [] == further_spaces({"efficientnet": False, "dinov2": None})
    with pytest.raises(OrnsteinError, match=words):
        check_further_spaces(also)


def test_kernel_sums_take_one_place_for_all_blocks(monkeypatch):
    """Fresh blocks of several sizes tear the heap: 10,000 features of 2,048 took a gigabyte beside their own."""
    from ornstein.metrics.figures import kernel

    places = set()

    def watched(x, y, out=None):
        places.add(out.untyped_storage().data_ptr())
        return kernel.polynomial(x, y, out)

    monkeypatch.setattr(kernel, "_BLOCK", 64)
    x, y = torch.randn(40, 3), torch.randn(30, 3)
    found = kernel.pair_sums(x, y, watched, weights=torch.ones(1, 40))
    whole = kernel.polynomial(x.double(), y.double())
    assert len(places) == 1
    assert torch.allclose(found.cross, whole.sum(1), rtol=1e-12) and torch.allclose(found.real_cross, whole.sum(0))
    assert torch.allclose(found.weighted, found.own.sum()[None], rtol=1e-12)
