import math
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ornstein.errors import OrnsteinError
from ornstein.experiment.metrics_file import MetricsFile, read_metrics


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    draw = random.Random(0)
    floats = [struct.unpack("<d", draw.randbytes(8))[0] for _ in range(300)]
    floats = [each for each in floats if not math.isnan(each)] + [0.1, -0.0, 1e-320, math.inf, -math.inf, 1.0]
    file = MetricsFile(tmp_path / "metrics.csv")
    for step, value in enumerate(floats):
        file.add({"x": value, "n": step}, step=step)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [repr(row["x"]) for row in rows] == [repr(value) for value in floats]
    assert [row["n"] for row in rows] == list(range(len(floats)))
    assert all(type(row["n"]) is int and type(row["x"]) is float for row in rows)


def test_nan_text_and_scalars_of_torch_and_numpy(tmp_path: Path) -> None:
    import torch

    file = MetricsFile(tmp_path / "metrics.csv")
    values = {
        "nan": float("nan"),
        "t": torch.tensor(0.1),
        "n": np.float64(0.1),
        "b": True,
        "s": 'a,"b"\nc',
        "k,": 1,
    }
    file.add(values, step=0)
    (row,) = read_metrics(tmp_path / "metrics.csv")
    assert math.isnan(row.pop("nan"))  # type: ignore[arg-type]
    assert row == {"step": 0, "t": torch.tensor(0.1).item(), "n": 0.1, "b": 1, "s": 'a,"b" c', "k,": 1}


def test_a_step_has_one_row_and_columns_grow(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    file.add({"loss": 1.0}, step=0)
    file.add({"val": 2.0}, step=0)
    file.add({"loss": 0.5}, step=1)
    file.add({"loss": 0.25}, step=1)
    file.add({"fid": 7.0, "loss": 0.125}, step=2)
    assert path.read_text() == "step,loss,val,fid\n0,1.0,2.0,\n1,0.25,,\n2,0.125,,7.0\n"
    assert file.last_step == 2


@pytest.mark.parametrize("reopen", [False, True])
def test_any_order_of_steps_equals_a_dictionary(tmp_path: Path, reopen: bool) -> None:
    """Random steps, near and far from the end, with values of all lengths, against the obvious model."""
    draw = random.Random(1)
    path, expected, file = tmp_path / "m.csv", {}, None
    for turn in range(600):
        file = file if file is not None else MetricsFile(path)
        step = max(0, turn // 3 + (draw.randint(-60, 0) if turn % 50 == 0 else draw.randint(-3, 3)))
        cells: dict[str, Any] = {draw.choice("abcdef"): draw.choice([0.1 + 0.2, 1, 1e300, -5.5, 12345678])}
        file.add(cells, step=step)
        expected.setdefault(step, {"step": step}).update(cells)
        if reopen and turn % 37 == 0:
            file.close()
            file = None
    assert read_metrics(path) == [expected[step] for step in sorted(expected)]


TORN = [
    ("step,a,b\n0,1,2\n1,3", [{"step": 0, "a": 1, "b": 2}]),
    ("step,a,b\n0,1,2\n1,3,4", [{"step": 0, "a": 1, "b": 2}]),  # the last digit may be missing
    ("step,a,b\n0,1,2\n1,3\n", [{"step": 0, "a": 1, "b": 2}]),
    ("step,a,b\n0,1,2\n,,9\n", [{"step": 0, "a": 1, "b": 2}]),
    ("step,a,b\n0,1,2\n0,1,5\n", [{"step": 0, "a": 1, "b": 5}]),
    ("step,a", []),
    ("", []),
]


@pytest.mark.parametrize(("text", "rows"), TORN)
def test_a_torn_file_is_repaired(tmp_path: Path, text: str, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    assert read_metrics(path) == rows
    MetricsFile(path).add({"a": 8}, step=7)
    assert read_metrics(path) == [*rows, {"step": 7, "a": 8}]
    assert path.read_text().count("\n") == len(rows) + 2


@pytest.mark.parametrize("after", [-1, 0, 3, 50, 99, 1000])
def test_truncate(tmp_path: Path, after: int) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    for step in range(100):
        file.add({"x": step / 3}, step=step)
    assert file.truncate(after_step=after) == 100 - min(100, after + 1)
    for step in range(max(0, after - 1), 100):  # again from a little earlier: the same values, no double
        file.add({"x": step / 3}, step=step)
    assert read_metrics(path) == [{"step": step, "x": step / 3} for step in range(100)]


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(OrnsteinError, match="logged anything"):
        read_metrics(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(OrnsteinError, match=r"no metrics\.csv"):
        MetricsFile(tmp_path / "other.csv")
    file = MetricsFile(tmp_path / "m.csv")
    for metrics, step, sentence in [
        ({"x": [1]}, 0, "is a list"),
        ({"x": np.zeros(2)}, 0, "is a ndarray"),
        ({"x": 1}, -1, ">= 0"),
        ({"a\nb": 1}, 0, "break"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            file.add(metrics, step=step)
    assert read_metrics(tmp_path / "m.csv") == []


def test_a_failing_rewrite_leaves_the_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(tmp_path / "m.csv")
    file.add({"a": 1}, step=0)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        file.add({"b": 1}, step=1)
    monkeypatch.undo()
    assert read_metrics(tmp_path / "m.csv") == [{"step": 0, "a": 1}]
    file.add({"b": 1}, step=1)  # and logging goes on when there is room again
    assert read_metrics(tmp_path / "m.csv") == [{"step": 0, "a": 1}, {"step": 1, "b": 1}]


WRITER = """
import sys
from ornstein.experiment.metrics_file import MetricsFile, read_metrics
path, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
file = MetricsFile(path)
file.truncate(after_step=start)
print("writing", flush=True)
for step in range(start + 1, stop):
    file.add({"loss": step / 7, "text": "x" * (step % 40)}, step=step)
    if step % 5 == 0:
        file.add({"val": step / 3}, step=step)
    if step % 97 == 0:
        file.add({f"new{step % 4}": step}, step=step)
"""


def _write(path: Path, start: int, stop: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(path), str(start), str(stop)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def test_killed_while_writing_then_resumed_gives_each_step_once(tmp_path: Path) -> None:
    path, undisturbed = tmp_path / "killed.csv", tmp_path / "undisturbed.csv"
    reached = -1
    for round_ in range(6):
        process = _write(path, reached, 10**9)
        while not path.exists() or path.stat().st_size < 4000 * (round_ + 1):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps = [int(row["step"]) for row in read_metrics(path)]
        assert steps == list(range(len(steps))), "no step missing, none twice, after the kill"
        reached = max(reached, int(steps[-1]) - 13)  # the checkpoint lies a little behind
    total = reached + 50
    assert _write(path, reached, total).wait() == 0
    assert _write(undisturbed, -1, total).wait() == 0
    assert read_metrics(path) == read_metrics(undisturbed)
    assert len(read_metrics(path)) == total
