"""The confusion matrix straight from low-resolution logits: neither logits nor labels are written.

Maths.
1. p = argmax of the upsampled logits (upsample_argmax.py, eqs. 1, 2)
2. matrix[y, p] += 1 for each pixel with label y, unless y is ignored or bad

Shapes. logits [N, C, h, w], target [N, H, W], matrix int64 [C, C], any strides.

Who owns what. A program walks over consecutive tiles of cells; there are as many programs as are
resident at once. Down each column of pixels that a lane holds it counts a run of equal pairs of
label and prediction, which goes on from tile to tile, and adds it to one of COPIES matrices where
it ends: neighbouring pixels are mostly equal, so few additions leave the lane, and frequent pairs
do not queue at one address. A copy has one bin more, for pixels that count for nothing.
`_gather_kernel` sums the copies.

Numerics. Integer atomics only: the sums are exact, whatever their order. A copy holds int32 while
the target has fewer than 2^31 pixels, else int64.

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
    read_labels,
    split_cells,
)
from fcnseg.kernels.launch import launch, on_device
from fcnseg.kernels.upsample_argmax import best_classes, pixel_weights_x

COPIES = 32  # fewer where they would hold more than COPIED_BINS in all
COPIED_BINS = 2**22


@triton.jit
def _add_runs(copy_ptr, bins, lengths, ended):
    """Adds the lengths of the runs that have ended to their bins, all [COLUMNS, BLOCK]."""
    length = tl.reshape(lengths, [bins.numel]).to(copy_ptr.dtype.element_ty)  # as in load_pixels
    pointers = copy_ptr + tl.reshape(bins, [bins.numel])
    tl.atomic_add(pointers, length, mask=tl.reshape(ended, [bins.numel]), sem="relaxed")


@common.kernel
def _upsample_confusion_matrix_kernel(
    logits_ptr, target_ptr, copies_ptr, bad_count_ptr, bad_index_ptr,
    cells, tiles, tiles_per_program, C, h, w, H, W, step_h, inverse_h, step_w, inverse_w, half,
    stride_logits_n, stride_logits_c, stride_logits_h, stride_logits_w,
    stride_target_n, stride_target_h, stride_target_w, ignore_index, copies,
    WIDE_BINS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    k = tl.arange(0, COLUMNS)[:, None]
    bad_count = tl.zeros([BLOCK], tl.int64)
    bad_index = tl.full([BLOCK], common.NO_INDEX, tl.int64)
    INDEX: tl.constexpr = tl.int64 if WIDE_BINS else tl.int32
    nowhere = tl.cast(C, INDEX) * C
    copy_ptr = copies_ptr + tl.cast(program % copies, tl.int64) * (nowhere + 1)
    run = tl.zeros([COLUMNS, BLOCK], INDEX) + nowhere
    length = tl.zeros([COLUMNS, BLOCK], tl.int32)
    begin = program * tiles_per_program
    for tile in range(begin, tl.minimum(begin + tiles_per_program, tiles)):
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
            y = (y0 + first_row).to(tl.int64)
            row = n * stride_target_n + y * stride_target_h
            offs_x = x.to(tl.int64) * stride_target_w
            some_bad = k + strip[None, :] < 0  # none
            for r in tl.static_range(ROWS):
                here = (column < columns[None, :]) & (first_row + r < rows)[None, :]
                offs = (row + r * tl.cast(stride_target_h, tl.int64))[None, :] + offs_x
                label, valid, bad = read_labels(target_ptr, offs, here, C, ignore_index)
                some_bad |= bad
                pair = tl.where(valid, label.to(INDEX) * C + predictions[r], nowhere)
                goes_on = pair == run
                _add_runs(copy_ptr, run, length, goes_on == 0)
                length = tl.where(goes_on, length, 0) + 1
                run = pair
            if tl.max(tl.max(some_bad.to(tl.int32), 0), 0) > 0:  # hardly ever: read them again
                for again in range(ROWS):
                    inside = (column < columns[None, :]) & (first_row + again < rows)[None, :]
                    at = (row + again * tl.cast(stride_target_h, tl.int64))[None, :] + offs_x
                    _label, _valid, wrong = read_labels(target_ptr, at, inside, C, ignore_index)
                    flat = ((n * H + y + again) * W)[None, :] + x
                    bad_count, bad_index = count_bad(wrong, flat, bad_count, bad_index)
    _add_runs(copy_ptr, run, length, length > 0)
    tl.store(bad_count_ptr + program, tl.sum(bad_count, 0))
    tl.store(bad_index_ptr + program, tl.min(bad_index, 0))


@common.kernel
def _gather_kernel(
    copies_ptr, matrix_ptr, bad_count_ptr, bad_index_ptr, target_ptr, record_ptr, invalid_ptr,
    copies, C, stride_matrix_0, stride_matrix_1, partials, H, W,
    stride_target_n, stride_target_h, stride_target_w,
    HAS_INVALID: tl.constexpr, WIDE_BINS: tl.constexpr, BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """Adds the copies to the matrix and, in program 0, the bad labels to their record."""
    INDEX: tl.constexpr = tl.int64 if WIDE_BINS else tl.int32
    bins = tl.cast(C, INDEX) * C
    pair = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < bins
    total = tl.zeros([BLOCK], tl.int64)
    for copy in range(copies):
        offs = tl.cast(copy, tl.int64) * (bins + 1) + pair
        total += tl.load(copies_ptr + offs, mask=mask, other=0).to(tl.int64)
    truth = pair // C
    offs = truth.to(tl.int64) * stride_matrix_0 + (pair - truth * C) * stride_matrix_1
    total += tl.load(matrix_ptr + offs, mask=mask, other=0)
    tl.store(matrix_ptr + offs, total, mask=mask)
    if tl.program_id(0) == 0:
        add_to_record(
            bad_count_ptr, bad_index_ptr, partials, target_ptr, record_ptr, invalid_ptr, H, W,
            stride_target_n, stride_target_h, stride_target_w, HAS_INVALID, PARTIALS,
        )  # fmt: skip


def residency(capability: int) -> tuple[int, int]:
    """Registers of a lane, without spills, and programs of a warp that a multiprocessor holds."""
    return (200, 10) if capability < 80 else (184, 11)


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
    registers, resident = residency(common.capability(logits.device))
    per_program = triton.cdiv(tiles, resident * common.multiprocessors(logits.device))
    programs = triton.cdiv(tiles, per_program)
    int64 = {"dtype": torch.int64, "device": logits.device}
    bad_count, bad_index = torch.empty(programs, **int64), torch.empty(programs, **int64)
    num_copies = max(1, min(COPIES, COPIED_BINS // (C * C)))
    dtype = torch.int32 if target.numel() < 2**31 else torch.int64
    copies = torch.zeros((num_copies, C * C + 1), dtype=dtype, device=logits.device)
    wide_bins = C * C + 256 >= 2**31
    with on_device(logits):
        launch(
            _upsample_confusion_matrix_kernel, (programs,),
            (logits, target, copies, bad_count, bad_index),
            (
                cells, tiles, per_program, C, h, w, H, W, *geo.axes, *logits.stride(),
                *target.stride(), ignore_index, num_copies,
            ),
            WIDE_BINS=wide_bins, WIDE=cells + lanes.cells >= 2**31, maxnreg=registers,
            **lanes.constexprs(),
        )  # fmt: skip
        kept = record if invalid is None else invalid
        launch(
            _gather_kernel, (triton.cdiv(C * C, 256),),
            (copies, matrix, bad_count, bad_index, target, kept, kept),
            (num_copies, C, *matrix.stride(), programs, H, W, *target.stride()),
            HAS_INVALID=invalid is not None,
            WIDE_BINS=wide_bins, BLOCK=256, PARTIALS=1024,
        )  # fmt: skip
