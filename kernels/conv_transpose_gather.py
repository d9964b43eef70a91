"""What follows the kernels of a transposed convolution: the scalar loss, the record, the gradients.

The gradients come from the planes of the input's and from the partial sums of the weight's.

Maths, and who owns what: conv_transpose_cross_entropy.py.
"""

from __future__ import annotations

import triton.language as tl

from fcnseg.kernels import common
from fcnseg.kernels.common import add_to_record
from fcnseg.kernels.reduction import reduction_scale


@common.kernel
def _reduce_kernel(
    loss_ptr, denominator_ptr, bad_count_ptr, bad_index_ptr, target_ptr, record_ptr, out_ptr,
    scale_ptr, partials, H, W, stride_n, stride_h, stride_w,
    SCALAR: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The programs' bad labels into the record; the scalar loss and the gradients' factor."""
    add_to_record(
        bad_count_ptr, bad_index_ptr, partials, target_ptr, record_ptr, record_ptr, H, W,
        stride_n, stride_h, stride_w, False, BLOCK,
    )  # fmt: skip
    if SCALAR:
        offs = tl.arange(0, BLOCK)
        loss = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, partials, BLOCK):
            part = tl.load(loss_ptr + begin + offs, mask=begin + offs < partials, other=0.0)
            loss += part.to(tl.float64)
        scale, poison = reduction_scale(denominator_ptr, bad_count_ptr, partials, MEAN, BLOCK)
        # all ignored: 0 * inf is NaN, as the mean is; the gradient is 0
        tl.store(out_ptr, (tl.sum(loss, 0) * scale + poison).to(tl.float32))
        scale = tl.where(scale == float("inf"), 1.0, scale)
        tl.store(scale_ptr, (scale + poison).to(tl.float32))


@common.kernel
def _gather_input_kernel(
    plane_ptr, scale_ptr, grad_ptr, total, positions, num_channels, h, w, rows, columns,
    first_row, first_column, stride_n, stride_c, stride_h, stride_w,
    HAS_SCALE: tl.constexpr, MODE: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of each sample: the sum of what its cells left in the planes, times the scale."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    flat = tl.cast(tl.program_id(0), INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = flat < total
    # neighbours in the planes' memory
    if MODE == "dot":
        c = flat % num_channels
        flat = flat // num_channels
        j = flat % w
        flat = flat // w
        i = flat % h
        n = flat // h
    else:
        j = flat % w
        flat = flat // w
        i = flat % h
        flat = flat // h
        c = flat % num_channels
        n = flat // num_channels
    n = n.to(tl.int64)
    plane = tl.cast(positions, tl.int64) * num_channels
    value = tl.zeros([BLOCK], tl.float32)
    for a in tl.static_range(TAPS_Y):
        row = i + a - first_row
        for b in tl.static_range(TAPS_X):
            column = j + b - first_column
            inside = mask & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
            position = (n * rows + row) * columns + column
            if MODE == "dot":
                offs = position * num_channels + c
            else:
                offs = c.to(tl.int64) * positions + position
            offs += plane * (a * TAPS_X + b)
            value += tl.load(plane_ptr + offs, mask=inside, other=0.0)
    if HAS_SCALE:
        value *= tl.load(scale_ptr)
    offs = n * stride_n + c.to(tl.int64) * stride_c
    offs += i.to(tl.int64) * stride_h + j.to(tl.int64) * stride_w
    tl.store(grad_ptr + offs, value, mask=mask)


@common.kernel
def _gather_weight_kernel(
    partial_ptr, scale_ptr, grad_ptr, partials, total, C, K, per_group, kernel_x,
    stride_channel, stride_class, stride_h, stride_w,
    HAS_SCALE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the weight (of the bias: no taps, one channel) from [partials, kh, kw, K, C]."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = flat < total
    parts = tl.arange(0, PARTS)[:, None]
    sums = tl.zeros([PARTS, BLOCK], tl.float32)
    for begin in range(0, partials, PARTS):
        part = begin + parts
        offs = part.to(tl.int64) * total + flat[None, :]
        sums += tl.load(partial_ptr + offs, mask=(part < partials) & mask[None, :], other=0.0)
    value = tl.sum(sums, 0)
    if HAS_SCALE:
        value *= tl.load(scale_ptr)
    c = flat % C
    k = flat // C % K
    tap = flat // C // K
    offs = (c // per_group * K + k) * stride_channel + c % per_group * stride_class
    offs += tap // kernel_x * stride_h + tap % kernel_x * stride_w
    tl.store(grad_ptr + offs, value, mask=mask)
