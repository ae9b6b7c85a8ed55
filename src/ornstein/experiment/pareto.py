"""A grid of evaluations as one table and one picture: quality against what a sample costs."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ornstein.experiment.atomic import replace_file

STEPS = "sampler.steps"
_MARKERS = "osD^vP*X<>"
_PANEL = (4.6, 3.9)  # inches
_COLUMNS = 3  # of panels, at most


@dataclass(frozen=True)
class Cell:
    """One evaluation of a grid.

    Attributes:
        job: its number.
        keys: what was swept, as typed: ``{"sampler": "ddim", "sampler.steps": "10"}``.
        figures: by name; empty where it failed.
        nfe: network evaluations a sample, or None.
        samples_per_s: or None.
        main: name of its Fréchet distance, or None where there is none.
        report: ``evaluation.json``.
        error: why it failed, in a sentence; None where it did not.
        folder: below the grid's.
    """

    job: int
    keys: Mapping[str, str]
    figures: Mapping[str, float] = field(default_factory=dict)
    nfe: float | None = None
    samples_per_s: float | None = None
    main: str | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    folder: str = ""

    @property
    def value(self) -> float:
        """The main figure; NaN where there is none."""
        return self.figures.get(self.main, math.nan) if self.main else math.nan

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its 95 % interval, where one was taken."""
        low, high = (self.figures.get(f"{self.main}_{end}") for end in ("low", "high"))
        return None if low is None or high is None else (low, high)

    @property
    def drawn(self) -> bool:
        """Whether it is a point of the picture."""
        return self.nfe is not None and self.nfe > 0 and math.isfinite(self.value)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of ``(cost, value)`` no other is at most equal to in both and better in one; by cost, then by value.

    Of equal points the first counts. Smaller is better in both.
    """
    front: list[int] = []
    best = math.inf
    for number in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if points[number][1] < best:
            best = points[number][1]
            front.append(number)
    return front


def guidance_of(cell: Cell) -> str:
    """The panel that a cell is drawn in: its guidance and the guidance's own swept numbers, ``cfg, scale 1.5``."""
    option = cell.keys.get("guidance", "")
    numbers = [f"{key.partition('.')[2]} {value}" for key, value in cell.keys.items() if key.startswith("guidance.")]
    return ", ".join(part for part in (option, *numbers) if part)


def series_of(cell: Cell) -> str:
    """The curve that a cell lies on: its sampler and all else that was swept, but steps and guidance."""
    sampler = cell.keys.get("sampler") or str(cell.report.get("sampling", {}).get("sampler", ""))
    others = [
        f"{key.removeprefix('sampler.').removeprefix('sampler/')} {value}"
        for key, value in cell.keys.items()
        if key not in ("sampler", STEPS, "guidance") and not key.startswith("guidance.")
    ]
    return ", ".join(part for part in (sampler, *others) if part)


