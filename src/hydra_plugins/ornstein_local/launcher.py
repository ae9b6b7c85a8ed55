"""Jobs of a sweep side by side on this machine; one that is killed (out of memory, say) is a failed one among others.

joblib answers a killed worker by ending all of them, and submitit by an exception in the place of the job's result:
either way the jobs behind would never run, and nobody would be told which one it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn

try:
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher as _Joblib
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher as _Submitit
except ImportError:  # the extra "sweeps" is not installed: then there are no such launchers
    _Joblib = _Submitit = None

log = logging.getLogger(__name__)

if _Joblib is not None:

    class ParallelLauncher(_Joblib):
        """joblib's launcher: of the jobs that end with a killed worker each is told of, and those behind them run."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """Runs the jobs; as often again as workers are killed, from the first that had not begun."""
            from joblib.externals.loky.process_executor import TerminatedWorkerError

            returns: list[JobReturn] = []
            while len(returns) < len(job_overrides):
                began, first = time.time(), initial_job_idx + len(returns)
                try:
                    returns += super().launch(job_overrides[len(returns) :], first)
                except TerminatedWorkerError as error:
                    returns += self._ended(job_overrides[len(returns) :], first, since=began, error=error)
            return returns

        def _ended(
            self, jobs: Sequence[Sequence[str]], first: int, *, since: float, error: BaseException
        ) -> list[JobReturn]:
            """What became of those that had begun, which are the first ones: workers take jobs in their order."""
            from ornstein.cli.lost import folder_of, tell_lost, word_of

            folders = [folder_of(self, job, first + place) for place, job in enumerate(jobs)]
            begun = [place for place, folder in enumerate(folders) if _began(folder, since)]
            reason = "its process was killed, or ended with another's: joblib ends the jobs that run beside one that "
            reason += f"is killed (hydra/launcher=local does not); {str(error).splitlines()[0]}"
            log.error("a worker was killed; the jobs that had not begun go on")
            ends = []
            for folder in folders[: max(begun, default=0) + 1]:
                known = word_of(folder) if _began(folder, since) else None
                ends.append(known if known is not None else tell_lost(folder, reason))
            return ends

    class LocalLauncher(_Submitit):
        """submitit's launcher on this machine: each job is a process of its own, ``n_jobs`` at a time; null is all."""

        def __init__(self, *, n_jobs: int | None = None, **params: Any) -> None:
            super().__init__(**params)
            self.n_jobs = n_jobs

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """Runs the jobs; one that leaves no result is told of."""
            numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
            with ThreadPoolExecutor(self.n_jobs or len(job_overrides)) as pool:
                return list(pool.map(self._one, job_overrides, numbers))

        def _one(self, overrides: Sequence[str], number: int) -> JobReturn:
            from submitit.core.utils import UncompletedJobError

            try:
                (found,) = super().launch([overrides], number)
            except UncompletedJobError as error:
                from ornstein.cli.lost import folder_of, tell_lost, word_of

                told = [line for line in str(error).splitlines() if line.strip()]
                log.error("job %d left no result", number)
                folder = folder_of(self, overrides, number)
                known = word_of(folder)  # killed after its end
                return known if known is not None else tell_lost(folder, f"it left no result: {' '.join(told[:2])}")
            return found


def _began(folder: Path, since: float) -> bool:
    """Whether a job has begun in its folder, where an earlier start of the sweep may have begun it too."""
    place = folder / ".hydra" / "overrides.yaml"
    return place.is_file() and place.stat().st_mtime >= since - 1
