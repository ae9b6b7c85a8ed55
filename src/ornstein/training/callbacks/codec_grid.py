"""What a run's codec makes of held-out images: the best that samples of its latents could look like."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from ornstein.codecs import Codec, Identity
from ornstein.training.autoencoder_scoring import paired_rows, to_model
from ornstein.training.callbacks.lookup import data_of
from ornstein.training.callbacks.progress import progress_task
from ornstein.training.callbacks.show import show_image
from ornstein.training.callbacks.unwritten import pictures_may_fail
from ornstein.training.generate import to_uint8
from ornstein.training.limits import check_limits
from ornstein.training.module import DiffusionModule
from ornstein.training.pictures import image_grid, letterboxed, save_png

_COLUMNS = 8
_AT_ONCE = 4  # large autoencoders take a gigabyte for a few large images


class CodecGrid(pl.Callback):
    """Draws ``samples/codec.png`` before the first step of a latent run: held-out images above their reconstructions.

    Nothing is drawn of a run in pixels, nor of one that reads its latents from a cache: that one never runs the
    encoder. A run that goes on keeps the picture it has.

    Args:
        run_dir: the run's folder.
        num_images: evenly spaced over the held-out split.

    Raises:
        OrnsteinError: num_images < 1.
    """

    def __init__(self, run_dir: str | Path, *, num_images: int = 16) -> None:
        check_limits("CodecGrid", num_images=num_images)
        self.path, self.num_images = Path(run_dir) / "samples" / "codec.png", num_images

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws it, on the first rank."""
        assert isinstance(pl_module, DiffusionModule)
        if not trainer.is_global_zero or self.path.exists() or isinstance(pl_module.codec, Identity):
            return
        data = data_of(trainer)
        if getattr(data, "latents", None) is not None:
            return
        held_out = data.val
        count = min(self.num_images, len(held_out))
        batches = [held_out.batch([place * len(held_out) // count]) for place in range(count)]
        images = [batch["image"][0] for batch in batches]
        with progress_task(trainer, "codec"), pictures_may_fail(self):
            copies = [
                copy for part in _of_one_shape(images) for copy in _copies(pl_module.codec, part, pl_module.device)
            ]
            tiles = letterboxed([*images, *copies])
            rows = paired_rows(tiles[:count], tiles[count:], _COLUMNS)
            labels = ["data", "codec"] * -(-count // _COLUMNS)
            picture = image_grid(rows, min(_COLUMNS, count), row_labels=labels)
            save_png(picture, self.path)
            show_image(trainer, "codec", picture)


def _of_one_shape(images: list[Tensor]) -> list[Tensor]:
    """The images in order, in batches of neighbours of one shape."""
    parts: list[list[Tensor]] = []
    for image in images:
        if parts and parts[-1][0].shape == image.shape and len(parts[-1]) < _AT_ONCE:
            parts[-1].append(image)
        else:
            parts.append([image])
    return [torch.stack(part) for part in parts]


@torch.no_grad()
def _copies(codec: Codec, images: Tensor, device: torch.device) -> Tensor:
    # What the codec draws comes from a generator of its own: a picture is not to move the training's.
    draws = torch.Generator(device).manual_seed(0)
    return to_uint8(codec.decode(codec.encode(to_model(images.to(device)), generator=draws))).cpu()
