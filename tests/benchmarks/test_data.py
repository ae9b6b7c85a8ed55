"""The loader benchmark, from end to end on a few files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_loaders_run_side_by_side(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    command = [sys.executable, str(ROOT / "benchmarks" / "data.py"), "--quick", "--workers", "0"]
    files = ["--json", str(tmp_path / "figures.json"), "--markdown", str(tmp_path / "table.md")]
    done = subprocess.run(
        [*command, *files], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rates = json.loads((tmp_path / "figures.json").read_text())["images_per_s"]["0"]
    assert set(rates) >= {"ours, prepared", "ours, decoding", "torchvision"}
    assert all(min(each) > 0 for each in rates.values())
    assert "ours / it" in done.stdout and (tmp_path / "table.md").read_text().count("|") > 20
    # Not decoding at all is tens of times faster than decoding, whatever else the machine does.
    assert min(rates["ours, prepared"]) > 3 * max(rates["torchvision"])
