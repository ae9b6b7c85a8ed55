"""MLflow and TensorBoard read back from what they wrote, and loggers that die."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers.logger import Logger
from PIL import Image

from ornstein.errors import OrnsteinError, Pruned
from ornstein.experiment import CSVLogger, mlflow_logger, tensorboard_logger
from ornstein.experiment.logger_guard import survivable
from ornstein.experiment.logger_options import check_mlflow, check_tensorboard

ROWS = {step: {"train/loss": 1.0 / step, "val/fid": 10.0 * step} for step in (1, 2, 3, 4)}
PICTURE = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


class Breaks(Logger):
    """Fails at its third row."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.finalized = False

    name = version = "breaks"

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step == 3:
            raise ConnectionError("the server\nis gone")
        assert step is not None
        self.rows.append(step)

    def finalize(self, status: str) -> None:
        self.finalized = True


def test_a_logger_that_raises_is_told_of_once_and_the_run_goes_on() -> None:
    logger = survivable(Breaks())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step, row in ROWS.items():
            logger.log_metrics(row, step=step)
        logger.finalize("success")
    assert isinstance(logger, Breaks) and logger.rows == [1, 2] and not logger.finalized
    (only,) = [str(each.message) for each in told]
    assert only == "Breaks stopped logging (ConnectionError: the server is gone): this run goes on without it"


def test_the_record_of_the_run_may_fail(tmp_path: Path) -> None:
    """A disk that refuses metrics.csv is no matter to pass over."""
    logger = survivable(CSVLogger(tmp_path / "file" / "metrics.csv"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        logger.log_metrics({"train/loss": 1.0}, step=1)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from ornstein.experiment import logger_options

    real = importlib.util.find_spec
    gone = {"mlflow", "sqlalchemy", "tensorboard", "tensorboardX"}
    monkeypatch.setattr(logger_options, "find_spec", lambda name: None if name in gone else real(name))
    with pytest.raises(OrnsteinError, match=r"mlflow, sqlalchemy: pip install 'ornstein\[mlflow\]'"):
        check_mlflow()
    gone.remove("mlflow")
    check_mlflow("http://localhost:5000")  # which keeps the database
    with pytest.raises(OrnsteinError, match=r"pip install 'ornstein\[tensorboard\]'"):
        check_tensorboard()


def test_tensorboard_has_rows_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = survivable(tensorboard_logger(tmp_path))
    for step, row in ROWS.items():
        logger.log_metrics(row, step=step)
    logger.log_image(key="samples", images=[PICTURE], step=4)
    film = tmp_path / "film.gif"
    PICTURE.save(film, save_all=True, append_images=[PICTURE.rotate(90)])
    logger.log_video(key="denoising", videos=[str(film)], step=4)
    logger.finalize("success")
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    points = [(event.step, event.value) for event in read.Scalars("val/fid")]
    assert points == [(step, row["val/fid"]) for step, row in ROWS.items()]
    (picture,) = read.Images("samples")
    assert (picture.step, picture.width, picture.height) == (4, 8, 8)
    assert read.Images("denoising")[0].encoded_image_string == film.read_bytes()


@pytest.mark.slow
def test_mlflow_has_each_point_once_over_a_resume_and_may_vanish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a database of the run folder: figures, config and pictures; gone on with, the same run without double points;
    and where the folder is taken away, one line and no exception."""
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "config.yaml").write_text("seed: 3\ndata: {batch_size: 4}\n")

    def logged(steps: tuple[int, ...]) -> Any:
        logger: Any = mlflow_logger(tmp_path, name="tiny", tags=["night"])
        logger = survivable(logger)
        for step in steps:
            logger.log_metrics(ROWS[step], step=step)
            logger.log_metrics({"train/loss": ROWS[step]["train/loss"]}, step=step)  # as images_seen is, in every row
        logger.log_image(key="samples/classes", images=[PICTURE], step=2)
        return logger

    first = logged((1, 2, 3))
    first.finalize("failed")
    first.close()
    assert first.experiment.get_run(first.run_id).info.status == "FAILED"
    second = logged((2, 3, 4))  # a run that was killed after step 3 and goes on from step 1
    assert second.run_id == first.run_id and not getattr(second, "dead", False)
    client = second.experiment
    assert client.get_run(second.run_id).info.status == "RUNNING"
    second.finalize("success")
    second.close()
    run = client.get_run(second.run_id)
    assert run.info.status == "FINISHED" and run.data.tags["night"] == "true" and run.info.run_name == "tiny"
    assert run.data.params == {"seed": "3", "data/batch_size": "4"}
    for key in ("train/loss", "val/fid"):
        points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]
        assert sorted(points) == [(step, row[key]) for step, row in ROWS.items()]
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert len(pictures) == 1
    with Image.open(client.download_artifacts(run.info.run_id, pictures[0])) as found:
        assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(PICTURE))

    for stop, status, tag in ((Pruned("at step 4"), "FINISHED", "true"), (ValueError("no"), "FAILED", None)):
        (tmp_path / "mlflow_run_id.txt").unlink()
        last = logged((1,))
        try:
            raise stop
        except type(stop):  # as Lightning does
            last.finalize("failed")
        run = client.get_run(last.run_id)
        assert (run.info.status, run.data.tags.get("pruned")) == (status, tag)

    shutil.rmtree(tmp_path / "mlflow")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in (5, 6):
            second.log_metrics({"train/loss": 0.1}, step=step)
    assert second.dead and sum("stopped logging" in str(each.message) for each in told) == 1


@pytest.mark.slow
def test_runs_of_one_process_have_a_store_each_unless_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though MLflow puts the store that the first of them has chosen into the environment."""
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for number in range(4):
        if number == 2:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'named.db'}")
        (tmp_path / str(number)).mkdir()
        logger: Any = mlflow_logger(tmp_path / str(number))
        logger.log_metrics({"val/fid": 1.0}, step=1)
        assert (tmp_path / str(number) / "mlflow" / "mlflow.db").is_file() == (number < 2)
    assert len(logger.experiment.search_runs([logger.experiment_id])) == 2
