"""A project's W&B report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ornstein.experiment.dashboard.panels import parts
from ornstein.experiment.dashboard.runsets import of_report
from ornstein.experiment.dashboard.stable import name_panels, stable_name
from ornstein.experiment.dashboard.wish import Wish

_WIDTH = 24  # of a report's grid
_HEIGHTS = {1: 12, 2: 10, 3: 7}  # of panels, by how many stand side by side


def build_report(wish: Wish) -> Any:
    """The report as ``wandb_workspaces.reports.v2.Report``: nothing of it is sent. Equal wishes make equal ones."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.TableOfContents()]
    for part in parts(wish):
        runsets = of_report(wish, part.runs)
        for runset in runsets:
            runset._id = stable_name(part.name, runset.name)
        panels = laid_out(name_panels(part.name, part.panels), columns=part.columns)
        blocks += [wr.H2(part.name), wr.P(part.told), wr.PanelGrid(runsets=runsets, panels=panels)]
    told = f"{wish.project}: training, quality, samples, sweeps and samplers"
    only = _only(wish)
    return wr.Report(
        entity=wish.entity,
        project=wish.project,
        title=wish.title,
        description=f"{told}; {only}" if only else told,
        blocks=blocks,
        width="fluid",
    )


def laid_out(panels: Sequence[Any], *, columns: int) -> list[Any]:
    """Panels of equal size in rows, in order."""
    import wandb_workspaces.reports.v2 as wr

    wide, high = _WIDTH // columns, _HEIGHTS[columns]
    for place, panel in enumerate(panels):
        panel.layout = wr.Layout(x=place % columns * wide, y=place // columns * high, w=wide, h=high)
    return list(panels)


def _only(wish: Wish) -> str:
    asked = [
        f"group {wish.group}" if wish.group else "",
        f"{len(wish.known.ids)} runs of a folder" if wish.known.ids else "",
        f"runs {', '.join(wish.runs)}" if wish.runs else "",
    ]
    told = ", ".join(word for word in asked if word)
    return f"only {told}" if told else ""
