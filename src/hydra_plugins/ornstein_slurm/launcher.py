"""Jobs of a sweep as SLURM jobs, none of which can keep the sweep waiting for ever.

What submitit waits for is a job's result, or ``sacct``'s word that the job has ended. A job that was cancelled, or
whose node died, leaves no result, and where a cluster keeps no accounting ``sacct`` says nothing. Here ``squeue`` is
asked too, a job that neither knows any more is lost, and a lost job is a failed one among the others.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as _Submitit
except ImportError:  # the extra "sweeps" is not installed: then there is no such launcher
    _Submitit = None

log = logging.getLogger(__name__)
ASK_EVERY_S = 15
# A job that has just been submitted, or requeued, may be in no list yet.
LOST_AFTER_S = 30
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
)


class Queue:
    """What SLURM says of jobs: ``squeue`` of those that wait and run, ``sacct`` of those that ended, if it is kept."""

    def __init__(self) -> None:
        self._asked = float("-inf")
        self._states: dict[str, str] = {}
        self._last_seen: dict[str, float] = {}

    def state(self, job: str) -> str:
        """The state of a job: ``RUNNING`` until it has ended, then how; ``LOST`` of one that nobody knows."""
        now = time.monotonic()
        self._last_seen.setdefault(job, now)
        if now - self._asked > ASK_EVERY_S:
            states = self._ask(sorted(self._last_seen))
            self._asked = now
            if states is None:  # the controller does not answer: nothing is known, nothing is lost
                self._last_seen = dict.fromkeys(self._last_seen, now)
            else:
                self._states = states
        if job in self._states:
            self._last_seen[job] = now
            return self._states[job] if self._states[job] in ENDED else "RUNNING"
        return "LOST" if now - self._last_seen[job] > LOST_AFTER_S else "RUNNING"

    def _ask(self, jobs: Sequence[str]) -> dict[str, str] | None:
        main = ",".join(dict.fromkeys(job.partition("_")[0] for job in jobs))
        listed = _told("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", f"--jobs={main}")
        if listed is None:
            # "Invalid job id specified": none of them is in the queue any more. Anything else is no answer.
            if _told("squeue", "--noheader", "--format=%i") is None:
                return None
            listed = ""
        ended = _told("sacct", "--noheader", "--parsable2", "--format=JobID,State", f"--jobs={main}") or ""
        return {**_pairs(ended), **_pairs(listed)}


def _told(*command: str) -> str | None:
    """What a command of SLURM's prints; None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _pairs(text: str) -> dict[str, str]:
    rows = (line.split("|") for line in text.splitlines() if "|" in line)
    return {row[0].strip(): row[1].split()[0] for row in rows if "." not in row[0] and row[1].strip()}


if _Submitit is not None:

    class SlurmLauncher(_Submitit):
        """submitit's launcher, whose jobs cannot be waited for in vain; its options are in conf/hydra/launcher."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """Submits the jobs, waits for all of them, and tells in its folder why one left no result."""
            from submitit.slurm import slurm

            from ornstein.cli.lost import folder_of, tell_lost

            # An executor makes its jobs of this class by both names, the second for arrays.
            own, theirs = _job_class(), slurm.SlurmJob
            slurm.SlurmExecutor.job_class = slurm.SlurmJob = own  # type: ignore[misc]
            try:
                returns = list(super().launch(job_overrides, initial_job_idx))
            finally:
                slurm.SlurmExecutor.job_class = slurm.SlurmJob = theirs  # type: ignore[misc]
            for place, found in enumerate(returns):
                if found.status == JobStatus.UNKNOWN:
                    folder = folder_of(self, job_overrides[place], initial_job_idx + place)
                    returns[place] = tell_lost(folder, found._return_value)
            return returns


def _job_class() -> Any:
    """The SLURM job of submitit with other eyes."""
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    queue = Queue()
    jobs: dict[str, Any] = {}
    told: dict[str, str] = {}

    class Watcher(SlurmInfoWatcher):
        def get_state(self, job_id: str, mode: str = "standard") -> str:
            return queue.state(job_id)

        def update(self) -> None:
            """Nothing: the queue is asked for all jobs at once."""

    class Job(SlurmJob):
        watcher = Watcher()
        _results_timeout_s = 5

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            jobs.pop(self.job_id.partition("_")[0], None)  # the array that it belongs to is no job
            jobs[self.job_id] = self

        def wait(self) -> None:
            """Until this one has ended; whichever is lost meanwhile is told of at once."""
            while not self.done():
                for job in list(jobs.values()):
                    job.lost()
                time.sleep(1)

        def lost(self) -> str | None:
            """Why this job will leave no result; None while it may."""
            if self.job_id not in told:
                if self.paths.result_pickle.exists() or not self.watcher.is_done(self.job_id):
                    return None
                time.sleep(2)  # a result may follow the job's end on a slow file system
                if self.paths.result_pickle.exists():
                    return None
                how = queue.state(self.job_id).lower()
                told[self.job_id] = f"SLURM job {self.job_id} left no result ({how}); its log is {self.paths.stderr}"
                log.error(told[self.job_id])
            return told[self.job_id]

        def results(self) -> Any:
            self.wait()
            reason = self.lost()
            return super().results() if reason is None else [JobReturn(status=JobStatus.UNKNOWN, _return_value=reason)]

    return Job
