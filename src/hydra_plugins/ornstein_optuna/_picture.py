"""A search in one picture: how it went on, what mattered, and how the figure lies over the keys that mattered most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ornstein.experiment.atomic import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SLICES = 4
_FINISHED, _PRUNED, _BEST = "#2a6f97", "#b8b8b8", "#d1495b"


def draw(
    study: optuna.Study,
    trials: Sequence[FrozenTrial],
    path: Path,
    *,
    monitors: Sequence[str],
    importances: Mapping[str, float],
) -> Path | None:
    """Writes the PNG, atomically; None where no trial has finished. Of several figures it shows the first.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not finished:
        return None
    maximize = study.directions[0] == optuna.study.StudyDirection.MAXIMIZE
    best = (max if maximize else min)(finished, key=lambda trial: trial.values[0])
    keys = list(importances) or list(best.params)
    sliced = keys[:_SLICES]
    figure = Figure(figsize=(13.0, 7.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    rows: Any = figure.subfigures(2, 1, height_ratios=[1.15, 1.0])
    left, right = rows[0].subplots(1, 2, width_ratios=[1.6, 1.0])
    _history(left, trials, best, maximize=maximize, monitor=monitors[0])
    _importances(right, importances)
    if sliced:
        panels = rows[1].subplots(1, len(sliced), sharey=True, squeeze=False)[0]
        for panel, key in zip(panels, sliced, strict=True):
            _slice(panel, key, finished, best)
        if _wide([trial.values[0] for trial in finished]):
            panels[0].set_yscale("log")  # of all of them
        panels[0].set_ylabel(monitors[0])
        rows[1].suptitle("finished trials over the keys that matter most, later ones darker", fontsize="medium")
    states = [sum(trial.state == state for trial in trials) for state in (TrialState.PRUNED, TrialState.FAIL)]
    figure.suptitle(
        f"{len(trials)} trials, {states[0]} pruned, {states[1]} failed: best {monitors[0]} {best.values[0]:.4g}, "
        f"trial {best.number}"
    )
    replace_file(path, lambda file: canvas.print_png(file))
    return path


def _history(axes: Axes, trials: Sequence[FrozenTrial], best: FrozenTrial, *, maximize: bool, monitor: str) -> None:
    """Each trial's figure in order, and the best until then."""
    from matplotlib.ticker import MaxNLocator

    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED and trial.values]
    numbers, values = [trial.number for trial in finished], [trial.values[0] for trial in finished]
    until: list[float] = []
    for value in values:
        until.append(value if not until else (max if maximize else min)(until[-1], value))
    axes.step(numbers, until, where="post", color=_BEST, linewidth=1.2, label="best until then")
    axes.plot(numbers, values, "o", color=_FINISHED, label="finished")
    if pruned:
        places = [trial.number for trial in pruned]
        axes.plot(places, [trial.values[0] for trial in pruned], "v", color=_PRUNED, label="pruned, last reported")
    for trial in trials:
        if trial.state == TrialState.FAIL:
            axes.axvline(trial.number, color=_PRUNED, linewidth=0.8, linestyle=":")
    axes.plot([best.number], [best.values[0]], "o", markersize=12, fillstyle="none", color=_BEST)
    if _wide(values):
        axes.set_yscale("log")
    failed = any(trial.state == TrialState.FAIL for trial in trials)
    axes.set_xlabel("trial" + (" (dotted: failed)" if failed else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(monitor)
    axes.legend(frameon=False)


def _wide(values: Sequence[float]) -> bool:
    """Whether the best would drown beside the worst."""
    return min(values) > 0 and max(values) > 20 * min(values)


def _importances(axes: Axes, importances: Mapping[str, float]) -> None:
    names = list(importances)[::-1]
    axes.set_title("importance: share in the figure's variance (fANOVA)", fontsize="medium")
    if not names:
        axes.text(0.5, 0.5, "too few finished trials", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    bars = axes.barh(names, [importances[name] for name in names], color=_FINISHED)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlim(0, 1.12 * max(importances.values()))
    axes.spines[["top", "right"]].set_visible(False)


def _slice(axes: Axes, key: str, finished: Sequence[FrozenTrial], best: FrozenTrial) -> None:
    """The figure over one key; later trials darker."""
    having = [trial for trial in finished if key in trial.params]
    distribution: Any = having[0].distributions[key] if having else None
    listed = isinstance(distribution, optuna.distributions.CategoricalDistribution)
    places: dict[Any, Any] = {}
    if listed:
        options = [str(choice) for choice in distribution.choices]
        places = {option: place for place, option in enumerate(options)}
        axes.set_xticks(range(len(options)), options, rotation=20 if len(options) > 3 else 0)
        axes.set_xlim(-0.5, len(options) - 0.5)
    if getattr(distribution, "log", False):
        axes.set_xscale("log")
    where = [places[str(trial.params[key])] if listed else trial.params[key] for trial in having]
    shade = [trial.number for trial in having]
    axes.scatter(
        where, [trial.values[0] for trial in having], c=shade, cmap="Blues", edgecolors=_FINISHED, s=36, vmin=-6
    )
    if best in having:
        axes.plot([where[having.index(best)]], [best.values[0]], "o", markersize=12, fillstyle="none", color=_BEST)
    axes.set_xlabel(key)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
