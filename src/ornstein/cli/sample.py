"""``python sample.py run=...``: samples of a run with any sampler and guidance, no retraining."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from ornstein.cli.launch import fail, launch, peek_argument, store_run
from ornstein.errors import OrnsteinError

MAX_SHOWN = 256  # samples in the grid


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
    from ornstein.cli.stored import open_run
    from ornstein.experiment import RunDirectory, Summary, describe_environment
    from ornstein.training.pictures import image_grid, near_square, save_png, to_pil

    if cfg.num_samples < 1:
        raise OrnsteinError(f"num_samples={cfg.num_samples} must be at least 1.")
    stored = open_run(str(cfg.run))
    module = restore(stored, cfg, checkpoint=cfg.checkpoint, weights=cfg.weights, trust_targets=list(cfg.trust_targets))
    indices = range(cfg.first_index, cfg.first_index + cfg.num_samples)
    labels = None if cfg.labels is None else list(cfg.labels)
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
            shown = images[:MAX_SHOWN]
            columns = module.conditioner.num_classes or near_square(len(shown))
            save_png(image_grid(shown, columns), run.samples / "grid.png")
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


if __name__ == "__main__":
    main()
