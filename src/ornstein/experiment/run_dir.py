"""The run directory: the one place where everything that a run leaves is found (DESIGN, section 5)."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from ornstein.errors import OrnsteinError
from ornstein.experiment import atomic
from ornstein.experiment.lock import FolderLock, is_writer

Status = Literal["running", "finished", "failed", "interrupted", "pruned"]
_STATUSES = ("running", "finished", "failed", "interrupted", "pruned")


class RunDirectory:
    """The folder of one run.

    ========================  =================================================================
    ``config.yaml``           the resolved config, plain YAML
    ``environment.json``      revision, versions, device, seed
    ``checkpoints/``          ``last.ckpt`` and the others
    ``metrics.csv``           one row a step
    ``samples/``              pictures
    ``summary.json``          status and final figures
    ``.lock``                 held by the process that writes here
    ========================  =================================================================

    Everything but ``metrics.csv`` is written atomically, and by rank zero of a distributed run alone: on other
    ranks the writers below do nothing.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        """Open the run folder at ``path``; make it where ``create`` says so. Its own folders come with their files.

        Raises:
            OrnsteinError: where the folder is missing and ``create`` is false, or ``path`` is a file.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise OrnsteinError(f"{self.path} is a file, not a run folder: name the folder that the run made")
        if not create and not self.path.is_dir():
            raise OrnsteinError(f"there is no run folder {self.path}: name one that a training run made")
        if create:
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path / ".lock")

    @property
    def config_path(self) -> Path:
        """``config.yaml``."""
        return self.path / "config.yaml"

    @property
    def environment_path(self) -> Path:
        """``environment.json``."""
        return self.path / "environment.json"

    @property
    def metrics_path(self) -> Path:
        """``metrics.csv``."""
        return self.path / "metrics.csv"

    @property
    def summary_path(self) -> Path:
        """``summary.json``."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """The folder of pictures."""
        return self.path / "samples"

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file of this folder atomically and give its path. Raises ``OSError``."""
        if is_writer():
            atomic.write_text(self.path / name, text)
        return self.path / name

    def write_json(self, name: str, data: Mapping[str, Any]) -> Path:
        """Write a JSON file atomically and give its path. Raises ``OSError``, ``TypeError``."""
        if is_writer():
            atomic.write_json(self.path / name, data)
        return self.path / name

    def write_config(self, config: Mapping[str, Any]) -> Path:
        """Write the resolved config (plain mappings, lists and scalars) as ``config.yaml``.

        Raises:
            OrnsteinError: where the config holds an object that plain YAML has no form for.
        """
        try:
            text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as error:
            raise OrnsteinError(
                f"the config cannot be written to {self.config_path}: {str(error).splitlines()[0]}; resolve "
                "it to plain dicts, lists and scalars first"
            ) from None
        return self.write_text("config.yaml", text)

    def read_config(self) -> dict[str, Any]:
        """The config that the run was started with.

        Raises:
            OrnsteinError: where ``config.yaml`` is missing or no mapping.
        """
        return read_config(self.config_path)

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds; empty where there is none.

        Raises:
            OrnsteinError: where the file is not JSON.
        """
        try:
            return atomic.read_json(self.summary_path)
        except ValueError as error:
            raise OrnsteinError(f"{self.summary_path} is not JSON ({error}): remove it") from None

    def mark(self, status: Status) -> None:
        """Write the run's status into ``summary.json``, beside the figures already there.

        Raises:
            ValueError: for a status that is not running, finished, failed, interrupted or pruned.
        """
        if status not in _STATUSES:
            raise ValueError(f"a run's status is one of {', '.join(_STATUSES)}, not {status!r}")
        self.write_json("summary.json", {**self.summary(), "status": status})

    @property
    def status(self) -> str | None:
        """The status last marked; None where none can be read. A killed run still says ``running``."""
        try:
            return self.summary().get("status")
        except ValueError:
            return None

    @property
    def finished(self) -> bool:
        """Whether the run came to its own end."""
        return self.status == "finished"

    def last_checkpoint(self) -> Path | None:
        """The checkpoint to go on from: the newest whole file of ``checkpoints/``; None where there is none.

        The newest, and ``last.ckpt`` among equals. Files that were cut off (a copy that broke, a full disk)
        are passed over.
        """
        return newest_whole_checkpoint(self.checkpoints)

    def lock(self) -> FolderLock:
        """Take this folder for this process and sweep up what killed writers left; a context manager.

        The lock is held until ``release`` or the process's end. Other ranks than zero take and sweep nothing.

        Raises:
            OrnsteinError: where another process holds it, naming its pid and host.
        """
        self._lock.acquire()
        for folder in (self.path, self.checkpoints) if is_writer() else ():
            for leftover in folder.glob(f".*{atomic.TMP_SUFFIX}"):
                leftover.unlink(missing_ok=True)
        return self._lock


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a ``config.yaml``.

    Raises:
        OrnsteinError: where the file is missing, not YAML, or no mapping.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is ten times as fast, where it was built
    try:
        config = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=loader)
    except FileNotFoundError:
        raise OrnsteinError(f"{path} is missing: is {Path(path).parent} a run folder?") from None
    except yaml.YAMLError as error:
        raise OrnsteinError(
            f"{path} is not YAML ({str(error).splitlines()[0]}): restore it or repeat the run"
        ) from None
    if not isinstance(config, dict):
        raise OrnsteinError(f"{path} holds no mapping: restore it or repeat the run")
    return config


def is_whole_checkpoint(path: str | os.PathLike[str], *, thorough: bool = False) -> bool:
    """Whether a checkpoint's archive has its end (a cut file has not); ``thorough`` checks every byte."""
    if not zipfile.is_zipfile(path):
        return False
    if not thorough:
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def newest_whole_checkpoint(folder: Path, *, but: Path | None = None, thorough: bool = False) -> Path | None:
    """The newest ``*.ckpt`` in ``folder`` that is whole, ``but`` one; None where there is none."""
    candidates = [path for path in folder.glob("*.ckpt") if path.is_file() and path != but]
    candidates.sort(key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"), reverse=True)
    return next((path for path in candidates if is_whole_checkpoint(path, thorough=thorough)), None)
