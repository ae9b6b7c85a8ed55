"""Checkpoints of other libraries, from the file to samples and to training."""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

import ornstein
from ornstein.cli.autoencoder import check_codec_fits
from ornstein.cli.convert import convert_file, show
from ornstein.cli.start import read_start
from ornstein.errors import OrnsteinError
from ornstein.networks.layouts.reading import read_foreign
from ornstein.training.start import fit

_SPEC = spec_from_file_location("foreign", Path(__file__).parents[1] / "networks" / "foreign.py")
assert _SPEC is not None and _SPEC.loader is not None
foreign = module_from_spec(_SPEC)
_SPEC.loader.exec_module(foreign)


def adm_state(**options: Any) -> dict[str, Tensor]:
    """A small ADM, of 16 x 16 images and 10 classes."""
    torch.manual_seed(0)
    weights = foreign.Weights()
    label = torch.tensor([3]) if options.pop("labelled", True) else None
    foreign.adm(weights, torch.randn(1, 3, 16, 16), torch.zeros(1), label, **options)
    return dict(weights)


def unconditional(**options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    weights = foreign.Weights()
    foreign.lucidrains(weights, torch.randn(1, 3, 8, 8), torch.zeros(1), **options)
    return dict(weights)


# ---- files ---------------------------------------------------------------------------------------------------------


def wrapped(state: dict[str, Tensor]) -> dict[str, Any]:
    """Every form in which trainers keep weights; what is to be found in each is ``state``."""
    other = {name: value + 1 for name, value in state.items()}

    def below(prefix: str, inner: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{prefix}{name}": value for name, value in inner.items()}

    return {
        "alone": state,
        "distributed": {"state_dict": below("module.", state), "epoch": 3},
        "compiled": {"model": below("_orig_mod.", state)},
        "dit": {"model": other, "ema": state, "opt": {"lr": 1.0}, "args": argparse.Namespace(model="DiT-S/2", lr=1e-4)},
        "lucidrains": {
            "step": 7,
            "model": below("model.", other),
            "ema": {**below("online_model.", other), **below("ema_model.", state), "initted": torch.tensor(True)},
            "opt": {},
            "scaler": None,
            "version": "2.3.4",
        },
    }


@pytest.mark.parametrize("form", wrapped({}))
def test_weights_are_found_in_every_wrapper(form: str, tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(2, 3), "b.bias": torch.randn(4)}
    torch.save(wrapped(state)[form], tmp_path / "file.pt")
    read = read_foreign(tmp_path / "file.pt")
    assert read.state.keys() == state.keys() and all(torch.equal(read.state[name], state[name]) for name in state)
    assert read.weights == ("ema" if form in ("dit", "lucidrains") else "only")


def test_the_trained_weights_can_be_asked_for(tmp_path: Path) -> None:
    state = {"a.weight": torch.zeros(2)}
    torch.save(wrapped(state)["dit"], tmp_path / "file.pt")
    assert read_foreign(tmp_path / "file.pt", weights="model").state["a.weight"].tolist() == [1, 1]


def test_sharded_and_plain_folders_of_diffusers(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors")
    names = {"a": 1, "b": 2}
    index = {"weight_map": {key: f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for key, n in names.items()}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"sample_size": 8}')
    read = read_foreign(tmp_path)
    assert set(read.state) == {"a", "b"} and read.config == {"sample_size": 8}


class Network:
    """What NVlabs publishes: a network that only its own code can read."""


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "network.pkl").write_bytes(pickle.dumps({"ema": Network()}))
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    torch.save({"step": 3}, tmp_path / "none.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    (tmp_path / "pipeline" / "unet" / "config.json").write_text("{}")
    for name, words in {
        "network.pkl": "holds more than tensors NVlabs state_dict() torch.save weights.pt",
        "cut.safetensors": "not a whole safetensors file",
        "none.pt": "holds no tensors",
        "list.pt": "holds a list state dict",
        "missing.pt": "no such file or folder",
        "empty": "diffusion_pytorch_model.safetensors config.json",
        "pipeline": "pipeline of several models unet",
    }.items():
        with pytest.raises(OrnsteinError) as error:
            read_foreign(tmp_path / name)
        for word in (name, *words.split()):
            assert word in str(error.value), (name, word, str(error.value))


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_the_folder_samples_as_the_network_does(tmp_path: Path) -> None:
    torch.save(adm_state(), tmp_path / "adm.pt")
    report = convert_file(
        tmp_path / "adm.pt", tmp_path / "out", facts={"head_dim": 16}, overrides=["scheduler.num_timesteps=1000"]
    )
    assert report.layout == "adm" and report.missing == () and report.converted.unmapped == ()
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"network.safetensors", "config.yaml", "conversion.json", "conf/model/network/converted.yaml"} <= files
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["data"]["image_size"] == 16 and config["data"]["num_classes"] == 10
    assert config["model"]["network"]["_target_"] == "ornstein.networks.UNet"
    run = ornstein.load(tmp_path / "out", device="cpu")
    assert type(run.module.schedule).__name__ == "Linear"
    assert run.module.objective.parameterization.outputs == 2
    images = run.sample(2, steps=2, labels=[3, 7])
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8
    # Through the whole package, at step 420 of 1000, it is the network that was published.
    x = torch.randn(2, 3, 16, 16)
    weights = foreign.Weights(adm_state())
    expected = foreign.adm(weights, x, torch.full((2,), 420.0), torch.tensor([3, 7]))[:, :3]
    prediction = run.module.denoiser().bind(run.module.conditioner.cond({"label": torch.tensor([3, 7])}))(x, 421 / 1000)
    torch.testing.assert_close(prediction.eps, expected, rtol=1e-4, atol=1e-4)


def test_leftovers_are_refused_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {**unconditional(), **{f"extra.{i}.weight": torch.zeros(1) for i in range(12)}}
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(OrnsteinError) as error:
        convert_file(tmp_path / "file.safetensors", tmp_path / "out")
    assert "12 of its tensors" in str(error.value) and str(error.value).count("extra.") == 10
    assert "--partial" in str(error.value) and not (tmp_path / "out").exists()
    report = convert_file(tmp_path / "file.safetensors", tmp_path / "out", partial=True)
    assert len(report.converted.unmapped) == 12
    show(report)
    told = " ".join(capsys.readouterr().out.split())
    assert "extra.0.weight" in told and "ornstein sample run=" in told and "init.from=" in told
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["left_out"][0] == "extra.0.weight"


def test_what_is_missing_is_refused_or_started_at_random(tmp_path: Path) -> None:
    state = unconditional()
    del state["mid_block1.mlp.1.bias"]
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(OrnsteinError, match=r"missing: mid1\.condition\.bias"):
        convert_file(tmp_path / "file.safetensors", tmp_path / "out")
    report = convert_file(tmp_path / "file.safetensors", tmp_path / "out", partial=True)
    assert report.missing == ("mid1.condition.bias",)
    assert "mid1.condition.bias" in load_file(tmp_path / "out" / "network.safetensors")


def test_a_folder_with_a_run_is_not_written_to(tmp_path: Path) -> None:
    save_file(unconditional(), tmp_path / "file.safetensors")
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    with pytest.raises(OrnsteinError, match="holds a run: name another folder"):
        convert_file(tmp_path / "file.safetensors", tmp_path / "out")


def test_latents_get_their_autoencoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = foreign.Weights()
    foreign.adm(weights, torch.randn(1, 4, 8, 8), torch.zeros(1), None, out=4)
    save_file(weights, tmp_path / "latent.safetensors")
    facts = {"head_dim": 16, "image_size": 8}
    convert_file(tmp_path / "latent.safetensors", tmp_path / "out", facts=facts)
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["codec"]["_target_"] == "ornstein.codecs.DiffusersCodec" and config["codec"]["size"] == 8
    assert config["data"]["image_size"] == 64 and config["data"]["channels"] == 3
    other = ["codec=kl", "data.image_size=32", "data.channels=1"]  # another autoencoder, the bundled one
    convert_file(tmp_path / "latent.safetensors", tmp_path / "own", facts=facts, overrides=other)
    assert yaml.safe_load((tmp_path / "own" / "config.yaml").read_text())["codec"]["size"] == 8
    assert ornstein.load(tmp_path / "own", device="cpu").sample(2, steps=2).shape == (2, 1, 32, 32)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (None, ""),
        ("conversion.json", ""),
        ("codec.safetensors", ""),
        ("checkpoints/last.ckpt", "a run"),
        ("x.txt", "holds something"),
    ],
)
def test_only_an_earlier_conversion_is_written_over(tmp_path: Path, held: str | None, words: str) -> None:
    weights = foreign.Weights()
    torch.manual_seed(0)
    foreign.lucidrains(weights, torch.randn(1, 1, 8, 8), torch.zeros(1))
    save_file(weights, tmp_path / "file.safetensors")
    (tmp_path / "out").mkdir()
    if held is not None:
        (tmp_path / "out" / held).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / held).write_text("{}")
    if words:
        with pytest.raises(OrnsteinError, match=words):
            convert_file(tmp_path / "file.safetensors", tmp_path / "out")
        assert not (tmp_path / "out" / "network.safetensors").exists()
    else:
        assert convert_file(tmp_path / "file.safetensors", tmp_path / "out").layout == "lucidrains"


