"""Training of the networks of :mod:`fcnseg.models`: configuration, loop, checkpoints, reports."""

from fcnseg.training.checkpoint import CheckpointError
from fcnseg.training.config import ConfigError, TrainConfig
from fcnseg.training.distributed import PeerError, World
from fcnseg.training.loop import DivergedError, Trainer, TrainResult, WorkerError, train
from fcnseg.training.schedule import lr_factor

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DivergedError",
    "PeerError",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "WorkerError",
    "World",
    "lr_factor",
    "train",
]
