"""A stored config calls nothing that this package does not know, unless the user says so."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ornstein
from ornstein.cli.resume import prepare_resume
from ornstein.cli.train import train
from ornstein.cli.trust import TRAINED, check_targets
from ornstein.errors import OrnsteinError

OWN = """
from ornstein.networks import UNet


class Mine(UNet):
    pass


def write(path):
    open(path, "w").close()
"""


@pytest.fixture
def altered(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the run, or with ``alone`` its checkpoint, whose config has been changed."""

    def copy(change: Callable[[dict[str, Any]], None], *, alone: bool = False) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(trained, folder)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        change(config)
        if not alone:
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            return folder
        checkpoint = folder / "checkpoints" / "last.ckpt"
        state = torch.load(checkpoint, weights_only=True)
        state["ornstein"]["config"] = config
        torch.save(state, checkpoint)
        return checkpoint

    return copy


@pytest.mark.parametrize("alone", [False, True], ids=["folder", "checkpoint"])
def test_a_users_own_class_needs_their_word(altered, tmp_path, monkeypatch, alone):
    (tmp_path / "my_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    run = altered(lambda config: config["model"]["network"].update(_target_="my_networks.Mine"), alone=alone)
    with pytest.raises(OrnsteinError, match=r"names my_networks\.Mine, .* add trust_targets=\[my_networks\]"):
        ornstein.load(run)
    assert "my_networks" not in sys.modules
    loaded = ornstein.load(run, trust_targets=["my_networks"])
    assert type(loaded.module.network).__name__ == "Mine"
    assert loaded.sample(2, steps=1).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.exec",
        "subprocess.Popen",
        "hydra.utils.get_method",
        # Through modules of ours, or of libraries that configs do name, to what these have imported.
        "ornstein.networks.unet.torch.load",
        "ornstein.data.fetch.os.system",
        "lightning.pytorch.trainer.trainer.os.system",
        "torch.optim.optimizer.functools.partial",
        "diffusers.schedulers.scheduling_ddim.torch.load",
        # Ours, and not a part of a model.
        "ornstein.experiment.atomic.write_text",
        "ornstein.codecs.save_codec",
        "ornstein.cli.train.main",
        "ornstein.networks.nothing_there",
        "ornstein.",
        "",
    ],
)
def test_what_no_model_is_made_of_is_refused(altered, tmp_path, target):
    proof = tmp_path / "proof"
    command = {"_target_": target, "_args_": [f"touch {proof}"]}
    run = altered(lambda config: config["model"]["network"].update(extra=command))
    with pytest.raises(OrnsteinError, match="not part of this package"):
        ornstein.load(run)
    assert not proof.exists()


@pytest.mark.parametrize(
    "text",
    [
        "${oc.create:{_target_:os.system,_args_:['touch PROOF']}}",
        "${oc.decode:\"{_target_:os.system,_args_:['touch PROOF']}\"}",
    ],
)
def test_a_target_made_by_an_interpolation_is_seen_too(altered, tmp_path, text):
    proof = tmp_path / "proof"
    run = altered(lambda config: config["model"].update(network=text.replace("PROOF", str(proof))))
    with pytest.raises(OrnsteinError, match=r"names os\.system, which is not part of this package"):
        ornstein.load(run)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("model", "os.system"),
        ("optimizer", "os.system"),
        ("optimizer", "torch.optim.optimizer.functools.partial"),
        ("lr_schedule", "torch.hub.load"),
        ("ema", "ornstein.training.callbacks.Checkpoint"),
        ("callbacks", "subprocess.Popen"),
        ("callbacks", "ornstein.experiment.atomic.write_text"),
        ("logger", "ornstein.experiment.RunDirectory"),
        ("trainer", "lightning.pytorch.cli.LightningCLI"),
    ],
)
def test_going_on_with_a_run_looks_at_all_that_it_would_call(compose, trained, tmp_path, group, target):
    proof, folder = tmp_path / "proof", tmp_path / "copy"
    shutil.copytree(trained, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config[group]["extra"] = {"_target_": target, "_args_": [f"touch {proof}"]}
    # A stored config cannot speak for itself, nor call anything while Hydra composes it.
    config |= {"trust_targets": ["os", "subprocess"], "hydra": {"callbacks": {"x": {"_target_": "nowhere.Mine"}}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    argv = ["train.py", f"resume={folder}", "trainer.max_steps=61"]
    name = prepare_resume(argv)
    with pytest.raises(OrnsteinError, match=f"names {re.escape(target)}, .* add trust_targets="):
        train(compose(*argv[1:], run_dir=folder, config_name=name))
    assert not proof.exists()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_every_option_of_ours_may_be_gone_on_with(compose):
    for option in (
        *(f"optimizer={name}" for name in ("adam", "adamw", "sgd")),
        *(f"lr_schedule={name}" for name in ("constant", "cosine", "inverse_sqrt", "linear", "none")),
        *(
            "ema=none",
            "callbacks=none",
            "logger=tensorboard",
            "debug=profiler",
            "model=latent_unet",
            "metrics=inception",
        ),
    ):
        check_targets(compose(option), groups=TRAINED)


def test_a_callback_of_ones_own_is_not_built_and_needs_no_word(altered):
    run = altered(lambda config: config["callbacks"].update(mine={"_target_": "my_callbacks.Mine"}))
    assert ornstein.load(run).sample(1, steps=1).shape == (1, 1, 8, 8)


def test_a_checkpoint_that_holds_objects_is_not_opened(trained, tmp_path):
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "proof",))

    shutil.copytree(trained, tmp_path / "copy")
    checkpoint = tmp_path / "copy" / "checkpoints" / "last.ckpt"
    torch.save(torch.load(checkpoint, weights_only=True) | {"trap": Trap()}, checkpoint)
    for run in (tmp_path / "copy", checkpoint):
        with pytest.raises(OrnsteinError):
            ornstein.load(run)
    assert not (tmp_path / "proof").exists()
