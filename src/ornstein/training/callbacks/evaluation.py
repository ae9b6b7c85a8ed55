"""Figures of generated images while a model trains and when it has."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from ornstein.training import scoring
from ornstein.training.callbacks.lookup import callbacks_of, data_of
from ornstein.training.callbacks.periodic import Periodic
from ornstein.training.callbacks.progress import progress_task
from ornstein.training.callbacks.show import show_image, show_table
from ornstein.training.callbacks.unwritten import pictures_may_fail
from ornstein.training.extremes import COLUMNS, FILE, draw_extremes, extremes_rows, judge_of
from ornstein.training.limits import check_limits
from ornstein.training.module import DiffusionModule
from ornstein.training.pictures import save_png
from ornstein.training.record import record

if TYPE_CHECKING:
    from ornstein.metrics.floor import RealFloor
    from ornstein.metrics.generative import GenerativeMetrics
    from ornstein.metrics.realism import Extremes
    from ornstein.metrics.report import MetricReport

log = logging.getLogger(__name__)


class GenerativeEvaluation(Periodic):
    """Logs ``val/fid``, ``val/kid``, ``val/inception_score``, ``val/label_accuracy``, ... of the evaluation
    weights.

    Samples are number 0 to ``num_samples - 1``, their classes balanced, against the training images (or a published
    reference). Of too few samples to compare with others' figures FID and Inception Score bear their number:
    ``val/fid_1k``. Beside them: ``val/fid_floor``, what as many real images would score, and
    ``val/real_inception_score``. At the end also 95 % intervals (``val/fid_low``, ``val/fid_high``, ...),
    ``val/memorised_share``, the share of samples nearer to a training image than the held-out images' 5th percentile
    (0.05 by chance), ``samples/nearest_training_images.png``, and ``samples/best_and_worst.png`` with the most and the
    least realistic samples (``metrics.best_worst``), in W&B a table of them. ``evaluation.json`` keeps the newest
    figures with all that decides them. Over several devices each draws its share, and the figures are those of one.
    Feature weights that are not at hand are told of in one line, and training goes on.

    Args:
        run_dir: the run's folder.
        metrics: makes the metrics when they are first needed, since importing them takes seconds; may give
            None, and None never measures.
        every: optimizer steps between figures; null is only at the end.
        num_samples: null is what the metrics ask for; 0 never measures.
        seed: of the samples' noise.
        batch_size: samples at once.
        at_end: also at the end of training.

    Raises:
        OrnsteinError: a number out of its range.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        metrics: Callable[[], GenerativeMetrics | None] | None,
        every: int | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        batch_size: int = 256,
        at_end: bool = True,
    ) -> None:
        check_limits("GenerativeEvaluation", every=every, num_samples=num_samples, batch_size=batch_size)
        super().__init__(every=every, at_end=at_end)
        self.path = Path(run_dir) / "evaluation.json"
        self.folder = Path(run_dir) / "samples"
        self.num_samples, self.seed, self.batch_size = num_samples, seed, batch_size
        self._factory = metrics if num_samples != 0 else None
        self._metrics: GenerativeMetrics | None = None
        self._floor: RealFloor | None = None
        self._further: dict[str, RealFloor] = {}
        self._summary: dict[str, float | int] = {}

    def act(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
        """Samples, scores and logs."""
        metrics = self._ready(trainer, module)
        count = self._count(metrics)
        if metrics is None or count == 0:
            return
        assert self._floor is not None
        data = data_of(trainer)
        indices = range(trainer.global_rank, count, trainer.world_size)
        batches = -(-len(indices) // self.batch_size)
        metrics.reset()
        # Resampling takes time, and distances to training images another pass of features: both at the end alone.
        ending = trainer.global_step == trainer.max_steps or trainer.should_stop
        judge = judge_of(metrics, data.train, batch_size=self.batch_size) if ending else None
        started = time.perf_counter()
        with progress_task(trainer, "evaluation", batches * module.sampler.steps) as advance:
            drawn = scoring.draw_into(
                metrics,
                module,
                indices,
                dataset=data.train,
                seed=self.seed,
                batch_size=self.batch_size,
                advance=advance,
                judge=judge,
            )
        samples_per_s = count / (time.perf_counter() - started)
        with progress_task(trainer, "scoring", metrics.ticks(intervals=ending) or None) as advance:
            values = metrics.compute(intervals=ending, advance=advance) | dict(drawn.paired)
            figures = values | scoring.figures_beside(metrics, self._floor, values, count, further=self._further)
            nearness = self._nearness(trainer, metrics, drawn) if ending else None
            if judge is not None:
                self._show_extremes(trainer, judge.extremes())
            if nearness is not None:
                figures["memorised_share"] = float(nearness["share"])
            report = self._report(trainer, module, metrics, values, nearness, nfe=drawn.nfe)
            if trainer.is_global_zero:
                report.to_json(self.path)
        record(
            trainer,
            {f"val/{name}": value for name, value in figures.items()} | {"time/samples_per_s": samples_per_s},
        )
        self._summary = {"nfe": drawn.nfe, "samples_per_s": round(samples_per_s, 2), "num_samples": count}

    def _nearness(
        self, trainer: pl.Trainer, metrics: GenerativeMetrics, drawn: scoring.Drawn
    ) -> dict[str, float | int | str]:
        """Memorisation, told and drawn by the first process from the first samples of all of them."""
        from ornstein.metrics.statistics import from_first

        data, samples = data_of(trainer), scoring.together(drawn)
        options = {"training": data.train, "batch_size": self.batch_size}

        def look() -> dict[str, float | int | str]:
            found = scoring.memorisation(metrics, samples.images, held_out=data.val, **options)
            picture = scoring.draw_neighbours(metrics, samples.images, **options)
            with pictures_may_fail(self):
                save_png(picture, self.folder / "nearest_training_images.png")
            show_image(trainer, "samples/nearest_training_images", picture)
            return found

        return from_first(look)

    def _show_extremes(self, trainer: pl.Trainer, extremes: Extremes) -> None:
        """The most and the least realistic samples, as a picture and as a table; on the first rank."""
        if not trainer.is_global_zero:
            return
        data = data_of(trainer)
        options = {"training": data.train, "class_names": getattr(data, "class_names", None) or ()}
        picture = draw_extremes(extremes, **options)
        with pictures_may_fail(self):
            save_png(picture, self.folder / FILE)
        show_image(trainer, "samples/best_and_worst", picture)
        rows = extremes_rows(extremes, **options)
        show_table(trainer, "samples/best_and_worst_table", columns=COLUMNS, rows=rows)

    def _count(self, metrics: GenerativeMetrics | None) -> int:
        if metrics is None:
            return 0
        return metrics.num_samples if self.num_samples is None else self.num_samples

    def _ready(self, trainer: pl.Trainer, module: DiffusionModule) -> GenerativeMetrics | None:
        """The metrics with their reference, made at the first call; None where there is nothing to measure with."""
        if self._metrics is None and self._factory is not None:
            from ornstein.metrics import WeightsMissing

            factory, self._factory = self._factory, None
            with progress_task(trainer, "loading metrics"):
                try:
                    metrics = factory()
                except WeightsMissing as error:
                    log.warning("no figures of the samples: %s", error)
                    return None
                if metrics is None:
                    return None
                self._metrics = metrics.to(module.device)
                real = getattr(data_of(trainer), "reference", None) or data_of(trainer).train
                scoring.set_references(metrics, real, batch_size=self.batch_size)
                count = self._count(metrics)
                if count:
                    self._floor = scoring.floor_of(metrics, real, count, batch_size=self.batch_size)
                    self._further = scoring.further_floors(metrics, real, count, batch_size=self.batch_size)
        return self._metrics

    def _report(
        self,
        trainer: pl.Trainer,
        module: DiffusionModule,
        metrics: GenerativeMetrics,
        values: dict[str, float],
        nearness: dict[str, float | int | str] | None,
        *,
        nfe: int,
    ) -> MetricReport:
        assert self._floor is not None
        averaged = module.evaluation_network() is not module.network
        facts = scoring.sampling_facts(
            module,
            sampler=module.sampler,
            guidance=module.guidance,
            weights="ema" if averaged else "model",
            nfe=nfe,
            seed=self.seed,
            ema=_length(trainer) if averaged else None,
        )
        return metrics.report(
            values,
            label_protocol=scoring.label_protocol(module),
            sampling={"step": trainer.global_step, "processes": trainer.world_size} | facts,
            floor=self._floor.to_dict(),
            memorisation=nearness,
        )

    def summary(self) -> dict[str, float | int]:
        """NFE per sample, samples a second and their number, of the newest figures."""
        return self._summary


def _length(trainer: pl.Trainer) -> dict[str, float | int | bool]:
    """How long the averages of the weights are."""
    from ornstein.training.ema import EMA

    return next(
        (
            {"decay": ema.decay, "warmup": ema.warmup, "every": ema.every, "updates": ema.updates}
            for ema in callbacks_of(trainer, EMA)
        ),
        {},
    )
