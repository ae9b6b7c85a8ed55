"""Figures of generated images while a model trains and when it has."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from ornstein.training import scoring
from ornstein.training.callbacks.lookup import data_of
from ornstein.training.callbacks.periodic import Periodic
from ornstein.training.callbacks.progress import progress_task
from ornstein.training.limits import check_limits
from ornstein.training.module import DiffusionModule
from ornstein.training.record import record

if TYPE_CHECKING:
    from ornstein.metrics.floor import RealFloor
    from ornstein.metrics.generative import GenerativeMetrics
    from ornstein.metrics.report import MetricReport

log = logging.getLogger(__name__)


class GenerativeEvaluation(Periodic):
    """Logs ``val/fid``, ``val/kid``, ``val/inception_score``, ``val/label_accuracy``, ... of the evaluation
    weights.

    Samples are number 0 to ``num_samples - 1``, their classes balanced, against the training images. Beside
    them: ``val/fid_floor``, what as many real images would score, ``val/real_inception_score``, and at the
    end ``val/memorised_share``, the share of samples nearer to a training image than the held-out images' 5th
    percentile (0.05 by chance). ``evaluation.json`` keeps the newest figures with all that decides them. Over
    several devices each draws its share. Feature weights that are not at hand are told of in one line, and
    training goes on.

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
        self.num_samples, self.seed, self.batch_size = num_samples, seed, batch_size
        self._factory = metrics if num_samples != 0 else None
        self._metrics: GenerativeMetrics | None = None
        self._floor: RealFloor | None = None
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
            )
        samples_per_s = count / (time.perf_counter() - started)
        with progress_task(trainer, "scoring"):
            values = metrics.compute()
            figures = values | scoring.figures_beside(metrics, self._floor, values, count)
            nearness = None
            # Distances to training images take a second pass of features, and say little before the end.
            if trainer.global_step == trainer.max_steps or trainer.should_stop:
                nearness = scoring.memorisation(metrics, drawn.images, held_out=data.val, batch_size=self.batch_size)
                share = torch.tensor(nearness["share"], device=module.device)
                figures["memorised_share"] = float(trainer.strategy.reduce(share, reduce_op="mean"))
            report = self._report(trainer, module, metrics, values, nearness, nfe=drawn.nfe)
            if trainer.is_global_zero:
                report.to_json(self.path)
        record(
            trainer,
            {f"val/{name}": value for name, value in figures.items()} | {"time/samples_per_s": samples_per_s},
        )
        self._summary = {"nfe": drawn.nfe, "samples_per_s": round(samples_per_s, 2), "num_samples": count}

    def _count(self, metrics: GenerativeMetrics | None) -> int:
        if metrics is None:
            return 0
        return metrics.num_samples if self.num_samples is None else self.num_samples

    def _ready(self, trainer: pl.Trainer, module: DiffusionModule) -> GenerativeMetrics | None:
        """The metrics with their reference, made at the first call; None where there is nothing to measure with."""
        if self._metrics is None and self._factory is not None:
            from ornstein.metrics import WeightsMissing, real_floor, reference_statistics

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
                train = data_of(trainer).train
                metrics.set_reference(
                    reference_statistics(metrics.features, train, batch_size=self.batch_size),
                    batch_size=self.batch_size,
                )
                count = self._count(metrics)
                if count:
                    self._floor = real_floor(metrics.features, train, count, batch_size=self.batch_size)
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
        )
        return metrics.report(
            values,
            label_protocol=scoring.label_protocol(module),
            sampling={"step": trainer.global_step} | facts,
            floor=self._floor.to_dict(),
            memorisation=nearness,
        )

    def summary(self) -> dict[str, float | int]:
        """NFE per sample, samples a second and their number, of the newest figures."""
        return self._summary
