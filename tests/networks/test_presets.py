"""Every option of conf/model/network builds and runs for the data it is meant for."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ornstein.cli.launch import register_resolvers
from ornstein.networks import count_parameters

CONF = Path(__file__).parents[2] / "conf" / "model" / "network"

# name -> million parameters, measured at 3 channels, 32 pixels, 10 classes; those of papers are judged elsewhere
PRESETS = {
    "annotated": 2.02,
    "ddpm": 35.75,
    "dit_b_2": 129.54,
    "dit_l_2": 456.80,
    "dit_s_2": 32.48,
    "dit_tiny": 1.27,
    "dit_xl_2": 673.67,
    "tiny_unet": 0.71,
    "unet": 23.4,
    "unet2d_diffusers": 1.17,
}


def build(name: str, *, channels: int, size: int, classes: int | None, outputs: int | None = None) -> torch.nn.Module:
    register_resolvers()
    parameterization = {} if outputs is None else {"outputs": outputs}
    config = {
        "codec": {"channels": channels, "size": size},
        "conditioner": {"num_classes": classes},
        "network": OmegaConf.load(CONF / f"{name}.yaml"),
        "objective": {"parameterization": parameterization},
    }
    with torch.device("meta"):
        return instantiate(OmegaConf.create(config).network)


def test_the_table_is_complete():
    assert set(PRESETS) == {path.stem for path in CONF.glob("*.yaml")}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_its_size_and_runs(name):
    network = build(name, channels=3, size=32, classes=10)
    assert count_parameters(network) == pytest.approx(1e6 * PRESETS[name], rel=0.01)
    with torch.device("meta"):
        y = network(torch.randn(2, 3, 32, 32), torch.zeros(2), label=torch.zeros(2, dtype=torch.long))
    assert y.shape == (2, 3, 32, 32)


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