@pytest.mark.parametrize("layout", ["adm", "edm", "dit", "diffusers_dit", "diffusers_unet", "kl"])
def test_a_layout_that_does_not_fit_is_refused_in_words(tmp_path: Path, layout: str) -> None:
    weights = foreign.Weights()
    torch.manual_seed(0)
    foreign.lucidrains(weights, torch.randn(1, 1, 8, 8), torch.zeros(1))
    save_file(weights, tmp_path / "file.safetensors")
    with pytest.raises(OrnsteinError):
        convert_file(tmp_path / "file.safetensors", tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_of_diffusers_tells_schedule_and_objective(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
    ).eval()
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "pipeline")
    for source in (tmp_path / "pipeline", tmp_path / "pipeline" / "unet"):
        report = convert_file(source, tmp_path / "out")
        assert {"scheduler=cosine", "objective=v"} <= set(report.converted.suggest)
    run = ornstein.load(tmp_path / "out", device="cpu")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = unet(x, torch.tensor([420, 420])).sample
        torch.testing.assert_close(run.module.network(x, torch.tensor([421.0, 421.0])), expected, rtol=1e-4, atol=1e-5)
    # Fine-tuning takes the pipeline's folder as it lies.
    node = {"_target_": report.converted.target, **report.converted.arguments}
    cfg = OmegaConf.create({"init": {"from": str(tmp_path / "pipeline")}, "model": {"network": node}})
    start = read_start(cfg, run.module.network)
    assert fit(run.module.network, start.state).exact and start.told.endswith("unet, converted from diffusers_unet")


