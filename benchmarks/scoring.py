"""How the benchmarks judge samples: against the real images, in the feature space that the package ships."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ornstein.metrics import (
    ClassifierFeatures,
    extract,
    frechet_distance,
    memorisation_of_features,
    real_floor,
)
from ornstein.training.pictures import image_grid, save_png

CHANCE = 0.05  # share of held-out images below their own 5th percentile


@dataclass
class Judge:
    """The real images in feature space, against which every method's samples are scored."""

    features: ClassifierFeatures
    training: Tensor
    held_out: Tensor
    floor: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Any, features: ClassifierFeatures, *, samples: int) -> Judge:
        """Measures the real images once; ``samples`` is how many every method is judged on."""
        training, held_out = extract(features, data.train)[0], extract(features, data.val)[0]
        judge = cls(features, training, held_out)
        floor = real_floor(features, data.train, n=samples)
        some = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:samples]
        labels = torch.from_numpy(data.val.labels)
        logits = extract(features, data.val)[1]
        assert logits is not None
        judge.floor = {
            "fid": floor.fid,
            "count": floor.count,
            "fid_at_same_count": floor.expected_fid(samples, len(training)),
            "held_out_fid": judge.fid(held_out[some]),
            "held_out_count": len(some),
            "held_out_accuracy": float((logits.argmax(1) == labels).float().mean()),
            "held_out_distance": memorisation_of_features(held_out, held_out, training=training).held_out_median,
        }
        return judge

    def fid(self, features: Tensor) -> float:
        """FID of features (N, D) against all training images."""
        first, second = features.double(), self.training.double()
        return frechet_distance(first.mean(0), first.T.cov(), mean2=second.mean(0), cov2=second.T.cov())

    def score(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """The figures of uint8 images (N, C, H, W) that were asked for as ``labels`` (N,)."""
        found, logits = extract(self.features, images)
        assert logits is not None
        memory = memorisation_of_features(found, self.held_out, training=self.training)
        return {
            "accuracy": float((logits.argmax(1) == labels).float().mean()),
            "fid": self.fid(found),
            "distance": memory.sample_median,
            "near": memory.share,
            "copies": memory.copies,
        }


def save_grid(images: Tensor, num_classes: int, names: Sequence[str] | None, path: Path, columns: int = 10) -> None:
    """One row a class, from images whose labels count round the classes."""
    count = min(columns, len(images) // num_classes)
    rows = images[: count * num_classes].unflatten(0, (count, num_classes)).transpose(0, 1).flatten(0, 1)
    save_png(image_grid(rows, count, row_labels=names), path)


def merged(paths: Sequence[str]) -> dict[str, Any]:
    """One record of the seeds of several, which must have been measured alike.

    Raises:
        SystemExit: they differ in what decides the figures, or hold a seed twice.
    """
    records = [json.loads(Path(path).read_text()) for path in paths]
    first = records[0]
    for record in records[1:]:
        if any(record[key] != first[key] for key in first if key != "outcomes"):
            raise SystemExit(f"{', '.join(paths)} were not measured alike: measure again, with one --seeds.")
        first["outcomes"] += record["outcomes"]
    seeds = [(outcome["method"], outcome["seed"]) for outcome in first["outcomes"]]
    if len(set(seeds)) < len(seeds):
        raise SystemExit(f"{', '.join(paths)} hold a seed twice: give --first-seed to the later runs.")
    return first
