"""The U-Net's labels in three ways, captions, conditioning images, and activation checkpointing."""

import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.networks import UNet
from ornstein.networks.attention import Context, CrossAttention2d, attend
from ornstein.networks.checks import join_concat

from .conftest import SMALL_UNET, batch, perturb

MODES = ("add", "concat", "cross_attention")
TEXT = {**SMALL_UNET, "attention": ("none", "full"), "heads": 2, "text_dim": 6}


def unet(**options) -> UNet:
    return UNet(1, **{**SMALL_UNET, **options})


def text(size: int = 3, length: int = 5) -> dict[str, torch.Tensor]:
    mask = torch.arange(length) < torch.tensor([[2], [length], [1]])[:size]
    return {"text": torch.randn(size, length, 6), "text_mask": mask}


def moved(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Largest difference of each sample."""
    return (a - b).abs().flatten(1).amax(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("embedding", ["table", "mapped"])
def test_output_changes_with_the_label_and_only_then(mode, embedding):
    network = perturb(unet(num_classes=4, label_mode=mode, label_embedding=embedding))
    (x, noise_cond), _ = batch(1, 8, size=4)
    first = network(x, noise_cond, label=torch.tensor([0, 1, 4, 2]))
    second = network(x, noise_cond, label=torch.tensor([3, 4, 4, 2]))
    change = moved(first, second)
    assert (change[:2] > 1e-3).all() and (change[2:] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_labels_are_checked_in_every_mode(mode):
    network = unet(num_classes=4, label_mode=mode)
    (x, noise_cond), _ = batch(1, 8)
    with pytest.raises(OrnsteinError, match="needs a label"):
        network(x, noise_cond)
    with pytest.raises(OrnsteinError, match=r"\[0, 4\]"):
        network(x, noise_cond, label=torch.tensor([0, 5, 1]))
    with pytest.raises(OrnsteinError, match="unconditional"):
        unet(label_mode=mode)(x, noise_cond, label=torch.tensor([0, 1, 1]))


def test_label_modes_differ_in_what_they_add():
    def keys(**options):
        return set(unet(**options).state_dict())

    plain = keys()
    assert keys(num_classes=3) - plain == {"embed.label.weight"}
    assert keys(num_classes=3, label_mode="concat") - plain == {"label_image.table.weight"}
    tokens = keys(num_classes=3, label_mode="cross_attention") - plain
    assert {key.split(".cross.")[0] for key in tokens} == {"context.start", "context.label.weight", "middle.0"}


def test_label_channels_are_constant_images_beside_the_input():
    network = perturb(unet(num_classes=3, label_mode="concat", label_channels=2, patch_size=2))
    assert network.stem.in_channels == 4 + 2
    joined = network.label_image(torch.zeros(2, 4, 3, 5), torch.tensor([3, 1]))
    table = network.label_image.table.weight
    assert (joined[:, :4] == 0).all()
    assert (joined[0, 4:] == table[3][:, None, None]).all() and (joined[1, 4:] == table[1][:, None, None]).all()


def test_cross_attention_stands_where_there_is_attention_and_in_the_middle():
    network = UNet(1, **{**TEXT, "channel_mults": (1, 2, 2), "attention": ("none", "linear", "none")})
    stages = [*network.encoder, *network.middle, *network.decoder]
    found = [type(stage.attention).__name__ != "Identity" for stage in stages if hasattr(stage, "attention")]
    assert found == [getattr(stage, "cross", None) is not None for stage in stages if hasattr(stage, "attention")]
    bare = UNet(1, **{**TEXT, "attention": "none", "mid_attention": "none"})
    assert [stage.cross is not None for stage in bare.middle] == [True, False]


def test_cross_attention_is_its_formula_and_starts_as_the_identity():
    module = CrossAttention2d(8, context_channels=6, groups=2, heads=2).double()
    x, tokens = torch.randn(2, 8, 3, 4).double(), torch.randn(2, 5, 6).double()
    assert (module(x, Context(tokens, None)) == x).all()
    perturb(module)
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    result = module(x, Context(tokens, mask))
    q = module.q(module.norm(x)).reshape(2, 2, 4, 12)
    k, v = module.kv(tokens).reshape(2, 5, 2, 2, 4).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bhdn,bhmd->bhnm", q, k) / 2
    weights = scores.exp() * mask[:, None, None]
    attended = torch.einsum("bhnm,bhmd->bhdn", weights / weights.sum(-1, keepdim=True), v).reshape(2, 8, 3, 4)
    torch.testing.assert_close(result, x + module.out(attended))


def test_fused_and_plain_attention_agree_under_a_mask():
    q, k, v = (torch.randn(2, 2, n, 4) for n in (100, 7, 7))
    mask = (torch.rand(2, 1, 1, 7) < 0.5) | (torch.arange(7) == 0)
    # Up to FEW_POSITIONS queries take the plain way: float32 rounding apart, the same.
    plain = torch.cat([attend(part, k, v, mask) for part in q.split(50, dim=2)], dim=2)
    torch.testing.assert_close(attend(q, k, v, mask), plain, rtol=1e-5, atol=1e-6)


def test_captions_change_the_output_and_padded_tokens_do_not():
    network = perturb(UNet(1, **TEXT))
    (x, noise_cond), _ = batch(1, 8)
    given = text()
    base = network(x, noise_cond, **given)
    padded = torch.where(given["text_mask"][..., None], given["text"], 100 * torch.randn_like(given["text"]))
    assert (network(x, noise_cond, text=padded, text_mask=given["text_mask"]) == base).all()
    other = given["text"].clone()
    other[:, 0] += torch.randn(6)
    assert (moved(network(x, noise_cond, text=other, text_mask=given["text_mask"]), base) > 1e-3).all()
    # A mask that hides nothing is no mask, and a longer caption's padding is no caption.
    whole = network(x, noise_cond, text=given["text"])
    torch.testing.assert_close(
        network(x, noise_cond, text=given["text"], text_mask=torch.ones(3, 5, dtype=torch.bool)), whole
    )
    longer = torch.cat([given["text"], torch.randn(3, 4, 6)], dim=1)
    mask = torch.cat([given["text_mask"], torch.zeros(3, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(network(x, noise_cond, text=longer, text_mask=mask), base, rtol=1e-4, atol=1e-4)


def test_an_empty_caption_is_finite_and_says_nothing():
    network = perturb(UNet(1, **TEXT))
    (x, noise_cond), _ = batch(1, 8)
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    first = network(x, noise_cond, text=torch.randn(3, 5, 6), text_mask=nothing)
    assert first.isfinite().all()
    assert (network(x, noise_cond, text=torch.randn(3, 5, 6), text_mask=nothing) == first).all()


def test_captions_labels_pooled_vectors_and_images_go_together():
    network = perturb(
        UNet(1, **TEXT, pooled_dim=4, concat_channels=2, num_classes=3, label_mode="cross_attention", patch_size=2)
    )
    assert network.stem.in_channels == 3 * 4
    (x, noise_cond), _ = batch(1, 8)
    given = {**text(), "label": torch.tensor([0, 3, 1]), "pooled": torch.randn(3, 4), "concat": torch.randn(3, 2, 8, 8)}
    base = network(x, noise_cond, **given)
    assert base.shape == x.shape
    for name in ("text", "pooled", "concat"):
        changed = network(x, noise_cond, **{**given, name: given[name] + 1 + torch.rand_like(given[name])})
        assert (moved(changed, base) > 1e-4).all(), name
    changed = network(x, noise_cond, **{**given, "label": torch.tensor([1, 2, 1])})
    assert (moved(changed, base)[:2] > 1e-4).all() and moved(changed, base)[2] == 0


def test_an_untrained_network_with_everything_returns_zero():
    network = UNet(1, **TEXT, pooled_dim=4, num_classes=3, label_mode="concat")
    (x, noise_cond), cond = batch(1, 8, classes=3)
    assert (network(x, noise_cond, **cond, **text(), pooled=torch.randn(3, 4)) == 0).all()


@pytest.mark.parametrize(
    ("options", "given", "sentence"),
    [
        ({}, {"text": torch.zeros(3, 5, 6)}, "takes no captions .text_dim is null."),
        ({}, {"text_mask": torch.ones(3, 5, dtype=torch.bool)}, "text_mask"),
        ({}, {"pooled": torch.zeros(3, 4)}, "takes no captions .pooled_dim is null."),
        ({}, {"concat": torch.zeros(3, 1, 8, 8)}, "takes no conditioning image"),
        ({}, {"augment": torch.zeros(3, 9)}, "augment_dim is null"),
        ({"text_dim": 6}, {}, "needs caption tokens"),
        ({"text_dim": 6}, {"text": torch.zeros(3, 5, 7)}, "text_dim=6"),
        ({"text_dim": 6}, {"text": torch.zeros(3, 5, 6), "text_mask": torch.ones(3, 4, dtype=torch.bool)}, "text_mask"),
        ({"pooled_dim": 4}, {}, "pooled"),
        ({"pooled_dim": 4}, {"pooled": torch.zeros(3, 5)}, "pooled_dim=4"),
        ({"concat_channels": 2}, {}, r"shape \(3, 2, 8, 8\)"),
        ({"concat_channels": 2}, {"concat": torch.zeros(3, 1, 8, 8)}, r"got \(3, 1, 8, 8\)"),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(options, given, sentence):
    network = unet(**options)
    (x, noise_cond), _ = batch(1, 8, classes=None)
    with pytest.raises(OrnsteinError, match=sentence):
        network(x, noise_cond, **given)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label_mode": "film"}, "label_mode is one of add, concat, cross_attention, got 'film'"),
        ({"num_classes": 0, "label_mode": "concat"}, "at least 1, got 0"),
        ({"num_classes": 0, "label_mode": "cross_attention"}, "at least 1, got 0"),
        ({"num_classes": 0, "label_embedding": "mapped"}, "at least 1, got 0"),
        ({"label_embedding": "row"}, "label_embedding is 'table' or 'mapped', got 'row'"),
        ({"label_channels": 0, "num_classes": 3, "label_mode": "concat"}, "label_channels is at least 1"),
        ({"concat_channels": -1}, "concat_channels at least 0, got 4 and -1"),
        ({"resampling": "bilinear"}, "resampling is one of conv, conv_end, shuffle, residual"),
        ({"resampling": "residual", "block": "convnext"}, "choose block=resnet, not 'convnext'"),
        ({"resampling": "residual", "resample_filter": (1, 2, 1)}, r"resample_filter .* got \[1, 2, 1\]"),
        ({"progressive_input": True, "resample_filter": (1, -1)}, "positive sum"),
        ({"decoder_attention": "first"}, "decoder_attention is one of all, last"),
        ({"init": "kaiming"}, "init is one of torch, ddpm, edm"),
        ({"noise_embedding": "ddpm", "embedding_features": 2}, "at least 4 numbers, got 2"),
    ],
)
def test_wrong_options_are_refused_by_name(options, sentence):
    with pytest.raises(OrnsteinError, match=sentence):
        unet(**options)


def test_a_conditioning_image_follows_the_input():
    x, image = torch.zeros(2, 1, 4, 4), torch.randn(2, 3, 4, 4)
    assert (join_concat(x, image, 3)[:, 1:] == image).all()
    assert join_concat(x, None, 0) is x


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 12), (20, 4)])
def test_any_size_that_divides_with_every_kind_of_resampling(height, width):
    for resampling in ("conv", "conv_end", "shuffle", "residual", "residual_projected"):
        network = unet(
            resampling=resampling, progressive_input=True, resample_filter=(1, 3, 3, 1), channel_mults=(1, 2, 2)
        )
        (x, noise_cond), _ = batch(1, height, width, classes=None)
        assert perturb(network)(x, noise_cond).shape == x.shape
        with pytest.raises(OrnsteinError, match="divide by 4"):
            network(x[..., :-1], noise_cond)


@pytest.mark.parametrize("options", [{"dropout": 0.0}, {"dropout": 0.3}, {"resampling": "residual"}])
def test_checkpointing_changes_memory_and_no_gradient(options):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        network = UNet(1, **TEXT, num_classes=3, **options, checkpointing=checkpointing)
        perturb(network).train()
        (x, noise_cond), cond = batch(1, 8, classes=3)
        given = text()
        torch.manual_seed(1)
        network(x, noise_cond, **cond, **given).square().sum().backward()
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    plain, saved = gradients(False), gradients(True)
    assert all((saved[name] == gradient).all() for name, gradient in plain.items())


def test_checkpointing_keeps_less_for_the_backward_pass():
    def kept(checkpointing: bool) -> int:
        network, total = unet(checkpointing=checkpointing), 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        (x, noise_cond), _ = batch(1, 16, size=8, classes=None)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            network(x, noise_cond)
        return total

    assert kept(True) < 0.5 * kept(False)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_everything_compiles_as_one_graph(checkpointing):
    options = {**TEXT, "base_channels": 8, "num_classes": 3, "label_mode": "cross_attention"}
    network = perturb(
        UNet(
            1,
            **options,
            checkpointing=checkpointing,
            resampling="residual_projected",
            resample_filter=(1, 3, 3, 1),
            progressive_input=True,
        )
    )
    (x, noise_cond), cond = batch(1, 8, classes=3)
    given = {**cond, **text()}
    network(x, noise_cond, **given).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    # Traced forward and backward without generating kernels, which takes minutes and which test_unet.py does for one.
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    compiled(x, noise_cond, **given).square().sum().backward()
    for name, parameter in network.named_parameters():
        limit = 1e-4 * expected[name].abs().max().item()  # float32 rounding
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=limit)