def test_an_autoencoder_of_diffusers_becomes_a_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    from ornstein.codecs import load_kl

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        sample_size=16,
        scaling_factor=0.5,
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    report = convert_file(tmp_path / "vae", tmp_path / "out")
    show(report)
    assert "codec=kl codec.weights=" in " ".join(capsys.readouterr().out.split())
    for data in ("emoji", "fashion_mnist"):  # nobody has said which images it is for
        check_codec_fits(
            OmegaConf.create({"codec": {"_target_": "ornstein.codecs.load_kl", "weights": str(tmp_path / "out")}}),
            {"data": data},
        )
    codec = load_kl(tmp_path / "out" / "codec.safetensors")
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.mode() * 0.5
        generator = torch.Generator().manual_seed(0)
        torch.testing.assert_close(codec.encode(x, generator=generator), expected, rtol=1e-4, atol=1e-5)


# ---- starting from it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("model=dit", "adm checkpoint, a UNet of ours model.network is DiT model/network="),
        (
            "model=class_unet",
            "computes something else model.network.head_dim=64 model.network.resampling=residual --fact",
        ),
        ("model=class_unet model/network=adm_64", "of another shape stem.weight (32, 3, 3, 3) for (192, 3, 3, 3)"),
    ],
)
def test_a_foreign_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, overrides: str, words: str) -> None:
    from ornstein.cli.compose import compose_train

    torch.save(adm_state(), tmp_path / "adm.pt")
    data = ["data=image_folder", f"data.root={tmp_path}", "data.image_size=16", "data.num_classes=10"]
    with pytest.raises(OrnsteinError) as error:
        compose_train([*data, *overrides.split(), f"init.from={tmp_path / 'adm.pt'}"])
    for word in words.split():
        assert word in str(error.value), (word, str(error.value))


@pytest.mark.slow
@pytest.mark.parametrize("converted", [True, False])
def test_training_starts_from_a_foreign_checkpoint(tmp_path: Path, converted: bool) -> None:
    weights = foreign.Weights()
    torch.manual_seed(0)
    foreign.lucidrains(weights, torch.randn(1, 1, 8, 8), torch.zeros(1))
    save_file(weights, tmp_path / "file.safetensors")
    convert_file(tmp_path / "file.safetensors", tmp_path / "out")
    source = tmp_path / ("out" if converted else "file.safetensors")
    command = [sys.executable, "-m", "ornstein.cli.train", "--config-dir", str(tmp_path / "out" / "conf")]
    command += ["model=pixel_unet", "model/network=converted", f"init.from={source}", "trainer.max_steps=1"]
    command += ["optimizer.lr=0", "optimizer.weight_decay=0", "metrics=none", "logger=csv", "sampler.steps=2"]
    command += [f"hydra.run.dir={tmp_path / 'run'}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "starts from" in result.stdout
    trained = ornstein.load(tmp_path / "run", device="cpu").module.network.state_dict()
    for name, value in load_file(tmp_path / "out" / "network.safetensors").items():
        assert torch.equal(trained[name], value), name


@pytest.mark.slow
def test_the_command_prints_one_sentence_for_a_mistake(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ornstein.cli.convert", "nowhere.pt", "--out", "folder"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.startswith("error: nowhere.pt: there is no such file") and "Traceback" not in result.stderr
