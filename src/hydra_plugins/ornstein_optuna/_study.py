"""The study of a search: opened or taken up again, asked for trials, told of them, by several workers at once."""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import check_distribution_compatibility
from optuna.storages import RetryHeartbeatStaleTrialCallback as Retry
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ornstein.errors import OrnsteinError

from ._space import Space, Value
from ._worker import DEAD_AFTER_S, Worker, alone, lives

SAMPLERS = ("tpe", "random", "grid")
RETRIES = 3  # of a trial whose process was killed
FOLDER, WORKER, REASON, MONITOR = "folder", "worker", "reason", "monitor"
# These give every worker the same points, and each takes what the others have left.
_SHARED_SEED = ("BruteForceSampler", "GridSampler", "QMCSampler")


@dataclass(frozen=True)
class Asked:
    """A trial to run: its number, its values by key, its folder, and whether that holds what a killed job left."""

    trial: optuna.Trial
    values: Mapping[str, Value]
    folder: Path
    again: bool

    @property
    def number(self) -> int:
        """Optuna's number of it."""
        return self.trial.number


def build_sampler(asked: Any, space: Space, *, seed: int | None, n_startup_trials: int, several: bool) -> Any:
    """The sampler of ``hydra.sweeper.sampler``.

    Args:
        asked: ``tpe``, ``random``, ``grid``, or a partial that makes an instance of Optuna's.
        space: what is searched.
        seed: of this worker.
        n_startup_trials: random trials before TPE's model decides.
        several: trials run at the same time, so that those that run are taken into account.

    Raises:
        OrnsteinError: another name, or a grid over a continuous range.
    """
    if asked == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=n_startup_trials, constant_liar=several)
    if asked == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if asked == "grid":
        for param in space.params:
            if param.listed() is None:
                raise OrnsteinError(
                    f"hydra.sweeper.sampler=grid tries every combination, and {param.typed} is continuous: give it a "
                    "list or a range, or choose hydra.sweeper.sampler=random."
                )
        return optuna.samplers.BruteForceSampler(seed=seed)
    if callable(asked):
        make = getattr(asked, "func", asked)
        seeded = "seed" in inspect.signature(make).parameters and "seed" not in getattr(asked, "keywords", {})
        try:
            made = asked(seed=seed) if seeded else asked()
        except (TypeError, ValueError, ImportError) as error:
            raise OrnsteinError(f"hydra.sweeper.sampler: {error}") from error
        if isinstance(made, optuna.samplers.BaseSampler):
            return made
    raise OrnsteinError(
        f"hydra.sweeper.sampler={asked} is unknown: choose {', '.join(SAMPLERS)}, or give "
        "{_target_: optuna.samplers....}."
    )


def seed_of(seed: int | None, worker: Worker, *, shared: bool, asked: Any) -> int | None:
    """A worker's own seed, so that no two draw the same points; the first one's is the seed itself.

    ``shared``: the study is of other folders too, whose workers count from 0 as well.
    """
    name = getattr(getattr(asked, "func", asked), "__name__", "BruteForceSampler" if asked == "grid" else "")
    if seed is None or name in _SHARED_SEED or (worker.index == 0 and not shared):
        return seed
    return zlib.crc32(f"{seed} {worker.path if shared else worker.index}".encode())


def open_study(
    storage: optuna.storages.BaseStorage,
    *,
    name: str,
    place: str,
    space: Space,
    monitors: Sequence[str],
    directions: Sequence[str],
    pruner: optuna.pruners.BasePruner,
    resumed: bool,
) -> optuna.Study:
    """The study of this name, made where there is none.

    Raises:
        OrnsteinError: a search is resumed and its study is not there, or the study there looks for another figure or
            draws a key in another way.
    """
    known = {study.study_name for study in storage.get_all_studies()}
    if resumed and name not in known:
        there = f"it holds {', '.join(sorted(known))}" if known else "it holds none"
        raise OrnsteinError(
            f"{place} has no study hydra.sweeper.study_name={name} to go on with ({there}): name the one that was "
            "searched, or start anew without sweep.resume=."
        )
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        directions=[StudyDirection[each.upper()] for each in directions],
        pruner=pruner,
        load_if_exists=True,
    )
    wanted = list(monitors)
    found, held = study.user_attrs.get(MONITOR, wanted), [each.name.lower() for each in study.directions]
    if found != wanted or held != list(directions):
        raise OrnsteinError(
            f"the study {name} in {place} looks for {' and '.join(found)} ({', '.join(held)}), not for "
            f"{' and '.join(wanted)} ({', '.join(directions)}): give this search another hydra.sweeper.study_name."
        )
    _check_space(study, space, place)
    if MONITOR not in study.user_attrs:
        study.set_user_attr(MONITOR, wanted)
    return study