def natural(text: str) -> list[tuple[int, float, str]]:
    """Sorts texts with numbers in them as a person would: ``scale 3`` before ``scale 10``."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(part), "") if part[:1].isdigit() else (1, 0.0, part) for part in parts if part]


def ranked(cells: Sequence[Cell]) -> list[Cell]:
    """The best main figure first, those without one after them, those that failed last; else in order of job."""
    return sorted(
        cells, key=lambda cell: (cell.error is not None, not cell.drawn, cell.value if cell.drawn else 0.0, cell.job)
    )


def records(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row a cell, best first, all rows with the same columns; None where a cell has no value."""
    ordered = ranked(cells)
    keys = _names(cell.keys for cell in ordered)
    figures = _names(cell.figures for cell in ordered)
    return [
        {
            "job": cell.job,
            **{key: cell.keys.get(key) for key in keys},
            **{name: _finite(cell.figures.get(name)) for name in figures},
            "nfe": cell.nfe,
            "samples_per_s": cell.samples_per_s,
            "error": cell.error,
        }
        for cell in ordered
    ]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """:func:`records` as CSV with a header; an empty field where there is no value."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["job"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def show(cells: Sequence[Cell], *, beside: int = 4) -> None:
    """Prints the table, best first: what was swept, the main figure with its interval, NFE, samples/s, and the first
    ``beside`` other figures; and a line for each cell that failed.
    """
    from rich.console import Console
    from rich.table import Table

    ordered = ranked(cells)
    good = [cell for cell in ordered if cell.error is None]
    keys = _names(cell.keys for cell in good)
    main = next((cell.main for cell in good if cell.main), None)
    dull = re.compile(r"kid_(std|se).*|.*_(low|high|floor|std)|memorised_share|real_inception_score")
    others = [name for name in _names(cell.figures for cell in good) if name != main and not dull.fullmatch(name)]
    table = Table(title="best first" if main else None, title_justify="left")
    for key in keys:
        table.add_column(key)
    for name in (*([main] if main else []), "NFE", "samples/s", *others[:beside]):
        table.add_column(name, justify="right")
    for cell in good:
        row = [str(cell.keys.get(key, "")) for key in keys]
        if main:
            spread = "" if cell.interval is None else f" ({cell.interval[0]:.3g} to {cell.interval[1]:.3g})"
            row.append(f"{cell.value:.4g}{spread}" if math.isfinite(cell.value) else "-")
        row += ["-" if value is None else f"{value:.4g}" for value in (cell.nfe, cell.samples_per_s)]
        row += [f"{cell.figures[name]:.4g}" if name in cell.figures else "-" for name in others[:beside]]
        table.add_row(*row)
    console = Console()
    if good:
        # A pipe has no width of its own: leave the figures whole there.
        (console if console.is_terminal else Console(width=200)).print(table)
    for sentence in failures(cells):
        print(sentence)


def failures(cells: Sequence[Cell]) -> list[str]:
    """A sentence for each cell that failed: what it was asked for, and why it could not."""
    failed = [cell for cell in cells if cell.error is not None]
    return [
        f"failed: {' '.join(f'{key}={value}' for key, value in cell.keys.items())}: {cell.error}" for cell in failed
    ]


def draw(cells: Sequence[Cell], path: str | Path, *, title: str, notes: Sequence[str] = ()) -> Path | None:
    """Writes the Pareto picture, atomically; None where no cell has both a figure and a cost.

    The main figure against NFE, a panel a guidance, a colour and marker a sampler, the panel's Pareto front as a thick
    line and that of all panels as a dashed one, the real-vs-real floor as a line, intervals as bars.

    Args:
        cells: of the grid; those that failed are named below.
        path: of the PNG.
        title: of the picture.
        notes: sentences for the footer, before the failures.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    drawn = [cell for cell in cells if cell.drawn]
    if not drawn:
        return None
    panels = sorted({guidance_of(cell) for cell in drawn}, key=natural)
    curves = sorted({series_of(cell) for cell in drawn}, key=natural)
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    width = max(6.4, _PANEL[0] * columns + 0.4)
    footer = _footer([*notes, *failures(cells)], width)
    legend_rows = -(-(len(curves) + 3) // max(1, int(width / 1.9)))
    margins = {"bottom": 0.34 + 0.23 * legend_rows + 0.155 * len(footer), "top": 0.78}
    height = _PANEL[1] * rows + sum(margins.values())
    figure = Figure(figsize=(width, height), dpi=120)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(
        left=0.72 / width,
        right=1 - 0.18 / width,
        bottom=(margins["bottom"] + 0.42) / height,
        top=1 - margins["top"] / height,
        hspace=0.28,
        wspace=0.07,
    )
    main = ", ".join(dict.fromkeys(str(cell.main) for cell in drawn))
    costs = sorted({cell.nfe for cell in drawn if cell.nfe is not None})
    overall = _line(drawn, costs[-1])
    floors = {round(floor, 12) for cell in drawn if (floor := floor_of(cell)) is not None}
    handles: dict[str, Any] = {}
    for number, axis in enumerate(axes.flat):
        if number >= len(panels):
            axis.set_visible(False)
            continue
        mine = [cell for cell in drawn if guidance_of(cell) == panels[number]]
        if len(panels) > 1:
            (handles["front of all panels"],) = axis.step(
                *overall, where="post", color="0.55", ls="--", lw=1.1, zorder=1
            )
        (handles["Pareto front"],) = axis.step(
            *_line(mine, costs[-1]), where="post", color="0.25", lw=2.2, alpha=0.55, zorder=2
        )
        for floor in floors:
            handles["real against real (floor)"] = axis.axhline(floor, color="tab:green", ls=":", lw=1.6, zorder=1)
        for place, curve in enumerate(curves):
            own = sorted(
                (cell for cell in mine if series_of(cell) == curve), key=lambda cell: (cell.nfe or 0, cell.job)
            )
            if own:
                handles[curve] = _plot(axis, own, color=f"C{place % 10}", marker=_MARKERS[place % len(_MARKERS)])
        axis.set_title(panels[number] or "the run's own guidance", loc="left", fontsize=11)
        axis.grid(alpha=0.25, which="both", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if number % columns == 0:
            axis.set_ylabel(main)
        if number + columns >= len(panels):
            axis.set_xlabel("network evaluations a sample (NFE)")
            axis.tick_params(labelbottom=True)
    first = axes.flat[0]
    first.set_xscale("log")
    first.set_xlim(costs[0] / 1.25, costs[-1] * 1.25)
    first.xaxis.set_major_locator(FixedLocator(_apart(costs)))
    first.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    first.xaxis.set_minor_locator(NullLocator())
    values = [cell.value for cell in drawn]
    if min(values) > 0 and max(values) > 8 * min([*values, *floors]):
        first.set_yscale("log")
        # An interval's end near 0 would stretch the axis over powers of ten in which no cell lies.
        highs = [cell.interval[1] for cell in drawn if cell.interval is not None]
        first.set_ylim(min([*values, *floors]) / 1.7, max([*values, *highs]) * 1.25)
        first.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        if max(values) < 30 * min([*values, *floors]):
            first.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "235" else ""))
        else:
            first.yaxis.set_minor_formatter(NullFormatter())
    else:
        first.set_ylim(bottom=0)
    figure.suptitle(title, x=0.72 / width, y=1 - 0.14 / height, ha="left", va="top", fontsize=12.5)
    order = [*curves, *(name for name in handles if name not in curves)]
    at = (0.155 * len(footer) + 0.2) / height
    figure.legend(
        [handles[name] for name in order],
        order,
        loc="lower left",
        bbox_to_anchor=(0.5 / width, at),
        ncols=max(1, min(len(order), int(width / 1.9))),
        frameon=False,
        fontsize=9.5,
        borderaxespad=0.0,
    )
    figure.text(0.72 / width, 0.1 / height, "\n".join(footer), fontsize=8, color="0.3", va="bottom", linespacing=1.35)
    canvas.draw()
    path = Path(path)
    replace_file(path, lambda file: canvas.print_png(file))
    return path


