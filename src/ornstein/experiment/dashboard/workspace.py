"""A project's W&B workspace."""

from __future__ import annotations

from typing import Any

from ornstein.experiment.dashboard.panels import Part, parts
from ornstein.experiment.dashboard.runsets import filters
from ornstein.experiment.dashboard.stable import name_panels, stable_name
from ornstein.experiment.dashboard.wish import Wish

_TALL = 2  # rows of a section that show before its second page


def build_workspace(wish: Wish) -> Any:
    """The workspace as ``wandb_workspaces.workspaces.Workspace``: nothing is sent. Equal wishes make equal ones."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    sections = [_section(part) for part in parts(wish)]
    columns = [f"summary:{wish.trained}", "run:state", *(f"config:{_value(key)}" for key in wish.swept)]
    workspace = ws.Workspace(
        entity=wish.entity,
        project=wish.project,
        name=wish.title,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=wish.x.key, max_runs=50),
        runset_settings=ws.RunsetSettings(
            filters=filters(wish, "all"),
            order=[expr.Ordering(expr.Summary(wish.trained), ascending=wish.ascending)],
            pinned_columns=["run:displayName", *columns],
        ),
    )
    workspace._internal_runset_id = stable_name(wish.title, "runs")
    return workspace


def _section(part: Part) -> Any:
    import wandb_workspaces.workspaces as ws

    rows = min(_TALL, -(-len(part.panels) // part.columns))
    return ws.Section(
        name=part.name,
        panels=name_panels(part.name, part.panels),
        is_open=part.is_open,
        layout_settings=ws.SectionLayoutSettings(columns=part.columns, rows=rows),
        panel_settings=ws.SectionPanelSettings(x_axis="Step" if part.axis is None else part.axis.key),
    )


def _value(key: str) -> str:
    """A config key as W&B's columns have it: ``optimizer.value.lr``."""
    first, dot, rest = key.partition(".")
    return f"{first}.value{dot}{rest}"
