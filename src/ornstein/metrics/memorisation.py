"""Has the model memorised? Distances to the nearest training image, beside those of images it never saw.

A generator that copies is nearer to its training images than fresh real images are. So the distances of held-out
images are the yardstick: of samples as good and as varied as they, 5 % lie below their 5th percentile.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureExtractor
from ornstein.metrics.images import Source, extract

if TYPE_CHECKING:
    from PIL import Image

PERCENTILE = 5.0
# Of the picture: as training's grids look.
_GAP, _HEADING = 2, 14
_GROUND, _INK = (32, 32, 36), (235, 235, 235)


@dataclass(frozen=True, kw_only=True)
class MemorisationReport:
    """Nearest-training-neighbour distances in feature space.

    Attributes:
        share: of samples nearer to a training image than ``threshold``; ``chance`` if they are like held-out ones.
        chance: what ``share`` is expected to be without memorisation: 0.05.
        threshold: the 5th percentile of the held-out images' distances.
        copies: share of samples whose features are exactly those of a training image.
        sample_median, held_out_median: median distances.
        num_samples, num_held_out, num_training: how many images each figure rests on.
        extractor, fingerprint: the feature space.
    """

    share: float
    chance: float
    threshold: float
    copies: float
    sample_median: float
    held_out_median: float
    num_samples: int
    num_held_out: int
    num_training: int
    extractor: str = ""
    fingerprint: str = ""

    def to_dict(self) -> dict[str, float | int | str]:
        """All figures as plain JSON types."""
        return asdict(self)


def nearest_neighbours(queries: Tensor, bank: Tensor, *, k: int = 1, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Euclidean distances and indices of the ``k`` nearest rows of ``bank`` to each row of ``queries``.

    Args:
        queries: ``(N, D)``.
        bank: ``(M, D)`` with M >= k.
        k: neighbours to find.
        chunk: rows of queries and of the bank compared at once; bounds memory to a few ``chunk * 16 * chunk`` doubles.

    Returns: float64 ``(N, k)`` ascending, and int64 ``(N, k)``. Equal vectors have distance exactly 0.

    Raises: ValueError if the widths differ or the bank has fewer than ``k`` rows.
    """
    if queries.dim() != 2 or bank.dim() != 2 or queries.shape[1] != bank.shape[1] or len(bank) < k:
        raise OrnsteinError(
            f"neighbours need queries (N, D) and a bank (M, D) with M >= {k}, got {tuple(queries.shape)} and "
            f"{tuple(bank.shape)}."
        )
    if not len(queries):
        raise OrnsteinError("there are no images to look for neighbours of.")
    queries, bank = queries.double(), bank.double()
    distances, indices = [], []
    for rows in queries.split(chunk):
        best = torch.full((len(rows), 0), 0.0, dtype=torch.float64, device=rows.device)
        found = torch.zeros((len(rows), 0), dtype=torch.int64, device=rows.device)
        for start in range(0, len(bank), 16 * chunk):
            part = bank[start : start + 16 * chunk]
            square = rows.square().sum(1, keepdim=True) + part.square().sum(1) - 2 * rows @ part.T
            values, places = square.topk(min(k, len(part)), largest=False)
            best, found = torch.cat([best, values], dim=1), torch.cat([found, places + start], dim=1)
            best, order = best.topk(min(k, best.shape[1]), largest=False)
            found = found.gather(1, order)
        # The expanded square loses digits near 0: measure the winners again, so that copies come out as exact 0.
        exact = (rows[:, None] - bank[found]).square().sum(-1).sqrt()
        exact, order = exact.sort(dim=1)
        distances.append(exact)
        indices.append(found.gather(1, order))
    return torch.cat(distances), torch.cat(indices)


def memorisation_of_features(samples: Tensor, held_out: Tensor, *, training: Tensor) -> MemorisationReport:
    """The report from features ``(N, D)``, ``(H, D)`` and ``(M, D)`` of samples, held-out and training images."""
    nearest = nearest_neighbours(samples, training)[0][:, 0]
    fresh = nearest_neighbours(held_out, training)[0][:, 0]
    threshold = float(torch.quantile(fresh, PERCENTILE / 100))
    return MemorisationReport(
        share=float((nearest < threshold).double().mean()),
        chance=PERCENTILE / 100,
        threshold=threshold,
        copies=float((nearest == 0).double().mean()),
        sample_median=float(nearest.median()),
        held_out_median=float(fresh.median()),
        num_samples=len(samples),
        num_held_out=len(held_out),
        num_training=len(training),
    )


def memorisation_report(
    features: FeatureExtractor, samples: Source, *, held_out: Source, training: Source, batch_size: int = 256
) -> MemorisationReport:
    """Are ``samples`` nearer to ``training`` than the never-seen ``held_out`` images are?

    Args:
        features: the feature space in which distances are taken.
        samples, held_out, training: images in any form of :data:`ornstein.metrics.images.Source`, uint8, all of one
            size (as the data module gives and the sampler saves them).

    Raises: ValueError if one of them is empty.
    """
    found = [extract(features, source, batch_size=batch_size)[0] for source in (samples, held_out, training)]
    figures = memorisation_of_features(found[0], found[1], training=found[2]).to_dict()
    return MemorisationReport(**{**figures, "extractor": features.name, "fingerprint": features.fingerprint})  # type: ignore[arg-type]


def neighbour_grid(
    samples: Tensor, training: Tensor, *, neighbours: Tensor, path: str | Path | None = None, scale: int | None = None
) -> "Image.Image":
    """A picture: one row a sample, the sample first, then its nearest training images from the nearest on.

    Args:
        samples: uint8 ``(N, C, H, W)``, C 1 or 3.
        training: uint8 ``(M, C, H, W)``.
        neighbours: int64 ``(N, k)`` into ``training``, as :func:`nearest_neighbours` gives them.
        path: also write a PNG there.
        scale: whole enlargement of the pixels; None makes an image about 64 pixels wide.

    Returns: an RGB image of Pillow on a dark ground, a heading over the samples and one over their neighbours.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = samples.shape[-2:]
    factor = scale if scale is not None else max(1, round(64 / width))
    font = ImageFont.load_default(_HEADING)
    heads = ("sample", "nearest training images, nearest first")
    step = (width * factor + _GAP, height * factor + _GAP)
    top = 2 * _HEADING
    # The samples stand apart; both headings fit, however small the images.
    second = max(step[0], math.ceil(font.getlength(heads[0]))) + 12
    right = second + max(neighbours.shape[1] * step[0], math.ceil(font.getlength(heads[1])) + _GAP)
    canvas = Image.new("RGB", (_GAP + right, top + len(samples) * step[1] + _GAP), _GROUND)
    draw = ImageDraw.Draw(canvas)
    for left, head in zip((_GAP, _GAP + second), heads, strict=True):
        draw.text((left, top / 2), head, fill=_INK, font=font, anchor="lm")
    for row, sample in enumerate(samples):
        pictures: Sequence[Tensor] = [sample, *training[neighbours[row].cpu()]]
        for column, picture in enumerate(pictures):
            left = _GAP + (second + (column - 1) * step[0] if column else 0)
            tile = _picture(picture).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            canvas.paste(tile, (left, top + row * step[1]))
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        canvas.save(path, format="PNG")
    return canvas


def _picture(image: Tensor) -> "Image.Image":
    from PIL import Image

    pixels = image.cpu().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels)
