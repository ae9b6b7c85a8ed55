"""Searches: what is drawn, what is refused, and studies that are shared, killed and taken up again.

The objective is a function of one number, so that trials cost nothing.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from ornstein.cli import launch
from ornstein.errors import OrnsteinError
from ornstein.experiment.atomic import write_json

optuna = pytest.importorskip("optuna")
from optuna.trial import TrialState  # noqa: E402

from hydra_plugins.ornstein_optuna import _results, _study, _worker  # noqa: E402
from hydra_plugins.ornstein_optuna._space import Space, read_space  # noqa: E402
from ornstein.training.trials import build_pruner, open_storage, place_of  # noqa: E402

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # searches do so themselves
SWEEPER = (ROOT / "conf" / "hydra" / "sweeper" / "optuna.yaml").read_text()


class Loader:
    """As much of Hydra's config loader as a space asks: the options of groups."""

    def get_group_options(self, group: str, results_filter: Any = None, **_: Any) -> list[str]:
        return {"opt": ["a", "b"]}.get(group, [])


def space_of(*words: str, **params: Any) -> Space:
    return read_space(params, words, loader=Loader())  # type: ignore[arg-type]


SPACES: list[tuple[str, Any, list[Any]]] = [
    # A word, its distribution, and values that are drawn of it as overrides have them.
    ("x=interval(0, 2)", optuna.distributions.FloatDistribution(0, 2), []),
    ("x=tag(log, interval(1e-5, 1e-2))", optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True), []),
    ("x=int(interval(1, 8))", optuna.distributions.IntDistribution(1, 8), [1, 2, 3, 4, 5, 6, 7, 8]),
    ("x=int(tag(log, interval(1, 8)))", optuna.distributions.IntDistribution(1, 8, log=True), None),
    # Hydra's range ends before its end.
    ("x=range(1, 8, 3)", optuna.distributions.IntDistribution(1, 7, step=3), [1, 4, 7]),
    ("x=range(0, 1, 0.25)", optuna.distributions.FloatDistribution(0, 0.75, step=0.25), [0.0, 0.25, 0.5, 0.75]),
    ("x=range(3, 0, -1)", optuna.distributions.IntDistribution(1, 3), [1, 2, 3]),
    ("opt=a,b", optuna.distributions.CategoricalDistribution(("a", "b")), ["a", "b"]),
    ("x=1,0.5,true,null", optuna.distributions.CategoricalDistribution(("1", "0.5", "True", "null")), None),
    ("x=1,0.5,null,1", optuna.distributions.CategoricalDistribution((1, 0.5, None)), [1, 0.5, None]),
    ("x=[1,2],[1,2,4]", optuna.distributions.CategoricalDistribution(("[1,2]", "[1,2,4]")), ["[1,2]", "[1,2,4]"]),
    ("+x='a b',c", optuna.distributions.CategoricalDistribution(("'a b'", "c")), ["'a b'", "c"]),
]


@pytest.mark.parametrize(("word", "distribution", "values"), SPACES, ids=[row[0] for row in SPACES])
def test_words_become_distributions_and_values_words(word: str, distribution: Any, values: list[Any] | None) -> None:
    space = space_of(word)
    (param,) = space.params
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    drawn = space.suggest(trial)
    assert trial.distributions == {param.name: distribution} and param.distribution() == distribution
    if values is not None:
        assert (param.listed() or []) == values
    text = space.words(drawn)[0]
    assert text.startswith(word.partition("=")[0] + "=")
    # What Hydra reads of it is what was drawn.
    read = space_of(text, "y=1,2").fixed
    assert read == (text,)


