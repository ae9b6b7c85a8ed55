"""What of given weights fits a network, and what is frozen of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ornstein.errors import OrnsteinError
from ornstein.networks import UNet
from ornstein.training.start import check_fit, fit, freeze, load_fitting, trainable

SMALL = {"base_channels": 8, "channel_mults": (1, 2), "num_blocks": 1, "groups": 4}


def unet(**options: object) -> UNet:
    return UNet(1, **{**SMALL, "num_classes": 10, **options})


def test_weights_of_the_same_network_fit_and_are_loaded() -> None:
    source, target = unet(), unet()
    found = fit(target, source.state_dict())
    assert found.exact and len(found.loaded) == len(source.state_dict())
    check_fit(target, found, source="init.from=x")
    load_fitting(target, source.state_dict(), found)
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_half_precision_weights_are_loaded_into_full() -> None:
    source, target = unet().half(), unet()
    load_fitting(target, source.state_dict(), fit(target, source.state_dict()))
    assert torch.equal(target.stem.weight, source.stem.weight.float()) and target.stem.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_classes": None}, "missing: embed.label.weight"),
        ({"num_blocks": 2}, "unexpected: encoder"),
        (
            {"num_classes": 5},
            "of another shape: embed.label.weight (6, 32) for (11, 32). number of classes init.partial",
        ),
        ({"base_channels": 16}, "of another shape stem.weight (16, 1, 3, 3) for (8, 1, 3, 3) model"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, object], words: str) -> None:
    network = unet()
    with pytest.raises(OrnsteinError) as error:
        check_fit(network, fit(network, unet(**given).state_dict()), source="init.from=RUN")
    assert "init.from=RUN" in str(error.value)
    for word in words.split():
        assert word in str(error.value), (word, str(error.value))


def test_the_number_of_classes_is_mentioned_only_where_it_differs() -> None:
    network = unet()
    with pytest.raises(OrnsteinError) as error:
        check_fit(network, fit(network, unet(num_blocks=2).state_dict()), source="init.from=RUN")
    assert "classes" not in str(error.value)


def test_a_part_is_loaded_where_that_will_do() -> None:
    source, target = unet(num_classes=5), unet()
    table = target.embed.label.weight.clone()
    found = fit(target, source.state_dict())
    check_fit(target, found, source="init.from=RUN", partial=True)
    load_fitting(target, source.state_dict(), found)
    assert torch.equal(target.stem.weight, source.stem.weight) and torch.equal(target.embed.label.weight, table)


@pytest.mark.parametrize("partial", [True, False])
def test_another_architecture_is_refused_even_in_part(partial: bool) -> None:
    network = unet()
    state = {f"other.{name}": value for name, value in network.state_dict().items()}
    with pytest.raises(OrnsteinError, match=r"init.from=RUN is of another architecture than model.network .UNet."):
        check_fit(network, fit(network, state), source="init.from=RUN", partial=partial)


def test_a_few_names_in_common_do_not_make_it_the_same_architecture() -> None:
    network = unet()
    state = {f"other.{name}": value for name, value in network.state_dict().items()}
    state["embed.mlp.0.weight"], state["stem.bias"] = torch.zeros(3, 3), network.stem.bias
    count = len(network.state_dict())
    with pytest.raises(OrnsteinError, match=rf"of another architecture .* only 2 of its {count} tensors are there"):
        check_fit(network, fit(network, state), source="init.from=RUN")
    check_fit(network, fit(network, state), source="init.from=RUN", partial=True)
    with pytest.raises(OrnsteinError, match=r"init\.partial=true"):
        check_fit(network, fit(network, unet(base_channels=16).state_dict()), source="init.from=RUN")


def test_no_more_than_ten_names_of_a_kind() -> None:
    state = {f"other.{i}": torch.zeros(1) for i in range(14)} | {"stem.weight": unet().stem.weight}
    assert fit(unet(), state).described().count("other.") == 10
    assert "and 4 more" in fit(unet(), state).described()


def trained(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_patterns_freeze_what_they_match() -> None:
    network = unet()
    everything = trained(network)
    freeze(network, patterns=["encoder.*", "stem.bias"])
    assert everything - trained(network) == {n for n in everything if n.startswith("encoder.") or n == "stem.bias"}
    count, total = trainable(network)
    assert 0 < count < total == sum(p.numel() for p in network.parameters())


def test_only_what_is_named_is_trained_and_may_be_frozen_in_part() -> None:
    network = unet()
    freeze(network, train_only=["*label*", "out.*"], patterns=["out.bias"])
    assert trained(network) == {"embed.label.weight", "out.weight"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"patterns": ["nothing.*"]},
            "init.freeze=['nothing.*'] nothing.* matches no parameter of UNet embed.mlp.0.weight",
        ),
        ({"train_only": ["encoder.*", "x"]}, "init.train_only= x matches no parameter"),
        ({"patterns": ["*"]}, "leave no parameter to train fewer"),
        ({"patterns": ["out.*"], "train_only": ["out.*"]}, "leave no parameter to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(options: dict[str, list[str]], words: str) -> None:
    with pytest.raises(OrnsteinError) as error:
        freeze(unet(), **options)
    for word in words.split():
        assert word in str(error.value), (word, str(error.value))
