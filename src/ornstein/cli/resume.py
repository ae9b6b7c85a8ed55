"""Going on with a run: by name, or the newest unfinished one of the same identity."""

from __future__ import annotations

import os
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ornstein.cli.launch import peek_argument, remove_untouched, take_argument
from ornstein.cli.stored import open_run
from ornstein.errors import OrnsteinError
from ornstein.experiment import RunDirectory
from ornstein.experiment.identity import find_unfinished, identity


def prepare_resume(argv: list[str]) -> str:
    """Makes a stored run the primary config where ``resume=FOLDER`` is given; returns the primary config's name.

    The run's own config with its interpolations is composed, so that ``trainer.max_steps=2000`` beside ``resume=`` also
    reaches whatever follows from it. The run goes on in its own folder.

    Raises:
        OrnsteinError: the folder is not a run.
    """
    named = peek_argument(argv, "resume")
    if named in (None, "", "auto", "null"):
        return "train"
    take_argument(argv, "resume")
    stored = open_run(str(named), key="resume")
    if stored.checkpoint is not None:
        raise OrnsteinError(
            f"resume={named} is a file: name its run, resume={stored.folder}, which goes on from its newest checkpoint."
        )
    folder = stored.folder.resolve()
    config = dict(stored.config)
    config["resume"] = str(named)
    config["paths"] = {**config.get("paths", {}), "run_dir": str(folder)}
    ConfigStore.instance().store(name="resumed", node=config)
    argv += [f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]
    return "resumed"


def open_run_directory(cfg: DictConfig) -> RunDirectory:
    """The folder that this run writes to; with ``resume=auto`` an unfinished one of the same identity, if any.

    Under a requeue (SLURM sets ``SLURM_RESTART_COUNT``) ``auto`` is the default.

    Raises:
        OrnsteinError: ``resume`` names a run that has no checkpoint yet.
    """
    from ornstein.cli.build import plain

    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    if cfg.resume == "auto" or (cfg.resume is None and requeued):
        fresh = Path(cfg.paths.run_dir)
        root = Path(cfg.paths.output_root) / str(cfg.task)
        found = find_unfinished(root, identity(plain(cfg)))
        if found is not None and found.path.resolve() != fresh.resolve():
            OmegaConf.update(cfg, "paths.run_dir", str(found.path.resolve()))
            remove_untouched(fresh)
            return found
        return RunDirectory(fresh)
    run = RunDirectory(cfg.paths.run_dir)
    if cfg.resume is not None and run.last_checkpoint() is None:
        raise OrnsteinError(
            f"resume={cfg.resume}: the run has no checkpoint to go on from; start it again without resume=."
        )
    if cfg.resume is None and run.last_checkpoint() is not None:
        raise OrnsteinError(
            f"{run.path} holds a run already: go on with it by resume={run.path}, or give this one another folder."
        )
    return run


def check_checkpoint(cfg: DictConfig, run: RunDirectory) -> None:
    """Whether what the run goes on from, if anything, fits the config; before a file of the run is touched.

    Raises:
        OrnsteinError: the newest checkpoint is of another network.
    """
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        return
    import torch

    from ornstein.experiment import AtomicCheckpointIO

    with torch.device("meta"):
        network = instantiate(cfg.model.network)
    expected = {f"network.{name}": value.shape for name, value in network.state_dict().items()}
    weights = AtomicCheckpointIO().load_checkpoint(checkpoint)["state_dict"]
    if expected != {name: value.shape for name, value in weights.items() if name.startswith("network.")}:
        raise OrnsteinError(
            f"{checkpoint} is of another network than the one asked for: leave out what changes its shape (model.*, "
            "data.*, codec.*), or train it afresh without resume=."
        )


def remember(cfg: DictConfig, run: RunDirectory) -> None:
    """Makes what was changed beside ``resume=FOLDER`` the run's own, so that the next start goes on with it."""
    if cfg.resume not in (None, "auto") and (run.path / ".hydra" / "config.yaml").is_file():
        run.write_text(".hydra/config.yaml", OmegaConf.to_yaml(cfg))
