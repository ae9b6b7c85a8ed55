"""The W&B segments that earlier starts of a run left, made to end where its checkpoint stands.

Each offline start writes a segment, ``wandb/offline-run-<time>-<id>/run-<id>.wandb``, and ``wandb sync`` joins them. A
start that is killed leaves rows of steps after the checkpoint, which the next one logs again, and takes rows before it
along that W&B had not written yet (it writes 32 KiB at a time, so at first nothing at all). Before a resumed run logs,
:func:`cut_segments` removes the former, and says what is there; :func:`refill` logs the latter anew, numbers from
``metrics.csv`` and pictures from the files that W&B had stored beside the segment.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ornstein.errors import OrnsteinError
from ornstein.experiment.metrics_file import STEP, read_metrics
from ornstein.experiment.wandb_file import is_segment, read_records, replace_records

GLOBAL_STEP = "trainer/global_step"
_LOST = Path("wandb") / "lost"
# media/images/samples_500_0a1b2c3d4e5f60718293.png; the name may hold slashes, which are folders then
_MEDIA = re.compile(r"(?P<key>.+)_(?P<step>\d+)_[0-9a-f]{16,}\.(?P<kind>png|jpe?g|gif|mp4|webm)")


@dataclass
class Logged:
    """What W&B has of a run: the keys of each step's rows, and the pictures that were stored and whose rows are lost.

    Attributes:
        keys: step -> names logged at it.
        lost: (step, name) -> files.
    """

    keys: dict[int, set[str]] = field(default_factory=dict)
    lost: dict[tuple[int, str], list[Path]] = field(default_factory=dict)


def cut_segments(run_dir: Path, *, after_step: int, live: Path) -> Logged:
    """Cuts the rows of steps greater than ``after_step`` from all offline segments of a run but the one in ``live``.

    A segment in which W&B wrote nothing is removed, when its pictures are known: ``wandb sync`` could make nothing of
    it. The pictures of lost rows are moved to ``wandb/lost`` until :func:`refill` has logged them.

    Raises:
        OSError: from the file system.
    """
    logged = Logged()
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        if file.parent.name == live.name:  # this start's, which has no rows yet
            continue
        bodies = list(read_records(file))
        kept = list(_kept(bodies, after_step, logged))
        _find_lost(file.parent / "files" / "media", after_step, logged, keep=run_dir / _LOST)
        if not kept and is_segment(file):  # what another version of W&B wrote is let be
            shutil.rmtree(file.parent)
        elif len(kept) < len(bodies):
            replace_records(file, kept)
    # Those of a start that was killed before it had logged them again.
    _find_lost(run_dir / _LOST, after_step, logged, keep=run_dir / _LOST)
    logged.lost = {
        (step, key): files for (step, key), files in logged.lost.items() if key not in logged.keys.get(step, ())
    }
    return logged


def _kept(bodies: list[bytes], after_step: int, logged: Logged) -> Iterator[bytes]:
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when it is imported

    for body in bodies:
        record = Record()
        record.ParseFromString(body)
        if record.WhichOneof("record_type") == "history":
            items = {".".join(each.nested_key) or each.key: each.value_json for each in record.history.item}
            step = _step_of(items, record.history.step.num)
            if step > after_step:
                continue
            # A picture is one key with parts below it.
            logged.keys.setdefault(step, set()).update(key.partition("._type")[0] for key in items)
            logged.keys[step].update(key for key in items if not key.startswith("_"))
        yield body


def _step_of(items: Mapping[str, str], counted: int) -> int:
    return int(json.loads(items[GLOBAL_STEP])) if GLOBAL_STEP in items else counted


def _find_lost(media: Path, after_step: int, logged: Logged, *, keep: Path) -> None:
    """Notes the stored pictures of steps up to ``after_step``, from copies that outlive the segment."""
    for path in sorted(media.glob("*/**/*.*"), key=lambda path: path.stat().st_mtime_ns) if media.is_dir() else ():
        inside = path.relative_to(media)
        match = _MEDIA.fullmatch("/".join(inside.parts[1:]))
        if not match or int(match["step"]) > after_step or not path.is_file():
            continue
        step, key = int(match["step"]), match["key"]
        if key in logged.keys.get(step, ()):
            continue
        copied, found = keep / inside, logged.lost.setdefault((step, key), [])
        if copied != path:
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copied)
        if copied not in found:
            found.append(copied)


def refill(
    log: Callable[[dict[str, Any], int], Any], run_dir: Path, *, after_step: int, up_to: int, logged: Logged
) -> None:
    """Has ``log(row, step)`` take what W&B has not of the steps in (``after_step``, ``up_to``], in order of step."""
    rows: dict[int, dict[str, Any]] = {}
    with suppress(OrnsteinError):  # without the file there is nothing to log again
        for row in read_metrics(run_dir / "metrics.csv"):
            step = int(row[STEP])
            missing = {key: value for key, value in row.items() if key not in {STEP, *logged.keys.get(step, ())}}
            if after_step < step <= up_to and missing:
                rows[step] = missing
    for (step, key), files in logged.lost.items():
        if not after_step < step <= up_to:
            continue
        rows.setdefault(step, {})[key] = _media(files)
    for step in sorted(rows):
        if step not in logged.keys or rows[step].keys() - {"images_seen", "time/wall_s"}:
            log(rows[step], step)
    shutil.rmtree(run_dir / _LOST, ignore_errors=True)


def _media(files: list[Path]) -> Any:
    import wandb

    if files[0].suffix in (".gif", ".mp4", ".webm"):
        return wandb.Video(str(files[0]), format=files[0].suffix[1:])  # type: ignore[arg-type]
    return [wandb.Image(str(path)) for path in files]
