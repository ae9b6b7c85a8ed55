"""The page: data, pictures, a plotting library and a script in one HTML file that needs no network."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from ornstein.experiment.atomic import write_text
from ornstein.experiment.report.collect import RunRecord, differing, find_runs, natural, read_failed, read_run
from ornstein.experiment.report.curves import FEWEST, POINTS, thinned
from ornstein.experiment.report.pictures import chosen, embedded

NAME = "report.html"
MAX_BYTES = 14_000_000
SCRIPTS = ("page.js", "plots.js", "pictures.js")
# In this order, where a run has them; a name that bears its count (fid_1k) stands for its figure.
HEADLINES = (
    *("fid", "fd_dinov2", "fd_efficientnet", "fd_clip", "cmmd", "kid", "sfid", "inception_score", "label_accuracy"),
    *("precision", "recall", "density", "coverage", "clip_score", "memorised_share", "psnr", "ssim", "lpips", "rfid"),
    *("bits_per_dim", "loss", "train/loss"),
)
_COUNTED = re.compile(r"_\d+k?$")
COSTS = ("nfe", "images_per_s", "parameters", "wall_time_s")


def write_report(
    root: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    max_pictures: int = 6,
    max_bytes: int = MAX_BYTES,
    failures: Sequence[Mapping[str, str]] = (),
    advance: Callable[[str], None] | None = None,
) -> Path:
    """Writes ``report.html`` about the run in ``root``, or about all runs below it, and returns its path.

    Args:
        root: a run's folder, or one that holds several; or a list of such.
        out: the file; unless given ``report.html`` in ``root``, or of several folders in the working directory.
        max_pictures: of each kind that a run embeds, evenly spaced over its steps, the last among them.
        max_bytes: about how large the page may become, the plotting library's 5 MB included: large pictures are made
            smaller, and what has no room is left out.
        failures: jobs that have failed, though they may have left no run or one that says it is running: ``name``
            (their folder below ``root``), ``status`` and ``reason`` of each.
        advance: called with each run's name when it has been read.

    Raises:
        OrnsteinError: no run in a folder.
        OSError: the page cannot be written; one that was there stays.
    """
    places = [Path(each).expanduser() for each in ([root] if isinstance(root, str | Path) else root)]
    above = places[0] if len(places) == 1 else Path(os.path.commonpath([place.absolute() for place in places]))
    records = []
    for folder in dict.fromkeys(folder.absolute() for place in places for folder in find_runs(place)):
        records.append(read_run(folder, root=above.absolute()))
        if advance is not None:
            advance(records[-1].name)
    told = {each["name"]: each for each in failures}
    records = [_ended(record, told.pop(record.name, None)) for record in records]
    early = [each for name, each in told.items() if (above / name / ".hydra").is_dir()]
    records += [read_failed(above / each["name"], **each) for each in early]
    records.sort(key=lambda record: natural(record.name))
    path = Path(out).expanduser() if out is not None else (above if len(places) == 1 else Path()) / NAME
    others = [each for each in told.values() if each not in early]
    text = page(records, title=_title(above), failures=others, max_pictures=max_pictures, max_bytes=max_bytes)
    write_text(path, text)
    return path


def _ended(record: RunRecord, failure: Mapping[str, str] | None) -> RunRecord:
    """A run as it is, or where it is known to have failed so; its own reason comes first."""
    if failure is None or record.status in ("failed", "interrupted", "damaged"):
        return record
    return replace(record, status=failure["status"], reason=record.reason or failure["reason"])


def page(
    records: Sequence[RunRecord],
    *,
    title: str,
    failures: Sequence[Mapping[str, str]] = (),
    max_pictures: int = 6,
    max_bytes: int = MAX_BYTES,
) -> str:
    """The page's text; see :func:`write_report`."""
    from plotly.offline import get_plotlyjs

    figures = list(dict.fromkeys(name for record in records for name in record.figures))
    headline = _headline(figures)
    points = max(FEWEST, POINTS // max(1, len(records)))
    plain = [_plain(record, points) for record in records]
    data: dict[str, Any] = {
        "title": title,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": plain,
        "failures": list(failures),
        "differing": _differing(records),
        "headline": [*headline, *(name for name in COSTS if name in figures)],
        "main": headline[0] if headline else None,
    }
    parts = {
        "title": html.escape(title),
        "css": _file("page.css"),
        "plotly": get_plotlyjs(),
        "script": "".join(_file(name) for name in SCRIPTS),
    }
    chosen_ones = [chosen(record.pictures, max_pictures) for record in records]
    used = sum(map(len, parts.values())) + len(_json(data))
    found = embedded(chosen_ones, max_bytes=max(max_bytes - used, max_bytes // 10))
    for run, pictures in zip(plain, chosen_ones, strict=True):
        run["pictures"] = [
            {"kind": each.kind, "step": each.step, "src": found[each.path]} for each in pictures if each.path in found
        ]
    data["left_out"] = sum(map(len, chosen_ones)) - len(found)
    text = _file("page.html")
    for name, part in {**parts, "data": _json(data)}.items():
        before, mark, after = text.partition(f"@{name}@")
        assert mark
        text = before + part + after
    return text


def _json(data: Mapping[str, Any]) -> str:
    # A script element ends at the first "</", wherever that stands.
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")


def _differing(records: Sequence[RunRecord]) -> list[str]:
    """What tells the runs apart: what was asked for, and where that tells nothing what their configs hold."""
    return [f"asked: {key}" for key in differing([record.asked for record in records])] or differing(
        [record.config for record in records]
    )


def _headline(figures: Sequence[str]) -> list[str]:
    """The figures that a table shows at first, best known first: ``val/fid_1k`` where ``fid`` is wanted."""
    found = [name for wanted in HEADLINES for name in figures if _COUNTED.sub("", name.removeprefix("val/")) == wanted]
    return list(dict.fromkeys(found))


def _title(place: Path) -> str:
    return "/".join(part for part in place.resolve().parts[-4:] if part != os.sep)


def _file(name: str) -> str:
    return files("ornstein.experiment.report").joinpath(name).read_text(encoding="utf-8")


def _plain(record: RunRecord, points: int) -> dict[str, Any]:
    return {
        "name": record.name,
        "status": record.status,
        "reason": record.reason,
        "config": {key: _number(value) for key, value in _settings(record).items()},
        "figures": {key: value for key, value in record.figures.items() if math.isfinite(value)},
        "curves": thinned(record.curves, points),
    }


def _settings(record: RunRecord) -> dict[str, Any]:
    return {f"asked: {key}": value for key, value in record.asked.items()} | dict(record.config)


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
