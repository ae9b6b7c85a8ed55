import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ornstein.errors import OrnsteinError
from ornstein.experiment import atomic
from ornstein.experiment.run_dir import RunDirectory


def test_layout_and_round_trips(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    config = {"seed": 0, "lr": 1e-5, "sampler": {"steps": 50, "grid": None}, "classes": ["Null", "ä", "1e3"]}
    run.write_config(config)
    run.write_json("environment.json", {"path": Path("a/b"), "nan": float("nan"), "pair": (1, 2)})
    assert run.read_config() == config
    assert json.loads(run.environment_path.read_text()) == {"path": "a/b", "nan": None, "pair": [1, 2]}
    # Folders come with their files: a run that samples has no empty folder of checkpoints.
    assert {p.name for p in run.path.iterdir()} == {"config.yaml", "environment.json"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: RunDirectory(p / "absent", create=False), "there is no run folder"),
        (lambda p: RunDirectory(_file(p)), "is a file, not a run folder"),
        (lambda p: RunDirectory(p).read_config(), "is missing"),
        (lambda p: RunDirectory(p).write_config({"x": object()}), "resolve it to plain dicts"),
        (lambda p: RunDirectory(_with(p, "config.yaml", "a: [1")).read_config(), "is not YAML"),
        (lambda p: RunDirectory(_with(p, "config.yaml", "- 1")).read_config(), "holds no mapping"),
        (lambda p: RunDirectory(_with(p, "summary.json", '{"a"')).summary(), "is not JSON"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, make: object, sentence: str) -> None:
    with pytest.raises(OrnsteinError, match=sentence):
        make(tmp_path)  # type: ignore[operator]


def _file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


def _with(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    run = RunDirectory(tmp_path)
    run.write_json("summary.json", {"fid": 1.0})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space"):
        run.write_json("summary.json", {"fid": 2.0})
    monkeypatch.undo()
    assert run.summary() == {"fid": 1.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["summary.json"]


def test_json_refuses_objects_before_touching_the_file(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError, match="object"):
        atomic.write_json(tmp_path / "a.json", {"x": object()})
    assert atomic.read_json(tmp_path / "a.json") == {"x": 1}


def test_status(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.status is None and not run.finished
    run.write_json("summary.json", {"fid": 3.0})
    run.mark("running")
    assert not run.finished
    run.mark("finished")
    assert run.finished and run.summary() == {"fid": 3.0, "status": "finished"}
    with pytest.raises(ValueError, match="one of running"):
        run.mark("done")  # type: ignore[arg-type]


def test_last_checkpoint_passes_over_what_is_not_whole(tmp_path: Path) -> None:
    import torch

    run = RunDirectory(tmp_path)
    assert run.last_checkpoint() is None
    run.checkpoints.mkdir()
    for age, name in enumerate(["best.ckpt", "last.ckpt", "newer.ckpt"]):
        torch.save({"age": age}, run.checkpoints / name)
        os.utime(run.checkpoints / name, (age, age))
    assert run.last_checkpoint() == run.checkpoints / "newer.ckpt"
    with open(run.checkpoints / "newer.ckpt", "r+b") as file:
        file.truncate(200)
    os.utime(run.checkpoints / "newer.ckpt", (9, 9))
    assert run.last_checkpoint() == run.checkpoints / "last.ckpt"
    os.utime(run.checkpoints / "best.ckpt", (1, 1))
    assert run.last_checkpoint() == run.checkpoints / "last.ckpt", "among equals, last.ckpt"


HOLD = """
import sys, os
from ornstein.experiment.run_dir import RunDirectory
run = RunDirectory(sys.argv[1])
run.lock()
if len(sys.argv) > 2 and os.fork() == 0:  # a worker that outlives its parent
    print("held", flush=True)
    sys.stdin.read()
    os._exit(0)
if len(sys.argv) == 2:
    print("held", flush=True)
sys.stdin.readline()
"""


def _holder(folder: Path, *extra: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(folder), *extra],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    holder = _holder(tmp_path)
    run = RunDirectory(tmp_path)
    try:
        with pytest.raises(OrnsteinError, match=f"in use by process {holder.pid} on .* .since"):
            run.lock()
    finally:
        holder.kill()
        holder.wait()
    with run.lock():  # the kernel gave the killed process's lock back
        with pytest.raises(OrnsteinError, match=f"process {os.getpid()}"):
            RunDirectory(tmp_path).lock()
        run.lock()  # taking it twice does nothing
    with RunDirectory(tmp_path).lock():
        pass


def test_a_killed_run_leaves_its_lock_even_where_a_data_worker_lives_on(tmp_path: Path) -> None:
    holder = _holder(tmp_path, "fork")
    holder.kill()
    holder.wait()
    with RunDirectory(tmp_path).lock() as lock:
        assert lock.held
    assert holder.stdin is not None
    holder.stdin.close()  # ends the worker


def test_the_lock_sweeps_up_what_killed_writers_left(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    litter = [run.path / ".summary.json.1-ab.tmp", run.checkpoints / ".last.ckpt.1-ab.tmp"]
    run.checkpoints.mkdir()
    for path in litter:
        path.write_text("half")
    with run.lock():
        assert not any(path.exists() for path in litter)


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"])
def test_other_ranks_work_under_the_lock_of_rank_zero_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "0")
    zero, other = RunDirectory(tmp_path), RunDirectory(tmp_path)
    with zero.lock() as lock:
        assert lock.held
        monkeypatch.setenv(variable, "1")
        with other.lock() as none:
            assert not none.held
            other.mark("failed")
        assert other.status is None
