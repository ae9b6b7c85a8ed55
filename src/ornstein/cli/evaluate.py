"""``python evaluate.py run=...``: figures of a run with any sampler and guidance, no retraining."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ornstein.cli.autoencoder import evaluate_autoencoder, trains_autoencoder, typed_words
from ornstein.cli.launch import fail, launch
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.metrics.report import MetricReport
    from ornstein.training.likelihood import HeldOutLikelihood, Method
    from ornstein.training.module import DiffusionModule


GIVEN = ("labels", "prompts", "images")


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
    if trains_autoencoder(cfg):
        return evaluate_autoencoder(module, cfg, words=typed_words())
    request(module, cfg)
    likelihood_method(module, cfg)
    run = RunDirectory(cfg.paths.run_dir)
    with run.lock(), Summary(run) as summary:
        run.write_config(plain(cfg))
        run.write_json("environment.json", describe_environment(seed=int(cfg.seed)))
        started = time.perf_counter()
        report = score(module, cfg, pictures=run.samples, keep=run.write_json)
        # What held-out images took is told beside their figure: the rate is that of samples.
        seconds = time.perf_counter() - started - report.settings.get("likelihood", {}).get("seconds", 0.0)
        report.to_json(run.path / "evaluation.json")
        facts = dict(report.sampling)
        summary.update(**report.values, **facts, samples_per_s=report.num_samples / seconds)
    _show(report, seconds)
    if doubt := too_few(report):
        print(f"warning: {doubt}", file=sys.stderr)
    print(f"written to {run.path}")
    return dict(report.values)


def request(module: DiffusionModule, cfg: DictConfig) -> tuple[range, dict[str, Any]]:
    """The numbers of the samples that are asked for, and the checked options that they are drawn with.

    Raises:
        OrnsteinError: too few samples, or an option that this run cannot honour.
    """
    from ornstein.cli.load import sampling_options
    from ornstein.cli.prompts import read_labels

    if cfg.num_samples < 2:
        raise OrnsteinError(f"num_samples={cfg.num_samples}: figures need at least 2, and mean little below 1000.")
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
    module: DiffusionModule, cfg: DictConfig, *, pictures: Any = None, keep: Callable[..., Any] | None = None
) -> MetricReport:
    """FID, KID, IS, label accuracy and memorisation of ``cfg.num_samples`` samples against the run's training data.

    Beside them, where ``likelihood=`` asks for it, bits/dim of held-out images.

    Args:
        module: the run.
        cfg: its config, as evaluate has it.
        pictures: folder for a picture of nearest neighbours; none is drawn without.
        keep: called with (name, dict) to write ``likelihood.json``: every image's bits/dim, and every step's.

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
    bits = likelihood(module, cfg, data.val)
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
    if bits is not None:
        values |= bits.values
        if keep is not None:
            keep("likelihood.json", bits.to_dict())
    report = metrics.report(
        values,
        label_protocol=scoring.label_protocol(module, given=any(options[key] is not None for key in GIVEN)),
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
    return report if bits is None else replace(report, settings={**report.settings, "likelihood": bits.facts()})


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
    fid, floor = report.values.get("fid"), report.values.get("fid_floor")
    if fid is not None and floor is not None and floor > fid / 2:
        return (
            f"as many real images score a FID of {floor:.3g} (fid_floor), of the order of this run's {fid:.3g}: most "
            f"of it comes from there being {count:,} samples, so compare it at equal num_samples= only, or take more."
        )
    return None


def _show(report: MetricReport, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"{report.num_samples} samples in the {report.extractor} feature space, {seconds:.1f} s")
    if bits := report.settings.get("likelihood"):
        print(
            f"bits/dim of {bits['num_images']} held-out images without guidance, {bits['nfe']} network evaluations "
            f"each, {bits['seconds']:.1f} s"
        )
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in report.values.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
