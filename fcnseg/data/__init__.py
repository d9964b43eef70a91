"""Data sets for semantic segmentation, their augmentation and normalisation.

Needs opencv-python-headless; `TrainTransform` also needs albumentations.
"""

from __future__ import annotations

from pathlib import Path

from .ade20k import ADE20K
from .camvid import CamVid
from .cityscapes import Cityscapes
from .dataset import MEAN, STD, DataError, SegmentationDataset, Transform, normalise
from .sampler import DistributedEvalSampler
from .transforms import EvalTransform, TrainTransform, worker_init_fn

__all__ = [
    "ADE20K",
    "MEAN",
    "STD",
    "CamVid",
    "Cityscapes",
    "DataError",
    "DistributedEvalSampler",
    "EvalTransform",
    "SegmentationDataset",
    "TrainTransform",
    "Transform",
    "normalise",
    "open_dataset",
    "worker_init_fn",
]

_DATASETS: dict[str, type[SegmentationDataset]] = {
    "cityscapes": Cityscapes,
    "ade20k": ADE20K,
    "camvid": CamVid,
}


def open_dataset(
    name: str, root: str | Path, split: str = "train", transform: Transform | None = None
) -> SegmentationDataset:
    """A data set by its name.

    Args:
        name: ``"cityscapes"``, ``"ade20k"`` or ``"camvid"``.
        root, split, transform: as for `SegmentationDataset`.

    Raises:
        ValueError: no data set has that name; see `SegmentationDataset` for the others.
    """
    if name not in _DATASETS:
        raise ValueError(f"name: expected one of {', '.join(_DATASETS)}; got {name!r}")
    return _DATASETS[name](root, split, transform)
