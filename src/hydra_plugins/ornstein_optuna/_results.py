"""What a search leaves: ``best.json``, ``trials.csv``, ``search.html``, ``search.png``, and a printed table."""

from __future__ import annotations

import csv
import html
import io
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ornstein.experiment.atomic import write_json, write_text

from ._picture import draw
from ._space import Space
from ._study import FOLDER, MONITOR, REASON, Retry

HTML, PICTURE, BEST, TABLE = "search.html", "search.png", "best.json", "trials.csv"
_TOP = 20  # rows that are printed
_WORDS = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


def write_results(
    study: optuna.Study,
    space: Space,
    *,
    folder: Path,
    monitors: Sequence[str],
    command: Callable[[Mapping[str, Any], Space], list[str]],
) -> None:
    """Writes and prints what the study has found so far.

    Args:
        study: of one or several figures.
        space: what was searched.
        folder: the sweep's.
        monitors: the figures' names.
        command: gives the overrides that train with a trial's values again.

    Raises:
        OSError: a file cannot be written.
    """
    trials = ended(study)
    importances, reason = importance_of(study, len(monitors))
    best = best_of(study)
    write_text(folder / TABLE, _csv(study, trials, space, monitors))
    found = [
        {
            "trial": trial.number,
            **dict(zip(monitors, trial.values, strict=True)),
            "params": trial.params,
            "folder": trial.user_attrs.get(FOLDER),
            "command": shlex.join(["python", "train.py", *command(trial.params, space)]),
        }
        for trial in best
    ]
    facts: dict[str, Any] = {
        "study": study.study_name,
        "monitor": list(monitors),
        "direction": [direction.name.lower() for direction in study.directions],
        "trials": {word: sum(trial.state == state for trial in trials) for state, word in _WORDS.items()},
        "importance": importances,
    }
    # One best trial, or the front of several figures.
    facts |= {"best": found[0] if found else None} if len(monitors) == 1 else {"front": found}
    write_json(folder / BEST, facts)
    write_text(folder / HTML, page(study, monitors, importances=importances, reason=reason))
    draw(study, trials, folder / PICTURE, monitors=monitors, importances=importances)
    show(study, trials, space, monitors)
    if reason is not None:
        print(reason)
    for entry in found[:1]:
        print(f"again      {entry['command']}")
    print(f"search     {HTML}, {PICTURE}, {BEST}, {TABLE} in {folder}")


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that have ended, without those that a later one took the place of."""
    trials = study.get_trials(deepcopy=False)
    retried = {number for trial in trials for number in Retry.retry_history(trial)}
    return [trial for trial in trials if trial.state.is_finished() and trial.number not in retried]


def best_of(study: optuna.Study) -> list[FrozenTrial]:
    """The best trial, or those of several figures that no other is better than in all; empty where none finished."""
    if not any(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False)):
        return []
    return [study.best_trial] if len(study.directions) == 1 else study.best_trials


def importance_of(study: optuna.Study, figures: int) -> tuple[dict[str, float], str | None]:
    """Each key's share in how the (first) figure varies, largest first; or why that cannot be told."""
    finished = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    if len(finished) < 2:
        return {}, f"importances need at least 2 finished trials, and there are {len(finished)}."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target = None if figures == 1 else (lambda trial: trial.values[0])
            found = optuna.importance.get_param_importances(study, target=target, evaluator=_evaluator())
    except (ValueError, RuntimeError) as error:
        return {}, f"importances cannot be told of these trials: {error}"
    if not found:
        return {}, "importances need a key that all finished trials have and that differs between them."
    return {name: float(value) for name, value in found.items()}, None


def _evaluator() -> optuna.importance.BaseImportanceEvaluator:
    """The importances of fANOVA (Hutter et al. 2014), seeded: Optuna's own choice looks at the best tenth alone."""
    return optuna.importance.FanovaImportanceEvaluator(seed=0)


