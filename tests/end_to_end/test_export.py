"""Exports of runs: what diffusers draws from them, and what else is in the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import ornstein
from ornstein.cli.export import export, parse
from ornstein.cli.load import sampling_options
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from omegaconf import DictConfig

UNET = ("model.network.base_channels=8", "model.network.channel_mults=[1,2]", "model.network.groups=4")
DIT = ("model.network.hidden_size=16", "model.network.depth=1", "model.network.heads=2")
FLOW = ("scheduler=flow", "objective=flow", "sampler=euler")
LINEAR = ("scheduler=linear", "objective=eps")
STEPS = 10

# name -> overrides, the pipeline's class
RUNS: dict[str, tuple[tuple[str, ...], str]] = {
    "pixel_unet": (("model=pixel_unet", *UNET), "DDIMPipeline"),
    "pixel_unet-linear": (("model=pixel_unet", *UNET, *LINEAR), "DDIMPipeline"),
    "pixel_unet-x0-ddpm": (("model=pixel_unet", *UNET, "objective=x0", "sampler=ddpm"), "DDPMPipeline"),
    "pixel_unet-flow": (("model=pixel_unet", *UNET, *FLOW), "OrnsteinPipeline"),
    "pixel_unet-patches": (("model=pixel_unet", *UNET, "model.network.patch_size=2"), "OrnsteinPipeline"),
    "pixel_unet-edm": (
        ("model=pixel_unet", *UNET, "scheduler=edm", "objective=edm", "sampler=euler", "sampler.grid.to_zero=true"),
        "OrnsteinPipeline",
    ),
    "class_unet": (("model=class_unet", *UNET), "OrnsteinPipeline"),
    "class_unet-guided": (("model=class_unet", *UNET, *LINEAR, "guidance=cfg", "guidance.scale=3"), "OrnsteinPipeline"),
    "class_unet-concat": (("model=class_unet", *UNET, "model.network.label_mode=concat", *FLOW), "OrnsteinPipeline"),
    "dit": (("model=dit", *DIT), "OrnsteinPipeline"),
    "dit-flow": (("model=dit", *DIT, *FLOW), "OrnsteinPipeline"),
    "dit-unconditional": (("model=dit", *DIT, "conditioner=none", "objective=x0"), "OrnsteinPipeline"),
    "latent_dit": (("model=latent_dit", *DIT, "guidance=cfg", "guidance.scale=2"), "OrnsteinPipeline"),
    "latent_dit-native": (
        ("model=latent_dit", *DIT, *LINEAR, "model.network.noise_embedding=ddpm", "guidance=cfg", "guidance.scale=2"),
        "DiTPipeline",
    ),
    "latent_dit-ddpm": (("model=latent_dit", *DIT, "sampler=ddpm"), "OrnsteinPipeline"),
    "latent_unet": (("model=latent_unet", *UNET), "OrnsteinPipeline"),
    "latent_unet-flow": (("model=latent_unet", *UNET, *FLOW), "OrnsteinPipeline"),
    "diffusers_unet": (
        (
            "model=pixel_unet",
            "model/network=unet2d_diffusers",
            "model.network.block_out_channels=[8,16]",
            "model.network.down_block_types=[DownBlock2D,AttnDownBlock2D]",
            "model.network.up_block_types=[AttnUpBlock2D,UpBlock2D]",
        ),
        "DDIMPipeline",
    ),
}


class Draws:
    """What diffusers draws from a generator of seed 0: the start, then a draw a step; ours counts them from 1."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.values = [torch.randn(shape, generator=generator) for _ in range(STEPS + 1)]

    def expect(self, steps: int) -> Draws:
        return self

    def __call__(self, step: int, draw: int = 0) -> Tensor:
        return self.values[step]


@pytest.fixture(autouse=True)
def own_modules_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Diffusers copies a pipeline's own code into a folder of the user's; here into the test's."""
    import diffusers.utils.dynamic_modules_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def make_run(compose: Callable[..., DictConfig]) -> Callable[..., Path]:
    """A run's folder with weights that nobody trained: as made, and moved away from their many zeros."""

    def made(folder: Path, *overrides: str) -> Path:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        from ornstein.cli.autoencoder import build_autoencoder, trains_autoencoder
        from ornstein.cli.build import build_module, plain
        from ornstein.cli.validate import validate
        from ornstein.experiment import AtomicCheckpointIO, RunDirectory

        own = () if "autoencoder" in overrides[0] else (f"sampler.steps={STEPS}",)
        cfg = compose(*overrides, *own, "ema=none", "metrics=none", run_dir=folder)
        validate(cfg)
        build = build_autoencoder if trains_autoencoder(cfg) else build_module
        module = build(cfg, training=False)
        generator = torch.Generator().manual_seed(0)
        for parameter in module.network.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        run = RunDirectory(folder)
        run.write_config(plain(cfg))
        run.write_json(
            "summary.json", {"status": "finished", "fid": 12.25, "steps": 7, "peak_memory_mb": {"host": 1.0}}
        )
        counters = {"micro_batches_seen": 7, "images_seen": 896, "config": plain(cfg)}
        state = {"state_dict": module.state_dict(), "ornstein": counters, "callbacks": {}}
        AtomicCheckpointIO().save_checkpoint(state, run.checkpoints / "last.ckpt")
        # As Hydra leaves it, with interpolations that only Hydra could resolve.
        (folder / ".hydra").mkdir()
        OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
        HydraConfig.instance().cfg = None
        return folder

    return made


