"""The W&B dashboard: built in W&B's own classes, without a network; and sent to a server on this machine."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from ornstein.cli import dashboard
from ornstein.cli.evaluate import write_card
from ornstein.cli.sweep import finish, log_one
from ornstein.errors import OrnsteinError
from ornstein.experiment.atomic import write_json
from ornstein.experiment.dashboard import keys
from ornstein.experiment.dashboard.store import known_before, read_specification, specify, write_specification
from ornstein.experiment.dashboard.wish import Known, Wish, check_figure, differing_keys, known_of_folder
from ornstein.experiment.report.collect import flat

SERVER = Path(__file__).with_name("dashboard_server.py")
AXIS = {"steps": "trainer/global_step", "images": "images_seen", "time": "time/wall_s"}
ORDER = ["Training", "Quality by optimizer steps", "Quality by images seen", "Quality by seconds of training"]
ORDER += ["Samples", "Sweep", "Samplers", "Speed and devices", "Noise", "Configs"]


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder, a home without credentials, an environment that says nothing about W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def workspace(wish: Wish) -> dict[str, Any]:
    return dict(specify(wish).workspace.spec["section"])


def sections(wish: Wish) -> dict[str, list[dict[str, Any]]]:
    """Panels of a workspace by section, in W&B's own specification."""
    return {each["name"]: each["panels"] for each in workspace(wish)["panelBankConfig"]["sections"]}


def grids(wish: Wish) -> dict[str, dict[str, Any]]:
    """Panel grids of a report by the heading above them."""
    found, heading = {}, ""
    for block in specify(wish).report.spec["blocks"]:
        if block["type"] == "heading":
            heading = block["children"][0]["text"]
        elif block["type"] == "panel-grid":
            found[heading] = block["metadata"]
    return found


def walk(value: Any) -> Iterator[Any]:
    yield value
    for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(below)


@pytest.mark.parametrize("axis", AXIS)
def test_sections_stand_in_order_and_curves_on_their_axis(axis: str) -> None:
    wish = Wish("p", axis=axis)
    first = f"Quality by {keys.AXES[axis].title}"
    order = [ORDER[0], first, *(name for name in ORDER[1:] if name != first)]
    found = sections(wish)
    assert list(found) == order == list(grids(wish))
    opened = {each["name"]: each["isOpen"] for each in workspace(wish)["panelBankConfig"]["sections"]}
    assert [name for name in order if opened[name]] == ["Training", first, "Samples", "Sweep", "Samplers"]
    for place, panels in ((found, found), (grids(wish), None)):
        for name in order:
            own = next(
                (value for key, value in AXIS.items() if name == f"Quality by {keys.AXES[key].title}"), AXIS[axis]
            )
            lines = [
                panel["config"]
                for panel in (panels[name] if panels else place[name]["panelBankSectionConfig"]["panels"])
                if panel["viewType"] == "Run History Line Plot"
            ]
            assert {line["xAxis"] for line in lines} <= {own}, name
            assert len(lines) == {"Training": len(keys.TRAINING), "Speed and devices": len(keys.SPEED)}.get(
                name, len(keys.QUALITY) if name.startswith("Quality") else 0
            )
    assert workspace(wish)["settings"]["xAxis"] == AXIS[axis]


def test_a_report_s_panels_lie_side_by_side_without_overlap() -> None:
    for name, grid in grids(Wish("p")).items():
        places = [panel["layout"] for panel in grid["panelBankSectionConfig"]["panels"]]
        cells = [
            (x, y)
            for at in places
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        ]
        assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24, name


FRECHET, INCEPTION = keys.QUALITY[0].regex, keys.QUALITY[2].regex
LEVELS = keys.TRAINING[4].regex


