"""Published references: the layouts of ADM, EDM, pytorch-fid, clean-fid and torch-fidelity, made here and small."""

from __future__ import annotations

import logging
import pathlib

import numpy as np
import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureBatch
from ornstein.metrics.generative import GenerativeMetrics
from ornstein.metrics.published import check_published, read_published
from ornstein.metrics.reference import compute_statistics


@pytest.fixture
def inception(make_pixels):
    """Stands for Inception: its name, four features, and two spatial ones."""

    class Stub(make_pixels):
        num_spatial = 2

        def all_features(self, images):
            batch = self.features_and_logits(images)
            return FeatureBatch(*batch, batch[0][:, 2:])

    return Stub(name="inception")


@pytest.fixture
def real(gaussian_images):
    return gaussian_images(300, 120, 20, 0)


@pytest.fixture
def moments(inception, real):
    found = compute_statistics(inception, real, spatial=True)
    return {
        "mu": found.mean.numpy(), "sigma": found.cov.numpy(),
        "mu_s": found.spatial.mean.numpy(), "sigma_s": found.spatial.cov.numpy(),
    }  # fmt: skip


def _figures(features, reference, images, **options):
    metrics = GenerativeMetrics(features, kid_subsets=3, kid_subset_size=50, sfid=True, bootstrap=0, **options)
    metrics.set_reference(reference)
    metrics.update(images)
    return metrics.compute()


def _hwc(images):
    return images.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("layout", ["adm", "adm_images", "adm_both", "edm", "fidelity", "fidelity_features"])
def test_a_published_file_gives_the_figures_of_its_images(
    inception, real, moments, gaussian_images, tmp_path, caplog, layout
):
    path = tmp_path / ("ref.pt" if layout.startswith("fidelity") else "ref.npz")
    pair = {name: moments[name] for name in ("mu", "sigma")}
    match layout:
        case "adm":
            np.savez(path, **moments)
        case "adm_images":
            np.savez(path, arr_0=_hwc(real))
        case "adm_both":
            np.savez_compressed(path, arr_0=_hwc(real), **moments)
        case "edm":
            np.savez(path, **pair)
        case "fidelity":
            torch.save(pair, path)
        case "fidelity_features":
            torch.save(inception(real), path)
    generated = gaussian_images(200, 130, 25, 1)
    expected = _figures(inception, real, generated)
    with caplog.at_level(logging.WARNING):
        found = _figures(inception, read_published(path, inception, batch_size=64, spatial=True), generated)
    has_images = layout in ("adm_images", "adm_both", "fidelity_features")
    has_spatial = layout in ("adm", "adm_images", "adm_both")
    kept = {"fid", "inception_score", *(("kid", "kid_std", "kid_se") if has_images else ())}
    kept |= {"sfid"} if has_spatial else set()
    assert set(found) == kept
    # float64 moments of the same float32 features
    assert found == pytest.approx({name: expected[name] for name in kept}, rel=1e-9)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (not has_images) + (not has_spatial), said


def test_images_are_measured_once(inception, real, tmp_path):
    path = tmp_path / "batch.npz"
    np.savez(path, arr_0=_hwc(real))
    first = read_published(path, inception)
    seen = inception.seen
    second = read_published(path, inception)
    assert inception.seen == seen == 300 and torch.equal(first.cov, second.cov)
    assert second.source["file"] == "batch.npz" and second.source["images"] == second.count == 300


def _write(kind, path, moments):
    if kind == "wide":
        np.savez(path, mu=np.zeros(7), sigma=np.eye(7))
    elif kind == "ragged":
        np.savez(path, mu=np.zeros(4), sigma=np.eye(3))
    elif kind == "nan":
        np.savez(path, mu=np.full(4, np.nan), sigma=np.eye(4))
    elif kind == "other":
        np.savez(path, images=np.zeros(3))
    elif kind == "float":
        np.savez(path, arr_0=np.zeros((3, 1, 4, 1)))
    elif kind == "flat":
        np.savez(path, arr_0=np.zeros((3, 4), dtype=np.uint8))
    elif kind == "objects":
        np.savez(path, mu=np.array([{}], dtype=object), sigma=np.eye(4))
    elif kind == "cut":
        np.savez(path, **moments)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "pt_other":
        torch.save({"state": torch.zeros(2)}, path)
    elif kind == "pt_wide":
        torch.save(torch.zeros(5, 9), path)
    elif kind == "pt_object":
        torch.save({"mu": pathlib.PurePosixPath("x"), "sigma": 0}, path)


@pytest.mark.parametrize(
    "name, kind, words",
    [
        ("a.npz", "wide", "another network"),
        ("a.npz", "ragged", r"shape \(4,\) and \(3, 3\)"),
        ("a.npz", "nan", "NaN"),
        ("a.npz", "other", "holds images, and neither mu and sigma nor images in arr_0"),
        ("a.npz", "float", "uint8"),
        ("a.npz", "flat", r"\(3, 4\)"),
        ("a.npz", "objects", "damaged"),
        ("a.npz", "cut", "damaged"),
        ("a.pt", "pt_other", "neither torch-fidelity's statistics"),
        ("a.pt", "pt_wide", "9 features"),
        ("a.pt", "pt_object", "damaged"),
    ],
)
def test_a_file_that_cannot_serve_gets_one_sentence(inception, moments, tmp_path, name, kind, words):
    path = tmp_path / name
    _write(kind, path, moments)
    with pytest.raises(OrnsteinError, match=words) as refused:
        read_published(path, inception)
    assert "\n" not in str(refused.value)


def test_what_can_be_known_before_is_refused_before(tmp_path):
    for name in ("edm.pkl", "images.png", "there.npz"):
        (tmp_path / name).touch()
    check_published(tmp_path / "there.npz", "inception")
    for name, space, words in [
        ("there.npz", "digits", "not with digits"),
        ("edm.pkl", "inception", "np.savez"),
        ("images.png", "inception", "must be"),
        ("gone.npz", "inception", "no file"),
    ]:
        with pytest.raises(OrnsteinError, match=words):
            check_published(tmp_path / name, space)
