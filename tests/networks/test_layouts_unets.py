"""Checkpoints of ADM, EDM and denoising-diffusion-pytorch compute here what they compute there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra.utils import get_class
from torch import Tensor, nn

from ornstein.errors import OrnsteinError
from ornstein.networks.embeddings import sinusoidal_embedding
from ornstein.networks.layouts import LAYOUTS, Converted, convert, find_layout, shift_noise

from .foreign import Weights, adm, edm, lucidrains

NULL = 10
# Outputs are of order one; both sides compute in float32, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def loaded(converted: Converted) -> nn.Module:
    network = get_class(converted.target)(**converted.arguments)
    network.load_state_dict(converted.state)
    return network.eval()


def inputs(channels: int = 3, size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(3, channels, size, size), torch.tensor([0.0, 421.0, 999.0])


ADM = [
    ({}, {}),
    ({"residual": False, "scale_shift": False, "out": 3}, {}),
    ({"legacy": False, "blocks": 2, "mults": (1, 2, 2), "attending": (1, 2)}, {"new_attention_order": True}),
    ({"mults": (0.5, 1), "base": 64, "attending": (0, 1)}, {}),
]


@pytest.mark.parametrize(("options", "facts"), ADM)
@pytest.mark.parametrize("labelled", [True, False])
def test_adm_computes_the_same(options: dict[str, Any], facts: dict[str, Any], labelled: bool) -> None:
    p, (x, steps) = Weights(), inputs()
    label = torch.tensor([3, 9, 0]) if labelled else None
    expected = adm(p, x, steps, label, **options)
    converted = convert(p, head_dim=16, image_size=16, **facts)
    assert find_layout(p) == "adm" and converted.unmapped == ()
    network = loaded(converted)
    given = {"label": label} if labelled else {}
    # Our condition 1000 t counts DDPM's steps from 1.
    torch.testing.assert_close(network(x, steps + 1, **given), expected, **CLOSE)
    if labelled:
        without = adm(p, x, steps, None, **options)
        torch.testing.assert_close(network(x, steps + 1, label=torch.full((3,), NULL)), without, **CLOSE)


def test_adms_heads_matter() -> None:
    p, (x, steps) = Weights(), inputs()
    expected = adm(p, x, steps, None)
    for facts in ({"head_dim": 32}, {"head_dim": 16, "new_attention_order": True}):
        assert (loaded(convert(p, image_size=16, **facts))(x, steps + 1) - expected).abs().max() > 1e-3
    torch.testing.assert_close(loaded(convert(p, heads=4, image_size=16))(x, steps + 1), expected, **CLOSE)


def test_adm_says_what_it_assumed_and_what_fits() -> None:
    p, (x, steps) = Weights(), inputs()
    adm(p, x, steps, torch.zeros(3, dtype=torch.int64), mults=(1, 1, 2), attending=(2,))
    converted = convert(p, head_dim=16)
    assert converted.arguments["image_size"] == 32  # three levels above 8 x 8
    assert converted.arguments["num_classes"] == 10 and converted.arguments["attention"] == ["none", "none", "full"]
    assert {"scheduler=linear", "objective=hybrid", "conditioner.dropout=0"} <= set(converted.suggest)
    assert "legacy" in converted.note and "32 x 32" in converted.note


EDM = [("ddpmpp", {}), ("ncsnpp", {"blocks": 2, "mults": (1, 2, 2)}), ("adm", {"base": 64}), ("ddpmpp", {"blocks": 2})]


@pytest.mark.parametrize(("kind", "options"), EDM)
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_edm_computes_the_same(kind: str, options: dict[str, Any], labelled: bool, prefix: str) -> None:
    p, (x, _) = Weights(), inputs()
    c_noise = torch.tensor([-1.3, 0.1, 1.1])
    label = torch.tensor([3, NULL, 0]) if labelled else None
    augment = torch.randn(3, 9) if prefix else None
    expected = edm(p, x, c_noise, label, kind=kind, augment=augment, **options)
    state = {f"{prefix}{name}": value for name, value in p.items()}
    converted = convert(state)
    assert find_layout(state) == "edm" and converted.unmapped == ()
    assert converted.arguments["image_size"] == 16
    given = {} if label is None else {"label": label}
    network = loaded(converted)
    torch.testing.assert_close(network(x, c_noise, augment=augment, **given), expected, **CLOSE)
    assert {"scheduler=edm", "objective=edm"} <= set(converted.suggest)


LUCIDRAINS = [{}, {"stem": 12, "mults": (1, 2, 4), "full": (1, 2), "heads": 3}, {"out": 6}]


@pytest.mark.parametrize("options", LUCIDRAINS)
def test_lucidrains_computes_the_same(options: dict[str, Any]) -> None:
    p, (x, steps) = Weights(), inputs()
    expected = lucidrains(p, x, steps, **options)
    converted = convert(p)
    assert find_layout(p) == "lucidrains" and converted.unmapped == ()
    torch.testing.assert_close(loaded(converted)(x, steps + 1), expected, **CLOSE)
    assert "does not say how" in converted.note


@pytest.mark.parametrize(
    ("betas", "objective", "settings"),
    [
        (torch.linspace(1e-4, 0.02, 1000), "eps", {"scheduler=linear", "objective=eps"}),
        (torch.linspace(1e-3, 0.2, 100), "x0", {"scheduler=linear", "scheduler.num_timesteps=100", "objective=x0"}),
        ("cosine", "v", {"scheduler=cosine", "objective=v"}),
        ("sigmoid", "v", {"scheduler=snr_sigmoid", "objective=v"}),
    ],
)
def test_lucidrains_buffers_tell_how_it_was_trained(betas: Any, objective: str, settings: set[str]) -> None:
    p, (x, steps) = Weights(), inputs()
    expected = lucidrains(p, x, steps[:1].expand(3) + 50)
    if isinstance(betas, str):
        t = torch.linspace(0, 1, 1001, dtype=torch.float64)
        curve = ((t + 0.008) / 1.008 * torch.pi / 2).cos() ** 2 if betas == "cosine" else (3 - 6 * t).sigmoid() - 0.0474
        betas = (1 - curve[1:] / curve[:-1]).clamp(0, 0.999)
    alpha_bar = (1 - betas.double()).cumprod(0)
    snr = alpha_bar / (1 - alpha_bar)
    weight = {"eps": torch.ones_like(snr), "x0": snr, "v": snr / (snr + 1)}[objective]
    buffers = {"betas": betas.float(), "alphas_cumprod": alpha_bar.float(), "loss_weight": weight.float()}
    converted = convert({**{f"model.{name}": value for name, value in p.items()}, **buffers})
    assert settings <= set(converted.suggest) and converted.note == ""
    assert set(converted.dropped) == set(buffers)
    # Step 50 of T is t = 51/T, a condition of 1000 t.
    condition = torch.full((3,), 1000 * 51 / len(betas))
    torch.testing.assert_close(loaded(converted)(x, condition), expected, **CLOSE)


def test_a_self_conditioned_network_is_refused() -> None:
    p, (x, steps) = Weights(), inputs(channels=6)
    lucidrains(p, x, steps, out=3)
    with pytest.raises(OrnsteinError, match="self_condition"):
        convert(p)


def test_what_has_no_place_is_named() -> None:
    p, (x, steps) = Weights(), inputs()
    adm(p, x, steps, None)
    p["encoder_kv.weight"] = torch.zeros(1)
    assert convert(p, head_dim=16).unmapped == ("encoder_kv.weight",)


def test_a_layout_that_lacks_a_part_says_which() -> None:
    p, (x, steps) = Weights(), inputs()
    adm(p, x, steps, None)
    del p["middle_block.0.in_layers.0.weight"]
    with pytest.raises(OrnsteinError, match=r"middle_block\.0\.in_layers\.0"):
        convert(p, head_dim=16)


def test_nothing_is_recognised_in_anything_else() -> None:
    with pytest.raises(OrnsteinError, match=r"none of the layouts .*adm.* a\.weight"):
        convert({"a.weight": torch.zeros(1)})
    with pytest.raises(OrnsteinError, match="layout 'other' is unknown: choose auto, "):
        convert({}, layout="other")
    p, (x, steps) = Weights(), inputs()
    adm(p, x, steps, None)
    with pytest.raises(OrnsteinError, match="layout adm takes no fact depth; it takes concat_channels"):
        convert(p, depth=3)


def test_at_most_one_layout_recognises_a_checkpoint() -> None:
    from ornstein.networks.layouts import layout_module

    p, (x, steps) = Weights(), inputs()
    states = {"adm": Weights(), "edm": Weights(), "lucidrains": Weights()}
    adm(states["adm"], x, steps, None)
    edm(states["edm"], x, steps, None, kind="ddpmpp")
    lucidrains(states["lucidrains"], x, steps)
    for name, state in states.items():
        assert [each for each in LAYOUTS if layout_module(each).recognise(state, config=None)] == [name]
    assert not p


@pytest.mark.parametrize("dim", [8, 9])
@pytest.mark.parametrize("by", [-1.0, 0.25, 1.0])
def test_a_shift_of_the_condition_goes_into_the_weights(dim: int, by: float) -> None:
    weight, values = torch.randn(5, dim), torch.tensor([0.0, 3.0, 999.0], dtype=torch.float64)
    shifted = shift_noise(weight.double(), by=by)
    expected = sinusoidal_embedding(values + by, dim) @ weight.double().T
    torch.testing.assert_close(sinusoidal_embedding(values, dim) @ shifted.T, expected, rtol=1e-12, atol=1e-12)
