"""A run on streamed shards that was killed and gone on with is the run that was never stopped, to the bit."""

from __future__ import annotations

import io
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ornstein.cli.resume import prepare_resume
from ornstein.cli.train import train
from ornstein.errors import OrnsteinError

KILL = '''
"""A user's own callback: ends the process as a power cut would, once."""
import os, pathlib, signal
import lightning.pytorch as pl


class KillOnce(pl.Callback):
    def __init__(self, step, flag):
        self.step, self.flag = step, pathlib.Path(flag)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six shards of unequal size with classes."""
    rng = np.random.default_rng(0)
    (tmp_path / "shards").mkdir()
    for shard, count in enumerate((9, 5, 7, 8, 6, 9)):
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as tar:
            for number in range(count):
                file = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(file, "PNG")
                for name, content in (("png", file.getvalue()), ("cls", str(number % 2).encode())):
                    info = tarfile.TarInfo(f"{shard}{number}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return tmp_path / "shards"


def state(folder: Path) -> dict[str, Any]:
    return dict(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True))


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(
    compose: Any, command: Any, tiny: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 8 and gone on with from step 6, two micro-batches a step, read by two workers: weights, averages,
    optimizer and the stream's place equal those of the run that was never stopped; with other workers it is refused.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    user = tmp_path / "user"
    (user / "conf" / "callbacks").mkdir(parents=True)
    (user / "kill_in_a_stream.py").write_text(KILL)
    (user / "conf" / "callbacks" / "killed.yaml").write_text(
        f"defaults: [default]\nkill: {{_target_: kill_in_a_stream.KillOnce, step: 8, flag: {tmp_path / 'killed'}}}\n"
    )
    words = {
        *(word for word in tiny() if not word.startswith(("data.limit", "trainer.max_steps"))),
        *("data=webdataset", f"data.urls={shards}", "data.num_classes=auto", "data.image_size=8", "data.flip=true"),
        *("data.shuffle_buffer=4", "data.val_fraction=0.2", "data.num_workers=2", "trainer.max_steps=12"),
        *("trainer.accumulate_grad_batches=2", "callbacks.checkpoint.every=3", "callbacks=killed"),
        "model.network.dropout=0.1",
    }
    settings = sorted(words, key=lambda word: ("." in word.split("=")[0], word))  # groups first
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    first = command(
        "train.py", "--config-dir", str(user / "conf"), *settings, f"hydra.run.dir={cut}", cwd=tmp_path, path=[user]
    )
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert state(cut)["global_step"] == 6
    monkeypatch.syspath_prepend(user)

    def resume(*overrides: str) -> None:
        argv = ["train.py", f"resume={cut}", "trust_targets=[kill_in_a_stream]", *overrides]
        name = prepare_resume(argv)
        train(compose(*argv[1:], run_dir=cut, config_name=name))

    with pytest.raises(OrnsteinError, match=r"data\.num_workers was 2 and is 1"):
        resume("data.num_workers=1")
    resume()
    train(compose(f"hydra.searchpath=[file://{user}/conf]", *settings, run_dir=whole))
    ours, theirs = state(cut), state(whole)
    assert ours["global_step"] == theirs["global_step"] == 12
    assert ours["StreamModule"]["batches"] == 24
    for key in ("state_dict", "optimizer_states", "callbacks", "StreamModule"):
        assert_same(ours[key], theirs[key], key)


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        # The log's clock is its own.
        for key in theirs.keys() - {"started", "seconds"}:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}[{number}]")
    elif not isinstance(theirs, float | str):
        assert ours == theirs, where
