import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.networks import DiffusersUNet2D

CONFIG = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def test_output_is_diffusers_own():
    from diffusers import UNet2DModel

    ours = DiffusersUNet2D(1, 2, image_size=8, num_classes=3, **CONFIG).eval()
    theirs = UNet2DModel(sample_size=8, in_channels=1, out_channels=2, num_class_embeds=4, **CONFIG).eval()
    theirs.load_state_dict(ours.model.state_dict())
    x, t, label = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 12.5, 999.0]), torch.tensor([0, 2, 3])
    expected = theirs(x, t, class_labels=label).sample
    assert expected.abs().max() > 0
    assert (ours(x, t, label=label) == expected).all()


def test_labels_and_sizes_meet_the_contract():
    conditional = DiffusersUNet2D(1, num_classes=3, **CONFIG).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.zeros(2)
    null, one = torch.tensor([3, 3]), torch.tensor([1, 1])
    assert (conditional(x, t, label=null) - conditional(x, t, label=one)).abs().max() > 1e-4
    with pytest.raises(OrnsteinError, match="needs a label"):
        conditional(x, t)
    with pytest.raises(OrnsteinError, match="unconditional"):
        DiffusersUNet2D(1, **CONFIG)(x, t, label=one)
    with pytest.raises(OrnsteinError, match="do not divide by 2"):
        DiffusersUNet2D(1, image_size=7, **CONFIG)


def test_a_conditioning_image_joins_the_input():
    network = DiffusersUNet2D(1, concat_channels=2, **CONFIG).eval()
    x, t, image = torch.randn(2, 1, 8, 8), torch.zeros(2), torch.randn(2, 2, 8, 8)
    y = network(x, t, concat=image)
    assert y.shape == x.shape and network.in_channels == network.out_channels == 1
    assert (network.model(torch.cat([x, image], dim=1), t).sample == y).all()
    with pytest.raises(OrnsteinError, match="conditioning image of shape"):
        network(x, t)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"noise_embedding": "fourier"}, "'sinusoidal' only"),
        ({"sample_size": 8}, "sets sample_size itself"),
        ({"block_out_channels": (8, 8, 8)}, "UNet2DModel refuses its arguments.*same number of `block_out_channels`"),
        ({"widths": 3}, "UNet2DModel refuses its arguments.*unexpected keyword argument 'widths'"),
    ],
)
def test_arguments_of_its_own_are_refused(kwargs, sentence):
    with pytest.raises(OrnsteinError, match=sentence):
        DiffusersUNet2D(1, **kwargs)
