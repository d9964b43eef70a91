"""A torchmetrics ``Metric`` over the streaming confusion matrix. Importing this imports it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from fcnseg import metrics


class ConfusionMatrixMetric(Metric):
    """mIoU, or another score, as a torchmetrics ``Metric`` (for a ``MetricCollection``, Lightning).

    Args:
        num_classes: C.
        ignore_index: label of the target's pixels that are not counted.
        score: an attribute of :class:`fcnseg.metrics.Scores`, or None for
            all of them, as a dict.
        kwargs: of ``torchmetrics.Metric``.

    ``update`` takes labels ``[...]``, or low-resolution logits ``[N, C, h, w]`` of any floating
    dtype, which go straight into the matrix, and a target.

    Raises:
        ValueError: ``score`` is not one of the scores.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    matrix: Tensor
    invalid: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        score: str | None = "mean_iou",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        known = [field.name for field in dataclasses.fields(metrics.Scores)]
        if score is not None and score not in known:
            raise ValueError(f"score: expected None or one of {', '.join(known)}, got {score!r}")
        self.score = score
        counter = metrics.ConfusionMatrix(num_classes, ignore_index=ignore_index)
        self._counter = (counter,)  # in a tuple: no submodule, its tensors are this metric's
        for name, state in counter.named_buffers():
            self.add_state(name, default=state.clone(), dist_reduce_fx="sum")

    def _own_counter(self) -> metrics.ConfusionMatrix:
        (counter,) = self._counter  # torchmetrics puts new tensors in place of the states
        counter.matrix, counter.invalid = self.matrix, self.invalid
        return counter

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count a batch; arguments and errors as :meth:`fcnseg.ConfusionMatrix.update`."""
        self._own_counter().update(prediction, target)

    def compute(self) -> Any:
        """The score of all that was counted; errors as :meth:`fcnseg.ConfusionMatrix.compute`."""
        found = metrics.scores(self._own_counter().compute())
        return vars(found) if self.score is None else getattr(found, self.score)
