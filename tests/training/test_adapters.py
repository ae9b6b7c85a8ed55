"""Adapters: nothing changes at the start, they alone are trained, and peft reads what is written."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ornstein.errors import OrnsteinError
from ornstein.networks import AnnotatedUNet, DiT, UNet
from ornstein.networks.edm2 import EDM2UNet
from ornstein.networks.lucidrains import LucidrainsUNet
from ornstein.training.adapters import Lora, merge, merged_state, save_adapter

UNET = {"base_channels": 16, "channel_mults": (1, 2), "num_blocks": 1, "groups": 4, "num_classes": 10}
# network, how many layers of attention it has
NETWORKS = {
    "unet": (lambda: UNet(1, **UNET), 2),
    "unet_attention": (lambda: UNet(1, **UNET, attention=("linear", "full"), heads=2), 2 + 2 * (1 + 2) * 2),
    "annotated": (lambda: AnnotatedUNet(1, base_channels=16, channel_mults=(1, 2), num_classes=10), 2 * 5),
    "lucidrains": (lambda: LucidrainsUNet(1, base_channels=16, channel_mults=(1, 2), num_classes=10), 2 * 5),
    "dit": (lambda: DiT(1, hidden_size=32, depth=2, heads=2, num_classes=10), 2 * 2),
}


def perturbed(network: nn.Module, names: str = "", scale: float = 0.1) -> nn.Module:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if names in name:
                parameter.add_(scale * torch.randn_like(parameter))
    return network.eval()


def output(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    return network(x, torch.tensor([3.0, 700.0]), label=torch.tensor([1, 7]))


@pytest.fixture(params=NETWORKS)
def base(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return perturbed(NETWORKS[request.param][0]())


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_network_starts_as_it_was(base: nn.Module, init: str) -> None:
    before = output(base)
    Lora(init=init).add_to(base)
    torch.testing.assert_close(output(base.eval()), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_auto_means_the_layers_of_attention(name: str) -> None:
    make, count = NETWORKS[name]
    names = Lora().add_to(make())
    assert len(names) == count
    assert {each.rpartition(".")[2] for each in names} <= {"qkv", "out"}


def test_only_adapters_are_trained(base: nn.Module) -> None:
    Lora(rank=4).add_to(base)
    trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    frozen = {name: value.clone() for name, value in base.state_dict().items() if name not in trained}
    optimizer = torch.optim.SGD([p for p in base.parameters() if p.requires_grad], lr=1.0)
    before = output(base)
    for _ in range(2):  # the first step leaves A where it is, since B is zero
        output(base).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(output(base), before)
    for name, value in base.state_dict().items():
        assert name in trained or torch.equal(value, frozen[name])


def test_peft_reads_what_is_written(base: nn.Module, tmp_path: Path) -> None:
    import peft

    plain = copy.deepcopy(base)
    Lora(rank=4, alpha=6).add_to(base)
    perturbed(base, ".lora_")
    save_adapter(base, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert names and all(name.startswith("base_model.model.") and ".lora_" in name for name in names)
    read = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    torch.testing.assert_close(output(read), output(base), rtol=0, atol=0)


def test_merged_it_computes_the_same_without_adapters(base: nn.Module) -> None:
    plain = copy.deepcopy(base)
    Lora(rank=4, alpha=6, modules_to_save=("label",) if hasattr(base, "embed") else ()).add_to(base)
    perturbed(base, ".lora_")
    perturbed(base, ".modules_to_save.")
    expected = output(base)
    plain.load_state_dict(merged_state(base.state_dict(), alpha=6))
    # The share is added to the weight before the product instead of after it.
    torch.testing.assert_close(output(plain), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output(merge(base)), expected, rtol=1e-4, atol=1e-5)
    assert set(base.state_dict()) == set(plain.state_dict()) and not hasattr(base, "peft_config")


def test_a_state_without_adapters_is_merged_into_itself(base: nn.Module) -> None:
    state = base.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in merged_state(state, alpha=1).items())


def test_layers_can_be_trained_in_full_beside_them(tmp_path: Path) -> None:
    import peft

    network = perturbed(UNet(1, **UNET))
    plain = copy.deepcopy(network)
    Lora(modules_to_save=("embed.label",)).add_to(network)
    perturbed(network, ".lora_")
    perturbed(network, ".modules_to_save.")
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert "embed.label.modules_to_save.default.weight" in trained
    save_adapter(network, tmp_path)
    read = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    torch.testing.assert_close(output(read), output(network), rtol=0, atol=0)


def test_named_layers_and_all_of_them() -> None:
    network = UNet(1, **UNET)
    assert Lora(target_modules=["condition"]).targets(network) == tuple(
        name for name, _ in network.named_modules() if name.endswith(".condition")
    )
    everything = Lora(target_modules="all-linear").add_to(network)
    assert {"embed.mlp.0", "embed.mlp.2", "middle.0.attention.qkv"} < set(everything)


def test_a_name_that_ends_another_does_not_catch_it() -> None:
    network = DiT(1, hidden_size=32, depth=1, heads=2)  # has `out` and `blocks.0.out`
    names = Lora(target_modules="all-linear").targets(network)
    added = Lora().add_to(network)
    assert "out" in names and "out" not in added and "blocks.0.out" in added
    assert {name.partition(".lora_A")[0] for name, _ in network.named_parameters() if ".lora_A" in name} == set(added)


def test_layers_that_change_their_weights_take_none() -> None:
    network = EDM2UNet(1, base_channels=16, channel_mults=(1, 2), num_blocks=1, attention=(False, True), head_dim=16)
    with pytest.raises(OrnsteinError, match=r"EDM2UNet.* has no plain linear .* adapter=none init\.train_only"):
        Lora().add_to(network)


def test_it_compiles_to_one_graph_and_trains_in_copies() -> None:
    network = perturbed(UNet(1, **UNET))
    Lora().add_to(network)
    average = copy.deepcopy(network)  # as EMA does
    torch.testing.assert_close(output(average), output(network), rtol=0, atol=0)
    explained = torch._dynamo.explain(network)(
        torch.randn(2, 1, 8, 8), torch.zeros(2), label=torch.zeros(2, dtype=torch.int64)
    )
    assert explained.graph_break_count == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "adapter.rank=0 at least 1"),
        ({"alpha": 0}, "adapter.alpha=0 above 0"),
        ({"dropout": 1.0}, "adapter.dropout=1.0 [0, 1)"),
        ({"init": "pissa"}, "adapter.init=pissa kaiming or gaussian"),
        ({"target_modules": "attention"}, "adapter.target_modules=attention auto, all-linear, or a list"),
        ({"target_modules": ["nothing"]}, "adapter.target_modules names nothing embed.mlp.0"),
        ({"modules_to_save": ["nothing"]}, "adapter.modules_to_save names nothing no such layer"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(OrnsteinError) as error:
        Lora(**options).add_to(UNet(1, **UNET))
    for word in words.split():
        assert word in str(error.value), (word, str(error.value))


def test_a_network_without_attention_says_what_to_do() -> None:
    network = UNet(1, **{**UNET, "mid_attention": "none"})
    with pytest.raises(OrnsteinError, match=r"adapter.target_modules=auto: .*UNet.* choose adapter.target_modules=all"):
        Lora().add_to(network)
    with pytest.raises(OrnsteinError, match="no plain linear layer or 1x1 convolution for adapter=lora"):
        Lora(target_modules="all-linear").add_to(nn.Conv2d(1, 1, 3))
    with pytest.raises(OrnsteinError, match="has no adapters to save"):
        save_adapter(network, "nowhere")
