"""What every fused model offers, in terms of its low-resolution logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fcnseg import functional


class FusedModel(nn.Module, ABC):
    """A model of another library with fused loss and prediction; :func:`fuse` makes one.

    The model is shared, not copied: train this one and the original learns. Its weights are in
    ``fused.model.state_dict()``.

    Attributes:
        model: the original.
        align_corners: of the original's upsampling.
        ignore_index: the default of the calls.
        aux_weight: factor of the auxiliary loss, the default of the calls.
    """

    align_corners = False
    ignore_index = 255
    aux_weight = 0.5

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def low_resolution(self, x: Tensor, *, aux: bool = True) -> dict[str, Tensor]:
        """Logits before upsampling: "out" [N, C, h, w] and, where asked for and there, "aux"."""

    def forward(self, x: Tensor, target: Tensor | None = None, **options: Any) -> Any:
        """:meth:`loss` where a target is given (so that DDP and hooks see it), else the original's
        output."""
        return self.model(x, **options) if target is None else self.loss(x, target, **options)

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        aux_weight: float | None = None,
    ) -> Tensor:
        """Cross entropy of the upsampled logits, main and, where there are some, auxiliary.

        Equals ``F.cross_entropy(out, target, ...) + aux_weight * F.cross_entropy(aux, target,
        ...)`` of the original's full-resolution outputs, which are never made.

        Args:
            x: float ``[N, 3, H, W]``, normalised images.
            target: class indices ``[N, H, W]``, uint8, int32 or int64; if its size differs from
                the images', the logits go straight to the target's size.
            weight: ``[C]`` class weights.
            ignore_index: label of pixels that do not count; None: the model's.
            reduction, label_smoothing: as in :func:`fcnseg.upsample_cross_entropy`.
            aux_weight: factor of the auxiliary loss; None: the model's.

        Returns:
            The loss: a scalar, or ``[N, H, W]`` with ``reduction="none"``.

        Raises:
            ValueError, TypeError, IndexError: as :func:`fcnseg.upsample_cross_entropy`.
        """
        return self._loss(
            self.low_resolution(x),
            target,
            self.aux_weight if aux_weight is None else aux_weight,
            weight=weight,
            ignore_index=self.ignore_index if ignore_index is None else ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    def _loss(
        self, logits: dict[str, Tensor], target: Tensor, aux_weight: float, **options: Any
    ) -> Tensor:
        options["align_corners"] = self.align_corners
        loss = functional.upsample_cross_entropy(logits["out"], target, **options)
        if "aux" in logits:
            aux = functional.upsample_cross_entropy(logits["aux"], target, **options)
            loss = loss + aux_weight * aux
        return loss

    @torch.no_grad()
    def predict(self, x: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """Labels: the argmax of the original's full-resolution logits. Call ``eval()`` first.

        Args:
            x: float ``[N, 3, H, W]``, normalised images.
            size: of the labels: (rows, columns), or an int for both; None: that of ``x``.

        Returns:
            int64 ``[N, *size]``.
        """
        return functional.upsample_argmax(
            self.low_resolution(x, aux=False)["out"],
            x.shape[-2:] if size is None else size,
            align_corners=self.align_corners,
        )

    @torch.no_grad()
    def update_confusion_matrix(
        self, matrix: Tensor, x: Tensor, target: Tensor, *, ignore_index: int | None = None
    ) -> Tensor:
        """Add the predictions for ``x`` to ``matrix``, int64 ``[C, C]``. Call ``eval()`` first.

        Returns:
            ``matrix``; rows truth, columns prediction.
        """
        return functional.upsample_confusion_matrix_(
            matrix,
            self.low_resolution(x, aux=False)["out"],
            target,
            ignore_index=self.ignore_index if ignore_index is None else ignore_index,
            align_corners=self.align_corners,
        )
