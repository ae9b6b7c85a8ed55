from __future__ import annotations

import json
import logging

import pytest
from PIL import Image

from ornstein.codecs import Identity
from ornstein.data import DataModule, Digits
from ornstein.errors import OrnsteinError
from ornstein.metrics import DigitsFeatures, GenerativeMetrics, WeightsMissing
from ornstein.training.callbacks import Checkpoint, GenerativeEvaluation, Throughput
from ornstein.training.ema import EMA


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORNSTEIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def digits_run(fit, make_module, conv):
    """A run on the real digits, whose feature net is the shipped one."""

    def run(callbacks, *, steps, **options):
        module = make_module(network=conv(10), classes=10, codec=Identity(1, 8, sigma_data=0.75))
        return fit(callbacks, steps=steps, module=module, data=DataModule(Digits, batch_size=16), **options)

    return run


@pytest.fixture
def conv(make_module):
    return lambda classes: type(make_module().network)(classes)


def make_metrics():
    return GenerativeMetrics(DigitsFeatures(), num_samples=60, kid_subset_size=20, kid_subsets=4)


def test_figures_are_logged_beside_their_floor(digits_run, rows, tmp_path):
    logger = rows()
    evaluation = GenerativeEvaluation(tmp_path, metrics=make_metrics, every=2, batch_size=25)
    checkpoint = Checkpoint(tmp_path, every=None, monitor="val/fid")
    trainer = digits_run([EMA(), evaluation, Throughput(), checkpoint], steps=3, logger=logger)
    assert {step for step, row in logger.rows.items() if "val/fid_60" in row} == {2, 3}
    taken = {"fid_60", "kid", "inception_score_60", "label_accuracy"}
    names = taken | {"kid_std", "kid_se", "fid_floor", "real_inception_score"}
    ends = {f"{name}_{end}" for name in taken for end in ("low", "high")}
    assert {name[4:] for name in logger.rows[2] if name.startswith("val/")} == names
    assert {name[4:] for name in logger.rows[3] if name.startswith("val/")} == names | ends | {"memorised_share"}
    last = logger.rows[3]
    assert last["val/fid_60"] > 3 * last["val/fid_floor"] > 0  # three steps make no digits
    assert last["val/fid_60_low"] < last["val/fid_60"] < last["val/fid_60_high"]
    assert 0 <= last["val/label_accuracy"] <= 1
    assert 1 <= last["val/inception_score_60"] < last["val/real_inception_score"] < 10
    # the checkpoint's "val/fid" is the figure that bears its number
    assert checkpoint.best_score == pytest.approx(min(logger.rows[step]["val/fid_60"] for step in (2, 3)), rel=1e-12)
    picture = Image.open(tmp_path / "samples" / "nearest_training_images.png").convert("L")
    assert len(picture.getcolors()) > 20 and picture.height > 10 * 64

    assert [(name, step) for name, step in logger.pictures if "best" in name] == [("samples/best_and_worst", 3)]
    assert Image.open(tmp_path / "samples" / "best_and_worst.png").width > 8 * 72

    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["num_samples"] == 60 and report["extractor"] == "digits" and report["label_protocol"] == "balanced"
    assert report["values"]["fid_60"] == last["val/fid_60"]
    assert report["sampling"]["step"] == 3 and report["sampling"]["weights"] == "ema"
    assert report["sampling"]["ema"] == {"decay": 0.9999, "warmup": True, "every": 1, "updates": 3}
    assert report["settings"]["agreed_samples"] == 1438 and "uint8" in report["settings"]["images"]
    assert report["memorisation"]["share"] == pytest.approx(last["val/memorised_share"])
    assert evaluation.summary()["nfe"] == 4 and evaluation.summary()["num_samples"] == 60

    # the figures are those of samples 0 to 59 of the averaged weights
    metrics = make_metrics()
    metrics.set_reference(trainer.datamodule.train)
    (drawn,) = trainer.lightning_module.generate(range(60), seed=0)
    metrics.update(drawn.images, drawn.labels)
    # rounding of batches of another size may move a pixel by one level
    assert metrics.compute()["fid_60"] == pytest.approx(last["val/fid_60"], rel=1e-3)


def test_missing_weights_are_one_line_and_training_goes_on(digits_run, rows, tmp_path, caplog):
    def missing():
        raise WeightsMissing("Inception's weights are nowhere.")

    logger = rows()
    with caplog.at_level(logging.WARNING, logger="ornstein"):
        digits_run([GenerativeEvaluation(tmp_path, metrics=missing, every=1)], steps=3, logger=logger)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("ornstein")]
    assert said == ["no figures of the samples: Inception's weights are nowhere."]
    assert logger.rows == {}


@pytest.mark.parametrize(
    "options", [{"metrics": None}, {"metrics": lambda: None}, {"metrics": make_metrics, "num_samples": 0}]
)
def test_nothing_to_measure_with(digits_run, rows, tmp_path, options):
    logger = rows()
    evaluation = GenerativeEvaluation(tmp_path, **options)
    digits_run([evaluation], steps=1, logger=logger)
    assert logger.rows == {} and evaluation.summary() == {}


@pytest.mark.parametrize("named", [True, False])
def test_captions_reach_the_clip_score(fit, make_module, make_data, tmp_path, monkeypatch, named):
    """With a CLIP model, a sample is judged by the caption of a training image of its class; without, by none."""
    asked = []

    class Metrics:
        clip = object()
        names_clip = named
        num_samples = 6
        best_worst = 0

        def to(self, device):
            return self

        def reset(self):
            pass

        def ticks(self, **options):
            return 0

        def update(self, images, labels, *, captions, index):
            asked.extend(zip(labels.tolist(), captions or [None] * len(labels), strict=True))

        def compute(self, **options):
            return {"clip_score": 20.0}

        def report(self, values, **kwargs):
            return type("Report", (), {"to_json": lambda self, path: None})()

    from ornstein.training import scoring

    floor = type("Floor", (), {"to_dict": lambda self: {}})
    for name, made in [
        ("set_references", None),
        ("floor_of", floor()),
        ("further_floors", {}),
        ("figures_beside", {}),
        ("memorisation", {"share": 0.05}),
        ("draw_neighbours", Image.new("RGB", (1, 1))),
    ]:
        monkeypatch.setattr(scoring, name, lambda *args, made=made, **kwargs: made)
    data = make_data()
    data.setup()
    data.train.captions = [f"a {name}" for name in ["red", "green", "blue"] * 8]
    trainer = fit([GenerativeEvaluation(tmp_path, metrics=Metrics)], steps=1, data=data)
    assert asked == [(label, f"a {name}" if named else None) for label, name in enumerate(["red", "green", "blue"])] * 2
    assert float(trainer.callback_metrics["val/clip_score"]) == 20.0


@pytest.mark.parametrize("options", [{"num_samples": -1}, {"batch_size": 0}])
def test_refuses(tmp_path, options):
    with pytest.raises(OrnsteinError, match=r"callbacks\.evaluation"):
        GenerativeEvaluation(tmp_path, metrics=None, **options)
