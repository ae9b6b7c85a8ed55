"""Weights & Biases: online where credentials are, offline otherwise; never a prompt, never the end of a run.

**Resuming.** A run keeps its W&B id in ``wandb_id.txt`` of its folder. Offline, each start writes one more segment
(``wandb/offline-run-<time>-<id>``) of the same id, and ``wandb sync`` joins them in order. Before a resumed run logs,
rows of steps after the checkpoint are cut from the earlier segments, and rows before it that W&B had not written when
it was killed (up to 32 KiB) are logged again from ``metrics.csv``, pictures from the files beside the segment
(:mod:`ornstein.experiment.wandb_segments`): together the segments hold each step once. Tables that were lost so stay
lost. Online, a resumed run goes on in the same W&B run: W&B takes no second row of a step that it has, and what it
lacks before the checkpoint is logged again. (``wandb.init(resume_from=...)`` could rewind a run; W&B has to switch that
on for an account, and the rows that it would cut are those that a resumed run repeats.)

**x axes.** What is logged at one optimizer step is one row of that number (W&B's own ``_step``, so that media sliders
of different runs stand at equal steps). Every row carries ``trainer/global_step``, ``time/wall_s`` (seconds of
training, earlier starts of the run included) and, once it was logged, ``images_seen``; panels may be drawn over any of
them. W&B gives a figure one axis of its own, the step here; so quality figures (``val/...``) are logged twice more, as
``by_images_seen/...`` and ``by_wall_time/...``, whose axes are those.
"""

import os
import secrets
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ornstein.experiment.atomic import write_text
from ornstein.experiment.logger_options import check_wandb_mode, check_wandb_model
from ornstein.experiment.run_dir import read_config
from ornstein.experiment.wandb_artifacts import log_beginning, log_model, sweep_of, tags_of
from ornstein.experiment.wandb_credentials import has_credentials as has_credentials
from ornstein.experiment.wandb_segments import cut_segments, refill

_STEP = "trainer/global_step"
_WALL = "time/wall_s"
_QUALITY = "val/"
_AXES = {"by_images_seen/": "images_seen", "by_wall_time/": _WALL}


