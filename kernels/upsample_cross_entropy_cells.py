"""Bilinear upsampling + softmax cross entropy over cells, with the low-resolution gradient.

Maths. A pixel i of cell (i, j) at row r, column k; x_c its four samples of class c, v its weights.
1. z_c = sum_corner v_corner x_c,corner: linear down a column, and along a row
2. lse = log sum_c exp(z_c);  exp(z) at pixel (r, k) = E P^k (Q T^k)^r: four exponentials per class,
   E at the first pixel, P for a column on, Q for a row on, T for what Q changes a column on. Rows
   go in pairs, e and e Q: 1.5 operations a pixel, and two for the next column
3. l_i = A_i lse - sum_c b_ic z_c,  b_ic = (1-e) w_y [c = y] + (e/C) w_c,  A_i = sum_c b_ic
4. gradient of a corner: sum_i v_corner u_i (A_i exp(z_c - lse) - b_ic), u the upstream gradient
5. sum_i v u A_i exp(z_c - lse) = sum_k E P^k sum_r v (u A/s)_kr (Q T^k)^r: Horner's rule in r, and
   its derivative for the factor r of v (v is linear in r, and in k): two multiply-adds. The factor
   k comes of summing the sums so far: those of column k count K - k times among K columns
6. sum_i v [y_i = c] follows from the moments (1, r, k, r k) of the pixels that carry label c; the
   same sums give sum_i z_y for eq. 3. The moments are bit counts (label_planes.py). Most classes
   that no pixel of the program carries skip this. With an upstream gradient a pixel, its bits
   select u.

Shapes. logits [N, C, h, w] fp16/bf16/fp32, any strides; target [N, H, W]; gradient float32.

Who owns what. A lane owns a cell (common.py, 4) and keeps the sums of its pixels in registers. Pass
0 over the classes finds the shift and the spread of the cell; pass 1 sums exponentials; pass 2 runs
eqs. 5, 6 and writes. A program walks down the cell rows of a band and adds what the next row gives
to the samples above it to what it stored there before. Neighbouring lanes share samples: a lane
adds the left sums of the lane after it to its own right ones (an exchange in registers). So only
the upper sums of a band's first cell row (`top`) and the left sums of a program's first cells
(`border`) lie outside the sums at the samples; upsample_cross_entropy_gather.py adds them. Nothing
of full resolution is written and no atomics are used.

Numerics. Sums in float32 per program, float64 across programs. Exponentials are relative to the
largest sample of the cell, in base 2. Guard: eq. 2 is taken where no class varies by more than
SPREAD inside any cell of the row; what that bounds stands in upsample_cross_entropy_powers.py.
Elsewhere, and for infinite or NaN samples, the plain path takes one exponential per pixel and class
after the eager expression, so that NaN comes out where it does there. Offsets are int64, those of
samples int32 where the tensors let them (not WIDE).

Instructions on the path of eq. 2, sm_90, a lane of 8 x 8 pixels (SASS): per class 36 in pass 0,
156 in pass 1, 257 in pass 2 and 98 more for a class that a pixel of the program may carry, that is
7.0 to 8.5 per pixel and class, where eqs. 2 and 5 alone take 4.2; per pixel about 36, of which 18
read the label.

The two paths stand in files of their own: _powers.py, eqs. 2 to 6, and _plain.py.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, for the shift;
torch.nn.functional.interpolate and cross_entropy for the expression.
"""

from __future__ import annotations

import triton.language as tl

from fcnseg.kernels import common
from fcnseg.kernels.common import cell_axis, split_cells
from fcnseg.kernels.corner_sums import load_samples
from fcnseg.kernels.upsample_cross_entropy_plain import row_pixel_by_pixel
from fcnseg.kernels.upsample_cross_entropy_powers import row_by_powers

SPREAD = tl.constexpr(32.0)  # natural units: e^32 = 2^46; float32 holds 2^-126
LARGE = tl.constexpr(1e38)  # of the sum of four samples


