"""What the jobs of a sweep in one process make once: the run's module, its data, the reference and the floor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    from ornstein.cli.stored import StoredRun
    from ornstein.metrics.floor import RealFloor
    from ornstein.metrics.generative import GenerativeMetrics
    from ornstein.training.module import DiffusionModule

# What of evaluate's config changes neither the module nor its weights.
PER_JOB = (
    "sampler",
    "guidance",
    "metrics",
    "likelihood",
    "logger",
    "paths",
    "num_samples",
    "first_index",
    "size",
    "labels",
    "prompts",
    "prompts_file",
    "negative_prompt",
    "condition_images",
    "seed",
    "batch_size",
    "keep_samples",
    "devices",
)


class Held:
    """The newest object of each kind, and what decides it: asked for the same again it gives the same object."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, Any]] = {}

    def get(self, kind: str, decides: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, or gave last time if ``decides`` (of JSON types) was the same."""
        key = json.dumps(decides, sort_keys=True, default=str)
        if self._kept.get(kind, ("",))[0] != key:
            self._kept.pop(kind, None)  # its memory first
            self._kept[kind] = (key, make())
        return self._kept[kind][1]


@dataclass(frozen=True)
class Measures:
    """What samples are measured with.

    Attributes:
        metrics: with their reference.
        data: the run's data module, set up.
        floor: real against real, in the main feature space.
        further: the same in each further one, by the name of its figure.
    """

    metrics: GenerativeMetrics
    data: Any
    floor: RealFloor
    further: Mapping[str, RealFloor]


def module_of(stored: StoredRun, cfg: DictConfig, *, device: str | None, held: Held) -> DiffusionModule:
    """The run's module with its weights; the one that was made last where nothing that decides it has changed.

    Raises:
        OrnsteinError: as :func:`ornstein.cli.load.restore` does.
    """
    from ornstein.cli.build import plain
    from ornstein.cli.load import restore

    path = stored.checkpoint_path(cfg.checkpoint)
    state = path.stat()
    own = {key: value for key, value in plain(cfg).items() if key not in PER_JOB}
    decides = [str(path.resolve()), state.st_mtime_ns, state.st_size, device, own]
    module: DiffusionModule = held.get(
        "module",
        decides,
        lambda: restore(
            stored,
            cfg,
            checkpoint=cfg.checkpoint,
            weights=cfg.weights,
            trust_targets=list(cfg.trust_targets),
            device=device,
        ),
    )
    return module


def measures_of(cfg: DictConfig, *, device: Any, count: int, held: Held) -> Measures:
    """The metrics with their reference, the data, and the floor for ``count`` samples; under torch.distributed every
    process must call it.

    Raises:
        OrnsteinError: no feature space, or data that cannot be read.
    """
    from omegaconf import OmegaConf

    from ornstein.cli.build import build_data, build_metrics
    from ornstein.errors import OrnsteinError
    from ornstein.training import scoring

    metric_options, data_options = (OmegaConf.to_container(cfg[name], resolve=True) for name in ("metrics", "data"))

    def opened() -> Any:
        data = build_data(cfg)
        data.setup()
        return data

    def measured() -> Any:
        metrics = build_metrics(cfg.metrics)
        if metrics is None:
            raise OrnsteinError(
                "metrics has no feature space for this run's data: name one, such as metrics=digits, mnist, "
                "fashion_mnist or inception."
            )
        metrics.to(device)
        scoring.set_references(metrics, data.reference)
        return metrics

    data = held.get("data", data_options, opened)
    both = [metric_options, data_options, str(device)]
    metrics = held.get("metrics", both, measured)
    metrics.reset()
    floor = held.get("floor", [*both, count], lambda: scoring.floor_of(metrics, data.reference, count))
    further = held.get("further", [*both, count], lambda: scoring.further_floors(metrics, data.reference, count))
    return Measures(metrics, data, floor, further)
