"""Fused upsampling + softmax cross entropy and streaming mIoU for semantic segmentation.

The operators and the metric are here; ``data``, ``inference``, ``integrations``, ``models`` and
``training`` are imported when they are first used, so that the operators need torch alone.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"

from fcnseg import metrics
from fcnseg._extension import build_info
from fcnseg._labels import check_labels
from fcnseg.functional import (
    confusion_matrix,
    confusion_matrix_,
    conv_transpose_argmax,
    conv_transpose_cross_entropy,
    upsample_argmax,
    upsample_confusion_matrix,
    upsample_confusion_matrix_,
    upsample_cross_entropy,
)
from fcnseg.losses import (
    ConvTransposeCrossEntropyLoss,
    SegmentationLoss,
    UpsampleCrossEntropyLoss,
)
from fcnseg.metrics import ConfusionMatrix

_LAZY = ("data", "inference", "integrations", "models", "training")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"fcnseg.{name}")
    raise AttributeError(f"module 'fcnseg' has no attribute {name!r}")


__all__ = [
    "ConfusionMatrix",
    "ConvTransposeCrossEntropyLoss",
    "SegmentationLoss",
    "UpsampleCrossEntropyLoss",
    "__version__",
    "build_info",
    "check_labels",
    "confusion_matrix",
    "confusion_matrix_",
    "conv_transpose_argmax",
    "conv_transpose_cross_entropy",
    "metrics",
    "upsample_argmax",
    "upsample_confusion_matrix",
    "upsample_confusion_matrix_",
    "upsample_cross_entropy",
]