@pytest.mark.parametrize(
    ("regex", "names", "others"),
    [
        (
            FRECHET,
            "val/fid val/fid_1k val/fid_2500 val/fid_floor val/fd_dinov2 val/fd_dinov2_1k val/fd_dinov2_floor",
            "val/fid_low val/fid_1k_high val/fid_infinity val/sfid val/fd_clip_low by_images_seen/fid fid",
        ),
        (
            INCEPTION,
            "val/inception_score val/inception_score_1k val/real_inception_score",
            "val/inception_score_std val/inception_score_low val/inception_score_1k_high",
        ),
        (LEVELS, "loss_by_log_snr/below_-8 loss_by_log_snr/0_to_2", "loss_by_log_snr train/loss"),
    ],
)
def test_expressions_find_counted_names_and_no_others(regex: str, names: str, others: str) -> None:
    assert "(?" not in regex, "RE2 looks neither ahead nor behind"
    assert all(re.search(regex, name) for name in names.split())
    assert not any(re.search(regex, name) for name in others.split())


def leaves(filters: dict[str, Any]) -> list[tuple[str, str, str, Any]]:
    """Section, name, operator and value of each condition, in order."""
    found = [each for each in walk(filters) if isinstance(each, dict) and "op" in each and "key" in each]
    return [(each["key"]["section"], each["key"]["name"], each["op"], each["value"]) for each in found]


IDS = [("run", "name", "IN", ["a", "b"])]


@pytest.mark.parametrize(
    ("wish", "asked"),
    [
        (Wish("p"), []),
        (Wish("p", group="multirun/2026-11-21"), [("run", "group", "=", "multirun/2026-11-21")]),
        (Wish("p", runs=("a", "b")), [*IDS, ("run", "displayName", "IN", ["a", "b"])]),
        (Wish("p", known=Known(ids=("a", "b"))), IDS),
    ],
)
def test_filters_are_the_user_s_in_the_workspace_and_by_kind_in_the_report(wish: Wish, asked: list[Any]) -> None:
    (runs,) = workspace(wish)["runSets"]
    assert leaves(runs["filters"]) == asked
    task, guidance = ("config", "task", "="), ("summary", "guidance")
    kinds: dict[str, list[list[Any]]] = {name: [[(*task, "train")]] for name in ORDER}
    kinds |= {"Samplers": [[(*task, "evaluate"), (*guidance, op, "NoGuidance")] for op in ("=", "!=")], "Configs": [[]]}
    for name, grid in grids(wish).items():
        assert [leaves(each["filters"]) for each in grid["runSets"]] == [kind + asked for kind in kinds[name]], name


def test_the_figure_goes_everywhere_that_runs_are_compared() -> None:
    known = Known(columns=frozenset({"val/fid_1k", "val/kid", "fid_1k", "train/loss"}), swept=("optimizer.lr",))
    wish = Wish("p", known=known)
    assert (wish.trained, wish.evaluated, wish.ascending) == ("val/fid_1k", "fid_1k", True)
    found = sections(wish)
    parallel, importance, bars = (panel["config"] for panel in found["Sweep"])
    assert [each["accessor"] for each in parallel["columns"]] == ["config:optimizer.value.lr", "summary:val/fid_1k"]
    assert importance["targetKey"] == "val/fid_1k" and bars["metrics"] == ["val/fid_1k"]
    cost, scale, grid, every, *_ = (panel["config"] for panel in found["Samplers"])
    assert (cost["xAxis"], cost["yAxis"], scale["xAxis"]) == ("summary:nfe", "summary:fid_1k", "summary:guidance_scale")
    assert grid["fieldSettings"] == {"x": "nfe", "y": "fid_1k"} and every["columns"][-1]["accessor"] == "summary:fid_1k"
    (runs,) = workspace(wish)["runSets"]
    assert runs["sort"]["keys"] == [{"key": {"section": "summary", "name": "val/fid_1k"}, "ascending": True}]
    columns = ["run:displayName", "summary:val/fid_1k", "run:state", "config:optimizer.value.lr"]
    assert runs["runFeed"]["columnOrder"] == columns
    assert not Wish("p", figure="inception_score").ascending
    assert Wish("p", known=Known(frozenset({"val/fid_64", "nfe"}))).evaluated == "fid_64", "as far as is known"
    with pytest.raises(OrnsteinError, match=r"^figure=sfid: no run logs it; choose one of fid_1k, kid\.$"):
        check_figure(Wish("p", figure="sfid", known=known))
    check_figure(Wish("p", figure="sfid"))


