"""U-Nets and autoencoders under diffusers' names: the same functions there and here, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ornstein.codecs import KLAutoencoder, VQAutoencoder
from ornstein.errors import OrnsteinError
from ornstein.networks import UNet
from ornstein.networks.layouts import LAYOUTS, diffusers_unet, kl, layout_module

UNETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"scale_shift": False, "channel_mults": [1, 1, 2], "num_blocks": 2},
    "attention": {"attention": ["none", "full"], "head_dim": 8},
    "heads": {"attention": ["none", "full"], "heads": 4},
    "no_middle": {"mid_attention": "none"},
    "ddpm": {"noise_embedding": "ddpm", "resampling": "conv_end", "scale_shift": False, "norm_eps": 1e-6},
    "adm": {"resampling": "residual", "attention": ["full", "none"], "head_dim": 8, "channel_mults": [1, 2]},
    "classes": {"num_classes": 3},
    "concat": {"num_classes": 3, "label_mode": "concat"},
    "patches": {"patch_size": 2, "image_size": [16, 32]},
    "embedding": {"embedding_channels": 48, "dropout": 0.1, "out_channels": 4},
}
SMALL = {"in_channels": 2, "image_size": 16, "base_channels": 16, "channel_mults": [1, 2], "num_blocks": 1, "groups": 8}


def perturbed(module: nn.Module) -> nn.Module:
    """With weights away from where training starts: zeros would hide what is mapped wrongly."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(False)


def theirs_of(network: UNet, arguments: dict[str, Any], *, noise_offset: float) -> nn.Module:
    from diffusers import UNet2DModel

    config, state = diffusers_unet.to_diffusers(network.state_dict(), arguments, noise_offset=noise_offset)
    model = UNet2DModel.from_config(config)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def call_theirs(model: nn.Module, network: UNet, x: Tensor, step: Tensor, label: Tensor | None) -> Tensor:
    """What a pipeline does around the network: patches and constant label channels."""
    patch = network.patch_size
    x = torch.nn.functional.pixel_unshuffle(x, patch) if patch > 1 else x
    if network.label_image is not None:
        assert label is not None
        x, label = network.label_image(x, label), None
    output = model(x, step, class_labels=label).sample
    return torch.nn.functional.pixel_shuffle(output, patch) if patch > 1 else output


@pytest.mark.parametrize("name", UNETS)
def test_unet_is_the_same_function(name: str) -> None:
    arguments = {**SMALL, **UNETS[name]}
    network = perturbed(UNet(**arguments))
    assert isinstance(network, UNet)
    model = theirs_of(network, arguments, noise_offset=1.0)
    height, width = network.image_size or (16, 16)
    x = torch.randn(3, 2, height, width, generator=torch.Generator().manual_seed(1))
    label = None if network.num_classes is None else torch.tensor([0, 2, 3])
    # Steps where float32 sines of two nearby numbers of about 1000 still agree to 1e-4.
    for step in (0, 7, 250):
        ours = network(x, torch.full((3,), step + 1.0), **({} if label is None else {"label": label}))
        given = call_theirs(model, network, x, torch.tensor([step] * 3), label)
        assert (given - ours).abs().max() < 2e-4 * ours.std(), step


@pytest.mark.parametrize("name", [name for name in UNETS if name not in ("patches", "concat")])
def test_unet_comes_back_exactly(name: str) -> None:
    arguments = {**SMALL, **UNETS[name]}
    network = perturbed(UNet(**arguments))
    config, state = diffusers_unet.to_diffusers(network.state_dict(), arguments, noise_offset=0.0)
    assert diffusers_unet.recognise(state, config=config)
    back = diffusers_unet.convert(state, config=config, noise_offset=0.0)
    assert back.unmapped == ()
    again = UNet(**back.arguments)
    again.load_state_dict(back.state)
    expected = network.state_dict()
    assert list(back.state) and back.state.keys() == expected.keys()
    assert all(torch.equal(back.state[key], expected[key]) for key in expected)


