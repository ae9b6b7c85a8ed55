"""``likelihood=`` of evaluate: its options, bits/dim of a tiny run's held-out images, and what is refused."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from ornstein.cli.build import build_data, build_module
from ornstein.cli.evaluate import evaluate, likelihood, likelihood_method
from ornstein.cli.launch import conf_dir
from ornstein.cli.load import compose_for
from ornstein.cli.stored import StoredRun, open_run
from ornstein.codecs import KLAutoencoder
from ornstein.diffusion.likelihood import ProbabilityFlow
from ornstein.diffusion.variational_bound import VariationalBound
from ornstein.errors import OrnsteinError
from ornstein.training.likelihood import TICKS, held_out_likelihood
from ornstein.training.module import DiffusionModule

TINY = ["model.network.base_channels=8", "model.network.channel_mults=[1,2]", "model.network.groups=4"]
OPTIONS = {"ode": ProbabilityFlow, "vlb": VariationalBound}


@pytest.fixture(scope="module")
def stored(compose_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    """A run of a small network, as its folder holds it."""
    from hydra.core.hydra_config import HydraConfig

    folder = tmp_path_factory.mktemp("stored")
    cfg = compose_config("model=class_unet", *TINY, run_dir=folder)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    HydraConfig.instance().cfg = None
    return StoredRun(folder, resolved, None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def module(stored: StoredRun) -> DiffusionModule:
    """Random weights, none of them 0: as it is made, a network begins with no output at all."""
    built = build_module(OmegaConf.create(stored.config), training=False).eval().requires_grad_(False)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for parameter in built.network.parameters():
        parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return built


def asked(stored: StoredRun, *overrides: str) -> Any:
    return compose_for(stored, "evaluate", ["run=somewhere", *overrides])


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_its_class_with_its_defaults(option: str) -> None:
    node = OmegaConf.load(conf_dir() / "likelihood" / f"{option}.yaml")
    assert node.pop("num_images") == 64
    kind = get_class(node._target_)
    parameters = inspect.signature(kind).parameters
    assert kind is OPTIONS[option]
    assert {key: node[key] for key in node if key != "_target_"} == {k: p.default for k, p in parameters.items()}
    instantiate(node)


def test_nothing_is_asked_for_unless_named(stored: StoredRun, module: DiffusionModule) -> None:
    assert likelihood_method(module, asked(stored)) is None
    assert likelihood(module, asked(stored), held_out=None) is None


@pytest.mark.parametrize(
    ("overrides", "name", "nfe"),
    [
        (["likelihood=ode", "likelihood.rtol=1e-3", "likelihood.atol=1e-3"], "nll_bits_per_dim", None),
        (["likelihood=vlb", "likelihood.steps=6"], "vlb_bits_per_dim", 6),
        (["likelihood=vlb", "likelihood.steps=6", "likelihood.terms=2"], "vlb_bits_per_dim", 2),
    ],
)
def test_bits_per_dim_of_held_out_images(
    stored: StoredRun, module: DiffusionModule, overrides: list[str], name: str, nfe: int | None
) -> None:
    cfg = asked(stored, *overrides, "likelihood.num_images=5", "batch_size=3")
    data = build_data(cfg)
    result = likelihood(module, cfg, data.val)
    assert result is not None and result.bits.shape == (5,) and bool(result.bits.isfinite().all())
    assert set(result.values) == {name, f"{name}_stderr"} and result.values[name] == pytest.approx(result.bits.mean())
    assert nfe is None or result.nfe == nfe
    told = json.loads(json.dumps(result.to_dict()))
    assert told["num_images"] == 5 and told["guidance"] == "not applied" and told["images"][0] == 0
    if nfe == 6:
        assert len(told["per_step"]) == 6
        assert sum(told["per_step"]) + told["prior"] + told["reconstruction"] == pytest.approx(told["values"][name])
    else:
        assert "per_step" not in told
    # The figure of an image is its own, whatever batch it is in: to rounding, which the solver's choice of steps can
    # raise to its tolerance, 1e-3 of some 60 dimensions' 9 bits over a few hundred steps.
    tolerance = 0.05 if name == "nll_bits_per_dim" else 1e-4
    whole = held_out_likelihood(module, data.val, likelihood_method(module, cfg), num_images=5)  # type: ignore[arg-type]
    torch.testing.assert_close(whole.bits, result.bits, rtol=1e-4, atol=tolerance)


def test_labels_are_the_images_own_and_guidance_is_left_out(stored: StoredRun, module: DiffusionModule) -> None:
    cfg = asked(stored, "likelihood=vlb", "likelihood.steps=3", "likelihood.num_images=4", "guidance=cfg")
    seen = []
    hook = module.network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["label"]), with_kwargs=True
    )
    data = build_data(cfg)
    likelihood(module, cfg, data.val)
    hook.remove()
    own = torch.from_numpy(data.val.labels[torch.arange(4) * len(data.val) // 4])
    assert len(seen) == 3 and all(torch.equal(label, own) for label in seen)


def test_progress_is_told_in_ticks(stored: StoredRun, module: DiffusionModule) -> None:
    data = build_data(asked(stored))
    for method in (VariationalBound(steps=7), ProbabilityFlow(rtol=1e-1, atol=1e-1)):
        ticks: list[None] = []
        held_out_likelihood(
            module, data.val, method, num_images=3, batch_size=2, advance=lambda ticks=ticks: ticks.append(None)
        )
        assert len(ticks) == 2 * TICKS


REFUSED = [
    (["likelihood=ode", "likelihood.num_images=0"], "likelihood.num_images=0 359 null"),
    (["likelihood=ode", "likelihood.num_images=360"], "likelihood.num_images=360 359"),
    (["likelihood=vlb", "likelihood.variance=learned"], "variance=learned network objective=hybrid"),
    (["likelihood=ode", "likelihood.t_min=0"], "likelihood.t_min=0 1e-5"),
    (["likelihood=ode", "likelihood.max_steps=1"], "likelihood.max_steps=1 likelihood.rtol"),
    (["likelihood=ode", "likelihood._target_=os.getcwd"], "os.getcwd trust_targets=[os]"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[row[0][-1] for row in REFUSED])
def test_refused_in_one_sentence(stored: StoredRun, module: DiffusionModule, overrides: list[str], words: str) -> None:
    cfg = asked(stored, *overrides)
    with pytest.raises(OrnsteinError) as caught:
        likelihood(module, cfg, build_data(cfg).val)
    told = str(caught.value)
    assert [word for word in words.split() if word not in told] == [], told
    assert "\n" not in told


def test_latents_are_refused(stored: StoredRun) -> None:
    latent = SimpleNamespace(codec=KLAutoencoder.__new__(KLAutoencoder))
    with pytest.raises(OrnsteinError, match=r"bits/dim of latents .* likelihood=none"):
        likelihood_method(latent, asked(stored, "likelihood=ode"))  # type: ignore[arg-type]


def test_evaluate_writes_bits_per_dim_beside_the_other_figures(
    compose_config: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hydra.core.hydra_config import HydraConfig

    from ornstein.cli.train import train

    small = ["data.batch_size=16", "trainer.max_steps=2", "metrics.num_samples=4", "callbacks=none", "logger=none"]
    checkpoint = f"+callbacks.checkpoint={{_target_: {CHECKPOINT}, run_dir: '${{paths.run_dir}}'}}"
    train(compose_config("model=class_unet", *TINY, *small, checkpoint, run_dir=tmp_path / "run"))
    run = open_run(str(tmp_path / "run"))
    for option, key in (("ode", "nll_bits_per_dim"), ("vlb", "vlb_bits_per_dim")):
        steps = ["likelihood.steps=20"] if option == "vlb" else ["likelihood.rtol=1e-2", "likelihood.atol=1e-2"]
        out = tmp_path / option
        cfg = compose_for(
            run,
            "evaluate",
            [f"run='{run.folder}'", "num_samples=80", "sampler.steps=2", f"likelihood={option}", *steps,
             "likelihood.num_images=4", f"paths.run_dir='{out}'"],
        )  # fmt: skip
        capsys.readouterr()
        HydraConfig.instance().cfg = None
        figures = evaluate(cfg)
        report = json.loads((out / "evaluation.json").read_text())
        assert math.isfinite(figures[key]) and report["values"][key] == figures[key] and report["values"]["fid_80"] > 0
        assert report["settings"]["likelihood"]["num_images"] == 4
        assert json.loads((out / "summary.json").read_text())[key] == figures[key]
        assert len(json.loads((out / "likelihood.json").read_text())["bits_per_dim"]) == 4
        told = capsys.readouterr().out
        assert key in told and "bits/dim of 4 held-out images without guidance" in told


CHECKPOINT = "ornstein.training.callbacks.Checkpoint"
