"""Weights & Biases: online where credentials are, offline otherwise; never a prompt, never the end of a run.

**Resuming.** A run keeps its W&B id in ``wandb_id.txt`` of its folder. Online, a resumed run goes on in the same
W&B run; offline, each start writes one more segment (``wandb/offline-run-<time>-<id>``) of the same id, and
``wandb sync`` joins them in order. W&B's history only grows: what was logged between the checkpoint and the kill
stays in it, and the same steps follow a second time with equal values; a killed offline start also loses what
W&B had not written yet (up to 32 KiB of rows). ``metrics.csv`` is the record with each step once.

**x axes.** Every row carries ``trainer/global_step``, ``wall_time_s`` (seconds of training, earlier starts of the
run included) and, once it was logged, ``images_seen``.
"""

import netrc
import os
import secrets
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ornstein.experiment.atomic import write_text
from ornstein.experiment.logger_options import check_wandb_mode
from ornstein.experiment.run_dir import read_config

_STEP = "trainer/global_step"


def wandb_logger(
    run_dir: str | os.PathLike[str],
    project: str,
    *,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    group: str | None = None,
    tags: Sequence[str] | None = None,
    mode: str | None = None,
) -> "RunWandbLogger":
    """The W&B logger of the run in ``run_dir``; all its files lie below that folder.

    ``config``: what W&B shows as the run's config; None takes the folder's ``config.yaml`` when logging
    begins. ``mode``: ``online``, ``offline`` or ``disabled``; None takes ``WANDB_MODE``, or else online
    exactly where credentials exist (``WANDB_API_KEY``, ``WANDB_IDENTITY_TOKEN_FILE``, or W&B's host in the
    netrc file). Online without credentials becomes offline, because it could only ask for them. Offline
    prints one line that says how to sync. wandb is imported when the first value is logged, and where that
    fails the run goes on after one warning.

    Raises:
        OrnsteinError: for a ``mode`` that does not exist.
    """
    wanted = check_wandb_mode(mode) or ("online" if has_credentials() else "offline")
    if wanted == "online" and not has_credentials():
        wanted = "offline"
    if wanted == "offline":
        _say(f"W&B logs offline; to upload this run: wandb sync {_segments(run_dir)}")
    return RunWandbLogger(run_dir, project, name=name, config=config, group=group, tags=list(tags or ()), mode=wanted)


def has_credentials() -> bool:
    """Whether W&B could log in without asking, by environment or netrc file; wandb is not imported."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        with suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if host in netrc.netrc(str(file)).hosts:
                return True
    return False


def _segments(run_dir: str | os.PathLike[str]) -> Path:
    return Path(run_dir) / "wandb" / "offline-run-*"


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)


def run_id(run_dir: str | os.PathLike[str]) -> str:
    """The W&B id of the run in ``run_dir``, made and kept in ``wandb_id.txt`` at the first call."""
    path = Path(run_dir) / "wandb_id.txt"
    with suppress(FileNotFoundError):
        if known := path.read_text(encoding="utf-8").strip():
            return known
    made = secrets.token_hex(4)
    write_text(path, made + "\n")
    return made


class RunWandbLogger(WandbLogger):
    """Lightning's ``WandbLogger`` bound to a run folder, whose failure costs one warning and not the run.

    Made by :func:`wandb_logger`. ``elapsed`` is the clock of ``wall_time_s``; ``ResumableLogs`` sets it.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        project: str,
        *,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        mode: str = "offline",
    ) -> None:
        """As for :func:`wandb_logger`, with ``mode`` decided."""
        super().__init__(project=project, name=name, save_dir=os.fspath(run_dir), log_model=False)
        self.run_dir = Path(run_dir)
        self.mode = mode
        self.dead = False
        self._config = config
        self._group = group
        self._tags = tags
        self._images_seen: float | None = None
        started = time.monotonic()
        self.elapsed: Callable[[], float] = lambda: time.monotonic() - started

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun at first use; a dummy that takes everything once W&B has failed."""
        if self._experiment is None:
            self._experiment = self._begin()
        return self._experiment

    def _begin(self) -> Any:
        try:
            return self._init(self.mode)
        except Exception as error:  # whatever W&B trips over, the training is worth more
            if self.mode != "online":
                return self._die("could not start", error)
            self.mode = "offline"
            _warn(
                f"W&B could not start online ({_reason(error)}): it logs offline, wandb sync {_segments(self.run_dir)}"
            )
        try:
            return self._init(self.mode)
        except Exception as error:
            return self._die("could not start", error)

    def _init(self, mode: str) -> Any:
        import wandb

        self._id = run_id(self.run_dir)
        config = self._config
        if config is None and (self.run_dir / "config.yaml").exists():
            config = read_config(self.run_dir / "config.yaml")
        run = wandb.init(
            project=self._project,
            name=self._name,
            dir=os.fspath(self.run_dir),
            id=self._id,
            resume="allow" if mode == "online" else None,  # offline it only warns; equal ids join at sync
            config=dict(config) if config is not None else None,
            group=self._group,
            tags=self._tags,
            mode=mode,  # type: ignore[arg-type]
            reinit="create_new",  # a multirun's next run must not log into this one
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        run.define_metric(_STEP)
        run.define_metric("images_seen")
        run.define_metric("wall_time_s")
        run.define_metric("*", step_metric=_STEP, step_sync=False)
        return run

    def _die(self, what: str, error: BaseException) -> DummyExperiment:
        self.dead = True
        dummy = DummyExperiment()
        self._experiment = cast(Any, dummy)
        _warn(f"W&B {what} ({_reason(error)}): this run goes on without it, metrics.csv has everything")
        return dummy

    def _guarded(self, log: Callable[[], Any]) -> None:
        if self.dead:
            return
        try:
            log()
        except Exception as error:
            self._die("stopped working", error)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log one row. A key that ends in ``images_seen`` is remembered for the rows after it."""
        for key, value in metrics.items():
            if key.rsplit("/", 1)[-1] == "images_seen":
                self._images_seen = float(value)
        row: dict[str, Any] = {**metrics, "wall_time_s": round(self.elapsed(), 3)}
        if self._images_seen is not None:
            row["images_seen"] = self._images_seen
        if step is not None:
            row[_STEP] = step
        self._guarded(lambda: self.experiment.log(row))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Add to the run's config."""
        self._guarded(lambda: super(RunWandbLogger, self).log_hyperparams(params))

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log pictures (Pillow, arrays, tensors or paths) under ``key``; ``caption=[...]`` names them."""
        self._guarded(lambda: super(RunWandbLogger, self).log_image(key, images, step, **kwargs))

    @rank_zero_only
    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log films (paths or arrays) under ``key``."""
        self._guarded(lambda: super(RunWandbLogger, self).log_video(key, videos, step, **kwargs))

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Log a table under ``key``."""
        self._guarded(lambda: super(RunWandbLogger, self).log_table(key, columns, data, dataframe, step))

    @rank_zero_only
    def log_summary(self, figures: Mapping[str, Any]) -> None:
        """Set final figures in the run's summary."""
        self._guarded(lambda: self.experiment.summary.update(dict(figures)))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Nothing yet: figures may follow the fit. :meth:`close` ends the W&B run."""

    @rank_zero_only
    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run. A process that ends without it does so by itself."""
        run: Any = self._experiment
        if run is not None:
            self._guarded(lambda: run.finish(exit_code=exit_code))
            self._experiment = None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)
