"""Callbacks for any Lightning project: they import neither networks nor data."""

from ..checkpoints.atomic import AtomicCheckpointIO
from .exact_resume import ExactResume
from .forgetting import Forgetting
from .fsdp.strategy import FSDP
from .fsdp.weights import construct_on_rank_zero
from .learning_rate.rewarming import LRRewarming
from .learning_rate.schedule_types import (
    Constant,
    InfiniteCosine,
    InfiniteInverseSqrt,
    Schedule,
    WarmupCosine,
    WarmupInverseSqrt,
    WarmupLinear,
    WarmupStableDecay,
    chain,
    lambda_lr,
)
from .learning_rate.schedules import (
    constant,
    cosine,
    exponential,
    infinite_cosine,
    infinite_inverse_sqrt,
    inverse_square_root,
    linear,
    piecewise,
    warmup_cosine,
    warmup_inverse_sqrt,
    warmup_linear,
    warmup_stable_decay,
)
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
    "Constant",
    "ExactResume",
    "Forgetting",
    "ImageScores",
    "InfiniteCosine",
    "InfiniteInverseSqrt",
    "LRRewarming",
    "LogHyperparameters",
    "LogSamples",
    "LogText",
    "ReplayScheduler",
    "ReplaySource",
    "SaveOnSignal",
    "Schedule",
    "StepProgressBar",
    "TensorBoardLayout",
    "Throughput",
    "WarmupCosine",
    "WarmupInverseSqrt",
    "WarmupLinear",
    "WarmupStableDecay",
    "WeightAverage",
    "chain",
    "constant",
    "construct_on_rank_zero",
    "cosine",
    "exponential",
    "infinite_cosine",
    "infinite_inverse_sqrt",
    "inverse_square_root",
    "lambda_lr",
    "linear",
    "piecewise",
    "warmup_cosine",
    "warmup_inverse_sqrt",
    "warmup_linear",
    "warmup_stable_decay",
]
