"""Every argument error: its type, and a message that names argument, expectation and value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fcnseg

LOGITS = torch.zeros(2, 3, 4, 5)
TARGET = torch.zeros(2, 8, 10, dtype=torch.int64)
KERNEL = torch.zeros(3, 2, 4, 4)
LABELS = torch.zeros(4, 5, dtype=torch.uint8)
MATRIX = torch.zeros(3, 3, dtype=torch.int64)
FLOATS = "torch.float16, torch.bfloat16, torch.float32, torch.float64"
INTS = "torch.uint8, torch.int32, torch.int64"
COUNTED = "torch.uint8, torch.int16, torch.int32, torch.int64"


def upsample(**changes: Any) -> Any:
    return fcnseg.upsample_cross_entropy(**{"logits": LOGITS, "target": TARGET, **changes})


def conv_transpose(**changes: Any) -> Any:
    given = {
        "input": LOGITS, "weight": KERNEL, "target": TARGET, "stride": 2, "padding": 1, **changes
    }  # fmt: skip
    return fcnseg.conv_transpose_cross_entropy(**given)


def upsample_argmax(**changes: Any) -> Any:
    return fcnseg.upsample_argmax(**{"logits": LOGITS, "size": (8, 10), **changes})


def conv_argmax(**changes: Any) -> Any:
    return fcnseg.conv_transpose_argmax(
        **{"input": LOGITS, "weight": KERNEL, "size": 8, "stride": 2, "padding": 1, **changes}
    )


def count(**changes: Any) -> Any:
    return fcnseg.confusion_matrix(
        **{"prediction": LABELS, "target": LABELS, "num_classes": 3, **changes}
    )


def count_(**changes: Any) -> Any:
    given = {"matrix": MATRIX.clone(), "prediction": LABELS, "target": LABELS, **changes}
    return fcnseg.confusion_matrix_(**given)


def stream_(**changes: Any) -> Any:
    given = {"matrix": MATRIX.clone(), "logits": LOGITS, "target": TARGET, **changes}
    return fcnseg.upsample_confusion_matrix_(**given)


def stream(**changes: Any) -> Any:
    return fcnseg.upsample_confusion_matrix(**{"logits": LOGITS, "target": TARGET, **changes})


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


Case = tuple[Callable[..., Any], dict[str, Any], type[Exception], str]

CASES: list[Case] = [
    # tensors: type, dimensions, dtype, size
    (upsample, {"logits": [1.0]}, TypeError, "logits must be a tensor, got list"),
    (upsample, {"logits": zeros(3, 4, 5)}, ValueError,
     "logits must have 4 dimensions [N, C, h, w], got shape [3, 4, 5]"),
    (upsample, {"logits": LOGITS.int()}, TypeError,
     f"logits must have dtype {FLOATS}, got torch.int32"),
    (upsample, {"logits": zeros(2, 0, 4, 5)}, ValueError,
     "logits must have C, h and w of at least 1, got shape [2, 0, 4, 5]"),
    (upsample, {"logits": zeros(2, 3, 0, 5)}, ValueError,
     "logits must have C, h and w of at least 1, got shape [2, 3, 0, 5]"),
    (upsample, {"logits": zeros(2, 3, 4, 0)}, ValueError,
     "logits must have C, h and w of at least 1, got shape [2, 3, 4, 0]"),
    (upsample, {"target": [[[0]]]}, TypeError, "target must be a tensor, got list"),
    (upsample, {"target": TARGET[0]}, ValueError,
     "target must have 3 dimensions [N, H, W], got shape [8, 10]"),
    (upsample, {"target": TARGET.short()}, TypeError,
     f"target must have dtype {INTS}, got torch.int16"),
    (upsample, {"target": TARGET.bool()}, TypeError,
     f"target must have dtype {INTS}, got torch.bool"),
    (upsample, {"target": zeros(2, 3, 8, 10)}, TypeError,
     "target must hold class indices (torch.uint8, torch.int32 or torch.int64); "
     "probabilities are not supported, got torch.float32"),
    (upsample, {"target": TARGET[:1]}, ValueError,
     "target must have the batch size of logits, 2, got shape [1, 8, 10]"),
    (upsample, {"target": TARGET[:, :0]}, ValueError,
     "target must have H and W of at least 1, got shape [2, 0, 10]"),
    (upsample, {"target": TARGET[:, :, :0]}, ValueError,
     "target must have H and W of at least 1, got shape [2, 8, 0]"),
    (upsample, {"target": TARGET.to("meta")}, ValueError,
     "target must be on the device of logits, cpu, got meta"),
    # class weights
    (upsample, {"weight": [1.0]}, TypeError, "weight must be a tensor, got list"),
    (upsample, {"weight": zeros(3, 1)}, ValueError,
     "weight must have 1 dimensions [C], got shape [3, 1]"),
    (upsample, {"weight": zeros(3, dtype=torch.int64)}, TypeError,
     f"weight must have dtype {FLOATS}, got torch.int64"),
    (upsample, {"weight": zeros(4)}, ValueError,
     "weight must have one value per class, 3, got shape [4]"),
    (upsample, {"weight": zeros(3, dtype=torch.float64)}, TypeError,
     "weight must have dtype torch.float32 or the logits' torch.float32, got torch.float64"),
    (upsample, {"weight": zeros(3, dtype=torch.bfloat16), "logits": LOGITS.half()}, TypeError,
     "weight must have dtype torch.float32 or the logits' torch.float16, got torch.bfloat16"),
    (upsample, {"weight": zeros(3).requires_grad_()}, ValueError,
     "weight must not require grad: its gradient is not computed"),
    (upsample, {"weight": zeros(3, device="meta")}, ValueError,
     "weight must be on the device of the logits, cpu, got meta"),
    # options
    (upsample, {"ignore_index": 255.0}, TypeError, "ignore_index must be an int, got float"),
    (upsample, {"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
    (upsample, {"ignore_index": True}, TypeError, "ignore_index must be an int, got bool"),
    (upsample, {"reduction": "avg"}, ValueError,
     "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
    (upsample, {"label_smoothing": -0.1}, ValueError,
     "label_smoothing must lie in [0, 1], got -0.1"),
    (upsample, {"label_smoothing": 1.5}, ValueError,
     "label_smoothing must lie in [0, 1], got 1.5"),
    (upsample, {"label_smoothing": float("nan")}, ValueError,
     "label_smoothing must lie in [0, 1], got nan"),
    # scales
    (upsample, {"scale_factor": "2"}, TypeError,
     "scale_factor must be a number or a pair of numbers, got '2'"),
    (upsample, {"scale_factor": (2.0, 2.0, 2.0)}, TypeError,
     "scale_factor must be a number or a pair of numbers, got (2.0, 2.0, 2.0)"),
    (upsample, {"scale_factor": (2.0, None)}, TypeError,
     "scale_factor must be a number or a pair of numbers, got (2.0, None)"),
    (upsample, {"scale_factor": 0}, ValueError,
     "scale_factor must be positive and finite, got (0, 0)"),
    (upsample, {"scale_factor": (2.0, float("inf"))}, ValueError,
     "scale_factor must be positive and finite, got (2.0, inf)"),
    (upsample, {"scale_factor": float("nan")}, ValueError,
     "scale_factor must be positive and finite, got (nan, nan)"),
    (upsample, {"scale_factor": 3}, ValueError,
     "scale_factor must give the target's size: floor(4 * 3) is 12, but H is 8"),
    (upsample, {"scale_factor": (2, 2.5)}, ValueError,
     "scale_factor must give the target's size: floor(5 * 2.5) is 12, but W is 10"),
    # transposed convolution
    (conv_transpose, {"input": None}, TypeError, "input must be a tensor, got NoneType"),
    (conv_transpose, {"input": LOGITS[0]}, ValueError,
     "input must have 4 dimensions [N, C, h, w], got shape [3, 4, 5]"),
    (conv_transpose, {"target": TARGET.float()}, TypeError, "probabilities are not supported"),
    (conv_transpose, {"target": TARGET[:1]}, ValueError,
     "target must have the batch size of input, 2, got shape [1, 8, 10]"),
    (conv_transpose, {"weight": 1.0}, TypeError, "weight must be a tensor, got float"),
    (conv_transpose, {"weight": KERNEL[0]}, ValueError,
     "weight must have 4 dimensions [C_in, C / groups, kH, kW], got shape [2, 4, 4]"),
    (conv_transpose, {"weight": KERNEL.int()}, TypeError,
     f"weight must have dtype {FLOATS}, got torch.int32"),
    (conv_transpose, {"weight": zeros(4, 2, 4, 4)}, ValueError,
     "weight must have shape [C_in, C / groups, kH, kW] with C_in = 3, got [4, 2, 4, 4]"),
    (conv_transpose, {"weight": zeros(3, 2, 0, 4)}, ValueError,
     "weight must have shape [C_in, C / groups, kH, kW] with C_in = 3, got [3, 2, 0, 4]"),
    (conv_transpose, {"weight": KERNEL.half()}, TypeError,
     "weight must have the input's dtype, torch.float32, got torch.float16"),
    (conv_transpose, {"weight": KERNEL.to("meta")}, ValueError,
     "weight must be on the device of input, cpu, got meta"),
    (conv_transpose, {"groups": 1.0}, TypeError, "groups must be an int, got float"),
    (conv_transpose, {"groups": True}, TypeError, "groups must be an int, got bool"),
    (conv_transpose, {"groups": 0}, ValueError,
     "groups must be at least 1 and divide the input's channels, 3, got 0"),
    (conv_transpose, {"groups": 2}, ValueError,
     "groups must be at least 1 and divide the input's channels, 3, got 2"),
    (conv_transpose, {"bias": 0.0}, TypeError, "bias must be a tensor, got float"),
    (conv_transpose, {"bias": zeros(1, 2)}, ValueError,
     "bias must have 1 dimensions [C], got shape [1, 2]"),
    (conv_transpose, {"bias": zeros(3)}, ValueError,
     "bias must have one value per class, 2, got shape [3]"),
    (conv_transpose, {"bias": zeros(3), "groups": 3}, ValueError,
     "bias must have one value per class, 6, got shape [3]"),
    (conv_transpose, {"bias": zeros(2, dtype=torch.float64)}, TypeError,
     "bias must have the input's dtype, torch.float32, got torch.float64"),
    (conv_transpose, {"bias": zeros(2, device="meta")}, ValueError,
     "bias must be on the device of input, cpu, got meta"),
    (conv_transpose, {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    (conv_transpose, {"stride": (2, 0)}, ValueError, "stride must be at least 1, got (2, 0)"),
    (conv_transpose, {"stride": (2, 2, 2)}, TypeError,
     "stride must be an int or a pair of ints, got (2, 2, 2)"),
    (conv_transpose, {"stride": (2.0, 2)}, TypeError,
     "stride must be an int or a pair of ints, got (2.0, 2)"),
    (conv_transpose, {"stride": 2.0}, TypeError,
     "stride must be an int or a pair of ints, got 2.0"),
    (conv_transpose, {"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    (conv_transpose, {"padding": "same"}, TypeError,
     "padding must be an int or a pair of ints, got 'same'"),
    (conv_transpose, {"output_padding": -1}, ValueError,
     "output_padding must be at least 0, got -1"),
    (conv_transpose, {"output_padding": 2}, ValueError,
     "output_padding must be smaller than stride or dilation, "
     "got (2, 2) with stride (2, 2) and dilation (1, 1)"),
    (conv_transpose, {"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    (conv_transpose, {"crop": (-1, 0)}, ValueError, "crop must be at least 0, got (-1, 0)"),
    (conv_transpose, {"crop": None}, TypeError,
     "crop must be an int or a pair of ints, got None"),
    (conv_transpose, {"crop": (1, 0)}, ValueError,
     "H of the target must fit in the transposed convolution's output: crop 1 + 8 exceeds 8"),
    (conv_transpose, {"crop": (0, 3)}, ValueError,
     "W of the target must fit in the transposed convolution's output: crop 3 + 10 exceeds 10"),
    (conv_transpose, {"class_weight": zeros(3)}, ValueError,
     "class_weight must have one value per class, 2, got shape [3]"),
    (conv_transpose, {"class_weight": zeros(2).requires_grad_()}, ValueError,
     "class_weight must not require grad: its gradient is not computed"),
    (conv_transpose, {"reduction": None}, ValueError,
     "reduction must be 'mean', 'sum' or 'none', got None"),
    # argmax
    (upsample_argmax, {"logits": LOGITS.long()}, TypeError,
     f"logits must have dtype {FLOATS}, got torch.int64"),
    (upsample_argmax, {"size": 0}, ValueError, "size must be at least 1, got 0"),
    (upsample_argmax, {"size": (8, 10, 3)}, TypeError,
     "size must be an int or a pair of ints, got (8, 10, 3)"),
    (upsample_argmax, {"dtype": torch.int16}, TypeError,
     f"dtype must be {INTS}, got torch.int16"),
    (upsample_argmax, {"dtype": torch.uint8, "logits": zeros(1, 257, 4, 5)}, ValueError,
     "dtype=torch.uint8 holds at most 256 classes, got 257"),
    (upsample_argmax, {"scale_factor": 3.0}, ValueError,
     "scale_factor must give the target's size: floor(4 * 3.0) is 12, but H is 8"),
    (conv_argmax, {"size": (9, 10)}, ValueError,
     "H of the target must fit in the transposed convolution's output: crop 0 + 9 exceeds 8"),
    (conv_argmax, {"dtype": torch.uint8, "weight": zeros(3, 100, 4, 4), "groups": 3}, ValueError,
     "dtype=torch.uint8 holds at most 256 classes, got 300"),
    # confusion matrices
    (count, {"prediction": [0]}, TypeError, "prediction must be a tensor, got list"),
    (count, {"prediction": LABELS.float()}, TypeError,
     f"prediction must have dtype {COUNTED}, got torch.float32"),
    (count, {"target": LABELS.bool()}, TypeError,
     f"target must have dtype {COUNTED}, got torch.bool"),
    (count, {"target": LABELS.t()}, ValueError,
     "prediction must have the target's shape, [5, 4], got [4, 5]"),
    (count, {"prediction": LABELS.to("meta")}, ValueError,
     "prediction must be on the device of target, cpu, got meta"),
    (count, {"num_classes": 3.0}, TypeError, "num_classes must be an int, got float"),
    (count, {"num_classes": True}, TypeError, "num_classes must be an int, got bool"),
    (count, {"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
    (count, {"ignore_index": "void"}, TypeError, "ignore_index must be an int, got str"),
    (count_, {"matrix": [[0]]}, TypeError, "matrix must be a tensor, got list"),
    (count_, {"matrix": MATRIX[0]}, ValueError,
     "matrix must have 2 dimensions [C, C], got shape [3]"),
    (count_, {"matrix": MATRIX.float()}, TypeError,
     "matrix must have dtype torch.int64, got torch.float32"),
    (count_, {"matrix": MATRIX[:2]}, ValueError, "matrix must be square, got shape [2, 3]"),
    (count_, {"matrix": MATRIX[:0, :0]}, ValueError, "matrix must be square, got shape [0, 0]"),
    (count_, {"matrix": MATRIX.to("meta")}, ValueError,
     "matrix must be on the device of target, cpu, got meta"),
    (stream_, {"matrix": zeros(4, 4, dtype=torch.int64)}, ValueError,
     "matrix must have one row per class of logits, 3, got shape [4, 4]"),
    (stream_, {"matrix": MATRIX.to("meta")}, ValueError,
     "matrix must be on the device of logits, cpu, got meta"),
    (stream_, {"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
    (stream, {"target": TARGET.float()}, TypeError, "probabilities are not supported"),
    (stream, {"scale_factor": 3.0}, ValueError, "scale_factor must give the target's size"),
    # metrics
    (fcnseg.ConfusionMatrix, {"num_classes": 0}, ValueError,
     "num_classes must be at least 1, got 0"),
    (fcnseg.ConfusionMatrix, {"num_classes": 2, "ignore_index": 1.5}, TypeError,
     "ignore_index must be an int, got float"),
    (fcnseg.metrics.scores, {"matrix": [[1]]}, TypeError, "matrix must be a tensor, got list"),
    (fcnseg.metrics.scores, {"matrix": MATRIX.double()}, TypeError,
     "matrix must have dtype torch.int64, got torch.float64"),
    (fcnseg.metrics.scores, {"matrix": MATRIX[:2]}, ValueError,
     "matrix must be square, got shape [2, 3]"),
    (fcnseg.metrics.scores, {"matrix": MATRIX - 1}, ValueError,
     "matrix must hold counts, got a negative value"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "changes", "kind", "message"),
    CASES,
    ids=[f"{case[0].__name__}-{next(iter(case[1]))}-{i}" for i, case in enumerate(CASES)],
)
def test_bad_argument(
    function: Callable[..., Any], changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        function(**changes)


def test_the_unchanged_calls_are_right() -> None:
    for function in (
        upsample, conv_transpose, upsample_argmax, conv_argmax, count, count_, stream_, stream,
    ):  # fmt: skip
        function()


def test_scale_factor_is_not_checked_where_it_is_ignored() -> None:
    assert upsample(scale_factor=7.0, align_corners=True).isfinite()


def test_operands_are_checked_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="weight must be a tensor, got float"):
            conv_transpose(weight=1.0)
        with pytest.raises(TypeError, match="bias must be a tensor, got float"):
            conv_transpose(bias=1.0)
