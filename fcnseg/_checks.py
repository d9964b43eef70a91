"""Argument errors of the public functions, from metadata alone: no data is read, nothing waits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)
COUNTED_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
REDUCTIONS = ("mean", "sum", "none")


def _dtypes(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def tensor(name: str, value: Any, dim: int, shape: str, dtypes: Sequence[torch.dtype]) -> None:
    """``value`` is a tensor of ``dim`` dimensions, called ``shape``, of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() != dim:
        raise ValueError(
            f"{name} must have {dim} dimensions {shape}, got shape {list(value.shape)}"
        )
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {_dtypes(dtypes)}, got {value.dtype}")


def pair(name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """An int or a pair of ints, each at least ``minimum``, as a pair."""
    values = (value, value) if isinstance(value, int | torch.SymInt) else value
    if not (
        isinstance(values, tuple | list)
        and len(values) == 2
        and all(isinstance(v, int | torch.SymInt) and not isinstance(v, bool) for v in values)
    ):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if values[0] < minimum or values[1] < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return values[0], values[1]


def logits(name: str, value: Tensor) -> None:
    """A floating-point [N, C, h, w] with at least one class and one sample per axis."""
    tensor(name, value, 4, "[N, C, h, w]", LOGITS_DTYPES)
    if value.shape[1] < 1 or value.shape[2] < 1 or value.shape[3] < 1:
        raise ValueError(
            f"{name} must have C, h and w of at least 1, got shape {list(value.shape)}"
        )


def _same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {value.device}"
        )


def target(value: Tensor, other_name: str, other: Tensor) -> None:
    """Class indices [N, H, W] for ``other`` [N, ...]."""
    if isinstance(value, Tensor) and value.is_floating_point():
        raise TypeError(
            "target must hold class indices (torch.uint8, torch.int32 or torch.int64); "
            f"probabilities are not supported, got {value.dtype}"
        )
    tensor("target", value, 3, "[N, H, W]", LABEL_DTYPES)
    if value.shape[0] != other.shape[0]:
        raise ValueError(
            f"target must have the batch size of {other_name}, {other.shape[0]}, "
            f"got shape {list(value.shape)}"
        )
    if value.shape[1] < 1 or value.shape[2] < 1:
        raise ValueError(f"target must have H and W of at least 1, got shape {list(value.shape)}")
    _same_device("target", value, other_name, other)


def class_weight(name: str, value: Tensor | None, num_classes: int, other: Tensor) -> None:
    """None, or [C] of the logits' dtype or float32, without gradient."""
    if value is None:
        return
    tensor(name, value, 1, "[C]", LOGITS_DTYPES)
    if value.shape[0] != num_classes:
        raise ValueError(
            f"{name} must have one value per class, {num_classes}, got shape {list(value.shape)}"
        )
    if value.dtype not in (torch.float32, other.dtype):
        raise TypeError(
            f"{name} must have dtype torch.float32 or the logits' {other.dtype}, got {value.dtype}"
        )
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad: its gradient is not computed")
    _same_device(name, value, "the logits", other)


def loss_options(ignore_index: int, reduction: str, label_smoothing: float) -> None:
    ignored(ignore_index)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, int | float):
        raise TypeError(f"label_smoothing must be a number, got {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")


def ignored(ignore_index: int) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | torch.SymInt):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")


def scales(
    scale_factor: float | Sequence[float] | None,
    align_corners: bool,
    in_size: Sequence[int],
    out_size: Sequence[int],
) -> tuple[float | None, float | None]:
    """The pair of scales whose inverse is the coordinate step; None where the sizes give it."""
    if scale_factor is None or align_corners:
        return None, None
    if isinstance(scale_factor, int | float):
        scale_factor = (scale_factor, scale_factor)
    values = scale_factor
    if not (
        isinstance(values, tuple | list)
        and len(values) == 2
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    ):
        raise TypeError(f"scale_factor must be a number or a pair of numbers, got {scale_factor!r}")
    for axis, scale, small, large in zip("HW", values, in_size, out_size, strict=True):
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale_factor must be positive and finite, got {scale_factor!r}")
        if math.floor(small * scale) != large:
            raise ValueError(
                f"scale_factor must give the target's size: floor({small} * {scale}) is "
                f"{math.floor(small * scale)}, but {axis} is {large}"
            )
    return float(values[0]), float(values[1])


