"""The experiment floor: what a run leaves on disk, and how it survives being killed.

Importing this package loads nothing heavy; each name below is looked up on first use.
"""

from typing import TYPE_CHECKING

from ornstein.lazy import lazy_names

if TYPE_CHECKING:
    from ornstein.experiment.checkpoint_io import AtomicCheckpointIO as AtomicCheckpointIO
    from ornstein.experiment.csv_log import CSVLogger as CSVLogger
    from ornstein.experiment.environment import describe_environment as describe_environment
    from ornstein.experiment.metrics_file import read_metrics as read_metrics
    from ornstein.experiment.mlflow_log import mlflow_logger as mlflow_logger
    from ornstein.experiment.resume import ResumableLogs as ResumableLogs
    from ornstein.experiment.resume import close_loggers as close_loggers
    from ornstein.experiment.run_dir import RunDirectory as RunDirectory
    from ornstein.experiment.run_identity import find_unfinished as find_unfinished
    from ornstein.experiment.run_identity import identity as identity
    from ornstein.experiment.seeding import set_determinism as set_determinism
    from ornstein.experiment.summary import Summary as Summary
    from ornstein.experiment.tensorboard_log import tensorboard_logger as tensorboard_logger
    from ornstein.experiment.wandb_log import wandb_logger as wandb_logger

_HOME = {
    "AtomicCheckpointIO": "checkpoint_io",
    "CSVLogger": "csv_log",
    "ResumableLogs": "resume",
    "RunDirectory": "run_dir",
    "Summary": "summary",
    "close_loggers": "resume",
    "describe_environment": "environment",
    "find_unfinished": "run_identity",
    "identity": "run_identity",
    "mlflow_logger": "mlflow_log",
    "read_metrics": "metrics_file",
    "set_determinism": "seeding",
    "tensorboard_logger": "tensorboard_log",
    "wandb_logger": "wandb_log",
}
__all__ = list(_HOME)
__getattr__, __dir__ = lazy_names(__name__, _HOME)
