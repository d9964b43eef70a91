"""What follows the kernel over cells: the scalar loss, the bad-label record, the gradient.

Source and notation: upsample_cross_entropy_cells.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fcnseg.kernels import common
from fcnseg.kernels.common import add_to_record
from fcnseg.kernels.reduction import reduction_scale

CONTIGUOUS = ["stride_c", "stride_w"]  # where a 1 helps the gathering kernel


@triton.jit
def _from_border(
    border_ptr, row, index, j, c, mask, band_rows, C, w, CELLS: tl.constexpr
):  # fmt: skip
    """What the cells right of samples j gave, where each is the first one of its program."""
    first = row * (w + 1) + 1
    local = (first % CELLS).to(tl.int32) + j
    border_ptr += (first // CELLS * (band_rows + 1) + index) * C
    offs = (local // CELLS).to(tl.int64) * (band_rows + 1) * C + c
    return tl.load(border_ptr + offs, mask=mask & (local % CELLS == 0), other=0.0)


@triton.jit
def _from_first_row(
    top_ptr, border_ptr, row, j, c, mask, band_rows, C, w, CELLS: tl.constexpr
):  # fmt: skip
    """What the first cell row of a band gave to the samples above it."""
    value = tl.load(top_ptr + row * C * w + (c.to(tl.int64) * w + j), mask=mask, other=0.0)
    return value + _from_border(border_ptr, row, 0, j, c, mask, band_rows, C, w, CELLS)


@common.kernel(unit_strides=CONTIGUOUS)
def _finish_kernel(
    loss_ptr, denominator_ptr, bad_count_ptr, bad_index_ptr, partials, result_ptr,
    target_ptr, record_ptr, grad_ptr, top_ptr, border_ptr, out_ptr,
    blocks, bands, band_rows, C, h, w, H, W,
    stride_target_n, stride_target_h, stride_target_w, stride_n, stride_c, stride_h, stride_w,
    SCALAR: tl.constexpr, MEAN: tl.constexpr, RECORD: tl.constexpr, WITH_GRAD: tl.constexpr,
    CELLS: tl.constexpr, PARTIALS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The scalar loss and the record (program 0); gradient = (sums + top + border) * scale."""
    program = tl.program_id(0)
    gradient_scale = 1.0
    if SCALAR:
        scale, poison = reduction_scale(denominator_ptr, bad_count_ptr, partials, MEAN, PARTIALS)
        if program == 0:
            offs = tl.arange(0, PARTIALS)
            loss = tl.zeros([PARTIALS], tl.float64)
            for begin in range(0, partials, PARTIALS):
                part = tl.load(loss_ptr + begin + offs, mask=begin + offs < partials, other=0.0)
                loss += part.to(tl.float64)
            # all ignored: 0 * inf is NaN, as the mean is
            tl.store(result_ptr, (tl.sum(loss, 0) * scale + poison).to(tl.float32))
        # all ignored: the gradient is 0, not NaN
        scale = tl.where(scale == float("inf"), 1.0, scale)
        gradient_scale = (scale + poison).to(tl.float32)
    if RECORD and program == 0:
        add_to_record(
            bad_count_ptr, bad_index_ptr, partials, target_ptr, record_ptr, record_ptr, H, W,
            stride_target_n, stride_target_h, stride_target_w, False, PARTIALS,
        )  # fmt: skip
    if WITH_GRAD:
        blocks_j = (w + BLOCK_J - 1) // BLOCK_J
        blocks_c = (C + BLOCK_C - 1) // BLOCK_C
        for block in range(program, blocks, tl.num_programs(0)):
            # one image and row of samples, BLOCK_J columns and BLOCK_C classes: [BLOCK_J, BLOCK_C]
            rest = block // blocks_j
            j = (block - rest * blocks_j) * BLOCK_J + tl.arange(0, BLOCK_J)[:, None]
            row_of_classes = rest // blocks_c
            c = (rest - row_of_classes * blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
            image = row_of_classes // h
            i = row_of_classes - image * h
            n = tl.cast(image, tl.int64)
            mask = (j < w) & (c < C)
            offs = c.to(tl.int64) * stride_c + j.to(tl.int64) * stride_w
            offs += n * stride_n + tl.cast(i, tl.int64) * stride_h
            band = i // band_rows
            row = n * bands + band
            value = tl.load(grad_ptr + offs, mask=mask, other=0.0)
            value += _from_border(
                border_ptr, row, i - band * band_rows + 1, j, c, mask, band_rows, C, w, CELLS
            )
            if (i + 1) % band_rows == 0:
                value += _from_first_row(
                    top_ptr, border_ptr, row + 1, j, c, mask, band_rows, C, w, CELLS
                )
            # Beyond the first row of samples the second one has weight 0, and gets 0 * NaN all the
            # same, as in eager; so do columns.
            if i == tl.minimum(1, h - 1):
                value += _from_first_row(
                    top_ptr, border_ptr, n * bands, j, c, mask, band_rows, C, w, CELLS
                )
            nans = tl.where((j == 0) & (value != value), 1, 0)
            beside = (tl.max(nans, 0)[None, :] > 0) & (j == 1)
            value = tl.where(beside, float("nan"), value)
            if SCALAR:
                value *= gradient_scale
            tl.store(out_ptr + offs, value, mask=mask)
