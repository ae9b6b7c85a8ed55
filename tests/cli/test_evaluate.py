"""What ``evaluate.py`` says of figures that rest on too few samples."""

from __future__ import annotations

import pytest

from ornstein.cli.evaluate import too_few
from ornstein.metrics.report import MetricReport


@pytest.mark.parametrize(
    ("count", "fid", "floor", "words"),
    [
        (64, 80.0, 3.0, "num_samples=64 64 features at least 65 640"),
        (2, 80.0, 100.0, "num_samples=2 at least 65"),
        (65, 80.0, 45.0, "FID of 45 fid_floor 80 65 samples"),
        (65, 80.0, 40.0, None),
        (1000, 6.0, 2.0, None),
        (1000, 2.0, 1.5, "FID of 1.5 1,000 samples"),
        (1000, 6.0, None, None),
    ],
)
def test_few_samples_are_warned_about(count: int, fid: float, floor: float | None, words: str | None) -> None:
    values = {"fid": fid} | ({} if floor is None else {"fid_floor": floor})
    report = MetricReport(
        values=values,
        num_samples=count,
        reference={},
        extractor="digits",
        fingerprint="",
        settings={"num_features": 64},
    )
    told = too_few(report)
    if words is None:
        assert told is None
    else:
        assert told is not None and [word for word in words.split() if word not in told] == [], told
