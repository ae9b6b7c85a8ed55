"""Every option of conf/model/network builds and runs for the data it is meant for."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ornstein.cli.launch import register_resolvers
from ornstein.cli.options.files import read_option
from ornstein.networks import count_parameters

CONF = Path(__file__).parents[2] / "conf" / "model" / "network"

# name -> million parameters, measured at 3 channels, 32 pixels, 10 classes; those of papers are judged elsewhere
PRESETS = {
    "adm": 552.82,
    "adm_128": 420.51,
    "adm_256": 552.82,
    "adm_512": 557.98,
    "adm_64": 295.14,
    "annotated": 2.02,
    "ddpm": 35.75,
    "ddpmpp": 55.73,
    "dit_b_2": 129.54,
    "dit_b_4": 129.59,
    "dit_b_8": 129.81,
    "dit_l_2": 456.80,
    "dit_l_4": 456.88,
    "dit_l_8": 457.17,
    "dit_s_2": 32.48,
    "dit_s_4": 32.50,
    "dit_s_8": 32.61,
    "dit_text_tiny": 0.95,
    "dit_tiny": 1.27,
    "dit_xl_2": 673.67,
    "dit_xl_4": 673.75,
    "dit_xl_8": 674.08,
    "edm2": 279.45,
    "edm2_l": 776.22,
    "edm2_m": 496.79,
    "edm2_s": 279.45,
    "edm2_tiny": 0.72,
    "edm2_xl": 1117.8,
    "edm2_xs": 124.20,
    "edm2_xxl": 1521.4,
    "edm_adm": 295.14,
    "lightningdit_xl_1": 673.75,
    "lucidrains": 35.71,
    "ncsnpp": 56.40,
    "pixart_xl_2": 456.03,
    "text_unet": 0.76,
    "tiny_unet": 0.71,
    "unet": 23.4,
    "unet2d_condition_diffusers": 1.00,
    "unet2d_diffusers": 1.17,
    "uvit_s": 44.65,
}
SIDES = {"adm_512": 64}  # of those that do not take 32 pixels


def build(name: str, *, channels: int, size: int, classes: int | None, outputs: int | None = None) -> torch.nn.Module:
    register_resolvers()
    parameterization = {} if outputs is None else {"outputs": outputs}
    config = {
        "codec": {"channels": channels, "size": size},
        "conditioner": {"num_classes": classes},
        "network": dict(read_option("model/network", name).node),
        "objective": {"parameterization": parameterization},
    }
    with torch.device("meta"):
        return instantiate(OmegaConf.create(config).network)


def test_the_table_is_complete():
    assert set(PRESETS) == {path.stem for path in CONF.glob("*.yaml")}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_its_size_and_runs(name):
    side = SIDES.get(name, 32)
    network = build(name, channels=3, size=side, classes=10)
    assert count_parameters(network) == pytest.approx(1e6 * PRESETS[name], rel=0.01)
    with torch.device("meta"):
        y = network(torch.randn(2, 3, side, side), torch.zeros(2), label=torch.zeros(2, dtype=torch.long))
    assert y.shape == (2, 3, side, side)


@pytest.mark.parametrize("name", [name for name, millions in PRESETS.items() if millions < 50])
def test_a_parameterization_of_two_outputs_gets_twice_the_channels(name):
    network = build(name, channels=3, size=32, classes=10, outputs=2)
    with torch.device("meta"):
        y = network(torch.randn(2, 3, 32, 32), torch.zeros(2), label=torch.zeros(2, dtype=torch.long))
    assert y.shape == (2, 6, 32, 32)


@pytest.mark.parametrize("name", ["tiny_unet", "dit_tiny"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 16), (1, 28), (4, 8), (3, 64)])
def test_small_presets_take_every_bundled_size(name, channels, size):
    for classes in (None, 10):
        network = build(name, channels=channels, size=size, classes=classes)
        cond = {} if classes is None else {"label": torch.zeros(2, dtype=torch.long, device="meta")}
        y = network(torch.zeros(2, channels, size, size, device="meta"), torch.zeros(2, device="meta"), **cond)
        assert y.shape == (2, channels, size, size)
