import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from ornstein.metrics.memorisation import (
    memorisation_of_features,
    memorisation_report,
    nearest_neighbours,
    neighbour_grid,
)


def _cloud(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [3, 1024])
def test_neighbours_are_those_of_brute_force(chunk):
    queries, bank = _cloud(40, 0), _cloud(200, 1)
    distances, indices = nearest_neighbours(queries, bank, k=4, chunk=chunk)
    expected, places = torch.cdist(queries.double(), bank.double()).topk(4, largest=False)
    assert torch.equal(indices, places)
    torch.testing.assert_close(distances, expected, rtol=1e-9, atol=1e-12)  # float64 in another order


def test_copies_are_at_distance_exactly_zero():
    bank = 1000 + _cloud(300, 2)  # far from the origin, where the expanded square is off by 1e-10
    distances, indices = nearest_neighbours(bank[50:60], bank)
    assert torch.equal(distances, torch.zeros(10, 1, dtype=torch.float64))
    assert indices[:, 0].tolist() == list(range(50, 60))


def test_copies_of_training_data_are_caught():
    training = _cloud(500, 3)
    copies = training[:200] + 1e-3 * _cloud(200, 4)
    report = memorisation_of_features(torch.cat([copies, training[:50]]), _cloud(300, 5), training=training)
    assert report.share == 1.0 and report.copies == pytest.approx(50 / 250)
    assert report.sample_median < 0.1 * report.held_out_median


def test_a_few_copies_among_fresh_samples_show():
    training = _cloud(500, 6)
    samples = torch.cat([_cloud(400, 7), training[:100]])
    share = memorisation_of_features(samples, _cloud(1000, 8), training=training).share
    assert share == pytest.approx(0.2 + 0.8 * 0.05, abs=0.03)  # 3 standard errors: of 400 draws and of the threshold


def test_fresh_data_are_not_accused():
    report = memorisation_of_features(_cloud(2000, 9), _cloud(2000, 10), training=_cloud(500, 11))
    # Standard errors of the share and of the percentile, 0.005 each: 3 of their combination.
    assert report.share == pytest.approx(report.chance, abs=0.021) and report.copies == 0


def test_held_out_scans_are_not_accused_and_training_scans_are():
    from ornstein.data import Digits
    from ornstein.metrics.classifier import DigitsFeatures

    features, training, held_out = DigitsFeatures(), Digits(split="train"), Digits(split="val")
    rows = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
    one, other = (held_out.batch(part)["image"] for part in rows.split(180))
    fresh = memorisation_report(features, one, held_out=other, training=training)
    assert fresh.share <= 0.10  # the bound for models; chance is 0.05, its standard error here 0.02
    stolen = memorisation_report(features, training.batch(range(100))["image"], held_out=other, training=training)
    assert stolen.share == 1.0 and stolen.sample_median < 1e-4 * fresh.sample_median
    assert json.loads(json.dumps(stolen.to_dict())) == asdict(stolen) and stolen.extractor == "digits"


def test_the_picture_shows_each_sample_before_its_neighbours(tmp_path):
    samples = torch.tensor([10, 20], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    training = torch.tensor([100, 150, 200], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    neighbours = torch.tensor([[2, 0], [1, 2]])
    path = tmp_path / "pictures" / "neighbours.png"
    picture = neighbour_grid(samples, training, neighbours=neighbours, path=path, scale=2)
    pixels = np.asarray(picture)
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
    # Below the line of headings, on the dark ground.
    rows = [row for row in pixels[28:, :, 0].tolist() if set(row) != {32}]
    values = [[v for v in dict.fromkeys(row) if v != 32] for row in (rows[0], rows[-1])]
    assert values == [[10, 200, 100], [20, 150, 200]]
    head = pixels[:28, :, 0]
    assert (head[:, :30] > 200).any() and (head[:, 60:] > 200).any(), "a heading over the sample, one over the rest"


def test_mistakes_get_one_sentence():
    with pytest.raises(ValueError, match="M >= 5"):
        nearest_neighbours(_cloud(3, 0), _cloud(4, 1), k=5)
    with pytest.raises(ValueError, match="no images"):
        nearest_neighbours(_cloud(3, 0)[:0], _cloud(4, 1))
