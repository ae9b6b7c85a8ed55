"""Autoencoders through the commands: one run that trains, goes on, is scored, becomes a codec, and is no sampler."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import ornstein
from ornstein.cli.autoencoder import check_words, measure_codec
from ornstein.cli.compose import compose_train
from ornstein.codecs import bundled_path, read_metadata
from ornstein.errors import OrnsteinError

SMALL = [
    "data.image_size=16",
    "data.batch_size=8",
    "data.limit=32",
    "model.network.width=8",
    "trainer.max_steps=4",
    "trainer.enable_progress_bar=false",
    "logger=csv",
    "callbacks.log.every=1",
    "callbacks.terms.every=1",
    "callbacks.evaluation.num_samples=64",
]


def overrides(kind: str) -> list[str]:
    small = {"kl": "model.network.multipliers=[1,2]", "vq": "model.network.codes=16"}[kind]
    adversarial = ["model.loss.adversarial=hinge", "model.loss.start=2", "model.discriminator.layers=2"]
    return [f"model=autoencoder_{kind}", *SMALL, small, *adversarial, "model.discriminator.width=8"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind; read only."""
    found = {}
    for kind in ("kl", "vq"):
        found[kind] = tmp_path_factory.mktemp("autoencoders") / kind
        ornstein.train(overrides(kind), run_dir=found[kind])
    return found


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_run_leaves_what_every_run_does_and_its_codec(folders: dict[str, Path], kind: str) -> None:
    folder = folders[kind]
    summary = json.loads((folder / "summary.json").read_text())
    assert {"val/psnr", "val/ssim", "val/rfid", "val/loss", "parameters", "flops", "images_per_s"} <= summary.keys()
    assert summary["steps"] == 4 and summary["images_seen"] == 32
    assert (folder / "checkpoints" / "last.ckpt").is_file() and (folder / "checkpoints" / "best.ckpt").is_file()
    assert (folder / "samples" / "step_000004.png").is_file()
    assert json.loads((folder / "evaluation.json").read_text())["extractor"] == "digits"
    assert read_metadata(folder / "codec.safetensors")["kind"] == kind
    header = (folder / "metrics.csv").read_text().partition("\n")[0]
    assert "train/reconstruction" in header and "train/adversarial_weight" in header


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_it_is_announced_without_a_word_of_diffusion(kind: str, tmp_path: Path, capsys) -> None:
    ornstein.train([*overrides(kind), "trainer.max_steps=1"], run_dir=tmp_path / "run")
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "parameters to encode" in told and "times fewer numbers" in told and "adversarial (hinge, from step 2" in told
    )
    assert ("bits a pixel" in told) == (kind == "vq")
    for word in ("diffusion", "sampler", "schedule", "Cosine"):
        assert word not in told, told


