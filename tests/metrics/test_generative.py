import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ornstein.metrics.frechet import frechet_distance
from ornstein.metrics.generative import GenerativeMetrics, label_accuracy
from ornstein.metrics.reference import compute_statistics


@pytest.fixture
def real(gaussian_images):
    return gaussian_images(600, 120, 20, 0)


@pytest.fixture
def fake(gaussian_images):
    return gaussian_images(400, 130, 30, 1)


def _scored(features, real, fake, *, batch_size=100, **options):
    metrics = GenerativeMetrics(features, **options)
    metrics.set_reference(real, batch_size=batch_size)
    for batch in fake.split(batch_size):
        metrics.update(batch)
    return metrics


def test_fid_of_two_gaussians_is_the_closed_form(pixels, gaussian_images):
    real, fake = gaussian_images(40_000, 110, 15, 2), gaussian_images(40_000, 140, 25, 3)
    values = _scored(pixels, real, fake, batch_size=20_000, kid=False, inception_score=False).compute()
    # Rounding to uint8 adds 1/12 to each variance, and 255 is 4.6 standard deviations away.
    std1, std2 = (15**2 + 1 / 12) ** 0.5, (25**2 + 1 / 12) ** 0.5
    expected = 4 * 30**2 + 4 * (std1 - std2) ** 2
    # The mean difference has a standard error of sqrt((15^2 + 25^2) / 40000) = 0.15 in 30: 4 of them, twice (it is
    # squared), over sqrt(4) dimensions, are 2 %.
    assert values["fid"] == pytest.approx(expected, rel=0.02)


def test_fid_is_the_closed_form_of_the_sample_moments(pixels, real, fake):
    first, second = real.flatten(1).double(), fake.flatten(1).double()
    expected = frechet_distance(first.mean(0), first.T.cov(), mean2=second.mean(0), cov2=second.T.cov())
    # Both float64; torchmetrics takes eigenvalues of a matrix that is not symmetric.
    assert _scored(pixels, real, fake).compute()["fid"] == pytest.approx(expected, rel=1e-9)


def test_figures_are_those_of_torchmetrics_on_the_feature_module(pixels, real, fake):
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    class Logits(torch.nn.Module):
        def forward(self, images):
            return pixels.logits(images)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fid = FrechetInceptionDistance(feature=pixels, normalize=False)
        kid = KernelInceptionDistance(feature=pixels, subsets=20, subset_size=100)
        score = InceptionScore(feature=Logits(), splits=1)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    score.update(fake)
    torch.manual_seed(7)
    expected_kid, expected_score = kid.compute(), score.compute()
    values = _scored(pixels, real, fake, kid_subsets=20, kid_subset_size=100, seed=7).compute()
    # torchmetrics takes float32 logits and kernels, and gives float32.
    assert values["fid"] == pytest.approx(float(fid.compute()), rel=1e-6)
    assert values["kid"] == pytest.approx(float(expected_kid[0]), rel=1e-5)
    assert values["kid_std"] == pytest.approx(float(expected_kid[1]), rel=1e-5)
    assert values["inception_score"] == pytest.approx(float(expected_score[0]), rel=1e-5)


def test_figures_meet_torch_fidelity(pixels, real, fake):
    fid_module = pytest.importorskip("torch_fidelity.metric_fid")
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    real_features, fake_features = pixels(real), pixels(fake)
    statistics = [fid_module.fid_features_to_statistics(value) for value in (real_features, fake_features)]
    fid = fid_module.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    # All images in every subset, and as many real ones: then KID has no random part and must agree exactly.
    kid = kid_features_to_metric(
        real_features[:400], fake_features, kid_subsets=2, kid_subset_size=400, kid_kernel="poly",
        kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=0, verbose=False,
    )["kernel_inception_distance_mean"]  # fmt: skip
    score = isc_features_to_metric(pixels.logits(fake), splits=1)["inception_score_mean"]
    values = _scored(pixels, real, fake).compute()
    exact = _scored(pixels, real[:400], fake, kid_subset_size=400, kid_subsets=2).compute()
    # torch-fidelity keeps float32 features and moments; 1e-3 is what the project promises, 1e-4 what float32 gives.
    assert values["fid"] == pytest.approx(fid, rel=1e-4)
    assert exact["kid"] == pytest.approx(kid, rel=1e-4)
    assert values["inception_score"] == pytest.approx(score, rel=1e-4)


def test_batch_size_does_not_matter(pixels, real, fake):
    results = [_scored(pixels, real, fake, batch_size=size, kid_subsets=5).compute() for size in (1000, 7)]
    assert results[0] == pytest.approx(results[1], rel=1e-9)  # float64 sums in another order


