"""The U-Nets of papers: their parameter counts, and the output of their own code for the same weights."""

import math

import pytest
import torch
from torch import Tensor, nn

from ornstein.networks import UNet, count_parameters
from ornstein.networks.attention import SelfAttention2d
from ornstein.networks.unet_parts import FilteredDownConv, Resample

from .test_presets import build

# preset, size, classes, outputs, published millions of parameters, where they are published
PUBLISHED = [
    ("ddpm", 32, None, 1, 35.7, "Ho et al. 2020 (arXiv 2006.11239), app. B"),
    ("adm_64", 64, 1000, 2, 296, "Dhariwal & Nichol 2021 (arXiv 2105.05233), app. I"),
    ("adm_128", 128, 1000, 2, 422, "Dhariwal & Nichol 2021 (arXiv 2105.05233), app. I"),
    ("adm_256", 256, 1000, 2, 553.8, "Dhariwal & Nichol 2021 (arXiv 2105.05233), app. I: 554 M"),
    ("adm_512", 512, 1000, 2, 559, "Dhariwal & Nichol 2021 (arXiv 2105.05233), app. I"),
    ("edm_adm", 64, 1000, 1, 295.9, "counted from NVlabs/edm's DhariwalUNet"),
    ("ddpmpp", 32, None, 1, 55.7, "Karras et al. 2022 (arXiv 2206.00364)"),
    ("ncsnpp", 32, None, 1, 56.4, "counted from NVlabs/edm's SongUNet"),
]

# preset, classes, parameters that the published code has; a table of labels has one more row here, the null class
EXACT = [
    ("ddpm", 32, None, 1, 35_746_307, 0),
    ("adm_64", 64, 1000, 2, 295_904_454, 768),
    ("adm_128", 128, 1000, 2, 421_529_606, 1024),
    ("adm_256", 256, 1000, 2, 553_838_086, 1024),
    ("adm_256", 256, None, 2, 552_814_086, 0),
    ("adm_512", 512, 1000, 2, 558_997_638, 1024),
    ("edm_adm", 64, 1000, 1, 295_899_267, 768),
    ("ddpmpp", 32, None, 1, 55_732_739, 0),
    ("ddpmpp", 32, 10, 1, 55_734_147, 0),
    ("ncsnpp", 32, None, 1, 56_395_523, 0),
    ("ncsnpp", 32, 10, 1, 56_398_339, 0),
]


@pytest.mark.parametrize(("name", "size", "classes", "outputs", "millions", "source"), PUBLISHED)
def test_parameters_are_the_published_ones(name, size, classes, outputs, millions, source):
    network = build(name, channels=3, size=size, classes=classes, outputs=outputs)
    assert count_parameters(network) == pytest.approx(1e6 * millions, rel=0.005), source


@pytest.mark.parametrize(("name", "size", "classes", "outputs", "count", "null_row"), EXACT)
def test_parameters_are_those_of_the_published_code_one_by_one(name, size, classes, outputs, count, null_row):
    network = build(name, channels=3, size=size, classes=classes, outputs=outputs)
    assert count_parameters(network) == count + null_row


def filling(shape: torch.Size, *, bias: bool, buffer: bool = False) -> Tensor:
    """Weights that depend on a tensor's shape alone, so that any code's tensors of one role get the same."""
    wave = torch.sin(0.37 * torch.arange(1, 1 + math.prod(shape), dtype=torch.float64)).reshape(shape)
    if bias:
        return 0.1 * wave
    if buffer:
        return 2 * wave
    return 1 + 0.2 * wave if len(shape) == 1 else wave * 2 / math.prod(shape[1:]) ** 0.5


def fill(network: nn.Module) -> nn.Module:
    network = network.double().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(filling(parameter.shape, bias=name.endswith("bias")))
        for buffer in (b for n, b in network.named_buffers() if n.endswith("frequencies")):
            buffer.copy_(filling(buffer.shape, bias=False, buffer=True))
    return network


SONG = {
    "base_channels": 32,
    "channel_mults": (2, 2, 1),
    "stem_channels": 32,
    "resampling": "residual_projected",
    "attention": ("none", "full", "none"),
    "decoder_attention": "last",
    "heads": 1,
    "group_channels": 4,
    "norm_eps": 1e-6,
    "scale_shift": False,
    "skip_scale": 0.5**0.5,
    "label_embedding": "mapped",
    "augment_dim": 9,
    "num_classes": 3,
    "init": "edm",
}
ADM = {
    "base_channels": 32,
    "channel_mults": (1, 2, 2),
    "resampling": "residual",
    "attention": ("none", "full", "none"),
    "head_dim": 32,
    "num_classes": 3,
}
DDPM = {
    "base_channels": 32,
    "channel_mults": (1, 2),
    "resampling": "conv_end",
    "attention": ("none", "full"),
    "heads": 1,
    "groups": 8,
    "norm_eps": 1e-6,
    "scale_shift": False,
    "noise_embedding": "ddpm",
    "init": "ddpm",
}
WHERE = [0, 101, 333, 700, 1201, 1535]