def argmax_dtype(dtype: torch.dtype, num_classes: int) -> None:
    if dtype not in LABEL_DTYPES:
        raise TypeError(f"dtype must be {_dtypes(LABEL_DTYPES)}, got {dtype}")
    if dtype == torch.uint8 and num_classes > 256:
        raise ValueError(f"dtype=torch.uint8 holds at most 256 classes, got {num_classes}")


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    groups: int,
    dilation: tuple[int, int],
    crop: tuple[int, int],
) -> int:
    """Checks the operands of a transposed convolution; returns the number of classes."""
    logits("input", input)
    tensor("weight", weight, 4, "[C_in, C / groups, kH, kW]", LOGITS_DTYPES)
    if isinstance(groups, bool) or not isinstance(groups, int | torch.SymInt):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    if groups < 1 or input.shape[1] % groups:
        raise ValueError(
            f"groups must be at least 1 and divide the input's channels, {input.shape[1]}, "
            f"got {groups}"
        )
    if weight.shape[0] != input.shape[1] or min(weight.shape[1:]) < 1:
        raise ValueError(
            f"weight must have shape [C_in, C / groups, kH, kW] with C_in = {input.shape[1]}, "
            f"got {list(weight.shape)}"
        )
    if weight.dtype != input.dtype:
        raise TypeError(f"weight must have the input's dtype, {input.dtype}, got {weight.dtype}")
    _same_device("weight", weight, "input", input)
    num_classes = weight.shape[1] * groups
    if bias is not None:
        tensor("bias", bias, 1, "[C]", LOGITS_DTYPES)
        if bias.shape[0] != num_classes:
            raise ValueError(
                f"bias must have one value per class, {num_classes}, got shape {list(bias.shape)}"
            )
        if bias.dtype != input.dtype:
            raise TypeError(f"bias must have the input's dtype, {input.dtype}, got {bias.dtype}")
        _same_device("bias", bias, "input", input)
    for axis in range(2):
        if output_padding[axis] >= max(stride[axis], dilation[axis]):
            raise ValueError(
                "output_padding must be smaller than stride or dilation, "
                f"got {output_padding} with stride {stride} and dilation {dilation}"
            )
        full = (
            (input.shape[2 + axis] - 1) * stride[axis]
            - 2 * padding[axis]
            + dilation[axis] * (weight.shape[2 + axis] - 1)
            + output_padding[axis]
            + 1
        )
        if crop[axis] + size[axis] > full:
            raise ValueError(
                f"{'HW'[axis]} of the target must fit in the transposed convolution's output: "
                f"crop {crop[axis]} + {size[axis]} exceeds {full}"
            )
    return num_classes


def labels(name: str, value: Any) -> None:
    """Labels of any shape, to be counted."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in COUNTED_DTYPES:
        raise TypeError(f"{name} must have dtype {_dtypes(COUNTED_DTYPES)}, got {value.dtype}")


def prediction_and_target(prediction: Tensor, target: Tensor) -> None:
    labels("prediction", prediction)
    labels("target", target)
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction must have the target's shape, {list(target.shape)}, "
            f"got {list(prediction.shape)}"
        )
    _same_device("prediction", prediction, "target", target)


def num_classes(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"num_classes must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"num_classes must be at least 1, got {value}")


def matrix(value: Tensor, other_name: str, other: Tensor, classes: int | None = None) -> None:
    """A square int64 matrix, of ``classes`` rows if given, on the device of ``other``."""
    tensor("matrix", value, 2, "[C, C]", (torch.int64,))
    if value.shape[0] != value.shape[1] or value.shape[0] < 1:
        raise ValueError(f"matrix must be square, got shape {list(value.shape)}")
    if classes is not None and value.shape[0] != classes:
        raise ValueError(
            f"matrix must have one row per class of {other_name}, {classes}, "
            f"got shape {list(value.shape)}"
        )
    _same_device("matrix", value, other_name, other)


def integer(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """A finite number between ``low`` and ``high``, which belong to the range unless open."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    inside = (value > low if open_low else value >= low) and math.isfinite(value)
    if not inside or (value >= high if open_high else value > high):
        left, right = "(" if open_low else "[", ")" if open_high or high == math.inf else "]"
        raise ValueError(f"{name} must lie in {left}{low}, {high}{right}, got {value}")


def pixel_loss(value: Any) -> None:
    """Losses of any shape, float32 or float64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must be a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"loss must have dtype torch.float32, torch.float64, got {value.dtype}")


def same_shape(
    name: str, value: Any, other_name: str, other: Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    """A tensor of one of ``dtypes``, of the shape and on the device of ``other``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {_dtypes(dtypes)}, got {value.dtype}")
    if value.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {list(other.shape)}, "
            f"got {list(value.shape)}"
        )
    _same_device(name, value, other_name, other)
