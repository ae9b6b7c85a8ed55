"""Text encoders of a few thousand weights, made here: a CLIP, a CLIP with its projection, a T5 and a BERT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ["a", "red", "blue", "green", "heart", "dog", "cat", "house", "of", "the", "three", "digit", "photo", "big"]
LENGTH = 12


def save_tokenizer(folder: Path, *, first: str | None, last: str | None, vocabulary: dict[str, int]) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    around = [token for token in (first, last) if token is not None]
    if around:
        tokenizer.post_processor = TemplateProcessing(
            single=" ".join(filter(None, [first, "$A", last])),
            special_tokens=[(token, vocabulary[token]) for token in around],
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token=first,
        eos_token=last,
        model_max_length=LENGTH,
    ).save_pretrained(folder)


def make_encoder(kind: str, folder: Path, *, seed: int = 0) -> Path:
    """A random encoder of ``kind`` with its tokenizer, as transformers saves it."""
    import transformers

    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[BOS]", *WORDS, "[EOS]"])}
    end = vocabulary["[EOS]"]
    size = {"vocab_size": len(vocabulary), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": end}
    torch.manual_seed(seed)
    if kind.startswith("clip"):
        config = transformers.CLIPTextConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, projection_dim=10,
            max_position_embeddings=LENGTH, **size,
        )  # fmt: skip
        made = transformers.CLIPTextModelWithProjection if kind == "clip_projection" else transformers.CLIPTextModel
        network: Any = made(config)
    elif kind == "t5":
        network = transformers.T5EncoderModel(
            transformers.T5Config(d_model=20, d_kv=5, d_ff=24, num_layers=2, num_heads=4, **size)
        )
    else:
        network = transformers.BertModel(
            transformers.BertConfig(
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=LENGTH,
                **size,
            )
        )
    for parameter in network.parameters():  # some start at zero, behind which a mistake could hide
        parameter.data += 0.05 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    first = None if kind == "t5" else "[BOS]"
    save_tokenizer(folder, first=first, last="[EOS]", vocabulary=vocabulary)
    return folder


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny encoder by its kind, made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_encoder(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder
