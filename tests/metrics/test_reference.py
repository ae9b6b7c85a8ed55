import logging

import pytest
import torch

from ornstein.metrics import reference
from ornstein.metrics.images import extract
from ornstein.metrics.reference import compute_statistics, inception_score, reference_statistics

KEY = {"data_fingerprint": "f" * 64, "image_size": 1, "split": "train"}


@pytest.fixture
def images(gaussian_images):
    return gaussian_images(300, 120, 20, 0)


def _files(folder):
    return sorted(folder.rglob("*"))


def test_moments_are_those_of_the_features(pixels, images):
    statistics = compute_statistics(pixels, images, batch_size=64)
    values = images.flatten(1).double()
    torch.testing.assert_close(statistics.mean, values.mean(0), rtol=1e-12, atol=0)
    # Sums of squares near 1e6 minus their like: 1e-16 * 1e6 * 300 over a variance of 400.
    torch.testing.assert_close(statistics.cov, values.T.cov(), rtol=1e-9, atol=1e-9)
    assert statistics.count == 300 and len(statistics.features) == 300


def test_the_second_call_reads_what_the_first_one_wrote(pixels, images, tmp_path):
    first = reference_statistics(pixels, images, folder=tmp_path, **KEY)
    seen = pixels.seen
    second = reference_statistics(pixels, images, folder=tmp_path, **KEY)
    assert pixels.seen == seen == 300
    for name in ("feature_sum", "feature_outer", "features"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert (first.count, first.inception_score, first.source) == (
        second.count, second.inception_score, second.source,
    )  # fmt: skip
    assert len(_files(tmp_path)) == 1 and second.source["data"] == KEY["data_fingerprint"]


def test_the_cache_is_where_the_environment_says(pixels, images, tmp_path):
    reference_statistics(pixels, images, **KEY)  # conftest points $ORNSTEIN_CACHE below tmp_path
    assert len(list((tmp_path / "cache" / "statistics").glob("pixels-*.safetensors"))) == 1


def test_everything_that_decides_the_statistics_is_in_the_key(pixels, make_pixels, images, tmp_path):
    reference_statistics(pixels, images, folder=tmp_path, **KEY)
    for change in ({"data_fingerprint": "0" * 64}, {"image_size": 2}, {"split": "val"}, {"max_features": 10}):
        reference_statistics(pixels, images, folder=tmp_path, **{**KEY, **change})
    reference_statistics(make_pixels(name="other"), images, folder=tmp_path, **KEY)
    assert len(_files(tmp_path)) == 6


def test_a_data_set_says_its_own_key(tmp_path):
    from ornstein.data import Digits
    from ornstein.metrics.classifier import DigitsFeatures

    features = DigitsFeatures()
    for split, size in (("train", 8), ("val", 8), ("val", 16)):
        found = reference_statistics(features, Digits(split=split, image_size=size), folder=tmp_path)
        assert (found.source["split"], found.source["image_size"]) == (split, size)
    assert len(_files(tmp_path)) == 3


def _truncate(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def _flip_a_bit(raw: bytes) -> bytes:
    return raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:]


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, lambda raw: b"", lambda raw: b"no safetensors at all"])
def test_a_damaged_file_is_computed_again_with_one_line(pixels, images, tmp_path, caplog, damage):
    expected = reference_statistics(pixels, images, folder=tmp_path, **KEY)
    (path,) = _files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        found = reference_statistics(pixels, images, folder=tmp_path, **KEY)
    assert pixels.seen == 600 and torch.equal(found.feature_outer, expected.feature_outer)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "again" in caplog.text
    reference_statistics(pixels, images, folder=tmp_path, **KEY)
    assert pixels.seen == 600  # whole again


def test_a_process_that_dies_while_writing_leaves_nothing(pixels, images, tmp_path, monkeypatch):
    def dies(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(reference, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        reference_statistics(pixels, images, folder=tmp_path, **KEY)
    assert _files(tmp_path) == []


def test_a_folder_that_cannot_be_written_costs_a_line_and_no_figure(pixels, images, tmp_path, caplog):
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        found = reference_statistics(pixels, images, folder=blocked, **KEY)
    assert found.count == 300 and "not cached" in caplog.text


def test_the_kept_features_are_a_fixed_uniform_subset(pixels, images):
    everything, _ = extract(pixels, images)
    first = compute_statistics(pixels, images, batch_size=7, max_features=50)
    second = compute_statistics(pixels, images, batch_size=128, max_features=50)
    assert first.features.shape == (50, 4) and torch.equal(first.features, second.features)
    assert first.count == 300
    places = (first.features[:, None] == everything).all(-1).float().argmax(1)
    assert (places.diff() > 0).all() and places[-1] > 200  # in order, and not the first 50


def test_inception_score_counts_classes():
    logits = 100 * torch.eye(5).repeat(4, 1)
    assert inception_score(logits) == pytest.approx(5)  # sure of one of five classes each
    assert inception_score(torch.zeros(20, 5)) == pytest.approx(1)  # sure of nothing


def test_mistakes_get_one_sentence(pixels, images):
    with pytest.raises(ValueError, match="data_fingerprint="):
        reference_statistics(pixels, images)
    with pytest.raises(ValueError, match="two real images"):
        compute_statistics(pixels, images[:1])
    with pytest.raises(ValueError, match="not as int"):
        compute_statistics(pixels, 3)
