"""``python evaluate.py run=...``: figures of a run with any sampler and guidance, no retraining."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ornstein.cli.launch import fail, launch
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.metrics.report import MetricReport
    from ornstein.training.module import DiffusionModule


def main() -> None:
    """Entry point."""
    from ornstein.cli.sample import prepare_run

    try:
        prepare_run(sys.argv)
    except OrnsteinError as error:
        fail(error)
    launch("evaluate", evaluate)


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Scores a run's samples and writes ``evaluation.json``, ``summary.json`` and a picture of nearest neighbours."""
    from ornstein.cli.build import plain
    from ornstein.cli.load import restore
    from ornstein.cli.stored import open_run
    from ornstein.experiment import RunDirectory, Summary, describe_environment

    module = restore(
        open_run(str(cfg.run)),
        cfg,
        checkpoint=cfg.checkpoint,
        weights=cfg.weights,
        trust_targets=list(cfg.trust_targets),
    )
    request(module, cfg)
    run = RunDirectory(cfg.paths.run_dir)
    with run.lock(), Summary(run) as summary:
        run.write_config(plain(cfg))
        run.write_json("environment.json", describe_environment(seed=int(cfg.seed)))
        started = time.perf_counter()
        report = score(module, cfg, pictures=run.samples)
        seconds = time.perf_counter() - started
        report.to_json(run.path / "evaluation.json")
        facts = dict(report.sampling)
        summary.update(**report.values, **facts, samples_per_s=report.num_samples / seconds)
    _show(report, seconds)
    print(f"written to {run.path}")
    return dict(report.values)


def request(module: DiffusionModule, cfg: DictConfig) -> tuple[range, dict[str, Any]]:
    """The numbers of the samples that are asked for, and the checked options that they are drawn with.

    Raises:
        OrnsteinError: too few samples, or an option that this run cannot honour.
    """
    from ornstein.cli.load import sampling_options

    if cfg.num_samples < 2:
        raise OrnsteinError(f"num_samples={cfg.num_samples}: figures need at least 2, and mean little below 1000.")
    labels = None if cfg.labels is None else list(cfg.labels)
    indices = range(cfg.first_index, cfg.first_index + cfg.num_samples)
    return indices, sampling_options(module, cfg, labels=labels, count=len(indices))


def score(module: DiffusionModule, cfg: DictConfig, *, pictures: Any = None) -> MetricReport:
    """FID, KID, IS, label accuracy and memorisation of ``cfg.num_samples`` samples against the run's training data.

    Raises:
        OrnsteinError: too few samples, no feature space, or an option that this run cannot honour.
    """
    from ornstein.cli.build import build_data, build_metrics
    from ornstein.cli.progress import bar
    from ornstein.metrics import nearest_neighbours, neighbour_grid, real_floor, reference_statistics
    from ornstein.training import scoring

    indices, options = request(module, cfg)
    metrics = build_metrics(cfg.metrics)
    if metrics is None:
        raise OrnsteinError(
            "metrics has no feature space for this run's data: name one, such as metrics=digits, mnist, "
            "fashion_mnist or inception."
        )
    metrics.to(module.device)
    data = build_data(cfg)
    data.setup()
    metrics.set_reference(reference_statistics(metrics.features, data.train))
    batches = -(-len(indices) // int(cfg.batch_size))
    with bar("evaluating", batches * options["sampler"].steps) as advance:
        drawn = scoring.draw_into(
            metrics,
            module,
            indices,
            dataset=data.train,
            **options,
            seed=int(cfg.seed),
            batch_size=int(cfg.batch_size),
            advance=advance,
        )
    values = metrics.compute()
    floor = real_floor(metrics.features, data.train, len(indices))
    nearness = scoring.memorisation(metrics, drawn.images, held_out=data.val)
    values |= scoring.figures_beside(metrics, floor, values, len(indices))
    values["memorised_share"] = float(nearness["share"])
    if pictures is not None:
        from ornstein.metrics import extract

        shown = drawn.images[:10]
        bank = extract(metrics.features, data.train)[0]
        _, neighbours = nearest_neighbours(extract(metrics.features, shown)[0], bank, k=5)
        real = data.train.batch(list(range(len(data.train))))["image"]
        neighbour_grid(shown, real, neighbours=neighbours, path=pictures / "nearest_training_images.png")
    protocol = "balanced" if module.conditioner.num_classes else "none"
    return metrics.report(
        values,
        label_protocol=protocol if options["labels"] is None else "given",
        sampling=scoring.sampling_facts(
            module,
            sampler=options["sampler"],
            guidance=options["guidance"],
            weights=str(cfg.weights) if cfg.ema else "model",
            nfe=drawn.nfe,
            seed=int(cfg.seed),
        ),
        floor=floor.to_dict(),
        memorisation=nearness,
    )


def _show(report: MetricReport, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"{report.num_samples} samples in the {report.extractor} feature space, {seconds:.1f} s")
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in report.values.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
