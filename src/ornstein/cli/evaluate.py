"""``python evaluate.py run=...``: figures of a run with any sampler and guidance, no retraining."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ornstein.cli.autoencoder import evaluate_autoencoder, trains_autoencoder, typed_words
from ornstein.cli.launch import fail, launch
from ornstein.cli.numbers import check_numbers
from ornstein.cli.ranks import Ranks, check_devices, join, launched_elsewhere, spread
from ornstein.cli.reuse import Held, module_of
from ornstein.cli.score import likelihood as likelihood
from ornstein.cli.score import likelihood_method as likelihood_method
from ornstein.cli.score import request, score
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.metrics.report import MetricReport
    from ornstein.training.module import DiffusionModule

_held = Held()  # over the jobs of a sweep that run in this process


def main() -> None:
    """Entry point."""
    from ornstein.cli.sample import prepare_run
    from ornstein.cli.sweep import recorded

    try:
        prepare_run(sys.argv)
    except OrnsteinError as error:
        fail(error)
    launch("evaluate", recorded(evaluate))


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Scores a run's samples and writes ``evaluation.json``, ``summary.json``, a metric card and its pictures.

    Over several processes, those that ``devices=`` starts or those of torchrun and srun, each draws its share.
    """
    from ornstein.cli.build import plain
    from ornstein.cli.stored import open_run

    stored = open_run(str(cfg.run))
    if trains_autoencoder(cfg):
        module = module_of(stored, cfg, device=None, held=_held)
        return evaluate_autoencoder(module, cfg, words=typed_words())
    devices = check_devices(cfg.devices)
    several = devices > 1 or launched_elsewhere()
    _check_options(cfg, several=several)
    if devices > int(cfg.num_samples):
        raise OrnsteinError(f"devices={devices} and num_samples={cfg.num_samples}: each must have one to draw.")
    if several and not launched_elsewhere():
        # What cannot work is told of here, before processes are started.
        module = module_of(stored, cfg, device="cpu", held=_held)
        request(module, cfg)
        return dict(spread(_scored_from, devices, plain(cfg)))
    return _scored_by(join() if several else Ranks(), cfg)


def _check_options(cfg: DictConfig, *, several: bool) -> None:
    """Refuses what evaluate cannot do, before anything is read.

    Raises:
        OrnsteinError: names the option and what to do instead.
    """
    from ornstein.cli.sweep import check_logger
    from ornstein.experiment.sample_files import check_format

    check_numbers(cfg)
    check_format(cfg.keep_samples)
    check_logger(cfg)
    if several and (cfg.get("likelihood") or {}).get("_target_"):
        raise OrnsteinError(
            "likelihood= is computed by one process alone: leave devices= (and torchrun or srun) out, or likelihood=."
        )


def _scored_from(ranks: Ranks, config: Mapping[str, Any]) -> dict[str, float]:
    """:func:`_scored_by` in a process that ``devices=`` started, from a config of plain values."""
    return _scored_by(ranks, OmegaConf.create(dict(config)))


def _scored_by(ranks: Ranks, cfg: DictConfig) -> dict[str, float]:
    """Scores together with the other processes; the first one writes."""
    from ornstein.cli.stored import open_run

    module = module_of(open_run(str(cfg.run)), cfg, device=ranks.device, held=_held)
    request(module, cfg)
    likelihood_method(module, cfg)
    folder = Path(ranks.from_first(lambda: str(Path(cfg.paths.run_dir).absolute())))
    if not ranks.first:
        report = score(module, cfg, folder=folder, ranks=ranks, held=_held)
        _leave(Path(cfg.paths.run_dir), folder)
        return dict(report.values)
    return _written(module, cfg, ranks)


def _written(module: DiffusionModule, cfg: DictConfig, ranks: Ranks) -> dict[str, float]:
    """The first process's part: scores, writes and tells."""
    from ornstein.cli.build import plain
    from ornstein.cli.sweep import line_of, log_one, sweeping
    from ornstein.experiment import RunDirectory, Summary, describe_environment
    from ornstein.experiment.metric_card import show

    run = RunDirectory(cfg.paths.run_dir)
    with run.lock(), Summary(run) as summary:
        run.write_config(plain(cfg))
        run.write_json("environment.json", describe_environment(seed=int(cfg.seed)))
        started = time.perf_counter()
        extremes: list[Any] = []
        report = score(module, cfg, folder=run.path, keep=run.write_json, ranks=ranks, held=_held, tell=extremes.extend)
        # What held-out images took is told beside their figure: the rate is that of samples.
        seconds = time.perf_counter() - started - report.settings.get("likelihood", {}).get("seconds", 0.0)
        rate = {"samples_per_s": round(report.num_samples / report.sampling["seconds"], 2)}
        report.to_json(run.path / "evaluation.json")
        write_card(report.to_dict(), run.path, title=str(cfg.get("name") or Path(str(cfg.run)).name))
        summary.update(**report.values, **dict(report.sampling), **rate)
    if sweeping():
        print(line_of(report.to_dict(), rate["samples_per_s"]))
        return dict(report.values)
    show(report.to_dict(), seconds)
    if doubt := too_few(report):
        print(f"warning: {doubt}", file=sys.stderr)
    log_one(cfg, report.to_dict(), run.path, extremes=extremes)
    print(f"written to {run.path}")
    return dict(report.values)


def _leave(own: Path, shared: Path) -> None:
    """Removes the folder that Hydra made for this process beside the first one's, a second later say."""
    from hydra.core.hydra_config import HydraConfig

    from ornstein.cli.launch import remove_untouched

    if HydraConfig.initialized() and own.absolute() != shared:
        remove_untouched(own)


def write_card(report: Mapping[str, Any], folder: Path, *, title: str) -> None:
    """``metric_card.md`` and ``metric_card.png`` in the folder of an evaluation, with the pictures that lie there."""
    from PIL import Image

    from ornstein.experiment.atomic import write_text
    from ornstein.experiment.metric_card import card_text, draw_card

    named = {"Samples": "samples/first_samples.png", "Nearest training images": "samples/nearest_training_images.png"}
    there = [(shown, file) for shown, file in named.items() if (folder / file).is_file()]
    opened = {shown: Image.open(folder / file) for shown, file in there}
    write_text(folder / "metric_card.md", card_text(report, title=title, pictures=there))
    draw_card(
        report,
        folder / "metric_card.png",
        title=title,
        samples=opened.get("Samples"),
        neighbours=opened.get("Nearest training images"),
    )


def too_few(report: MetricReport) -> str | None:
    """What to think of figures of few samples: one sentence, None where there are enough.

    With no more samples than features the covariance behind FID is singular; and a FID that is not well above what as
    many real images score (``fid_floor``) says more of their number than of the model.
    """
    count, features = report.num_samples, int(report.settings["num_features"])
    if count <= features:
        return (
            f"num_samples={count} gives FID's covariance of {features} features no full rank: take at least "
            f"{features + 1}, better {10 * features:,}, before comparing figures."
        )
    from ornstein.metrics.figures.naming import main_figure

    name = main_figure(report.values)
    fid = report.values.get(name) if name else None
    floor = next((value for key, value in report.values.items() if key.endswith("_floor")), None)
    if fid is not None and floor is not None and floor > fid / 2:
        return (
            f"as many real images score {floor:.3g} (the floor), of the order of this run's {name} of {fid:.3g}: most "
            f"of it comes from there being {count:,} samples, so compare it at equal num_samples= only, or take more."
        )
    return None


if __name__ == "__main__":
    main()