def wandb_logger(
    run_dir: str | os.PathLike[str],
    project: str,
    *,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    group: str | None = None,
    job_type: str | None = None,
    choices: Mapping[str, Any] | None = None,
    tags: Sequence[str] | None = None,
    mode: str | None = None,
    log_code: bool = True,
    log_model: str | bool = False,
) -> "RunWandbLogger":
    """The W&B logger of the run in ``run_dir``; all its files lie below that folder.

    ``config``: what W&B shows as the run's config; None takes the folder's ``config.yaml`` when logging begins.
    ``group``: runs that stand together; None is the sweep that the run's folder lies in, or else ``job_type``.
    ``choices``: options of config groups, which W&B's config has beside the config; ``tags``: None makes one of each
    choice, ``model=dit``. ``log_code`` and ``log_model`` (false, ``best`` or ``all``): what is uploaded as artifacts,
    see :mod:`ornstein.experiment.wandb_artifacts`.

    ``mode``: ``online``, ``offline`` or ``disabled``; None takes ``WANDB_MODE``, or else online exactly where
    credentials exist (``WANDB_API_KEY``, ``WANDB_IDENTITY_TOKEN_FILE``, or W&B's host in the netrc file). Online
    without credentials becomes offline, because it could only ask for them. Offline prints one line that says how to
    sync. wandb is imported when the first value is logged, and where that fails the run goes on after one warning.

    Raises:
        OrnsteinError: for a ``mode`` or ``log_model`` that does not exist.
    """
    check_wandb_model(log_model)
    wanted = check_wandb_mode(mode) or ("online" if has_credentials() else "offline")
    if wanted == "online" and not has_credentials():
        wanted = "offline"
    if wanted == "offline":
        _say(f"W&B logs offline; to upload this run: wandb sync {_segments(run_dir)}")
    chosen = dict(choices or {})
    return RunWandbLogger(
        run_dir,
        project,
        name=name,
        config=config,
        group=group or sweep_of(Path(run_dir)) or job_type,
        job_type=job_type,
        choices=chosen,
        tags=tags_of(chosen) if tags is None else list(tags),
        mode=wanted,
        log_code=log_code,
        log_model=log_model,
    )


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

    Made by :func:`wandb_logger`. ``elapsed`` is the clock of ``time/wall_s`` for rows that do not bring it (pictures);
    ``ResumableLogs`` sets it.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        project: str,
        *,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        group: str | None = None,
        job_type: str | None = None,
        choices: Mapping[str, Any] | None = None,
        tags: list[str] | None = None,
        mode: str = "offline",
        log_code: bool = False,
        log_model: str | bool = False,
    ) -> None:
        """As for :func:`wandb_logger`, with ``mode`` decided."""
        super().__init__(project=project, name=name, save_dir=os.fspath(run_dir), log_model=False)
        self.run_dir = Path(run_dir)
        self.mode = mode
        self.dead = False
        self._config = config
        self._group, self._job_type = group, job_type
        self._choices, self._tags = choices or {}, tags
        self._log_code, self._log_which = log_code, log_model
        self._at: int | None = None
        self._known: set[str] = set()
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

    def resume_from(self, step: int) -> None:
        """Has W&B hold what was logged up to ``step``, once, and nothing later; -1: nothing at all.

        To be called before this start logs anything. Online, what W&B has of a step stays, and it takes no second row.
        """
        self._guarded(lambda: self._go_on(step))

    def _go_on(self, step: int) -> None:
        run = self.experiment
        if self.dead:
            return
        logged = cut_segments(self.run_dir, after_step=step, live=Path(run.dir).parent)
        known = run.step - 1 if self.mode == "online" else -1
        refill(self.log_metrics, self.run_dir, after_step=known, up_to=step, logged=logged)

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
            config={**(config or {}), **({"choices": dict(self._choices)} if self._choices else {})},
            group=self._group,
            job_type=self._job_type,
            tags=self._tags,
            mode=mode,  # type: ignore[arg-type]
            reinit="create_new",  # a multirun's next run must not log into this one
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        run.define_metric(_STEP)
        run.define_metric("images_seen")
        run.define_metric(_WALL)
        run.define_metric("*", step_metric=_STEP, step_sync=False)
        log_beginning(run, self.run_dir, code=self._log_code, config=config or {})
        return run

    def _die(self, what: str, error: BaseException) -> DummyExperiment:
        self.dead = True
        dummy = DummyExperiment()
        self._experiment = cast(Any, dummy)
        if isinstance(error, ConnectionError) and "wandb" in sys.modules:
            # Its service is gone: the next run of this process gets another, and nothing is asked of this one at exit.
            with suppress(Exception):
                sys.modules["wandb"].teardown()
        _warn(f"W&B {what} ({_reason(error)}): this run goes on without it")
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
        """Log into the row of ``step``. A key that ends in ``images_seen`` is remembered for the rows after it.

        What comes late, at an earlier step than the last row's, joins that one: W&B takes nothing for rows of before.
        """
        for key, value in metrics.items():
            if key.rsplit("/", 1)[-1] == "images_seen":
                self._images_seen = float(value)
        row = dict(metrics)
        if self._images_seen is not None:
            row["images_seen"] = self._images_seen
        if step is None or self._at is None or step > self._at:  # a row that begins has a time in any case
            row.setdefault(_WALL, round(self.elapsed(), 3))
        if step is not None:
            self._at = row[_STEP] = step if self._at is None else max(self._at, step)
        self._guarded(lambda: self._log(row))

    def _log(self, row: dict[str, Any]) -> None:
        """Hands a row to W&B, quality figures over their other axes too."""
        run = self.experiment
        for key, value in list(row.items()):
            if key.startswith(_QUALITY) and isinstance(value, int | float) and not key.endswith(("_low", "_high")):
                for prefix, axis in _AXES.items():
                    copy = prefix + key.removeprefix(_QUALITY)
                    if copy not in self._known:  # by name: of two patterns that fit, W&B does not say which wins
                        self._known.add(copy)
                        run.define_metric(copy, step_metric=axis, step_sync=False)
                    row[copy] = value
        if self._at is not None and not all(isinstance(value, int | float | str) for value in row.values()):
            run.log({_STEP: self._at}, step=self._at)  # W&B names pictures' files by the step that it is at
        run.log(row, step=self._at)

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
        """Log a table under ``key``; Pillow pictures may be among its values."""
        self._guarded(
            lambda: super(RunWandbLogger, self).log_table(key, columns, data and _with_pictures(data), dataframe, step)
        )

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
            self._guarded(lambda: log_model(run, self.run_dir, self._log_which))
            self._guarded(lambda: run.finish(exit_code=exit_code))
            self._experiment = None


def _with_pictures(rows: list[list[Any]]) -> list[list[Any]]:
    """Rows of a table whose Pillow pictures are W&B's."""
    import wandb
    from PIL import Image

    return [[wandb.Image(value) if isinstance(value, Image.Image) else value for value in row] for row in rows]


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)
