import pytest

from ornstein.metrics.floor import cached_floor, real_floor
from ornstein.metrics.frechet import frechet_distance


def test_the_floor_shrinks_with_more_images_as_its_bias_says(pixels, gaussian_images):
    images = gaussian_images(8000, 120, 25, 0)
    small, large = (sum(real_floor(pixels, images, n, seed=seed).fid for seed in range(20)) / 20 for n in (100, 1000))
    assert small > 4 * large  # linear in 1/n would be 10; 20 draws of a positive quantity scatter by some 10 %
    estimate = real_floor(pixels, images, 1000)
    assert estimate.expected_fid(1000, 1000) == pytest.approx(estimate.fid)
    assert estimate.expected_fid(500, 500) == pytest.approx(2 * estimate.fid)


def test_halves_are_disjoint_and_equal_in_size(pixels, gaussian_images):
    images = gaussian_images(101, 120, 25, 1)
    floor = real_floor(pixels, images)
    assert floor.count == 50 and pixels.seen == 100
    assert real_floor(pixels, images, 1000).count == 50
    # Two images, each twice: only halves that share none could differ, and they then differ for sure.
    assert real_floor(pixels, images[:4], 2).fid > 0
    assert floor.to_dict() == {"fid": floor.fid, "count": 50, "inception_score": floor.inception_score}


def test_all_forms_of_images_give_the_same_floor(pixels, gaussian_images):
    images = gaussian_images(200, 120, 25, 2)
    assert real_floor(pixels, images, 60) == real_floor(pixels, [images[:150], images[150:]], 60)


def test_the_digits_floor_is_that_of_random_halves():
    import torch

    from ornstein.data import Digits
    from ornstein.metrics.classifier import DigitsFeatures
    from ornstein.metrics.images import extract

    features, data = DigitsFeatures(), Digits(split="train")
    floor = real_floor(features, data, seed=3)
    values = extract(features, data)[0].double()
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(3))
    one, other = values[rows[:719]], values[rows[719:1438]]
    expected = frechet_distance(one.mean(0), one.T.cov(), mean2=other.mean(0), cov2=other.T.cov())
    assert floor.count == 719 and floor.fid == pytest.approx(expected, rel=1e-4)  # float32, batched otherwise
    assert 5 < floor.inception_score <= 10


def test_too_few_images_are_refused(pixels, gaussian_images):
    with pytest.raises(ValueError, match="four real images"):
        real_floor(pixels, gaussian_images(3, 120, 25, 0))


def test_a_floor_is_measured_once(tmp_path, caplog):
    from ornstein.data import Digits
    from ornstein.metrics.classifier import DigitsFeatures

    features, data = DigitsFeatures(), Digits(split="val")
    first = cached_floor(features, data, 100, folder=tmp_path)
    assert first == real_floor(features, data, 100)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace(repr(first.fid), "123.0"))
    assert cached_floor(features, data, 100, folder=tmp_path).fid == 123  # what is kept is what is given
    assert cached_floor(features, data, 50, folder=tmp_path).count == 50 and len(list(tmp_path.iterdir())) == 2
    path.write_text(path.read_text()[:40])
    assert cached_floor(features, data, 100, folder=tmp_path) == first and "damaged" in caplog.text
    caplog.clear()
    assert cached_floor(features, data, 100, folder=path) == first and len(caplog.records) == 1  # a file in the way