def floor_of(cell: Cell) -> float | None:
    """What as many real images would score, as the evaluation says it."""
    name = "fid_floor" if (cell.main or "").startswith("fid") else f"{re.sub(r'_[0-9]+k?$', '', cell.main or '')}_floor"
    return cell.figures.get(name, cell.figures.get("fid_floor"))


def _line(cells: Sequence[Cell], last: float) -> tuple[list[float], list[float]]:
    points = [(float(cell.nfe or 0), cell.value) for cell in cells]
    front = [points[number] for number in pareto_front(points)]
    # What was reached stays reached: the last step goes on to the right, beyond the dearest cell of all panels.
    end = 2 * last
    return [*(cost for cost, _ in front), end], [*(value for _, value in front), front[-1][1]]


def _plot(axis: Any, cells: Sequence[Cell], *, color: str, marker: str) -> Any:
    costs, values = [float(cell.nfe or 0) for cell in cells], [cell.value for cell in cells]
    (line,) = axis.plot(costs, values, marker=marker, color=color, lw=1, markersize=6, alpha=0.95, zorder=3)
    for cost, cell in zip(costs, cells, strict=True):
        if cell.interval is not None:
            low, high = (abs(end - cell.value) for end in cell.interval)
            axis.errorbar(cost, cell.value, yerr=[[low], [high]], color=color, lw=1, capsize=2.5, zorder=2)
    return line


def _apart(costs: Sequence[float]) -> list[float]:
    """Ticks at the costs that occur, those left out that would lie on one another on a log axis."""
    span = math.log(costs[-1] / costs[0]) or 1.0
    kept: list[float] = []
    for cost in reversed(costs):
        if not kept or math.log(kept[-1] / cost) / span > 0.07:
            kept.append(cost)
    return kept[::-1]


def _footer(sentences: Sequence[str], width: float) -> list[str]:
    return [
        line
        for sentence in sentences
        for line in textwrap.wrap(sentence, int((width - 0.95) * 17.5), subsequent_indent="   ")
    ]


def _names(mappings: Any) -> list[str]:
    """Every name once, in the order of first appearance."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
