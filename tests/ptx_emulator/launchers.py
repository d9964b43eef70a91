"""The launchers of fcnseg's kernels and their references, in the form in which the cases call them.

The cases of the emulator go through this file alone, so a changed signature of a launcher is
followed here and nowhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fcnseg import reference
from fcnseg.kernels import common
from fcnseg.kernels.bad_labels import record_bad_labels
from fcnseg.kernels.conv_transpose_argmax import conv_transpose_argmax_forward
from fcnseg.kernels.conv_transpose_cross_entropy import (
    conv_transpose_cross_entropy_backward,
    conv_transpose_cross_entropy_forward,
)
from fcnseg.kernels.upsample_argmax import upsample_argmax_forward
from fcnseg.kernels.upsample_confusion_matrix import upsample_confusion_matrix_forward_
from fcnseg.kernels.upsample_cross_entropy import (
    upsample_cross_entropy_backward,
    upsample_cross_entropy_forward,
    upsample_cross_entropy_gradient,
)
from tests.ptx_emulator.triton_bridge import Session, emulate

__all__ = [
    "Loss",
    "bilinear_loss",
    "bilinear_loss_alone",
    "bilinear_loss_reference",
    "conv_transpose_argmax_forward",
    "conv_transpose_loss",
    "conv_transpose_loss_reference",
    "launches_on",
    "record_bad_labels",
    "upsample_argmax_forward",
    "upsample_confusion_matrix_forward_",
]

Geometry = tuple[bool, float | None, float | None]  # align_corners, scale_h, scale_w
ConvGeometry = tuple[
    Any, Any, Any, Any, Any, Any
]  # stride, padding, output_padding, groups, dilation, crop
ConvOperands = tuple[
    Any, Any, Any, Any, Any
]  # input, weight, target, bias or None, class weight or None


@dataclass(frozen=True)
class Loss:
    """The options of a loss that are no tensors."""

    ignore_index: int = 255
    reduction: str = "mean"
    smoothing: float = 0.0

    @property
    def per_pixel(self) -> bool:
        return self.reduction == "none"


@contextlib.contextmanager
def launches_on(session: Session, multiprocessors: int = 132) -> Iterator[Session]:
    """Inside, launchers see the architecture of the session, and kernels run in the emulator.

    ``multiprocessors``: how many the device is said to have; with few, a small problem fills it as
    a large one fills a real device.
    """
    with (
        mock.patch.object(common, "capability", lambda device: session.arch),
        mock.patch.object(common, "multiprocessors", lambda device: multiprocessors),
        emulate(session.arch, session),
    ):
        yield session


def bilinear_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: Loss,
    geometry: Geometry,
    upstream: Tensor,
    record: Tensor,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient for ``upstream``: a scalar, or [N, H, W] without reduction.

    ``in_place``: the gradient of a scalar loss is written over its workspace, as float32.
    """
    value, sums, edges = upsample_cross_entropy_forward(
        logits, target, weight, loss.ignore_index, loss.reduction, loss.smoothing, *geometry,
        True, record,
    )  # fmt: skip
    if loss.per_pixel:
        gradient = upsample_cross_entropy_backward(
            upstream, logits, target, weight, loss.ignore_index, loss.smoothing, *geometry, record
        )
    else:
        gradient = sums if in_place else torch.empty_like(logits)
        upsample_cross_entropy_gradient(
            upstream, sums, edges, gradient, tuple(target.shape[1:]), weight is not None,
            loss.smoothing, *geometry,
        )  # fmt: skip
    return value, gradient


def bilinear_loss_alone(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: Loss,
    geometry: Geometry,
    record: Tensor,
) -> Tensor:
    """The loss where no gradient is wanted, which another variant of the kernel computes."""
    value, *_ = upsample_cross_entropy_forward(
        logits, target, weight, loss.ignore_index, loss.reduction, loss.smoothing, *geometry,
        False, record,
    )  # fmt: skip
    return value


def bilinear_loss_reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: Loss,
    geometry: Geometry,
    upstream: Tensor,
) -> tuple[Tensor, Tensor]:
    """What ``bilinear_loss`` approximates, in the arithmetic of the logits' dtype."""
    value, gradient = reference.upsample_cross_entropy(
        logits, target, weight, loss.ignore_index, loss.reduction, loss.smoothing, *geometry, True
    )
    upstream = upstream.to(logits.dtype)
    if loss.per_pixel:
        gradient = reference.upsample_cross_entropy_backward(
            upstream, logits, target, weight, loss.ignore_index, loss.smoothing, *geometry
        )
        return value, gradient
    return value, gradient * upstream


def conv_transpose_loss(
    operands: ConvOperands,
    geometry: ConvGeometry,
    loss: Loss,
    wanted: tuple[bool, bool, bool],
    upstream: Tensor | None,
    record: Tensor,
) -> tuple[Tensor, ...]:
    """The loss and the wanted gradients; ``operands``: input, weight, target, bias, class weight.

    ``upstream`` [N, H, W] is for a loss without reduction, whose gradients are another launch.
    """
    value, *gradients = conv_transpose_cross_entropy_forward(
        *operands, *geometry, loss.ignore_index, loss.reduction, loss.smoothing, wanted, record
    )
    if loss.per_pixel:
        assert upstream is not None
        gradients = list(
            conv_transpose_cross_entropy_backward(
                upstream, *operands, *geometry, loss.ignore_index, loss.smoothing, wanted
            )
        )
    return value, *gradients


def conv_transpose_loss_reference(
    operands: ConvOperands,
    geometry: ConvGeometry,
    loss: Loss,
    wanted: tuple[bool, bool, bool],
    upstream: Tensor | None,
) -> tuple[Tensor, ...]:
    """What ``conv_transpose_loss`` approximates, in the arithmetic of the operands' dtype."""
    value, *gradients = reference.conv_transpose_cross_entropy(
        *operands, *geometry, loss.ignore_index, loss.reduction, loss.smoothing, wanted
    )
    if loss.per_pixel:
        assert upstream is not None
        gradients = list(
            reference.conv_transpose_cross_entropy_backward(
                upstream.to(operands[0].dtype), *operands, *geometry, loss.ignore_index,
                loss.smoothing, wanted,
            )
        )  # fmt: skip
    return value, *gradients


def no_record() -> Tensor:
    """A record of bad labels [count, value, n, y, x] that has met none."""
    return torch.zeros(5, dtype=torch.int64)