def ours_from(run: Path, labels: list[int] | None) -> Tensor:
    """Images in [0, 1] of the run's own sampler and guidance, from the noise that diffusers draws."""
    loaded = ornstein.load(run)
    module = loaded.module
    options = sampling_options(module, loaded.config, labels=None, count=3)
    noise = Draws((3, *module.latent_shape))
    start = noise(0) * (6400.0 + 1) ** 0.5 if "EDM" in type(module.schedule).__name__ else noise(0)
    given = {} if labels is None else {"label": torch.tensor(labels)}
    cond = module.conditioner.cond(given)
    null = module.conditioner.null(3, "cpu") if module.conditioner.has_null else {}
    guided = options["guidance"](module.denoiser(evaluation=True).bind(cond), null)
    with torch.no_grad():
        x = options["sampler"].sample(guided, noise, start=start).x
        return (module.codec.decode(x) / 2 + 0.5).clamp(0, 1)


FAST = ("pixel_unet-linear", "class_unet-guided", "latent_dit-native", "latent_unet-flow")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_diffusers_draws_the_same_images(name: str, make_run: Callable[..., Path], tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    overrides, expected = RUNS[name]
    run = make_run(tmp_path / "run", *overrides)
    place = export(parse([f"run={run}", "format=diffusers"]))
    assert place == run / "export" / "diffusers"
    native = expected != "OrnsteinPipeline"
    pipeline = DiffusionPipeline.from_pretrained(place, **({} if native else {"trust_remote_code": True}))
    assert type(pipeline).__name__ == expected
    pipeline.set_progress_bar_config(disable=True)
    conditional = ornstein.load(run).module.conditioner.num_classes is not None
    labels = [0, 3, 9] if conditional else None
    call: dict[str, Any] = {"class_labels": labels} if conditional else {"batch_size": 3}
    if expected == "DiTPipeline":
        call |= {"guidance_scale": 2.0 if "cfg" in " ".join(overrides) else 1.0}
    if native:
        call |= {"num_inference_steps": STEPS}
    generator = torch.Generator().manual_seed(0)
    theirs = pipeline(**call, generator=generator, output_type="pt" if expected != "DiTPipeline" else "np").images
    theirs = theirs if isinstance(theirs, Tensor) else torch.from_numpy(theirs).permute(0, 3, 1, 2)
    ours = ours_from(run, labels)
    assert float(ours.std()) > 0.01
    assert float((theirs - ours).abs().max()) < 1e-4


def test_the_card_says_what_it_is_and_its_code_runs(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", "model=class_unet", *UNET)
    scored = tmp_path / "scored"
    scored.mkdir()
    (scored / "evaluation.json").write_text(json.dumps({"values": {"fid": 3.5, "label_accuracy": 0.5}}))
    place = export(parse([f"run={run}", "format=diffusers", f"evaluation={scored}", f"out={tmp_path / 'out'}"]))
    card = (place / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: diffusers" in front
    assert "# license:" in front
    for words in (
        "| fid | 3.5 |",
        "| label_accuracy | 0.5 |",
        "| noise schedule | Cosine |",
        "896",
        "trust_remote_code",
    ):
        assert words in card, words
    assert str(tmp_path) not in card + (place / "ornstein.json").read_text()
    monkeypatch.chdir(place)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(code, "card", "exec"), {})
    assert (place / "sample.png").is_file()


@pytest.mark.parametrize("model", ["class_unet", "latent_dit"])
def test_safetensors_hold_network_and_codec(
    model: str, make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    run = make_run(tmp_path / "run", f"model={model}", *(UNET if model == "class_unet" else DIT))
    place = export(parse([f"run={run}", "format=safetensors", f"out={tmp_path / 'out'}"]))
    module = ornstein.load(run).module
    stored = load_file(place / "network.safetensors")
    assert all(torch.equal(stored[key], value) for key, value in module.network.state_dict().items())
    assert (place / "codec.safetensors").is_file() == (model == "latent_dit")
    if model == "latent_dit":
        from ornstein.codecs import load_kl

        codec = load_kl(place / "codec.safetensors")
        assert all(torch.equal(value, codec.state_dict()[key]) for key, value in module.codec.state_dict().items())
    assert json.loads((place / "config.json").read_text())["model"]["network"]["_target_"].startswith("ornstein.")
    # With its config.yaml the folder is a run itself.
    start = torch.randn(2, *module.latent_shape), torch.tensor([5.0, 500.0])
    again = ornstein.load(place).module
    with torch.no_grad():
        label = torch.tensor([1, 10])
        assert torch.equal(again.network(*start, label=label), module.network(*start, label=label))
    monkeypatch.chdir(place)
    (code,) = re.findall(r"```python\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), space)
    assert space["images"].shape[0] == 4
    # A run that starts from it is refused unless every name and shape is the network's.
    make_run(tmp_path / "next", f"model={model}", *(UNET if model == "class_unet" else DIT), f"init.from={place}")


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("dit", "torch_export"),
        pytest.param("dit", "onnx", marks=pytest.mark.slow),
        pytest.param("class_unet", "torch_export", marks=pytest.mark.slow),
        pytest.param("class_unet", "onnx", marks=pytest.mark.slow),
    ],
)
def test_graphs_compute_what_the_network_does(
    kind: str, model: str, make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", f"model={model}", *(UNET if model == "class_unet" else DIT))
    place = export(parse([f"run={run}", f"format={kind}", f"out={tmp_path / 'out'}"]))
    network = ornstein.load(run).module.network
    x, noise_cond, label = torch.randn(5, 1, 8, 8), torch.rand(5) * 1000, torch.tensor([0, 1, 2, 9, 10])
    with torch.no_grad():
        expected = network(x, noise_cond, label=label)
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(place / "network.onnx"))
        assert [each.name for each in session.get_inputs()] == ["x", "noise_cond", "label"]
        assert "1000 t" in session.get_modelmeta().custom_metadata_map["noise_cond"]
        inputs = {"x": x.numpy(), "noise_cond": noise_cond.numpy(), "label": label.numpy()}
        output = torch.from_numpy(session.run(None, inputs)[0])
    else:
        extra = {"ornstein.json": ""}
        program = torch.export.load(place / "network.pt2", extra_files=extra)
        assert list(json.loads(extra["ornstein.json"])["inputs"]) == ["x", "noise_cond", "label"]
        output = program.module()(x, noise_cond, label)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.chdir(place)
    (code,) = re.findall(r"```python\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "card", "exec"), {})


@pytest.mark.parametrize(("kind", "name"), [("kl", "AutoencoderKL"), ("vq", "VQModel")])
def test_an_autoencoder_goes_out_by_itself(
    kind: str, name: str, make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    run = make_run(tmp_path / "run", f"model=autoencoder_{kind}")
    place = export(parse([f"run={run}", "format=diffusers"]))
    model = getattr(diffusers, name).from_pretrained(place)
    codec = ornstein.load(run).module.network
    assert isinstance(model, torch.nn.Module) and isinstance(codec, torch.nn.Module)
    monkeypatch.chdir(place)
    (code,) = re.findall(r"```python\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), space)
    assert type(space["autoencoder"]).__name__ == name
    assert export(parse([f"run={run}", "format=safetensors"])) == run / "export" / "safetensors"
    with pytest.raises(OrnsteinError, match="is an autoencoder"):
        export(parse([f"run={run}", "format=torch_export"]))


def test_what_diffusers_lacks_is_refused_and_leaves_nothing(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "model=class_unet", *UNET, "model.network.block=convnext")
    with pytest.raises(OrnsteinError, match=r"block=convnext has no counterpart.*format=safetensors"):
        export(parse([f"run={run}", "format=diffusers"]))
    assert not list((run / "export").iterdir())


def test_options_of_sampling_choose_the_scheduler(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "model=pixel_unet", *UNET)
    words = ["sampler=ddpm", "sampler.steps=25", "clip_x0=1.0", "overwrite=true"]
    place = export(parse([f"run={run}", "format=diffusers", f"out={tmp_path / 'out'}"]))
    assert export(parse([f"run={run}", "format=diffusers", f"out={place}", *words])) == place
    config = json.loads((place / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DDPMScheduler" and config["clip_sample"] is True
    assert "num_inference_steps=25" in (place / "README.md").read_text()


@pytest.mark.slow
def test_adapters_are_merged_before_they_go_out(make_run: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = make_run(tmp_path / "base", "model=class_unet", *UNET)
    run = make_run(tmp_path / "run", "model=class_unet", *UNET, "adapter=lora", f"init.from={base}")
    place = export(parse([f"run={run}", "format=safetensors", f"out={tmp_path / 'merged'}"]))
    apart = export(parse([f"run={run}", "format=safetensors", f"out={tmp_path / 'apart'}", "merge=false"]))
    assert not [name for name in load_file(place / "network.safetensors") if "lora" in name]
    assert [name for name in load_file(apart / "network.safetensors") if "lora" in name]
    export(parse([f"run={run}", "format=diffusers", f"out={tmp_path / 'diffusers'}"]))
    with pytest.raises(OrnsteinError, match="merge=false"):
        export(parse([f"run={run}", "format=diffusers", "merge=false"]))
