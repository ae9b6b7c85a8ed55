"""Composing and training from Python, as ``python train.py`` does from the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from ornstein.cli.launch import as_ours, conf_dir, find_mistake, register_resolvers, remove_untouched
from ornstein.cli.words import check_words
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.cli.load import Run


def compose_train(overrides: Sequence[str] = (), *, run_dir: str | Path | None = None) -> DictConfig:
    """The config that ``python train.py OVERRIDES`` would train, validated as there; nothing is trained or written.

    Args:
        overrides: what would stand on the command line, such as ``["model=dit", "scheduler=cosine"]``.
        run_dir: the run's folder; ``outputs/train/<date>/<time>`` below the working directory unless given.

    Returns:
        The whole config. Interpolations are kept and can all be resolved: a node prints as it was written, and
        ``OmegaConf.to_yaml(cfg, resolve=True)`` prints values.

    Raises:
        OrnsteinError: an unknown key or option, or a combination that cannot train or cannot sample.
    """
    from ornstein.cli.validate import validate

    outer = HydraConfig.instance().cfg
    try:
        with _hydra(), as_ours():
            cfg = compose("train", overrides=_words(overrides, run_dir), return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            # What asks Hydra for its value is written out: nobody answers once the caller has the config.
            OmegaConf.update(cfg, "paths.run_dir", str(Path(cfg.hydra.run.dir).absolute()))
            with open_dict(cfg):
                del cfg["hydra"]
            _write_out(cfg)
            validate(cfg)
            return cfg
    finally:
        HydraConfig.instance().cfg = outer


def train(overrides: Sequence[str] = (), *, run_dir: str | Path | None = None) -> Run:
    """Trains as ``python train.py OVERRIDES`` does, and opens the run: ``run = ornstein.train(["model=dit"])``.

    Args:
        overrides: what would stand on the command line; ``resume=FOLDER`` goes on with that run in its own folder.
        run_dir: the run's folder; ``outputs/train/<date>/<time>`` below the working directory unless given.

    Raises:
        OrnsteinError: an unknown key or option, a combination that cannot work, a run that cannot be gone on with, or
            both ``resume=FOLDER`` and ``run_dir``.
    """
    from ornstein.cli.load import load
    from ornstein.cli.resume import prepare_resume
    from ornstein.cli.stored import open_run
    from ornstein.cli.trust import targets

    words = _words(overrides, None)
    config_name = prepare_resume(words)
    if config_name != "train" and run_dir is not None:
        raise OrnsteinError("resume=FOLDER goes on in that folder: leave run_dir out.")
    with _hydra() as app, as_ours():
        job = app.run(config_name, _train, _words(words, run_dir), with_log_configuration=False)
    if isinstance(job.return_value, Exception):
        raise _as_ours(job.return_value)
    # The caller has just run whatever the config names, so all of it is trusted.
    return load(job.return_value, trust_targets=list(targets(open_run(job.return_value).config)))


def _train(cfg: DictConfig) -> str | Exception:
    """Trains and gives the run's folder, or the user's mistake: Hydra prints a line above whatever is raised."""
    from ornstein.cli.train import train as run_command

    try:
        run_command(cfg)
    except Exception as error:
        mistake = find_mistake(error)
        if mistake is None:
            raise
        remove_untouched(Path(HydraConfig.get().runtime.output_dir))
        return mistake
    return str(Path(cfg.paths.run_dir).absolute())


@contextmanager
def _hydra() -> Iterator[Any]:
    """Hydra over ``conf/``; one that is running already is set aside and put back."""
    register_resolvers()
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir()), job_name="train"):
            yield GlobalHydra.instance().hydra
    finally:
        GlobalHydra.instance().hydra = outer


def _write_out(node: Any) -> None:
    """Puts values in the place of texts that ask Hydra for them, below ``node``."""
    written: Any = OmegaConf.to_container(node, resolve=False)
    for key in range(len(node)) if OmegaConf.is_list(node) else list(node):
        if OmegaConf.is_interpolation(node, key):
            if "${hydra:" in str(written[key]):
                OmegaConf.update(node, str(key), node[key])
        elif not OmegaConf.is_missing(node, key) and OmegaConf.is_config(node[key]):
            _write_out(node[key])


def _as_ours(mistake: Exception) -> OrnsteinError:
    return mistake if isinstance(mistake, OrnsteinError) else OrnsteinError(str(mistake))


def _words(overrides: Sequence[str], run_dir: str | Path | None) -> list[str]:
    if isinstance(overrides, str):
        raise OrnsteinError(f"overrides={overrides!r} is one text: give a list, {overrides.split()} say.")
    check_words("train", overrides)
    if run_dir is None:
        return list(overrides)
    text = str(Path(run_dir).absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return [*overrides, f"hydra.run.dir='{text}'"]
