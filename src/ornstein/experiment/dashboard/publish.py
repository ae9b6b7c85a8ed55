"""What of a dashboard needs W&B itself: what its runs hold, and saving. Every failure is one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ornstein.errors import OrnsteinError
from ornstein.experiment.dashboard.store import Specification, View
from ornstein.experiment.dashboard.wish import Known, Wish, differing_keys

LOOKED_AT = 50  # newest runs of a project


def account_entity() -> str:
    """The entity of whoever is logged in.

    Raises:
        OrnsteinError: W&B does not know who that is, or cannot be reached.
    """
    with _told("entity="):
        entity = _api().default_entity
    if not entity:
        raise OrnsteinError("entity= is missing, and the W&B account has no default one: add entity=TEAM.")
    return str(entity)


def look(wish: Wish) -> Known:
    """What the newest runs that the dashboard is to show have logged, and what tells their configs apart.

    Raises:
        OrnsteinError: no such project, or W&B cannot be reached.
    """
    with _told(f"project={wish.project}"):
        try:
            found = _api().runs(
                f"{wish.entity}/{wish.project}",
                filters=_query(wish),
                order="-created_at",
                per_page=LOOKED_AT,
                lazy=False,
            )
            runs = [found[place] for place in range(min(len(found), LOOKED_AT))]
        except ValueError as error:
            raise OrnsteinError(
                f"project={wish.project}: {wish.entity} has no such project at {host()}, or it is not to be seen by "
                "this account; a project begins with its first run there (wandb sync uploads offline ones)."
            ) from error
        columns = frozenset(str(name) for run in runs for name in run.summary.keys())  # noqa: SIM118
        trained = [dict(run.config) for run in runs if run.config.get("task") == "train"]
    known = wish.known
    return Known(known.columns or columns, known.swept or differing_keys(trained), known.ids)


def publish(specification: Specification, entity: str) -> Iterator[tuple[str, Specification]]:
    """Saves the workspace, then the report; after each, its URL and the specification with W&B's ids in it.

    Raises:
        OrnsteinError: W&B does not take it; what was saved before stays saved.
    """
    workspace = replace(specification.workspace, entity=entity)
    report = replace(specification.report, entity=entity)
    workspace, url = _save_workspace(workspace)
    yield url, Specification(workspace, report)
    report, url = _save_report(report)
    yield url, Specification(workspace, report)


def host() -> str:
    """Where W&B is."""
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _save_workspace(view: View) -> tuple[View, str]:
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.workspaces import internal

    with _told(f"the workspace of {view.entity}/{view.project}"):
        sent = internal.View(
            entity=view.entity,
            project=view.project,
            display_name=view.title,
            name=view.name or internal._generate_view_name(),
            id=view.id,
            spec=internal.WorkspaceViewspec.model_validate(dict(view.spec)),
        )
        saved = internal.upsert_view2(sent)["upsertView"]["view"]
        workspace = ws.Workspace(entity=view.entity, project=view.project)
        workspace._internal_name = saved["name"]
        return replace(view, id=saved["id"], name=saved["name"]), str(workspace.url)


def _save_report(view: View) -> tuple[View, str]:
    import json

    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces._graphql import execute_graphql
    from wandb_workspaces.reports.v2 import gql, internal

    with _told(f"the report of {view.entity}/{view.project}"):
        variables = {
            "id": view.id or None,
            "name": view.name or internal._generate_name(),
            "entityName": view.entity,
            "projectName": view.project,
            "description": view.description,
            "displayName": view.title,
            "type": "runs",
            "spec": json.dumps(view.spec, ensure_ascii=False),
        }
        saved = execute_graphql(_api(), gql.upsert_view, variables)["upsertView"]["view"]
        report = wr.Report(project=view.project, entity=view.entity, title=view.title)
        report.id = saved["id"]
        return replace(view, id=saved["id"], name=saved["name"]), str(report.url)


def _api() -> Any:
    import wandb

    return wandb.Api()


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Makes whatever W&B's packages raise one sentence."""
    # They print lines of their own otherwise, among them what was saved where, which is told of here.
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        yield
    except OrnsteinError:
        raise
    except Exception as error:
        from wandb.errors import AuthenticationError

        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, AuthenticationError):
            raise OrnsteinError(
                f"W&B did not let this account in ({reason}): set WANDB_API_KEY, or run wandb login."
            ) from error
        raise OrnsteinError(f"{what}: W&B at {host()} answered {reason!r}.") from error


def _query(wish: Wish) -> dict[str, Any]:
    """The user's filters in the API's own language."""
    query: dict[str, Any] = {}
    if wish.group is not None:
        query["group"] = wish.group
    if wish.known.ids:
        query["name"] = {"$in": list(wish.known.ids)}
    if wish.runs:
        query["$or"] = [{key: {"$in": list(wish.runs)}} for key in ("name", "displayName")]
    return query
