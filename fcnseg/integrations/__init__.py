"""Fused loss and prediction for models of other libraries, without touching their code.

:func:`fuse` takes a model of torchvision, segmentation_models.pytorch or Hugging Face
transformers; :func:`fuse_decode_head` a decode head of mmsegmentation;
:class:`ConfusionMatrixMetric` is a torchmetrics ``Metric``. None of those packages is imported
before it is needed, and the library itself needs none of them.
"""

from typing import Any

from fcnseg.integrations._fused_model import FusedModel
from fcnseg.integrations.mmsegmentation import fuse_decode_head, predict_labels
from fcnseg.integrations.models import fuse

__all__ = ["ConfusionMatrixMetric", "FusedModel", "fuse", "fuse_decode_head", "predict_labels"]


def __getattr__(name: str) -> Any:
    if name == "ConfusionMatrixMetric":
        from fcnseg.integrations.torchmetrics import ConfusionMatrixMetric

        return ConfusionMatrixMetric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
