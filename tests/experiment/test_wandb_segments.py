"""W&B's offline segments of a run that was killed: each step once over all of them, read back from the files."""

from __future__ import annotations

import os
import random
import runpy
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ornstein  # noqa: F401  (first: its torchvision guard lets Lightning be imported)
from ornstein.experiment.csv_log import CSVLogger
from ornstein.experiment.wandb_file import HEADER, read_records, replace_records
from ornstein.experiment.wandb_log import RunWandbLogger, run_id, wandb_logger
from ornstein.experiment.wandb_segments import cut_segments

READER = runpy.run_path(str(Path(__file__).with_name("wandb_reader.py")))


def test_records_of_any_size_come_back_and_a_torn_end_is_passed_over(tmp_path: Path) -> None:
    draw = random.Random(0)
    sizes = [0, 1, 100, 32747, 32754, 32755, 32761, 40000, 100_000, *(draw.randint(0, 9000) for _ in range(60))]
    bodies = [draw.randbytes(size) for size in sizes]
    path = tmp_path / "run.wandb"
    path.write_bytes(b":W&B\x01\x02\x03")
    replace_records(path, bodies)
    assert path.read_bytes()[:HEADER] == b":W&B\x01\x02\x03"
    assert list(READER["records"](path)) == bodies == list(read_records(path))
    whole = path.read_bytes()
    for size in sorted(draw.sample(range(len(whole)), 12)):
        path.write_bytes(whole[:size])
        read = list(read_records(path))
        assert read == bodies[: len(read)]
    path.write_bytes(b"something else")
    assert list(read_records(path)) == []


def log_from(folder: Path, steps: range, *, resumed: int | None) -> None:
    """One start: rows with a figure each to W&B and metrics.csv, a picture every third step."""
    wandb, rows = wandb_logger(folder, "ornstein", mode="offline"), CSVLogger(folder / "metrics.csv")
    if resumed is not None:
        wandb.resume_from(resumed)
        rows.truncate(resumed)
    for step in steps:
        for logger in (wandb, rows):
            logger.log_metrics({"loss": step / 7, "images_seen": 4.0 * step}, step=step)
        if step % 3 == 0:
            wandb.log_image("grids/samples", [Image.new("L", (4, 4), step)], step=step)
    wandb.close()
    rows.close()


def segment_of(folder: Path, number: int) -> Path:
    """The newest segment, once W&B's process has ended it, under a name of its own (names hold whole seconds)."""
    (file,) = (path for path in folder.glob("wandb/offline-run-2*/*.wandb") if "-run-1999" not in str(path))
    deadline = time.monotonic() + 20
    while not READER["read_wandb"](file).complete and time.monotonic() < deadline:
        time.sleep(0.01)
    (folder / "wandb" / "latest-run").unlink()
    name = f"offline-run-1999010{number}_000000-{run_id(folder)}"
    return file.parent.rename(file.parent.with_name(name)) / file.name


@pytest.mark.parametrize(("kept", "segments"), [(0.0, 1), (0.5, 2), (1.0, 2)], ids=["nothing", "half", "all"])
def test_each_step_is_there_once_whatever_the_kill_took(tmp_path: Path, kept: float, segments: int) -> None:
    """Killed at step 9 with the checkpoint at 6: rows 7 to 9 are cut and written again; what W&B had not written of the
    others is logged again, pictures too, under the same numbers.
    """
    log_from(tmp_path, range(10), resumed=None)
    first = segment_of(tmp_path, 1)
    records = list(read_records(first))
    os.truncate(first, HEADER)
    if kept:
        replace_records(first, records[: int(kept * len(records))])
    log_from(tmp_path, range(7, 13), resumed=6)
    parts = [READER["read_wandb"](path) for path in (first, segment_of(tmp_path, 2)) if path.exists()]
    assert len(parts) == segments and {part.run_id for part in parts} == {run_id(tmp_path)}
    assert parts[-1].complete
    rows = [row for part in parts for row in part.history]
    assert [row["trainer/global_step"] for row in rows] == list(range(13)) == [row["_step"] for row in rows]
    assert [row["loss"] for row in rows] == [step / 7 for step in range(13)]
    assert [row["images_seen"] for row in rows] == [4.0 * step for step in range(13)]
    pictured = [row["trainer/global_step"] for row in rows if any(key.startswith("grids/samples") for key in row)]
    assert pictured == [0, 3, 6, 9, 12]
    if not kept:  # the picture itself
        (found,) = tmp_path.glob("wandb/*1999*/files/media/images/grids/samples_3_*")
        assert Image.open(found).getpixel((0, 0)) == 3
    assert not (tmp_path / "wandb" / "lost").exists()


def test_a_run_that_starts_over_leaves_nothing_of_before(tmp_path: Path) -> None:
    log_from(tmp_path, range(5), resumed=None)
    first = segment_of(tmp_path, 1)
    log_from(tmp_path, range(5), resumed=-1)
    parts = [READER["read_wandb"](path) for path in (first, segment_of(tmp_path, 2))]
    assert [[row["_step"] for row in part.history] for part in parts] == [[], list(range(5))]


class Online:
    """A W&B run as ``resume="allow"`` gives it: it has had rows, and says which comes next."""

    def __init__(self, step: int) -> None:
        self.step, self.taken = step, list[int]()
        self.dir = "wandb/run-of-now/files"

    def log(self, row: dict[str, Any], step: int) -> None:
        if step >= self.step:  # W&B takes no row of a step that it has
            self.taken.append(step)
            self.step = step

    def define_metric(self, *names: str, **options: Any) -> None: ...


@pytest.mark.parametrize(("server", "expected"), [(5, [5, 6, 7, 8]), (0, list(range(9))), (9, [])])
def test_online_only_what_it_lacks_is_logged(tmp_path: Path, server: int, expected: list[int]) -> None:
    rows = CSVLogger(tmp_path / "metrics.csv")
    for step in range(7):
        rows.log_metrics({"loss": 1.0}, step=step)
    logger = wandb_logger(tmp_path, "ornstein", mode="offline")
    assert isinstance(logger, RunWandbLogger)
    run = Online(server)
    logger.mode = "online"
    logger._init = lambda mode: run  # type: ignore[method-assign]
    logger.resume_from(6)
    for step in (7, 8):
        logger.log_metrics({"loss": 1.0}, step=step)
    assert run.taken == expected


@pytest.mark.parametrize(
    ("content", "stays"), [(b"", False), (b":W&B\xe1\xbe\x01", False), (b"another form of log", True)]
)
def test_only_segments_that_hold_nothing_go(tmp_path: Path, content: bytes, stays: bool) -> None:
    """A start that was killed before its first record left nothing to sync; what W&B may write in years to come did."""
    file = tmp_path / "wandb" / "offline-run-1-a" / "run-a.wandb"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    cut_segments(tmp_path, after_step=0, live=tmp_path / "wandb" / "offline-run-2-a")
    assert file.exists() == stays