def test_batch_size_does_not_matter_to_the_digits_net():
    from ornstein.data import Digits
    from ornstein.metrics.classifier import DigitsFeatures

    data = Digits(split="val")
    images, noisy = data.batch(range(len(data)))["image"], data.batch(range(100))["image"] // 2
    results = [_scored(DigitsFeatures(), images, noisy, batch_size=size, kid_subsets=5).compute() for size in (100, 9)]
    assert results[0] == pytest.approx(results[1], rel=1e-3)  # float32 convolutions differ in the last digits


def test_statistics_serve_like_the_images(pixels, real, fake):
    from_images = _scored(pixels, real, fake, kid_subsets=5).compute()
    from_statistics = _scored(pixels, compute_statistics(pixels, real), fake, kid_subsets=5).compute()
    assert from_images == from_statistics


def test_the_same_call_gives_the_same_figures_and_leaves_the_global_generator_alone(pixels, real, fake):
    metrics = _scored(pixels, real, fake, kid_subsets=5, kid_subset_size=100)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = metrics.compute()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert metrics.compute() == first


def test_reset_forgets_the_samples_and_keeps_the_reference(pixels, real, fake):
    metrics = _scored(pixels, real, fake, kid_subsets=5)
    expected = metrics.compute()
    metrics.reset()
    assert metrics.count() == 0
    metrics.update(real[:100])
    assert metrics.compute()["fid"] < expected["fid"]
    metrics.reset()
    metrics.update(fake)
    assert metrics.compute() == pytest.approx(expected, rel=1e-9)


def test_a_new_reference_replaces_the_old_one(pixels, real, fake):
    metrics = _scored(pixels, real, fake, kid_subsets=2)
    apart = metrics.compute()["fid"]
    metrics.set_reference(fake)
    assert metrics.compute()["fid"] == pytest.approx(0, abs=1e-6 * apart)  # rounding of cancelling terms


def test_sure_logits_do_not_make_the_inception_score_nan(pixels):
    images = torch.zeros(300, 1, 1, 4, dtype=torch.uint8)
    images[:150, :, :, 0], images[150:, :, :, 1] = 255, 255
    pixels.scale.fill_(30.0)  # logits of +-120: float32 probabilities would underflow to 0
    values = _scored(pixels, images, images, kid=False).compute()
    assert values["inception_score"] == pytest.approx(2.0, rel=1e-6)  # two classes, sure of each: exactly two


def test_label_accuracy_is_the_share_that_the_net_reads_as_asked():
    from ornstein.data import Digits
    from ornstein.metrics.classifier import DigitsFeatures

    features, data = DigitsFeatures(), Digits(split="train")
    batch = data.batch(range(200))
    metrics = GenerativeMetrics(features, kid=False, inception_score=False)
    metrics.set_reference(batch["image"])
    metrics.update(batch["image"][:100], batch["label"][:100])
    metrics.update(batch["image"][100:], (batch["label"][100:] + 1) % 10)
    share = metrics.compute()["label_accuracy"]
    assert share == pytest.approx(0.5, abs=0.02)  # the net reads training scans nearly without error
    wrong = label_accuracy(features, batch["image"], (batch["label"] + 1) % 10)
    right = label_accuracy(features, batch["image"], batch["label"])
    assert right > 0.98 and wrong < 0.02


def test_without_labels_there_is_no_label_accuracy():
    from ornstein.data import Digits
    from ornstein.metrics.classifier import DigitsFeatures

    images = Digits(split="val").batch(range(50))["image"]
    values = _scored(DigitsFeatures(), images, images, kid_subsets=2).compute()
    ends = {f"{name}_{end}" for name in ("fid_50", "kid", "inception_score_50") for end in ("low", "high")}
    assert set(values) == {"fid_50", "kid", "kid_std", "kid_se", "inception_score_50"} | ends


def test_the_report_says_what_decides_the_figures(pixels, real, fake):
    metrics = _scored(pixels, real, fake, kid_subsets=2)
    report = metrics.report(label_protocol="balanced", sampling={"sampler": "ddim", "nfe": 50}, floor={"fid": 0.5})
    stored = json.loads(report.to_json())
    assert stored["num_samples"] == 400 and stored["reference"]["count"] == 600
    assert stored["fingerprint"] == pixels.fingerprint and stored["extractor"] == "pixels"
    assert stored["label_protocol"] == "balanced" and stored["sampling"]["nfe"] == 50
    assert stored["values"]["fid"] == metrics.compute()["fid"]
    assert stored["versions"]["torchmetrics"] != "absent"


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(2, 1, 8, 8), "uint8"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), "1 or 3"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), "shape"),
    ],
)
def test_images_of_the_wrong_kind_are_refused(pixels, images, message):
    with pytest.raises(ValueError, match=message):
        GenerativeMetrics(pixels).update(images)


