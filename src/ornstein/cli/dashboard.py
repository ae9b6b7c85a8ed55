"""``python -m ornstein.cli.dashboard project=...``: a project's W&B workspace and report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ornstein.cli.pairs import read_pairs, run_command
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.experiment.dashboard.store import Specification
    from ornstein.experiment.dashboard.wish import Wish

HELP = """usage: python -m ornstein.cli.dashboard project=NAME [key=value] ...

Makes a W&B workspace and a report of a project's runs: training, quality, samples, sweeps, samplers, speed.
Without credentials it writes their specification, to be looked at and sent later; it never asks for anything.

  project=NAME          the W&B project that the runs are in (logger.wandb.project, ornstein unless set)
  entity=NAME           user or team; the account's own unless given
  name=TEXT             of the workspace and the report; the project's unless given
  group=NAME            only runs of this W&B group: a sweep's
  runs=FOLDER           only the runs in a folder: outputs/train/multirun/DATE/TIME
  runs=ID,ID            only runs of these W&B ids or names
  x=steps               x axis of curves: steps, images or time
  figure=fid            by which runs are compared: fid, kid, precision, fd_dinov2, ...
  offline=true          only write the specification, whatever the credentials
  out=FOLDER            where it is written; outputs/dashboard/PROJECT unless given
  upload=FOLDER         send the specification in that folder, as it is there

The same command again renews the same workspace and report.
"""
KEYS = ("project", "entity", "name", "group", "runs", "x", "figure", "offline", "out", "upload")
_OF_UPLOAD = ("project", "entity", "upload")


@dataclass(frozen=True)
class Request:
    """What is asked for; the attributes are the command's keys."""

    project: str = ""
    entity: str = ""
    name: str = ""
    group: str | None = None
    runs: str = ""
    x: str = "steps"
    figure: str = "fid"
    offline: bool = False
    out: Path | None = None
    upload: Path | None = None


def main() -> None:
    """Entry point."""
    run_command(lambda words: make(parse(words)), help_text=HELP)


def parse(words: Sequence[str]) -> Request:
    """The command line as a request.

    Raises:
        OrnsteinError: an unknown key, no project, or a value that a key does not take.
    """
    from ornstein.experiment.dashboard.keys import AXES

    given = read_pairs(words, KEYS, command="ornstein.cli.dashboard")
    if "upload" in given and (other := next((key for key in given if key not in _OF_UPLOAD), None)):
        raise OrnsteinError(f"{other}= does not go with upload=, which sends what is in the folder: leave it out.")
    if not given.get("project") and not given.get("upload"):
        raise OrnsteinError("project= is missing: add project=ornstein, or whatever logger.wandb.project says.")
    for key in ("project", "entity"):
        _check_name(key, given.get(key, ""))
    if given.get("x", "steps") not in AXES:
        raise OrnsteinError(f"x={given['x']} is unknown: choose {', '.join(AXES)}.")
    if given.get("offline", "false").lower() not in ("true", "false"):
        raise OrnsteinError(f"offline={given['offline']}: choose true or false.")
    if not re.fullmatch(r"(val/)?[a-z0-9_]+", given.get("figure", "fid")):
        raise OrnsteinError(f"figure={given['figure']} is no name of a figure: fid, kid, inception_score, say.")
    _check_title(given.get("name", ""))
    return Request(
        project=given.get("project", ""),
        entity=given.get("entity", ""),
        name=given.get("name", ""),
        group=given.get("group") or None,
        runs=given.get("runs", ""),
        x=given.get("x", "steps"),
        figure=given.get("figure", "fid").removeprefix("val/"),
        offline=given.get("offline", "false").lower() == "true",
        out=Path(given["out"]).expanduser() if given.get("out") else None,
        upload=Path(given["upload"]).expanduser() if given.get("upload") else None,
    )


def _check_name(key: str, name: str) -> None:
    if "/" in name:
        raise OrnsteinError(f"{key}={name}: write the two apart, entity=TEAM project=NAME.")
    if bad := next((sign for sign in name if sign in "\\#?%:"), None):
        raise OrnsteinError(f"{key}={name}: W&B has no {bad} in names.")
    if name in (".", ".."):
        raise OrnsteinError(f"{key}={name} is no name.")


