"""``python sample.py run=...``: samples of a run with any sampler and guidance, no retraining."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ornstein.cli.autoencoder import refuse_samples
from ornstein.cli.launch import fail, launch, peek_argument, store_run
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.training.module import DiffusionModule

MAX_SHOWN = 256  # samples in the grid
MAX_COLUMNS = 16  # a column a prompt, up to so many


def main() -> None:
    """Entry point."""
    try:
        prepare_run(sys.argv)
    except OrnsteinError as error:
        fail(error)
    launch("sample", sample)


def prepare_run(argv: list[str]) -> None:
    """Makes the run that ``run=`` names the base of the config.

    Raises:
        OrnsteinError: ``run=`` is missing or names no run.
    """
    from ornstein.cli.stored import open_run

    named = peek_argument(argv, "run")
    if named is not None:
        store_run(open_run(named.strip("'\"")).config)
    elif {"--help", "-h", "--hydra-help", "--info", "--cfg", "-c"} & set(argv):
        store_run({})
    else:
        raise OrnsteinError("run= is missing: name a run folder or a checkpoint, run=outputs/train/<date>/<time> say.")


def sample(cfg: DictConfig) -> None:
    """Writes a grid, single images and an ``.npz`` of samples into its own output folder."""
    import numpy as np
    import torch

    from ornstein.cli.build import plain
    from ornstein.cli.load import restore, sampling_options
    from ornstein.cli.progress import bar
    from ornstein.cli.prompts import read_labels
    from ornstein.cli.stored import open_run
    from ornstein.experiment import RunDirectory, Summary, describe_environment
    from ornstein.training.condition_pictures import captions_text, fitted, interleaved
    from ornstein.training.pictures import image_grid, save_png, save_text, to_pil

    refuse_samples(cfg)
    if cfg.num_samples < 1:
        raise OrnsteinError(f"num_samples={cfg.num_samples} must be at least 1.")
    stored = open_run(str(cfg.run))
    module = restore(stored, cfg, checkpoint=cfg.checkpoint, weights=cfg.weights, trust_targets=list(cfg.trust_targets))
    indices = range(cfg.first_index, cfg.first_index + cfg.num_samples)
    labels = read_labels(cfg)
    options = sampling_options(module, cfg, labels=labels, count=len(indices))
    run = RunDirectory(cfg.paths.run_dir)
    with run.lock(), Summary(run) as summary:
        run.write_config(plain(cfg))
        run.write_json("environment.json", describe_environment(seed=int(cfg.seed)))
        steps = -(-len(indices) // int(cfg.batch_size)) * int(cfg.sampler.steps)
        with bar("sampling", steps) as advance:
            drawn = module.generate(
                indices,
                **options,
                seed=int(cfg.seed),
                batch_size=int(cfg.batch_size),
                watch=lambda step, state: advance(),
            )
            batches = list(drawn)
        images = torch.cat([batch.images.cpu() for batch in batches])
        asked = [batch.labels.cpu() for batch in batches if batch.labels is not None]
        if "grid" in cfg.save:
            shown, row_labels = images[:MAX_SHOWN], None
            columns = columns_of(module, options["prompts"], len(shown))
            given = [batch.conditions.cpu() for batch in batches if batch.conditions is not None]
            if given:
                shown, row_labels = interleaved(shown, fitted(torch.cat(given)[:MAX_SHOWN], shown), columns)
            save_png(image_grid(shown, columns, row_labels=row_labels), run.samples / "grid.png")
        captions = [caption for batch in batches for caption in batch.captions or ()]
        if captions:
            save_text(captions_text(indices, captions), run.samples / "captions.txt")
        if "images" in cfg.save:
            for index, image in zip(indices, images, strict=True):
                save_png(to_pil(image), run.samples / f"{index:06d}.png")
        if "npz" in cfg.save:
            # ADM's layout: arr_0 holds uint8 images (N, H, W, C), arr_1 the labels.
            arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy()}
            if asked:
                arrays["arr_1"] = torch.cat(asked).numpy()
            np.savez(run.path / "samples.npz", allow_pickle=False, **arrays)
        summary.update(nfe=batches[0].nfe, num_samples=len(images), images_seen=module.images_seen)
    print(f"{len(images)} samples, {batches[0].nfe} network evaluations each: {Path(cfg.paths.run_dir) / 'samples'}")


def columns_of(module: DiffusionModule, prompts: Sequence[str] | None, count: int) -> int:
    """Columns of a grid of ``count`` samples: one a class, or one a prompt where they are few, else about a square."""
    from ornstein.training.pictures import near_square

    if prompts is not None:
        distinct = len(dict.fromkeys(prompts))
        return distinct if 1 < distinct <= MAX_COLUMNS else near_square(count)
    by_class = module.conditioner.needs == ("label",)
    return (module.conditioner.num_classes if by_class else None) or near_square(count)


if __name__ == "__main__":
    main()
