"""Going on with a run: by name, or the newest unfinished one of the same identity."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from ornstein.cli.launch import peek_argument, remove_untouched, take_argument
from ornstein.cli.start import build_network
from ornstein.cli.stored import open_run
from ornstein.cli.trust import TRAINED, check_targets
from ornstein.errors import OrnsteinError
from ornstein.experiment import RunDirectory, find_unfinished, identity

# Groups of a stored run of which another option may be chosen: nothing of them lies in the checkpoint's tensors.
OPEN_GROUPS = ("trainer", "callbacks", "logger", "metrics", "sampler", "guidance")
# What else may be changed. All the rest either makes the run another one or, like the optimizer's numbers, comes back
# with the checkpoint and would silently have no effect.
OPEN_KEYS = (
    "lr_schedule",
    "ema",
    "name",
    "clip_x0",
    "dynamic_threshold",
    "data.root",
    "data.download",
    "data.latents",
    "conditioner.cache",
    "conditioner.encoder",
    "data.num_workers",
    "data.exact_resume",
    "data.eval_batch_size",
    "model.compile",
    "model.matmul_precision",
    "trust_targets",
    "traceback",
    "hydra",
)
# Choosing another of these is another matter than changing its numbers; and a run goes on in its own folder.
CLOSED = ("ema", "lr_schedule", "hydra.run.dir")
_OVERRIDE = re.compile(r"[+~]{0,2}(?P<key>[A-Za-z_][\w./@-]*)(?P<given>=?)(?P<value>.*)", re.DOTALL)


def prepare_resume(argv: list[str]) -> str:
    """Makes a stored run the primary config where ``resume=FOLDER`` is given; returns the primary config's name.

    The run's own config with its interpolations is composed, so that ``trainer.max_steps=2000`` beside ``resume=`` also
    reaches whatever follows from it. The run goes on in its own folder.

    Raises:
        OrnsteinError: the folder is not a run, or something is to be changed that a run which goes on cannot change.
    """
    named = peek_argument(argv, "resume")
    if named in (None, "", "auto", "null", "sweep"):
        return "train"
    take_argument(argv, "resume")
    stored = open_run(str(named), key="resume")
    if stored.checkpoint is not None:
        raise OrnsteinError(
            f"resume={named} is a file: name its run, resume={stored.folder}, which goes on from its newest checkpoint."
        )
    chosen = _check_changes(argv)
    folder = stored.folder.resolve()
    # Hydra's own part and a defaults list could call or bring in anything before the config is looked at.
    config: dict[str, Any] = {key: value for key, value in stored.config.items() if key not in ("hydra", "defaults")}
    config["resume"], config["trust_targets"] = str(named), []
    if "sampler" in chosen:
        chosen.pop("sampler/grid", None)  # that sampler's defaults list has a place for it
    elif "sampler/grid" in chosen:
        # Without the run's own grid, so that the one that is chosen takes the place of all of it.
        if "grid" not in (config.get("sampler") or {}):
            raise OrnsteinError(
                f"sampler/grid={chosen['sampler/grid']}: the run's own sampler takes no grid; name the sampler too: "
                f"sampler=ddim sampler/grid={chosen['sampler/grid']}."
            )
        config["sampler"] = {key: value for key, value in config["sampler"].items() if key != "grid"}
    if chosen:
        config = {key: value for key, value in config.items() if key not in chosen}
        config["defaults"] = ["_self_", *({group: option} for group, option in chosen.items())]
    config["paths"] = {**config.get("paths", {}), "run_dir": str(folder)}
    ConfigStore.instance().store(name="resumed", node=config)
    argv += [f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]
    return "resumed"


def _check_changes(words: Sequence[str]) -> dict[str, str | list[str] | None]:
    """Refuses overrides that have no effect on a run that goes on; gives the options chosen of its open groups.

    Raises:
        OrnsteinError: names the overrides and what can be changed.
    """
    refused: list[str] = []
    chosen: dict[str, str | list[str] | None] = {}
    for word in words:
        match = _OVERRIDE.fullmatch(word)
        if match is None or not (match["given"] or word.startswith("~")):
            continue
        key, value = match["key"], match["value"]
        if key in (*OPEN_GROUPS, "sampler/grid") and match["given"] and not value.startswith("{"):
            several = value[1:-1].replace(" ", "").split(",") if value[:1] == "[" else value  # logger=[csv,wandb]
            chosen[key] = None if value in ("", "null") else several
        elif not _may_change(key):
            refused.append(word)
    if refused:
        raise OrnsteinError(
            f"{', '.join(refused)} cannot be changed beside resume=: the run goes on with the model, data and "
            "objective that it began with, and its optimizer's state comes back with the checkpoint; leave it out, or "
            f"start a new run. What can be changed: {', '.join(f'{group}.*' for group in OPEN_GROUPS)}, lr_schedule.*, "
            "ema.*, data.root, data.num_workers and model.compile."
        )
    return chosen


def _may_change(key: str) -> bool:
    below = any(key == opened or key.startswith((f"{opened}.", f"{opened}/")) for opened in (*OPEN_GROUPS, *OPEN_KEYS))
    return below and key not in CLOSED


def check_resumed(cfg: DictConfig) -> None:
    """Refuses a stored config that would call something this package does not know, before anything of it is built.

    ``trust_targets=[PREFIX]`` beside ``resume=FOLDER`` allows more, for this start alone.

    Raises:
        OrnsteinError: names the target and the option that allows it.
    """
    if cfg.resume in (None, "auto", "sweep") or "trust_targets" not in cfg:
        return
    check_targets(cfg, list(cfg.trust_targets), groups=TRAINED)
    with open_dict(cfg):
        del cfg["trust_targets"]


def open_run_directory(cfg: DictConfig) -> RunDirectory:
    """The folder that this run writes to; with ``resume=auto`` an unfinished one of the same identity, if any.

    Under a requeue (SLURM sets ``SLURM_RESTART_COUNT``) ``auto`` is the default.

    Raises:
        OrnsteinError: ``resume`` names a run that has no checkpoint yet.
    """
    from ornstein.cli.build import plain
    from ornstein.cli.train_sweep import in_its_folder

    if in_its_folder(cfg):
        return RunDirectory(cfg.paths.run_dir)
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
        OrnsteinError: the newest checkpoint is of another network, or of a stream that other workers read.
    """
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        return
    import torch

    from ornstein.experiment import AtomicCheckpointIO

    with torch.device("meta"):
        network = build_network(cfg)
    expected = {f"network.{name}": value.shape for name, value in network.state_dict().items()}
    stored = AtomicCheckpointIO().load_checkpoint(checkpoint)
    if place := stored.get("StreamModule"):
        from ornstein.data.stream_place import Place

        # Before the change is remembered; how many devices there are shows later.
        own = {**place["shape"], "num_workers": int(cfg.data.num_workers)}
        Place(**place).misfit(own, exact=bool(cfg.data.exact_resume), batches=place["batches"])
    weights = stored["state_dict"]
    if expected != {name: value.shape for name, value in weights.items() if name.startswith("network.")}:
        raise OrnsteinError(
            f"{checkpoint} is of another network than the one asked for: leave out what changes its shape (model.*, "
            "data.*, codec.*), or train it afresh without resume=."
        )


def remember(cfg: DictConfig, run: RunDirectory) -> None:
    """Makes what was changed beside ``resume=FOLDER`` the run's own, so that the next start goes on with it."""
    if cfg.resume not in (None, "auto", "sweep") and (run.path / ".hydra" / "config.yaml").is_file():
        run.write_text(".hydra/config.yaml", OmegaConf.to_yaml(cfg))
