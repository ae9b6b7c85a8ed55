"""``train.py -m``: failed jobs let the others go on, a report at the end, ``sweep.resume=`` for what is missing."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ornstein.cli.launch import note_failed, take_argument, tell
from ornstein.cli.sweep import FAILED, read_json, recorded
from ornstein.errors import OrnsteinError

AGAIN = "sweep"  # what resume= says in the jobs of a sweep that is taken up again
NAMED = 20
ENDED_WELL = ("finished", "pruned")  # the second in a search


class TrainSweep(Callback):
    """Hydra's callback: names the jobs that failed and writes ``report.html`` when all of a multirun have ended."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Tells of the sweep in ``hydra.sweep.dir``, and that it has failed if a job of it has."""
        from ornstein.experiment.lock import is_writer

        if not is_writer():
            return
        folder = Path(str(config.hydra.sweep.dir))
        try:
            failed = finish(folder, search="study_name" in (config.hydra.sweeper or {}))
        except Exception as error:  # Hydra would make a warning of it
            traceback.print_exc()
            tell(OrnsteinError(f"the report of {folder} could not be written ({error}); every run is there."))
            failed = {"report": str(error)}
        note_failed(failed)


def finish(folder: Path, *, search: bool = False) -> dict[str, str]:
    """Writes the report of a sweep, prints what became of it, and returns the failed jobs with their reasons."""
    from ornstein.experiment.report.collect import differing, natural, typed
    from ornstein.experiment.report.page import write_report

    jobs = [place.parents[1] for place in folder.rglob(".hydra/overrides.yaml")]
    if not jobs:
        return {}
    failed = {str(job.relative_to(folder)): reason for job in jobs if (reason := reason_of(job)) is not None}
    running = _of_others(folder, failed) if search else set()
    failed = {job: why for job, why in failed.items() if job not in running}
    if any((job / "config.yaml").is_file() for job in jobs):
        told = [{"name": job, "status": "failed", "reason": why} for job, why in failed.items()]
        print(f"report     {write_report(folder, failures=told)}")
    pruned = sum(read_json(job / "summary.json").get("status") == "pruned" for job in jobs)
    ended = f"{len(jobs) - len(failed) - len(running) - pruned} finished" + (f", {pruned} pruned" if pruned else "")
    ended += f", {len(running)} running" if running else ""
    print(f"sweep      {len(jobs)} jobs, {ended}, {len(failed)} failed, in {folder}")
    asked = {str(job.relative_to(folder)): typed(job / ".hydra" / "overrides.yaml") for job in jobs} if failed else {}
    own = differing(list(asked.values()))
    for job in sorted(failed, key=natural)[:NAMED]:
        print(f"  job {job} failed: {failed[job]}")
        if words := " ".join(f"{key}={asked[job][key]}" for key in own if key in asked[job]):
            print(f"    asked: {words}")
    if search:
        print(f"python train.py -m sweep.resume={folder} hydra.sweeper.n_trials=N     searches on, to N trials in all")
    elif failed:
        print(f"python train.py -m sweep.resume={folder}     runs what failed or is missing")
    return failed


def reason_of(job: Path) -> str | None:
    """Why a job of a sweep has no finished run; None of one that has, or that a search has pruned."""
    summary, failed = read_json(job / "summary.json"), read_json(job / FAILED)
    if summary.get("status") in ENDED_WELL:
        return None
    return str(failed.get("error") or summary.get("error") or "it was killed, or never began")


def _of_others(folder: Path, jobs: Iterable[str]) -> set[str]:
    """Those of a search's jobs that have not ended while another of its workers is at work, who will tell of them."""
    lives = import_module("hydra_plugins.ornstein_optuna._worker").lives  # by the name that Hydra has of it
    if not any(map(lives, (folder / ".search").glob("worker_*.json"))):
        return set()
    ends = {job: read_json(folder / job / "summary.json").get("status") for job in jobs}
    return {job for job, end in ends.items() if end in (None, "running") and not (folder / job / FAILED).is_file()}


def job_of_sweep(body: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """A training that may be one of a sweep's: a failure is told in its folder, what is finished is not repeated."""

    @wraps(body)
    def run(cfg: DictConfig) -> Any:
        if cfg.resume != AGAIN:
            return recorded(body)(cfg)
        folder = Path(str(cfg.paths.run_dir))
        summary = read_json(folder / "summary.json")
        if summary.get("status") in ENDED_WELL:
            print(f"{summary['status']:<10} {folder}, nothing to do")
            return {name: value for name, value in summary.items() if isinstance(value, int | float)}
        (folder / FAILED).unlink(missing_ok=True)
        return recorded(body)(cfg)

    return run


def prepare_sweep(argv: list[str]) -> None:
    """Makes ``sweep.resume=FOLDER`` the command line that the sweep in that folder was started with, in that folder.

    What else is said beside it comes last and so has the last word: another launcher, say.

    Raises:
        OrnsteinError: no sweep is there.
    """
    named = take_argument(argv, "sweep.resume")
    if named is None:
        return
    folder = Path(named.strip("'\"")).expanduser()
    stored = folder / "multirun.yaml"
    if not stored.is_file():
        raise OrnsteinError(
            f"sweep.resume={named} is no folder of a sweep (it has no multirun.yaml): name one such as "
            "outputs/train/multirun/DATE/TIME."
        )
    # As they were typed: interpolations among them are of the jobs' configs, not of this file.
    loaded: Any = OmegaConf.to_container(OmegaConf.load(stored), resolve=False)
    asked = loaded["hydra"]["overrides"]
    given = [word for word in argv[1:] if word not in ("-m", "--multirun")]
    own = ["hydra.sweep.dir=", "hydra.mode=", "resume="]
    if any(word.startswith("hydra/launcher=") for word in given):  # another one does not know the first one's keys
        own += ["hydra/launcher=", "hydra.launcher."]
    words = [str(word) for word in [*asked["hydra"], *asked["task"]] if not str(word).startswith(tuple(own))]
    argv[1:] = ["-m", *words, *given, f"hydra.sweep.dir='{folder.resolve()}'", f"resume={AGAIN}"]


def in_its_folder(cfg: DictConfig) -> bool:
    """Whether a run goes on in the folder that its sweep gave it, whatever is there."""
    return bool(cfg.resume == AGAIN)
