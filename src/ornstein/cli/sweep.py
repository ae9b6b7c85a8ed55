"""``evaluate.py -m``: what a grid of evaluations leaves at its end, a table and a Pareto picture, locally and in W&B.

Jobs may run in other processes and on other machines, so everything is collected from the files that they left.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ornstein.cli.launch import find_mistake, note_failed, tell
from ornstein.cli.ranks import launched_elsewhere
from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.experiment.pareto import Cell

FAILED = "failed.json"
# Named in the table wherever they were typed, though they be the same in every cell: they name curves and panels.
ALWAYS = ("sampler", "guidance")


class SweepResults(Callback):
    """Hydra's callback: collects the jobs of a multirun when all of them have ended."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Writes and prints the results of the sweep in ``hydra.sweep.dir``."""
        from ornstein.experiment.lock import is_writer

        if not is_writer():
            return
        folder = Path(str(config.hydra.sweep.dir))
        try:
            failed = finish(folder)
        except Exception as error:  # Hydra would make a warning of it
            traceback.print_exc()
            tell(
                OrnsteinError(
                    f"the results of {folder} could not be put together ({error}); every job's own are there."
                )
            )
            failed = ["results"]
        note_failed(failed)


def sweeping() -> bool:
    """Whether this is one of the jobs of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def recorded(body: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """A job of a multirun that fails leaves its reason in ``failed.json`` of its folder, and the others go on."""

    @wraps(body)
    def run(cfg: DictConfig) -> Any:
        if not sweeping():
            return body(cfg)
        try:
            return body(cfg)
        except Exception as error:
            mistake = find_mistake(error)
            # What one process of several alone runs into would leave the others waiting for it.
            if OmegaConf.select(cfg, "traceback", default=False) or (mistake is None and launched_elsewhere()):
                raise
            if mistake is None:
                traceback.print_exc()
            from ornstein.experiment.atomic import write_json

            told = mistake if mistake is not None else OrnsteinError(f"{type(error).__name__}: {error}")
            write_json(Path(HydraConfig.get().runtime.output_dir) / FAILED, {"error": " ".join(str(told).split())})
            tell(told)
            return None

    return run


def finish(folder: Path) -> list[str]:
    """Collects a sweep: ``results.csv``, ``results.json``, ``pareto.png``, ``report.html``, a printed table, and W&B
    where asked for.

    Returns:
        The numbers of the jobs that failed.
    """
    from ornstein.experiment import pareto
    from ornstein.experiment.atomic import write_json, write_text

    cells = collect(folder)
    if not cells:
        return []
    config = _config_of(folder)
    rows = pareto.records(cells)
    points = [(float(cell.nfe or 0), cell.value) for cell in cells if cell.drawn]
    drawn = [cell.job for cell in cells if cell.drawn]
    front = [drawn[number] for number in pareto.pareto_front(points)]
    name = str(config.get("name") or Path(str(config.get("run", folder))).name)
    main = next((cell.main for cell in pareto.ranked(cells) if cell.main), None)
    write_text(folder / "results.csv", pareto.csv_text(rows))
    facts = {"name": name, "run": config.get("run"), "figure": main, "notes": notes_of(cells)}
    write_json(folder / "results.json", {**facts, "front": front, "rows": rows})
    picture = pareto.draw(cells, folder / "pareto.png", title=f"{name}: quality against cost", notes=notes_of(cells))
    pareto.show(cells)
    _log_sweep(config, folder, rows=rows, name=name, picture=picture)
    told = "results.csv, results.json" + (", pareto.png" if picture is not None else "")
    told += ", report.html" if _write_report(folder, cells) else ""
    print(f"{len(cells)} evaluations, {len([c for c in cells if c.error])} failed; {told} in {folder}")
    return [str(cell.job) for cell in cells if cell.error is not None]


def _write_report(folder: Path, cells: Sequence[Cell]) -> bool:
    """The page of all cells; where none left any figures there is none."""
    from ornstein.experiment.report.page import write_report

    if all(cell.error for cell in cells):
        return False
    failed = [{"name": cell.folder, "status": "failed", "reason": cell.error} for cell in cells if cell.error]
    write_report(folder, failures=failed)
    return True


def collect(folder: Path) -> list[Cell]:
    """The cells of a sweep from the files of its jobs, in order of job."""
    from ornstein.experiment.pareto import Cell
    from ornstein.experiment.report.collect import typed
    from ornstein.metrics.figures.naming import main_figure

    jobs = {}
    for place in folder.rglob(".hydra/overrides.yaml"):
        hydra = OmegaConf.load(place.with_name("hydra.yaml"))
        # Jobs count through over the batches of a sweep.
        jobs[int(str(OmegaConf.select(hydra, "hydra.job.num")))] = (place.parents[1], typed(place))
    asked = swept([words for _, words in jobs.values()])
    cells = []
    for number in sorted(jobs):
        place, words = jobs[number]
        below = str(place.relative_to(folder))
        keys = {key: words[key] for key in asked if key in words}
        report, summary = read_json(place / "evaluation.json"), read_json(place / "summary.json")
        failed = read_json(place / FAILED)
        if failed or not report:
            reason = failed.get("error", "it left no figures: it was killed, or did not begin")
            cells.append(Cell(number, keys, error=str(reason), folder=below))
            continue
        figures = {name: float(value) for name, value in report["values"].items() if value is not None}
        nfe = report.get("sampling", {}).get("nfe")
        rate = summary.get("samples_per_s")
        cells.append(Cell(number, keys, figures, nfe, rate, main_figure(figures), report, folder=below))
    return cells


def swept(jobs: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys whose values differ between jobs, and those that name curves, in the order in which they were typed."""
    names = list(dict.fromkeys(key for words in jobs for key in words))
    return [name for name in names if name in ALWAYS or len({words.get(name) for words in jobs}) > 1]


