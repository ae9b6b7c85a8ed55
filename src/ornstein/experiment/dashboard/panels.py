"""The parts of a dashboard, each with its panels in W&B's own classes, ready for a workspace and a report alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ornstein.experiment.dashboard import keys
from ornstein.experiment.dashboard.keys import AXES, Axis, Curves, Pictures
from ornstein.experiment.dashboard.wish import Wish

Runs = Literal["train", "evaluate", "all"]


@dataclass(frozen=True)
class Part:
    """A section of a dashboard.

    Attributes:
        name: its heading.
        told: what it shows, in a sentence or two.
        panels: of ``wandb_workspaces.reports.v2``.
        runs: which runs a report shows in it.
        columns: panels side by side.
        axis: x axis of its curves, where it has curves.
        is_open: from the beginning.
    """

    name: str
    told: str
    panels: Sequence[Any]
    runs: Runs = "train"
    columns: int = 3
    axis: Axis | None = None
    is_open: bool = True


def parts(wish: Wish) -> list[Part]:
    """All parts of a dashboard, in order."""
    return [
        training(wish.x),
        *qualities(wish.axis),
        samples(),
        sweep(wish),
        pareto(wish),
        speed(wish.x),
        noise(),
        comparison(),
    ]


def line(curves: Curves, axis: Axis) -> Any:
    """A panel of curves over an axis."""
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(
        title=curves.title,
        x=axis.key,
        y=list(curves.keys),
        metric_regex=curves.regex,
        title_x=axis.title,
        log_y=curves.log_y or None,
    )


def media(pictures: Pictures) -> Any:
    """A panel of pictures."""
    import wandb_workspaces.reports.v2 as wr

    axes: dict[str, Any] = {"mode": "grid", "grid_x_axis": "step", "grid_y_axis": "run"} if pictures.by_step else {}
    return wr.MediaBrowser(title=pictures.title, media_keys=[pictures.key], **axes)


def training(axis: Axis) -> Part:
    """Loss, gradients, learning rate, averages, loss by noise level."""
    return Part(
        "Training",
        "The loss on training batches and held-out images, in all and by ten bins of log-SNR: bins are the same for "
        "every schedule, so that runs compare.",
        [line(curves, axis) for curves in keys.TRAINING],
        axis=axis,
    )


def qualities(first: str) -> list[Part]:
    """Figures of samples against steps, images seen and time, ``first`` of them open and first."""
    names = [first, *(name for name in AXES if name != first)]
    return [
        Part(
            f"Quality by {AXES[name].title}",
            "Figures of samples drawn with the averaged weights. A figure of fewer samples than its feature space's "
            "custom bears their number (fid_1k) and compares with its like alone.",
            [line(curves, AXES[name]) for curves in keys.QUALITY],
            axis=AXES[name],
            is_open=name == first,
        )
        for name in names
    ]


def samples() -> Part:
    """Grids at equal seeds, extremes, trajectories, reconstructions."""
    import wandb_workspaces.reports.v2 as wr

    return Part(
        "Samples",
        "Grids of the same seeds and classes in every run, so that pictures in the same place differ by the run alone.",
        [
            *(media(pictures) for pictures in keys.SAMPLES),
            wr.WeavePanelSummaryTable(table_name=keys.EXTREMES),
        ],
        columns=2,
    )


def sweep(wish: Wish) -> Part:
    """What was swept against the figure."""
    import wandb_workspaces.reports.v2 as wr

    figure = wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(wish.trained), inverted=wish.ascending or None)
    return Part(
        "Sweep",
        f"A line a run, from what was swept to its {wish.trained}; which settings matter for it; and the runs by it.",
        [
            wr.ParallelCoordinatesPlot(
                title=f"What was swept, and {wish.trained}",
                columns=[*(wr.ParallelCoordinatesPlotColumn(wr.Config(key)) for key in wish.swept), figure],
            ),
            wr.ParameterImportancePlot(with_respect_to=wish.trained),
            wr.BarPlot(title=wish.trained, metrics=[wish.trained], max_bars_to_show=30),
        ],
        columns=1,
    )


def pareto(wish: Wish) -> Part:
    """Quality of a finished model against what a sample costs, from evaluate.py with logger=wandb."""
    import wandb_workspaces.reports.v2 as wr

    figure, nfe = wish.evaluated, wr.SummaryMetric(keys.NFE)
    named = f"${{run:displayName}}: ${{summary:{keys.SAMPLER}}}, ${{summary:{keys.GUIDANCE}}} ${{summary:{keys.SCALE}}}"
    asked = (keys.SAMPLER, keys.STEPS, keys.GUIDANCE, keys.SCALE, keys.NFE)
    return Part(
        "Samplers",
        "Evaluations of finished runs (evaluate.py logger=wandb): the figure against network evaluations a sample. A "
        "grid of evaluations (evaluate.py -m) is one run with a table and a picture, a panel a guidance.",
        [
            wr.ScatterPlot(
                title=f"{figure} against network evaluations",
                x=nfe,
                y=wr.SummaryMetric(figure),
                log_x=True,
                running_ymin=wish.ascending or None,
                running_ymax=None if wish.ascending else True,
                legend_template=named,
            ),
            wr.ScatterPlot(
                title=f"{figure} against guidance scale",
                x=wr.SummaryMetric(keys.SCALE),
                y=wr.SummaryMetric(figure),
                legend_template=named,
            ),
            wr.CustomChart(
                query={"summaryTable": {"tableKey": keys.GRID}},
                chart_name="wandb/scatter/v0",
                chart_fields={"x": keys.NFE, "y": figure},
                chart_strings={"title": f"Grids of evaluations: {figure} against network evaluations"},
            ),
            wr.ParallelCoordinatesPlot(
                title=f"Sampler, steps, guidance, and {figure}",
                columns=[
                    *(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(key)) for key in asked),
                    wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(figure), inverted=wish.ascending or None),
                ],
            ),
            *(media(pictures) for pictures in keys.EVALUATION_PICTURES),
            wr.WeavePanelSummaryTable(table_name=keys.GRID),
        ],
        runs="evaluate",
        columns=2,
    )


def speed(axis: Axis) -> Part:
    """How fast, and on how much of the machine."""
    return Part(
        "Speed and devices",
        "Without the time that pictures, figures and checkpoints take.",
        [line(curves, axis) for curves in keys.SPEED],
        axis=axis,
        is_open=False,
    )


def noise() -> Part:
    """The schedule, and where on it the loss is."""
    return Part(
        "Noise",
        "What the model is trained on: drawn before the first step.",
        [media(pictures) for pictures in keys.NOISE],
        columns=2,
        is_open=False,
    )


def comparison() -> Part:
    """Configs side by side."""
    import wandb_workspaces.reports.v2 as wr

    return Part(
        "Configs",
        "Every key of the config and every figure, a column a run, differences first.",
        [wr.RunComparer(diff_only="split"), wr.CodeComparer(diff="split")],
        runs="all",
        columns=1,
        is_open=False,
    )
