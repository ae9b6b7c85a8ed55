"""``python train.py``: compose, validate, seed, build, fit or resume, evaluate, write the summary."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ornstein.cli.failures import told_failures
from ornstein.cli.launch import fail, launch
from ornstein.errors import OrnsteinError, Pruned

if TYPE_CHECKING:
    from ornstein.experiment import RunDirectory, Summary


def main() -> None:
    """Entry point: a fresh run, or with ``resume=FOLDER`` that folder's run, gone on with."""
    from ornstein.cli.resume import prepare_resume
    from ornstein.cli.together import prepare_ranks
    from ornstein.cli.train_sweep import job_of_sweep, prepare_sweep

    try:
        prepare_sweep(sys.argv)
        config_name = prepare_resume(sys.argv)
        prepare_ranks(sys.argv)
    except OrnsteinError as error:
        fail(error)
    launch(config_name, job_of_sweep(train))


def train(cfg: DictConfig) -> dict[str, float]:
    """One training run, from its composed config to its summary; returns the final figures.

    Raises:
        OrnsteinError: what cannot work, before the run's folder is opened and before anything is trained.
    """
    from ornstein.cli.job import needs_processes, run_processes
    from ornstein.cli.resume import check_resumed
    from ornstein.cli.together import check_processes
    from ornstein.cli.validate import validate

    check_resumed(cfg)
    validate(cfg)
    check_processes(cfg)
    if (processes := needs_processes(cfg)) > 1:
        return run_processes(cfg, processes)
    with told_failures(cfg):
        return _run(cfg)


def _run(cfg: DictConfig) -> dict[str, float]:
    """The same, in this process."""
    from ornstein.cli.batch_size import settle_batch_size
    from ornstein.cli.build import build_callbacks, build_data, build_trainer, matmul_precision
    from ornstein.cli.latents import open_latents
    from ornstein.cli.quiet import quiet_libraries
    from ornstein.cli.resume import check_checkpoint, open_run_directory
    from ornstein.experiment import Summary, set_determinism

    quiet_libraries()
    run = open_run_directory(cfg)
    settle_batch_size(cfg, run)
    set_determinism(int(cfg.seed), deterministic=bool(cfg.trainer.deterministic))
    trainer = build_trainer(cfg, callbacks=build_callbacks(cfg))
    data = build_data(cfg)
    data.setup()
    open_latents(cfg, data)
    from ornstein.training.callbacks.preemption import Preempted

    try:
        with run.lock():
            check_checkpoint(cfg, run)
            # Told within, so that the summary has the sentence, and around, where it cannot be written.
            with Summary(run) as summary, told_failures(cfg), matmul_precision(cfg.model.get("matmul_precision")):
                return _fit(cfg, data, trainer, run, summary)
    except Pruned as stop:
        return dict(stop.figures)
    except Preempted as stop:
        stop.hand_over()  # when all that this job writes is written
        raise


def _fit(cfg: DictConfig, data: Any, trainer: Any, run: RunDirectory, summary: Summary) -> dict[str, float]:
    from ornstein.cli.announce import announce, conclude, interrupted
    from ornstein.cli.autoencoder import build_autoencoder, measure_codec, trains_autoencoder
    from ornstein.cli.build import build_loggers, build_module, plain
    from ornstein.cli.resume import remember
    from ornstein.experiment import close_loggers, describe_environment

    run.write_config(plain(cfg))
    remember(cfg, run)
    run.write_json("environment.json", describe_environment(seed=int(cfg.seed)))
    fresh = run.last_checkpoint() is None
    module: Any = build_autoencoder(cfg, fresh=fresh) if trains_autoencoder(cfg) else build_module(cfg, fresh=fresh)
    # Latents that are read bring the scale that they were written with.
    if fresh and not trains_autoencoder(cfg) and cfg.data.get("latents") is None:
        measure_codec(module, data, trainer.strategy.root_device)
    loggers = trainer.loggers = build_loggers(cfg)
    try:
        checkpoint = run.last_checkpoint()
        summary.update(**announce(cfg, module, data, trainer, run, checkpoint))
        pruned = None
        try:
            trainer.fit(
                module, data, ckpt_path=None if checkpoint is None else os.fspath(checkpoint), weights_only=True
            )
        except Pruned as stop:
            pruned = stop
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for callback in trainer.callbacks:
            if hasattr(callback, "summary"):
                summary.update(**callback.summary())
        summary.update(**figures, steps=trainer.global_step, images_seen=module.images_seen)
    except (KeyboardInterrupt, SystemExit) as stop:
        interrupted(run)
        if isinstance(stop, SystemExit) and not stop.code:  # Lightning's answer to SIGTERM
            raise SystemExit(128 + signal.SIGTERM) from stop
        raise
    finally:
        close_loggers(loggers)
    conclude(run, figures)
    if pruned is not None:
        print(pruned)
        pruned.figures = figures
        raise pruned
    return figures


if __name__ == "__main__":
    main()
