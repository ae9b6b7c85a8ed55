"""Callbacks: what happens around training steps. All periods count optimizer steps."""

from ornstein.training.callbacks.checkpoint import Checkpoint
from ornstein.training.callbacks.codec_grid import CodecGrid
from ornstein.training.callbacks.evaluation import GenerativeEvaluation
from ornstein.training.callbacks.log import TrainingLog
from ornstein.training.callbacks.loss_heatmap import LossHeatmap
from ornstein.training.callbacks.nonfinite import NonFiniteGuard
from ornstein.training.callbacks.periodic import Periodic
from ornstein.training.callbacks.preemption import Preempted, Preemption
from ornstein.training.callbacks.progress import ProgressBar, progress_task
from ornstein.training.callbacks.reconstruction import (
    CodecFile,
    LossTerms,
    ReconstructionEvaluation,
    ReconstructionGrid,
)
from ornstein.training.callbacks.sample_grid import SampleGrid
from ornstein.training.callbacks.schedule_plot import SchedulePlot
from ornstein.training.callbacks.throughput import Lap, Throughput
from ornstein.training.callbacks.trajectory import Trajectory
from ornstein.training.callbacks.validation import Validation

__all__ = [
    "Checkpoint",
    "CodecFile",
    "CodecGrid",
    "GenerativeEvaluation",
    "Lap",
    "LossHeatmap",
    "LossTerms",
    "NonFiniteGuard",
    "Periodic",
    "Preempted",
    "Preemption",
    "ProgressBar",
    "ReconstructionEvaluation",
    "ReconstructionGrid",
    "SampleGrid",
    "SchedulePlot",
    "Throughput",
    "TrainingLog",
    "Trajectory",
    "Validation",
    "progress_task",
]
