"""Drawing a run's samples and measuring them, for ``evaluate.py`` and :meth:`ornstein.cli.load.Run.evaluate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ornstein.cli.numbers import check_numbers
from ornstein.cli.ranks import Ranks
from ornstein.cli.reuse import Held, measures_of
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.metrics.realism import BestWorst, Extremes
    from ornstein.metrics.report import MetricReport
    from ornstein.training.likelihood import HeldOutLikelihood, Method
    from ornstein.training.module import DiffusionModule
    from ornstein.training.scoring import Drawn

GIVEN = ("labels", "prompts", "images")  # options that hold one value a sample, of which each process takes its share
ROWS, COLUMNS = 8, 8  # of samples on the metric card; a column a class where there are at most twice as many


def request(module: DiffusionModule, cfg: DictConfig) -> tuple[range, dict[str, Any]]:
    """The numbers of the samples that are asked for, and the checked options that they are drawn with.

    Raises:
        OrnsteinError: too few samples, or an option that this run cannot honour.
    """
    from ornstein.cli.buckets import check_kept_sizes
    from ornstein.cli.load import sampling_options
    from ornstein.cli.prompts import read_labels

    check_numbers(cfg)
    if cfg.num_samples < 2:
        raise OrnsteinError(f"num_samples={cfg.num_samples}: figures need at least 2, and mean little below 1000.")
    check_kept_sizes(cfg)
    labels = read_labels(cfg)
    indices = range(cfg.first_index, cfg.first_index + cfg.num_samples)
    return indices, sampling_options(module, cfg, labels=labels, count=len(indices))


def likelihood_method(module: DiffusionModule, cfg: DictConfig) -> Method | None:
    """What ``likelihood=`` asks for, built and checked; None if nothing is asked.

    Raises:
        OrnsteinError: a model of latents, or a class that is not trusted.
    """
    from hydra.utils import instantiate

    from ornstein.cli.trust import check_targets

    if not (cfg.get("likelihood") or {}).get("_target_"):
        return None
    check_targets(cfg, list(cfg.get("trust_targets") or ()), groups=("likelihood",))
    from ornstein.training.likelihood import check_space

    check_space(module)
    method: Method = instantiate({key: value for key, value in cfg.likelihood.items() if key != "num_images"})
    return method


def likelihood(module: DiffusionModule, cfg: DictConfig, held_out: Any) -> HeldOutLikelihood | None:
    """Bits/dim of ``cfg.likelihood.num_images`` held-out images, without guidance; None if they are not asked for.

    Raises:
        OrnsteinError: more images than there are, or what the method cannot do for this run.
    """
    method = likelihood_method(module, cfg)
    if method is None:
        return None
    from ornstein.cli.progress import bar
    from ornstein.training.likelihood import TICKS, held_out_images, held_out_likelihood

    count, size = cfg.likelihood.get("num_images"), int(cfg.batch_size)
    batches = -(-len(held_out_images(held_out, count)) // size)
    with bar("likelihood", batches * TICKS) as advance:
        return held_out_likelihood(
            module, held_out, method, num_images=count, seed=int(cfg.seed), batch_size=size, advance=advance
        )


def score(
    module: DiffusionModule,
    cfg: DictConfig,
    *,
    folder: Path | None = None,
    keep: Callable[..., Any] | None = None,
    ranks: Ranks | None = None,
    held: Held | None = None,
    tell: Callable[[list[list[Any]]], None] | None = None,
) -> MetricReport:
    """The figures of ``cfg.num_samples`` samples against the run's training data, and all that decides them.

    Beside them, where ``likelihood=`` asks for it, bits/dim of held-out images.

    Args:
        module: the run.
        cfg: its config, as evaluate has it.
        folder: for pictures of samples and of nearest neighbours, and for kept samples; nothing is written without.
        keep: called with (name, dict) to write ``likelihood.json``: every image's bits/dim, and every step's.
        ranks: the processes that share the work, all of which call this; this one alone unless given.
        held: what an earlier call has made already.
        tell: called with the rows of the table of best and worst samples
            (:func:`ornstein.training.extremes.extremes_rows`), where they are drawn.

    Raises:
        OrnsteinError: too few samples, no feature space, or an option that this run cannot honour.
    """
    from ornstein.cli.progress import bar
    from ornstein.training import scoring
    from ornstein.training.extremes import judge_of

    if ranks is None and cfg.devices != 1:
        raise OrnsteinError("devices= is of the command evaluate.py, which starts processes: leave it out here.")
    if folder is None and cfg.keep_samples is not None:
        raise OrnsteinError("keep_samples= is of the commands evaluate.py and sample.py, which have a folder for them.")
    ranks = Ranks() if ranks is None else ranks
    indices, options = request(module, cfg)
    made = measures_of(cfg, device=module.device, count=len(indices), held=Held() if held is None else held)
    metrics, data = made.metrics, made.data
    bits = likelihood(module, cfg, data.val)
    judge = judge_of(metrics, data.train) if folder is not None else None
    started = time.perf_counter()
    drawn = _draw(
        module, cfg, indices, options, metrics=metrics, dataset=data.train, ranks=ranks, folder=folder, judge=judge
    )
    seconds = max(ranks.gather(time.perf_counter() - started))
    with bar("scoring", metrics.ticks() if ranks.first else 0) as advance:
        values = metrics.compute(advance=advance) | dict(drawn.paired)
    values |= scoring.figures_beside(metrics, made.floor, values, len(indices), further=made.further)
    samples = scoring.together(drawn)
    seen = {"held_out": data.val, "training": data.train}
    nearness = ranks.from_first(lambda: scoring.memorisation(metrics, samples.images, **seen))
    values["memorised_share"] = float(nearness["share"])
    if folder is not None and ranks.first:
        write_pictures(module, metrics, samples.images, training=data.train, folder=folder / "samples")
    if judge is not None and folder is not None:
        _tell_extremes(judge.extremes(), data, folder=folder / "samples" if ranks.first else None, tell=tell)
    if bits is not None:
        values |= bits.values
        if keep is not None:
            keep("likelihood.json", bits.to_dict())
    average = average_of(cfg)
    facts = scoring.sampling_facts(
        module,
        sampler=options["sampler"],
        guidance=options["guidance"],
        weights="model" if average is None else "ema",
        nfe=drawn.nfe,
        seed=int(cfg.seed),
        ema=average,
    )
    report = metrics.report(
        values,
        label_protocol=scoring.label_protocol(module, given=any(options[key] is not None for key in GIVEN)),
        sampling=facts | _more_facts(cfg) | {"processes": ranks.world, "seconds": round(seconds, 3)},
        floor=made.floor.to_dict(),
        memorisation=nearness,
    )
    return report if bits is None else replace(report, settings={**report.settings, "likelihood": bits.facts()})


def _draw(
    module: DiffusionModule,
    cfg: DictConfig,
    indices: range,
    options: dict[str, Any],
    *,
    metrics: Any,
    dataset: Any,
    ranks: Ranks,
    folder: Path | None,
    judge: BestWorst | None,
) -> Drawn:
    """Draws this process's share into the metrics, and into a file where ``keep_samples`` asks for one."""
    from ornstein.cli.progress import bar
    from ornstein.experiment.sample_files import kept_samples
    from ornstein.training import scoring

    share = ranks.share(len(indices))
    mine = {
        name: value[share.start : share.stop] if name in GIVEN and value is not None else value
        for name, value in options.items()
    }
    numbers = indices[share.start : share.stop]
    kept = None
    if cfg.keep_samples is not None and folder is not None:
        kept = kept_samples(cfg.keep_samples, folder, len(indices), rank=ranks.rank, world=ranks.world)
    batches = -(-len(numbers) // int(cfg.batch_size))
    try:
        with bar("evaluating", batches * options["sampler"].steps if ranks.first else 0) as advance:
            drawn = scoring.draw_into(
                metrics,
                module,
                numbers,
                dataset=dataset,
                **mine,
                seed=int(cfg.seed),
                batch_size=int(cfg.batch_size),
                advance=advance,
                take=None if kept is None else lambda batch: kept.add(batch.images, batch.labels, batch.index),
                judge=judge,
            )
        if kept is not None:
            kept.close()
        ranks.gather(None)  # all shares are written
        if kept is not None and ranks.first:
            kept.finish()
    except BaseException:
        if kept is not None:
            kept.discard()
        raise
    return replace(drawn, nfe=max(ranks.gather(drawn.nfe)))


def _more_facts(cfg: DictConfig) -> dict[str, Any]:
    """What else of the config decides the samples: the grid of times, and the first number."""
    grid = str(OmegaConf.select(cfg, "sampler.grid._target_", default="") or "").rpartition(".")[2]
    return {"grid": grid or None, "first_index": int(cfg.first_index)}


def average_of(cfg: DictConfig) -> dict[str, Any] | None:
    """How the weights that ``weights=`` asks for were averaged, as it stands beside their figures; None: they were not.

    Raises:
        OrnsteinError: no such weights.
    """
    from ornstein.cli.load import power_length

    if (length := power_length(cfg.weights)) is not None:
        return {"std": length}
    if not cfg.ema or cfg.weights == "model":
        return None
    own = OmegaConf.to_container(cfg.ema, resolve=True)
    assert isinstance(own, dict)
    return {str(key): value for key, value in own.items() if key not in ("_target_", "run_dir")}


def _tell_extremes(
    extremes: Extremes, data: Any, *, folder: Path | None, tell: Callable[[list[list[Any]]], None] | None
) -> None:
    """Draws the most and the least realistic samples into ``folder``; of no folder (another process's) nothing."""
    from ornstein.training.extremes import FILE, draw_extremes, extremes_rows
    from ornstein.training.pictures import save_png

    if folder is None:
        return
    options = {"training": data.train, "class_names": getattr(data, "class_names", None) or ()}
    save_png(draw_extremes(extremes, **options), folder / FILE)
    if tell is not None:
        tell(extremes_rows(extremes, **options))


def write_pictures(module: DiffusionModule, metrics: Any, images: Any, *, training: Any, folder: Path) -> None:
    """``first_samples.png``, and ``nearest_training_images.png``: samples beside the training images nearest to them.

    Args:
        module: the run; where it draws by class, so few that they are columns, each column is a class.
        metrics: with their reference.
        images: the first samples, as :class:`ornstein.training.scoring.Drawn` has them.
        training: the data set that the model has seen.
        folder: for the pictures.
    """
    from ornstein.training.pictures import image_grid, save_png
    from ornstein.training.scoring import draw_neighbours, first_tiles

    classes = module.conditioner.num_classes if module.conditioner.needs == ("label",) else None
    columns = classes if classes and classes <= 2 * COLUMNS else COLUMNS
    tiles = first_tiles(images, ROWS * columns)
    save_png(image_grid(tiles, min(columns, len(tiles))), folder / "first_samples.png")
    save_png(draw_neighbours(metrics, images, training=training), folder / "nearest_training_images.png")
