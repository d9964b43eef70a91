"""Training of the networks of :mod:`fcnseg.models`: configuration, loop, checkpoints, reports."""

from fcnseg.training.checkpoint import CheckpointError
from fcnseg.training.config import ConfigError, TrainConfig
from fcnseg.training.loop import DivergedError, Trainer, TrainResult, train
from fcnseg.training.schedule import lr_factor

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DivergedError",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "lr_factor",
    "train",
]
