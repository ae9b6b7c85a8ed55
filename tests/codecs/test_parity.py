"""The same function as diffusers' autoencoders, by weights moved over name by name."""

import re

import pytest
import torch

from ornstein.codecs import Autoencoder, KLAutoencoder, VQAutoencoder

# Ours -> theirs, in this order.
RENAMED = [
    (r"^decoder\.levels\.(\d+)\.blocks\.", r"decoder.up_blocks.\1.resnets."),
    (r"^encoder\.levels\.(\d+)\.blocks\.", r"encoder.down_blocks.\1.resnets."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.middle\.block1\.", ".mid_block.resnets.0."),
    (r"\.middle\.block2\.", ".mid_block.resnets.1."),
    (r"\.middle\.attention\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.middle\.attention\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.middle\.attention\.out\.", ".mid_block.attentions.0.to_out.0."),
    (r"coder\.stem\.", "coder.conv_in."),
    (r"coder\.norm\.", "coder.conv_norm_out."),
    (r"coder\.out\.", "coder.conv_out."),
    (r"^quant\.", "quant_conv."),
    (r"^post_quant\.", "post_quant_conv."),
    (r"^quantiser\.codebook$", "quantize.embedding.weight"),
]
OWN = ("scale", "shift", "quantiser.share")


def theirs(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def transplant(source: torch.nn.Module, target: Autoencoder) -> None:
    """Every weight of ``source``, random also where it starts at zero, into ``target``; none may be left over."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    given = dict(source.state_dict())
    with torch.no_grad():
        for name, value in target.state_dict().items():
            if name not in OWN:
                value.copy_(given.pop(theirs(name)))
    assert given == {}


SHAPES = [
    {"image_channels": 3, "widths": (8, 16, 16), "blocks": 2, "attention": True, "latent": 4},
    {"image_channels": 1, "widths": (8, 16), "blocks": 1, "attention": False, "latent": 3},
]


def diffusers_config(shape: dict) -> dict:
    levels = len(shape["widths"])
    return {
        "in_channels": shape["image_channels"],
        "out_channels": shape["image_channels"],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": shape["widths"],
        "layers_per_block": shape["blocks"],
        "norm_num_groups": 4,
        "latent_channels": shape["latent"],
        "mid_block_add_attention": shape["attention"],
    }


def our_config(shape: dict) -> dict:
    return {
        "channels": shape["latent"],
        "width": 8,
        "multipliers": [width // 8 for width in shape["widths"]],
        "blocks": shape["blocks"],
        "groups": 4,
        "attention": shape["attention"],
    }


@pytest.mark.parametrize("quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_is_autoencoder_kl(shape: dict, quant: bool) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    reference = AutoencoderKL(**diffusers_config(shape), use_quant_conv=quant, use_post_quant_conv=quant).eval()
    codec = KLAutoencoder(
        shape["image_channels"], (16, 24), **our_config(shape), quant_conv=quant, post_quant_conv=quant
    ).eval()
    transplant(reference, codec)
    x = torch.randn(2, shape["image_channels"], 16, 24)
    with torch.no_grad():
        expected, found = reference.encode(x).latent_dist, codec.posterior(x)
        # float32 through some thirty layers: a few roundings of numbers of order one.
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.logvar, expected.logvar, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            codec.reconstruct(expected.mean), reference.decode(expected.mean).sample, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_vq_is_vq_model(shape: dict) -> None:
    from diffusers import VQModel

    torch.manual_seed(0)
    reference = VQModel(**diffusers_config(shape), num_vq_embeddings=32, vq_embed_dim=5).eval()
    codec = VQAutoencoder(
        shape["image_channels"],
        16,
        **(our_config(shape) | {"channels": 5, "encoded_channels": shape["latent"]}),
        codes=32,
    ).eval()
    transplant(reference, codec)
    x = torch.randn(2, shape["image_channels"], 16, 16)
    with torch.no_grad():
        expected = reference.encode(x).latents
        torch.testing.assert_close(codec.latents(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(codec.reconstruct(expected), reference.decode(expected).sample, rtol=1e-5, atol=1e-5)
        _, _, (_, _, indices) = reference.quantize(expected)
    assert codec.quantiser(expected).indices.flatten().equal(indices.flatten())


@pytest.mark.parametrize(
    ("model", "published"),
    [
        # Stable Diffusion's AutoencoderKL as diffusers counts it; LDM's vq-f4 as its model zoo's checkpoint holds it.
        (lambda: KLAutoencoder(3, 256, width=128, multipliers=(1, 2, 4, 4), blocks=2, groups=32), 83_653_863),
        (
            lambda: VQAutoencoder(
                3, 256, channels=3, codes=8192, width=128, multipliers=(1, 2, 4), blocks=2, groups=32
            ),
            55_346_000,
        ),
    ],
)
def test_published_sizes(model, published: int) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in model().parameters())
    assert abs(count - published) <= 0.005 * published
