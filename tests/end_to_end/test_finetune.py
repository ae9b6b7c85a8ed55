"""Training that starts from weights that exist: whole, frozen in part, or with adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ornstein
from ornstein.errors import OrnsteinError

pytestmark = pytest.mark.slow

STILL = ["optimizer.lr=0", "optimizer.weight_decay=0", "trainer.max_steps=1"]
Tiny = Callable[..., list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def base(folder: Path, tiny: Tiny) -> Path:
    """A run with averages of its own."""
    ornstein.train([*tiny(), "trainer.max_steps=4", "optimizer.lr=0.01"], run_dir=folder / "base")
    return folder / "base"


def checkpoint(run: Path) -> dict[str, Any]:
    return dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True))


def network(run: Path) -> dict[str, Tensor]:
    state = checkpoint(run)["state_dict"]
    return {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}


def averages(run: Path) -> dict[str, Tensor]:
    return dict(checkpoint(run)["callbacks"]["EMA"]["network"])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("weights", "of"), [("ema", averages), ("model", network)])
def test_a_run_starts_from_anothers_weights(
    base: Path, tmp_path: Path, tiny: Tiny, weights: str, of: Callable[[Path], dict[str, Tensor]], capsys: Any
) -> None:
    assert not same(averages(base), network(base))
    ornstein.train([*tiny(), *STILL, f"init.from={base}", f"init.weights={weights}"], run_dir=tmp_path / "run")
    assert same(network(tmp_path / "run"), of(base))
    assert same(averages(tmp_path / "run"), of(base))  # and so do its averages
    told = " ".join(capsys.readouterr().out.split())
    assert " init starts from " in told and "weights at step 4" in told and "trainable" not in told


def test_every_form_of_the_weights_will_do(base: Path, tmp_path: Path, tiny: Tiny) -> None:
    save_file(averages(base), tmp_path / "network.safetensors")
    torch.save({"ema": averages(base), "model": network(base), "step": 4}, tmp_path / "trainer.pt")
    forms = [base / "checkpoints" / "last.ckpt", tmp_path / "network.safetensors", tmp_path / "trainer.pt"]
    for number, form in enumerate(forms):
        run = tmp_path / str(number)
        ornstein.train([*tiny(), *STILL, f"init.from={form}"], run_dir=run)
        assert same(network(run), averages(base)), form


def test_frozen_parameters_stay_and_the_optimizer_never_sees_them(
    base: Path, tmp_path: Path, tiny: Tiny, capsys: Any
) -> None:
    overrides = [*tiny(), f"init.from={base}", 'init.freeze=["encoder.*","stem.*"]', "optimizer.lr=0.01"]
    ornstein.train(overrides, run_dir=tmp_path / "run")
    before, after = averages(base), network(tmp_path / "run")
    frozen = {name for name in before if name.startswith(("encoder.", "stem."))}
    assert frozen == {name for name in before if torch.equal(before[name], after[name])}
    held = checkpoint(tmp_path / "run")["optimizer_states"][0]["state"]
    assert len(held) == len(before) - len(frozen)
    assert "trainable" in capsys.readouterr().out


def test_a_part_is_loaded_where_the_classes_are_others(base: Path, tmp_path: Path, tiny: Tiny, capsys: Any) -> None:
    overrides = [*tiny("pixel_unet"), *STILL, f"init.from={base}"]
    with pytest.raises(OrnsteinError, match=r"does not fit model.network .UNet.; unexpected: embed.label.weight"):
        ornstein.train(overrides, run_dir=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    ornstein.train([*overrides, "init.partial=true"], run_dir=tmp_path / "run")
    expected = {name: value for name, value in averages(base).items() if name != "embed.label.weight"}
    assert same(network(tmp_path / "run"), expected)
    assert "embed.label.weight" in capsys.readouterr().out


def test_a_fine_tune_goes_on_without_its_source(base: Path, tmp_path: Path, tiny: Tiny) -> None:
    shutil.copytree(base, tmp_path / "source")
    overrides = [*tiny(), f"init.from={tmp_path / 'source'}", "init.freeze=[stem.*]", "lr_schedule=constant"]
    ornstein.train([*overrides, "trainer.max_steps=6"], run_dir=tmp_path / "whole")
    ornstein.train([*overrides, "trainer.max_steps=3"], run_dir=tmp_path / "halved")
    shutil.rmtree(tmp_path / "source")
    ornstein.train([f"resume={tmp_path / 'halved'}", "trainer.max_steps=6"])
    assert same(network(tmp_path / "halved"), network(tmp_path / "whole"))
    assert same(averages(tmp_path / "halved"), averages(tmp_path / "whole"))


@pytest.fixture(scope="module")
def adapted(base: Path, folder: Path, tiny: Tiny) -> Path:
    overrides = [*tiny(), f"init.from={base}", "adapter=lora", "adapter.rank=2", "lr_schedule=constant"]
    ornstein.train([*overrides, "optimizer.lr=0.05", "trainer.max_steps=6"], run_dir=folder / "adapted")
    return folder / "adapted"


def test_adapters_alone_are_trained_and_saved(base: Path, adapted: Path) -> None:
    before, after = averages(base), network(adapted)
    adapters = {name for name in after if ".lora_" in name}
    assert adapters and len(checkpoint(adapted)["optimizer_states"][0]["state"]) == len(adapters)
    for name in after.keys() - adapters:
        assert torch.equal(after[name], before[name.replace(".base_layer.", ".")])
    files = {path.name for path in (adapted / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert (adapted / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000


def test_a_run_with_adapters_samples_and_peft_gives_the_same(base: Path, adapted: Path) -> None:
    import peft

    run = ornstein.load(adapted, device="cpu")
    images = run.sample(4, steps=3)
    start = ornstein.load(base, device="cpu")
    assert not torch.equal(start.sample(4, steps=3), images)
    start.module.network = peft.PeftModel.from_pretrained(start.module.network, str(adapted / "adapter")).eval()
    assert torch.equal(start.sample(4, steps=3), images)


def test_a_run_with_adapters_goes_on_to_the_bit(base: Path, adapted: Path, tmp_path: Path, tiny: Tiny) -> None:
    overrides = [*tiny(), f"init.from={base}", "adapter=lora", "adapter.rank=2", "lr_schedule=constant"]
    ornstein.train([*overrides, "optimizer.lr=0.05", "trainer.max_steps=3"], run_dir=tmp_path / "run")
    ornstein.train([f"resume={tmp_path / 'run'}", "trainer.max_steps=6"])
    assert same(network(tmp_path / "run"), network(adapted)) and same(averages(tmp_path / "run"), averages(adapted))


def test_a_run_starts_from_one_with_adapters(adapted: Path, tmp_path: Path, tiny: Tiny) -> None:
    ornstein.train([*tiny(), *STILL, f"init.from={adapted}"], run_dir=tmp_path / "run")
    merged = ornstein.load(tmp_path / "run", device="cpu").module.network
    with_adapters = ornstein.load(adapted, device="cpu").module.network
    x, cond, label = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 7])
    torch.testing.assert_close(merged(x, cond, label=label), with_adapters(x, cond, label=label))


def test_experts_start_from_one_network(base: Path, tmp_path: Path, tiny: Tiny) -> None:
    from ornstein.cli.compose import compose_train
    from ornstein.cli.start import build_network

    small = ["base_channels=8", "channel_mults=[1,2]", "groups=4"]
    overrides = [f"model.network.network.{each}" for each in small]
    network = build_network(compose_train(["model=experts", *overrides, f"init.from={base}"]), fresh=True)
    for expert in network.experts:
        assert same(expert.state_dict(), averages(base))


def test_what_a_run_starts_from_is_part_of_what_it_is(base: Path, tiny: Tiny) -> None:
    from ornstein.cli.build import plain
    from ornstein.cli.compose import compose_train
    from ornstein.experiment import identity

    source = f"init.from={base}"
    options = [[], [source], [source, "adapter=lora"], [source, "init.weights=model"]]
    names = {identity(plain(compose_train([*tiny(), *each]))) for each in options}
    assert len(names) == len(options)


REFUSED = [
    ("init.from=/nowhere", "init.from=/nowhere no such file or folder"),
    ("init.freeze=[stem.*]", "init.freeze without init.from= random init.from=outputs/train"),
    ("adapter=lora", "adapter=lora init.from= random"),
    ("init.from={base} init.weights=best", "init.weights=best ema or model"),
    ("init.from={base} init.freeze=[nothing]", "init.freeze=['nothing'] matches no parameter of UNet"),
    ("init.from={base} init.freeze=[*]", "leave no parameter to train"),
    ("init.from={base} adapter=lora init.freeze=[stem.*]", "init.freeze adapter=lora adapter.modules_to_save"),
    ("init.from={base} adapter=lora adapter.rank=0", "adapter.rank=0 at least 1"),
    ("init.from={base} model.network.base_channels=16", "init.from={base} of another shape stem init.partial=true"),
    ("init.from={base}/config.yaml", "config.yaml holds more than tensors"),
    ("init.from={empty}", "init.from={empty} holds no config.yaml"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_what_cannot_work_is_refused_before_training(
    base: Path, tmp_path: Path, tiny: Tiny, overrides: str, words: str
) -> None:
    from ornstein.cli.compose import compose_train

    with pytest.raises(OrnsteinError) as error:
        compose_train([*tiny(), *overrides.format(base=base, empty=tmp_path).split()])
    for word in words.format(base=base, empty=tmp_path).split():
        assert word in str(error.value), (word, str(error.value))


def test_another_network_is_refused(base: Path, tiny: Tiny) -> None:
    from ornstein.cli.compose import compose_train

    with pytest.raises(OrnsteinError, match=r"of another architecture than model.network .DiT."):
        compose_train([*tiny("dit"), f"init.from={base}"])


def test_a_stored_run_with_adapters_needs_no_trust(adapted: Path) -> None:
    assert json.loads((adapted / "summary.json").read_text())["status"] == "finished"
    assert ornstein.load(adapted, device="cpu").config.adapter.rank == 2
