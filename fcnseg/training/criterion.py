"""The loss of a run, as ``config`` chooses it, in the form that the training step calls.

A criterion is called ``criterion(model, x, target)`` and returns a scalar: the mean of the loss
over some of the target's pixels. Where ``criterion.count(target)`` tells what that mean divides by,
the means of the parts of a batch (see ``accumulate``) and of all processes are put together to
the mean over the whole batch; a criterion without it has its parts count alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fcnseg.data import SegmentationDataset
from fcnseg.training.config import ConfigError, TrainConfig


@dataclass(frozen=True)
class CrossEntropy:
    """``model.loss`` with its options kept.

    Args:
        ignore_index, label_smoothing, aux_weight: as in :meth:`fcnseg.models.FCN.loss`.
        weight: class weights [C], float32; None weighs classes alike.
    """

    ignore_index: int
    label_smoothing: float = 0.0
    aux_weight: float = 0.4
    weight: Tensor | None = None

    def __call__(self, model: Any, x: Tensor, target: Tensor) -> Tensor:
        return model.loss(
            x,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            aux_weight=self.aux_weight,
        )

    def count(self, target: Tensor) -> Tensor:
        """The weight of the valid pixels: what the mean divides by. Scalar, on their device."""
        valid = target != self.ignore_index
        if self.weight is None:
            return valid.sum()
        classes = len(self.weight)
        labels = target.long()
        # A bad label must not be used as an index; the loss itself reports it.
        valid &= (labels >= 0) & (labels < classes)
        weight = self.weight.double()[labels.clamp(0, classes - 1)]
        return torch.where(valid, weight, 0.0).sum()


def make_criterion(
    config: TrainConfig, train_set: SegmentationDataset, device: torch.device
) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """The criterion of a run.

    Raises:
        ConfigError: a loss that is not there.
    """
    if config.loss != "ce" or config.class_weights != "none":
        raise ConfigError(f"loss: {config.loss} with class_weights {config.class_weights}")
    return CrossEntropy(
        train_set.ignore_index,
        label_smoothing=config.label_smoothing,
        aux_weight=config.aux_weight,
    )


class Objective(nn.Module):
    """A model and its criterion as one module: ``forward`` is the loss.

    DistributedDataParallel must see the call that makes the gradients, which is not the model's.

    Args:
        model: the network.
        criterion: see :func:`make_criterion`.
        matrix: int64 [C, C]: also score the batch, from the logits that the loss is made of.
        ignore_index: of the scores.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Tensor, Tensor], Tensor],
        *,
        matrix: Tensor | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if matrix is not None and not hasattr(model, "low_resolution"):
            raise ConfigError("train_scores: the model has no low-resolution logits to score")
        self.model, self.criterion = model, criterion
        self._matrix, self.ignore_index = matrix, ignore_index

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        if self._matrix is None:
            return self.criterion(self.model, x, target)
        model: Any = self.model
        compute, logits = model.low_resolution, {}

        def keep(x: Tensor, **options: Any) -> dict[str, Tensor]:
            logits.update(compute(x, **options))
            return dict(logits)

        try:
            model.low_resolution = keep
            loss = self.criterion(model, x, target)
            model.low_resolution = lambda x, **_: {"out": logits["out"].detach()}
            model.update_confusion_matrix(self._matrix, x, target, ignore_index=self.ignore_index)
        finally:
            del model.low_resolution  # the method of the class is there again
        return loss
