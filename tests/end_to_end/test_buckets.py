"""Training on a folder of images of mixed shapes, from the command line to samples and figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ornstein
from ornstein.cli.resume import prepare_resume
from ornstein.cli.train import train
from ornstein.errors import OrnsteinError

STEPS = 10
KILL = '''
"""A user's own callback: ends the process as a power cut would, once."""
import os, pathlib, signal
import lightning.pytorch as pl


class KillOnce(pl.Callback):
    def __init__(self, step, flag):
        self.step, self.flag = step, pathlib.Path(flag)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 smooth images: wide, square and tall ones, and one extreme panorama."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(48):
        height, width = [(20, 40), (33, 33), (60, 30), (10, 200)][3 if number == 7 else number % 3]
        small = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR).save(folder / f"{number:02}.png")
    return folder


def settings(pictures: Path) -> list[str]:
    return [
        "data=image_folder",
        f"data.root={pictures}",
        "data.image_size=16",
        "data.buckets=auto",
        "data.sigma_data=null",
        "codec.sigma_data=0.4",
        "data.storage=lazy",
        "data.batch_size=4",
        "model=pixel_unet",
        "model.network.base_channels=8",
        "model.network.channel_mults=[1,2]",
        "model.network.groups=4",
        f"trainer.max_steps={STEPS}",
        "trainer.accumulate_grad_batches=2",
        "sampler.steps=2",
        "metrics=none",
        "logger=csv",
        "callbacks.log.every=1",
        "callbacks.validation.every=5",
        "callbacks.sample_grid.num_samples=6",
        "callbacks.checkpoint.every=3",
        "~callbacks.trajectory",
        "~callbacks.schedule_plot",
    ]


@pytest.mark.slow
def test_killed_and_resumed_is_never_stopped(
    compose: Any, command: Callable[..., Any], pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    """To the bit, whatever read the images ahead; then samples of any size, and figures at the data's shapes."""
    options = settings(pictures)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    train(compose(*options, run_dir=whole))
    told = capsys.readouterr().out
    assert "height x width" in told and "fewer images than a batch of 4: 8 x 32" in told

    user = tmp_path / "user"
    (user / "conf" / "callbacks").mkdir(parents=True)
    (user / "kill_in_a_bucket.py").write_text(KILL)
    (user / "conf" / "callbacks" / "killed.yaml").write_text(
        f"defaults: [default]\nkill: {{_target_: kill_in_a_bucket.KillOnce, step: 7, flag: {tmp_path / 'flag'}}}\n"
    )
    words = ["--config-dir", str(user / "conf"), "callbacks=killed", *options, f"hydra.run.dir={folder}"]
    run = command("train.py", *words, "data.num_workers=2", cwd=tmp_path, path=[user])
    assert run.returncode == -9, run.stderr[-2000:]
    argv = ["train.py", f"resume={folder}", "~callbacks.kill"]
    name = prepare_resume(argv)
    train(compose(*argv[1:], run_dir=folder, config_name=name))
    ours, theirs = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (folder, whole))
    for key, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key

    loaded = ornstein.load(whole, device="cpu")
    shapes = [tuple(shape) for shape in loaded.config.data.buckets]
    assert (8, 32) in shapes and (16, 16) in shapes
    assert loaded.sample(2, steps=1).shape == (2, 3, 16, 16)
    assert loaded.sample(2, steps=1, size=[20, 12]).shape == (2, 3, 20, 12)
    with pytest.raises(OrnsteinError, match=r"size=\[21,12\].*multiples of 2.*size=\[20,12\]"):
        loaded.sample(2, size=[21, 12])
    figures = loaded.evaluate(24, steps=1, metrics="digits")
    assert np.isfinite(figures["fid_24"])
    assert loaded.evaluate(8, steps=1, metrics="digits", size="[16,16]")["fid_8"] != figures["fid_24"]
