"""``python train.py``: compose, validate, seed, build, fit or resume, evaluate, write the summary."""

from __future__ import annotations

import os
import sys

from omegaconf import DictConfig

from ornstein.cli.launch import fail, launch
from ornstein.errors import OrnsteinError


def main() -> None:
    """Entry point: a fresh run, or with ``resume=FOLDER`` that folder's run, gone on with."""
    from ornstein.cli.resume import prepare_resume

    try:
        config_name = prepare_resume(sys.argv)
    except OrnsteinError as error:
        fail(error)
    launch(config_name, train)


def train(cfg: DictConfig) -> dict[str, float]:
    """One training run, from its composed config to its summary; returns the final figures."""
    from ornstein.cli.validate import validate

    validate(cfg)

    from ornstein.cli.resume import open_run_directory
    from ornstein.experiment import Summary

    run = open_run_directory(cfg)
    with run.lock(), Summary(run) as summary:
        return _fit(cfg, run, summary)


def _fit(cfg: DictConfig, run, summary) -> dict[str, float]:  # type: ignore[no-untyped-def]
    from hydra.utils import instantiate

    from ornstein.cli.announce import announce
    from ornstein.cli.build import build_callbacks, build_data, build_loggers, build_module, plain
    from ornstein.cli.quiet import quiet_libraries
    from ornstein.experiment import (
        AtomicCheckpointIO,
        ResumableLogs,
        close_loggers,
        describe_environment,
        set_determinism,
    )

    quiet_libraries()
    set_determinism(int(cfg.seed), deterministic=bool(cfg.trainer.deterministic))
    run.write_config(plain(cfg))
    data = build_data(cfg)
    data.setup()
    module = build_module(cfg)
    run.write_json("environment.json", describe_environment(seed=int(cfg.seed)))
    callbacks = [ResumableLogs(), *build_callbacks(cfg)]
    loggers = build_loggers(cfg)
    checkpoint = run.last_checkpoint()
    trainer = instantiate(
        cfg.trainer, logger=loggers, callbacks=callbacks, plugins=[AtomicCheckpointIO()], _convert_="all"
    )
    summary.update(**announce(cfg, module, data, trainer, run, checkpoint))
    try:
        trainer.fit(module, data, ckpt_path=None if checkpoint is None else os.fspath(checkpoint), weights_only=True)
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for callback in trainer.callbacks:
            if hasattr(callback, "summary"):
                summary.update(**callback.summary())
        summary.update(**figures, steps=trainer.global_step, images_seen=module.images_seen)
    finally:
        close_loggers(loggers)
    return figures


if __name__ == "__main__":
    main()
