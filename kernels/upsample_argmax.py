"""Labels straight from low-resolution logits: bilinear upsampling + argmax over cells.

Maths.
1. z_c(y, x) = (1-v) ((1-u) x_00 + u x_01) + v ((1-u) x_10 + u x_11): the eager expression; u, v are
   the weights of the right and the lower sample (common.py, 1)
2. label = the lowest c with z_c = max z; the first NaN counts as the maximum, as in torch.argmax

Shapes. logits [N, C, h, w] fp16/bf16/fp32, any strides; labels [N, H, W] uint8, int32 or int64.

Who owns what. A lane owns a cell, or a strip of it (common.py, 4): it loads four samples a class
and keeps the best value and label of its ROWS x COLUMNS pixels in registers. No logit is written.

Numerics. float32 whatever the dtype of the logits; ties are those of eq. 1. The walk over the
classes takes all samples for finite, and adds them up times 0 meanwhile: where that is not 0, the
program walks once more and tells NaN from the rest. Offsets are int64.

Instructions per pixel and class, a lane of 8 x 4 pixels (SASS, sm_70 and sm_90): 6.2, of which 2
make z, 3 compare and select, and the rest makes the columns of eq. 1. One multiply-add in place of
the 2 would change ties and save nothing: compares and selects take the other, half as wide pipe.

Source: torch.nn.functional.interpolate, torch.argmax.
"""

# ruff: noqa: RUF005  (Triton has no (*a, b))
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcnseg.kernels import common
from fcnseg.kernels.common import cell_axis, corner_offsets, load_corners, source, split_cells
from fcnseg.kernels.launch import launch, on_device

REGISTERS = 168  # of a lane: 12 warps on a multiprocessor, not 8


@triton.jit
def _walk_classes(
    logits_ptr, corners, C, stride_c, i, y, h, step_h, half, weight_x,
    FINITE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Labels (eq. 2), as `best_classes` gives them, and a [BLOCK] that is 0 where all samples are
    finite, else NaN. FINITE: right there only."""
    best = ()
    label = ()
    for _row in tl.static_range(ROWS):
        best = best + (tl.full([COLUMNS, BLOCK], float("-inf"), tl.float32),)
        label = label + (tl.zeros([COLUMNS, BLOCK], tl.int32),)
    trace = tl.zeros([BLOCK], tl.float32)
    for c in range(C):
        a00, a01, a10, a11 = load_corners(logits_ptr, corners, c, stride_c)
        if FINITE:  # samples so large that z might overflow count as infinite
            trace = tl.fma((a00 + a01) + (a10 + a11), 0.0, trace)
        upper = (1.0 - weight_x) * a00[None, :] + weight_x * a01[None, :]
        lower = (1.0 - weight_x) * a10[None, :] + weight_x * a11[None, :]
        new_best = ()
        new_label = ()
        for r in tl.static_range(ROWS):
            weight_y = source(y + r, step_h, half) - (i - 1).to(tl.float32)
            weight_y = tl.where(i == 0, 1.0, weight_y)[None, :]
            z = (1.0 - weight_y) * upper + weight_y * lower
            if FINITE:
                better = z > best[r]
                new_best = new_best + (tl.maximum(z, best[r]),)
            else:
                # not (z <= best): larger or NaN; a NaN that is the best stays
                better = (best[r] == best[r]) & ((z <= best[r]) == 0)
                new_best = new_best + (tl.where(better, z, best[r]),)
            new_label = new_label + (tl.where(better, tl.cast(c, tl.int32), label[r]),)
        best = new_best
        label = new_label
    return label, trace


@triton.jit
def best_classes(
    logits_ptr, corners, C, stride_c, i, y, h, step_h, half, weight_x,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Labels (eq. 2) of rows y .. y + ROWS - 1: a tuple of int32 [COLUMNS, BLOCK]."""
    label, trace = _walk_classes(
        logits_ptr, corners, C, stride_c, i, y, h, step_h, half, weight_x,
        True, ROWS, COLUMNS, BLOCK,
    )  # fmt: skip
    if tl.max(tl.where(trace == 0.0, 0, 1), 0) != 0:
        label, trace = _walk_classes(
            logits_ptr, corners, C, stride_c, i, y, h, step_h, half, weight_x,
            False, ROWS, COLUMNS, BLOCK,
        )  # fmt: skip
    return label


@triton.jit
def pixel_weights_x(j, x, w, step_w, half):
    weight = source(x, step_w, half) - (j - 1)[None, :].to(tl.float32)
    return tl.where((j == 0)[None, :], 1.0, weight)


@common.kernel
def _upsample_argmax_kernel(
    logits_ptr, label_ptr, cells, C, h, w, H, W, step_h, inverse_h, step_w, inverse_w, half,
    stride_n, stride_c, stride_h, stride_w, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, i, j, strip, mask = split_cells(tl.program_id(0), cells, h + 1, w, BLOCK, SPLIT, WIDE)
    y0, rows, i0, i1, _wy, _dy = cell_axis(i, h, H, step_h, inverse_h, half)
    x0, columns, j0, j1, _wx, _dx = cell_axis(j, w, W, step_w, inverse_w, half)
    rows = tl.where(mask, rows, 0)
    corners = corner_offsets(n, i0, i1, j0, j1, stride_n, stride_h, stride_w)
    k = tl.arange(0, COLUMNS)[:, None]
    row_groups = (tl.max(rows, 0) + ROWS - 1) // ROWS
    column_groups = (tl.max(columns, 0) + SPLIT * COLUMNS - 1) // (SPLIT * COLUMNS)
    for group in range(row_groups * column_groups):
        first_row = group % row_groups * ROWS
        column = (group // row_groups * SPLIT + strip)[None, :] * COLUMNS + k
        x = x0[None, :] + column
        weight_x = pixel_weights_x(j, x, w, step_w, half)
        labels = best_classes(
            logits_ptr, corners, C, stride_c, i, y0 + first_row, h, step_h, half, weight_x,
            ROWS, COLUMNS, BLOCK,
        )  # fmt: skip
        row = (n * H + (y0 + first_row)) * W
        for r in tl.static_range(ROWS):
            here = (column < columns[None, :]) & (first_row + r < rows)[None, :]
            # in two dimensions: nothing is summed, and Triton makes lanes write whole sectors
            offs = (row + r * tl.cast(W, tl.int64))[None, :] + x
            tl.store(label_ptr + offs, labels[r].to(label_ptr.dtype.element_ty), mask=here)


def tuned_lanes(geo: common.Geometry) -> common.Lanes:
    """Two registers a pixel, so half of what the loss takes."""
    return common.choose_lanes(geo, rows=8, columns=4)


def upsample_argmax_forward(
    logits: Tensor, size: Sequence[int], align_corners: bool, scale_h: float | None,
    scale_w: float | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Labels [N, H, W]; args as the operator's."""
    (N, C, h, w), (H, W) = logits.shape, size
    labels = torch.empty((N, H, W), dtype=dtype, device=logits.device)
    if N == 0:
        return labels
    geo = common.geometry(h, w, H, W, align_corners, scale_h, scale_w)
    lanes = tuned_lanes(geo)
    cells = N * (h + 1) * (w + 1)
    with on_device(logits):
        launch(
            _upsample_argmax_kernel, (triton.cdiv(cells, lanes.cells),), (logits, labels),
            (cells, C, h, w, H, W, *geo.axes, *logits.stride()),
            WIDE=cells + lanes.cells >= 2**31, maxnreg=REGISTERS, **lanes.constexprs(),
        )  # fmt: skip
    return labels
