"""Autoencoders in diffusers' format, on tiny ones made here: every class, the scale, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ornstein.codecs import DiffusersCodec
from ornstein.codecs.pretrained import pretrained_config, pretrained_fact
from ornstein.errors import OrnsteinError

LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}
TINY: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {**LEVELS, "latent_channels": 4, "scaling_factor": 0.5, "shift_factor": 0.25},
    "VQModel": {**LEVELS, "latent_channels": 4, "vq_embed_dim": 3, "num_vq_embeddings": 16, "scaling_factor": 0.5},
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
        "latent_channels": 4,
    },
    "AutoencoderDC": {
        "latent_channels": 4,
        "attention_head_dim": 4,
        "encoder_block_out_channels": (8, 16),
        "decoder_block_out_channels": (8, 16),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
        "scaling_factor": 0.5,
    },
}
CHANNELS = {"AutoencoderKL": 4, "VQModel": 3, "AutoencoderTiny": 4, "AutoencoderDC": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import diffusers

    torch.manual_seed(0)
    found = {}
    for kind, config in TINY.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        getattr(diffusers, kind)(**config).eval().save_pretrained(found[kind])
    return found


def reference(kind: str, folder: Path) -> Any:
    import diffusers

    return getattr(diffusers, kind).from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", TINY)
def test_latents_and_images_are_those_of_diffusers(kind: str, folders: dict[str, Path]) -> None:
    codec, model = DiffusersCodec(str(folders[kind]), 3, 16, max_batch=2), reference(kind, folders[kind])
    assert (codec.channels, codec.size, codec.downsample) == (CHANNELS[kind], 8, 2)
    x = torch.rand(5, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        encoded = model.encode(x)
        h = {"AutoencoderKL": lambda: encoded.latent_dist.mode(), "AutoencoderDC": lambda: encoded.latent}.get(
            kind, lambda: encoded.latents
        )()
        shift = TINY[kind].get("shift_factor", 0.0)
        z = codec.encode(x)
        # Batches of two instead of five: rounding.
        torch.testing.assert_close(z, (h - shift) * TINY[kind].get("scaling_factor", 1.0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(codec.decode(z), model.decode(h).sample, rtol=1e-3, atol=1e-4)
    assert not codec.stochastic and set(codec.state_dict()) == {"scale", "shift"}


def test_the_scale_is_measured_on_request(folders: dict[str, Path]) -> None:
    codec = DiffusersCodec(str(folders["AutoencoderKL"]), 3, 16, scale="measured", measured_images=64)
    x = torch.rand(64, 3, 16, 16) * 2 - 1
    assert codec.measured_images == 64 and codec.scale.equal(torch.ones_like(codec.scale))
    codec.measure(x.split(10))
    z = codec.encode(x)
    # float32 rounding of 4,096 numbers a channel.
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std(dim=(0, 2, 3), correction=0), torch.ones(4), rtol=1e-4, atol=0)
    twin = DiffusersCodec(str(folders["AutoencoderKL"]), 3, 16, scale="measured")
    twin.load_state_dict(codec.state_dict())
    assert twin.encode(x).equal(z), "a checkpoint brings the measured scale back"


def test_a_mean_and_deviation_a_channel_are_honoured(folders: dict[str, Path], tmp_path: Path) -> None:
    model = reference("AutoencoderKL", folders["AutoencoderKL"])
    model.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 4.0, 8.0])
    model.save_pretrained(tmp_path)
    codec = DiffusersCodec(str(tmp_path), 3, 16)
    # z = (h - mean) * scaling_factor / std.
    assert codec.scale.flatten().tolist() == [0.5, 0.25, 0.125, 0.0625]
    torch.testing.assert_close(codec.shift.flatten(), torch.tensor([0.1, 0.2, 0.3, 0.4]))


def test_a_draw_is_decided_by_the_generator(folders: dict[str, Path]) -> None:
    codec = DiffusersCodec(str(folders["AutoencoderKL"]), 3, 16, sample_posterior=True)
    x = torch.rand(2, 3, 16, 16)
    draws = [codec.encode(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert codec.stochastic and draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


def test_it_is_frozen_lets_gradients_through_and_keeps_its_precision(folders: dict[str, Path]) -> None:
    codec = DiffusersCodec(str(folders["AutoencoderKL"]), 3, 16, dtype="bfloat16")
    assert list(codec.parameters()) == []
    z = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = codec.double().float().decode(z)
    assert images.dtype == torch.float32
    assert {p.dtype for p in codec.__dict__["model"].parameters()} == {torch.bfloat16}
    (grad,) = torch.autograd.grad(images.sum(), z)
    assert grad.abs().sum() > 0


def test_facts_for_a_config_to_interpolate(folders: dict[str, Path]) -> None:
    facts = [pretrained_fact(str(folders["VQModel"]), name) for name in ("channels", "downsample", "image_channels")]
    assert facts == [3, 2, 3]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_channels": 1}, r"takes images of 3 channels, but data\.channels is 1; set data\.channels=3"),
        ({"image_size": 15}, r"shrinks images by 2, which does not divide 15x15; choose data\.image_size"),
        ({"channels": 8}, r"has channels=4, but codec\.channels is 8"),
        ({"size": 4}, r"latents of size 8, but codec\.size is 4"),
        ({"scale": "auto"}, r"codec\.scale=auto is unknown: choose config or measured"),
        ({"dtype": "float8"}, r"codec\.dtype=float8 is unknown"),
        ({"max_batch": 0}, r"codec\.max_batch=0"),
    ],
)
def test_what_does_not_fit_is_refused(folders: dict[str, Path], options: dict[str, Any], sentence: str) -> None:
    arguments = {"image_channels": 3, "image_size": 16} | options
    with pytest.raises(OrnsteinError, match=sentence):
        DiffusersCodec(str(folders["AutoencoderKL"]), **arguments)


def test_what_is_not_there_is_refused(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OrnsteinError, match=r"codec\.pretrained=nobody/nothing is no folder here and could not be"):
        pretrained_config("nobody/nothing")
    with pytest.raises(OrnsteinError, match=r"holds no config\.json"):
        pretrained_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(OrnsteinError, match=r"is a UNet2DModel: codec=diffusers takes AutoencoderKL"):
        pretrained_config(str(tmp_path))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text((folders["AutoencoderKL"] / "config.json").read_text())
    with pytest.raises(OrnsteinError, match="are missing or do not fit"):
        DiffusersCodec(str(tmp_path / "own"), 3, 16)
    with pytest.raises(OrnsteinError, match="has no posterior to draw from"):
        DiffusersCodec(str(folders["VQModel"]), 3, 16, sample_posterior=True)


def test_the_fingerprint_is_that_of_the_frozen_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    own = DiffusersCodec(str(folders["AutoencoderKL"]), 3, 16).fingerprint
    model = reference("AutoencoderKL", folders["AutoencoderKL"])
    model.save_pretrained(tmp_path)
    assert DiffusersCodec(str(tmp_path), 3, 16, scale="measured").fingerprint == own
    assert DiffusersCodec(str(tmp_path), 3, 16, dtype="bfloat16").fingerprint != own
    with torch.no_grad():
        model.encoder.conv_in.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    assert DiffusersCodec(str(tmp_path), 3, 16).fingerprint != own
