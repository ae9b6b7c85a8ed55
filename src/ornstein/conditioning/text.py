"""Conditioning on captions, through a frozen text encoder that training never runs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ornstein.conditioning.conditioner import Conditioner, checked_dropout, device_of, drop, needed
from ornstein.conditioning.embeddings import EmbeddingCache, cache_dir
from ornstein.conditioning.encoders import LoadedEncoder, find_encoder
from ornstein.errors import OrnsteinError

log = logging.getLogger(__name__)
DTYPES = {"float16": torch.float16, "float32": torch.float32}
TABLE_BYTES = 1 << 31  # embeddings up to this size are held in memory, on the device that asks; above, rows are read
_COLUMNS = ("text", "mask", "pooled")
_BATCH = 64
_BAR_FROM = 64


class Text(Conditioner):
    """Captions as token embeddings for cross-attention (or in-context tokens) and as one pooled vector.

    The encoder is frozen and runs once a caption: embeddings are kept on disk, under the encoder's name, weights,
    length and layer, and in a table in memory, which training only looks up. An empty caption is the null form: the
    encoder's embedding of ``""``, which in training takes the place of a caption with probability ``dropout``.
    All captions have ``max_length`` tokens, padded or cut, so that batches and guidance's branches join.

    Neither encoder nor table is part of the module: not in its state, its checkpoints or its copies.
    Source: Rombach et al. 2022 (arXiv 2112.10752), section 3.3; Saharia et al. 2022 (arXiv 2205.11487), section 2.1,
    for frozen encoders; Podell et al. 2023 (arXiv 2307.01952), section 2.1, for the pooled vector.

    Args:
        encoder: ``minilm`` (carried by a package), a folder of a transformers text encoder (CLIP text, T5, BERT and its
            kin), or a name on the hub.
        text_dim: size of a token's embedding, the encoder's; None gives no tokens.
        pooled_dim: size of the pooled vector, the encoder's; None gives none.
        max_length: tokens a caption, L.
        hidden_layer: whose hidden states are the tokens: -1 the last (behind CLIP's final norm), -2 the one before.
        pooling: ``auto``, ``mean`` or ``projected``; see :func:`ornstein.conditioning.encoders.find_encoder`.
        mask_padding: False lets padding count as tokens, as Stable Diffusion has it.
        dropout: probability in [0, 1] that a training caption is dropped.
        dtype: of the embeddings kept, ``float16`` or ``float32``; networks are given float32.
        cache: folder of the embeddings; None is ``ornstein/text`` below ``$XDG_CACHE_HOME`` or ``~/.cache``.
        download: a hub name that is not in the local cache may be fetched.
        num_classes: None: there are no classes; for the config, from which networks read it.

    Raises:
        OrnsteinError: no such encoder, sizes that are not the encoder's, or a number out of its range.
    """

    needs = ("caption",)
    _loaded: LoadedEncoder | None
    _kept: EmbeddingCache | None
    _table: dict[str, Tensor] | None
    _rows: dict[str, int]
    _warned: bool

    def __init__(
        self,
        encoder: str = "minilm",
        *,
        text_dim: int | None = 384,
        pooled_dim: int | None = 384,
        max_length: int = 32,
        hidden_layer: int = -1,
        pooling: str = "auto",
        mask_padding: bool = True,
        dropout: float = 0.1,
        dtype: str = "float16",
        cache: str | Path | None = None,
        download: bool = True,
        num_classes: None = None,
    ) -> None:
        super().__init__()
        if num_classes is not None:
            raise OrnsteinError(
                f"conditioner=text takes no num_classes but got {num_classes}; choose conditioner=class_text to "
                "condition on both."
            )
        if text_dim is None and pooled_dim is None:
            raise OrnsteinError("conditioner.text_dim and conditioner.pooled_dim are both null: give the encoder's.")
        if dtype not in DTYPES:
            raise OrnsteinError(f"conditioner.dtype={dtype} is unknown: choose {' or '.join(DTYPES)}.")
        self.encoder = find_encoder(encoder, pooling=pooling, download=download)
        self.text_dim, self.pooled_dim = text_dim, pooled_dim
        self.max_length, self.hidden_layer, self.mask_padding = max_length, hidden_layer, mask_padding
        self.dropout = checked_dropout(dropout)
        self.has_null = self.dropout > 0
        self.dtype = DTYPES[dtype]
        self._check()
        self._folder = Path(cache).expanduser() if cache is not None else cache_dir()
        self._forget()

    def training_cond(self, batch: Mapping[str, Any], *, generator: torch.Generator | None) -> dict[str, Tensor]:
        """``text`` (B, L, text_dim), ``text_mask`` bool (B, L) and ``pooled`` (B, pooled_dim) of ``batch["caption"]``.

        Raises: OrnsteinError if the batch has no captions.
        """
        cond = self.cond(batch)
        if not self.has_null:
            return cond
        first = next(iter(cond.values()))
        return drop(cond, self.null_form(len(first), first.device), self.dropout, generator)

    def cond(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """The same of ``given["caption"]``, B texts, none dropped. One that is new is encoded, and kept.

        Raises: OrnsteinError if there are no captions.
        """
        captions = needed(
            given,
            "caption",
            option="conditioner=text",
            way_out="use data with captions (of image_folder: data.caption_files=true or data.caption_template), "
            "or choose conditioner=class_label or none",
        )
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise OrnsteinError(f"captions are a list of texts, one a sample, not {captions!r}.")
        return self._embedded(list(captions), device_of(given))

    def null_form(self, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
        """The embedding of ``""`` for every sample."""
        one = self._embedded([""], torch.device(device))
        return {name: value.expand(batch_size, *value.shape[1:]) for name, value in one.items()}

    def prepare(self, captions: Sequence[str], *, device: torch.device | str = "cpu") -> None:
        """Encodes those captions that no run has encoded yet, and takes all of them into the table.

        Raises: OrnsteinError: the encoder does not load, or the cache cannot be written.
        """
        self._take_in(["", *captions], torch.device(device))
        self._loaded = None  # its memory is the network's now

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"encoder={self.encoder.name}, max_length={self.max_length}, dropout={self.dropout}"

    def _embedded(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        if any(caption not in self._rows for caption in captions):
            self._take_in(["", *captions], device)
        found = self._look_up(captions, device)
        cond: dict[str, Tensor] = {}
        if self.text_dim is not None:
            cond |= {"text": found["text"].float(), "text_mask": found["mask"]}
        return cond if self.pooled_dim is None else {**cond, "pooled": found["pooled"].float()}

    def _look_up(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        if self._table is None:
            return {name: value.to(device) for name, value in self._cache().take(captions, names=_COLUMNS).items()}
        if self._table["mask"].device != device:
            self._table = {name: value.to(device) for name, value in self._table.items()}
        rows = torch.tensor([self._rows[caption] for caption in captions]).to(device, non_blocking=True)
        return {name: value.index_select(0, rows) for name, value in self._table.items()}

    def _take_in(self, captions: Sequence[str], device: torch.device) -> None:
        """Makes the table of these captions and those it holds already."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._rows]
        if not new:
            return
        cache = self._cache()
        cache.refresh()
        missing = cache.missing(new)
        with _bar("encoding captions", len(missing)) as advance:
            cache.fill(missing, lambda texts: self._encode(texts, device), advance=advance)
        self._warn_of_cuts(new)
        self._rows |= {caption: len(self._rows) + place for place, caption in enumerate(new)}
        if len(self._rows) * self._row_bytes > TABLE_BYTES:
            self._table = None
            return
        added = cache.take(new, names=_COLUMNS)
        held = self._table
        self._table = (
            added
            if held is None
            else {name: torch.cat([held[name], added[name].to(held[name].device)]) for name in held}
        )

    def _encode(self, captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        if self._loaded is None or self._loaded.device != device:
            self._loaded = LoadedEncoder(self.encoder, device)
        parts = []
        for start in range(0, len(captions), _BATCH):
            batch = captions[start : start + _BATCH]
            found = self._loaded(
                batch, max_length=self.max_length, hidden_layer=self.hidden_layer, mask_padding=self.mask_padding
            )
            parts.append(
                {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in found.items()}
            )
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        sizes = whole["text"].shape[-1], whole["pooled"].shape[-1]
        if sizes != (self.encoder.text_dim, self.encoder.pooled_dim) or not whole["text"].isfinite().all():
            raise OrnsteinError(
                f"conditioner.encoder={self.encoder.name} gives tokens and vectors of size {sizes}, not "
                f"{(self.encoder.text_dim, self.encoder.pooled_dim)} as its config says, or values beyond "
                f"{self.dtype}'s range: check the folder, or set conditioner.dtype=float32."
            )
        return whole

    def _warn_of_cuts(self, captions: Sequence[str]) -> None:
        if self._warned:
            return
        lengths = self._cache().take(captions, names=("length",))["length"].tolist()
        cut = [caption for caption, length in zip(captions, lengths, strict=True) if length > self.max_length]
        if cut:
            self._warned = True
            log.warning(
                "%d of %d captions have more than conditioner.max_length=%d tokens and are cut, the first: %r",
                len(cut), len(captions), self.max_length, cut[0],
            )  # fmt: skip

    def _cache(self) -> EmbeddingCache:
        if self._kept is None:
            identity = (self.encoder.fingerprint(), self.max_length, self.hidden_layer, self.mask_padding)
            digest = hashlib.sha256(repr((*identity, self.encoder.projected, str(self.dtype))).encode()).hexdigest()
            name = self.encoder.name.rstrip("/").rpartition("/")[2]
            self._kept = EmbeddingCache(self._folder / f"{name}-{digest[:24]}", row_bytes=self._row_bytes)
        return self._kept

    @property
    def _row_bytes(self) -> int:
        numbers = self.max_length * self.encoder.text_dim + self.encoder.pooled_dim
        return numbers * self.dtype.itemsize + self.max_length

    def _check(self) -> None:
        for key in ("text_dim", "pooled_dim"):
            said, found = getattr(self, key), getattr(self.encoder, key)
            if said is not None and said != found:
                raise OrnsteinError(
                    f"conditioner.{key}={said} and conditioner.encoder={self.encoder.name} has {found}: set "
                    f"conditioner.{key}={found}, which the network then follows."
                )
        limit, length = self.encoder.positions, self.max_length
        if (
            isinstance(length, bool)
            or not isinstance(length, int)
            or length < 1
            or (limit is not None and length > limit)
        ):
            raise OrnsteinError(
                f"conditioner.max_length={length} counts tokens: a whole number of at least 1"
                + (f", at most the {limit} of conditioner.encoder={self.encoder.name}." if limit is not None else ".")
            )
        deepest = -(self.encoder.layers or 1) - 1
        if not isinstance(self.hidden_layer, int) or not deepest <= self.hidden_layer <= -1:
            raise OrnsteinError(
                f"conditioner.hidden_layer={self.hidden_layer} counts from the end: -1 is the encoder's last layer, "
                f"{deepest} what goes into its first."
            )

    def _forget(self) -> None:
        """What is made on demand: the encoder in memory, the table and where a caption stands in it."""
        self._loaded, self._kept, self._table = None, None, None
        self._rows = {}
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Settings alone: a copy in another process finds embeddings on the disk."""
        return {**self.__dict__, "_loaded": None, "_kept": None, "_table": None, "_rows": {}}


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error where there is much to do and somebody to see it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    quiet = total < _BAR_FROM or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
