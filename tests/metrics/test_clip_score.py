import json
import logging

import pytest
import torch

from ornstein.metrics.clip_score import ClipScore, clip_at_hand

CAPTIONS = ["a red square", "a dog", "a red dog"]


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A folder as transformers' ``save_pretrained`` leaves it: a CLIP of two layers, random weights, 14 words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("clip")
    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "red", "blue", "square", "circle", "dog"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 10, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    preparation = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    mean_std = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**preparation, **mean_std}))
    return folder


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_score_is_the_mean_cosine_of_the_models_own_embeddings(tiny_clip, images):
    from transformers import AutoTokenizer, CLIPModel

    score = ClipScore(tiny_clip)
    score.update(images, CAPTIONS)
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    prepare = score._metric.processor
    tokens = AutoTokenizer.from_pretrained(tiny_clip)(CAPTIONS, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(pixel_values=torch.stack([prepare.image(image) for image in images]), **tokens)
    cosines = (output.image_embeds * output.text_embeds).sum(-1)  # transformers normalises them itself
    assert score.compute() == pytest.approx(max(0.0, 100 * float(cosines.mean())), rel=1e-4)


def test_images_are_prepared_as_transformers_prepares_them(tiny_clip, images):
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    theirs = pil.CLIPImageProcessorPil.from_pretrained(tiny_clip)
    prepare = ClipScore(tiny_clip)._metric.processor
    for image in images:
        expected = torch.as_tensor(theirs(images=image.numpy(), return_tensors="pt")["pixel_values"])[0]
        torch.testing.assert_close(prepare.image(image), expected, rtol=0, atol=1e-5)  # float32 in another order


def test_batches_add_up_and_gray_is_spread_over_three_channels(tiny_clip, images):
    whole, parts = ClipScore(tiny_clip), ClipScore(tiny_clip)
    gray = images[:, :1]
    whole.update(gray, CAPTIONS)
    for row in range(3):
        parts.update(gray[row : row + 1].expand(-1, 3, -1, -1), CAPTIONS[row : row + 1])
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-4)  # padding of shorter captions, float32
    whole.reset()
    assert whole.compute() is None


def test_long_captions_are_cut(tiny_clip, images):
    score = ClipScore(tiny_clip)
    score.update(images[:1], [" ".join(["dog"] * 50)])
    assert 0 <= score.compute() <= 100


@pytest.mark.parametrize("given", [ClipScore, str])
def test_generative_metrics_score_captions(tiny_clip, images, make_pixels, given):
    from ornstein.metrics.generative import GenerativeMetrics

    metrics = GenerativeMetrics(make_pixels(), kid=False, clip=given(tiny_clip))
    small = images[:, :1, :2, :2]
    metrics.set_reference(small)
    metrics.update(small, captions=CAPTIONS)
    alone = ClipScore(tiny_clip)
    alone.update(small, CAPTIONS)
    assert metrics.compute()["clip_score"] == alone.compute()
    metrics.reset()
    metrics.update(small)
    assert "clip_score" not in metrics.compute()


def test_captions_without_a_model_cost_one_line(images, make_pixels, caplog):
    from ornstein.metrics.generative import GenerativeMetrics

    metrics = GenerativeMetrics(make_pixels(), kid=False)
    small = images[:, :1, :2, :2]
    metrics.set_reference(small)
    with caplog.at_level(logging.INFO):
        metrics.update(small, captions=CAPTIONS)
        metrics.update(small, captions=CAPTIONS)
    assert [record.message[:13] for record in caplog.records] == ["no CLIP score"]
    values = metrics.compute()
    assert "fid" in values and "clip_score" not in values


def test_where_there_is_no_model_one_line_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert clip_at_hand(None) is None
        assert clip_at_hand(tmp_path) is None  # an empty folder
        assert clip_at_hand("nobody/no-such-clip", download=False) is None
    assert len(caplog.records) == 3 and all(record.message.startswith("no CLIP score") for record in caplog.records)


def test_the_environment_names_the_model(tiny_clip, monkeypatch):
    monkeypatch.setenv("ORNSTEIN_CLIP", str(tiny_clip))
    assert clip_at_hand(None).name == str(tiny_clip)


def test_lengths_are_checked(tiny_clip, images):
    with pytest.raises(ValueError, match="2 captions"):
        ClipScore(tiny_clip).update(images, CAPTIONS[:2])
