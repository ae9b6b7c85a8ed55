"""A run that was killed and gone on with is the run that was never stopped, to the bit."""

from __future__ import annotations

import csv
import runpy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ornstein
from ornstein.cli.ema import make, parse
from ornstein.cli.launch import find_mistake
from ornstein.cli.resume import prepare_resume
from ornstein.cli.train import train
from ornstein.errors import OrnsteinError
from ornstein.experiment import RunDirectory

STEPS = 12
TRUST = "trust_targets=[kill_once]"  # the user's own callback, below
KILL = '''
"""A user's own callback: ends the process as a power cut would, once."""
import os, pathlib, signal
import lightning.pytorch as pl


class KillOnce(pl.Callback):
    def __init__(self, hook, step, flag):
        self.hook, self.step, self.flag = hook, step, pathlib.Path(flag)

    def _die(self, hook, step):
        if hook == self.hook and step == self.step and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._die("between", trainer.global_step)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._die("within", trainer.global_step + 1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._die("before the checkpoint", trainer.global_step)
'''
# Rows, validations, pictures, figures and checkpoints fall on different steps, and everything random is on.
SETTINGS = [
    f"trainer.max_steps={STEPS}",
    "data.batch_size=8",
    "data.flip=true",
    "model.network.dropout=0.1",
    "trainer.accumulate_grad_batches=2",
    "callbacks.log.every=2",
    "callbacks.log.levels_every=3",
    "callbacks.validation.every=4",
    "callbacks.sample_grid.every=5",
    "callbacks.checkpoint.every=3",
    "callbacks.checkpoint.monitor=val/loss",
]


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A user's folder with a class and a config option of theirs: ``callbacks=killed``."""
    folder = tmp_path / "user"
    (folder / "conf" / "callbacks").mkdir(parents=True)
    (folder / "kill_once.py").write_text(KILL)
    (folder / "conf" / "callbacks" / "killed.yaml").write_text(
        "defaults: [default]\n"
        "kill: {_target_: kill_once.KillOnce, hook: between, step: 7, flag: " + str(tmp_path / "killed") + "}\n"
    )
    return folder


def resume_here(compose: Any, folder: Path, *overrides: str) -> dict[str, float]:
    """What ``python train.py resume=folder ...`` does, in this process."""
    argv = ["train.py", f"resume={folder}", *overrides]
    name = prepare_resume(argv)
    return train(compose(*argv[1:], run_dir=folder, config_name=name))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        kept = [
            {k: v for k, v in row.items() if not k.startswith(("time/", "system/"))} for row in csv.DictReader(file)
        ]
    return kept


def state(folder: Path, name: str = "last") -> dict[str, Any]:
    return dict(torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True))


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    else:
        assert ours == theirs, where