def test_mistakes_get_one_sentence(pixels, make_pixels, real, fake):
    metrics = GenerativeMetrics(pixels)
    with pytest.raises(ValueError, match="set_reference"):
        metrics.compute()
    metrics.set_reference(real)
    with pytest.raises(ValueError, match="two images"):
        metrics.compute()
    with pytest.raises(ValueError, match="3 labels"):
        metrics.update(fake, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="metrics=none"):
        GenerativeMetrics(None)
    from ornstein.metrics.reference import reference_statistics

    other = reference_statistics(make_pixels(name="other"), real, data_fingerprint="a", image_size=1)
    with pytest.raises(ValueError, match="another extractor"):
        metrics.set_reference(other)
    with pytest.raises(ValueError, match="label accuracy"):
        label_accuracy(pixels, fake, torch.zeros(len(fake)))


WORKER = """
import json, sys, torch
from importlib.util import module_from_spec, spec_from_file_location
from ornstein.metrics.generative import GenerativeMetrics

rank, folder, conftest = int(sys.argv[1]), sys.argv[2], sys.argv[3]
spec = spec_from_file_location("metrics_conftest", conftest)
module = module_from_spec(spec)
spec.loader.exec_module(module)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
real, fake = torch.load(f"{folder}/images.pt")
for case in ("all to one", "in turns", "in halves"):
    metrics = GenerativeMetrics(
        module.PixelFeatures(), kid_subset_size=50, kid_subsets=3, inception_splits=3, precision_recall=True,
        density_coverage=True, bootstrap=20, keep_features=120,
    )
    metrics.set_reference(real)
    index = torch.arange(400)
    shares = {"all to one": index[: 400 * (1 - rank)], "in turns": index[rank::2], "in halves": index.chunk(2)[rank]}
    mine = shares[case]
    for rows in mine.split(70) if len(mine) else []:
        metrics.update(fake[rows], index=rows)
    with open(f"{folder}/{case}{rank}.json", "w") as file:
        json.dump(metrics.compute() | {"count": metrics.count()}, file)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_score_as_one_even_if_one_has_no_image(pixels, gaussian_images, tmp_path):
    real, fake = gaussian_images(400, 120, 20, 0), gaussian_images(400, 130, 30, 1)
    torch.save((real, fake), tmp_path / "images.pt")
    conftest = str(Path(__file__).with_name("conftest.py"))
    command = [sys.executable, "-c", WORKER]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path), conftest]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    options = {"inception_splits": 3, "precision_recall": True, "density_coverage": True, "keep_features": 120}
    alone = _scored(pixels, real, fake, kid_subset_size=50, kid_subsets=3, bootstrap=20, **options)
    expected = alone.compute() | {"count": 400}
    assert len(expected) > 20
    for case in ("all to one", "in turns", "in halves"):
        for rank in range(2):
            found = json.loads((tmp_path / f"{case}{rank}.json").read_text())
            assert found == pytest.approx(expected, rel=1e-9), case  # float64 sums in another order


def test_further_spaces_are_scored_beside_the_main_one(pixels, make_pixels, real, fake):
    other = make_pixels(num_features=4, num_logits=None, name="other")
    other.suffix, other.agreed_samples = "_other", 1000
    clip = make_pixels(num_features=4, num_logits=None, name="clip")
    clip.suffix = "_clip"
    metrics = GenerativeMetrics(pixels, also=[other, clip], kid_subsets=2, bootstrap=20)
    with pytest.raises(ValueError, match="set_reference"):
        metrics.compute()
    for space in metrics.spaces:
        metrics.set_reference(real, space=space.features)
    metrics.update(fake)
    assert pixels.seen == other.seen == 600 + 400  # one pass a space
    values = metrics.compute()
    figures = {name for name in values if not name.endswith(("_low", "_high"))}
    assert figures == {
        "fid", "kid", "kid_std", "kid_se", "inception_score", "fd_other_400", "kid_other", "kid_std_other",
        "kid_se_other", "fd_clip", "kid_clip", "kid_std_clip", "kid_se_clip", "cmmd",
    }  # fmt: skip
    assert values["fid"] == values["fd_other_400"] == values["fd_clip"]  # the same features under other names
    assert values["fd_other_400_low"] < values["fd_other_400"] < values["fd_other_400_high"]
    report = metrics.report(values).to_dict()
    assert set(report["spaces"]) == {"other", "clip"} and report["spaces"]["other"]["fingerprint"] == other.fingerprint
    assert metrics.compute(intervals=False).keys() == figures


def test_judging_by_captions_that_nobody_has_costs_one_line(caplog):
    from ornstein.metrics import DigitsFeatures

    metrics = GenerativeMetrics(DigitsFeatures(), bootstrap=0, text_alignment=True)
    images = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    metrics.set_reference(images)
    metrics.update(images)
    for _ in range(2):
        assert "text_alignment_r1" not in metrics.compute()
    assert [line for line in caplog.messages if "captions" in line] == [
        "metrics.text_alignment is left out: the samples have no captions to be judged by."
    ]
