"""``guidance=`` on the command line: what composes, what is refused in one sentence, and what a wrong key is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from ornstein.cli.compose import compose_train
from ornstein.cli.guides import check_words, equip
from ornstein.cli.launch import conf_dir, store_run
from ornstein.cli.validate import validate
from ornstein.diffusion.guidance import leaves
from ornstein.errors import OrnsteinError
from ornstein.networks import NoisyClassifier
from ornstein.networks.noisy_classifier import load_classifier, read_metadata, save_classifier

ACCEPTED = [
    "guidance=cfg guidance.rescale=0.7",
    "guidance=cfg guidance.negative=3 conditioner.dropout=0",
    "guidance=cfgpp",
    "guidance=cfgpp sampler=euler",
    "guidance=apg guidance.norm_threshold=2.5",
    "guidance=interval guidance.scale=3",
    "guidance=interval guidance.sigma_max=null guidance.log_snr_min=-2",
    "guidance=interval +guidance@guidance.part=apg guidance.part.eta=0.5",
    "guidance=autoguidance guidance.scale=1",
    "guidance=autoguidance guidance.condition=null guidance.scale=1",
    "guidance=classifier",
    "guidance=classifier model=pixel_unet guidance.target=3",
    "guidance=colour data=emoji",
    "guidance=energy data=emoji +guidance.loss._target_=ornstein.diffusion.guidance.Colour",
    "guidance=compose",
    "guidance=compose guidance@guidance.parts.second=colour data=emoji",
    "guidance=compose guidance@guidance.parts.first=apg +guidance@guidance.parts.third=classifier",
]
REFUSED = [
    ("guidance=apg sampler=rk45", "guidance=apg momentum"),
    ("guidance=cfgpp sampler=heun", "guidance=cfgpp sampler=Heun sampler=ddim guidance=cfg"),
    ("guidance=cfgpp model=pixel_unet", "guidance=cfgpp no condition guidance=none model=class_unet"),
    ("guidance=interval conditioner.dropout=0", "guidance=interval label dropout conditioner.dropout=0.1"),
    ("guidance=compose conditioner.dropout=0", "guidance=compose label dropout conditioner.dropout=0.1"),
    ("guidance=apg model=pixel_unet", "guidance=apg no condition guidance=none"),
    ("guidance=autoguidance", "guidance=autoguidance weaker model guidance.run="),
    ("guidance=autoguidance guidance.run=/nowhere", "guidance.run=/nowhere no such folder"),
    ("guidance=compose guidance@guidance.parts.second=autoguidance", "guidance=autoguidance guidance.run="),
    ("guidance=colour", "guidance=colour RGB data.channels=1 guidance=none data=emoji"),
    ("guidance=energy", "guidance=energy guidance.loss._target_= guidance=colour"),
    ("guidance=classifier data=emoji", "guidance.weights=bundled Digits Emoji train_classifier guidance.weights=FILE"),
    ("guidance=classifier model=latent_unet data.image_size=32", "[1, 8, 8] [4, 8, 8] train_classifier"),
    ("guidance=classifier model=pixel_unet", "guidance=classifier no condition guidance.target=CLASS"),
    ("guidance=classifier guidance.target=10", "guidance.target=10 0 to 9"),
    ("guidance=classifier guidance.weights=null", "trained network train_classifier guidance.weights=FILE"),
    ("guidance=classifier guidance.weights=/nowhere", "guidance.weights=/nowhere no such file train_classifier"),
    ("guidance=classifier guidance.network.widths=[8,16]", "guidance.weights=bundled another network guidance.network"),
    ("guidance=cfg guidance.negative=10", "guidance.negative=10 0 to 9"),
    ("guidance=cfg guidance.rescale=2", "guidance.rescale=2 [0, 1]"),
    ("guidance=cfgpp guidance.scale=7", "guidance.scale=7 [0, 1]"),
    ("guidance=cfg guidance.scale=nan", "guidance.scale=nan finite number"),
    ("guidance=apg guidance.scale=x", "guidance.scale='x' finite number"),
    ("guidance.scale=2", "guidance.scale=2 guidance=none has no scale add guidance=cfg"),
    ("guidance=none guidance.momentum=0", "guidance.momentum=0 guidance=none has no momentum apg has one"),
    ("guidance=cfg guidance.strength=2", "guidance=cfg has no strength it has scale, rescale"),
]


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_accepted(overrides: str) -> None:
    compose_train(overrides.split())


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused_in_one_sentence(overrides: str, words: str) -> None:
    with pytest.raises(OrnsteinError) as caught:
        compose_train(overrides.split())
    told = str(caught.value)
    assert [word for word in words.split() if word not in told] == [], told
    assert len(told) < 450 and "\n" not in told and "+guidance.scale" not in told


def test_every_key_of_the_python_classes_has_a_place_in_the_config(compose) -> None:  # type: ignore[no-untyped-def]
    """Whatever can be given in Python can be given on the command line, but for what the command line fetches."""
    from dataclasses import fields

    fetched = {"denoiser", "decode"}
    for path in sorted((conf_dir() / "guidance").glob("*.yaml")):
        cfg = compose(f"guidance={path.stem}")
        built = instantiate(cfg.guidance)
        own = {field.name for field in fields(built)} - fetched
        assert own == {str(key) for key in cfg.guidance if not str(key).startswith("_")}, path.stem


def test_keys_of_a_stored_runs_guidance() -> None:
    store_run({"guidance": {"_target_": "x", "scale": 2.0}})
    check_words("sample", ["run=somewhere", "guidance.scale=3"])
    store_run({"guidance": {"_target_": "x"}})
    with pytest.raises(OrnsteinError, match=r"the run's own guidance has no scale; .* add guidance=cfg"):
        check_words("sample", ["run=somewhere", "guidance.scale=3"])
    check_words("sample", ["guidance=my_own", "guidance.any=3"])
    check_words("train", ["experiment=mine", "guidance.scale=3"])
    check_words("train", ["resume=auto", "guidance.scale=3"])


def test_the_packages_classifier_is_what_its_header_says(compose, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from ornstein.data import Digits
    from ornstein.training.train_classifier import accuracy, arrays

    header = read_metadata("bundled")
    network = load_classifier(NoisyClassifier(1, 10, widths=header["widths"]), "bundled")
    x, y = arrays(Digits(split="val"))
    for level, told in header["accuracy"].items():
        # A scan or two at the edge of a decision may fall elsewhere with another machine's convolutions.
        assert accuracy(network, x, y, float(level)) == pytest.approx(told, abs=0.01)
    assert header["accuracy"]["-3"] > 0.97 and header["accuracy"]["1"] < 0.6


def test_a_classifier_is_saved_and_found_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NoisyClassifier(3, 4, widths=(8, 16))
    save_classifier(network.half().float(), tmp_path / "own.safetensors", metadata={"shape": [3, 8, 8]})
    other = load_classifier(NoisyClassifier(3, 4, widths=(8, 16)), tmp_path / "own.safetensors")
    x, cond = torch.randn(2, 3, 8, 8), torch.tensor([0.1, -0.4])
    assert torch.equal(network(x, cond), other(x, cond))
    assert read_metadata(tmp_path / "own.safetensors") == {"shape": [3, 8, 8]}
    (tmp_path / "torn").write_bytes(b"torn")
    with pytest.raises(OrnsteinError, match="no safetensors file"):
        read_metadata(tmp_path / "torn")


def test_a_module_is_equipped_with_what_its_guidance_needs(compose) -> None:  # type: ignore[no-untyped-def]
    from ornstein.cli.build import build_module

    cfg = compose("guidance=compose", "guidance@guidance.parts.second=classifier")
    validate(cfg)
    module = build_module(cfg)
    classifier = list(leaves(module.guidance))[1]
    own = load_classifier(NoisyClassifier(1, 10), "bundled")
    assert torch.equal(classifier.network.head.weight, own.head.weight)
    assert not any(p.requires_grad for p in classifier.network.parameters())
    assert not [name for name in module.state_dict() if "guidance" in name]  # neither trained nor in checkpoints
    latent = compose("guidance=energy", "model=latent_unet", "data.image_size=32")
    latent.guidance.loss = {"_target_": "ornstein.diffusion.guidance.Colour"}
    built = build_module(latent, training=False)
    assert equip(instantiate(latent.guidance), built, latent).decode == built.codec.decode