def test_time_step_shift_is_taken_back() -> None:
    network = perturbed(UNet(**SMALL))
    config, state = diffusers_unet.to_diffusers(network.state_dict(), SMALL)
    back = diffusers_unet.convert(state, config=config)
    name = "embed.mlp.0.weight"
    assert not torch.equal(state["time_embedding.linear_1.weight"], network.state_dict()[name])
    torch.testing.assert_close(back.state[name], network.state_dict()[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("block", "convnext", "block=convnext"),
        ("attention", ["none", "linear"], "linear"),
        ("resampling", "shuffle", "resampling=shuffle"),
        ("noise_embedding", "fourier", "noise_embedding=fourier"),
        ("skip_scale", 0.7, "skip_scale=0.7"),
        ("num_blocks", [1, 2], "num_blocks=[1, 2]"),
        ("groups", 3, "groups=3"),
        ("stem_channels", 8, "stem_channels=8"),
        ("channel_mults", [2, 2], "channel_mults=[2, 2]"),
        ("text_dim", 8, "text_dim=8"),
    ],
)
def test_what_diffusers_lacks_is_named(option: str, value: Any, word: str) -> None:
    arguments = {**SMALL, option: value}
    with pytest.raises(OrnsteinError, match="no counterpart in diffusers' UNet2DModel") as told:
        diffusers_unet.to_diffusers(UNet(**arguments).state_dict(), arguments)
    assert word in str(told.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"act_fn": "gelu"}, "act_fn=gelu"),
        ({"up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}, "AttnUpBlock2D"),
        ({"freq_shift": 1}, "freq_shift=1"),
        ({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": None}, "middle attention"),
        ({"downsample_type": "resnet", "down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "UpBlock2D"),
    ],
)
def test_what_ours_lacks_is_named(change: dict[str, Any], word: str) -> None:
    config, state = diffusers_unet.to_diffusers(UNet(**SMALL).state_dict(), SMALL)
    with pytest.raises(OrnsteinError) as told:
        diffusers_unet.convert(state, config={**config, **change})
    assert word in str(told.value)


def test_a_table_without_a_null_class_gets_one() -> None:
    arguments = {**SMALL, "num_classes": 2}
    config, state = diffusers_unet.to_diffusers(perturbed(UNet(**arguments)).state_dict(), arguments)
    found = diffusers_unet.convert(state, config=config, null_row=False)
    assert found.arguments["num_classes"] == 3
    table = found.state["embed.label.weight"]
    torch.testing.assert_close(table[3], table[:3].mean(0))


KL: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"multipliers": [1, 2, 2], "blocks": 2, "width": 16},
    "bare": {"attention": False, "quant_conv": False, "post_quant_conv": False},
}
CODEC = {"image_channels": 1, "image_size": 16, "channels": 3, "width": 8, "multipliers": [1, 2], "groups": 4}


def codec_of(name: str) -> KLAutoencoder:
    codec = perturbed(KLAutoencoder(**{**CODEC, **KL[name]}))
    assert isinstance(codec, KLAutoencoder)
    codec.scale.copy_(torch.tensor([0.3, 1.7, 5.0])[None, :, None, None])
    codec.shift.copy_(torch.tensor([-1.0, 0.2, 3.0])[None, :, None, None])
    return codec


@pytest.mark.parametrize("name", KL)
def test_autoencoder_is_the_same_function_with_its_scale_folded_in(name: str) -> None:
    from diffusers import AutoencoderKL

    codec = codec_of(name)
    config, state = kl.to_diffusers(*kl.fold_scale(codec.state_dict(), codec.config))
    model = AutoencoderKL.from_config(config)
    model.load_state_dict(state)
    model.eval()
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        theirs = model.encode(x).latent_dist
        ours = codec.posterior(x)
        torch.testing.assert_close(theirs.mode(), codec.encode(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs.std, ours.std * codec.scale, rtol=1e-4, atol=1e-5)
        z = torch.randn(ours.mean.shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(model.decode(z).sample, codec.decode(z), rtol=1e-4, atol=1e-4)
    assert config["scaling_factor"] == 1.0


@pytest.mark.parametrize("name", KL)
def test_autoencoder_comes_back_exactly(name: str) -> None:
    codec = codec_of(name)
    config, state = kl.to_diffusers(codec.state_dict(), codec.config)
    assert kl.recognise(state, config=config)
    back = kl.convert(state, config=config)
    assert back.unmapped == ()
    again = KLAutoencoder(**back.arguments)
    again.load_state_dict(back.state)
    expected = codec.state_dict()
    assert back.state.keys() == expected.keys()
    assert all(torch.equal(back.state[key], expected[key]) for key in expected)


def test_old_names_and_shapes_of_attention_are_read() -> None:
    codec = codec_of("plain")
    config, state = kl.to_diffusers(codec.state_dict(), codec.config)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    aged = {}
    for name, tensor in state.items():
        for new, word in old.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, word)
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        aged[name] = tensor
    assert aged.keys() != state.keys()
    back = kl.convert(aged, config=config)
    assert all(torch.equal(back.state[key], value) for key, value in codec.state_dict().items())


def test_stable_diffusions_scale_is_read() -> None:
    config, state = kl.to_diffusers(codec_of("plain").state_dict(), codec_of("plain").config)
    named = {**config, "latents_mean": None, "latents_std": None, "scaling_factor": 0.25, "shift_factor": 0.5}
    found = kl.convert(state, config=named).state
    assert found["scale"].flatten().tolist() == [0.25] * 3
    assert found["shift"].flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"act_fn": "gelu"}, "act_fn"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "AttnDownEncoderBlock2D"),
        ({"block_out_channels": [8, 12]}, "block_out_channels"),
        ({"out_channels": 3}, "channels"),
    ],
)
def test_what_our_autoencoder_lacks_is_named(change: dict[str, Any], word: str) -> None:
    config, state = kl.to_diffusers(codec_of("plain").state_dict(), codec_of("plain").config)
    with pytest.raises(OrnsteinError, match=word):
        kl.convert(state, config={**config, **change})


def test_vq_autoencoder_decodes_the_same() -> None:
    from diffusers import VQModel

    codec = perturbed(VQAutoencoder(**{**CODEC, "codes": 16}))
    assert isinstance(codec, VQAutoencoder)
    config, state = kl.vq_to_diffusers(codec.state_dict(), codec.config)
    model = VQModel.from_config(config)
    model.load_state_dict(state)
    model.eval()
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.decode(z).sample, codec.reconstruct(z), rtol=1e-4, atol=1e-4)


def test_each_is_recognised_by_its_own_layout_alone() -> None:
    unet = diffusers_unet.to_diffusers(UNet(**SMALL).state_dict(), SMALL)[1]
    codec = codec_of("plain")
    vae = kl.to_diffusers(codec.state_dict(), codec.config)[1]
    for state, own in ((unet, "diffusers_unet"), (vae, "kl")):
        assert [name for name in LAYOUTS if layout_module(name).recognise(state, config=None)] == [own]
