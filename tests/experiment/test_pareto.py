"""A grid of evaluations as a table and a picture: the front against brute force, and what is drawn where."""

from __future__ import annotations

import csv
import io
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ornstein.experiment import pareto
from ornstein.experiment.pareto import Cell, pareto_front, records


def cell(job: int, value: float = 1.0, nfe: float | None = 10, error: str | None = None, **keys: str) -> Cell:
    named = {name.replace("__", "."): text for name, text in keys.items()}
    figures = {} if error else {"fid_1k": value, "kid": value / 100, "fid_floor": 0.5}
    return Cell(job, named, figures, nfe, 100.0 / (nfe or 1), None if error else "fid_1k", error=error)


def test_the_front_is_what_nothing_dominates() -> None:
    rng = random.Random(0)
    for _ in range(50):
        points = [(float(rng.randint(1, 8)), float(rng.randint(1, 8))) for _ in range(rng.randint(0, 15))]

        def dominated(i: int, points: list[tuple[float, float]] = points) -> bool:
            (x, y) = points[i]
            return any((u, v) != (x, y) and u <= x and v <= y for u, v in points) or points.index((x, y)) < i

        expected = {i for i in range(len(points)) if not dominated(i)}
        front = pareto_front(points)
        assert set(front) == expected and len(front) == len(expected)
        assert [points[i] for i in front] == sorted(points[i] for i in front)


def test_rows_are_best_first_and_of_one_shape() -> None:
    cells = [
        cell(0, 3.0, sampler="ddim"),
        cell(1, error="it cannot", sampler="nope"),
        cell(2, 1.0, sampler="heun", guidance__scale="2"),
        cell(3, math.nan, sampler="lms"),
    ]
    rows = records(cells)
    assert [row["job"] for row in rows] == [2, 0, 3, 1]
    assert len({tuple(row) for row in rows}) == 1 and rows[0]["fid_1k"] == 1.0 and rows[0]["guidance.scale"] == "2"
    assert rows[2]["fid_1k"] is None and rows[3]["error"] == "it cannot" and rows[3]["fid_1k"] is None
    read = list(csv.DictReader(io.StringIO(pareto.csv_text(rows))))
    assert [row["job"] for row in read] == ["2", "0", "3", "1"] and read[0]["kid"] == "0.01" and read[3]["fid_1k"] == ""
    assert pareto.csv_text([]) == "job\n"


@pytest.mark.parametrize(
    ("keys", "panel", "curve"),
    [
        (
            {"sampler": "ddim", "sampler.steps": "5", "guidance": "cfg", "guidance.scale": "1.5"},
            "cfg, scale 1.5",
            "ddim",
        ),
        ({"sampler.steps": "5"}, "", "DDIM"),
        ({"sampler": "heun", "sampler/grid": "karras", "seed": "1"}, "", "heun, grid karras, seed 1"),
        ({"guidance": "none", "sampler.eta": "0.5"}, "none", "DDIM, eta 0.5"),
    ],
)
def test_panels_are_guidances_and_curves_all_else(keys: dict[str, str], panel: str, curve: str) -> None:
    one = Cell(0, keys, report={"sampling": {"sampler": "DDIM"}})
    assert (pareto.guidance_of(one), pareto.series_of(one)) == (panel, curve)


def test_numbers_in_names_are_sorted_as_numbers() -> None:
    names = ["scale 10", "scale 9", "none", "scale 1.5"]
    assert sorted(names, key=pareto.natural) == ["none", "scale 1.5", "scale 9", "scale 10"]


