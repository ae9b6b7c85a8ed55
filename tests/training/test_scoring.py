"""What stands beside the figures: references, floors, neighbours, the samples of all processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ornstein.data import Digits
from ornstein.errors import OrnsteinError
from ornstein.metrics import DigitsFeatures, GenerativeMetrics
from ornstein.training import scoring


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORNSTEIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def features():
    return DigitsFeatures()


@pytest.fixture(scope="module")
def data():
    return Digits(split="train")


@pytest.fixture(scope="module")
def held_out():
    return Digits(split="val")


def _named(features, name, suffix):
    """The same net as another feature space."""
    other = DigitsFeatures()
    other.name, other.suffix = name, suffix
    return other


def test_every_space_has_its_reference_and_its_floor(features, data):
    metrics = GenerativeMetrics(features, also=[_named(features, "other", "_other")], kid=False, bootstrap=0)
    scoring.set_references(metrics, data)
    metrics.update(data.batch(range(200))["image"])
    values = metrics.compute()
    assert values["fid_200"] == values["fd_other_200"]
    floor = scoring.floor_of(metrics, data, 200)
    further = scoring.further_floors(metrics, data, 200)
    beside = scoring.figures_beside(metrics, floor, values, 200, further=further)
    assert beside["fid_floor"] == beside["fd_other_floor"] == pytest.approx(floor.fid * (1 + 200 / 1438) / 2)
    assert beside["real_inception_score"] == metrics.reference.inception_score


def test_a_published_reference_serves_figures_and_the_training_images_memorisation(
    features, data, held_out, tmp_path, caplog
):
    train = data.batch(range(len(data)))["image"]
    values = features(train).double()
    np.savez(tmp_path / "ref.npz", mu=values.mean(0).numpy(), sigma=values.T.cov().numpy())
    own = GenerativeMetrics(features, bootstrap=0)
    scoring.set_references(own, data)
    with pytest.raises(OrnsteinError, match="not with digits"):
        scoring.set_references(GenerativeMetrics(features, reference=tmp_path / "ref.npz"), data)
    inception = _named(features, "inception", "")
    metrics = GenerativeMetrics(inception, reference=tmp_path / "ref.npz", bootstrap=0)
    scoring.set_references(metrics, data)
    for each in (own, metrics):
        each.update(train[:300])
    found = metrics.compute()
    assert set(found) == {"fid_300", "inception_score_300"}
    assert found["fid_300"] == pytest.approx(own.compute()["fid_300"], rel=1e-5)  # float32 features, batched otherwise
    # Its moments do not say of how many images they are: the floor is that of infinitely many.
    floor = scoring.floor_of(metrics, data, 300)
    assert scoring.figures_beside(metrics, floor, found, 300)["fid_floor"] == pytest.approx(floor.fid / 2)
    near = scoring.memorisation(metrics, train[:50], held_out=held_out, training=data)
    assert near["copies"] == 1 and near["num_training"] == 1438
    assert metrics.report(found).reference["file"] == "ref.npz"


@pytest.mark.parametrize("shapes", [1, 2])
def test_a_copy_is_its_own_nearest_neighbour(features, data, shapes):
    metrics = GenerativeMetrics(features, bootstrap=0)
    scoring.set_references(metrics, data)
    copies = data.batch(range(100, 104))["image"]
    images = copies if shapes == 1 else [copies[:2], copies[2:].repeat_interleave(2, dim=2)]
    picture = np.asarray(scoring.draw_neighbours(metrics, images, training=data).convert("L")).astype(int)
    step = (picture.shape[0] - 28 - 2) // 4
    assert picture.shape[0] == 4 * step + 30  # four rows below the headings
    if shapes == 1:
        sample = picture[28 : 28 + 64, 2:66]
        places = [x for x in range(66, picture.shape[1] - 63) if (picture[28 : 28 + 64, x : x + 64] == sample).all()]
        assert sample.max() > 200 and len(places) == 1 and places[0] < 110  # the first beside it


def test_alone_the_samples_are_in_order_of_their_numbers():
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1)
    drawn = scoring.together(scoring.Drawn(images, 5, torch.tensor([3, 0, 2, 1])))
    assert drawn.images.flatten().tolist() == [1, 3, 2, 0] and drawn.nfe == 5
    several = scoring.Drawn([images, images], 5, torch.arange(8))
    assert scoring.together(several) is several


def test_a_floor_of_unknown_many_is_half():
    from ornstein.metrics import RealFloor

    assert RealFloor(fid=4.0, count=100, inception_score=None).expected_fid(100, math.inf) == 2
