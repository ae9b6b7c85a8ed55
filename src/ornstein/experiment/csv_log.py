"""The logger that is always there: ``metrics.csv`` in the run folder."""

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ornstein.experiment.metrics_file import MetricsFile


class CSVLogger(Logger):
    """Lightning logger that writes one ``metrics.csv`` a run, one row a step, columns growing as keys appear.

    Unlike Lightning's own it goes on with the file of a resumed run:
    :class:`ornstein.experiment.ResumableLogs` calls :meth:`truncate` so that no step appears twice. Only
    rank zero touches the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """``path``: the file itself, ``<run folder>/metrics.csv``; opened at the first row."""
        super().__init__()
        self.path = Path(path)
        self._file: MetricsFile | None = None

    @property
    def name(self) -> str:
        """What Lightning calls this logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Empty: a run has one ``metrics.csv``."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        """The open file (on other ranks Lightning's dummy). Raises as :class:`MetricsFile` does."""
        if self._file is None:
            self._file = MetricsFile(self.path)
        return self._file

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Put ``metrics`` into the row of ``step`` (the last row's where none is given).

        Raises:
            ValueError: for a value that is neither a number nor a text.
        """
        if step is None:
            step = self.experiment.last_step or 0
        self.experiment.add(metrics, step=step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder's ``config.yaml`` holds them."""

    @property
    def last_step(self) -> int | None:
        """The largest step that has a row; None while there is none."""
        return self.experiment.last_step

    @rank_zero_only
    def truncate(self, after_step: int) -> None:
        """Cut the rows of steps greater than ``after_step``, to be written again by the run that resumes."""
        if self.path.exists():
            self.experiment.truncate(after_step=after_step)

    @rank_zero_only
    def sync(self) -> None:
        """Force what was logged to the disk."""
        if self._file is not None:
            self._file.sync()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Force the rows to the disk; logging may go on afterwards."""
        self.sync()

    @rank_zero_only
    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
