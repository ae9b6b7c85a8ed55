"""Overrides that Hydra would misread or mislead about, and a stored run's own sampler with another grid."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ornstein.cli.compose import compose_train
from ornstein.cli.launch import as_ours
from ornstein.cli.load import Run, compose_for, sampling_options
from ornstein.cli.resume import prepare_resume
from ornstein.cli.stored import StoredRun, open_run
from ornstein.cli.words import check_words
from ornstein.errors import OrnsteinError

# Overrides, and the words of the sentence.
REFUSED = [
    ("sampler=dpmpp_2m sampler.eta=1", "sampler.eta=1: sampler=dpmpp_2m no eta grid, steps, solver_type ddim"),
    ("sampler.churn=1", "sampler.churn=1: sampler=ddim no churn it has grid, steps, eta."),
    ("experiment=ddpm_fashion_mnist sampler.eta=1", "sampler=ddpm no eta variance"),
    ("sampler.grid.power=2", "sampler/grid=uniform no power t_max, t_min, to_zero quadratic has one"),
    ("scheduler.beta_start=0.1", "scheduler=cosine no beta_start offset linear"),
    ("objective.gamma=5", "objective=v no gamma parameterization, distance, time, weighting, coupling"),
    ("objective.weighting.gamma=5", "objective/weighting=simple no gamma it has no keys min_snr"),
    ("sampler.grid=karras", "sampler.grid=karras choose sampler/grid=karras."),
    ("objective.time=uniform", "objective.time=uniform choose objective/time=uniform."),
    ("model.network.chanels=3", "model/network=tiny_unet no chanels in_channels, more (--cfg job)."),
    (
        "model=dit model.network.group_channels=8",
        "model/network=dit_tiny no group_channels; (--cfg job). ddpm, ... have",
    ),
    ("model=autoencoder_vq model.network.codez=9", "model.network has no codez; it has channels, codes, decay"),
    ("model=autoencoder_kl model.loss.kl_wight=1", "model.loss.kl_wight=1: model.loss has no kl_wight; kl_weight"),
    ("model=dit model.lerning_rate=1", "model.lerning_rate=1: model=dit has no lerning_rate; learning_rate"),
    ("conditioner.droput=0", "conditioner.droput=0: conditioner=class_label has no droput; num_classes, dropout."),
    ("model=latent_dit codec.scale=1", "codec.scale=1: codec=kl has no scale; it has weights codec=diffusers has one."),
    ("data=webdataset data.urls=/a/{0..9}.tar", "data.urls=/a/{0..9}.tar: quotes \"data.urls='/data/"),
    ("data=webdataset data.urls=/a/0.tar data.urls=/a/1.tar", "data.urls=/a/1.tar and 1 more: quotes"),
    ("sampler=diffusers sampler/grid=karras", "sampler/grid=karras diffusers bring their own sampler=ddim"),
    ("metrics.kidd=true", "metrics.kidd=true: metrics=auto has no kidd; kid, more (--cfg job)."),
    ("metrics=digits metrics.features.wight=x", "metrics.features has no wight; it has weights."),
    ("model=dit,nonsense seed=0,1", "model=dit,nonsense: there is no model=nonsense; it has class_unet"),
    ("scheduler=cosine,flo", "scheduler=cosine,flo: there is no scheduler=flo (flow?); it has constant, ve."),
    ("hparams_search=optuna seed=1", "hparams_search=optuna searches with -m alone: python train.py"),
]


def test_ranks_do_not_search_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OrnsteinError, match=r"hparams_search=optuna starts the processes of its jobs itself"):
        check_words("train", ["-m", "hparams_search=optuna"])


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused_in_one_sentence(overrides: str, words: str) -> None:
    with pytest.raises(OrnsteinError) as caught:
        compose_train(overrides.split())
    told = str(caught.value)
    assert [word for word in words.split() if word not in told] == [], told
    assert len(told) < 450 and "\n" not in told and "+sampler.eta" not in told


@pytest.mark.parametrize(
    "overrides",
    [
        "sampler.eta=1 sampler/grid=quadratic sampler.grid.power=3",
        "+sampler.mine=1",
        "sampler=ddim,heun sampler.eta=1",
        "sampler=mine sampler.any=1",
        "sampler=diffusers sampler.scheduler.any=1",
        "model=unet_diffusers model.network.any=1",
        "model=latent_dit codec=diffusers codec.pretrained=somewhere",
        "model/network=dit_tiny model.network.depth=2",
        "objective.weighting=null",
        "sampler=run,heun model/network=unet,dit_tiny data.image_size=8,16 metrics.kid=true,false codec=null,kl",
        "--config-dir mine model=dit,mine",
        "-m hparams_search=optuna",
        "hparams_search=optuna --cfg job",
    ],
)
def test_the_rest_is_left_to_hydra(overrides: str) -> None:
    check_words("train", overrides.split())


@pytest.fixture
def stored(tmp_path: Path):  # type: ignore[no-untyped-def]
    """``stored("sampler=heun")``: a run's folder with no more than its config."""

    def run(*overrides: str) -> StoredRun:
        (tmp_path / "run").mkdir(exist_ok=True)
        OmegaConf.save(compose_train(overrides, run_dir=tmp_path / "run"), tmp_path / "run" / "config.yaml")
        return open_run(str(tmp_path / "run"))

    return run


