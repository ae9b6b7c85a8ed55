"""The same samples again and again, to watch a model learn."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import lightning.pytorch as pl
import torch

from ornstein.training.callbacks.lookup import data_of
from ornstein.training.callbacks.periodic import Periodic
from ornstein.training.callbacks.progress import progress_task
from ornstein.training.callbacks.show import show_image
from ornstein.training.condition_pictures import captions_text, fitted, interleaved, short_labels
from ornstein.training.generate import Generated
from ornstein.training.limits import check_limits
from ornstein.training.module import DiffusionModule
from ornstein.training.pictures import image_grid, letterboxed, near_square, save_png, save_text
from ornstein.training.shapes import shown_shapes

SHAPES = 3  # of a run with several, how many of the most frequent a grid shows
T = TypeVar("T")


class SampleGrid(Periodic):
    """Draws ``samples/step_000400.png`` with the evaluation weights: a row a class or a caption, else about a square.

    Sample number i of class i mod K, or of held-out image i mod N with its caption, is what ``sample.py`` draws for the
    same seed, number by number. Captions stand whole in ``step_000400.txt``; of a model that is conditioned on images,
    each row of samples has the row of what it was given above it. Of a run with several shapes the columns are shared
    out among the three that most training images have.

    Args:
        run_dir: the run's folder.
        every: optimizer steps between grids; null is only at the end.
        samples_per_class: columns, where there are classes or captions.
        max_classes: rows at most; beyond, classes evenly spaced over all, captions the first.
        num_samples: of the grid where there are neither.
        seed: of the samples' noise.
        batch_size: samples at once.
        at_end: also at the end of training.

    Raises:
        OrnsteinError: a number < 1.
    """

    pictures = True

    def __init__(
        self,
        run_dir: str | Path,
        *,
        every: int | None = 500,
        samples_per_class: int = 8,
        max_classes: int = 16,
        num_samples: int = 64,
        seed: int = 0,
        batch_size: int = 256,
        at_end: bool = True,
    ) -> None:
        check_limits(
            "SampleGrid",
            every=every,
            samples_per_class=samples_per_class,
            max_classes=max_classes,
            num_samples=num_samples,
            batch_size=batch_size,
        )
        super().__init__(every=every, at_end=at_end)
        self.folder = Path(run_dir) / "samples"
        self.samples_per_class, self.max_classes, self.num_samples = (
            samples_per_class,
            max_classes,
            num_samples,
        )
        self.seed, self.batch_size = seed, batch_size

    def act(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Draws, saves and logs the grid, on the first rank."""
        if not trainer.is_global_zero:
            return
        layout = grid_layout(
            trainer, module, self.num_samples, per_class=self.samples_per_class, max_classes=self.max_classes
        )
        shapes = shown_shapes(module, data_of(trainer), SHAPES)
        size = None if shapes is None else column_sizes(shapes, layout)
        groups = [len(layout.indices)] if size is None else Counter(size).values()
        batches = sum(-(-count // self.batch_size) for count in groups)
        with progress_task(trainer, "sampling", batches * module.sampler.steps) as advance:
            drawn = module.generate(
                layout.indices,
                size=size,
                seed=self.seed,
                batch_size=self.batch_size,
                watch=lambda step, state: advance(),
            )
            batches_drawn = list(drawn)
            images, row_labels = shown(batches_drawn, layout)
            picture = image_grid(images, layout.columns, row_labels=row_labels)
            name = f"step_{trainer.global_step:06}"
            save_png(picture, self.folder / f"{name}.png")
            captions = in_order([(batch.index, batch.captions or ()) for batch in batches_drawn], layout.indices)
            if captions:
                save_text(captions_text(layout.indices, captions), self.folder / f"{name}.txt")
            show_image(trainer, "samples", picture)


def column_sizes(shapes: Sequence[tuple[int, int]], layout: GridLayout) -> list[tuple[int, int]]:
    """A shape for each sample of a grid: the first columns have the first one, the last columns the last one."""
    return [shapes[place % layout.columns * len(shapes) // layout.columns] for place in range(len(layout.indices))]


def in_order(parts: Sequence[tuple[torch.Tensor, Sequence[T]]], indices: Sequence[int]) -> list[T]:
    """What batches hold for each sample, in the order of ``indices``: samples of several shapes come shape by shape."""
    found = {number: each for index, values in parts for number, each in zip(index.tolist(), values, strict=False)}
    return [found[number] for number in indices if number in found]


@dataclass(frozen=True)
class GridLayout:
    """Which samples a grid shows, in reading order; how many in a row, and what each row is called."""

    indices: list[int]
    columns: int
    row_labels: list[str] | None


def grid_layout(
    trainer: pl.Trainer, module: DiffusionModule, num_samples: int, *, per_class: int, max_classes: int
) -> GridLayout:
    """``per_class`` samples of each class in a row, of ``max_classes`` classes evenly spaced over all where
    there are more, or of each of the first ``max_classes`` captions of the held-out data; without either about a square
    of ``num_samples``.
    """
    classes = module.conditioner.num_classes
    if "caption" in module.conditioner.needs:
        return _by_caption(data_of(trainer).val.captions or [], per_class=per_class, most=max_classes)
    if classes is None or module.conditioner.needs != ("label",):
        return GridLayout(list(range(num_samples)), near_square(num_samples), None)
    shown = [row * classes // min(classes, max_classes) for row in range(min(classes, max_classes))]
    names = getattr(data_of(trainer), "class_names", None) or ()
    return GridLayout(
        # Sample number i has class i mod K.
        [column * classes + label for label in shown for column in range(per_class)],
        per_class,
        [names[label] if label < len(names) else str(label) for label in shown],
    )


def _by_caption(captions: Sequence[str], *, per_class: int, most: int) -> GridLayout:
    """A row a caption: samples that held-out images of that caption stand for, sample i for image i mod N."""
    places: dict[str, list[int]] = defaultdict(list)
    for row, caption in enumerate(captions):
        places[caption].append(row)
    chosen = list(places)[:most]
    indices = [
        places[caption][column % len(places[caption])] + column // len(places[caption]) * len(captions)
        for caption in chosen
        for column in range(per_class)
    ]
    return GridLayout(indices, per_class, short_labels(chosen))


def shown(batches: Sequence[Generated], layout: GridLayout) -> tuple[torch.Tensor, list[str] | None]:
    """The tiles of a grid, uint8 (N, C, H, W), and its rows' labels: with what was given above each row of samples.

    Samples of several shapes are letterboxed.
    """
    images = letterboxed(in_order([(batch.index, list(batch.images.cpu())) for batch in batches], layout.indices))
    given = [
        (batch.index, list(fitted(batch.conditions.cpu(), batch.images.cpu())))
        for batch in batches
        if batch.conditions is not None
    ]
    if not given:
        return images, layout.row_labels
    return interleaved(images, letterboxed(in_order(given, layout.indices)), layout.columns)
