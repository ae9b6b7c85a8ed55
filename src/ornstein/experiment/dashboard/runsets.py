"""Which runs a dashboard shows."""

from __future__ import annotations

from typing import Any

from ornstein.errors import OrnsteinError
from ornstein.experiment.dashboard.keys import GUIDANCE, UNGUIDED
from ornstein.experiment.dashboard.panels import Runs
from ornstein.experiment.dashboard.wish import Wish

_UNUSABLE = "'\"\\<>="  # W&B's package takes filters through a text in which these are its own signs


def check_names(wish: Wish) -> None:
    """Whether groups and runs can be filtered by as they are named.

    Raises:
        OrnsteinError: names the option and the sign.
    """
    named = [("group", wish.group or ""), *(("runs", run) for run in wish.runs)]
    for option, name in named:
        if bad := next((sign for sign in _UNUSABLE if sign in name), None):
            raise OrnsteinError(
                f"{option}={name}: W&B's filters take no {bad} in a name: name the runs by their ids, or the folder "
                "that holds them (runs=outputs/train/multirun/DATE/TIME)."
            )


def asked_for(wish: Wish) -> list[Any]:
    """The filters that the user asked for, all of which a run has to pass."""
    from wandb_workspaces import expr

    found: list[Any] = []
    if wish.group is not None:
        found.append(expr.Metric("Group") == wish.group)
    if wish.known.ids:
        found.append(expr.Metric("ID").isin(list(wish.known.ids)))
    if wish.runs:
        found.append(expr.Or(expr.Metric("ID").isin(list(wish.runs)), expr.Metric("Name").isin(list(wish.runs))))
    return found


def filters(wish: Wish, runs: Runs, *more: Any) -> Any:
    """What runs of a kind pass, and the user's own filters always; an empty text is everything."""
    from wandb_workspaces import expr

    kind = [] if runs == "all" else [expr.Config("task") == runs]
    found = [*kind, *more, *asked_for(wish)]
    return expr.And(*found) if found else ""


def of_report(wish: Wish, runs: Runs) -> list[Any]:
    """The sets of runs of a report's part: evaluations without and with guidance apart, to be switched on and off."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    order = [
        wr.OrderBy(wr.SummaryMetric(wish.evaluated if runs == "evaluate" else wish.trained), ascending=wish.ascending)
    ]
    if runs != "evaluate":
        name = "Trainings" if runs == "train" else "All runs"
        return [wr.Runset(name=name, filters=filters(wish, runs), order=order)]
    guidance = expr.Summary(GUIDANCE)
    kinds = {
        "Evaluations without guidance": guidance == UNGUIDED,
        "Evaluations, guided and grids": guidance != UNGUIDED,
    }
    return [
        wr.Runset(name=name, filters=filters(wish, runs, condition), order=order) for name, condition in kinds.items()
    ]