def test_what_was_swept_is_found_in_configs() -> None:
    configs = [
        {"seed": 0, "scheduler": {"_target_": "a.Cosine", "s": 0.1}, "optimizer": {"lr": 0.1}, "name": "x"},
        {
            "seed": 0,
            "scheduler": {"_target_": "a.Flow"},
            "optimizer": {"lr": 0.2},
            "name": "y",
            "paths": {"at": "y"},
            "trainer": {"root_dir": 1},
        },
    ]
    assert differing_keys(configs) == ("scheduler._target_", "optimizer.lr")
    assert differing_keys(configs[:1]) == () == differing_keys([])
    named = [
        {"choices": {"optimizer": name}, "optimizer": {"_target_": name, "lr": lr, name: lr}}
        for name, lr in (("adam", 1), ("adam", 2), ("lion", 2))
    ]
    assert differing_keys(named) == ("choices.optimizer", "optimizer.lr", "optimizer.adam")
    assert differing_keys([named[0], named[2]]) == ("choices.optimizer",), "what the option brings along is not swept"
    folders = [{"logger": {"wandb": {"choices": each["choices"]}}, "optimizer": each["optimizer"]} for each in named]
    assert differing_keys(folders) == differing_keys(named)
    unnamed = {"optimizer": named[2]["optimizer"]}
    assert differing_keys([named[0], unnamed]) == ("optimizer._target_",), "names that not all of them have"
    assert len(differing_keys([{f"k{place}": run for place in range(20)} for run in (0, 1)])) == 8