def grid(scales: tuple[str, ...] = ("1", "3")) -> list[Cell]:
    options = itertools.product(("ddim", "heun"), (5, 10, 20), scales)
    return [
        cell(
            i,
            8.0 / steps * float(w),
            nfe=steps * (2 if name == "heun" else 1),
            sampler=name,
            sampler__steps=str(steps),
            guidance__scale=w,
        )
        for i, (name, steps, w) in enumerate(options)
    ]


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Draws, and gives the matplotlib figure that was written."""
    from matplotlib.figure import Figure

    made: list[Figure] = []
    begin = Figure.__init__

    def remembered(self: Figure, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(Figure, "__init__", remembered)

    def draw(*args: Any, **options: Any) -> Figure:
        assert pareto.draw(*args, **options) is not None
        return made[-1]

    return draw


def test_the_picture_shows_the_cells(tmp_path: Path, figure: Callable[..., Any]) -> None:
    failed = cell(99, error="sampler=nope cannot", sampler="nope")
    drawn = figure([*grid(), failed], tmp_path / "pareto.png", title="run", notes=["1,000 samples."])
    assert [axis.get_title(loc="left") for axis in drawn.axes] == ["scale 1", "scale 3"]
    for axis, w in zip(drawn.axes, (1, 3), strict=True):
        assert axis.get_xscale() == "log"
        lines = {line.get_marker(): line for line in axis.lines if line.get_marker() not in ("None", None, "")}
        assert np.allclose(lines["o"].get_data(), [[5, 10, 20], [8 / 5 * w, 8 / 10 * w, 8 / 20 * w]])
        assert np.allclose(lines["s"].get_data()[0], [10, 20, 40])
        assert any(np.allclose(line.get_ydata(), 0.5) for line in axis.lines), "the floor"
        thick = max(axis.lines, key=lambda line: line.get_linewidth())
        assert np.allclose(thick.get_ydata()[:3], [8 / 5 * w, 8 / 10 * w, 8 / 20 * w]), "the front is ddim's"
    legend = {text.get_text() for text in drawn.legends[0].get_texts()}
    assert legend == {"ddim", "heun", "Pareto front", "front of all panels", "real against real (floor)"}
    footer = drawn.texts[-1].get_text()
    assert "1,000 samples." in footer and "failed: sampler=nope: sampler=nope cannot" in footer


def test_intervals_are_bars(tmp_path: Path, figure: Callable[..., Any]) -> None:
    cells = [
        Cell(i, {"sampler.steps": str(n)}, {"fid": 2.0, "fid_low": 1.5, "fid_high": 3.0}, n, 1.0, "fid")
        for i, n in enumerate((5, 10))
    ]
    drawn = figure(cells, tmp_path / "pareto.png", title="run")
    (axis,) = drawn.axes
    bars = [container.lines[2][0].get_segments()[0] for container in axis.containers]
    assert [bar[:, 1].tolist() for bar in bars] == [[1.5, 3.0]] * 2


@pytest.mark.parametrize("scales", [("1",), ("1", "1.5", "3"), tuple(map(str, range(1, 8)))])
def test_no_text_of_the_picture_lies_on_another(
    tmp_path: Path, figure: Callable[..., Any], scales: tuple[str, ...]
) -> None:
    notes = ["a note that is long enough to need more than one line of the footer " * 3]
    failed = [cell(90 + i, error="a reason that goes on and on " * 5, sampler="nope") for i in range(3)]
    drawn = figure([*grid(scales), *failed], tmp_path / "pareto.png", title="a run", notes=notes)
    page = drawn.bbox
    boxes = [axis.get_tightbbox() for axis in drawn.axes if axis.get_visible()]
    boxes += [text.get_window_extent() for text in drawn.texts] + [drawn.legends[0].get_window_extent()]
    for one, other in itertools.combinations(boxes, 2):
        # Panels share an edge's breadth of ticks; anything more is an overlap that a reader sees.
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert width < 3 or height < 3, (one, other)
    for box in boxes:
        assert box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1 + 1, box


def test_nothing_is_drawn_of_cells_without_figures(tmp_path: Path) -> None:
    cells = [cell(0, error="no"), Cell(1, {}, {"psnr": 20.0})]
    assert pareto.draw(cells, tmp_path / "pareto.png", title="run") is None and not list(tmp_path.iterdir())


def test_the_printed_table_is_sorted_and_names_failures(capsys: pytest.CaptureFixture[str]) -> None:
    pareto.show([*grid(), cell(99, error="it cannot", sampler="nope")])
    text = capsys.readouterr().out
    values = [float(line.split("│")[4]) for line in text.splitlines() if line.startswith("│")]
    assert values == sorted(values) and len(values) == 12
    assert "failed: sampler=nope: it cannot" in text and "fid_1k" in text and "samples/s" in text
