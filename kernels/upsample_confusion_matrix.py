"""The confusion matrix straight from low-resolution logits: neither logits nor labels are written.

Maths.
1. p = argmax of the upsampled logits (upsample_argmax.py, eqs. 1, 2)
2. matrix[y, p] += 1 for each pixel with label y, unless y is ignored or bad

Shapes. logits [N, C, h, w], target [N, H, W], matrix int64 [C, C], any strides.

Who owns what. Programs take tiles of cells in turn, as many programs as fill the device. With few
classes a program keeps a histogram of its pixels and adds it to the matrix at its end; with many
each pixel is added to one of COPIES int32 matrices, so that frequent classes do not queue at one
address, and `_gather_kernel` sums them.

Numerics. Integer atomics only: the sums are exact, whatever their order. A copy holds fewer than
2^31 pixels as the launcher widens it to int64 beyond.

Source: torch.bincount, torch.histc.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcnseg.kernels import common
from fcnseg.kernels.common import (
    add_to_record,
    cell_axis,
    corner_offsets,
    count_bad,
    load_labels,
    split_cells,
)
from fcnseg.kernels.upsample_argmax import best_classes, pixel_weights_x

MAX_BINS = 1024  # of a program's histogram; a power of two above C * C
PROGRAMS = 2048  # enough for 16 on each multiprocessor of the largest device
COPIES = 32  # fewer where they would hold more than COPIED_BINS in all
COPIED_BINS = 2**22


@common.kernel
def _upsample_confusion_matrix_kernel(
    logits_ptr, target_ptr, matrix_ptr, copies_ptr, bad_count_ptr, bad_index_ptr,
    cells, tiles, C, h, w, H, W, step_h, inverse_h, step_w, inverse_w, half,
    stride_logits_n, stride_logits_c, stride_logits_h, stride_logits_w,
    stride_target_n, stride_target_h, stride_target_w, stride_matrix_0, stride_matrix_1,
    ignore_index, copies, BINS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    k = tl.arange(0, COLUMNS)[:, None]
    bad_count = tl.zeros([BLOCK], tl.int64)
    bad_index = tl.full([BLOCK], common.NO_INDEX, tl.int64)
    if BINS > 0:
        histogram = tl.zeros([BINS], tl.int64)
    else:
        copy_ptr = copies_ptr + (program % copies).to(tl.int64) * C * C
    for tile in range(program, tiles, tl.num_programs(0)):
        n, i, j, strip, mask = split_cells(tile, cells, h + 1, w, BLOCK, SPLIT, WIDE)
        y0, rows, i0, i1, _wy, _dy = cell_axis(i, h, H, step_h, inverse_h, half)
        x0, columns, j0, j1, _wx, _dx = cell_axis(j, w, W, step_w, inverse_w, half)
        rows = tl.where(mask, rows, 0)
        corners = corner_offsets(
            n, i0, i1, j0, j1, stride_logits_n, stride_logits_h, stride_logits_w
        )
        row_groups = (tl.max(rows, 0) + ROWS - 1) // ROWS
        column_groups = (tl.max(columns, 0) + SPLIT * COLUMNS - 1) // (SPLIT * COLUMNS)
        for group in range(row_groups * column_groups):
            first_row = group % row_groups * ROWS
            column = (group // row_groups * SPLIT + strip)[None, :] * COLUMNS + k
            x = x0[None, :] + column
            weight_x = pixel_weights_x(j, x, w, step_w, half)
            predictions = best_classes(
                logits_ptr, corners, C, stride_logits_c, i, y0 + first_row, h, step_h, half,
                weight_x, ROWS, COLUMNS, BLOCK,
            )  # fmt: skip
            for r in tl.static_range(ROWS):
                here = (column < columns[None, :]) & (first_row + r < rows)[None, :]
                y = (y0 + first_row + r).to(tl.int64)[None, :]
                offs = n[None, :] * stride_target_n + y * stride_target_h
                offs += x.to(tl.int64) * stride_target_w
                label, bad = load_labels(target_ptr, offs, here, C, ignore_index)
                flat = (n[None, :] * H + y) * W + x
                bad_count, bad_index = count_bad(bad, flat, bad_count, bad_index)
                cell = tl.where(label >= 0, label * C + predictions[r], -1)
                cell = tl.reshape(cell, [COLUMNS * BLOCK])  # as in load_pixels
                if BINS > 0:
                    cell = tl.where(cell >= 0, cell, BINS - 1)  # a bin past the matrix
                    histogram += tl.histogram(cell, BINS).to(tl.int64)
                else:
                    one = tl.full([COLUMNS * BLOCK], 1, copies_ptr.dtype.element_ty)
                    tl.atomic_add(copy_ptr + cell, one, mask=cell >= 0, sem="relaxed")
    if BINS > 0:
        bins = tl.arange(0, BINS)
        truth = bins // C
        offs = truth.to(tl.int64) * stride_matrix_0 + (bins - truth * C) * stride_matrix_1
        filled = (truth < C) & (histogram > 0)
        tl.atomic_add(matrix_ptr + offs, histogram, mask=filled, sem="relaxed")
    tl.store(bad_count_ptr + program, tl.sum(bad_count, 0))
    tl.store(bad_index_ptr + program, tl.min(bad_index, 0))


@common.kernel
def _gather_kernel(
    copies_ptr, matrix_ptr, copies, C, stride_matrix_0, stride_matrix_1,
    bad_count_ptr, bad_index_ptr, partials, target_ptr, record_ptr, invalid_ptr, H, W,
    stride_target_n, stride_target_h, stride_target_w,
    HAS_COPIES: tl.constexpr, HAS_INVALID: tl.constexpr, BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """Adds the copies to the matrix and, in program 0, the bad labels to their record."""
    if HAS_COPIES:
        cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = cell < C * C
        total = tl.zeros([BLOCK], tl.int64)
        for copy in range(copies):
            offs = tl.cast(copy, tl.int64) * C * C + cell
            total += tl.load(copies_ptr + offs, mask=mask, other=0).to(tl.int64)
        truth = cell // C
        offs = truth.to(tl.int64) * stride_matrix_0 + (cell - truth * C) * stride_matrix_1
        total += tl.load(matrix_ptr + offs, mask=mask, other=0)
        tl.store(matrix_ptr + offs, total, mask=mask)
    if tl.program_id(0) == 0:
        add_to_record(
            bad_count_ptr, bad_index_ptr, partials, target_ptr, record_ptr, invalid_ptr, H, W,
            stride_target_n, stride_target_h, stride_target_w, HAS_INVALID, PARTIALS,
        )  # fmt: skip


def bins(num_classes: int) -> int:
    """Size of a program's histogram, with one bin to spare; 0 where it would be too large."""
    size = triton.next_power_of_2(num_classes * num_classes + 1)
    return size if size <= MAX_BINS else 0


