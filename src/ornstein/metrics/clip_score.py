"""CLIP score: do the images show what their captions say?

Any CLIP of transformers will do: a folder, or a name on the hub that is in the local cache or can be downloaded.
No package carries one, so where none is at hand the score is left out, with one line that says so.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import check_images
from ornstein.metrics.hub import load_model

log = logging.getLogger(__name__)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images, used where the folder has no ``preprocessor_config.json``."""


class ClipScore:
    r"""Mean of ``100 cos(image, caption)`` in CLIP's embedding space, accumulated by torchmetrics.

    .. math:: \mathrm{CLIPScore} = \max\bigl(0, 100 \cdot \mathbb{E} \cos(E_I, E_C)\bigr)

    Source: Hessel et al. 2021 (arXiv 2104.08718), with torchmetrics' factor of 100. Images are prepared as CLIP's own
    processor does it: shorter side to the model's size (bicubic, antialiased, Pillow), centre crop, normalisation.

    Args:
        model: folder of a transformers CLIP (config, weights, tokenizer), or its name on the hub.
        download: a name that is not in the local cache may be downloaded.

    Raises: ValueError, one sentence, if there is no such model at hand or it is not a CLIP.
    """

    def __init__(self, model: str | Path, *, download: bool = True) -> None:
        from torchmetrics.multimodal.clip_score import CLIPScore

        self.name = str(model)
        network, tokenizer, preparation = _load(self.name, download=download)
        prepare = _Prepare(tokenizer, preparation, network.config)
        pair: Any = lambda: (_Embeddings(network), prepare)  # noqa: E731  (torchmetrics' types know only its own)
        self._metric = CLIPScore(model_name_or_path=pair)
        self._metric.model.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> Self:
        """Move the model to ``device``."""
        self._metric.to(device)
        return self

    @torch.no_grad()
    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        """Take in uint8 images ``(B, 1 or 3, H, W)`` and their B captions; raises ValueError if they do not fit."""
        check_images(images)
        if len(images) != len(captions):
            raise OrnsteinError(f"{len(images)} images came with {len(captions)} captions; give one for each image.")
        device = self._metric.device
        self._metric.update(images.expand(-1, 3, -1, -1).to(device), list(captions))

    def compute(self) -> float | None:
        """The score in [0, 100] of all pairs so far, over all processes; None if there were none."""
        import warnings

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*before the ``update`` method.*")
            score = float(self._metric.compute())
        return None if score != score else score

    def reset(self) -> None:
        """Forget all pairs."""
        self._metric.reset()


def clip_at_hand(model: str | Path | None, *, download: bool = True) -> ClipScore | None:
    """A :class:`ClipScore`, or None with one logged line that says why there is none.

    ``model`` None means ``$ORNSTEIN_CLIP``, and no score where that is empty too.
    """
    model = model or os.environ.get("ORNSTEIN_CLIP")
    if not model:
        log.info("no CLIP score: name a CLIP model with metrics.clip=FOLDER or $ORNSTEIN_CLIP to have one.")
        return None
    try:
        return ClipScore(model, download=download)
    except OrnsteinError as error:
        log.warning("no CLIP score: %s", error)
        return None


class _Embeddings(nn.Module):
    """A transformers CLIP whose two embeddings are tensors, as torchmetrics expects them."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.config = network.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return _tensor(self.network.get_image_features(pixel_values=pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _tensor(self.network.get_text_features(input_ids=input_ids, attention_mask=attention_mask))


def _tensor(output: Any) -> Tensor:
    # transformers 5 wraps the projected embedding, earlier versions give it bare.
    return output if isinstance(output, Tensor) else output.pooler_output


class _Prepare:
    """Images and texts to the tensors that CLIP takes; Pillow and the tokenizer, no torchvision."""

    def __init__(self, tokenizer: Any, preparation: dict[str, Any], config: Any) -> None:
        self.tokenizer = tokenizer
        self.length = int(config.text_config.max_position_embeddings)
        self.crop = _side(preparation.get("crop_size"), int(config.vision_config.image_size))
        self.size = _side(preparation.get("size"), self.crop)
        self.mean = torch.tensor(preparation.get("image_mean", MEAN)).view(3, 1, 1)
        self.std = torch.tensor(preparation.get("image_std", STD)).view(3, 1, 1)

    def __call__(
        self, *, images: list[Tensor] | None = None, text: list[str] | None = None, **_: Any
    ) -> dict[str, Tensor]:
        if images is not None:
            return {"pixel_values": torch.stack([self.image(image) for image in images])}
        tokens = self.tokenizer(text, return_tensors="pt", padding=True, truncation=True, max_length=self.length)
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def image(self, image: Tensor) -> Tensor:
        """uint8 ``(3, H, W)`` to float32 ``(3, crop, crop)``."""
        from PIL import Image

        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        width, height = picture.size
        short = min(width, height)
        target = (int(width * self.size / short), int(height * self.size / short))
        if picture.size != target:
            picture = picture.resize(target, Image.Resampling.BICUBIC)
        left, top = (target[0] - self.crop) // 2, (target[1] - self.crop) // 2
        picture = picture.crop((left, top, left + self.crop, top + self.crop))
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std


def _side(entry: Any, default: int) -> int:
    """The pixels in transformers' ways to write a size: 224, {"shortest_edge": 224}, {"height": 224, "width": 224}."""
    if isinstance(entry, dict):
        entry = entry.get("shortest_edge", entry.get("height"))
    return default if entry is None else int(entry)


def _load(name: str, *, download: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Network, tokenizer and preparation of a CLIP; see :class:`ClipScore` for what is raised."""
    from transformers import AutoTokenizer, CLIPModel

    def load(local: bool) -> tuple[Any, Any, dict[str, Any]]:
        network = CLIPModel.from_pretrained(name, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        return network, tokenizer, preparation_of(name, local=local)

    return load_model(name, load, what="a transformers CLIP with its tokenizer", download=download)


def preparation_of(name: str, *, local: bool) -> dict[str, Any]:
    """What ``preprocessor_config.json`` of a folder or hub name says of its images; empty where there is none."""
    from transformers.utils import cached_file

    file = cached_file(
        name, "preprocessor_config.json", local_files_only=local, _raise_exceptions_for_missing_entries=False
    )
    return json.loads(Path(file).read_text()) if file else {}