@common.kernel
def _upsample_cross_entropy_kernel(
    logits_ptr, target_ptr, weight_ptr, upstream_ptr, pixel_loss_ptr,
    loss_ptr, denominator_ptr, bad_count_ptr, bad_index_ptr, grad_ptr, top_ptr, border_ptr,
    cells, bands, band_rows, C, h, w, H, W, step_h, inverse_h, step_w, inverse_w, half,
    stride_logits_n, stride_logits_c, stride_logits_h, stride_logits_w,
    stride_target_n, stride_target_h, stride_target_w,
    stride_upstream_n, stride_upstream_h, stride_upstream_w,
    stride_loss_n, stride_loss_h, stride_loss_w,
    stride_grad_n, stride_grad_c, stride_grad_h, stride_grad_w,
    ignore_index, smoothing,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, ONE_CLASS: tl.constexpr,
    WITH_GRAD: tl.constexpr, PER_PIXEL: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
    ONE_GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Scalar reductions: partial loss, denominator and sums. PER_PIXEL: the loss of each pixel,
    or with WITH_GRAD the sums for the upstream gradient of each pixel."""
    tile = tl.program_id(0)
    n, lane_band, j, strip, mask = split_cells(tile, cells, bands, w, BLOCK, SPLIT, WIDE)
    x0, columns, j0, j1, wx, dx = cell_axis(j, w, W, step_w, inverse_w, half)
    kept = 1.0 - smoothing
    share = smoothing / C

    # where this program's cells (not strips) write
    CELLS: tl.constexpr = BLOCK // SPLIT
    cell_n, cell_band, cell_j, _, mask_cell = split_cells(tile, cells, bands, w, CELLS, 1, WIDE)
    mask_border = tl.arange(0, CELLS) == 0
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32  # of elements
    sample = (cell_n * stride_grad_n + cell_j.to(tl.int64) * stride_grad_w).to(INDEX)
    top = ((cell_n * bands + cell_band) * C * w + cell_j).to(INDEX)
    border = tl.cast(tile, INDEX) * (band_rows + 1) * C + tl.zeros([CELLS], INDEX)
    left = (n * stride_logits_n + j0.to(tl.int64) * stride_logits_w).to(INDEX)
    right = (n * stride_logits_n + j1.to(tl.int64) * stride_logits_w).to(INDEX)

    loss = tl.zeros([BLOCK], tl.float32)
    denominator = tl.zeros([BLOCK], tl.float32)
    bad_count_ptr += tile
    bad_index_ptr += tile
    if not (PER_PIXEL and WITH_GRAD):  # the forward pass has counted them
        tl.store(bad_count_ptr, 0)
        tl.store(bad_index_ptr, common.NO_INDEX)
    target = (stride_target_n, stride_target_h, stride_target_w)
    upstream = (stride_upstream_n, stride_upstream_h, stride_upstream_w)
    pixel_loss = (stride_loss_n, stride_loss_h, stride_loss_w)
    column_groups = (tl.maximum(tl.max(columns, 0), 1) + SPLIT * COLUMNS - 1) // (SPLIT * COLUMNS)

    # lanes may lie in several bands, the last of which may be shorter
    most_band_rows = tl.max(tl.minimum(h + 1 - lane_band * band_rows, band_rows), 0)
    for band_row in range(most_band_rows):
        i = lane_band * band_rows + band_row
        y0, rows, i0, i1, wy, dy = cell_axis(i, h, H, step_h, inverse_h, half)
        inside = mask & (i <= h)
        rows = tl.where(inside, rows, 0)
        row0 = (i0.to(tl.int64) * stride_logits_h).to(INDEX)
        row1 = (i1.to(tl.int64) * stride_logits_h).to(INDEX)
        corners = (row0 + left, row0 + right, row1 + left, row1 + right)
        stride_c = tl.cast(stride_logits_c, INDEX)
        # The first row's upper sums wait in `top`; the others' are added to the row before.
        cell_i = cell_band * band_rows + band_row
        lower = sample + (cell_i.to(tl.int64) * stride_grad_h).to(INDEX)
        upper = lower - tl.cast(stride_grad_h, INDEX)
        stride_lower = tl.cast(stride_grad_c, INDEX)
        stride_upper = stride_lower
        upper_ptr = grad_ptr
        if band_row == 0:
            upper = top
            upper_ptr = top_ptr
            stride_upper = tl.cast(w, INDEX)
        mask_sample = mask_cell & (cell_j < w)
        mask_upper = mask_sample & (cell_i <= h)
        mask_lower = mask_sample & (cell_i < h)
        mask_left = mask_border & (cell_i <= h)

        # pass 0: shift and spread
        peak = tl.full([BLOCK], float("-inf"), tl.float32)
        regular = mask | True
        weight_sum = C * 1.0
        if HAS_WEIGHT:
            weight_sum = 0.0
        for c in range(C):
            a00, a01, a10, a11 = load_samples(logits_ptr, corners, c, stride_c)
            high = tl.maximum(tl.maximum(a00, a01), tl.maximum(a10, a11))
            low = tl.minimum(tl.minimum(a00, a01), tl.minimum(a10, a11))
            total = (a00 + a01) + (a10 + a11)
            # not where a sample is NaN or infinite, or so large that its product with log2 e is
            regular = regular & (high - low <= SPREAD) & (tl.abs(total) < LARGE)
            peak = tl.maximum(peak, high)
            if HAS_WEIGHT:
                weight_sum += tl.load(weight_ptr + c).to(tl.float32)
        plain = tl.min(tl.where(regular, 1, 0), 0) == 0

        most_rows = tl.maximum(tl.max(rows, 0), 1)  # cells without pixels write zeros
        cell = (n, y0, x0, rows, columns)
        weights = (wy, dy, wx, dx)
        place = (
            upper_ptr, upper, stride_upper, grad_ptr, lower, stride_lower,
            border_ptr, border + band_row * C, mask_upper, mask_lower, mask_left,
        )  # fmt: skip
        if ONE_CLASS or plain:
            loss, denominator = row_pixel_by_pixel(
                logits_ptr, target_ptr, weight_ptr, upstream_ptr, pixel_loss_ptr,
                bad_count_ptr, bad_index_ptr, corners, cell, (i == h, j == w), strip, weights,
                weight_sum, place, band_row > 0, most_rows, column_groups, stride_c, target,
                upstream, pixel_loss, h, w, H, W, step_h, step_w, half, C, ignore_index, kept,
                share, loss, denominator,
                HAS_WEIGHT, HAS_SMOOTHING, ONE_CLASS, WITH_GRAD, PER_PIXEL, COLUMNS, SPLIT,
            )  # fmt: skip
        else:
            loss, denominator = row_by_powers(
                logits_ptr, target_ptr, weight_ptr, upstream_ptr, pixel_loss_ptr,
                bad_count_ptr, bad_index_ptr, corners, cell, strip, weights, peak, weight_sum,
                place, band_row > 0, most_rows, column_groups, stride_c, target, upstream,
                pixel_loss, H, W, C, ignore_index, kept, share, loss, denominator,
                HAS_WEIGHT, HAS_SMOOTHING, WITH_GRAD, PER_PIXEL, BITS, ROWS, COLUMNS, SPLIT,
                ONE_GROUP,
            )  # fmt: skip

    if not PER_PIXEL:
        tl.store(loss_ptr + tile, tl.sum(loss, 0))
        tl.store(denominator_ptr + tile, tl.sum(denominator, 0))
