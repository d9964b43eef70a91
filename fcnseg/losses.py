"""The fused losses as modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fcnseg import functional


class UpsampleCrossEntropyLoss(nn.Module):
    """:func:`fcnseg.upsample_cross_entropy` with its options kept.

    Args:
        weight: class weights ``[C]``, kept as a buffer; None weighs classes alike.
        ignore_index, reduction, label_smoothing, align_corners, scale_factor: as in the function.

    Example:
        >>> import torch, fcnseg
        >>> criterion = fcnseg.UpsampleCrossEntropyLoss(ignore_index=255)
        >>> target = torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> round(criterion(torch.zeros(1, 2, 2, 2), target).item(), 4)  # log 2
        0.6931
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        align_corners: bool = False,
        scale_factor: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.align_corners = align_corners
        self.scale_factor = scale_factor

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of ``logits`` [N, C, h, w] against ``target`` [N, H, W]."""
        return functional.upsample_cross_entropy(
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            align_corners=self.align_corners,
            scale_factor=self.scale_factor,
        )


class ConvTransposeCrossEntropyLoss(nn.Module):
    """A learnable transposed convolution and its cross entropy, fused.

    Equal to ``nn.ConvTranspose2d`` followed by ``nn.CrossEntropyLoss``; holds the convolution's
    ``weight`` and ``bias`` under the same names, so its state dict is the convolution's.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
            dilation: as in ``nn.ConvTranspose2d``.
        crop: first row and column of the output that the target covers.
        class_weight: class weights ``[C]``, kept as a non-persistent buffer.
        ignore_index, reduction, label_smoothing: as in the function.

    Example:
        >>> import torch, fcnseg
        >>> criterion = fcnseg.ConvTransposeCrossEntropyLoss(4, 4, 4, stride=2, padding=1, groups=4)
        >>> target = torch.zeros(1, 4, 4, dtype=torch.uint8)
        >>> criterion(torch.randn(1, 4, 2, 2), target).shape
        torch.Size([])
    """

    class_weight: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        crop: tuple[int, int] = (0, 0),
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        convolution = nn.ConvTranspose2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
        )
        self.weight = convolution.weight
        self.bias = convolution.bias
        self.geometry: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "output_padding": output_padding,
            "groups": groups,
            "dilation": dilation,
            "crop": crop,
        }
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of ``input`` [N, C_in, h, w] against ``target`` [N, H, W]."""
        return functional.conv_transpose_cross_entropy(
            input,
            self.weight,
            target,
            self.bias,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.geometry,
        )

    def predict(
        self, input: Tensor, size: int | Sequence[int], dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Labels [N, H, W] of the transposed convolution of ``input``."""
        return functional.conv_transpose_argmax(
            input, self.weight, size, self.bias, dtype=dtype, **self.geometry
        )