def line_of(study: optuna.Study, trial: FrozenTrial) -> str:
    """A trial that has just ended, and the best so far."""
    told = f"trial {trial.number:<4} {_WORDS[trial.state]}"
    if trial.state == TrialState.FAIL:
        return f"{told}: {trial.user_attrs.get(REASON, 'no reason was given')}"
    names = study.user_attrs.get(MONITOR, ["value"])
    if trial.values:
        told += " " + ", ".join(f"{name} {value:.4g}" for name, value in zip(names, trial.values, strict=False))
    best = best_of(study)
    if len(names) == 1 and best:
        told += f" (best {best[0].value:.4g}, trial {best[0].number})"
    return told


def ranked(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The best first, by the first figure; then pruned ones, then failed ones."""
    order = {TrialState.COMPLETE: 0, TrialState.PRUNED: 1, TrialState.FAIL: 2}
    sign = -1 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
    return sorted(trials, key=lambda t: (order[t.state], sign * t.values[0] if t.values else 0.0, t.number))


def show(study: optuna.Study, trials: Sequence[FrozenTrial], space: Space, monitors: Sequence[str]) -> None:
    """Prints the table, best first."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="best first", title_justify="left")
    for name in ("trial", *monitors):
        table.add_column(name, justify="right")
    names = [param.name for param in space.params]
    for name in (*names, "ended"):
        table.add_column(name)
    for trial in ranked(study, trials)[:_TOP]:
        values = [f"{value:.4g}" for value in trial.values or ()] or ["-"] * len(monitors)
        ending = _WORDS[trial.state]
        if trial.state == TrialState.FAIL:
            ending += f": {trial.user_attrs.get(REASON, '')[:60]}"
        elif trial.state == TrialState.PRUNED and trial.last_step is not None:
            ending += f" at step {trial.last_step:,}"
        values += ["-"] * (len(monitors) - len(values))
        table.add_row(str(trial.number), *values, *(_brief(trial.params.get(name)) for name in names), ending)
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def _brief(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _csv(study: optuna.Study, trials: Sequence[FrozenTrial], space: Space, monitors: Sequence[str]) -> str:
    names = [param.name for param in space.params]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["trial", "state", *monitors, *names, "folder", "reason"])
    for trial in ranked(study, trials):
        values = [*(trial.values or ()), *[""] * len(monitors)][: len(monitors)]
        given = [trial.params.get(name, "") for name in names]
        attrs = trial.user_attrs
        state = _WORDS[trial.state]
        rows.writerow([trial.number, state, *values, *given, attrs.get(FOLDER, ""), attrs.get(REASON, "")])
    return text.getvalue()


def page(study: optuna.Study, monitors: Sequence[str], *, importances: Mapping[str, float], reason: str | None) -> str:
    """One HTML file that needs no network: Optuna's interactive plots, each that these trials give."""
    from optuna import visualization as plots
    from plotly.offline import get_plotlyjs

    parts = []
    for place, monitor in enumerate(monitors):

        def target(trial: FrozenTrial, place: int = place) -> float:
            return float(trial.values[place])

        # Optuna warns of a target where there is one figure.
        one: dict[str, Any] = {"target": target if len(monitors) > 1 else None, "target_name": monitor}
        parts.append(_embedded(partial(plots.plot_optimization_history, study, **one)))
        if importances:
            parts.append(_embedded(partial(plots.plot_param_importances, study, evaluator=_evaluator(), **one)))
        parts.append(_embedded(partial(plots.plot_parallel_coordinate, study, **one)))
        parts.append(_embedded(partial(plots.plot_slice, study, **one)))
    if len(monitors) > 1:
        parts.append(_embedded(partial(plots.plot_pareto_front, study, target_names=list(monitors))))
    elif any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        parts.append(_embedded(partial(plots.plot_intermediate_values, study)))
    told = f"<p>{html.escape(reason)}</p>" if reason else ""
    title = html.escape(f"{study.study_name}: {', '.join(monitors)}")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body { font: 15px system-ui, sans-serif; margin: 1.5rem auto; max-width: 1200px; }</style>\n"
        f"<script>{get_plotlyjs()}</script></head>\n<body><h1>{title}</h1>{told}\n{''.join(parts)}</body></html>\n"
    )


def _embedded(make: Callable[[], Any]) -> str:
    """A figure; nothing where these trials have none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            figure = make()
        except (ValueError, RuntimeError):
            return ""
    return str(figure.to_html(full_html=False, include_plotlyjs=False)) if figure.data else ""
