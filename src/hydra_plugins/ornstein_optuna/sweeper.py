"""A multirun that searches: Optuna says what is tried next, Hydra's launchers run it, a study on disk remembers it.

Hydra imports this module whenever it starts, so Optuna waits until there is a search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ._space import Space
    from ._study import Asked, Trials

_OWN = ".search"  # the workers' files and their lock, in the sweep's folder
DIRECTIONS = ("minimize", "maximize")


class OptunaSweeper(Sweeper):
    """Runs the trials of an Optuna study as the jobs of a multirun; its options are in conf/hydra/sweeper/optuna.yaml.

    Each trial's folder is its number. A trial that fails is told to the study with its reason, and the search goes on.
    """

    def __init__(
        self,
        *,
        n_trials: int | None = 20,
        n_jobs: int | None = None,
        monitor: str | Sequence[str] = "val/fid",
        direction: str | Sequence[str] = "minimize",
        sampler: Any = "tpe",
        pruner: Any = "median",
        n_startup_trials: int = 6,
        seed: int | None = 0,
        storage: str | None = None,
        study_name: str = "search",
        params: Mapping[str, Any] | None = None,
        trial: int | None = None,
    ) -> None:
        self.n_trials, self.n_jobs, self.n_startup_trials = n_trials, n_jobs, n_startup_trials
        self.monitor, self.direction = _listed(monitor), _listed(direction)
        self.sampler, self.pruner, self.seed = sampler, pruner, seed
        self.storage, self.study_name, self.trial = storage, study_name, trial
        self.params: dict[str, Any] = _plain(params) or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Takes what Hydra gives, and its launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Searches until the study has its trials; returns the jobs of this worker, batch after batch.

        What cannot work is told in one sentence before a job starts, and ends the command with exit code 1.
        """
        from ornstein.cli.launch import fail
        from ornstein.training.trials import check_optuna, quiet_optuna

        try:
            check_optuna()
            with quiet_optuna():
                return self._search(arguments)
        except OrnsteinError as error:
            fail(error)
            raise

    def _search(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        from ornstein.experiment.atomic import write_text
        from ornstein.training.trials import build_pruner, open_storage, place_of

        from . import _study
        from ._results import write_results
        from ._space import read_space
        from ._worker import Worker

        self._check_numbers()
        assert self.config is not None and self.hydra_context is not None
        space = read_space(self.params, arguments, loader=self.hydra_context.config_loader)
        self._compose_one(space)
        folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        place = place_of(self.storage, folder)
        pruner = build_pruner(_made(self.pruner), n_startup_trials=self.n_startup_trials)
        asked_sampler = _made(self.sampler, partial=True)
        at_once = self._at_once()
        options: dict[str, Any] = {"n_startup_trials": self.n_startup_trials, "several": at_once > 1}
        _study.build_sampler(asked_sampler, space, seed=self.seed, **options)  # refused before a folder is made
        resumed = "resume=sweep" in arguments
        if resumed and "://" not in place and not Path(place).is_file():
            raise OrnsteinError(
                f"{place} is not there: this search has no study to go on with; start it anew, without sweep.resume=."
            )
        storage = open_storage(place)
        study = _study.open_study(
            storage,
            name=self.study_name,
            place=place,
            space=space,
            monitors=self.monitor,
            directions=self.direction,
            pruner=pruner,
            resumed=resumed,
        )
        write_text(folder / "multirun.yaml", OmegaConf.to_yaml(self.config))
        returns = []
        with Worker(folder / _OWN) as worker:
            shared = Path(place).parent != folder
            seed = _study.seed_of(self.seed, worker, shared=shared, asked=asked_sampler)
            study.sampler = _study.build_sampler(asked_sampler, space, seed=seed, **options)
            trials = _study.Trials(
                study,
                storage,
                space,
                worker=worker,
                folder=folder,
                lock_file=_lock_file(place, folder),
                n_trials=self.n_trials,
            )
            print(f"search     {self._told(trials, space)}; {place}")
            try:
                while batch := trials.ask(at_once):
                    returns.append(self._run(batch, trials, folder, place))
            except (KeyboardInterrupt, SystemExit):
                print(f"stopped    python train.py -m sweep.resume={folder}     goes on")
                raise
            write_results(study, space, folder=folder, monitors=self.monitor, command=self._command)
        return returns

    def _check_numbers(self) -> None:
        """Raises ``OrnsteinError`` for counts that are none, and for directions that do not fit the figures."""
        least = {"n_trials": 1, "n_jobs": 1, "n_startup_trials": 0, "seed": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is None and name != "n_startup_trials" and (name != "n_trials" or self.sampler == "grid"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise OrnsteinError(f"hydra.sweeper.{name}={value} must be a whole number, at least {smallest}.")
        unknown = [each for each in self.direction if each not in DIRECTIONS]
        if unknown or len(self.direction) != len(self.monitor):
            raise OrnsteinError(
                f"hydra.sweeper.direction={_shown(self.direction)}: give minimize or maximize for each of "
                f"hydra.sweeper.monitor={_shown(self.monitor)}."
            )

    def _at_once(self) -> int:
        """How many trials are launched together: as many as the launcher runs side by side, where it says so."""
        if self.n_jobs is not None:
            return self.n_jobs
        assert self.config is not None
        jobs = OmegaConf.select(self.config, "hydra.launcher.n_jobs", default=1)
        if isinstance(jobs, int) and jobs < 0:
            from joblib import cpu_count

            return max(1, int(cpu_count()) + 1 + jobs)
        return int(jobs or 1)

    def _told(self, trials: Trials, space: Space) -> str:
        missing, keys = trials.missing(), ", ".join(param.name for param in space.params)
        return f"{missing:g} of {trials.wanted:g} trials for {_shown(self.monitor)} over {keys}"

    def _compose_one(self, space: Space) -> None:
        """One job's config, so that an unknown key is told before anything starts.

        Raises:
            OrnsteinError: in Hydra's words.
        """
        for param in space.params:
            if param.when:  # its key may be there only then
                continue
            values = param.listed() or [param.low]
            word = space.words({param.name: values[0]})
            reason = self._refused([*space.fixed, *word])
            if reason is not None:
                raise OrnsteinError(f"{param.typed}: {reason}")

    def _refused(self, words: Sequence[str]) -> str | None:
        """Why a job with these overrides has no config; None where it has one."""
        assert self.config is not None and self.hydra_context is not None
        try:
            self.hydra_context.config_loader.load_sweep_config(self.config, list(words))
        except (HydraException, OmegaConfBaseException) as error:
            cause = error.__cause__
            told = [str(error), *([str(cause)] if isinstance(cause, OmegaConfBaseException) else [])]
            return ". ".join(line.split("\n")[0].strip().rstrip(".") for line in told) + "."
        return None

    def _run(self, batch: Sequence[Asked], trials: Trials, folder: Path, place: str) -> Sequence[JobReturn]:
        """Launches trials together, and tells the study what became of each."""
        from ornstein.cli.launch import note_failed

        jobs: list[tuple[Asked, list[str]]] = []
        for asked in batch:
            words = [*trials.space.fixed, *trials.space.words(asked.values)]
            reason = self._refused(words)
            if reason is not None:
                note_failed([str(asked.number)])
                self._tell(asked, trials, trials.fail(asked, reason))
                continue
            if asked.again:
                words = [*(word for word in words if not word.startswith("resume=")), "resume=sweep"]
            within = asked.folder.name if asked.folder.parent == folder else str(asked.folder)
            own = {"trial": str(asked.number), "storage": _quoted(place)}
            words += [f"hydra.sweeper.{key}={value}" for key, value in own.items()]
            jobs.append((asked, [*words, f"hydra.sweep.subdir={_quoted(within)}"]))
        if not jobs:
            return []
        assert self.launcher is not None
        # Two workers' numbers interleave: folders are named above, and this is but what the jobs are called.
        returns: Sequence[JobReturn | None]
        try:
            returns = self.launcher.launch([words for _, words in jobs], initial_job_idx=jobs[0][0].number)
        except Exception as error:  # a launcher that lost a job: what the jobs left in their folders counts
            print(f"the launcher stopped: {type(error).__name__}: {error}")
            returns = [None] * len(jobs)
        for (asked, _), found in zip(jobs, returns, strict=True):
            self._conclude(asked, trials, found)
        return [found for found in returns if found is not None]

    def _conclude(self, asked: Asked, trials: Trials, found: JobReturn | None) -> None:
        """Tells the study how a job has ended.

        Raises:
            OrnsteinError: it ended well and has no such figure: no other will.
        """
        from ornstein.cli.sweep import FAILED, read_json
        from ornstein.cli.train_sweep import reason_of
        from ornstein.metrics.figures.naming import same_figure

        # Of a job that failed it may be another's, whose folder it was to be.
        summary = {} if (asked.folder / FAILED).is_file() else read_json(asked.folder / "summary.json")
        if summary.get("status") == "pruned":
            self._tell(asked, trials, trials.prune(asked))
            return
        value = found._return_value if found is not None and found.status == JobStatus.COMPLETED else None
        if value is None and summary.get("status") == "finished":
            value = summary
        if value is None:
            error = found._return_value if found is not None and found.status == JobStatus.FAILED else None
            reason = f"{type(error).__name__}: {error}" if error is not None else str(reason_of(asked.folder))
            self._tell(asked, trials, trials.fail(asked, " ".join(reason.split())))
            return
        figures = dict(value) if isinstance(value, Mapping) else {self.monitor[0]: value}
        names = [same_figure(monitor, figures) for monitor in self.monitor]
        if None in names:
            missing = self.monitor[names.index(None)]
            told = f"hydra.sweeper.monitor={missing} is no final figure of a run here"
            trials.fail(asked, told)
            own = [name for name, figure in figures.items() if "/" in name and isinstance(figure, int | float)]
            raise OrnsteinError(f"{told}; there are {', '.join(sorted(own)) or 'none'}.")
        values = [float(figures[name]) for name in names if name is not None]
        if not all(map(math.isfinite, values)):
            self._tell(asked, trials, trials.fail(asked, f"{_shown(self.monitor)} is {', '.join(map(str, values))}"))
            return
        self._tell(asked, trials, trials.complete(asked, values))

    def _tell(self, asked: Asked, trials: Trials, told: Any) -> None:
        from ._results import line_of

        print(line_of(trials.study, told))

    def _command(self, values: Mapping[str, Any], space: Space) -> list[str]:
        """The overrides that train a trial again by itself, with what ``hparams_search=`` sets beside the search."""
        from hydra.types import RunMode

        from ornstein.experiment.report.collect import flat

        assert self.config is not None and self.hydra_context is not None
        words = [*space.fixed, *space.words(values)]
        own = ("hparams_search=", "hydra.", "hydra/", "resume=")
        bare = [word for word in words if not word.lstrip("+").startswith(own)]
        load = self.hydra_context.config_loader.load_configuration
        job, configs = self.config.hydra.job, []
        hydras = [word for word in self.config.hydra.overrides.hydra if not word.startswith("hydra.mode=")]
        for given in ([*hydras, *words], bare):
            config = load(job.config_name, overrides=list(given), run_mode=RunMode.MULTIRUN)
            held = OmegaConf.to_container(config, resolve=False)
            assert isinstance(held, dict)
            configs.append(flat({str(key): value for key, value in held.items() if key not in ("hydra", "resume")}))
        wanted, there = configs
        beside = [
            f"{'' if key in there else '+'}{key}={'null' if value is None else value}"
            for key, value in wanted.items()
            if (key not in there or there[key] != value) and "${" not in str(value)
        ]
        return [*bare, *beside]


def _listed(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list | tuple | ListConfig) else [str(value)]


def _shown(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"[{','.join(values)}]"


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _made(asked: Any, *, partial: bool = False) -> Any:
    """What ``{_target_: ...}`` names, or a partial of it; a name as it is.

    Raises:
        OrnsteinError: it cannot be made.
    """
    from hydra.utils import instantiate

    node = _plain(asked)
    if not isinstance(node, dict):
        return node
    try:
        return instantiate(OmegaConf.create(node), _partial_=partial)
    except (HydraException, ValueError, TypeError) as error:
        option = "sampler" if partial else "pruner"
        raise OrnsteinError(f"hydra.sweeper.{option}: {error.__cause__ or error}") from error


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def _lock_file(place: str, folder: Path) -> Path:
    """What workers lock to take trials: beside a file that holds the study, else in the sweep's folder."""
    if place.startswith("sqlite:///"):
        return Path(place.removeprefix("sqlite:///") + ".ask")
    return folder / _OWN / "ask" if "://" in place or Path(place).parent == folder else Path(f"{place}.ask")