OWN = ("sampler=heun", "sampler.s_churn=3", "sampler/grid=log_snr", "sampler.grid.t_max=0.9")


@pytest.mark.parametrize("task", ["sample", "evaluate"])
def test_the_runs_own_sampler_takes_another_grid(stored, task: str) -> None:  # type: ignore[no-untyped-def]
    run = stored(*OWN)
    own = compose_for(run, task, ["run=x"]).sampler
    assert own == compose_train(OWN).sampler and own.grid.t_max == 0.9
    other = compose_for(run, task, ["run=x", "sampler/grid=karras", "sampler.grid.rho=3"]).sampler
    assert (other.s_churn, other.grid.rho, "t_max" in other.grid) == (3, 3, False)
    assert type(instantiate(other).rule).__name__ == "Karras"
    assert compose_for(run, task, ["run=x", "sampler.grid.t_max=0.8"]).sampler.grid.t_max == 0.8
    assert compose_for(run, task, ["run=x", "sampler=ddim"]).sampler.grid._target_.endswith("Uniform")
    assert compose_for(run, task, ["run=x", "sampler=ddim", "sampler/grid=run"]).sampler.grid.t_max == 0.9
    with pytest.raises(OrnsteinError, match=r"the run's own sampler has no eta; .* sampler=ddim, "):
        compose_for(run, task, ["run=x", "sampler.eta=1"])


@pytest.mark.parametrize("task", ["sample", "evaluate"])
def test_a_run_with_diffusers_sampler_has_no_grid(stored, task: str) -> None:  # type: ignore[no-untyped-def]
    stored(*OWN)
    run = stored("sampler=diffusers")
    assert "grid" not in compose_for(run, task, ["run=x"]).sampler
    with pytest.raises(OrnsteinError, match="bring their own"):
        compose_for(run, task, ["run=x", "sampler/grid=karras"])
    assert compose_for(run, task, ["run=x", "sampler=ddim", "sampler/grid=karras"]).sampler.grid.rho == 7


@pytest.mark.parametrize(
    ("overrides", "name", "churn"),
    [(["sampler/grid=karras"], "Karras", 3), (["sampler=heun", "sampler/grid=karras"], "Karras", 0), ([], "LogSNR", 3)],
)
def test_a_resumed_run_takes_another_grid(stored, compose, overrides, name: str, churn: int) -> None:  # type: ignore[no-untyped-def]
    argv = [f"resume={stored(*OWN).folder}", *overrides]
    config_name = prepare_resume(argv)
    check_words(config_name, argv)
    cfg = compose(*argv, config_name=config_name)
    assert (cfg.sampler.grid._target_.rpartition(".")[2], cfg.sampler.s_churn) == (name, churn)
    instantiate(cfg.sampler)


def test_a_resumed_run_with_diffusers_sampler_has_no_grid(stored) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OrnsteinError, match="name the sampler too: sampler=ddim sampler/grid=karras"):
        prepare_resume([f"resume={stored('sampler=diffusers').folder}", "sampler/grid=karras"])


def test_mistakes_of_a_constructor_are_ours() -> None:
    with pytest.raises(OrnsteinError, match=r"^sampler\.steps=0: a sampler needs at least 1 step\.$"), as_ours():
        instantiate({"_target_": "ornstein.diffusion.samplers.DDIM", "steps": 0})
    with pytest.raises(ZeroDivisionError), as_ours():
        raise ZeroDivisionError


def test_mistakes_in_python_are_ours_too(stored) -> None:  # type: ignore[no-untyped-def]
    run = Run(stored(), module=None, config=OmegaConf.create())  # type: ignore[arg-type]
    with pytest.raises(OrnsteinError, match=r"^num_samples=0 must be at least 1\.$"):
        run.sample(0)
    for override, sentence in (("sampler.steps=2.5", "must be a whole number"), ("sampler.eta=2", "must lie in")):
        cfg = compose_for(run.stored, "sample", ["run=x", override])
        with pytest.raises(OrnsteinError, match=f"^{override}(.0)? {sentence}"):
            sampling_options(run.module, cfg, labels=None, count=1)
