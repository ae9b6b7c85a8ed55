import json
import logging
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from ornstein.metrics import reference
from ornstein.metrics.images import extract
from ornstein.metrics.reference import compute_statistics, reference_statistics

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
    for name in ("mean", "cov", "features", "index"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert (first.count, first.inception_score, first.source) == (
        second.count, second.inception_score, second.source,
    )  # fmt: skip
    assert len(_files(tmp_path)) == 1 and second.source["data"] == KEY["data_fingerprint"]


def test_the_cache_is_where_the_environment_says(pixels, images, tmp_path):
    reference_statistics(pixels, images, **KEY)  # conftest points $ORNSTEIN_CACHE below tmp_path
    assert len(list((tmp_path / "cache" / "statistics").glob("data-train-1px-pixels-*.safetensors"))) == 1


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
    assert pixels.seen == 600 and torch.equal(found.cov, expected.cov)
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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, where one can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_a_line_and_the_next_run_writes(make_pixels, images, small_disk, caplog):
    features = make_pixels(num_features=4)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(60 * 1024))
    with caplog.at_level(logging.WARNING):
        found = reference_statistics(features, images, folder=small_disk, **KEY)
    assert found.count == 300 and len(caplog.records) == 1 and "\n" not in caplog.text.strip()
    assert "cannot be written" in caplog.text and "the next run tries again" in caplog.text
    assert _files(small_disk) == [ballast]  # nothing half-written
    ballast.unlink()
    again = reference_statistics(features, images, folder=small_disk, **KEY)
    assert features.seen == 600 and torch.equal(again.cov, found.cov)
    assert [path.suffix for path in _files(small_disk)] == [".safetensors"]


def test_a_disk_that_is_full_in_the_middle_of_the_write(pixels, images, tmp_path, monkeypatch, caplog):
    def fills(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(reference, "save_file", fills)
    with caplog.at_level(logging.WARNING):
        found = reference_statistics(pixels, images, folder=tmp_path, **KEY)
    assert found.count == 300 and "No space left" in caplog.text and _files(tmp_path) == []


def test_the_same_content_under_another_name_is_found(pixels, images, tmp_path):
    class Named:
        fingerprint, image_size, split, channels = "a" * 64, 1, "train", 1

        def __init__(self, name):
            self.name = name

        def __len__(self):
            return len(images)

        def batch(self, rows):
            return {"image": images[rows]}

    first = reference_statistics(pixels, Named("faces"), folder=tmp_path)
    second = reference_statistics(pixels, Named("faces again"), folder=tmp_path)
    (path,) = _files(tmp_path)
    assert pixels.seen == 300 and path.name.startswith("faces-train-1px-pixels-") and first.source == second.source
    with safe_open(path, framework="pt") as file:  # all the facts are inside
        facts = json.loads(file.metadata()["facts"])
    assert facts["source"]["extractor_fingerprint"] == pixels.fingerprint and facts["source"]["data"] == "a" * 64
    assert facts["count"] == 300


def test_of_several_that_need_the_same_one_computes(make_pixels, images, tmp_path):
    features = make_pixels()

    class Slow(list):
        def __iter__(self):
            time.sleep(0.2)
            return super().__iter__()

    def ask(_):
        return reference_statistics(features, Slow([images]), folder=tmp_path, **KEY)

    with ThreadPoolExecutor(4) as pool:  # flock holds apart open files, in one process or several
        found = list(pool.map(ask, range(4)))
    assert features.seen == 300 and all(torch.equal(each.cov, found[0].cov) for each in found)
    assert len(_files(tmp_path)) == 1  # no lock is left


def test_the_kept_features_are_a_fixed_uniform_subset(pixels, images):
    everything, _ = extract(pixels, images)
    first = compute_statistics(pixels, images, batch_size=7, max_features=50)
    second = compute_statistics(pixels, images, batch_size=128, max_features=50)
    assert first.features.shape == (50, 4) and torch.equal(first.features, second.features)
    assert first.count == 300
    places = (first.features[:, None] == everything).all(-1).float().argmax(1)
    assert (places.diff() > 0).all() and places[-1] > 200  # in order, and not the first 50


def test_mistakes_get_one_sentence(pixels, images):
    with pytest.raises(ValueError, match="data_fingerprint="):
        reference_statistics(pixels, images)
    with pytest.raises(ValueError, match="two real images"):
        compute_statistics(pixels, images[:1])
    with pytest.raises(ValueError, match="not as int"):
        compute_statistics(pixels, 3)
