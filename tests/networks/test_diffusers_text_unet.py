"""diffusers' UNet2DConditionModel behind our signature: its own numbers, and every condition where it belongs."""

import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.networks import DiffusersUNet2DCondition

CONFIG = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}


def make(**kwargs):
    return DiffusersUNet2DCondition(1, **{**CONFIG, **kwargs}).eval()


def inputs(size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 1, 8, 8), torch.tensor([0.0, 12.5, 999.0])[:size]


def given(**names):
    every = {
        "label": torch.tensor([0, 2, 3]),
        "text": torch.randn(3, 5, 6),
        "text_mask": torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [False] * 5]),
        "pooled": torch.randn(3, 7),
        "concat": torch.randn(3, 2, 8, 8),
    }
    return {name: every[name] for name in names}


def test_output_is_diffusers_own_under_every_condition():
    from diffusers import UNet2DConditionModel

    ours = make(
        out_channels=2, image_size=8, num_classes=3, text_dim=6, pooled_dim=7, concat_channels=2, label_mode="add"
    )
    theirs = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=2,
        num_class_embeds=4,
        cross_attention_dim=6,
        time_cond_proj_dim=7,
        **{key: tuple(value) if isinstance(value, list) else value for key, value in CONFIG.items()},
    ).eval()
    theirs.load_state_dict(ours.model.state_dict())
    assert ours.state_dict().keys() == {f"model.{key}" for key in theirs.state_dict()}
    x, t = inputs()
    cond = given(label=1, text=1, text_mask=1, pooled=1, concat=1)
    expected = theirs(
        torch.cat([x, cond["concat"]], dim=1),
        t,
        encoder_hidden_states=cond["text"],
        encoder_attention_mask=cond["text_mask"],
        class_labels=cond["label"],
        timestep_cond=cond["pooled"],
    ).sample
    assert expected.abs().max() > 0
    assert (ours(x, t, **cond) == expected).all()


@pytest.mark.parametrize(
    ("kwargs", "names", "tokens"),
    [
        ({}, {}, 1),
        ({"num_classes": 3}, {"label": 1}, 1),
        ({"num_classes": 3, "label_mode": "add"}, {"label": 1}, 1),
        ({"text_dim": 6}, {"text": 1}, 5),
        ({"text_dim": 6, "num_classes": 3}, {"text": 1, "text_mask": 1, "label": 1}, 6),
        ({"text_dim": 6, "cross_attention_dim": 8, "num_classes": 3}, {"text": 1, "label": 1}, 6),
        ({"pooled_dim": 7, "concat_channels": 2}, {"pooled": 1, "concat": 1}, 1),
    ],
)
def test_every_condition_reaches_the_output_and_only_its_own_sample(kwargs, names, tokens):
    network = make(**kwargs)
    x, t = inputs()
    cond = given(**names)
    context, mask = network.context(3, cond.get("label"), cond.get("text"), cond.get("text_mask"))
    assert context.shape == (3, tokens, kwargs.get("text_dim", 64))
    assert mask is None or mask.shape == (3, tokens)
    y = network(x, t, **cond)
    assert y.shape == x.shape
    for name in set(cond) - {"text_mask"}:
        changed = cond[name].clone()
        changed[0] = (changed[0] + 1) % 4 if name == "label" else changed[0] + 1
        difference = (network(x, t, **{**cond, name: changed}) - y).abs().amax(dim=(1, 2, 3))
        # The other samples run through the same kernels at the same batch size: equal to the bit.
        assert difference[0] > 1e-6 and (difference[1:] == 0).all(), name


def test_masked_tokens_do_not_matter_and_a_class_token_is_never_masked():
    network = make(text_dim=6, num_classes=3)
    x, t = inputs()
    cond = given(text=1, text_mask=1, label=1)
    y = network(x, t, **cond)
    padded = torch.where(cond["text_mask"][..., None], cond["text"], torch.full_like(cond["text"], 9.0))
    torch.testing.assert_close(network(x, t, **{**cond, "text": padded}), y, rtol=0, atol=1e-5)
    other = network(x, t, **{**cond, "label": torch.tensor([0, 2, 1])})
    assert (other - y)[2].abs().max() > 1e-6  # the sample whose caption is masked whole


def test_every_weight_learns():
    network = make(num_classes=3, text_dim=6, cross_attention_dim=8, pooled_dim=7, concat_channels=2).train()
    x, t = inputs()
    cond = given(label=1, text=1, pooled=1, concat=1)
    network(x, t, **cond).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert (network.classes.weight.grad.abs().amax(1) > 0).tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"noise_embedding": "fourier"}, "DiffusersUNet2DCondition takes noise_embedding 'sinusoidal' only"),
        ({"sample_size": 8, "class_embed_type": "timestep"}, "sets class_embed_type, sample_size itself"),
        ({"label_mode": "concat"}, "'add' or 'cross_attention', got 'concat'"),
        ({"image_size": 7}, "7 x 7 do not divide by 2"),
        ({"layers_per_block": (1, 1, 1)}, "UNet2DConditionModel refuses its arguments"),
    ],
)
def test_arguments_of_its_own_are_refused(kwargs, sentence):
    with pytest.raises(OrnsteinError, match=sentence):
        make(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "names", "sentence"),
    [
        ({}, {"label": 1}, "unconditional"),
        ({"num_classes": 3}, {}, "needs a label"),
        ({}, {"text": 1}, "takes no captions"),
        ({"text_dim": 6}, {}, "needs caption tokens"),
        ({"text_dim": 5}, {"text": 1}, "text_dim=5"),
        ({"pooled_dim": 7}, {}, "needs a pooled caption vector"),
        ({"concat_channels": 2}, {}, "conditioning image"),
    ],
)
def test_conditions_that_do_not_fit_are_named(kwargs, names, sentence):
    with pytest.raises(OrnsteinError, match=sentence):
        make(**kwargs)(*inputs(), **given(**names))
