"""Which runs are the same run: a hash of what decides the result."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ornstein.errors import OrnsteinError
from ornstein.experiment.run_dir import RunDirectory, read_config

# where a value stands decides whether it counts; "a.b" is the key b of the group a
_WITHOUT_EFFECT = {
    "hydra",
    "logger",
    "name",
    "notes",
    "paths",
    "progress",
    "resume",
    "run_dir",
    "tags",
    "conditioner.cache",
    "conditioner.download",
    "callbacks.progress",
    "callbacks.progress_bar",
    "callbacks.rich_progress_bar",
    "trainer.accelerator",
    "trainer.default_root_dir",
    "trainer.devices",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.logger",
    "trainer.memory_cap",
    "trainer.num_nodes",
    "trainer.num_workers",
    "trainer.profiler",
    "trainer.strategy",
}
# loading habits, wherever they stand
_LOADER_KEYS = {"num_workers", "persistent_workers", "pin_memory", "prefetch_factor"}


def identity(config: Mapping[str, Any], *, name: str | None = None) -> str:
    """``<name>-<12 hex digits>``: equal for two configs exactly where they ask for the same result.

    The digits are the head of the sha256 of the resolved config (plain dicts, lists, scalars) without run
    folder, logger, hardware, worker counts, progress display and ``resume``. Values below a folder named in
    ``config["paths"]`` count relative to it, so that a timestamped folder inside a value makes no
    difference; any other path counts (another image folder is another run). 2 and 2.0 are equal. ``name``
    defaults to ``config["name"]``, then ``config["task"]``, then ``run``.
    """
    folders = sorted(
        ((value.rstrip("/"), key) for key, value in _paths(config) if value.rstrip("/")),
        key=lambda pair: (-len(pair[0]), pair[1]),
    )
    text = json.dumps(
        _canonical(_as_asked(config), folders, ""), sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )
    digits = hashlib.sha256(text.encode()).hexdigest()[:12]
    given = name or config.get("name") or config.get("task") or "run"
    return f"{re.sub(r'[^A-Za-z0-9_.]+', '-', str(given)).strip('-') or 'run'}-{digits}"


def _as_asked(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the batch that was asked for, where ``trainer.find_batch_size`` has divided it; an answer of no is none."""
    trainer, data = config.get("trainer"), config.get("data")
    if not isinstance(trainer, Mapping) or "find_batch_size" not in trainer:
        return config
    if not trainer["find_batch_size"]:
        return {**config, "trainer": {key: value for key, value in trainer.items() if key != "find_batch_size"}}
    if not isinstance(data, Mapping):
        return config
    effective = int(data.get("batch_size", 1)) * int(trainer.get("accumulate_grad_batches", 1))
    return {
        **config,
        "data": {**data, "batch_size": effective},
        "trainer": {**trainer, "accumulate_grad_batches": 1},
    }


def _paths(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    paths = config.get("paths")
    for key, value in (paths if isinstance(paths, Mapping) else {}).items():
        if isinstance(value, str) and os.path.isabs(value):
            yield str(key), value
    if isinstance(config.get("run_dir"), str):
        yield "run_dir", config["run_dir"]


def _canonical(value: Any, folders: list[tuple[str, str]], where: str) -> Any:
    if isinstance(value, Mapping):
        kept = {}
        for key, item in value.items():
            place = f"{where}.{key}" if where else str(key)
            if place not in _WITHOUT_EFFECT and str(key) not in _LOADER_KEYS:
                kept[str(key)] = _canonical(item, folders, place)
        return kept
    if isinstance(value, list | tuple):
        return [_canonical(item, folders, where) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        for folder, key in folders:
            if value == folder or value.startswith(folder + "/"):
                return f"<{key}>{value[len(folder) :]}"
    return value


def find_unfinished(root: str | os.PathLike[str], identity_: str, *, name: str | None = None) -> RunDirectory | None:
    """The newest run below ``root`` with this identity that did not come to its own end; None where there
    is none.

    What ``resume=auto`` goes on with. Newest by the time its ``config.yaml`` was written. A run that failed
    or was interrupted counts, one that still runs too (its lock then tells whose it is). It may have no
    checkpoint yet: ``last_checkpoint()`` is None then and it starts over in its folder. ``name`` is as for
    :func:`identity`.
    """
    found: list[tuple[int, str]] = []
    for folder, folders, files in os.walk(root):
        if "config.yaml" in files:
            path = os.path.join(folder, "config.yaml")
            found.append((os.stat(path).st_mtime_ns, path))
            folders.clear()  # runs do not nest, and a run's own subfolders are many
        else:
            folders[:] = [each for each in folders if not each.startswith(".")]
    for _, path in sorted(found, reverse=True):
        try:
            same = identity(read_config(path), name=name) == identity_
        except OrnsteinError:
            continue
        run = RunDirectory(Path(path).parent, create=False)
        if same and not run.finished:
            return run
    return None
