"""Callbacks for any Lightning project: they import neither networks nor data."""

from ..checkpoints.atomic import AtomicCheckpointIO
from .exact_resume import ExactResume
from .export import ExportAtEnd
from .forgetting import Forgetting
from .fsdp.strategy import FSDP
from .fsdp.weights import construct_on_rank_zero
from .learning_rate import schedule_types, schedules
from .learning_rate.rewarming import LRRewarming
from .learning_rate.schedule_types import *  # noqa: F403  # whatever schedules there are
from .learning_rate.schedules import *  # noqa: F403
from .monitoring.hyperparameters import LogHyperparameters
from .monitoring.progress_bar import StepProgressBar
from .monitoring.tensorboard_layout import TensorBoardLayout
from .monitoring.throughput import Throughput
from .replay import ReplayScheduler, ReplaySource
from .samples.image_scores import ImageScores
from .samples.images import LogSamples
from .samples.text import LogText
from .save_on_signal import SaveOnSignal
from .weight_average import WeightAverage

__all__ = [
    "FSDP",
    "AtomicCheckpointIO",
    "ExactResume",
    "ExportAtEnd",
    "Forgetting",
    "ImageScores",
    "LRRewarming",
    "LogHyperparameters",
    "LogSamples",
    "LogText",
    "ReplayScheduler",
    "ReplaySource",
    "SaveOnSignal",
    "StepProgressBar",
    "TensorBoardLayout",
    "Throughput",
    "WeightAverage",
    "construct_on_rank_zero",
]
__all__ += schedule_types.__all__
__all__ += schedules.__all__
