"""Oracles: eager PyTorch, word for word, in any dtype; third parties that need help to import."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE
from torch import Tensor

_libraries: list[torch.library.Library] = []  # a schema lives as long as its Library


def eager_upsample(
    logits: Tensor,
    size: Sequence[int],
    *,
    align_corners: bool = False,
    scale_factor: float | Sequence[float] | None = None,
) -> Tensor:
    """Full-resolution logits [N, C, H, W]."""
    if scale_factor is None or align_corners:
        return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=align_corners)
    factor = scale_factor if isinstance(scale_factor, float) else tuple(scale_factor)
    return F.interpolate(logits, scale_factor=factor, mode="bilinear", align_corners=False)


def eager_cross_entropy(z: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    weight = None if weight is None else weight.to(z.dtype)
    return F.cross_entropy(z, target.long(), weight, **options)


def eager_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    align_corners: bool = False,
    scale_factor: float | Sequence[float] | None = None,
    **options: Any,
) -> Tensor:
    """What ``fcnseg.upsample_cross_entropy`` says it equals, in the dtype of ``logits``."""
    z = eager_upsample(
        logits, target.shape[1:], align_corners=align_corners, scale_factor=scale_factor
    )
    return eager_cross_entropy(z, target, weight, **options)


def eager_conv_transpose(
    input: Tensor,
    weight: Tensor,
    size: Sequence[int],
    bias: Tensor | None = None,
    *,
    crop: Sequence[int] = (0, 0),
    **geometry: Any,
) -> Tensor:
    """The ``size`` window at ``crop`` of the transposed convolution [N, C, H, W]."""
    z = F.conv_transpose2d(input, weight, bias, **geometry)
    return z[:, :, crop[0] : crop[0] + size[0], crop[1] : crop[1] + size[1]]


def evaluate(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The value of ``function(*tensors)`` and its gradients, for an upstream gradient not 1."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    generator = torch.Generator().manual_seed(value.numel())
    upstream = torch.randn(value.shape, generator=generator, dtype=torch.float64) + 2
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]


def _error(value: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value. NaN where only one is."""
    if expected.numel() == 0:
        return 0.0
    value, scale = value.double(), expected.nan_to_num().abs().max().item() or 1.0
    same = (value == expected) | (value.isnan() & expected.isnan())
    return torch.where(same, 0.0, (value - expected).abs()).max().item() / scale


def assert_as_good_as_eager(
    fused: Callable[..., Tensor], eager: Callable[..., Tensor], tensors: Sequence[Tensor]
) -> None:
    """Values and gradients: error(fused) <= error(eager, same dtype) + tolerance, in float64.

    Both functions take ``tensors``. Where eager has no kernel for the dtype the tolerance alone
    counts.
    """
    expected = evaluate(eager, [tensor.double() for tensor in tensors])
    ours = evaluate(fused, tensors)
    try:
        theirs = evaluate(eager, tensors)
    except RuntimeError as error:
        if "not implemented for" not in str(error):
            raise
        theirs = expected
    names = ["value", *(f"gradient {i}" for i in range(len(tensors)))]
    for name, our, their, exact in zip(names, ours, theirs, expected, strict=True):
        assert our.shape == exact.shape, name
        bound = _error(their, exact) + TOLERANCE[our.dtype]
        assert _error(our, exact) <= bound, (name, _error(our, exact), bound)
    for tensor, gradient in zip(tensors, ours[1:], strict=True):
        assert gradient.dtype == tensor.dtype


def labels(
    shape: Sequence[int],
    num_classes: int,
    dtype: torch.dtype = torch.int64,
    *,
    ignore: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Random labels; a third of them ``ignore``, if given."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_classes, tuple(shape), generator=generator)
    if ignore is not None:
        drawn[torch.rand(tuple(shape), generator=generator) < 1 / 3] = ignore
    return drawn.to(dtype)


def normal(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def bincount_matrix(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> Tensor:
    """The confusion matrix by ``torch.bincount``."""
    kept = target.long() != ignore_index
    bins = target.long()[kept] * num_classes + prediction.long()[kept]
    return torch.bincount(bins, minlength=num_classes**2).view(num_classes, num_classes)


@cache
def import_torchvision() -> ModuleType:
    """torchvision beside any build of torch, or a skip where it is not installed.

    PyPI's torchvision is a CUDA build. Beside a CPU build of torch its operators do not load, and
    the import fails where it looks their schemas up; it works once these are defined. After that
    `torchvision.models` works; `torchvision.io` and the operators do not.
    """
    try:
        return pytest.importorskip("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return importlib.import_module("torchvision")