# What the published code answers at those places, and the standard deviation of its whole output, when its weights are
# filled in the same way (rows of queries, keys and values brought into its own order). Recorded in float64 from
# NVlabs/edm 008a4e5 (SongUNet), openai/guided-diffusion (UNetModel; both of its attention orders give these numbers)
# and diffusers 0.42.1 (UNet2DModel with the settings of google/ddpm-cifar10-32).
RECORDED = {
    "ddpmpp": (
        {**SONG, "noise_embedding": "ddpm"},
        [0.287939, 0.392582, 0.717305, 0.821363, 0.637523, 0.135765],
        0.201818,
    ),
    "ncsnpp": (
        {
            **SONG,
            "noise_embedding": "ncsnpp",
            "embedding_features": 64,
            "progressive_input": True,
            "resample_filter": (1, 3, 3, 1),
        },
        [0.218106, 0.446226, 0.737617, 0.810674, 0.653344, 0.222933],
        0.212813,
    ),
    "adm": (ADM, [0.329084, 0.827719, -0.009355, 0.000945, 0.38551, -0.194337], 0.569651),
    "ddpm": (DDPM, [0.336703, 2.104837, 1.931767, 2.390421, 1.699415, 0.765004], 0.567152),
}


@pytest.mark.parametrize("name", RECORDED)
def test_output_is_that_of_the_published_code(name):
    options, values, deviation = RECORDED[name]
    network = fill(UNet(3, 6 if name == "adm" else 3, **options))
    x = torch.sin(0.05 * torch.arange(2 * 3 * 16 * 16, dtype=torch.float64) ** 1.1).reshape(2, 3, 16, 16)
    edm = name in ("ddpmpp", "ncsnpp")
    noise_cond = torch.tensor([-0.7, 1.3] if edm else [3.0, 77.0], dtype=torch.float64)
    cond = {} if name == "ddpm" else {"label": torch.tensor([1, 2])}
    if edm:
        cond["augment"] = torch.tensor([[0.5] * 9, [-1.0] * 9], dtype=torch.float64)
    with torch.no_grad():
        y = network(x, noise_cond, **cond)[:, :3]
    # Six decimals were kept; embeddings and attention weights of the published code are float32.
    assert y.flatten()[WHERE].tolist() == pytest.approx(values, abs=1e-5)
    assert y.std().item() == pytest.approx(deviation, abs=1e-5)


def test_null_class_of_mapped_labels_is_no_label_at_all():
    network = fill(UNet(3, **{**SONG, "noise_embedding": "ddpm"}))
    noise_cond = torch.tensor([0.3], dtype=torch.float64)
    embed = network.embed
    features = embed.features(noise_cond) + embed.label.bias  # EDM passes a vector of zeros through its linear map
    torch.testing.assert_close(embed(noise_cond, torch.tensor([3])), embed.mlp(features))


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)])
def test_filters_keep_constants_and_up_is_the_transpose_of_down(taps):
    down, up = Resample(up=False, taps=taps).double(), Resample(up=True, taps=taps).double()
    x = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    y = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    assert down(x).shape == y.shape and up(y).shape == x.shape
    inside = (slice(None), slice(None), slice(3, -3), slice(3, -3))
    torch.testing.assert_close(up(torch.ones_like(y))[inside], torch.ones_like(x)[inside])
    # <down x, y> = <x, up y> / 4: the same filter, scaled by 4 since up sees three zeros beside each pixel.
    torch.testing.assert_close((down(x) * y).sum(), (x * up(y)).sum() / 4)


def test_plain_filter_is_the_general_one():
    x = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    for up in (False, True):
        plain, general = Resample(up=up).double(), Resample(up=up).double()
        general.plain = False
        torch.testing.assert_close(plain(x), general(x))


def test_filtered_convolution_is_one_convolution_of_stride_2():
    module = FilteredDownConv(2, 3, taps=(1, 3, 3, 1)).double()
    line = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8
    kernel = nn.functional.conv_transpose2d(  # a 3x3 convolution, then a 4x4 filter: 6x6
        module.conv.weight.flatten(0, 1)[:, None], line.outer(line)[None, None]
    ).reshape(3, 2, 6, 6)
    x = torch.randn(2, 2, 8, 6, dtype=torch.float64)
    expected = nn.functional.conv2d(x, kernel, module.conv.bias, stride=2, padding=2)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(("init", "gain"), [("ddpm", 1.0), ("edm", 0.1**0.5)])
def test_initial_weights_have_the_papers_ranges(init, gain):
    network = UNet(3, **{**SONG, "noise_embedding": "ddpm", "init": init})
    conv = network.encoder[0].block.conv1
    limit = (6 / (9 * (32 + 64))) ** 0.5
    assert 0.98 * limit < conv.weight.abs().max() <= limit and (conv.bias == 0).all()
    attention = next(m for m in network.modules() if isinstance(m, SelfAttention2d))
    # One draw of 3C x C in EDM: sqrt(0.2) of Xavier's range of that matrix.
    limit = gain * (6 / (64 + 64)) ** 0.5
    if init == "edm":
        assert limit == pytest.approx((0.2 * 6 / (64 + 3 * 64)) ** 0.5)
    assert 0.98 * limit < attention.qkv.weight.abs().max() <= limit
    assert (attention.out.weight == 0).all() and (network.out.weight == 0).all()
