"""The README's commands as written, only shorter, and what they leave behind."""

from __future__ import annotations

import csv
import json
import math
import runpy
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

pytestmark = pytest.mark.slow

SHORT = ("trainer.max_steps=2", "metrics.num_samples=16", "sampler.steps=4")
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def ran(result: subprocess.CompletedProcess[str]) -> str:
    """What a good command printed: no warning, no traceback, nothing twice."""
    assert result.returncode == 0, result.stderr
    text = result.stdout + result.stderr
    for noise in ("Traceback", "Warning", "warn", "deprecated", "GPU available", "💡", "LOCAL_RANK", "profiler_start"):
        # torch's profiler writes a line of its own in C++ that only an environment variable could take away.
        assert noise not in text.replace("Warning: Optimizer.step#", ""), text
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    assert len(lines) == len(set(lines)), result.stdout
    return text


def runs_in(folder: Path, task: str = "train") -> list[Path]:
    # Hydra and W&B's artifact keep a config.yaml of their own.
    found = (path.parent for path in (folder / "outputs" / task).rglob("config.yaml"))
    return sorted(place for place in found if place.name not in (".hydra", "artifacts"))


def summary_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def default(command: Command, folder: Path) -> tuple[Path, str]:
    """The first run, and what it printed. Some twenty steps, so that its samples are something."""
    small = ("trainer.max_steps=20", "data.batch_size=32", "metrics.num_samples=80", "callbacks.log.every=5")
    text = ran(command("train.py", *small, cwd=folder))
    (run,) = runs_in(folder)
    return run, text


def test_what_will_run_is_told_before_the_first_step(default):
    run, text = default
    for words in [
        "W&B logs offline; to upload this run: wandb sync",
        str(run),
        "digits: 1,438 train, 359 held out, 1x8x8",
        "parameters",
        "MFLOPs a sample",
        "Cosine schedule, v output, DDIM sampler with 50 steps",
        "32 effective (32 x 1 accumulated x 1 device)",
        "640 to see in 20 steps, 0.4 epochs",
        "MB activations",
        "of training (",
        "step 20/20 (100 %)",
        "fid",
        "written to",
    ]:
        assert words in text, words
    assert text.index("parameters") < text.index("figures") < text.index("written to")  # the bar is on the other stream


def test_the_run_directory_holds_what_it_promises(default):
    run, _ = default
    names = {str(path.relative_to(run)) for path in run.rglob("*") if "wandb/" not in str(path) and path.is_file()}
    assert names >= {
        ".hydra/config.yaml",
        ".hydra/overrides.yaml",
        "config.yaml",
        "environment.json",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "metrics.csv",
        "evaluation.json",
        "summary.json",
        "schedule.png",
        "samples/step_000020.png",
        "samples/trajectory_000020.png",
        "samples/trajectory_000020.gif",
        "wandb_id.txt",
    }
    assert not [name for name in names if "=" in name or name.endswith(".tmp")]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert OmegaConf.create(config).model.network.in_channels == 1 and "${" not in (run / "config.yaml").read_text()
    assert config["name"] == "digits-class_unet" and config["trainer"]["max_steps"] == 20
    environment = json.loads((run / "environment.json").read_text())
    assert environment["seed"] == 0 and environment["versions"]["torch"] and "revision" in environment["git"]


def test_the_summary_is_finite_and_consistent(default):
    run, _ = default
    summary = summary_of(run)
    assert summary["status"] == "finished" and summary["error"] is None
    for name in ("parameters", "flops", "nfe", "images_per_s", "samples_per_s", "wall_time_s", "images_seen", "steps"):
        assert math.isfinite(summary[name]) and summary[name] > 0, name
    assert summary["peak_memory_mb"]["host"] > 100
    assert (summary["nfe"], summary["steps"], summary["images_seen"]) == (50, 20, 640)
    assert summary["effective_batch"] == 32 and summary["num_samples"] == 80
    for name in ("fid_80", "kid", "inception_score_80", "label_accuracy", "fid_floor", "real_inception_score", "loss"):
        assert math.isfinite(summary[f"val/{name}"]), name
    assert summary["val/fid_80"] > summary["val/fid_floor"] > 0
    assert "val/fid" not in summary  # 80 samples make no figure that others could compare with
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 5, 10, 15, 20]
    assert float(rows[-1]["val/fid_80"]) == pytest.approx(summary["val/fid_80"], rel=1e-6)  # float32 there
    losses = [float(row["train/loss"]) for row in rows[1:]]
    assert losses[-1] < losses[0]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["values"]["fid_80"] == pytest.approx(summary["val/fid_80"], rel=1e-6)


def test_pictures_show_something(default):
    run, _ = default
    pictures = [*run.glob("samples/*.png"), run / "schedule.png"]
    for path in pictures:
        picture = Image.open(path)
        assert min(picture.size) > 200 and len(picture.convert("L").getcolors()) > 20, path
    film = Image.open(run / "samples" / "trajectory_000020.gif")
    assert 10 <= film.n_frames <= 31


