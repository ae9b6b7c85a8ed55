"""Guidance of real runs: sampled, scored, with a second run, and while training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ornstein
from ornstein.cli.load import compose_for, sampling_options
from ornstein.cli.train import train
from ornstein.errors import OrnsteinError

pytestmark = pytest.mark.slow

OPTIONS = [
    "none",
    "cfg",
    "cfgpp",
    "apg",
    "interval",
    "classifier",
    "compose",
]


@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_is_sampled_with_every_guidance(trained: Path, option: str) -> None:
    run = ornstein.load(trained)
    images = run.sample(10, guidance=option, sampler="ddim", steps=5)
    assert images.shape == (10, 1, 8, 8)
    assert torch.equal(images[4:], run.sample(6, guidance=option, sampler="ddim", steps=5, first_index=4))
    if option != "none":
        assert not torch.equal(images, run.sample(10, guidance="none", sampler="ddim", steps=5))


def weaker(compose, tiny, folder: Path, *overrides: str, model: str = "class_unet") -> Path:  # type: ignore[no-untyped-def]
    train(compose(*tiny(model), *overrides, run_dir=folder))
    return folder


def test_a_run_is_guided_by_a_weaker_one(compose_config, tiny, trained: Path, command, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Of another schedule, objective and network; from the command line, from Python, and inside a composition."""
    weak = weaker(compose_config, tiny, tmp_path / "weak", "scheduler=linear", "objective=eps", model="dit")
    words = [f"run={trained}", "guidance=autoguidance", f"guidance.run={weak}", "num_samples=4", "sampler.steps=4"]
    done = command("sample.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (summary,) = (tmp_path / "outputs" / "sample").rglob("summary.json")
    assert json.loads(summary.read_text())["nfe"] == 8
    run = ornstein.load(trained)
    composed = ["guidance=compose", "guidance@guidance.parts.second=autoguidance"]
    cfg = compose_for(run.stored, "sample", [f"run='{trained}'", *composed, f"guidance.parts.second.run='{weak}'"])
    options = sampling_options(run.module, cfg, labels=None, count=4)
    (batch,) = run.module.generate(range(4), **options)
    assert batch.images.shape == (4, 1, 8, 8)


def test_a_weaker_run_that_does_not_fit_is_refused(compose_config, tiny, trained: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = ornstein.load(trained)
    plain = weaker(compose_config, tiny, tmp_path / "plain", "conditioner=none")
    large = weaker(compose_config, tiny, tmp_path / "large", "data.image_size=16")
    for folder, told in ((plain, "is unconditional.*guidance.condition=none"), (large, "diffuses another space")):
        words = [f"run='{trained}'", "guidance=autoguidance", f"guidance.run='{folder}'"]
        with pytest.raises(OrnsteinError, match=told):
            sampling_options(run.module, compose_for(run.stored, "sample", words), labels=None, count=4)
    cfg = compose_for(run.stored, "sample", [*words[:2], f"guidance.run='{plain}'", "guidance.condition=none"])
    assert sampling_options(run.module, cfg, labels=None, count=4)["guidance"].denoiser is not None


def test_a_run_trains_under_guidance_that_needs_more(compose_config, tiny, trained: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name, words in {
        "classifier": ["guidance=classifier"],
        "autoguidance": ["guidance=autoguidance", f"guidance.run='{trained}'"],
    }.items():
        folder = weaker(compose_config, tiny, tmp_path / name, *words)
        assert list((folder / "samples").glob("*.png"))
        assert ornstein.load(folder).sample(4, steps=3).shape == (4, 1, 8, 8)


def test_the_key_of_another_guidance_is_told_of_by_the_command(trained: Path, command, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = command("sample.py", f"run={trained}", "guidance.scale=2", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the run's own guidance has no scale" in done.stderr and "add guidance=cfg" in done.stderr
