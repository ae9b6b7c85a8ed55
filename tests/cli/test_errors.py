"""The commands as processes: one sentence, exit code 1, nothing half-written, and no library loaded for nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Runs a script as `python script` does and says at the end which libraries it has loaded.
SPY = """
import atexit, runpy, sys
names = {names!r}
atexit.register(lambda: open("loaded", "w").write(" ".join(name for name in names if name in sys.modules)))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LIGHT = ("lightning", "wandb", "diffusers", "transformers", "torchvision", "torchmetrics", "matplotlib", "sklearn")
HEAVY = ("torch", "numpy", "scipy", "pandas", "PIL", "rich", *LIGHT)


class Outcome:
    """A finished command: exit code, texts, the libraries it loaded, and the files it left."""

    def __init__(self, folder: Path, script: str, *arguments: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        done = subprocess.run(
            [sys.executable, "-c", SPY.format(names=HEAVY), str(ROOT / script), *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr
        self.loaded = set((folder / "loaded").read_text().split())
        self.files = [path for path in folder.rglob("*") if path.is_file() and path.name != "loaded"]


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_help_loads_neither_torch_nor_anything_else(tmp_path, script):
    outcome = Outcome(tmp_path, script, "--help")
    assert outcome.code == 0 and outcome.err == ""
    assert outcome.loaded == set() and outcome.files == []
    assert re.search(r"^sampler: .*\bddim, .*\bheun\b", outcome.out, re.MULTILINE)
    assert outcome.out.count(f"  python {script}") >= 6
    assert "$" not in outcome.out and "Powered by" not in outcome.out


# What is asked for, the words of the sentence, and which libraries its answer may cost.
REFUSED = [
    ("train.py", "data.num_classes=null", "class-conditional model=pixel_unet", ()),
    ("train.py", "model=latent_unet data=emoji", "codec=kl holds weights for digits, not emoji", ("torch", "numpy")),
    ("train.py", "objective=eps scheduler=flow", "zero SNR", ("torch", "numpy")),
    ("train.py", "ema.decay=2", "ema.decay=2 [0, 1)", ()),
    ("train.py", "callbacks.log.every=0", "callbacks.log.every=0 at least 1", ()),
    ("train.py", "metrics.kid_subset_size=0", "metrics.kid_subset_size=0 at least 1", ("torch", "numpy")),
    ("train.py", "sampler.grid=karras", "sampler.grid=karras choose sampler/grid=karras", ()),
    ("train.py", "sampler=dpmpp_2m sampler.eta=1", "sampler=dpmpp_2m has no eta grid, steps sampler=ddim", ()),
    ("train.py", "resume=nowhere", "resume=nowhere: there is no such folder", ()),
    ("train.py", "resume=.", "resume=. holds no config.yaml", ()),
    ("sample.py", "num_samples=4", "run= is missing outputs/train", ()),
    ("sample.py", "run=nowhere", "run=nowhere: there is no such folder or checkpoint", ()),
    ("evaluate.py", "run=.", "run=. holds no config.yaml", ()),
    ("evaluate.py", "", "run= is missing", ()),
]


@pytest.mark.parametrize(("script", "arguments", "words", "loads"), REFUSED, ids=[" ".join(row[:2]) for row in REFUSED])
def test_a_refusal_is_one_sentence_and_leaves_nothing(tmp_path, script, arguments, words, loads):
    outcome = Outcome(tmp_path, script, *arguments.split())
    assert outcome.code == 1 and outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert [word for word in words.split() if word not in outcome.err] == [], outcome.err
    assert outcome.files == []
    assert outcome.loaded <= set(loads)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("model=nope", "Available options in 'model': class_unet dit latent_dit latent_unet pixel_unet"),
        ("trainer.max_step=1", "Could not override 'trainer.max_step'"),
        ("sampler.steps=[", "no viable alternative at input '['"),
    ],
)
def test_what_hydra_refuses_it_refuses_without_a_traceback(tmp_path, argument, words):
    outcome = Outcome(tmp_path, "train.py", argument)
    assert outcome.code == 1 and outcome.out == ""
    assert "Traceback" not in outcome.err
    assert [word for word in words.split() if word not in outcome.err] == [], outcome.err
    assert outcome.loaded == set() and outcome.files == []


def test_missing_data_are_told_of_before_the_run_begins(tmp_path):
    outcome = Outcome(tmp_path, "train.py", "data=fashion_mnist", "data.root=/nowhere", "data.download=false")
    assert outcome.code == 1
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert all(word in outcome.err for word in ("fashion_mnist", "/nowhere", "data.root=")), outcome.err
    assert outcome.files == [] and "wandb" not in outcome.loaded


@pytest.mark.parametrize(
    ("arguments", "code", "stream"), [((), 2, "err"), (("--help",), 0, "out"), (("paint",), 2, "err")]
)
def test_the_ornstein_command_names_its_commands(tmp_path, arguments, code, stream):
    script = tmp_path / "ornstein_command.py"
    script.write_text("from ornstein.cli import main\nmain()\n")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    outcome = Outcome(folder, str(script), *arguments)
    assert outcome.code == code and "ornstein {train|sample|evaluate|" in getattr(outcome, stream)
    assert outcome.loaded == set() and outcome.files == []


def test_the_ornstein_command_works_anywhere(tmp_path):
    script = tmp_path / "ornstein_command.py"
    script.write_text("from ornstein.cli import main\nmain()\n")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    outcome = Outcome(folder, str(script), "train", "--help")
    assert outcome.code == 0 and "== Configuration groups ==" in outcome.out and outcome.loaded == set()
