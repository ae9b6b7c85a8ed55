"""What a report tells of each run, read from the run's folder alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ornstein.errors import OrnsteinError
from ornstein.experiment.metrics_file import read_metrics
from ornstein.experiment.run_dir import RunDirectory, read_config

Scalar = str | float | int | bool | None
_PICTURE = re.compile(r"(?P<kind>.*?)_?(?P<step>\d{3,})")
STILLS, FILMS = (".png",), (".gif", ".mp4")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of a run: what it shows (``step``, ``trajectory``, ...), and after which step where it says so."""

    kind: str
    step: int | None
    path: Path


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its folder tells it.

    Attributes:
        name: path below the folder of the report.
        status: finished, running, interrupted, failed; ``damaged`` where the folder cannot be read.
        reason: one sentence on how it ended, where it did not end well.
        asked: what the command line said, ``model=dit`` as ``{"model": "dit"}``.
        config: dotted keys of the resolved config and plain values.
        figures: of ``summary.json`` and ``evaluation.json``, numbers only.
        curves: columns of ``metrics.csv``, None where a row has nothing.
        pictures: below ``samples``, and ``schedule.png``.
    """

    name: str
    folder: Path
    status: str
    reason: str | None
    asked: Mapping[str, Scalar]
    config: Mapping[str, Scalar]
    figures: Mapping[str, float]
    curves: Mapping[str, Sequence[float | None]]
    pictures: Sequence[Picture]


def find_runs(root: str | Path) -> list[Path]:
    """Every run folder at or below ``root`` (those that hold a ``config.yaml``), in natural order (2 before 10).

    Raises:
        OrnsteinError: no folder, or no run in it.
    """
    place = Path(root).expanduser()
    if not place.is_dir():
        raise OrnsteinError(f"{place} is no folder: name a run's folder, or one that holds several.")
    found = sorted(_folders(place), key=lambda folder: natural(str(folder)))
    if not found:
        raise OrnsteinError(f"{place} holds no run (no config.yaml below it): name a folder that training wrote.")
    return found


def _folders(place: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(place):
        below[:] = [name for name in below if not name.startswith(".") and name not in ("wandb", "checkpoints")]
        if "config.yaml" in files:
            yield Path(folder)


def natural(text: str) -> list[tuple[int, str]]:
    """Sorts names as a person would: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def read_run(folder: Path, *, root: Path) -> RunRecord:
    """What a run's folder tells; a damaged one is told as such and spoils no report."""
    name = folder.name if folder == root else str(folder.relative_to(root))
    try:
        run = RunDirectory(folder, create=False)
        summary = run.summary()
        evaluation = _json(folder / "evaluation.json")
        rows = read_metrics(run.metrics_path) if run.metrics_path.is_file() else []
        config, asked = flat(read_config(run.config_path)), _asked(folder / ".hydra" / "overrides.yaml")
    except (OrnsteinError, OSError, ValueError, yaml.YAMLError) as error:
        nothing: dict[str, Any] = {"asked": {}, "config": {}, "figures": {}, "curves": {}, "pictures": ()}
        return RunRecord(name=name, folder=folder, status="damaged", reason=str(error), **nothing)
    numbers = {**_numbers(summary), **_numbers(evaluation.get("values", {})), **_cost(evaluation)}
    reason = summary.get("error")
    return RunRecord(
        name=name,
        folder=folder,
        status=str(summary.get("status") or "unknown"),
        reason=str(reason) if reason else None,
        asked=asked,
        config=config,
        figures=numbers,
        curves=_columns(rows),
        pictures=tuple(_pictures(folder)),
    )


def read_failed(folder: Path, *, name: str, status: str, reason: str) -> RunRecord:
    """A job of a sweep that failed before it left a config: what it was asked for, and why it failed."""
    try:
        asked = _asked(folder / ".hydra" / "overrides.yaml")
    except (OSError, yaml.YAMLError):
        asked = {}
    nothing: dict[str, Any] = {"config": {}, "figures": {}, "curves": {}, "pictures": ()}
    return RunRecord(name=name, folder=folder, status=status, reason=reason, asked=asked, **nothing)


def flat(config: Mapping[str, Any], *, prefix: str = "") -> dict[str, Scalar]:
    """A nested config as dotted keys; lists become text."""
    found: dict[str, Scalar] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, prefix=f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            found[f"{prefix}{key}"] = json.dumps(value)
        else:
            found[f"{prefix}{key}"] = value
    return found


def differing(tables: Sequence[Mapping[str, Scalar]]) -> list[str]:
    """The keys whose values are not the same in all tables, without those that only tell where a run lies."""
    own = ("paths.", "hydra.", "resume")
    read = [table for table in tables if table]
    keys = dict.fromkeys(key for table in read for key in table if not key.startswith(own))
    return [key for key in keys if len({repr(table.get(key)) for table in read}) > 1]


def typed(path: Path) -> dict[str, str]:
    """The overrides that Hydra kept in a file, by key, as they were typed; none where there is no file."""
    words = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    pairs = [str(word).lstrip("+~").partition("=") for word in words or []]
    return {key: value for key, _, value in pairs}


def _asked(path: Path) -> dict[str, Scalar]:
    """The same, numbers as numbers."""
    return {key: _scalar(value) for key, value in typed(path).items()}


def _scalar(text: str) -> Scalar:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removeprefix("val/"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _cost(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Network evaluations and number of samples of the newest figures."""
    found = _numbers({"nfe": (evaluation.get("sampling") or {}).get("nfe")})
    return found | _numbers({"num_samples": evaluation.get("num_samples")})


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: [value if isinstance(value := row.get(name), int | float) else None for row in rows] for name in names
    }


def _pictures(folder: Path) -> Iterator[Picture]:
    for path in [*sorted((folder / "samples").glob("*")), folder / "schedule.png"]:
        if path.suffix not in (*STILLS, *FILMS) or not path.is_file():
            continue
        parts = _PICTURE.fullmatch(path.stem)
        kind = path.stem if parts is None else parts["kind"]
        film = " (film)" if path.suffix in FILMS else ""
        yield Picture(kind=kind + film, step=None if parts is None else int(parts["step"]), path=path)