def test_the_command_line_has_the_last_word() -> None:
    params = {
        "lr": "tag(log, interval(1e-4, 1e-2))",
        "opt": "choice(a, b)",
        "steps": 200,
        "gamma": {"space": "interval(1, 5)", "when": {"opt": "b"}},
    }
    space = space_of("lr=interval(1, 2)", "~callbacks.trajectory", "+new=3", **params)
    assert [param.name for param in space.params] == ["lr", "opt", "gamma"]
    assert space.params[0].low == 1.0 and not space.params[0].log
    assert space.fixed == ("steps=200", "~callbacks.trajectory", "+new=3")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.suggest(study.ask()) for _ in range(20)]
    assert {values["opt"] for values in drawn} == {"a", "b"}
    assert all(("gamma" in values) == (values["opt"] == "b") for values in drawn)
    # A value takes a key out, and those that wait for another value with it.
    assert [param.name for param in space_of("opt=a", **params).params] == ["lr"]
    assert [param.name for param in space_of("opt=b", **params).params] == ["lr", "gamma"]


def test_a_grid_of_keys_that_wait_for_others() -> None:
    space = space_of(**{"gamma": {"space": "range(0, 3)", "when": {"opt": ["b"]}}, "opt": "a,b"})
    assert list(space.grid()) == [{"opt": "a"}, *({"opt": "b", "gamma": gamma} for gamma in range(3))]


REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (["x=interval(2, 1)"], {}, "from a smaller number to a larger one"),
    (["x=tag(log, interval(0, 1))"], {}, "begins above 0"),
    (["x=tag(foo, interval(0, 1))"], {}, "the tag foo means nothing"),
    (["x=tag(log, choice(1, 2))"], {}, "log is for an interval"),
    (["x=range(2, 2)"], {}, "no number in this range"),
    (["opt=a,c"], {}, "opt=a,c: there is no opt=c; it has a, b"),
    ([], {"opt": "choice(a, c)"}, "hydra.sweeper.params.opt=choice.* there is no opt=c"),
    ([], {"x": "interval(1"}, "hydra.sweeper.params.x=interval.* is not read"),
    ([], {"x": {"range": "1"}}, "hydra.sweeper.params.x has range"),
    (["x=3"], {}, "hydra.sweeper.params is empty"),
    ([], {"x": {"space": "1,2", "when": {"y": 1}}}, "when y has a certain value, and that is neither"),
    (
        [],
        {"x": {"space": "1,2", "when": {"y": 1}}, "y": {"space": "1,2", "when": {"x": 1}}},
        "waits for a key that waits for it",
    ),
]


@pytest.mark.parametrize(("words", "params", "told"), REFUSED, ids=[row[2] for row in REFUSED])
def test_spaces_that_are_none(words: list[str], params: dict[str, Any], told: str) -> None:
    with pytest.raises(OrnsteinError, match=told):
        space_of(*words, **params)


