"""What samples are conditioned on: what was asked for, and held-out data for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ornstein.conditioning import Conditioner
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.data import ImageDataset
    from ornstein.training.module import DiffusionModule

HeldOut = Callable[[], "ImageDataset"]
_IMAGES = ("image", "condition")


def balanced_labels(indices: Sequence[int] | range, num_classes: int) -> list[int]:
    """Label of sample i: i mod num_classes, so that any run of samples holds the classes equally."""
    return [i % num_classes for i in indices]


@dataclass(frozen=True)
class Given:
    """The conditions of one batch of samples.

    Attributes:
        values: what :meth:`ornstein.conditioning.Conditioner.cond` takes.
        labels: (B,) int64, the classes that the samples should show, asked for or those of the held-out images whose
            captions or pictures they are given; None where they are not known.
        captions: B texts, or None.
        originals: uint8 (B, C, H, W), the whole images that the pictures they are given were made of, which samples
            should restore; None where none are known.
    """

    values: Mapping[str, Any]
    labels: Tensor | None
    captions: list[str] | None
    originals: Tensor | None = None


@dataclass(frozen=True)
class Conditions:
    """What each sample is conditioned on; sample number i's own depends on i, and on what was asked for it, alone.

    What a conditioner needs and nobody asked for comes from held-out data: sample i takes image i mod N, its caption
    and label included, or where labels were asked for, image i mod N_c of those of its class c. Where only labels are
    open they are balanced, and no data are read.

    Args:
        conditioner: says what is needed.
        indices: the samples' numbers.
        labels: a class number for each sample.
        prompts: a text for each sample.
        images: an image for each sample, uint8 (len(indices), C, H, W), for a conditioner of images.
        held_out: gives the data set, when it is first needed.
        size: (height, width) that held-out images must have to be given; None takes any. Sample i then takes image
            i mod N where that has this size, else number i mod N_s of those that have.
        seed: of the samples; decides random masks.

    Raises:
        OrnsteinError: prompts without labels for a model of both, or conditions that nobody gave and no data to take
            them from.
    """

    conditioner: Conditioner
    indices: Sequence[int] | range
    labels: Sequence[int] | None = None
    prompts: Sequence[str] | None = None
    images: Tensor | None = None
    held_out: HeldOut | None = None
    size: tuple[int, int] | None = None
    seed: int = 0
    _rows: dict[int, list[int]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.open == {"label"} and self.prompts is not None:
            raise OrnsteinError(
                "this model is conditioned on classes and captions, and prompts alone name no class: give labels too, "
                "one a prompt."
            )
        if self.from_data and self.held_out is None:
            raise OrnsteinError(
                f"this model is conditioned on a {' and a '.join(sorted(self.open))} for every sample, and there are "
                "no data to take them from: give prompts, or images."
            )

    @property
    def open(self) -> set[str]:
        """What is needed and was not asked for."""
        asked = {"label": self.labels, "caption": self.prompts, "image": self.images, "condition": self.images}
        return {key for key in self.conditioner.needs if asked[key] is None}

    @property
    def from_data(self) -> bool:
        """Whether held-out data are needed: something other than labels is open."""
        return bool(self.open - {"label"})

    def batch(self, start: int, stop: int, *, device: torch.device) -> Given:
        """The conditions of samples ``indices[start:stop]``."""
        part = self.indices[start:stop]
        values: dict[str, Any] = {"index": torch.tensor(part, dtype=torch.int64), "seed": self.seed}
        for key, asked in (("label", self.labels), ("caption", self.prompts)):
            if asked is not None and key in self.conditioner.needs:
                values[key] = list(asked[start:stop])
        for key in _IMAGES:
            if self.images is not None and key in self.conditioner.needs:
                values[key] = self.images[start:stop]
        originals = values.get("image")
        if self.from_data:
            found = self._held_out_rows(part, values.get("label"))
            if self.open & set(_IMAGES):
                originals = found["image"]
            values |= {key: found[key] for key in self.open if key in found}
            if self.prompts is None and self.images is None:
                # What else is known of the image whose caption or picture is given: for figures and for the eye.
                values = {key: found[key] for key in ("label", "caption") if key in found} | values
        elif "label" in self.open:
            assert self.conditioner.num_classes is not None
            values["label"] = balanced_labels(part, self.conditioner.num_classes)
        if isinstance(values.get("label"), list):
            values["label"] = torch.tensor(values["label"], dtype=torch.int64)
        values = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in values.items()}
        return Given(values, values.get("label"), values.get("caption"), originals)

    def _held_out_rows(self, indices: Sequence[int] | range, labels: Sequence[int] | None) -> dict[str, Any]:
        assert self.held_out is not None
        data = self.held_out()
        if not self.open & set(_IMAGES):
            return data.facts(self._rows_for(data, indices, labels, None), conditions=False)
        return data.batch(self._rows_for(data, indices, labels, self._bucket(data)))

    def _rows_for(
        self, data: ImageDataset, indices: Sequence[int] | range, labels: Sequence[int] | None, bucket: int | None
    ) -> list[int]:
        """An image for each sample, of its class where classes are known, of that bucket where one is asked for."""
        rows = []
        for place, index in enumerate(indices):
            label = -1 if labels is None or data.labels is None else labels[place]
            if label not in self._rows:
                fits = torch.ones(len(data), dtype=torch.bool) if label < 0 else torch.as_tensor(data.labels == label)
                if bucket is not None:
                    of_size = torch.as_tensor(data.bucket_of) == bucket
                    fits = fits & of_size if bool((fits & of_size).any()) else of_size
                self._rows[label] = fits.nonzero().flatten().tolist() or list(range(len(data)))
            own = index % len(data)
            among = self._rows[label]
            exact = bucket is not None and label < 0 and data.bucket_of is not None and data.bucket_of[own] == bucket
            rows.append(own if exact else among[index % len(among)])
        return rows

    def _bucket(self, data: ImageDataset) -> int | None:
        """Which of the data's shapes samples are drawn at; None where all images have one, and that is it.

        Raises:
            OrnsteinError: no held-out image has that size.
        """
        several = data.bucket_of is not None
        if self.size is None and not several:
            return None
        size = (data.image_size, data.image_size) if self.size is None else self.size
        if size in data.shapes:
            return data.shapes.index(size) if several else None
        raise OrnsteinError(
            f"samples of {size[0]}x{size[1]} pixels are conditioned on images, and no held-out image of {data.name} "
            "has that size: name images by condition_images=FOLDER, or another size."
        )


def mirrored(batch: Mapping[str, Any], flip: Tensor | None, conditioner: Conditioner) -> Mapping[str, Any]:
    """The batch with the images that a conditioner looks at mirrored where the training images are, ``flip`` (B,)."""
    keys = [key for key in _IMAGES if key in conditioner.needs and key in batch]
    if flip is None or not keys:
        return batch
    where = flip.reshape(-1, 1, 1, 1)
    return {**batch, **{key: torch.where(where, batch[key].flip(-1), batch[key]) for key in keys}}


def prepare_conditions(module: DiffusionModule, data: Any, *, device: torch.device | str) -> None:
    """Lets the conditioner do what it can do once for all captions of a data module, before training begins.

    Raises:
        OrnsteinError: the data have no captions and the conditioner needs them.
    """
    if "caption" not in module.conditioner.needs:
        return
    captions: dict[str, None] = {}
    for dataset in (data.train, data.val):
        if dataset.captions is None:
            raise OrnsteinError(
                f"the {dataset.split} images of {dataset.name} have no captions and the conditioner needs them: name "
                "data with captions (data.caption_template=..., or data.caption_files=true of image_folder), or choose "
                "conditioner=class_label or none."
            )
        captions |= dict.fromkeys(dataset.captions)
    module.conditioner.prepare(list(captions), device=device)
