"""How noise becomes data: a strip of single trajectories and a film of a whole grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor

from ornstein.diffusion.samplers.base import State
from ornstein.diffusion.schedules import Level
from ornstein.training.callbacks.lookup import data_of
from ornstein.training.callbacks.periodic import Periodic
from ornstein.training.callbacks.progress import progress_task
from ornstein.training.callbacks.sample_grid import GridLayout, grid_layout
from ornstein.training.callbacks.show import show_animation, show_image
from ornstein.training.films import save_gif, save_mp4
from ornstein.training.generate import to_uint8
from ornstein.training.limits import check_limits
from ornstein.training.module import DiffusionModule
from ornstein.training.pictures import beside, image_grid, readable_scale, save_png, strip
from ornstein.training.shapes import shown_shapes


class Trajectory(Periodic):
    """Draws ``samples/trajectory_000400.png`` and ``.gif`` or ``.mp4`` with the evaluation weights.

    The strip shows, for a few samples, the noisy state (upper row, brought to the data's scale where noise
    exceeds it) and what the model then takes the clean image to be (lower row), from pure noise at the left
    to data at the right. The film shows the same of all samples as two grids side by side. Latents are decoded.

    Args:
        run_dir: the run's folder.
        every: optimizer steps between pictures; null is only at the end.
        samples_per_class: columns of the film, where there are classes.
        max_classes: its rows at most.
        num_samples: in the film where there are no classes.
        strip_samples: in the strip, evenly spaced over those of the film.
        strip_steps: columns of the strip, at most.
        frames: of the film, at most.
        film: gif, or mp4 with the package av.
        seed: of the samples' noise.
        at_end: also at the end of training.

    Raises:
        OrnsteinError: numbers that are too small, another film, or mp4 without its package.
    """

    pictures = True

    def __init__(
        self,
        run_dir: str | Path,
        *,
        every: int | None = None,
        samples_per_class: int = 8,
        max_classes: int = 10,
        num_samples: int = 64,
        strip_samples: int = 4,
        strip_steps: int = 10,
        frames: int = 30,
        film: str = "gif",
        seed: int = 0,
        at_end: bool = True,
    ) -> None:
        check_limits(
            "Trajectory",
            every=every,
            samples_per_class=samples_per_class,
            max_classes=max_classes,
            num_samples=num_samples,
            strip_samples=strip_samples,
            strip_steps=strip_steps,
            frames=frames,
            film=film,
        )
        super().__init__(every=every, at_end=at_end)
        self.folder = Path(run_dir) / "samples"
        self.samples_per_class, self.max_classes = samples_per_class, max_classes
        self.num_samples, self.strip_samples = num_samples, strip_samples
        self.strip_steps, self.frames, self.film = strip_steps, frames, film
        self.seed = seed

    def act(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Draws, saves and logs both, on the first rank."""
        if not trainer.is_global_zero:
            return
        layout = grid_layout(
            trainer, module, self.num_samples, per_class=self.samples_per_class, max_classes=self.max_classes
        )
        count, steps = len(layout.indices), module.sampler.steps
        few = [place * count // self.strip_samples for place in range(min(self.strip_samples, count))]
        film_steps, strip_steps = spread(steps, self.frames), spread(steps, self.strip_steps)
        film: list[tuple[Tensor, Tensor | None]] = []
        noisy: list[Tensor] = []
        clean: list[Tensor] = []

        def watch(step: int, state: State) -> None:
            advance()
            # The prediction belongs to where the step began; its own x_t is what it was made from.
            prediction = state.prediction
            if prediction is None:  # a sampler that does not tell what it thinks: its states alone
                if step in film_steps:
                    film.append((_pixels(module, state.x, state.grid[step + 1]), None))
                return
            if step in film_steps:
                film.append((_pixels(module, prediction.x_t, prediction.level), _decoded(module, prediction.x0)))
            if step in strip_steps:
                noisy.append(_pixels(module, prediction.x_t[few], prediction.level))
                clean.append(_decoded(module, prediction.x0[few]))

        with progress_task(trainer, "trajectory", steps) as advance:
            shapes = shown_shapes(module, data_of(trainer), 1)
            size = None if shapes is None else shapes[0]
            drawn = list(module.generate(layout.indices, size=size, seed=self.seed, batch_size=count, watch=watch))
            final = drawn[0].images.cpu()
            noisy.append(final[few])
            clean.append(final[few])
            film.append((final, None if film and film[-1][1] is None else final))
            self._draw(trainer, film, noisy, clean, layout=layout)

    def _draw(
        self,
        trainer: pl.Trainer,
        film: list[tuple[Tensor, Tensor | None]],
        noisy: list[Tensor],
        clean: list[Tensor],
        *,
        layout: GridLayout,
    ) -> None:
        name = f"trajectory_{trainer.global_step:06}"
        rows: list[Tensor] = []
        for sample in range(len(noisy[0])):
            rows += [torch.stack([column[sample] for column in columns]) for columns in (noisy, clean)]
        picture = strip(rows, labels=["x_t", "x0"] * len(noisy[0]))
        save_png(picture, self.folder / f"{name}.png")
        show_image(trainer, "trajectory", picture)
        frames = film_frames(film, layout)
        save = save_gif if self.film == "gif" else save_mp4
        show_animation(trainer, "denoising", save(frames, self.folder / f"{name}.{self.film}"))


def film_frames(film: Sequence[tuple[Tensor, Tensor | None]], layout: GridLayout) -> list[Image.Image]:
    """Frames of pairs of uint8 images (N, C, H, W): the noisy grid at the left, the predicted one, if any, at the
    right.
    """
    # Half the size of a still: noise does not compress.
    scale = max(1, readable_scale(film[0][0].shape[-1], layout.columns) // 2)
    frames = []
    for noisy, clean in film:
        left = image_grid(noisy, layout.columns, scale=scale, row_labels=layout.row_labels)
        if clean is None:
            frames.append(left)
            continue
        right = image_grid(clean, layout.columns, scale=scale)
        frames.append(beside(left, right, titles=("x_t", "x0")))
    return frames


def spread(steps: int, count: int) -> set[int]:
    """About ``count`` of the steps 0 .. steps - 1, evenly spaced, the first and the last among them."""
    return {round(value) for value in torch.linspace(0, steps - 1, min(count, steps)).tolist()}


def _decoded(module: DiffusionModule, x0: Tensor) -> Tensor:
    return to_uint8(module.codec.decode(x0)).cpu()


def _pixels(module: DiffusionModule, x: Tensor, level: Level) -> Tensor:
    """A noisy state as uint8 images: on variance-exploding schedules its scale is brought down to about the data's."""
    size = (float(torch.as_tensor(level.alpha).max()) ** 2 + float(torch.as_tensor(level.sigma).max()) ** 2) ** 0.5
    return to_uint8(module.codec.decode(x / max(1.0, size))).cpu()
