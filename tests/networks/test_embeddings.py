import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.networks.embeddings import (
    NOISE_EMBEDDINGS,
    ConditionEmbedding,
    FourierEmbedding,
    OneHotLinear,
    sincos_positions,
    sinusoidal_embedding,
)


@pytest.mark.parametrize("dim", [8, 32, 33])
def test_sinusoids_are_those_of_diffusers(dim):
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 0.5, 17.25, 999.0, 1000.0])
    expected = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    # Angles reach 1000 radians, where float32 is spaced 6e-5 apart.
    torch.testing.assert_close(sinusoidal_embedding(t, dim), expected, rtol=0, atol=2e-4)


def test_ddpms_sinusoids_are_those_of_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 0.5, 17.25, 999.0])
    expected = get_timestep_embedding(t, 32, flip_sin_to_cos=False, downscale_freq_shift=1)  # as google/ddpm-cifar10-32
    torch.testing.assert_close(NOISE_EMBEDDINGS["ddpm"](32)(t), expected, rtol=0, atol=2e-4)


def test_ncsnpps_features_are_the_fourier_ones_with_the_halves_swapped():
    theirs, ours = NOISE_EMBEDDINGS["ncsnpp"](8), FourierEmbedding(8)
    theirs.load_state_dict(ours.state_dict())
    t = torch.tensor([-1.0, 0.3])
    assert (theirs(t) == ours(t).roll(4, dims=1)).all()


def test_mapped_labels_are_a_linear_map_of_one_hot_vectors():
    layer = OneHotLinear(3, 5)
    vectors = torch.cat([torch.eye(3), torch.zeros(1, 3)]) * 3**0.5  # the last is the null class
    torch.testing.assert_close(layer(torch.tensor([0, 1, 2, 3])), vectors @ layer.weight.T + layer.bias)


def test_augmentation_parameters_enter_before_the_perceptron_and_none_are_zeros():
    embedding = ConditionEmbedding(8, features=6, augment_dim=2)
    noise, given = torch.tensor([5.0, 7.0]), torch.tensor([[1.0, -2.0], [0.0, 0.0]])
    expected = embedding.mlp(embedding.features(noise) + given @ embedding.augment.weight.T)
    torch.testing.assert_close(embedding(noise, augment=given), expected)
    torch.testing.assert_close(embedding(noise)[1], expected[1])


def test_sinusoids_keep_float64_and_are_computed_in_float32_otherwise():
    t = torch.tensor([0.3, 700.0])
    assert sinusoidal_embedding(t.double(), 16).dtype == torch.float64
    # 700 is exact in bfloat16; angles in bfloat16 would be off by whole radians.
    half = sinusoidal_embedding(t.bfloat16(), 16)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half[1], sinusoidal_embedding(t, 16)[1])


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 3), (8, 8)])
def test_positions_are_those_of_diffusers(height, width):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    expected = get_2d_sincos_pos_embed(16, height, output_type="pt", base_size=height)
    torch.testing.assert_close(sincos_positions(height, width, 16), expected.float(), rtol=0, atol=1e-6)


def test_positions_of_a_rectangle_tell_rows_from_columns():
    grid = sincos_positions(2, 3, 8).reshape(2, 3, 8)
    assert (grid[0, :, 4:] == grid[0, :1, 4:]).all()  # the row half does not change along a row
    assert (grid[:, 0, :4] == grid[:1, 0, :4]).all()
    assert len(grid.reshape(6, 8).unique(dim=0)) == 6
    with pytest.raises(OrnsteinError, match="divisible by 4"):
        sincos_positions(2, 2, 6)


def test_fourier_features_are_fixed_and_saved():
    embedding = FourierEmbedding(64, scale=16.0)
    assert not list(embedding.parameters()) and "frequencies" in embedding.state_dict()
    features = embedding(torch.tensor([-2.0, 0.0, 2.0]))
    # cos^2 + sin^2 = 1 of each frequency, to float32 rounding of angles up to 2 pi * 16 * 3 * 2.
    torch.testing.assert_close(
        features[:, :32].square() + features[:, 32:].square(), torch.ones(3, 32), rtol=0, atol=1e-5
    )
    assert (features[1] == torch.cat([torch.ones(32), torch.zeros(32)])).all()


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"noise_embedding": "cosine"}, "'sinusoidal' or 'fourier', got 'cosine'"),
        ({"num_classes": 0}, "at least 1, got 0"),
        ({"noise_embedding": "fourier", "features": 7}, "even"),
        ({"noise_embedding": "ddpm", "features": 3}, "at least 4 numbers"),
        ({"label_embedding": "row"}, "'table' or 'mapped', got 'row'"),
    ],
)
def test_wrong_options_are_named(kwargs, sentence):
    with pytest.raises(OrnsteinError, match=sentence):
        ConditionEmbedding(8, **kwargs)


def test_label_rows_add_to_the_noise_embedding():
    embedding = ConditionEmbedding(8, features=8, num_classes=2)
    noise = torch.tensor([5.0, 5.0])
    difference = embedding(noise, torch.tensor([0, 2]))
    row0, null = embedding.label.weight[0], embedding.label.weight[2]
    torch.testing.assert_close(difference[0] - difference[1], row0 - null)
