"""The bad-label record for operators that ran as PyTorch expressions on a CUDA device.

Who owns what. One program adds one call's count to the record [count, value, n, y, x] by the rule
that all kernels follow (``add_to_record``): PyTorch has no operator that adds to a tensor by an
atomic and returns what it held before.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from fcnseg.kernels import common
from fcnseg.kernels.common import add_to_record
from fcnseg.kernels.launch import launch, on_device


@common.kernel
def _record_kernel(
    count_ptr, index_ptr, labels_ptr, record_ptr, H, W,
    stride_target_n, stride_target_h, stride_target_w, BLOCK: tl.constexpr,
):  # fmt: skip
    add_to_record(
        count_ptr, index_ptr, 1, labels_ptr, record_ptr, record_ptr, H, W,
        stride_target_n, stride_target_h, stride_target_w, False, BLOCK,
    )  # fmt: skip


def record_bad_labels(record: Tensor, labels: Tensor, count: Tensor, index: Tensor) -> None:
    """Add ``count`` bad labels to ``record``.

    Args:
        record: int64 [5], the device's.
        labels: [N, H, W], any strides.
        count: int64 scalar on the device, how many of ``labels`` are bad.
        index: int64 scalar on the device, the flat index of the first of them.
    """
    with on_device(record):
        launch(
            _record_kernel, (1,), (count, index, labels, record),
            (*labels.shape[1:], *labels.stride()), BLOCK=32, num_warps=1,
        )  # fmt: skip