def notes_of(cells: Sequence[Cell]) -> list[str]:
    """What the figures of a sweep have in common, in a sentence for the picture's footer."""
    report = next((cell.report for cell in cells if cell.error is None), None)
    if report is None or "num_samples" not in report:
        return []
    reference, sampling = report.get("reference") or {}, report.get("sampling") or {}
    real = f"{reference.get('count') or '?'} {reference.get('split') or ''} images"
    space = f"{report.get('extractor')} feature space (fingerprint {str(report.get('fingerprint'))[:12]})"
    weights = f"{sampling.get('weights')} weights after {sampling.get('images_seen', 0):,} images"
    told = f"{report['num_samples']:,} samples against {real} in the {space}, {weights}, seed {sampling.get('seed')}"
    bars = any(cell.interval is not None for cell in cells)
    return [" ".join(told.split()) + ("; bars are 95 % intervals." if bars else ".")]


def line_of(report: Mapping[str, Any], rate: float) -> str:
    """A job of a sweep in a line."""
    from ornstein.experiment.metric_card import headline

    return f"{headline(report)}; NFE {report['sampling']['nfe']}, {rate:,.0f} samples/s"


def check_logger(cfg: DictConfig) -> None:
    """``logger=wandb`` or ``none``.

    Raises:
        OrnsteinError: for any other.
    """
    others = [str(name) for name, node in (cfg.get("logger") or {}).items() if name != "wandb" and node]
    if others:
        raise OrnsteinError(
            f"logger.{others[0]}: an evaluation leaves its figures in files and logs to W&B or nowhere: choose "
            "logger=wandb or logger=none."
        )


def log_one(
    cfg: DictConfig, report: Mapping[str, Any], folder: Path, *, extremes: Sequence[Sequence[Any]] = ()
) -> None:
    """Logs a single evaluation where ``logger=wandb`` asks for it: figures, metric card, pictures, and the table of
    best and worst samples (rows of :func:`ornstein.training.extremes.extremes_rows`).
    """
    from PIL import Image

    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    logger = _wandb({str(key): value for key, value in config.items()}, folder, kind="evaluation")
    if logger is None:
        return
    logger.log_metrics({name: value for name, value in report["values"].items() if value is not None})
    for name in ("metric_card.png", "samples/nearest_training_images.png", "samples/best_and_worst.png"):
        if (folder / name).is_file():
            logger.log_image(Path(name).stem, [Image.open(folder / name)])
    if extremes:
        from ornstein.training.extremes import COLUMNS

        logger.log_table("best_and_worst_table", columns=list(COLUMNS), data=[list(row) for row in extremes])
    logger.log_summary({**report["values"], **report["sampling"]})
    logger.close()


def _log_sweep(
    config: Mapping[str, Any], folder: Path, *, rows: Sequence[Mapping[str, Any]], name: str, picture: Path | None
) -> None:
    """One W&B run for the sweep, in the group of the run that was evaluated: its table, its picture, its best."""
    from PIL import Image

    logger = _wandb(config, folder, kind="sweep")
    if logger is None:
        return
    columns = list(rows[0])
    logger.log_table("results", columns=columns, data=[[row[column] for column in columns] for row in rows])
    if picture is not None:
        logger.log_image("pareto", [Image.open(picture)])
    best = {key: value for key, value in rows[0].items() if value is not None}
    logger.log_summary({f"best/{key}": value for key, value in best.items()})
    logger.close()


def _wandb(config: Mapping[str, Any], folder: Path, *, kind: str) -> Any:
    """The logger that ``logger=wandb`` asks for; None where it does not."""
    node = (config.get("logger") or {}).get("wandb")
    if not node:
        return None
    from ornstein.experiment import wandb_logger

    name = str(config.get("name") or Path(str(config.get("run"))).name)
    group = node.get("group")
    return wandb_logger(
        folder,
        node.get("project") or "ornstein",
        name=f"{name} {kind}",
        config=dict(config),
        # Beside the run itself, unless another group was asked for than the option's own, the command's name.
        group=name if group in (None, config.get("task")) else group,
        tags=list(node.get("tags") or ()),
        mode=node.get("mode"),
    )


def _config_of(folder: Path) -> dict[str, Any]:
    """The resolved config of one of the sweep's jobs; empty where none got so far."""
    from ornstein.experiment.run_dir import read_config

    for place in sorted(folder.rglob(".hydra")):
        if (place.parent / "config.yaml").is_file():
            return read_config(place.parent / "config.yaml")
    return {}


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where there is none that can be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