def test_it_goes_on_to_the_bit(folders: dict[str, Path], tmp_path: Path) -> None:
    part = tmp_path / "part"
    ornstein.train([*overrides("kl"), "trainer.max_steps=2", "lr_schedule.max_steps=4"], run_dir=part)
    whole = tmp_path / "whole"
    ornstein.train([*overrides("kl"), "lr_schedule.max_steps=4"], run_dir=whole)
    ornstein.train([f"resume={part}", "trainer.max_steps=4"])
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (part, whole)
    ]
    assert all(states[0][name].equal(value) for name, value in states[1].items())
    assert any(name.startswith("discriminator.") for name in states[0])


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_its_folder_is_a_codec_for_latent_models(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    cfg = compose_train(
        ["model=latent_unet", f"codec={kind}", f"codec.weights={folders[kind]}", "data.image_size=16"],
        run_dir=tmp_path,
    )
    assert (cfg.codec.channels, cfg.codec.size) == (4, {"kl": 8, "vq": 4}[kind])
    with pytest.raises(OrnsteinError, match=r"holds weights for digits, not fashion_mnist: .* model=autoencoder_"):
        compose_train(["model=latent_unet", f"codec={kind}", f"codec.weights={folders[kind]}", "data=fashion_mnist"])
    other = {"kl": "vq", "vq": "kl"}[kind]
    with pytest.raises(OrnsteinError, match=rf"holds a {kind} autoencoder: choose codec={kind}"):
        compose_train(["model=latent_unet", f"codec={other}", f"codec.weights={folders[kind]}", "data.image_size=16"])
    unfinished = shutil.copytree(folders[kind], tmp_path / "unfinished")
    (unfinished / "codec.safetensors").unlink()
    with pytest.raises(OrnsteinError, match=r"holds no codec\.safetensors, which a run of model=autoencoder_"):
        compose_train(["model=latent_unet", f"codec={kind}", f"codec.weights={unfinished}", "data.image_size=16"])


def test_it_is_scored_and_makes_no_samples(folders: dict[str, Path]) -> None:
    run = ornstein.load(folders["kl"])
    figures = run.evaluate(num_samples=64)
    summary = json.loads((folders["kl"] / "summary.json").read_text())
    assert set(figures) == {"psnr", "ssim", "rfid"}
    # The same images and weights: equal up to the batches they came in.
    assert figures["psnr"] == pytest.approx(summary["val/psnr"], abs=1e-3)
    with pytest.raises(OrnsteinError, match=r"is an autoencoder, which makes no samples .* codec=kl"):
        run.sample(2)


def test_the_evaluate_command_writes_its_figures_and_a_picture(
    folders: dict[str, Path], compose_config: Callable, tmp_path: Path, capsys
) -> None:
    from ornstein.cli.evaluate import evaluate
    from ornstein.cli.launch import store_run
    from ornstein.cli.sample import sample
    from ornstein.cli.stored import open_run

    store_run(open_run(str(folders["vq"])).config)
    cfg = compose_config(f"run={folders['vq']}", "num_samples=40", run_dir=tmp_path / "eval", config_name="evaluate")
    figures = evaluate(cfg)
    report = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert report["values"] == figures and report["num_images"] == 40
    assert (tmp_path / "eval" / "samples" / "reconstructions.png").is_file()
    assert "40 held-out images" in capsys.readouterr().out
    cfg = compose_config(f"run={folders['vq']}", "sampler=heun", run_dir=tmp_path / "no", config_name="evaluate")
    with pytest.raises(OrnsteinError, match=r"sampler=heun: .* knows no sampler"):
        evaluate(cfg)
    cfg = compose_config(f"run={folders['vq']}", run_dir=tmp_path / "sample", config_name="sample")
    with pytest.raises(OrnsteinError, match="makes no samples"):
        sample(cfg)


@pytest.mark.parametrize("word", ["sampler=heun", "sampler/grid=karras", "~guidance", "+objective.x=1", "clip_x0=1"])
def test_words_of_diffusion_are_refused(word: str) -> None:
    with pytest.raises(OrnsteinError, match="leave it out"):
        check_words([word], "autoencoder_kl")


@pytest.mark.parametrize("word", ["data=digits", "model.loss.kl_weight=1", "sampler_of_mine=1", "optimizer=adam"])
def test_other_words_pass(word: str) -> None:
    check_words([word], "autoencoder_kl")


@pytest.fixture
def vae(tmp_path: Path) -> Iterator[Path]:
    """A tiny autoencoder in diffusers' format."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path / "vae"
    AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=2,
    ).save_pretrained(folder)
    yield folder


def test_a_pretrained_codec_trains_and_its_measured_scale_comes_back(vae: Path, tmp_path: Path) -> None:
    run = ornstein.train(
        [
            "model=latent_unet",
            "codec=diffusers",
            f"codec.pretrained={vae}",
            "codec.scale=measured",
            "codec.measured_images=32",
            "data.image_size=16",
            "data.batch_size=4",
            "model.network.base_channels=8",
            "model.network.groups=4",
            "trainer.max_steps=2",
            "trainer.enable_progress_bar=false",
            "sampler.steps=2",
            "metrics=none",
            "logger=csv",
            "~callbacks.trajectory",
            "~callbacks.schedule_plot",
        ],
        run_dir=tmp_path / "run",
    )
    assert OmegaConf.select(run.config, "codec.channels") == 2 and run.sample(2).shape == (2, 1, 16, 16)
    scale = run.module.codec.scale.clone()
    assert not scale.equal(torch.ones_like(scale))
    from ornstein.cli.build import build_data

    data = build_data(run.config)
    data.setup()
    measure_codec(run.module, data, run.module.device)
    # The same images in batches of another size: a rounding of sums in float64.
    torch.testing.assert_close(run.module.codec.scale, scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("recipe", "kind"), [("kl_digits", "kl"), ("vq_digits", "vq")])
def test_a_bundled_codec_says_that_its_recipe_made_it(compose, recipe, kind):
    """A recipe that is changed without training anew, or a file that is replaced by hand, shows here."""
    cfg = compose(f"experiment={recipe}")
    made = read_metadata(bundled_path(kind))
    assert (made["kind"], made["data"], made["seed"]) == (kind, "digits", cfg.seed)
    assert (made["steps"], made["images_seen"]) == (
        cfg.trainer.max_steps,
        cfg.trainer.max_steps * cfg.data.batch_size,
    )
    assert {key: made["loss"][key] for key in cfg.model.loss} == OmegaConf.to_container(cfg.model.loss)
    assert instantiate(cfg.model.network).config == made["config"]
