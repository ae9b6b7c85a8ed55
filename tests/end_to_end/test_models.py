"""Every ``model=`` option under three pairs of schedule and objective: trained, sampled, resumed and exported.

Small networks on the bundled digits, in this process; the options that change how a network runs (compiled, bf16,
channels-last, checkpointed, on two processes) for the main three.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ornstein
from ornstein.cli.export import export, parse
from ornstein.cli.resume import prepare_resume
from ornstein.cli.train import train

ROOT = Path(__file__).parents[2]
STEPS = 30
RECIPES = (("linear", "eps"), ("cosine", "v"), ("flow", "flow"))
UNET = ("base_channels=8", "channel_mults=[1,2]", "groups=4")
DIT = ("hidden_size=16", "depth=2", "heads=2")
# model -> what makes its network a few thousand weights
MODELS: dict[str, tuple[str, ...]] = {
    "pixel_unet": UNET,
    "class_unet": UNET,
    "latent_unet": UNET,
    "text_unet": UNET,
    "dit": DIT,
    "latent_dit": DIT,
    "text_dit": DIT,
    "experts": tuple(f"network.{word}" for word in UNET),
    "unet_diffusers": ("block_out_channels=[8,8,8]", "norm_num_groups=4"),
    "unet_condition_diffusers": ("block_out_channels=[8,8]", "norm_num_groups=4", "attention_head_dim=4"),
}
AUTOENCODERS = ("autoencoder_kl", "autoencoder_vq")
AROUND = (
    "data.batch_size=8",
    "trainer.enable_progress_bar=false",
    "sampler.steps=3",
    "metrics=none",
    "logger=csv",
    "callbacks.log.every=10",
    "callbacks.validation.max_batches=1",
    "callbacks.sample_grid.samples_per_class=1",
    "callbacks.sample_grid.num_samples=4",
    "~callbacks.trajectory",
    "~callbacks.schedule_plot",
)


def overrides_of(model: str) -> list[str]:
    return [f"model={model}", *(f"model.network.{word}" for word in MODELS[model]), *AROUND]


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def is_finite(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in state.values() if value.is_floating_point())


def resume(compose, folder: Path, steps: int) -> None:
    argv = ["train.py", f"resume={folder}", f"trainer.max_steps={steps}"]
    name = prepare_resume(argv)
    train(compose(*argv[1:], run_dir=folder, config_name=name))


def test_the_tables_are_complete():
    assert {*MODELS, *AUTOENCODERS} == {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}


@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "objective"), RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_trains_samples_resumes_and_exports(compose, tmp_path, model, scheduler, objective):
    folder = tmp_path / "run"
    words = [*overrides_of(model), f"scheduler={scheduler}", f"objective={objective}", f"trainer.max_steps={STEPS}"]
    figures = train(compose(*words, run_dir=folder))
    assert all(torch.isfinite(torch.tensor(value)) for value in figures.values())
    begun = checkpoint_of(folder)
    assert begun["global_step"] == STEPS

    run = ornstein.load(folder)
    images = run.sample(4, steps=2)
    side = run.config.data.image_size
    assert images.dtype == torch.uint8 and images.shape == (4, 1, side, side) and len(images.unique()) > 1

    resume(compose, folder, STEPS + 2)
    resumed = checkpoint_of(folder)
    assert resumed["global_step"] == STEPS + 2 and is_finite(resumed["state_dict"])

    place = export(parse([f"run={folder}", "format=safetensors", f"out={tmp_path / 'export'}"]))
    assert (place / "README.md").is_file() and (place / "network.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("model", AUTOENCODERS)
def test_an_autoencoder_trains_resumes_and_serves_as_a_codec(compose, tmp_path, model):
    folder = tmp_path / "codec"
    words = [f"model={model}", "data.batch_size=8", "trainer.enable_progress_bar=false", "metrics=none", "logger=csv"]
    train(compose(*words, f"trainer.max_steps={STEPS}", run_dir=folder))
    assert checkpoint_of(folder)["global_step"] == STEPS
    resume(compose, folder, STEPS + 2)
    assert checkpoint_of(folder)["global_step"] == STEPS + 2

    codec = ["model=latent_unet", f"codec={model.removeprefix('autoencoder_')}", f"codec.weights={folder}"]
    small = [f"model.network.{word}" for word in UNET]
    train(compose(*codec, *small, *AROUND, "trainer.max_steps=2", run_dir=tmp_path / "run"))
    assert ornstein.load(tmp_path / "run").sample(2, steps=2).shape == (2, 1, 32, 32)


# Main model -> how its run may differ and still reach the same weights, and to what relative distance.
MAIN = ("class_unet", "dit", "latent_unet")
SWITCHES = {
    # Fused kernels and other orders of summation: rounding of 1e-7 a step, grown by Adam's division by small moments.
    "model.compile=true": 2e-2,
    # Recomputes what it would have kept: the same numbers.
    "model.network.checkpointing=true": 1e-5,
    # Three digits a product.
    "trainer.precision=bf16-mixed": 1e-1,
}


def weights_after(compose, folder: Path, *words: str) -> torch.Tensor:
    train(compose(*words, "trainer.max_steps=5", run_dir=folder))
    state = checkpoint_of(folder)["state_dict"]
    return torch.cat([v.flatten() for k, v in state.items() if k.startswith("network.") and v.is_floating_point()])


@pytest.mark.slow
@pytest.mark.parametrize("model", MAIN)
def test_a_switch_changes_speed_or_memory_and_not_what_is_learned(compose, tmp_path, model):
    words = overrides_of(model)
    plain = weights_after(compose, tmp_path / "plain", *words)
    for number, (switch, tolerance) in enumerate(SWITCHES.items()):
        other = weights_after(compose, tmp_path / f"{number}", *words, switch)
        assert float((other - plain).norm() / plain.norm()) < tolerance, switch
    if "unet" in model:  # another layout of the same numbers: other kernels, rounding alone
        other = weights_after(compose, tmp_path / "layout", *words, "model.network.channels_last=false")
        assert float((other - plain).norm() / plain.norm()) < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("model", MAIN)
def test_two_processes_train_a_model(tmp_path, model):
    """As a user types it; Lightning starts the second process with the same words."""
    words = [
        *overrides_of(model),
        "trainer.max_steps=4",
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "trainer.accelerator=cpu",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "ORNSTEIN_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "train.py"), *words, f"paths.run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["images_seen"] == 4 * 8 * 2
    state = checkpoint_of(tmp_path / "run")["state_dict"]
    assert is_finite(state)
