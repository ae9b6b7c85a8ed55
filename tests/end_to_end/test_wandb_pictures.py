"""Every picture of a latent run, as W&B's own offline file has it."""

from __future__ import annotations

import json
import runpy
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

_read_wandb = runpy.run_path(str(Path(__file__).parents[1] / "experiment" / "wandb_reader.py"))["read_wandb"]


@pytest.mark.slow
def test_the_pictures_of_a_run_can_be_read_back(compose_config, tiny, tmp_path, monkeypatch):
    from ornstein.cli.train import train

    monkeypatch.setenv("WANDB_MODE", "offline")
    film = "mp4" if find_spec("av") is not None else "gif"
    run = tmp_path / "run"
    words = [word for word in tiny("latent_unet") if not word.startswith(("metrics=", "logger=", "~callbacks"))]
    train(
        compose_config(
            *(*words, "logger=wandb", "metrics=digits", "metrics.num_samples=30", "metrics.kid_subset_size=10"),
            *("metrics.best_worst=3", "metrics.bootstrap=0", "callbacks.sample_grid.every=1"),
            *(
                "~callbacks.schedule_plot",
                f"callbacks.trajectory.film={film}",
                "callbacks.trajectory.samples_per_class=2",
            ),
            run_dir=run,
        )
    )
    (segment,) = run.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 20
    while not (read := _read_wandb(segment)).complete and time.monotonic() < deadline:
        time.sleep(0.05)
    media = segment.parent / "files"

    def logged(key: str) -> dict[int, dict[str, object]]:
        """What W&B keeps under a key, by optimizer step."""
        found = {}
        for row in read.history:
            own = {name[len(key) + 1 :]: value for name, value in row.items() if name.startswith(key + ".")}
            if own:
                found[int(row["trainer/global_step"])] = own
        return found

    # One key, a picture a step: W&B's slider. Its files are those of the run's folder.
    samples = logged("samples")
    assert list(samples) == [1, 2, 3]
    for step, picture in samples.items():
        (name,) = picture["filenames"]
        same = [Image.open(media / name), Image.open(run / "samples" / f"step_{step:06}.png")]
        assert same[0].convert("RGB").tobytes() == same[1].convert("RGB").tobytes()
    assert list(logged("codec")) == [0] and list(logged("trajectory")) == [3]
    (denoising,) = logged("denoising").values()
    assert f"trajectory_000003.{film}" in [path.name for path in (run / "samples").iterdir()]
    assert (denoising["_type"], denoising["count"]) == ("videos", 1), denoising
    assert (media / denoising["videos"][0]["path"]).suffix == f".{film}"

    # The run's own copy of a table has no pictures: these are in its artifact.
    assert list(logged("samples/best_and_worst_table")) == [3]
    (files,) = [files for name, files in read.artifacts.items() if "best_and_worst_table" in name]
    (table,) = [path for name, path in files.items() if name.endswith(".table.json")]
    content = json.loads(table.read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    assert [(row["kind"], row["rank"]) for row in rows] == [(kind, i) for kind in ("best", "worst") for i in (1, 2, 3)]
    realism = [row["realism"] for row in rows]
    assert realism[:3] == sorted(realism[:3], reverse=True) and realism[3:] == sorted(realism[3:])
    assert min(realism[:3]) >= max(realism[3:])
    for row in rows:
        assert row["class"] == str(row["number"] % 10) and 0 <= row["nearest is"] < 16
        assert row["sample"]["_type"] == row["nearest training image"]["_type"] == "image-file"
        assert Image.open(files[row["sample"]["path"]]).size == (64, 64)
    assert list(logged("samples/best_and_worst")) == [3]
