"""``compose_train`` and ``ornstein.train``: the command line's composing and training, from Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import ornstein
from ornstein.cli.compose import compose_train
from ornstein.errors import OrnsteinError

TINY = ["debug=fast_dev_run", "logger=csv", "callbacks=none", "trainer.accelerator=cpu"]
CHECKPOINT = "+callbacks.checkpoint={_target_: ornstein.training.callbacks.Checkpoint, run_dir: '${paths.run_dir}'}"


def test_compose_gives_the_whole_config_with_nothing_left_to_ask_hydra(tmp_path: Path) -> None:
    cfg = compose_train(["model=dit", "scheduler=linear", "trainer.max_steps=7"], run_dir=tmp_path / "it's here")
    assert cfg.scheduler._target_.endswith("Linear")
    assert cfg.lr_schedule.max_steps == 7  # interpolations follow what was overridden
    assert cfg.name == "digits-dit"
    assert cfg.paths.run_dir == str(tmp_path / "it's here")
    assert "hydra" not in cfg
    OmegaConf.to_yaml(cfg, resolve=True)
    assert not list(tmp_path.iterdir()), "composing writes nothing"


def test_composing_without_a_folder_names_the_commands_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(compose_train().paths.run_dir)
    assert folder.relative_to(tmp_path).parts[:2] == ("outputs", "train")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model=nope"], "class_unet"),
        (["trainer.max_stepz=3"], "trainer.max_stepz"),
        (["sampler.steps=0"], "sampler.steps=0: a sampler needs at least 1 step"),
        (["objective=eps", "scheduler=flow"], "objective=eps cannot .* scheduler=flow"),
        (["guidance=cfg", "conditioner.dropout=0"], "guidance=cfg needs"),
        ("model=dit scheduler=linear", "give a list"),
    ],
)
@pytest.mark.parametrize("call", [compose_train, ornstein.train])
def test_mistakes_are_told_and_leave_no_folder(call, overrides, told: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OrnsteinError, match=told):
        call(overrides, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_hydra_is_left_as_it_was() -> None:
    before = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    compose_train(["model=dit"])
    with pytest.raises(OrnsteinError):
        compose_train(["model=nope"])
    with pytest.raises(OrnsteinError):
        ornstein.train(["objective=eps", "scheduler=flow"])
    assert (GlobalHydra.instance().hydra, HydraConfig.instance().cfg) == before


def test_train_leaves_the_run_that_it_opens_and_goes_on_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = ornstein.train([*TINY, CHECKPOINT], run_dir=folder)
    assert run.stored.folder == folder
    assert run.module.images_seen == 16  # two steps of eight
    assert (folder / ".hydra" / "overrides.yaml").is_file(), "as the command leaves it"
    assert run.sample(3, steps=2).shape == (3, 1, 8, 8)

    longer = ornstein.train([f"resume={folder}", "trainer.max_steps=3"])
    assert longer.stored.folder == folder
    assert longer.module.images_seen == 24
    with pytest.raises(OrnsteinError, match="leave run_dir out"):
        ornstein.train([f"resume={folder}"], run_dir=tmp_path / "elsewhere")
