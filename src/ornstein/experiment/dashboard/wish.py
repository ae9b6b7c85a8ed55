"""What a dashboard is asked for, and what is known of the runs that it is to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ornstein.errors import OrnsteinError
from ornstein.experiment.dashboard.keys import AXES, SWEPT, Axis, lower_is_better

MAX_SWEPT = 8  # axes of parallel coordinates
_DULL = ("paths", "hydra", "resume", "name", "logger", "callbacks", "task", "run", "choices")


@dataclass(frozen=True)
class Known:
    """What the runs are known to hold.

    Attributes:
        columns: names of what they logged (``val/fid_1k``); empty where nothing is known.
        swept: dotted config keys whose values differ between them.
        ids: W&B ids, where the runs of a folder are meant.
    """

    columns: frozenset[str] = frozenset()
    swept: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wish:
    """A dashboard.

    Attributes:
        project: its W&B project.
        entity: user or team; empty for the account's own.
        name: of workspace and report; empty for the project's.
        group: only runs of this W&B group.
        runs: only runs of these W&B ids or names.
        axis: of curves, a key of :data:`ornstein.experiment.dashboard.keys.AXES`.
        figure: by which runs are compared, as in ``val/<figure>``.
        known: of the runs.
    """

    project: str
    entity: str = ""
    name: str = ""
    group: str | None = None
    runs: tuple[str, ...] = ()
    axis: str = "steps"
    figure: str = "fid"
    known: Known = field(default_factory=Known)

    @property
    def title(self) -> str:
        """What workspace and report are called."""
        return self.name or self.project

    @property
    def x(self) -> Axis:
        """The x axis of curves."""
        return AXES[self.axis]

    @property
    def swept(self) -> tuple[str, ...]:
        """Config keys for parallel coordinates."""
        return self.known.swept or SWEPT

    @property
    def trained(self) -> str:
        """The figure's key as training logs it: ``val/fid``, or ``val/fid_1k`` where the runs are known to say so."""
        return self._named(f"val/{self.figure}") or f"val/{self.figure}"

    @property
    def evaluated(self) -> str:
        """The figure's key as evaluations log it: ``fid``; training's own where none is known of evaluations."""
        return self._named(self.figure) or self.trained.removeprefix("val/")

    @property
    def ascending(self) -> bool:
        """Whether the best run has the smallest figure."""
        return lower_is_better(self.figure)

    def _named(self, asked: str) -> str | None:
        if not self.known.columns:
            return None
        from ornstein.metrics.figures.naming import same_figure

        prefix = asked.rpartition("/")[0]
        return same_figure(asked, [each for each in sorted(self.known.columns) if each.rpartition("/")[0] == prefix])


def check_figure(wish: Wish) -> None:
    """Whether some of the runs have the figure, where they are known and have any.

    Raises:
        OrnsteinError: none has it; names those that there are.
    """
    named = sorted(name.removeprefix("val/") for name in wish.known.columns if name.startswith("val/"))
    if named and not {wish.trained, wish.evaluated} & wish.known.columns:
        raise OrnsteinError(f"figure={wish.figure}: no run logs it; choose one of {', '.join(named)}.")


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The dotted config keys that tell a sweep's runs apart, at most eight.

    Where the option of a group was swept, its name stands for it (``choices.scheduler``, or its class where a config
    has no names), and of its own keys only those follow that differ between runs of one option.

    Args:
        configs: nested, as runs store them.
    """
    from ornstein.experiment.report.collect import differing, flat

    named = all(map(_choices, configs))
    plain = [flat({key: node for key, node in config.items() if key != "choices"}) for config in configs]
    tables = [{**table, **(_choices(config) if named else {})} for table, config in zip(plain, configs, strict=True)]
    groups: dict[str, list[str]] = {}
    for key in differing(tables):
        # Where a run lies is told in other places too: trainer.default_root_dir.
        if (group := key.partition(".")[0]) not in _DULL and not key.endswith("_dir"):
            groups.setdefault(group, []).append(key)
    chosen: list[str] = []
    for group, keys in groups.items():
        classes = sorted((key for key in keys if key.endswith("_target_")), key=len)
        name = f"choices.{group}"
        option = name if len({table.get(name) for table in tables}) > 1 else next(iter(classes), None)
        if option is not None:
            alike: dict[Any, list[Any]] = {}
            for table in tables:
                alike.setdefault(table.get(option), []).append(table)
            within = {key for own in alike.values() for key in differing(own)}
            keys = [option, *(key for key in keys if key in within and key not in classes)]
        chosen += keys
    return tuple(chosen[:MAX_SWEPT])


def _choices(config: Mapping[str, Any]) -> dict[str, str]:
    """Names of the chosen options: beside the config in W&B, among the logger's options in a run's folder."""
    node = config.get("choices") or ((config.get("logger") or {}).get("wandb") or {}).get("choices") or {}
    return {f"choices.{group}": str(name) for group, name in node.items()}


def known_of_folder(folder: Path) -> Known:
    """What the runs at or below ``folder`` hold and are called in W&B.

    Raises:
        OrnsteinError: no run there, or none that was logged to W&B.
    """
    from ornstein.experiment.report.collect import find_runs, read_run
    from ornstein.experiment.run_dir import read_config

    ids = sorted(path.read_text(encoding="utf-8").strip() for path in folder.rglob("wandb_id.txt"))
    logged = [run for run in find_runs(folder) if (run / "wandb_id.txt").is_file()]
    if not ids:
        raise OrnsteinError(
            f"runs={folder}: no run there was logged to W&B (none has a wandb_id.txt): train with logger=wandb, or "
            "name another folder."
        )
    records = [record for run in logged if (record := read_run(run, root=folder)).status != "damaged"]
    curves = {name for record in records for name in record.curves}
    figures = {name for record in records if "run" in record.config for name in record.figures}
    trained = [record.folder for record in records if record.config.get("task") == "train"]
    return Known(
        columns=frozenset(curves | figures),
        swept=differing_keys([read_config(run / "config.yaml") for run in trained]),
        ids=tuple(ids),
    )