def test_the_wandb_run_can_be_read(default):
    run, _ = default
    read_wandb = runpy.run_path(str(Path(__file__).parents[1] / "experiment" / "wandb_reader.py"))["read_wandb"]
    (segment,) = run.glob("wandb/offline-run-*/*.wandb")
    logged = read_wandb(segment)
    assert logged.complete and logged.run_id == (run / "wandb_id.txt").read_text().strip()
    assert logged.name == "digits-class_unet" and "model" in logged.config
    names = set().union(*logged.history)
    assert {"train/loss", "val/loss", "val/fid_80", "images_seen", "trainer/global_step"} <= names
    assert any(name.startswith("samples") for name in names) and any(name.startswith("denoising") for name in names)


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)


def test_checkpoints_hold_tensors_and_plain_json(default):
    run, _ = default
    for name in ("last", "best"):
        state = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert plain(state)
        config = state["ornstein"]["config"]
        assert json.loads(json.dumps(config)) == config == yaml.safe_load((run / "config.yaml").read_text())


def test_sample(command, default, folder):
    run, _ = default
    arguments = ("num_samples=64", "sampler=dpmpp_2m", "sampler.steps=5", "guidance=cfg", "guidance.scale=2")
    text = ran(command("sample.py", f"run={run.relative_to(folder)}", *arguments, cwd=folder))
    (samples,) = runs_in(folder, "sample")
    assert "64 samples, 10 network evaluations each" in text and str(samples) in text
    stored = np.load(samples / "samples.npz")
    assert stored["arr_0"].shape == (64, 8, 8, 1) and stored["arr_0"].std() > 10
    assert len(list((samples / "samples").glob("0*.png"))) == 64
    assert len(Image.open(samples / "samples" / "grid.png").convert("L").getcolors()) > 20
    assert summary_of(samples)["nfe"] == 10
    config = yaml.safe_load((samples / "config.yaml").read_text())
    assert config["sampler"]["steps"] == 5 and config["guidance"]["scale"] == 2
    for position, image in enumerate(stored["arr_0"][:3]):
        assert np.array_equal(np.asarray(Image.open(samples / "samples" / f"{position:06d}.png")), image[..., 0])


def test_evaluate_agrees_with_the_run_itself_and_with_python(command, default, folder):
    import ornstein

    run, _ = default
    text = ran(command("evaluate.py", f"run={run}", "num_samples=80", cwd=folder))
    (evaluation,) = runs_in(folder, "evaluate")
    summary = summary_of(evaluation)
    # The same samples as at the end of training, in other batches.
    assert summary["fid_80"] == pytest.approx(summary_of(run)["val/fid_80"], rel=1e-3)
    assert summary["label_accuracy"] == summary_of(run)["val/label_accuracy"]
    assert "fid" in text and "80 samples in the digits feature space" in text and summary["nfe"] == 50
    assert len(Image.open(evaluation / "samples" / "nearest_training_images.png").convert("L").getcolors()) > 20
    assert not (evaluation / "checkpoints").exists(), "nothing that is empty"
    few = command("evaluate.py", f"run={run}", "num_samples=16", "sampler.steps=2", cwd=folder)
    assert few.returncode == 0 and "warning: num_samples=16" in few.stderr and "at least 65" in few.stderr
    again = ran(command("evaluate.py", f"run={run}", "num_samples=80", "sampler=ddim", "sampler.steps=4", cwd=folder))
    assert again != text and summary_of(runs_in(folder, "evaluate")[-1])["nfe"] == 4
    figures = ornstein.load(run).evaluate(80)
    assert figures["fid_80"] == pytest.approx(summary["fid_80"], rel=1e-3)


