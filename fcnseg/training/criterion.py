"""The loss of a run, as ``config`` chooses it, in the form that the training step calls.

A criterion is called ``criterion(model, x, target)`` and returns a scalar: the mean of the loss
over some of the target's pixels. Where ``criterion.count(target)`` tells what that mean divides by,
the means of the parts of a batch (see ``accumulate``) and of all processes are put together to
the mean over the whole batch; a criterion without it has its parts count alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fcnseg.data import SegmentationDataset
from fcnseg.data.report import count_pixels
from fcnseg.losses import SegmentationLoss, class_weights
from fcnseg.training.config import ConfigError, TrainConfig
from fcnseg.training.distributed import World

Criterion = Callable[[Any, Tensor, Tensor], Tensor]


def make_criterion(config: TrainConfig, train_set: SegmentationDataset, world: World) -> Criterion:
    """The criterion of a run; class weights are counted in the training set's labels.

    Raises:
        ConfigError: class weights for a data set whose labels cannot be read by themselves.
        DataError: a label file is missing or bad.
    """
    weight = None
    if config.class_weights != "none":
        if not hasattr(train_set, "load_label"):
            raise ConfigError("class_weights: the data set has no load_label to count the classes")
        if world.main:
            counts = torch.from_numpy(count_pixels(train_set, max(1, config.workers)))
            method: Any = config.class_weights
            weight = class_weights(counts[:, : train_set.num_classes].contiguous(), method)
        weight = world.gather(weight)[0]
    return SegmentationLoss(
        weight,
        ignore_index=train_set.ignore_index,
        label_smoothing=config.label_smoothing,
        aux_weight=config.aux_weight,
        focal_gamma=config.focal_gamma if config.loss == "focal" else 0.0,
        ohem_threshold=config.ohem_threshold if config.loss == "ohem" else None,
        ohem_min_kept=config.ohem_min_kept,
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
        criterion: Criterion,
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
