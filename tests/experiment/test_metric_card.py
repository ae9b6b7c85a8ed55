"""The metric card: nothing that decides a figure is missing from it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ornstein.experiment.metric_card import card_text, draw_card, facts_of, figures_of, headline, show


def report(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "values": {"fid_1k": 2.5, "fid_1k_low": 2.0, "fid_1k_high": 3.25, "kid": None, "fid_floor": 0.5},
        "num_samples": 1000,
        "reference": {"count": 1438, "split": "train", "data": "d" * 64, "image_size": 8},
        "extractor": "digits",
        "fingerprint": "f" * 64,
        "label_protocol": "balanced",
        "settings": {"kid_subsets": 50, "kid_subset_size": 500, "bootstrap": 100},
        "sampling": {
            "images_seen": 19_200,
            "weights": "ema",
            "ema": {"decay": 0.999},
            "sampler": "DDIM",
            "grid": "Uniform",
            "steps": 10,
            "nfe": 20,
            "guidance": "ClassifierFree",
            "guidance_scale": 1.5,
            "seed": 7,
            "first_index": 100,
        },
        "floor": {"fid": 0.7, "count": 719, "inception_score": 7.7},
        "memorisation": {"sample_median": 0.9, "held_out_median": 0.8},
        "versions": {"torch": "2.13.0", "torchmetrics": "absent"},
    }
    return made | changes


BELIEVE = (
    "1,000, rounded to uint8",
    "class i mod the number of classes",
    "1438 images, train, data dddddddddddd, 8 pixels",
    "digits, fingerprint ffffffffffff",
    "95 %, 100 resamples",
    "50 subsets of at most 500",
    "ema (decay 0.999), 19,200 images seen",
    "DDIM, 10 steps on the grid Uniform, NFE 20",
    "ClassifierFree, scale 1.5",
    "7, samples from number 100 on",
    "0.7 between two sets of 719 real images",
    "0.9 of samples, 0.8 of held-out images",
)


def test_what_it_takes_to_believe_a_figure_stands_on_the_card() -> None:
    text = card_text(report(), title="a run", pictures=[("Samples", "samples/first_samples.png")])
    assert [words for words in BELIEVE if words not in text] == []
    assert "| fid_1k | 2.5 (2 to 3.25) |" in text and "![Samples](samples/first_samples.png)" in text
    assert text.startswith("# Metric card: a run\n\n**fid_1k 2.5 (2 to 3.25) of 1,000 samples; as many real images")
    assert dict(facts_of(report()))["versions"] == "torch 2.13.0"


def test_intervals_stand_beside_their_figure() -> None:
    figures = {figure.name: figure for figure in figures_of(report())}
    assert list(figures) == ["fid_1k", "kid", "fid_floor"]
    assert figures["fid_1k"].interval == (2.0, 3.25) and figures["fid_floor"].interval is None
    assert math.isnan(figures["kid"].value)
    assert "as many real images" in figures["fid_floor"].meaning and "smaller is better" in figures["fid_1k"].meaning


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fd_efficientnet_1k": 30.0}, "fd_efficientnet_1k 30 of 1,000 samples"),
        ({"kid": 0.1}, "no Fréchet distance was taken"),
    ],
)
def test_headline(values: dict[str, float], words: str) -> None:
    assert headline(report(values=values)) == words


def test_bare_reports_have_a_card_too() -> None:
    """Such as a published reference without images behind it, and samples of which nothing is told."""
    bare = report(reference={"count": 0, "file": "adm.npz"}, sampling={}, settings={}, floor=None, memorisation=None)
    told = dict(facts_of(bare))
    assert told["reference"] == "an untold number of images, adm.npz"
    assert {"sampler", "floor", "KID", "intervals"}.isdisjoint(told)


@pytest.mark.parametrize("size", [None, (400, 320), (3000, 100)])
def test_the_page_is_legible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] | None) -> None:
    from matplotlib.figure import Figure

    made: list[Figure] = []
    begin = Figure.__init__
    monkeypatch.setattr(Figure, "__init__", lambda self, *a, **k: (begin(self, *a, **k), made.append(self))[0])
    picture = None if size is None else Image.new("L", size)
    path = draw_card(report(), tmp_path / "card.png", title="a run", samples=picture, neighbours=picture)
    with Image.open(path) as written:
        assert written.width > 900 and written.height > 500
    page = made[-1]
    boxes = [text.get_window_extent() for text in page.texts if text.get_text()]
    boxes += [axis.get_window_extent() for axis in page.axes]
    for one, other in itertools.combinations(boxes, 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert width < 1 or height < 1, (one, other)
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.bbox.x1 and box.y1 <= page.bbox.y1, box
    assert [file.name for file in tmp_path.iterdir()] == ["card.png"]


def test_it_prints_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    show(report(), 1.5)
    text = capsys.readouterr().out
    assert "1000 samples in the digits feature space, 1.5 s" in text and "2.5 (2 to 3.25)" in text and "NFE 20" in text