def test_a_run_that_is_wrong_is_told_of_in_one_sentence(command, default, folder, tmp_path):
    run, _ = default
    for script, arguments, words in [
        ("sample.py", ["sampler=ddim", "sampler/grid=trailing", "sampler.steps=2000"], "num_timesteps=1000"),
        ("sample.py", ["num_samples=0"], "num_samples=0"),
        ("sample.py", ["labels=[11]"], "0 to 9"),
        ("evaluate.py", ["num_samples=1"], "at least 2"),
        ("train.py", ["trainer.max_steps=30", "optimizer.lr=1e-4"], "optimizer.lr=1e-4 cannot be changed"),
        ("train.py", ["trainer.accelerator=abacus"], "abacus"),
    ]:
        named = f"resume={run}" if script == "train.py" else f"run={run}"
        result = command(script, named, *arguments, cwd=tmp_path)
        assert result.returncode == 1 and words in result.stderr, result.stderr
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert summary_of(run)["status"] == "finished" and summary_of(run)["steps"] == 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("model=dit scheduler=cosine", "DiT"),
        ("model=pixel_unet objective=v scheduler=flow sampler=heun", "Flow schedule, v output, Heun sampler"),
        ("model=latent_unet", "digits: 1,438 train, 359 held out, 1x32x32"),
        ("model=latent_dit guidance=cfg data.num_workers=1", "DiT"),
        ("debug=fast_dev_run", "16 to see in 2 steps"),
        ("debug=overfit", "digits: 16 train"),
        ("debug=profiler", "to see in 30 steps"),
        ("logger=tensorboard trainer.enable_progress_bar=false", "UNet"),
        ("metrics=none ema=none lr_schedule=none guidance=none optimizer=sgd", "UNet"),
        ("data.num_classes=null model=pixel_unet", "UNet"),
    ],
)
def test_the_commands_work_as_written(command, tmp_path, arguments, words):
    shorter = [] if arguments.startswith("debug=") else list(SHORT)
    shorter += ["trainer.max_steps=3", "metrics.num_samples=16"] if "overfit" in arguments else []
    text = ran(command("train.py", *arguments.split(), *shorter, cwd=tmp_path))
    assert words in text
    (run,) = runs_in(tmp_path)
    assert summary_of(run)["status"] == "finished" and (run / "checkpoints" / "last.ckpt").is_file()
    assert list(run.glob("samples/step_*.png"))
    if "profiler" in arguments:
        (table,) = run.glob("*profile*.txt")
        assert "Self CPU" in table.read_text()
    if "tensorboard" in arguments:
        assert list(run.glob("tensorboard/events.*"))
    ran(command("sample.py", f"run={run}", "num_samples=4", "sampler=ddim", "sampler.steps=2", cwd=tmp_path))


def test_nothing_around_training_is_nothing(command, tmp_path):
    ran(command("train.py", "callbacks=none", "logger=none", "metrics=none", "trainer.max_steps=2", cwd=tmp_path))
    (run,) = runs_in(tmp_path)
    assert summary_of(run)["status"] == "finished"
    assert not (run / "checkpoints").exists() and not (run / "samples").exists()


def test_a_sweep_and_what_it_says_of_a_cell_that_cannot_work(command, tmp_path):
    small = ("data.limit=16", "data.batch_size=8", *SHORT)
    # `-m` wherever it stands.
    result = command("train.py", "model=dit,pixel_unet", "-m", "scheduler=linear,cosine", *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    runs = runs_in(tmp_path)
    assert [run.name for run in runs] == ["0", "1", "2", "3"] and runs[0].parents[2].name == "multirun"
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    kinds = [(c["model"]["network"]["_target_"].rpartition(".")[2], c["scheduler"]["_target_"]) for c in configs]
    assert kinds == [
        (net, f"ornstein.diffusion.schedules.{s}") for net in ("DiT", "UNet") for s in ("Linear", "Cosine")
    ]
    assert len({(run / "wandb_id.txt").read_text() for run in runs}) == 4
    assert all(summary_of(run)["status"] == "finished" for run in runs)

    elsewhere = tmp_path / "refused"
    elsewhere.mkdir()
    result = command("train.py", "-m", "objective=eps,v", "scheduler=flow", *small, cwd=elsewhere)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.count("error: objective=eps") == 1
    (run,) = runs_in(elsewhere)
    assert run.name == "1" and summary_of(run)["status"] == "finished"


def test_the_recipe_that_needs_data_says_how_and_runs_with_them(command, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = command(
        "train.py", "experiment=ddpm_fashion_mnist", f"data.root={empty}", "data.download=false", cwd=empty
    )
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "dataset-fashion-mnist" in result.stderr and "data.root=" in result.stderr
    # Files of the right form with a few images in them.
    data = tmp_path / "data"
    data.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 64), ("t10k", 32)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8).tobytes()
        (data / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + pixels)
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        (data / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels)
    small = ("data.batch_size=8", "model.network.base_channels=8", *SHORT)
    text = ran(command("train.py", "experiment=ddpm_fashion_mnist", f"data.root={data}", *small, cwd=tmp_path))
    assert "AnnotatedUNet" in text and "Linear schedule, eps output, DDPM sampler" in text and "1x28x28" in text


def test_ctrl_c_leaves_a_run_that_goes_on(command, tmp_path):
    import os
    import signal
    import sys
    import time

    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [
            sys.executable,
            str(root / "train.py"),
            "hydra.run.dir=run",
            "callbacks.log.every=1",
            *SHORT,
            "trainer.max_steps=5000",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root / "src"), "WANDB_MODE": "offline"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    rows = tmp_path / "run" / "metrics.csv"
    while not (rows.exists() and len(rows.read_text().splitlines()) > 3) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "Traceback" not in text, text
    assert "resume=" in text, text
    run = tmp_path / "run"
    assert summary_of(run)["status"] == "interrupted"
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert step >= 3
    resumed = ran(command("train.py", "resume=run", f"trainer.max_steps={step + 2}", cwd=tmp_path))
    assert f"at step {step:,}" in resumed and summary_of(run)["status"] == "finished"