def assert_same_run(folder: Path, whole: Path, *, callbacks: tuple[str, ...] = ("EMA", "TrainingLog", "Checkpoint")):
    """Weights, averages with their counter, optimizer, schedule, counters and rows: all but times and paths."""
    assert rows(folder) == rows(whole)
    steps = [int(row["step"]) for row in rows(folder)]
    assert steps == sorted(set(steps))
    ours, theirs = state(folder), state(whole)
    for key in ("global_step", "epoch", "state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert_same(ours[key], theirs[key], key)
    for name in callbacks:
        assert_same(ours["callbacks"][name], theirs["callbacks"][name], name)
    for key in ("micro_batches_seen", "images_seen"):
        assert ours["ornstein"][key] == theirs["ornstein"][key]
    pictures = sorted(path.name for path in (whole / "samples").glob("*.png"))
    assert pictures == sorted(path.name for path in (folder / "samples").glob("*.png")) and pictures
    for name in pictures:
        assert (folder / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes(), name


def killed(result: Any) -> bool:
    return bool(result.returncode == -signal.SIGKILL)


# Where it dies, and the step that it goes on from: a multiple of 3, or the newest best of steps 4, 8 and 12.
CASES = [
    pytest.param("between", 7, 6, id="between two steps, rows behind the checkpoint"),
    pytest.param("within", 9, 8, id="within a step", marks=pytest.mark.slow),
    pytest.param("before the checkpoint", 6, 4, id="before the step's checkpoint", marks=pytest.mark.slow),
    pytest.param("between", STEPS, STEPS, id="never: the last step comes first", marks=pytest.mark.slow),
    pytest.param("within", 2, None, id="before the first checkpoint", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("hook", "step", "at"), CASES)
def test_killed_and_resumed_equals_undisturbed(compose, command, tiny, user, tmp_path, monkeypatch, hook, step, at):
    settings = [*tiny(), *SETTINGS, "callbacks=killed", f"callbacks.kill.hook={hook}", f"callbacks.kill.step={step}"]
    folder = tmp_path / "cut"
    first = command(
        "train.py", "--config-dir", str(user / "conf"), *settings, f"hydra.run.dir={folder}", cwd=tmp_path, path=[user]
    )
    assert killed(first) == (step < STEPS), first.stderr
    monkeypatch.syspath_prepend(user)
    if at is None:
        with pytest.raises(OrnsteinError, match="no checkpoint to go on from"):
            resume_here(compose, folder, TRUST)
        return
    assert state(folder)["global_step"] == at
    if step < STEPS:
        assert RunDirectory(folder).status == "running"
    resume_here(compose, folder, TRUST)
    assert RunDirectory(folder).status == "finished"

    whole = tmp_path / "whole"
    (tmp_path / "killed").touch()
    train(compose(f"hydra.searchpath=[file://{user}/conf]", *settings, run_dir=whole))
    assert_same_run(folder, whole)
    with open(folder / "metrics.csv", newline="") as file:
        assert sum(1 for row in csv.DictReader(file) if row["val/loss"]) == 3


@pytest.mark.slow
def test_the_same_as_commands_with_everything_on(command, user, tmp_path):
    """Default callbacks, loggers and metrics, three processes; gone on with by ``resume=auto``, which finds the run."""
    settings = [
        "--config-dir",
        str(user / "conf"),
        "callbacks=killed",
        "callbacks.kill.step=8",
        "model.network.base_channels=8",
        f"trainer.max_steps={STEPS}",
        "callbacks.log.every=1",
        "callbacks.log.levels_every=5",
        "callbacks.validation.every=4",
        "callbacks.evaluation.every=6",
        "callbacks.sample_grid.every=6",
        "callbacks.checkpoint.every=5",
        "metrics.num_samples=32",
        "sampler.steps=4",
    ]
    assert killed(command("train.py", *settings, cwd=tmp_path, path=[user]))
    (folder,) = (tmp_path / "outputs" / "train").glob("*/*")
    identity = (folder / "wandb_id.txt").read_text()
    # Another identity is not its business: it begins afresh, in a folder of its own.
    other = command("train.py", *settings, "resume=auto", "seed=1", cwd=tmp_path, path=[user])
    assert other.returncode == 0, other.stderr
    (elsewhere,) = set((tmp_path / "outputs" / "train").glob("*/*")) - {folder}
    assert state(folder)["global_step"] == 6  # the figures of step 6 were the best so far
    again = command("train.py", *settings, "resume=auto", cwd=tmp_path, path=[user])
    assert again.returncode == 0, again.stderr
    assert str(folder) in again.stdout and "last.ckpt, at step 6" in again.stdout
    assert set((tmp_path / "outputs" / "train").glob("*/*")) == {folder, elsewhere}

    whole = command("train.py", *settings, "hydra.run.dir=whole", cwd=tmp_path, path=[user])
    assert whole.returncode == 0, whole.stderr
    assert_same_run(folder, tmp_path / "whole")
    assert "val/fid_32" in rows(folder)[-1]

    assert (folder / "wandb_id.txt").read_text() == identity
    read_wandb = runpy.run_path(str(Path(__file__).parents[1] / "experiment" / "wandb_reader.py"))["read_wandb"]
    segments = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert {path.stem for path in segments} == {f"run-{identity.strip()}"}
    # What W&B had not written when it was killed is logged again, what came after the checkpoint is cut.
    second = read_wandb(segments[-1])
    logged = [row["trainer/global_step"] for path in segments for row in read_wandb(path).history]
    assert logged == [int(row["step"]) for row in rows(folder)]
    assert second.run_id == identity.strip() and second.name == "digits-class_unet"
    assert second.complete and max(row["trainer/global_step"] for row in second.history) == STEPS
    # A finished run is not unfinished: auto begins afresh.
    fresh = command("train.py", *settings, "resume=auto", cwd=tmp_path, path=[user])
    assert fresh.returncode == 0 and "resuming" not in fresh.stdout
    assert len(set((tmp_path / "outputs" / "train").glob("*/*"))) == 3


def test_a_finished_run_goes_on_with_more_steps(compose, tiny, tmp_path):
    settings = [*tiny(), "lr_schedule=constant", "callbacks.validation.every=null"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train(compose(*settings, "trainer.max_steps=6", run_dir=whole))
    train(compose(*settings, "trainer.max_steps=3", run_dir=folder))
    before = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    resume_here(compose, folder)  # nothing is left to do
    assert {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()} == before
    assert RunDirectory(folder).status == "finished" and RunDirectory(folder).summary()["images_per_s"] > 0

    resume_here(compose, folder, "trainer.max_steps=6")
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert_same(state(folder)[key], state(whole)[key], key)
    assert_same(state(folder)["callbacks"]["EMA"], state(whole)["callbacks"]["EMA"])
    assert [row["train/loss"] for row in rows(folder)] == [row["train/loss"] for row in rows(whole)]
    # What was said beside resume= holds from then on.
    resume_here(compose, folder)
    assert state(folder)["global_step"] == 6 and RunDirectory(folder).read_config()["trainer"]["max_steps"] == 6
    assert RunDirectory(folder).read_config()["name"] == "digits-class_unet"


def test_what_cannot_be_resumed_is_refused_and_left_alone(compose, tiny, tmp_path):
    folder = tmp_path / "run"
    train(compose(*tiny(), run_dir=folder))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    for overrides, words in [
        (["model.network.base_channels=12"], "model.network.base_channels=12 cannot be changed beside resume="),
        (["optimizer.lr=1e-4", "trainer.max_steps=9"], "optimizer.lr=1e-4 cannot be changed"),
        (["callbacks.log.every=0"], "callbacks.log.every=0"),
        (["trainer.max_steps=0"], "at least 1"),
        (["sampler.steps=0"], "sampler.steps=0"),
    ]:
        with pytest.raises(Exception) as caught:
            resume_here(compose, folder, *overrides)
        assert words in str(find_mistake(caught.value))
    with pytest.raises(OrnsteinError, match="is a file: name its run"):
        prepare_resume(["train.py", f"resume={folder}/checkpoints/last.ckpt"])
    with pytest.raises(OrnsteinError, match="holds a run already"):
        train(compose(*tiny(), run_dir=folder))
    with RunDirectory(folder).lock(), pytest.raises(OrnsteinError, match="is in use by process"):
        resume_here(compose, folder, "trainer.max_steps=5")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_a_learned_schedule_comes_back_with_the_weights_that_learned_under_it(compose, tiny, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    settings = [*tiny(), "scheduler=vdm_learned", "objective=vdm", "lr_schedule=constant"]
    train(compose(*settings, "trainer.max_steps=6", run_dir=whole))
    train(compose(*settings, run_dir=folder))
    resume_here(compose, folder, "trainer.max_steps=6")
    ours, theirs = state(folder), state(whole)
    for key in ("state_dict", "optimizer_states"):
        assert_same(ours[key], theirs[key], key)
    averages = ours["callbacks"]["EMA"]["schedule"]
    assert_same(averages, theirs["callbacks"]["EMA"]["schedule"])
    trained = {name: ours["state_dict"][f"schedule.{name}"] for name in averages}
    assert any(not torch.equal(trained[name], averages[name]) for name in averages), "it learns"
    for weights, expected in (("ema", averages), ("model", trained)):
        assert_same(dict(ornstein.load(folder, weights=weights).module.schedule.state_dict()), expected, weights)


def test_averages_of_several_lengths_come_back_and_make_others(compose, tiny, tmp_path, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    settings = [*tiny(), "ema=power", "ema.stds=[0.1,0.2]", "ema.snapshot_every=2", "lr_schedule=constant"]
    train(compose(*settings, "trainer.max_steps=6", run_dir=whole))
    train(compose(*settings, run_dir=folder))
    resume_here(compose, folder, "trainer.max_steps=6")
    assert_same(state(folder)["callbacks"]["EMA"], state(whole)["callbacks"]["EMA"])
    names = [path.name for path in sorted((whole / "ema").iterdir())]
    assert names == [f"step_00000{step}_std_0.{std}00.safetensors" for step in (2, 4, 6) for std in (1, 2)]
    for name in names:  # to the bit
        assert_same(load_file(folder / "ema" / name), load_file(whole / "ema" / name), name)

    # The length that was kept is the run's own average; others are made of both, and a file says the same.
    own = state(folder)["callbacks"]["EMA"]["network"]
    kept = ornstein.load(folder, weights="0.1").module.network.state_dict()
    assert all(torch.allclose(kept[name], value, atol=1e-6) for name, value in own.items()), "mixed in float64"
    make(parse([f"run={folder}", "std=0.15"]))
    (file,) = (folder / "ema").glob("average_*")
    between = ornstein.load(folder, weights="0.15").module.network.state_dict()
    assert all(torch.equal(between[name.partition(".")[2]], value) for name, value in load_file(file).items())
    assert "at steps 2, 3, 4, 6" in capsys.readouterr().out
    with pytest.raises(OrnsteinError, match="weights=averaged is unknown: choose ema, model, or the length"):
        ornstein.load(folder, weights="averaged")
    with pytest.raises(OrnsteinError, match=r"std=seven.*: std takes numbers"):
        parse([f"run={folder}", "std=seven"])


def test_another_option_of_an_open_group_is_taken_whole(compose, tiny, tmp_path):
    folder = tmp_path / "run"
    train(compose(*tiny(), run_dir=folder))
    resume_here(compose, folder, "trainer.max_steps=5", "sampler=heun", "sampler.steps=2", "logger=none")
    config = RunDirectory(folder).read_config()
    assert config["sampler"]["_target_"].endswith(".Heun") and config["sampler"]["steps"] == 2
    assert "eta" not in config["sampler"], "nothing of the run's DDIM is left"
    assert config["logger"] == {} and "trust_targets" not in config
    assert state(folder)["global_step"] == 5 and int(rows(folder)[-1]["step"]) == 3


@pytest.mark.slow
def test_a_second_process_is_kept_out_of_a_running_runs_folder(command, compose, tiny, tmp_path):
    folder = tmp_path / "run"
    train(compose(*tiny(), run_dir=folder))
    with RunDirectory(folder).lock():
        second = command("train.py", f"resume={folder}", "trainer.max_steps=5", cwd=tmp_path)
    assert second.returncode == 1 and "is in use by process" in second.stderr
    assert second.stderr.count("\n") == 1 and state(folder)["global_step"] == 3
