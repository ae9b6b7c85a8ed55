"""``python sample.py run=...``: samples of a run with any sampler and guidance, no retraining."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ornstein.cli.autoencoder import refuse_samples
from ornstein.cli.launch import fail, launch, peek_argument, store_run
from ornstein.cli.numbers import check_numbers
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.training.generate import Generated
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
    """Writes a grid, single images and an ``.npz`` of samples into its own output folder, batch by batch."""
    from ornstein.cli.build import plain
    from ornstein.cli.load import restore, sampling_options
    from ornstein.cli.progress import bar
    from ornstein.cli.prompts import read_labels
    from ornstein.cli.stored import open_run
    from ornstein.experiment import RunDirectory, Summary, describe_environment
    from ornstein.experiment.sample_files import check_format

    refuse_samples(cfg)
    check_numbers(cfg)
    check_format(cfg.keep_samples)
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
            shown, captions = write_samples(drawn, cfg, run.path, count=len(indices))
        if shown and "grid" in saved(cfg):
            _write_grid(module, shown, run.samples, prompts=options["prompts"])
        if captions:
            from ornstein.training.condition_pictures import captions_text
            from ornstein.training.pictures import save_text

            save_text(captions_text(indices, captions), run.samples / "captions.txt")
        summary.update(nfe=shown[0].nfe, num_samples=len(indices), images_seen=module.images_seen)
    place = run.samples if saved(cfg) else run.path
    print(f"{len(indices)} samples, {shown[0].nfe} network evaluations each: {place}")


def saved(cfg: DictConfig) -> list[str]:
    """What is written: ``save``, or the one form that ``keep_samples`` asks for."""
    return list(cfg.save) if cfg.keep_samples is None else []


def write_samples(
    drawn: Iterable[Generated], cfg: DictConfig, folder: Path, *, count: int
) -> tuple[list[Generated], list[str]]:
    """Writes samples as they are drawn, and gives back the batches that a grid shows, and all captions.

    Args:
        drawn: batches of samples.
        cfg: ``save`` and ``keep_samples``.
        folder: of the output.
        count: samples in all.
    """
    from ornstein.experiment.sample_files import KeptSamples, NpzSamples, kept_samples
    from ornstein.training.pictures import save_png, to_pil

    files: list[KeptSamples] = []
    if cfg.keep_samples is not None:
        files.append(kept_samples(cfg.keep_samples, folder, count))
    elif "npz" in cfg.save:
        files.append(NpzSamples(folder / "samples.npz", count, channels=None))
    shown: list[Generated] = []
    captions: list[str] = []
    try:
        for batch in drawn:
            if sum(len(each.images) for each in shown) < MAX_SHOWN:
                shown.append(batch)
            captions += batch.captions or []
            for file in files:
                file.add(batch.images, batch.labels, batch.index)
            if "images" in saved(cfg):
                for number, image in zip(batch.index.tolist(), batch.images, strict=True):
                    save_png(to_pil(image), folder / "samples" / f"{number:06d}.png")
        for file in files:
            file.close()
            file.finish()
    except BaseException:
        for file in files:
            file.discard()
        raise
    return shown, captions


def _write_grid(
    module: DiffusionModule, batches: Sequence[Generated], folder: Path, *, prompts: Sequence[str] | None
) -> None:
    import torch

    from ornstein.training.condition_pictures import fitted, interleaved
    from ornstein.training.pictures import image_grid, save_png

    shown = torch.cat([batch.images.cpu() for batch in batches])[:MAX_SHOWN]
    columns, row_labels = columns_of(module, prompts, len(shown)), None
    given = [batch.conditions.cpu() for batch in batches if batch.conditions is not None]
    if given:
        shown, row_labels = interleaved(shown, fitted(torch.cat(given)[:MAX_SHOWN], shown), columns)
    save_png(image_grid(shown, columns, row_labels=row_labels), folder / "grid.png")


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