def upsample_confusion_matrix_forward_(
    matrix: Tensor, logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool,
    scale_h: float | None, scale_w: float | None, record: Tensor, invalid: Tensor | None,
) -> None:  # fmt: skip
    """Adds into ``matrix``; bad labels are added to ``invalid`` if given, else to ``record``."""
    (N, C, h, w), (H, W) = logits.shape, target.shape[1:]
    if N == 0:
        return
    geo = common.geometry(h, w, H, W, align_corners, scale_h, scale_w)
    lanes = common.choose_lanes(geo, rows=8, columns=4)
    cells = N * (h + 1) * (w + 1)
    tiles = triton.cdiv(cells, lanes.cells)
    programs = min(tiles, PROGRAMS)
    int64 = {"dtype": torch.int64, "device": logits.device}
    bad_count, bad_index = torch.empty(programs, **int64), torch.empty(programs, **int64)
    size = bins(C)
    copies = matrix
    num_copies = max(1, min(COPIES, COPIED_BINS // (C * C)))
    if size == 0:
        dtype = torch.int32 if target.numel() < 2**31 else torch.int64
        copies = torch.zeros((num_copies, C, C), dtype=dtype, device=logits.device)
    with common.device_of(logits):
        _upsample_confusion_matrix_kernel[(programs,)](
            logits, target, matrix, copies, bad_count, bad_index, cells, tiles, C, h, w, H, W,
            *geo.axes, *logits.stride(), *target.stride(), *matrix.stride(), ignore_index,
            num_copies, BINS=size, WIDE=cells + lanes.cells >= 2**31, **lanes.constexprs(),
        )  # fmt: skip
        kept = record if invalid is None else invalid
        _gather_kernel[(triton.cdiv(C * C, 256) if size == 0 else 1,)](
            copies, matrix, num_copies, C, *matrix.stride(), bad_count, bad_index, programs, target,
            kept, kept, H, W, *target.stride(), HAS_COPIES=size == 0,
            HAS_INVALID=invalid is not None, BLOCK=256, PARTIALS=1024,
        )  # fmt: skip