def test_a_specification_is_the_same_every_time_and_survives_its_file(tmp_path: Path) -> None:
    from wandb_workspaces.reports.v2 import internal as reports
    from wandb_workspaces.workspaces import internal as workspaces

    wish = Wish("p", group="g")
    made = specify(wish)
    assert made == specify(wish)
    write_specification(tmp_path, made)
    assert read_specification(tmp_path) == made
    for spec, model in ((made.workspace.spec, workspaces.WorkspaceViewspec), (made.report.spec, reports.Spec)):
        again = model.model_validate(spec).model_dump(by_alias=True, exclude_none=True, mode="json")
        for each in walk(again):
            if isinstance(each, dict) and each.get("inlineComments") == []:
                del each["inlineComments"]  # of texts: none
        assert again == spec, "W&B's package reads it as it was"
    saved = json.loads((tmp_path / "workspace.json").read_text()) | {"id": "w", "name": "nw-x-v", "entity": "me"}
    (tmp_path / "workspace.json").write_text(json.dumps(saved))
    renewed = known_before(specify(wish), tmp_path).workspace
    assert (renewed.id, renewed.name, renewed.entity) == ("w", "nw-x-v", "me")
    for other in (Wish("p", name="another"), Wish("q"), Wish("p", entity="you")):
        assert known_before(specify(other), tmp_path).workspace.id == "", "another dashboard"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "project= is missing"),
        ("project=p colour=red", "colour=red is not known here"),
        ("project=p sure", "sure is not known here"),
        ("project=me/p", "write the two apart, entity=TEAM project=NAME"),
        ("project=p#1", "W&B has no # in names"),
        ("project=..", "is no name"),
        ("project=p x=epochs", "x=epochs is unknown: choose steps, images, time"),
        ("project=p figure=FID!", "figure=FID! is no name of a figure"),
        ("project=p offline=maybe", "offline=maybe: choose true or false"),
        ("project=p name=a+b", "W&B takes no + in a workspace's name"),
        (f"project=p name={'x' * 129}", "W&B takes at most 128"),
        ("project=p group=lr=0.1", "W&B's filters take no = in a name"),
        ("project=p runs=nowhere/at/all", "runs=nowhere/at/all is no folder"),
        ("project=p runs=.", "holds no run"),
        ("upload=nowhere", "nowhere/workspace.json is missing"),
        ("upload=x figure=kid", "figure= does not go with upload="),
    ],
)
def test_what_cannot_work_is_one_sentence(
    words: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["dashboard", *words.split()])
    with pytest.raises(SystemExit, match="1"):
        dashboard.main()
    out, err = capsys.readouterr()
    assert out == "" and told in err and err.startswith("error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_credentials_it_is_written_and_told_how_to_send(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["dashboard", "project=p", "entity=me", "name=Schedules compared"])
    dashboard.main()
    assert capsys.readouterr().out.splitlines() == [
        "written    outputs/dashboard/p/workspace.json, report.json",
        "to save it in W&B: log in (wandb login), then ornstein dashboard upload=outputs/dashboard/p",
    ]
    stored = read_specification(tmp_path / "outputs" / "dashboard" / "p")
    assert (stored.workspace.entity, stored.report.title) == ("me", "Schedules compared")
    monkeypatch.setattr(sys, "argv", ["dashboard", "upload=outputs/dashboard/p"])
    with pytest.raises(SystemExit):
        dashboard.main()
    assert "log in first" in capsys.readouterr().err
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        dashboard.main()
    assert "pip install 'ornstein[dashboard]'" in capsys.readouterr().err


def test_help_loads_nothing_and_building_connects_to_nothing(tmp_path: Path) -> None:
    script = """
import sys
def hook(event, words):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.fork", "os.posix_spawn"):
        raise RuntimeError(event)
sys.addaudithook(hook)
from ornstein.cli import dashboard
sys.argv = ["dashboard", "--help"]
dashboard.main()
heavy = {"wandb", "wandb_workspaces", "torch", "lightning"} & set(sys.modules)
assert not heavy, heavy
sys.argv = ["dashboard", "project=p", "out=here"]
dashboard.main()
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert all(f"  {key}=" in ran.stdout for key in dashboard.KEYS)
    assert (tmp_path / "here" / "report.json").is_file()


@pytest.mark.slow
def test_the_real_client_sends_what_was_built(tmp_path: Path) -> None:
    server = runpy.run_path(str(SERVER))
    commands = [
        ["project=here", "x=time"],
        ["project=here", "x=images"],  # the same dashboard again
        ["project=here", "offline=true", "out=kept", "group=g"],
        ["upload=kept", "entity=team"],
        ["project=missing"],
        ["project=broken"],
        ["project=here", "figure=kid"],
        ["project=closed"],
        ["project=here"],
    ]
    environment = {"WANDB_API_KEY": "0" * 40, "PYTHONPATH": os.pathsep.join(sys.path)}
    with server["serving"]() as (address, asked):
        ran = subprocess.run(
            [sys.executable, str(SERVER), json.dumps(commands)],
            cwd=tmp_path,
            env={**os.environ, **environment, "WANDB_BASE_URL": address},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ran.returncode == 0, ran.stderr
    first, again, kept, sent, missing, broken, figure, closed, stranger = json.loads(ran.stdout.splitlines()[-1])
    views = [each["variables"] for each in asked if "upsertView" in each["query"]]
    assert [(view["entityName"], view["projectName"], view["type"]) for view in views] == [
        *[("me", "here", "project-view"), ("me", "here", "runs")] * 2,
        *[("team", "here", "project-view"), ("team", "here", "runs")],
        *[("me", "broken", "project-view"), ("me", "broken", "runs")],
    ]

    code, out, err = first
    stored = read_specification(tmp_path / "outputs" / "dashboard" / "here")
    assert (code, err) == (0, "")
    name = views[0]["name"].removeprefix("nw-").removesuffix("-v")
    assert out.splitlines() == [
        f"workspace  {address}/me/here?nw={name}",
        f"report     {address}/me/here/reports/here--id-runs",
    ]
    # What the project's runs were seen to hold is in it.
    wish = Wish("here", "me", axis="time", known=Known(frozenset({"val/fid_64"}), ("seed", "scheduler._target_")))
    for view, built in zip(views, (specify(wish).workspace, specify(wish).report), strict=False):
        assert json.loads(view["spec"]) == built.spec
        assert (view.get("id"), view["displayName"]) == (None, "here")

    assert again[:2] == [0, out] and [view["id"] for view in views[2:4]] == ["id-project-view", "id-runs"]
    assert [view["name"] for view in views[2:4]] == [view["name"] for view in views[:2]], "renewed, not made anew"
    assert json.loads(views[2]["spec"]) == specify(replace(wish, axis="images")).workspace.spec
    assert (stored.workspace.id, stored.report.id) == ("id-project-view", "id-runs"), "kept for the next time"

    assert kept[0] == sent[0] == 0 and "/team/here/reports/" in sent[1]
    assert json.loads(views[4]["spec"]) == specify(Wish("here", group="g")).workspace.spec

    for (code, out, err), told in (
        (missing, f"project=missing: me has no such project at {address}"),
        (broken, "the report of me/broken: W&B at"),
        (figure, "figure=kid: no run logs it; choose one of fid_64."),
        (closed, f"project=closed: W&B at {address} answered"),
        (stranger, "W&B did not let this account in"),
    ):
        assert code == 1 and told in err and err.startswith("error: ") and err.count("\n") == 1
        assert "workspace " in out if "broken" in told else out == ""
    assert "no such thing" in broken[2] and "invalid api key" in stranger[2]
    assert (tmp_path / "outputs" / "dashboard" / "missing" / "report.json").is_file(), "nothing is lost"


OPTIONAL = {
    "system/gpu_share": "a CUDA device",
    "system/gpu_memory_mb": "a CUDA device",
    "system/gpu_memory_peak_mb": "a CUDA device",
    "time/mfu": "a known GPU, or callbacks.throughput.peak_tflops",
    "val/clip_score": "captions and a CLIP",
    "val/text_r1": "captions, metrics.text_alignment=true",
    "val/text_r10": "captions, metrics.text_alignment=true",
    "val/psnr": "a model conditioned on images, or an autoencoder",
    "val/ssim": "a model conditioned on images, or an autoencoder",
    "val/lpips": "LPIPS' weights",
    "val/rfid": "an autoencoder",
    **{
        f"train/{term}": "an autoencoder"
        for term in ("reconstruction", "perceptual", "kl", "commitment", "codebook", "adversarial", "discriminator")
    },
    **{
        f"val/{figure}{space}": f"metrics={space[1:]}, or metrics.also.{space[1:]}"
        for figure in ("kid", "precision", "recall", "density", "coverage")
        for space in keys.SPACES[1:]
    },
    "reconstructions": "an autoencoder",
    "codec": "a model of latents",
}
"""Keys of the dashboard that the default run has not, and what it takes to have them."""


def read_segment(folder: Path) -> Any:
    read_wandb = runpy.run_path(str(Path(__file__).with_name("wandb_reader.py")))["read_wandb"]
    (segment,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while not (read := read_wandb(segment)).complete and time.monotonic() < deadline:
        time.sleep(0.01)
    return read, {key.partition("._")[0] for row in read.history for key in row}


@pytest.mark.slow
def test_every_key_is_one_that_a_real_run_logs(
    tmp_path: Path, compose: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from ornstein.cli.train import train

    monkeypatch.setenv("ORNSTEIN_CACHE", str(tmp_path / "cache"))
    size = ["base_channels=8", "channel_mults=[1,2]", "groups=4"]
    train(
        compose(
            *(f"model.network.{word}" for word in size),
            *("data.batch_size=32", "trainer.max_steps=2", "trainer.enable_progress_bar=false", "sampler.steps=2"),
            *("metrics.precision_recall=true", "metrics.density_coverage=true", "metrics.bootstrap=0"),
            *("callbacks.evaluation.num_samples=64", "callbacks.log.every=1", "callbacks.log.levels_every=1"),
            *("callbacks.sample_grid.samples_per_class=1", "callbacks.trajectory.samples_per_class=1"),
            "callbacks.validation.max_batches=1",
            "logger.wandb.mode=offline",
        )
    )
    run, logged = read_segment(tmp_path / "run")

    known = known_of_folder(tmp_path / "run")
    wish = Wish("p", known=known)
    check_figure(wish)
    assert known.ids == (run.run_id,) and wish.trained == "val/fid_64" and wish.trained in run.summary
    drawn = [panel["config"] for panels in sections(wish).values() for panel in panels]
    of_training = [name for name in ORDER if name != "Samplers"]
    curves = {key for name in of_training for each in sections(wish)[name] for key in each["config"].get("metrics", [])}
    pictures = {
        key for name in of_training for each in sections(wish)[name] for key in each["config"].get("mediaKeys", [])
    }
    assert len(curves) > 40 and len(pictures) > 8
    missing = (curves | pictures | {keys.EXTREMES}) - logged
    assert missing <= set(OPTIONAL), "neither logged nor declared optional"
    assert torch.cuda.is_available() or missing == set(OPTIONAL), "declared optional, and logged"
    for regex in {each["metricRegex"] for each in drawn if "metricRegex" in each}:
        assert any(re.search(regex, key) for key in logged), regex
    assert {each["xAxis"] for each in drawn if each.get("xAxis") and ":" not in each["xAxis"]} == set(AXIS.values())
    for axis in AXIS.values():
        assert axis in run.metrics and all(axis in row for row in run.history if wish.trained in row), axis
    flattened = flat(run.config)
    assert set(keys.SWEPT) | {"task"} <= set(flattened) and run.config["task"] == "train"

    # Evaluations: one, and a grid of two.
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    logger = {"wandb": {"project": "p", "mode": "offline"}}
    config = OmegaConf.create({"task": "evaluate", "name": "one", "run": "run", "logger": logger})
    one = tmp_path / "one"
    shutil.copytree(tmp_path / "run" / "samples", one / "samples")
    write_card(report, one, title="one")
    log_one(config, report, one)
    single, kept = read_segment(one)
    asked = {keys.NFE, keys.STEPS, keys.SAMPLER, keys.GUIDANCE, keys.SCALE, wish.evaluated}
    assert asked <= set(single.summary) and single.config["task"] == "evaluate"
    assert single.summary[keys.GUIDANCE] == keys.UNGUIDED
    for number in range(2):
        place = tmp_path / "grid" / str(number)
        (place / ".hydra").mkdir(parents=True)
        OmegaConf.save(config, place / "config.yaml")
        OmegaConf.save({"hydra": {"job": {"num": number}}}, place / ".hydra" / "hydra.yaml")
        OmegaConf.save([f"sampler.steps={number + 2}"], place / ".hydra" / "overrides.yaml")
        write_json(place / "evaluation.json", report)
        write_json(place / "summary.json", {"samples_per_s": 1.0})
    assert finish(tmp_path / "grid") == []
    _, grid = read_segment(tmp_path / "grid")
    shown = {key for each in sections(wish)["Samplers"] for key in each["config"].get("mediaKeys", [])}
    assert shown | {keys.GRID} <= kept | grid
    (table,) = (tmp_path / "grid").glob("wandb/offline-run-*/files/media/table/results*.json")
    assert {keys.NFE, wish.evaluated} <= set(json.loads(table.read_text())["columns"])
