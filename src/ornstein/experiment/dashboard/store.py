"""A dashboard's specification as files: what W&B is sent, to be looked at, kept, and sent later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ornstein.errors import OrnsteinError
from ornstein.experiment.atomic import read_json, write_json
from ornstein.experiment.dashboard.report import build_report
from ornstein.experiment.dashboard.wish import Wish
from ornstein.experiment.dashboard.workspace import build_workspace

WORKSPACE, REPORT = "workspace.json", "report.json"


@dataclass(frozen=True)
class View:
    """A workspace or a report as W&B keeps it.

    Attributes:
        entity: whose it is; empty for the account's own.
        project: its project.
        title: what it is called.
        spec: W&B's own specification of it.
        description: below a report's title.
        id: W&B's, once it was saved.
        name: W&B's, once it was saved; part of a workspace's address.
    """

    entity: str
    project: str
    title: str
    spec: Mapping[str, Any]
    description: str = ""
    id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Specification:
    """A dashboard: its workspace and its report."""

    workspace: View
    report: View


def specify(wish: Wish) -> Specification:
    """The specification of a dashboard, made without a network."""
    options: dict[str, Any] = {"by_alias": True, "exclude_none": True, "mode": "json"}
    workspace, report = build_workspace(wish)._to_model(), build_report(wish)._to_model()
    return Specification(
        View(wish.entity, wish.project, wish.title, workspace.spec.model_dump(**options)),
        View(wish.entity, wish.project, wish.title, report.spec.model_dump(**options), description=report.description),
    )


def write_specification(folder: Path, specification: Specification) -> None:
    """Writes ``workspace.json`` and ``report.json``, each whole or not at all.

    Raises:
        OrnsteinError: they cannot be written.
    """
    try:
        for name, view in ((WORKSPACE, specification.workspace), (REPORT, specification.report)):
            write_json(folder / name, vars(view))
    except OSError as error:
        raise OrnsteinError(f"{folder} could not be written ({error}): make room, or name another out=.") from error


def read_specification(folder: Path) -> Specification:
    """What :func:`write_specification` wrote, edited by hand or not.

    Raises:
        OrnsteinError: a file is missing or is none of a dashboard.
    """
    return Specification(_read(folder / WORKSPACE), _read(folder / REPORT))


def known_before(specification: Specification, folder: Path) -> Specification:
    """The specification under the ids of the same dashboard in ``folder``, so that saving renews it there.

    The same is one of the same project, title and entity (or of no entity yet); without such, the specification as it
    is.
    """
    try:
        before = read_specification(folder)
    except OrnsteinError:
        return specification
    pairs = ((specification.workspace, before.workspace), (specification.report, before.report))
    return Specification(*(_under_ids(view, old) for view, old in pairs))


def _under_ids(view: View, old: View) -> View:
    same = (view.entity or old.entity, view.project, view.title) == (old.entity, old.project, old.title)
    return replace(view, entity=old.entity, id=old.id, name=old.name) if same else view


def _read(path: Path) -> View:
    if not path.is_file():
        raise OrnsteinError(f"{path} is missing: name a folder that this command wrote.")
    try:
        found = read_json(path)
        texts = {key: value for key, value in found.items() if key != "spec"}
        if not isinstance(found.get("spec"), dict) or not all(isinstance(value, str) for value in texts.values()):
            raise ValueError("it has no spec")
        return View(**found)
    except (OSError, ValueError, TypeError, json.JSONDecodeError) as error:
        raise OrnsteinError(
            f"{path} is no specification of a dashboard ({error}): name a folder that this command wrote."
        ) from error
