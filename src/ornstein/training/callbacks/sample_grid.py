"""The same samples again and again, to watch a model learn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch

from ornstein.training.callbacks.lookup import data_of
from ornstein.training.callbacks.periodic import Periodic
from ornstein.training.callbacks.progress import progress_task
from ornstein.training.callbacks.show import show_image
from ornstein.training.limits import check_limits
from ornstein.training.module import DiffusionModule
from ornstein.training.pictures import image_grid, near_square, save_png


class SampleGrid(Periodic):
    """Draws ``samples/step_000400.png`` with the evaluation weights: a row a class, else about a square.

    Sample number i of class i mod K is what ``sample.py`` draws for the same seed, number by number.

    Args:
        run_dir: the run's folder.
        every: optimizer steps between grids; null is only at the end.
        samples_per_class: columns, where there are classes.
        max_classes: rows at most; beyond, classes evenly spaced over all.
        num_samples: of the grid where there are no classes.
        seed: of the samples' noise.
        batch_size: samples at once.
        at_end: also at the end of training.

    Raises:
        OrnsteinError: a number < 1.
    """

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
        batches = -(-len(layout.indices) // self.batch_size)
        with progress_task(trainer, "sampling", batches * module.sampler.steps) as advance:
            drawn = module.generate(
                layout.indices,
                seed=self.seed,
                batch_size=self.batch_size,
                watch=lambda step, state: advance(),
            )
            images = torch.cat([batch.images.cpu() for batch in drawn])
            picture = image_grid(images, layout.columns, row_labels=layout.row_labels)
            save_png(picture, self.folder / f"step_{trainer.global_step:06}.png")
            show_image(trainer, "samples", picture)


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
    there are more; without classes about a square of ``num_samples``.
    """
    classes = module.conditioner.num_classes
    if classes is None:
        return GridLayout(list(range(num_samples)), near_square(num_samples), None)
    shown = [row * classes // min(classes, max_classes) for row in range(min(classes, max_classes))]
    names = getattr(data_of(trainer), "class_names", None) or ()
    return GridLayout(
        # Sample number i has class i mod K.
        [column * classes + label for label in shown for column in range(per_class)],
        per_class,
        [names[label] if label < len(names) else str(label) for label in shown],
    )