def _check_title(name: str) -> None:
    import unicodedata

    if len(name) > 128:
        raise OrnsteinError(f"name= of {len(name)} characters: W&B takes at most 128.")
    # What W&B's package takes for emoji; a plus sign is among them.
    if bad := next((sign for sign in name if unicodedata.category(sign) in ("So", "Sk", "Sm", "Sc", "Cs")), None):
        raise OrnsteinError(f"name={name}: W&B takes no {bad} in a workspace's name.")


def make(request: Request) -> None:
    """Writes the specification, and saves it where there are credentials; prints where to look.

    Raises:
        OrnsteinError: the package is missing, no such runs or figure, or W&B does not take it.
    """
    if find_spec("wandb_workspaces") is None:
        raise OrnsteinError(
            "a dashboard needs the package wandb-workspaces: pip install 'ornstein[dashboard]'; "
            "ornstein report needs neither it nor an account."
        )
    from ornstein.experiment.dashboard.store import read_specification

    if request.upload is not None:
        _upload(request, read_specification(request.upload), request.upload)
        return
    from ornstein.experiment.dashboard.runsets import check_names
    from ornstein.experiment.dashboard.store import known_before, specify, write_specification

    wish = _wish(request)
    check_names(wish)
    folder = request.out or Path("outputs") / "dashboard" / request.project
    if not _may_save(request):
        _check(wish)
        write_specification(folder, known_before(specify(wish), folder))
        print(f"written    {folder}/workspace.json, report.json")
        print(f"to save it in W&B: log in (wandb login), then ornstein dashboard upload={folder}")
        return
    wish = _looked_up(wish, folder)
    specification = known_before(specify(wish), folder)
    write_specification(folder, specification)
    _save(specification, wish.entity, folder)


def _wish(request: Request) -> Wish:
    from ornstein.experiment.dashboard.wish import Known, Wish, known_of_folder

    named = Path(request.runs).expanduser()
    folder = named if request.runs and named.is_dir() else None
    if folder is None and "/" in request.runs:
        raise OrnsteinError(f"runs={request.runs} is no folder: name one that holds runs, or W&B ids or names.")
    names = () if folder is not None else tuple(name.strip() for name in request.runs.split(",") if name.strip())
    return Wish(
        project=request.project,
        entity=request.entity,
        name=request.name,
        group=request.group,
        runs=names,
        axis=request.x,
        figure=request.figure,
        known=Known() if folder is None else known_of_folder(folder),
    )


def _looked_up(wish: Wish, folder: Path) -> Wish:
    """The wish with the account's entity and with what the project's runs are found to hold."""
    from ornstein.experiment.dashboard.publish import account_entity, look
    from ornstein.experiment.dashboard.store import known_before, specify, write_specification

    try:
        wish = replace(wish, entity=wish.entity or account_entity())
        wish = replace(wish, known=look(wish))
    except OrnsteinError as error:
        write_specification(folder, known_before(specify(wish), folder))
        raise OrnsteinError(f"{error} The specification is in {folder}.") from error
    _check(wish)
    return wish


def _check(wish: Wish) -> None:
    from ornstein.experiment.dashboard.wish import check_figure

    check_figure(wish)


def _may_save(request: Request) -> bool:
    from ornstein.experiment.logger_options import check_wandb_mode
    from ornstein.experiment.wandb_credentials import has_credentials

    return not request.offline and check_wandb_mode(None) in (None, "online") and has_credentials()


def _upload(request: Request, specification: Specification, folder: Path) -> None:
    """Sends a specification that was written earlier."""
    from ornstein.experiment.dashboard.publish import account_entity
    from ornstein.experiment.dashboard.store import Specification

    if not _may_save(request):
        raise OrnsteinError(
            f"upload={folder}: log in first (wandb login, or WANDB_API_KEY, and WANDB_MODE not offline)."
        )
    views = (specification.workspace, specification.report)
    if request.project:
        views = (replace(views[0], project=request.project), replace(views[1], project=request.project))
    entity = request.entity or views[0].entity or account_entity()
    _save(Specification(*views), entity, folder)


def _save(specification: Specification, entity: str, folder: Path) -> None:
    """Saves workspace and report, keeps W&B's ids in ``folder``, and prints both URLs."""
    from ornstein.experiment.dashboard.publish import publish
    from ornstein.experiment.dashboard.store import write_specification

    labels = iter(("workspace", "report"))
    for url, saved in publish(specification, entity):
        write_specification(folder, saved)
        print(f"{next(labels):<10} {url}")


if __name__ == "__main__":
    main()
