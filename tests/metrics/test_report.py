import json

import pytest

from ornstein.metrics.report import MetricReport


def _report(**changes):
    return MetricReport(**{"values": {"fid": 1.5}, "num_samples": 10, "reference": {}, "extractor": "digits",
                           "fingerprint": "ab", **changes})  # fmt: skip


def test_a_report_is_strict_json_even_with_numbers_that_are_none():
    text = _report(values={"fid": float("nan"), "kid": float("inf"), "inception_score": 2.0}).to_json()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert stored["values"] == {"fid": None, "kid": None, "inception_score": 2.0}


def test_a_report_on_disk_is_whole(tmp_path):
    report = _report(sampling={"sampler": "heun", "grid": (1, 0)})
    path = tmp_path / "run" / "report.json"
    assert report.to_json(path) == path.read_text()
    report.to_json(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]
    assert json.loads(path.read_text())["sampling"]["grid"] == [1, 0]