def task(cfg: DictConfig) -> dict[str, float] | None:
    """A bowl whose lowest point is at 0.3; beyond its rim it fails, prunes itself, or dies with the whole command."""
    x = float(cfg.x)
    folder = Path(HydraConfig.get().runtime.output_dir)
    with (folder / "ran").open("a") as file:
        file.write(f"{HydraConfig.get().sweeper.trial} {cfg.resume}\n")
    if cfg.opt.name == "b":
        raise RuntimeError("no b today")
    if x > cfg.die_above and cfg.resume != "sweep":
        raise KeyboardInterrupt
    if x > cfg.prune_above:
        write_json(folder / "summary.json", {"status": "pruned"})
    return {"val/fid_1k": (x - 0.3) ** 2, "val/nan": float("nan")}


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Path, Any]]]:
    """``search("x=interval(0,1)")``: the multirun in this process; gives the sweep's folder and its study."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    conf = tmp_path / "conf"
    for name, text in {
        "hydra/sweeper/optuna.yaml": SWEEPER,
        "opt/a.yaml": "name: a",
        "opt/b.yaml": "name: b",
        "main.yaml": (
            "defaults: [_self_, {opt: a}, {override hydra/sweeper: optuna}, {override hydra/job_logging: none}, "
            "{override hydra/hydra_logging: none}]\nx: 0\nresume: null\ndie_above: 9\nprune_above: 9\n"
        ),
    }.items():
        (conf / name).parent.mkdir(parents=True, exist_ok=True)
        (conf / name).write_text(text)
    monkeypatch.setattr(launch, "_failed_jobs", [])
    monkeypatch.setattr(_results, "write_results", lambda *_, **__: None)  # its own test is below
    folder = tmp_path / "sweep"

    def run(*words: str) -> tuple[Path, Any]:
        own = ["n_trials=6", "pruner=null", *(word.removeprefix("s.") for word in words if word.startswith("s."))]
        given = [word for word in words if not word.startswith("s.")]
        options = [f"hydra.sweeper.{word}" for word in own]
        monkeypatch.setattr(sys, "argv", ["task.py", "-m", f"hydra.sweep.dir={folder}", *options, *given])
        GlobalHydra.instance().clear()
        hydra.main(version_base="1.3", config_path=str(conf), config_name="main")(task)()
        return folder, study_of(folder)

    yield run
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


def study_of(folder: Path) -> Any:
    return optuna.load_study(study_name="search", storage=open_storage(place_of(None, folder)))


def states(study: Any) -> str:
    """A letter a trial: Complete, Pruned, Failed, Running, Waiting."""
    return "".join(trial.state.name[0] for trial in study.trials)


def test_a_search_finds_the_lowest_point_and_outlives_failures(search: Callable[..., Any]) -> None:
    folder, study = search("x=interval(0, 1)", "opt=a,b", "s.n_trials=9", "s.n_startup_trials=4")
    assert len(study.trials) == 9 and set(states(study)) == {"C", "F"}
    for trial in study.trials:
        assert trial.user_attrs["folder"] == str(folder / str(trial.number))
        failed = trial.params["opt"] == "b"
        assert (trial.state == TrialState.FAIL) == failed
        assert trial.user_attrs.get("reason") == ("RuntimeError: no b today" if failed else None)
        if not failed:
            assert trial.value == pytest.approx((trial.params["x"] - 0.3) ** 2)
    # The same seed draws the same, and the search knows when it has its trials.
    again = [trial.params for trial in search("x=interval(0, 1)", "opt=a,b", "s.n_trials=9")[1].trials]
    assert again == [trial.params for trial in study.trials]


def test_a_killed_trial_goes_on_in_its_folder_and_only_what_is_missing_runs(search: Callable[..., Any]) -> None:
    words = ["x=interval(0, 1)", "die_above=0.7", "s.sampler=random"]
    with pytest.raises(KeyboardInterrupt):
        search(*words)
    study = study_of(Path(sys.argv[2].partition("=")[2]))
    killed = len(study.trials) - 1
    assert states(study) == "C" * killed + "R", "random draws of seed 0 exceed 0.7 within 6"
    folder, study = search(*words, "die_above=9", "resume=sweep")
    assert states(study)[killed] == "F" and states(study).count("C") == 6
    followed = study.trials[killed + 1]
    assert followed.params == study.trials[killed].params
    assert followed.user_attrs["folder"] == str(folder / str(killed))
    assert (folder / str(killed) / "ran").read_text().splitlines() == [f"{killed} None", f"{killed + 1} sweep"]
    assert "was killed; it was tried again" in study.trials[killed].user_attrs["reason"]
    # Nobody draws what another worker has drawn.
    assert len({trial.params["x"] for trial in study.trials}) == 6
    before = len(study.trials)
    assert len(search(*words, "resume=sweep", "s.n_trials=8", "die_above=9")[1].trials) == before + 2
    assert [trial.number for trial in _results.ended(study)] == [i for i in range(before + 2) if i != killed]


def trials_in(folder: Path, *, worker: _worker.Worker, n_trials: int) -> _study.Trials:
    storage = open_storage(place_of(None, folder))
    sampler = optuna.samplers.RandomSampler(seed=0)
    return _study.Trials(
        optuna.create_study(study_name="search", storage=storage, sampler=sampler, load_if_exists=True),
        storage,
        space_of("x=interval(0, 1)"),
        worker=worker,
        folder=folder,
        lock_file=folder / "workers" / "ask",
        n_trials=n_trials,
    )


def test_a_worker_that_cannot_be_seen_is_waited_for(tmp_path: Path) -> None:
    """A database may be shared where the folder is not. Whoever comes second to tell of a trial hears what was told."""
    first, second = (trials_in(tmp_path, worker=_worker.Worker(tmp_path / "workers"), n_trials=2) for _ in range(2))
    with first.worker, second.worker:
        (asked,) = first.ask(1)
        first.worker.path.unlink()
        assert [each.number for each in second.ask(2)] == [1], "the first trial is not taken over"
        second.prune(asked)
        assert first.complete(asked, [1.0]).state == optuna.trial.TrialState.PRUNED


def test_trials_that_keep_dying_are_given_up(tmp_path: Path) -> None:
    dead = _worker.Worker(tmp_path / "workers")
    with dead:
        pass
    trials = trials_in(tmp_path, worker=dead, n_trials=1)
    study = trials.study
    for _ in range(1 + _study.RETRIES):
        assert len(trials.ask(1)) == 1
    assert trials.ask(1) == []
    assert states(study) == "F" * (1 + _study.RETRIES) and len({trial.params["x"] for trial in study.trials}) == 1
    (left,) = _results.ended(study)
    assert left.user_attrs["reason"] == "its process was killed, 4 times in all"


def test_pruned_and_unusable_figures(search: Callable[..., Any], tmp_path: Path) -> None:
    _, study = search("x=0.1,0.9", "prune_above=0.5", "s.sampler=grid", "s.n_trials=null")
    assert sorted(states(study)) == ["C", "P"]
    assert launch._failed_jobs == []
    journal = str(tmp_path / "other.journal")
    own = f"hydra.sweep.dir={tmp_path}/other"
    search("x=0.1,0.9", "s.sampler=grid", "s.monitor=val/nan", f"s.storage={journal}", own)
    other = optuna.load_study(study_name="search", storage=open_storage(place_of(journal, ".")))
    assert states(other) == "FF" and "val/nan is nan" in other.trials[0].user_attrs["reason"]


# Words of a search, and of its one sentence. None of them runs a job, but that for the figure.
SENTENCES = [
    (["x=interval(0,1)", "s.monitor=val/loss"], "monitor=val/loss is no final figure of a run here; there are val/fid"),
    (["x=interval(0,1)", "s.direction=down"], "direction=down: give minimize or maximize"),
    (["x=interval(0,1)", "s.monitor=[a,b]"], "for each of hydra.sweeper.monitor=.a,b."),
    (["x=interval(0,1)", "s.n_trials=0"], "n_trials=0 must be a whole number, at least 1"),
    (["x=interval(0,1)", "s.sampler=tp"], "sampler=tp is unknown: choose tpe, random, grid"),
    (["x=interval(0,1)", "s.sampler=grid"], "x=interval.0,1. is continuous"),
    (["x=interval(0,1)", "s.pruner=foo"], "pruner=foo is unknown: choose median, hyperband or null"),
    (["x=interval(0,1)", "s.sampler={_target_: optuna.samplers.Nope}"], "hydra.sweeper.sampler: .*Nope"),
    (["x=interval(0,1)", "resume=sweep"], "study.journal is not there: this search has no study to go on with"),
    (["x=interval(0,1)", "s.storage=/proc/none/here"], "storage=/proc/none/here cannot be opened"),
    (["x=interval(0,1)", "s.storage=foo://bar"], "storage=foo://bar cannot be opened"),
    (["y=interval(0,1)"], "y=interval.0,1.: Could not override 'y'. Key 'y' is not in struct"),
    (["opt=a,c"], "opt=a,c: there is no opt=c; it has a, b"),
]


@pytest.mark.parametrize(("words", "told"), SENTENCES, ids=[row[1] for row in SENTENCES])
def test_one_sentence_before_anything_runs(
    search: Callable[..., Any], tmp_path: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    with pytest.raises(SystemExit) as stop:
        search(*words)
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 1 and re.search(told, sentence), sentence
    assert len(list((tmp_path / "sweep").glob("*/ran"))) == ("val/loss" in told)


def test_a_study_keeps_its_figure_and_its_lists(search: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    search("x=0.1,0.2", "s.n_trials=1")
    for words, told in (
        (["x=0.1,0.2", "s.direction=maximize"], "looks for val/fid (minimize), not for val/fid (maximize)"),
        (["x=0.1,0.3"], "has drawn x from another list"),
        (["x=interval(0,1)"], "has drawn x from another list or kind of range"),
        (["x=0.1,0.2", "resume=sweep", "s.study_name=mine"], "has no study hydra.sweeper.study_name=mine"),
    ):
        with pytest.raises(SystemExit):
            search(*words)
        assert told in capsys.readouterr().err


def test_optuna_is_an_extra(
    search: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ornstein.training import trials

    monkeypatch.setattr(trials, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        search("x=interval(0,1)")
    assert "pip install 'ornstein[search]'" in capsys.readouterr().err


def test_who_lives(tmp_path: Path) -> None:
    first, second = _worker.Worker(tmp_path), _worker.Worker(tmp_path)
    assert (first.index, second.index) == (0, 1)
    with first:
        assert _worker.lives(first.path) and not _worker.lives(second.path)
        os.utime(first.path, (time.time() - 1000,) * 2)
        assert not _worker.lives(first.path), "silent for too long"
    assert not _worker.lives(first.path) and not _worker.lives("")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_json(second.path, {"host": os.uname().nodename, "pid": gone.pid, "ended": False})
    assert not _worker.lives(second.path), "its process is dead, which is known at once"
    write_json(second.path, {"host": "another-machine", "pid": gone.pid, "ended": False})
    assert _worker.lives(second.path)


def test_a_worker_that_has_ended_calls_no_job_of_another_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ornstein.cli.train_sweep import finish

    for job, status in enumerate(("finished", "pruned", "running", None, "failed")):
        (tmp_path / str(job) / ".hydra").mkdir(parents=True)
        (tmp_path / str(job) / ".hydra" / "overrides.yaml").touch()
        if status is not None:
            write_json(tmp_path / str(job) / "summary.json", {"status": status, "error": "refused"})
    with _worker.Worker(tmp_path / ".search"):
        assert finish(tmp_path, search=True) == {"4": "refused"}
        assert "5 jobs, 1 finished, 1 pruned, 2 running, 1 failed" in capsys.readouterr().out
    assert set(finish(tmp_path, search=True)) == {"2", "3", "4"}, "nobody is left to end them"
    assert "5 jobs, 1 finished, 1 pruned, 3 failed" in capsys.readouterr().out


def test_samplers_and_pruners_by_name_and_by_target() -> None:
    space = space_of("x=1,2")
    build = _study.build_sampler
    options: dict[str, Any] = {"seed": 3, "n_startup_trials": 2, "several": False}
    kinds = {"tpe": "TPESampler", "random": "RandomSampler", "grid": "BruteForceSampler"}
    assert {name: type(build(name, space, **options)).__name__ for name in kinds} == kinds
    assert isinstance(build(optuna.samplers.QMCSampler, space, **options), optuna.samplers.QMCSampler)
    kinds = {"median": "MedianPruner", "hyperband": "HyperbandPruner", None: "NopPruner"}
    assert {name: type(build_pruner(name, n_startup_trials=1)).__name__ for name in kinds} == kinds
    own = optuna.pruners.ThresholdPruner(upper=1.0)
    assert build_pruner(own, n_startup_trials=1) is own


def test_the_results_of_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = space_of("lr=tag(log, interval(1e-4, 1e-1))", "opt=a,b", "dropout=interval(0, 1)")
    study = optuna.create_study(study_name="<search>", sampler=optuna.samplers.RandomSampler(seed=0))
    study.set_user_attr("monitor", ["val/fid"])
    options: dict[str, Any] = {"folder": tmp_path, "monitors": ["val/fid"]}

    def command(params: Any, space: Space) -> list[str]:
        return space.words(params)

    _results.write_results(study, space, command=command, **options)
    assert "importances need at least 2 finished trials, and there are 0." in capsys.readouterr().out
    assert json.loads((tmp_path / "best.json").read_text())["best"] is None and not (tmp_path / "search.png").exists()
    for number in range(16):
        trial = study.ask()
        values = space.suggest(trial)
        if number in (3, 9):
            trial.set_user_attr("reason", "out of memory")
            study.tell(trial, state=TrialState.FAIL)
        elif number == 5:
            trial.report(9.0, 200)
            study.tell(trial, state=TrialState.PRUNED)
        else:
            # lr decides most, opt a little, dropout nothing.
            from math import log10

            study.tell(trial, 1 + (log10(float(values["lr"])) + 2.5) ** 2 + 0.3 * (values["opt"] == "b"))
    _results.write_results(study, space, command=command, **options)
    text = capsys.readouterr().out
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["trials"] == {"finished": 13, "pruned": 1, "failed": 2}
    assert best["best"]["val/fid"] == min(trial.value for trial in study.trials if trial.state == TrialState.COMPLETE)
    assert best["best"]["command"].startswith("python train.py lr=")
    assert next(iter(best["importance"])) == "lr" and best["importance"]["lr"] > 0.6
    rows = list(csv.DictReader((tmp_path / "trials.csv").open(newline="")))
    assert [row["state"] for row in rows] == ["finished"] * 13 + ["pruned"] + ["failed"] * 2
    assert rows[0]["trial"] == str(best["best"]["trial"]) and rows[-1]["reason"] == "out of memory"
    assert "pruned at step 200" in text and "failed: out of memory" in text
    page = (tmp_path / "search.html").read_text()
    assert page.count("Plotly.newPlot(") == 5 and "<search>" not in page and 'src="http' not in page
    from PIL import Image

    with Image.open(tmp_path / "search.png") as picture:
        assert picture.size == (1300, 760)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50


def test_figures_of_two_kinds(search: Callable[..., Any]) -> None:
    _, study = search(
        "x=0.1,0.9", "s.sampler=grid", "s.monitor=[val/fid,val/fid_1k]", "s.direction=[minimize,maximize]"
    )
    assert states(study) == "CC" and len(_results.best_of(study)) == 2


def test_what_a_trial_of_a_search_is_told(tmp_path: Path, compose: Callable[..., DictConfig]) -> None:
    """A job's callback finds its trial by the words that the search puts into Hydra's part of its config."""
    from ornstein.cli.search import _open_trial, trial_callbacks

    compose()
    assert trial_callbacks() == []
    storage = open_storage(place_of(None, tmp_path))
    study = optuna.create_study(study_name="search", storage=storage)
    for value in (1.0, 2.0, 3.0):
        trial = study.ask()
        trial.report(value, 10)
        study.tell(trial, value)
    asked = study.ask()
    given = [f"trial={asked.number}", f"storage={tmp_path}/study.journal", "n_startup_trials=1"]
    compose("hparams_search=optuna", *(f"hydra.sweeper.{word}" for word in given))
    (callback,) = trial_callbacks()
    assert callback.monitor == "val/fid"
    found = _open_trial(HydraConfig.get().sweeper, asked.number)
    found.report(2.5, 10)
    assert found.number == asked.number and found.should_prune(), "worse than the median of 1, 2, 3"
    assert study.trials[asked.number].intermediate_values == {10: 2.5}
    compose("hparams_search=optuna", "hydra.sweeper.trial=0", "hydra.sweeper.pruner=null")
    assert trial_callbacks() == []


@pytest.mark.slow
def test_the_default_space_can_train(compose: Callable[..., DictConfig]) -> None:
    """Every option that the preset names is there, and every pair of objective and schedule is one that can work."""
    cfg = OmegaConf.load(ROOT / "conf" / "hparams_search" / "optuna.yaml")
    params = OmegaConf.to_container(cfg.hydra.sweeper.params)
    assert isinstance(params, dict)
    space = space_of(**{str(key): value for key, value in params.items()})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    from ornstein.cli.validate import validate

    pairs: set[tuple[Any, Any]] = set()
    while len(pairs) < 12:  # 3 objectives, 4 schedules
        values = space.suggest(study.ask())
        pair = (values["objective"], values["scheduler"])
        if pair not in pairs:
            pairs.add(pair)
            validate(compose("hparams_search=random", *space.words(values)))
