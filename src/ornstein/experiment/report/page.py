"""The page: data, pictures, a plotting library and a script in one HTML file that needs no network."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from ornstein.experiment.atomic import write_text
from ornstein.experiment.report.collect import Picture, RunRecord, differing, find_runs, read_run

NAME = "report.html"
MIME = {".png": "image/png", ".gif": "image/gif"}
# In this order, where a run has them; a name that bears its count (fid_1k) stands for its figure.
HEADLINES = (
    *("fid", "fd_dinov2", "fd_efficientnet", "fd_clip", "cmmd", "kid", "sfid", "inception_score", "label_accuracy"),
    *("precision", "recall", "density", "coverage", "clip_score", "memorised_share", "psnr", "ssim", "lpips", "rfid"),
    *("bits_per_dim", "loss", "train/loss"),
)
_COUNTED = re.compile(r"_\d+k?$")
COSTS = ("nfe", "images_per_s", "parameters", "wall_time_s")


def write_report(
    root: str | Path,
    *,
    out: str | Path | None = None,
    max_pictures: int = 6,
    failures: Sequence[Mapping[str, str]] = (),
    advance: Callable[[str], None] | None = None,
) -> Path:
    """Writes ``report.html`` about the run in ``root``, or about all runs below it, and returns its path.

    Args:
        root: a run's folder, or one that holds several.
        out: the file; ``report.html`` in ``root`` unless given.
        max_pictures: of each kind that a run embeds, evenly spaced over its steps, the last among them.
        failures: jobs that left no folder: ``name``, ``status`` and ``reason`` of each.
        advance: called with each run's name when it has been read.

    Raises:
        OrnsteinError: no run in that folder.
        OSError: the page cannot be written; one that was there stays.
    """
    place = Path(root).expanduser()
    records = []
    for folder in find_runs(place):
        records.append(read_run(folder, root=place))
        if advance is not None:
            advance(records[-1].name)
    path = Path(out).expanduser() if out is not None else place / NAME
    write_text(path, page(records, title=_title(place), failures=failures, max_pictures=max_pictures))
    return path


def page(
    records: Sequence[RunRecord], *, title: str, failures: Sequence[Mapping[str, str]] = (), max_pictures: int = 6
) -> str:
    """The page's text."""
    from plotly.offline import get_plotlyjs

    figures = list(dict.fromkeys(name for record in records for name in record.figures))
    headline = _headline(figures)
    data = {
        "title": title,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": [_plain(record, max_pictures) for record in records],
        "failures": list(failures),
        "differing": _differing(records),
        "headline": [*headline, *(name for name in COSTS if name in figures)],
        "main": headline[0] if headline else None,
    }
    parts = {
        "title": html.escape(title),
        "css": _file("page.css"),
        # A script element ends at the first "</", wherever that stands.
        "data": json.dumps(data, allow_nan=False).replace("</", "<\\/"),
        "plotly": get_plotlyjs(),
        "script": _file("page.js"),
    }
    text = _file("page.html")
    for name, part in parts.items():
        before, mark, after = text.partition(f"@{name}@")
        assert mark
        text = before + part + after
    return text


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
    return "/".join(place.resolve().parts[-4:])


def _file(name: str) -> str:
    return files("ornstein.experiment.report").joinpath(name).read_text(encoding="utf-8")


def _plain(record: RunRecord, max_pictures: int) -> dict[str, Any]:
    return {
        "name": record.name,
        "status": record.status,
        "reason": record.reason,
        "config": {key: _number(value) for key, value in _settings(record).items()},
        "figures": {key: value for key, value in record.figures.items() if math.isfinite(value)},
        "curves": {key: [_number(value) for value in column] for key, column in record.curves.items()},
        "pictures": [
            {"kind": each.kind, "step": each.step, "src": _embedded(each.path)}
            for each in _chosen(record.pictures, max_pictures)
        ],
    }


def _settings(record: RunRecord) -> dict[str, Any]:
    return {f"asked: {key}": value for key, value in record.asked.items()} | dict(record.config)


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _chosen(pictures: Sequence[Picture], most: int) -> list[Picture]:
    chosen = []
    for kind in dict.fromkeys(picture.kind for picture in pictures):
        own = sorted((each for each in pictures if each.kind == kind), key=lambda each: each.step or 0)
        count = min(most, len(own))
        chosen += [own[len(own) - 1 - i * len(own) // count] for i in reversed(range(count))]
    return chosen


def _embedded(path: Path) -> str:
    return f"data:{MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