def _check_space(study: optuna.Study, space: Space, place: str) -> None:
    """A key keeps its kind, and a list its values; the ends of a range may change."""
    for trial in study.get_trials(deepcopy=False):
        for param in space.params:
            if param.name not in trial.distributions:
                continue
            try:
                check_distribution_compatibility(trial.distributions[param.name], param.distribution())
            except ValueError:
                raise OrnsteinError(
                    f"{param.typed}: the study {study.study_name} in {place} has drawn {param.name} from another list "
                    "or kind of range: keep that, or give this search another hydra.sweeper.study_name."
                ) from None


class Trials:
    """The trials of a study as one of its workers sees them.

    Args:
        study: with its sampler.
        storage: the study's.
        space: what is searched.
        worker: this one.
        folder: the sweep's, in which a new trial's folder is its number.
        lock_file: what is locked while trials are counted and taken.
        n_trials: how many the study is to have, whoever runs them; None is all of a grid.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: optuna.storages.BaseStorage,
        space: Space,
        *,
        worker: Worker,
        folder: Path,
        lock_file: Path,
        n_trials: int | None,
    ) -> None:
        self.study, self.storage, self.space = study, storage, space
        self.worker, self.folder, self.lock_file = worker, folder, lock_file
        self.wanted = math.inf if n_trials is None else n_trials
        if isinstance(study.sampler, optuna.samplers.BruteForceSampler):
            most = None if n_trials is None else n_trials
            self.wanted = sum(1 for _ in islice(space.grid(), most))

    def ask(self, count: int) -> list[Asked]:
        """At most ``count`` trials to run now: those that a dead worker left first; none when there are enough."""
        with alone(self.lock_file):
            self._take_over()
            taken = []
            for _ in range(count):
                if self.missing() < 1:
                    break
                taken.append(self._ask())
            return taken

    def missing(self) -> float:
        """How many trials neither have ended nor run; those that were tried again in another do not count."""
        trials = self.study.get_trials(deepcopy=False)
        retried = {number for trial in trials for number in Retry.retry_history(trial)}
        counted = [t for t in trials if t.state != TrialState.WAITING and t.number not in retried]
        return self.wanted - len(counted)

    def _ask(self) -> Asked:
        trial = self.study.ask()
        trial.set_user_attr(WORKER, str(self.worker.path.absolute()))
        left = trial.user_attrs.get(FOLDER)
        folder = Path(left) if left is not None else (self.folder / str(trial.number)).absolute()
        if left is None:
            trial.set_user_attr(FOLDER, str(folder))
        return Asked(trial, self.space.suggest(trial), folder, again=left is not None)

    def _take_over(self) -> None:
        """Fails the trials whose worker is gone, and queues each again, with its values, reports and folder."""
        trials = self.study.get_trials(deepcopy=False)
        retried = {number for trial in trials for number in Retry.retry_history(trial)}
        for trial in trials:
            if trial.state != TrialState.RUNNING or _worked_on(trial):
                continue
            tries = len(Retry.retry_history(trial))
            goes_on = tries < RETRIES
            if goes_on and trial.number not in retried:
                Retry(inherit_intermediate_values=True)(self.study, trial)
            reason = "its process was killed" + ("; it was tried again" if goes_on else f", {tries + 1} times in all")
            self._set(trial, REASON, reason)
            self._tell(trial.number, state=TrialState.FAIL)
            print(f"trial {trial.number} was left by a process that is gone" + ("; it goes on" if goes_on else ""))

    def complete(self, asked: Asked, values: Sequence[float]) -> FrozenTrial:
        """The trial has ended with these figures."""
        return self._tell(asked.number, values=list(values))

    def prune(self, asked: Asked) -> FrozenTrial:
        """The trial was ended early; its value is the last that it reported."""
        return self._tell(asked.number, state=TrialState.PRUNED)

    def fail(self, asked: Asked, reason: str) -> FrozenTrial:
        """The trial has failed, for this reason."""
        asked.trial.set_user_attr(REASON, reason)
        return self._tell(asked.number, state=TrialState.FAIL)

    def _set(self, trial: FrozenTrial, key: str, value: str) -> None:
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        number = self.storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
        self.storage.set_trial_user_attr(number, key, value)

    def _tell(self, number: int, **what: Any) -> FrozenTrial:
        try:
            return self.study.tell(number, **what)
        except (RuntimeError, ValueError):
            # A sampler that has nothing left says so by ending an optimize() that there is not; the trial is told. And
            # one that was taken for dead finds that another has told it.
            told = self.study.get_trials(deepcopy=False)[number]
            if not told.state.is_finished():
                raise
            return told


def _worked_on(trial: FrozenTrial) -> bool:
    """Whether a running trial's worker lives. One that has not said who it is yet, or whose file cannot be seen from
    here, is given as long as one that is silent.
    """
    worker = trial.user_attrs.get(WORKER)
    if worker is not None and Path(worker).is_file():
        return lives(worker)
    return trial.datetime_start is not None and (datetime.now() - trial.datetime_start).total_seconds() < DEAD_AFTER_S
