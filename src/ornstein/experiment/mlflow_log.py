"""MLflow: a database in the run's own folder, or whatever server ``tracking_uri`` names.

**Resuming.** A run keeps its MLflow id in ``mlflow_run_id.txt`` of its folder and goes on in the same MLflow run. What
MLflow has already, the steps between the checkpoint and the kill, is not logged a second time: MLflow forgets no point,
and the resumed run would give the same values. A store that does not know the id gets a new run.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ornstein.errors import Pruned
from ornstein.experiment.atomic import write_text
from ornstein.experiment.logger_guard import reason
from ornstein.experiment.logger_options import check_mlflow
from ornstein.experiment.run_dir import read_config

RUN_ID = "mlflow_run_id.txt"
# Names of files have another sign where a key has a slash.
_PICTURE = re.compile(r"images/(?P<key>.+?)[+%]step[+%](?P<step>\d+)[+%]timestamp")
# Nothing is sent to MLflow's makers, and a server that is gone costs seconds and not minutes of training.
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # what a store answers to an id of another
_chosen: set[str] = set()
_LOUD = ("alembic", "mlflow.store.db.utils", "mlflow.utils.git_utils", "lightning.pytorch.loggers.mlflow")


def mlflow_logger(
    run_dir: str | os.PathLike[str],
    experiment: str = "ornstein",
    *,
    name: str | None = None,
    tracking_uri: str | None = None,
    tags: Sequence[str] | None = None,
) -> RunMLFlowLogger | None:
    """The MLflow logger of the run in ``run_dir``; None on other ranks, and after one warning where it cannot start.

    Args:
        run_dir: the run's folder.
        experiment: what MLflow files the run under.
        name: the run's name there.
        tracking_uri: ``sqlite:///FILE`` or a server's address; None takes ``MLFLOW_TRACKING_URI``, or else
            ``mlflow/mlflow.db`` in the run's folder, with pictures beside it.
        tags: set on the run, each as ``true``.

    Raises:
        OrnsteinError: MLflow is not installed.
    """
    check_mlflow(tracking_uri)
    if getattr(rank_zero_only, "rank", 0):
        return None
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    for loud in _LOUD:
        logging.getLogger(loud).setLevel(logging.CRITICAL)
    named = _named_store()
    store = tracking_uri or named or _own_store(Path(run_dir))
    if store != named:
        _chosen.add(store)
    try:
        return RunMLFlowLogger(run_dir, experiment, name=name, tracking_uri=store, tags=list(tags or ()))
    except Exception as error:  # whatever MLflow trips over, the training is worth more
        warnings.warn(f"MLflow could not start ({reason(error)}): this run goes on without it", stacklevel=2)
        return None


def _named_store() -> str | None:
    """What the user's environment names; MLflow writes there itself what an earlier run of this process has chosen."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    return None if named in _chosen else named


def _own_store(run_dir: Path) -> str:
    folder = run_dir.absolute() / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def _pictures_of(store: str) -> str | None:
    """Where a database of one's own keeps its files: beside it. A server knows itself."""
    if not store.startswith("sqlite:///"):
        return None
    return (Path(store.removeprefix("sqlite:///")).absolute().parent / "artifacts").as_uri()


class RunMLFlowLogger(MLFlowLogger):
    """Lightning's ``MLFlowLogger`` bound to a run folder; made by :func:`mlflow_logger`, which says what it takes."""

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        experiment: str,
        *,
        name: str | None,
        tracking_uri: str,
        tags: Sequence[str],
    ) -> None:
        self.run_dir = Path(run_dir)
        known = self.run_dir / RUN_ID
        super().__init__(
            experiment_name=experiment,
            run_name=name,
            tracking_uri=tracking_uri,
            tags=dict.fromkeys(tags, "true"),
            artifact_location=_pictures_of(tracking_uri),
            run_id=known.read_text(encoding="utf-8").strip() if known.is_file() else None,
        )
        self._known_steps: dict[str, int] = {}  # of each key, the last that MLflow has
        self._logged_at: dict[str, int] = {}  # the last step of each key in this process
        self._known_pictures: set[tuple[str, int]] = set()

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.run_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client; the run is begun, or taken up again, at first use."""
        if self._initialized:
            return self._mlflow_client
        fresh = not self._take_up()
        client = super().experiment
        if fresh:
            assert self._run_id is not None
            write_text(self.run_dir / RUN_ID, self._run_id + "\n")
            if (config := self.run_dir / "config.yaml").is_file():
                self.log_hyperparams(read_config(config))
                client.log_artifact(self._run_id, str(config))
        return client

    def _take_up(self) -> bool:
        """Whether the store knows the run; what it has of it is remembered."""
        if self._run_id is None:
            return False
        from mlflow.exceptions import MlflowException

        client: Any = self._mlflow_client
        try:
            metrics = client.get_run(self._run_id).data.metrics
        except MlflowException as error:
            if error.error_code not in _UNKNOWN:  # a server that does not answer now: the run is not another one
                raise
            self._run_id = None
            return False
        client.update_run(self._run_id, status="RUNNING")
        for key in metrics:
            self._known_steps[key] = max(point.step for point in client.get_metric_history(self._run_id, key))
        with suppress(MlflowException, OSError):  # no pictures yet
            for file in client.list_artifacts(self._run_id, "images"):
                if (found := _PICTURE.match(file.path)) is not None:
                    self._known_pictures.add((re.sub("[~#]", "/", found["key"]), int(found["step"])))
        return True

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log those of a row's figures that MLflow does not have yet; what several rows of a step repeat, once."""
        _ = self.experiment
        new = dict(metrics)
        if step is not None:
            new = {key: value for key, value in new.items() if step > self._known_steps.get(key, -1)}
            new = {key: value for key, value in new.items() if step != self._logged_at.get(key)}
            self._logged_at |= dict.fromkeys(new, step)
        if new:
            super().log_metrics(new, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **options: Any) -> None:
        """Log pictures (Pillow or arrays) under ``key``, several as ``key_0``, ``key_1``, ..."""
        client = self.experiment
        for number, image in enumerate(images):
            name = key if len(images) == 1 else f"{key}_{number}"
            if (re.sub("[~#]", "/", name), step) not in self._known_pictures:
                client.log_image(self._run_id, image, key=name, step=step or 0)

    @rank_zero_only
    def log_video(self, key: str, videos: list[Any], step: int | None = None, **options: Any) -> None:
        """Log films (files) under ``films/key``."""
        for film in videos:
            self.experiment.log_artifact(self.run_id, str(film), f"films/{key}/step_{step or 0:06d}")

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """End the run in MLflow. One that a search has pruned has not failed, whatever ended it: it is tagged."""
        pruned = isinstance(sys.exception(), Pruned)  # which Lightning is handling when it says "failed"
        super().finalize("success" if pruned else status)
        if pruned and self._initialized:
            self.experiment.set_tag(self.run_id, "pruned", "true")

    @rank_zero_only
    def close(self) -> None:
        """Nothing: how the run ended has been said by Lightning."""
