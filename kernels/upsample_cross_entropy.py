"""Bilinear upsampling + softmax cross entropy over cells, with the low-resolution gradient.

Maths. A pixel i of cell (i, j) at row r, column k; x_c its four samples of class c, v its weights.
1. z_c = sum_corner v_corner x_c,corner = a_ck + r d_ck: linear down a column
2. lse = log sum_c exp(z_c);  exp(a + r d) = exp(a) exp(d)^r: two exponentials per class and column,
   then one multiplication per pixel
3. l_i = A_i lse - sum_c b_ic z_c,  b_ic = (1-e) w_y [c = y] + (e/C) w_c,  A_i = sum_c b_ic
4. gradient of a corner: sum_i v_corner (A_i exp(z_c - lse) - b_ic)
5. sum_i v A_i exp(z_c - lse) = sum_k exp(a_ck) sum_r v (A/s)_kr exp(d_ck)^r: Horner's rule in r,
   and its derivative for the factor r of v (v is linear in r, and in k)
6. sum_i v [y_i = c] follows from the moments (1, r, k, r k) of the pixels that carry label c; the
   same sums give sum_i z_y for eq. 3. Labels are packed in bytes (16 bits from 255 classes on) and
   compared four (two) at a time.

Shapes. logits [N, C, h, w] fp16/bf16/fp32, any strides; target [N, H, W]; gradient float32.

Who owns what. A lane owns a cell (common.py, 4) and keeps the sums of its pixels in registers. Pass
0 over the classes finds the shift and the spread of the cell; pass 1 sums exponentials; pass 2 runs
eqs. 5, 6 and writes. Neighbouring lanes share samples: a lane adds its left neighbour's sums to
those of its right one (an exchange in registers), so that one cell writes one sample above and one
below it, in two planes of the gradient's size; only a program's first cell leaves its left sums in
`border`. `_finish_kernel` adds planes and borders and scales. Nothing of full resolution is written
and no atomics are used.

Numerics. Sums in float32 per program, float64 across programs. Exponentials are relative to the
largest sample of the cell, in base 2. Guard: eq. 2 is taken where no class varies by more than
SPREAD inside any cell of the program: then an exponential lost to underflow is below 2^-34 of its
pixel's sum. Elsewhere, and for infinite or NaN samples, the plain path takes one exponential per
pixel and class after the eager expression, so that NaN comes out where it does there. Offsets are
int64.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, for the shift;
torch.nn.functional.interpolate and cross_entropy for the expression.
"""

# ruff: noqa: RUF005  (Triton has no (*a, b))
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcnseg.kernels import common
from fcnseg.kernels.common import (
    cell_axis,
    corner_offsets,
    load_corners,
    load_labels,
    split_cells,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SPREAD = tl.constexpr(32.0)  # natural units: e^32 = 2^46; float32 holds 2^-126


@triton.jit
def _packed_moments(words, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """Sums of 1, r, k, r k over the pixels of class c (eq. 6), float32 [BLOCK]."""
    PER_WORD: tl.constexpr = 32 // BITS
    ONES: tl.constexpr = 0x01010101 if BITS == 8 else 0x00010001
    LOW: tl.constexpr = 0x7F7F7F7F if BITS == 8 else 0x7FFF7FFF
    FIELD: tl.constexpr = (1 << BITS) - 1
    column = tl.arange(0, COLUMNS)[:, None]
    pattern = tl.cast(c, tl.int32)
    pattern = pattern | (pattern << 16)
    if BITS == 8:
        pattern = pattern | (pattern << 8)
    count = 0
    by_row = 0
    by_column = 0
    by_both = 0
    for i in tl.static_range((ROWS + PER_WORD - 1) // PER_WORD):
        differ = words[i] ^ pattern
        # the top bit of a field is set where any bit of it differs
        differ = ((differ & LOW) + LOW) | differ
        same = ((differ >> (BITS - 1)) & ONES) ^ ONES  # [COLUMNS, BLOCK]
        counts = tl.sum(same, 0)
        columns = tl.sum(same * column, 0)
        for field in tl.static_range(PER_WORD):
            n = (counts >> (BITS * field)) & FIELD
            k = (columns >> (BITS * field)) & FIELD
            count += n
            by_column += k
            by_row += n * (i * PER_WORD + field)
            by_both += k * (i * PER_WORD + field)
    return (
        count.to(tl.float32),
        by_row.to(tl.float32),
        by_column.to(tl.float32),
        by_both.to(tl.float32),
    )


@triton.jit
def _corner_sums(moments, wy, dy, wx, dx):
    """Weights of the four corners summed over pixels with these moments (eq. 4)."""
    count, by_row, by_column, by_both = moments
    lower = wy * count + dy * by_row
    right = wx * count + dx * by_column
    lower_right = wy * right + dy * (wx * by_row + dx * by_both)
    upper_right = right - lower_right
    lower_left = lower - lower_right
    return count - lower - upper_right, upper_right, lower_left, lower_right


@triton.jit
def _exponentials(corners, shift, weight_x, wy, dy):
    """exp2 of eq. 1 at the first row, and of its step, in units of log 2 relative to shift."""
    a00, a01, a10, a11 = corners
    upper = a00 * LOG2E - shift
    slope = a01 * LOG2E - shift - upper
    step = a10 * LOG2E - shift - upper
    twist = a11 * LOG2E - shift - upper - slope - step
    start = (upper + wy * step)[None, :] + (slope + wy * twist)[None, :] * weight_x
    fall = dy[None, :] * (step[None, :] + twist[None, :] * weight_x)
    return tl.exp2(start), tl.exp2(fall)


@triton.jit
def _add_to_cells(
    sums, top_ptr, bottom_ptr, border_ptr, offs_top, offs_bottom, offs_border, mask_top,
    mask_bottom, mask_border, first, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Strips -> cells -> samples; stores, or adds to what this lane stored for earlier pixels."""
    upper_left, upper_right, lower_left, lower_right = sums
    CELLS: tl.constexpr = BLOCK // SPLIT
    if SPLIT > 1:
        upper_left = tl.sum(tl.reshape(upper_left, [CELLS, SPLIT]), 1)
        upper_right = tl.sum(tl.reshape(upper_right, [CELLS, SPLIT]), 1)
        lower_left = tl.sum(tl.reshape(lower_left, [CELLS, SPLIT]), 1)
        lower_right = tl.sum(tl.reshape(lower_right, [CELLS, SPLIT]), 1)
    if CELLS > 1:
        cell = tl.arange(0, CELLS)
        has_next = cell + 1 < CELLS
        following = tl.minimum(cell + 1, CELLS - 1)
        upper_right += tl.where(has_next, tl.gather(upper_left, following, 0), 0.0)
        lower_right += tl.where(has_next, tl.gather(lower_left, following, 0), 0.0)
    later = first == 0
    upper_right += tl.load(top_ptr + offs_top, mask=mask_top & later, other=0.0)
    lower_right += tl.load(bottom_ptr + offs_bottom, mask=mask_bottom & later, other=0.0)
    upper_left += tl.load(border_ptr + offs_border, mask=mask_border & later, other=0.0)
    lower_left += tl.load(border_ptr + offs_border + 1, mask=mask_border & later, other=0.0)
    tl.store(top_ptr + offs_top, upper_right, mask=mask_top)
    tl.store(bottom_ptr + offs_bottom, lower_right, mask=mask_bottom)
    tl.store(border_ptr + offs_border, upper_left, mask=mask_border)
    tl.store(border_ptr + offs_border + 1, lower_left, mask=mask_border)


@triton.jit
def _upsample_cross_entropy_kernel(
    logits_ptr, target_ptr, weight_ptr, upstream_ptr, pixel_loss_ptr,
    loss_ptr, denominator_ptr, bad_count_ptr, bad_index_ptr, top_ptr, bottom_ptr, border_ptr,
    cells, C, h, w, H, W, step_h, inverse_h, step_w, inverse_w, half,
    stride_logits_n, stride_logits_c, stride_logits_h, stride_logits_w,
    stride_target_n, stride_target_h, stride_target_w,
    stride_upstream_n, stride_upstream_h, stride_upstream_w,
    stride_grad_n, stride_grad_c, stride_grad_h, stride_grad_w,
    ignore_index, smoothing,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, ONE_CLASS: tl.constexpr,
    WITH_GRAD: tl.constexpr, PER_PIXEL: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scalar reductions: partial loss, denominator and planes. PER_PIXEL: the loss of each pixel,
    or with WITH_GRAD the planes for the upstream gradient of each pixel."""
    tile = tl.program_id(0)
    n, i, j, strip, mask = split_cells(tile, cells, h, w, BLOCK, SPLIT, WIDE)
    y0, rows, i0, i1, wy, dy = cell_axis(i, h, H, step_h, inverse_h, half)
    x0, columns, j0, j1, wx, dx = cell_axis(j, w, W, step_w, inverse_w, half)
    rows = tl.where(mask, rows, 0)
    corners = corner_offsets(n, i0, i1, j0, j1, stride_logits_n, stride_logits_h, stride_logits_w)
    kept = 1.0 - smoothing
    share = smoothing / C

    # where this program's cells (not strips) write
    CELLS: tl.constexpr = BLOCK // SPLIT
    cell_n, cell_i, cell_j, _, mask_cell = split_cells(tile, cells, h, w, CELLS, 1, WIDE)
    mask_cell = mask_cell & (cell_j < w)
    mask_top = mask_cell & (cell_i > 0)
    mask_bottom = mask_cell & (cell_i < h)
    mask_border = tl.arange(0, CELLS) == 0
    offs_bottom = (
        cell_n * stride_grad_n
        + cell_i.to(tl.int64) * stride_grad_h
        + cell_j.to(tl.int64) * stride_grad_w
    )
    offs_top = offs_bottom - stride_grad_h
    offs_border = tile.to(tl.int64) * C * 2 + tl.zeros([CELLS], tl.int64)

    # pass 0: shift and spread
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    regular = mask | True
    weight_sum = C * 1.0
    if HAS_WEIGHT:
        weight_sum = 0.0
    for c in range(C):
        a00, a01, a10, a11 = load_corners(logits_ptr, corners, c, stride_logits_c)
        high = tl.maximum(tl.maximum(a00, a01), tl.maximum(a10, a11))
        low = tl.minimum(tl.minimum(a00, a01), tl.minimum(a10, a11))
        total = (a00 + a01) + (a10 + a11)
        regular = regular & (high - low <= SPREAD) & (total == total)
        peak = tl.maximum(peak, high)
        if HAS_WEIGHT:
            weight_sum += tl.load(weight_ptr + c).to(tl.float32)
    plain = tl.min(tl.where(regular, 1, 0), 0) == 0

    loss = tl.zeros([BLOCK], tl.float32)
    denominator = tl.zeros([BLOCK], tl.float32)
    bad_count = tl.zeros([BLOCK], tl.int32)
    bad_index = tl.full([BLOCK], common.NO_INDEX, tl.int64)
    k = tl.arange(0, COLUMNS)[:, None]  # [COLUMNS, 1]
    most_rows = tl.maximum(tl.max(rows, 0), 1)
    column_groups = (tl.maximum(tl.max(columns, 0), 1) + SPLIT * COLUMNS - 1) // (SPLIT * COLUMNS)

    if PER_PIXEL or ONE_CLASS or plain:
        for group in range(most_rows * column_groups):
            row = group % most_rows
            # sums in one dimension first: Triton 3.7 mixes up [1, BLOCK] values that both branches
            # share when it changes their layout
            first_column = (group // most_rows * SPLIT + strip) * COLUMNS
            column = first_column[None, :] + k
            left = tl.where(row < rows, columns - first_column, 0)
            here = k < left[None, :]  # [COLUMNS, BLOCK]
            y = (y0 + row).to(tl.int64)
            x = (x0 + first_column)[None, :].to(tl.int64) + k
            offs = (n * stride_target_n + y * stride_target_h)[None, :] + x * stride_target_w
            label, bad = load_labels(target_ptr, offs, here, C, ignore_index)
            valid = label >= 0
            bad_count += tl.sum(tl.where(bad, 1, 0), 0)
            flat = ((n * H + y) * W)[None, :] + x
            bad_index = tl.minimum(bad_index, tl.min(tl.where(bad, flat, common.NO_INDEX), 0))
            # Beyond the last sample both rows are the last one: the eager weights add to 1 there,
            # and 0 * inf arises only where the eager weight is 0.
            at_end_y = tl.fma((y0 + row).to(tl.float32) + half, step_h, -(half + h - 1))
            at_end_x = tl.fma(x.to(tl.float32) + half, step_w, -(half + w - 1))
            grad_y = (wy + row * dy)[None, :]
            grad_x = wx[None, :] + column * dx[None, :]
            weight_y = tl.where((i == h)[None, :], at_end_y[None, :], grad_y)
            weight_x = tl.where((j == w)[None, :], at_end_x, grad_x)

            highest = tl.full([COLUMNS, BLOCK], float("-inf"), tl.float32)
            for c in range(C):
                a00, a01, a10, a11 = load_corners(logits_ptr, corners, c, stride_logits_c)
                upper = (1.0 - weight_x) * a00[None, :] + weight_x * a01[None, :]
                lower = (1.0 - weight_x) * a10[None, :] + weight_x * a11[None, :]
                highest = tl.maximum(highest, (1.0 - weight_y) * upper + weight_y * lower)
            exponentials = tl.zeros([COLUMNS, BLOCK], tl.float32)
            z_label = tl.zeros([COLUMNS, BLOCK], tl.float32)
            z_smooth = tl.zeros([COLUMNS, BLOCK], tl.float32)
            for c in range(C):
                a00, a01, a10, a11 = load_corners(logits_ptr, corners, c, stride_logits_c)
                upper = (1.0 - weight_x) * a00[None, :] + weight_x * a01[None, :]
                lower = (1.0 - weight_x) * a10[None, :] + weight_x * a11[None, :]
                z = (1.0 - weight_y) * upper + weight_y * lower
                exponentials += tl.exp2((z - highest) * LOG2E)
                z_label = tl.where(label == c, z, z_label)
                if HAS_SMOOTHING:
                    class_weight = 1.0
                    if HAS_WEIGHT:
                        class_weight = tl.load(weight_ptr + c).to(tl.float32)
                    z_smooth += class_weight * (highest - z)
            log_sum = tl.log2(exponentials) * LN2
            own = tl.where(valid, 1.0, 0.0)
            if HAS_WEIGHT:
                own = tl.load(weight_ptr + label, mask=valid, other=0.0).to(tl.float32)
            factor = own  # A of eq. 3
            if HAS_SMOOTHING:
                factor = kept * own + tl.where(valid, share * weight_sum, 0.0)
            if ONE_CLASS:
                pixel_loss = factor * (z_label - z_label)  # zero, or NaN with z
            else:
                pixel_loss = kept * own * (highest - z_label + log_sum)
                if HAS_SMOOTHING:
                    pixel_loss += share * (z_smooth + weight_sum * log_sum)
            pixel_loss = tl.where(valid, pixel_loss, 0.0)
            upstream = tl.full([COLUMNS, BLOCK], 1.0, tl.float32)
            if PER_PIXEL:
                if WITH_GRAD:
                    offs = (n * stride_upstream_n + y * stride_upstream_h)[None, :]
                    offs += x * stride_upstream_w
                    upstream = tl.load(upstream_ptr + offs, mask=here, other=0.0).to(tl.float32)
                    upstream = tl.where(valid, upstream, 0.0)
                    upstream = tl.where(bad, float("nan"), upstream)
                else:
                    pixel_loss = tl.where(bad, float("nan"), pixel_loss)
                    tl.store(pixel_loss_ptr + flat, pixel_loss, mask=here)
            else:
                loss += tl.sum(pixel_loss, 0)
                denominator += tl.sum(own, 0)

            if WITH_GRAD:
                for c in range(C):
                    a00, a01, a10, a11 = load_corners(logits_ptr, corners, c, stride_logits_c)
                    upper = (1.0 - weight_x) * a00[None, :] + weight_x * a01[None, :]
                    lower = (1.0 - weight_x) * a10[None, :] + weight_x * a11[None, :]
                    z = (1.0 - weight_y) * upper + weight_y * lower
                    if ONE_CLASS:
                        slope = z - z
                    else:
                        slope = factor * tl.exp2((z - highest) * LOG2E) / exponentials
                        hot = tl.where(label == c, own, 0.0)
                        if HAS_SMOOTHING:
                            class_weight = 1.0
                            if HAS_WEIGHT:
                                class_weight = tl.load(weight_ptr + c).to(tl.float32)
                            hot = kept * hot + tl.where(valid, share * class_weight, 0.0)
                        slope -= hot
                    # an ignored pixel's NaN counts, as in the eager gradient; one outside does not
                    if PER_PIXEL:
                        slope *= upstream
                    slope = tl.where(here, slope, 0.0)
                    lower = tl.sum(slope * grad_y, 0)
                    right = tl.sum(slope * grad_x, 0)
                    lower_right = tl.sum(slope * grad_x * grad_y, 0)
                    upper_right = right - lower_right
                    lower_left = lower - lower_right
                    sums = (
                        tl.sum(slope, 0) - lower - upper_right,
                        upper_right,
                        lower_left,
                        lower_right,
                    )
                    channel = tl.cast(c, tl.int64) * stride_grad_c
                    _add_to_cells(
                        sums, top_ptr, bottom_ptr, border_ptr, offs_top + channel,
                        offs_bottom + channel, offs_border + c * 2, mask_top, mask_bottom,
                        mask_border, group == 0, BLOCK, SPLIT,
                    )  # fmt: skip
    else:
        PER_WORD: tl.constexpr = 32 // BITS
        FIELD: tl.constexpr = (1 << BITS) - 1
        shift = peak * LOG2E
        row_groups = (most_rows + ROWS - 1) // ROWS
        for group in range(row_groups * column_groups):
            first_row = group % row_groups * ROWS
            first_column = (group // row_groups * SPLIT + strip) * COLUMNS
            column = first_column[None, :] + k
            # columns past the cell repeat its last one: their factors are 0, and 0 * inf is not
            last = tl.maximum(columns - 1, 0)[None, :]
            weight_x = wx[None, :] + tl.minimum(column, last) * dx[None, :]
            group_wy = wy + first_row * dy
            group_wx = wx + first_column * dx
            x = (x0 + first_column)[None, :].to(tl.int64) + k

            words = ()
            for i_word in tl.static_range((ROWS + PER_WORD - 1) // PER_WORD):
                word = tl.full([COLUMNS, BLOCK], -1, tl.int32)
                # a loop, not unrolled: the loads of a whole cell in flight would take the registers
                for field in range(min(PER_WORD, ROWS)):
                    row = first_row + i_word * PER_WORD + field
                    here = k < tl.where(row < rows, columns - first_column, 0)[None, :]
                    y = (y0 + row).to(tl.int64)
                    offs = (n * stride_target_n + y * stride_target_h)[None, :]
                    offs += x * stride_target_w
                    label, bad = load_labels(target_ptr, offs, here, C, ignore_index)
                    word ^= ((label ^ -1) & FIELD) << (BITS * field)
                    bad_count += tl.sum(tl.where(bad, 1, 0), 0)
                    flat = ((n * H + y) * W)[None, :] + x
                    flat = tl.where(bad, flat, common.NO_INDEX)
                    bad_index = tl.minimum(bad_index, tl.min(flat, 0))
                words = words + (word,)

            # pass 1 (eq. 2)
            sums = ()
            for _row in tl.static_range(ROWS):
                sums = sums + (tl.zeros([COLUMNS, BLOCK], tl.float32),)
            for c in range(C):
                samples = load_corners(logits_ptr, corners, c, stride_logits_c)
                e, q = _exponentials(samples, shift, weight_x, group_wy, dy)
                larger = ()
                for r in tl.static_range(ROWS):
                    larger = larger + (sums[r] + e,)
                    if r + 1 < ROWS:
                        e = e * q
                sums = larger

            factors = ()  # A / s of eq. 5
            valid_n = tl.zeros([COLUMNS, BLOCK], tl.float32)
            valid_r = tl.zeros([COLUMNS, BLOCK], tl.float32)
            for r in tl.static_range(ROWS):
                label = (words[r // PER_WORD] >> (BITS * (r % PER_WORD))) & FIELD
                valid = label != FIELD
                own = tl.where(valid, 1.0, 0.0)
                valid_n += own
                valid_r += own * r
                if HAS_WEIGHT:
                    own = tl.load(weight_ptr + label, mask=valid, other=0.0).to(tl.float32)
                denominator += tl.sum(own, 0)
                factor = own
                if HAS_SMOOTHING:
                    factor = kept * own + tl.where(valid, share * weight_sum, 0.0)
                total = tl.where(valid, sums[r], 1.0)
                loss += tl.sum(factor * tl.log2(total), 0)
                factors = factors + (factor / total,)

            # pass 2 (eqs. 3 to 6)
            if HAS_SMOOTHING:
                moments = (
                    tl.sum(valid_n, 0),
                    tl.sum(valid_r, 0),
                    tl.sum(valid_n * k, 0),
                    tl.sum(valid_r * k, 0),
                )
                s00, s01, s10, s11 = _corner_sums(moments, group_wy, dy, group_wx, dx)
            for c in range(C):
                a00, a01, a10, a11 = load_corners(logits_ptr, corners, c, stride_logits_c)
                moments = _packed_moments(words, c, ROWS, COLUMNS, BITS)
                m00, m01, m10, m11 = _corner_sums(moments, group_wy, dy, group_wx, dx)
                if HAS_WEIGHT or HAS_SMOOTHING:
                    class_weight = 1.0
                    if HAS_WEIGHT:
                        class_weight = tl.load(weight_ptr + c).to(tl.float32)
                    m00 *= kept * class_weight
                    m01 *= kept * class_weight
                    m10 *= kept * class_weight
                    m11 *= kept * class_weight
                    if HAS_SMOOTHING:
                        m00 += share * class_weight * s00
                        m01 += share * class_weight * s01
                        m10 += share * class_weight * s10
                        m11 += share * class_weight * s11
                loss -= m00 * (a00 * LOG2E - shift) + m01 * (a01 * LOG2E - shift)
                loss -= m10 * (a10 * LOG2E - shift) + m11 * (a11 * LOG2E - shift)
                if WITH_GRAD:
                    e, q = _exponentials((a00, a01, a10, a11), shift, weight_x, group_wy, dy)
                    value = factors[ROWS - 1]
                    slope = tl.zeros([COLUMNS, BLOCK], tl.float32)
                    for r in tl.static_range(1, ROWS):
                        slope = slope * q + value
                        value = value * q + factors[ROWS - 1 - r]
                    value *= e
                    slope *= e * q  # sum_r r (A / s) e q^r
                    falling = group_wy[None, :] * value + dy[None, :] * slope
                    lower = tl.sum(falling, 0)
                    right = tl.sum(weight_x * value, 0)
                    lower_right = tl.sum(weight_x * falling, 0)
                    upper_right = right - lower_right
                    lower_left = lower - lower_right
                    corner_sums = (
                        tl.sum(value, 0) - lower - upper_right - m00,
                        upper_right - m01,
                        lower_left - m10,
                        lower_right - m11,
                    )
                    channel = tl.cast(c, tl.int64) * stride_grad_c
                    _add_to_cells(
                        corner_sums, top_ptr, bottom_ptr, border_ptr, offs_top + channel,
                        offs_bottom + channel, offs_border + c * 2, mask_top, mask_bottom,
                        mask_border, group == 0, BLOCK, SPLIT,
                    )  # fmt: skip
        loss *= LN2

    if not PER_PIXEL:
        tl.store(loss_ptr + tile, tl.sum(loss, 0))
        tl.store(denominator_ptr + tile, tl.sum(denominator, 0))
    tl.store(bad_count_ptr + tile, tl.sum(bad_count, 0))
    tl.store(bad_index_ptr + tile, tl.min(bad_index, 0))


@triton.jit
def _reduce_kernel(
    loss_ptr, denominator_ptr, bad_count_ptr, partials, out_ptr, scale_ptr,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The scalar loss, and the factor of the gradient, from the programs' partial sums."""
    offs = tl.arange(0, BLOCK)
    loss = tl.zeros([BLOCK], tl.float64)
    denominator = tl.zeros([BLOCK], tl.float64)
    bad = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, partials, BLOCK):
        mask = begin + offs < partials
        loss += tl.load(loss_ptr + begin + offs, mask=mask, other=0.0).to(tl.float64)
        denominator += tl.load(denominator_ptr + begin + offs, mask=mask, other=0.0).to(tl.float64)
        bad |= tl.load(bad_count_ptr + begin + offs, mask=mask, other=0)
    total = tl.sum(loss, 0)
    scale = tl.cast(1.0, tl.float64)
    if MEAN:
        scale = 1.0 / tl.sum(denominator, 0)  # all ignored: inf; 0 * inf is NaN, as the mean is
    poison = tl.where(tl.max(bad, 0) != 0, float("nan"), 0.0)
    tl.store(out_ptr, (total * scale + poison).to(tl.float32))
    # all ignored: the gradient is 0, not NaN
    scale = tl.where(scale == float("inf"), 1.0, scale)
    tl.store(scale_ptr, (scale + poison).to(tl.float32))


@triton.jit
def _finish_kernel(
    top_ptr, bottom_ptr, border_ptr, scale_ptr, grad_ptr, total, C, h, w,
    stride_n, stride_c, stride_h, stride_w,
    HAS_SCALE: tl.constexpr, CELLS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient = (above + below + what programs left at their borders) * scale.

    Samples are numbered in the order of the logits' memory where the strides are those of a
    permutation, so that neighbours in a program are neighbours in memory (channels_last too).
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    flat = tl.cast(tl.program_id(0), INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = flat < total
    if stride_c == 1:
        c = flat % C
        flat = flat // C
        j = flat % w
        flat = flat // w
        i = flat % h
        n = flat // h
    else:
        j = flat % w
        flat = flat // w
        i = flat % h
        flat = flat // h
        c = flat % C
        n = flat // C
    n = n.to(tl.int64)
    c = c.to(tl.int64)
    i = i.to(tl.int64)
    j = j.to(tl.int64)
    offs = n * stride_n + c * stride_c + i * stride_h + j * stride_w
    value = tl.load(top_ptr + offs, mask=mask, other=0.0)
    value += tl.load(bottom_ptr + offs, mask=mask, other=0.0)
    # Cell (i, j) lies above the sample's lower right neighbour; its right neighbour's left sums
    # are missing where that one begins another program.
    upper = (n * (h + 1) + i) * (w + 1) + j + 1
    lower = upper + (w + 1)
    at = mask & (upper % CELLS == 0)
    value += tl.load(border_ptr + (upper // CELLS * C + c) * 2 + 1, mask=at, other=0.0)
    at = mask & (lower % CELLS == 0)
    value += tl.load(border_ptr + (lower // CELLS * C + c) * 2, mask=at, other=0.0)
    if HAS_SCALE:
        value *= tl.load(scale_ptr)
    tl.store(grad_ptr + offs, value, mask=mask)


def tuned_lanes(
    geo: common.Geometry,
    num_classes: int,
    weighted_smoothing: bool,
    pixel_backward: bool,
    capability: int,
) -> common.Lanes:
    """As many pixels a lane as its registers hold: a sum, then a factor, for each.

    Eight rows spill before Ampere, with both weights and smoothing, and with 16-bit labels.
    """
    small = capability < 80 or weighted_smoothing or num_classes >= 255
    columns = 2 if pixel_backward or (capability < 80 and weighted_smoothing) else 4
    return common.choose_lanes(geo, rows=4 if small else 8, columns=columns)


def _launch(
    logits: Tensor, target: Tensor, weight: Tensor | None, upstream: Tensor | None,
    record: Tensor, ignore_index: int, label_smoothing: float, geo: common.Geometry,
    per_pixel: bool, with_grad: bool, mean: bool, grad_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(loss, gradient) of the one kernel and the two small ones that gather."""
    (N, C, h, w), (H, W) = logits.shape, target.shape[1:]
    weighted_smoothing = weight is not None and label_smoothing > 0
    arch = common.capability(logits.device)
    lanes = tuned_lanes(geo, C, weighted_smoothing, per_pixel and with_grad, arch)
    cells = N * (h + 1) * (w + 1)
    tiles = triton.cdiv(cells, lanes.cells)
    float32 = {"dtype": torch.float32, "device": logits.device}
    loss, denominator = torch.empty(2, tiles, **float32)
    bad_count = torch.empty(tiles, dtype=torch.int32, device=logits.device)
    bad_index = torch.empty(tiles, dtype=torch.int64, device=logits.device)
    pixel_loss = torch.empty((N, H, W), **float32) if per_pixel and not with_grad else loss
    top = bottom = border = loss
    grad_strides: tuple[int, ...] = (0, 0, 0, 0)
    if with_grad:
        top = torch.empty_like(logits, dtype=torch.float32)
        bottom = torch.empty_like(top)
        border = torch.empty((tiles, C, 2), **float32)
        grad_strides = top.stride()
    if weight is not None:
        weight = weight.contiguous()
    with common.device_of(logits):
        _upsample_cross_entropy_kernel[(tiles,)](
            logits, target, logits if weight is None else weight,
            logits if upstream is None else upstream, pixel_loss,
            loss, denominator, bad_count, bad_index, top, bottom, border,
            cells, C, h, w, H, W, *geo.axes,
            *logits.stride(), *target.stride(),
            *((0, 0, 0) if upstream is None else upstream.stride()), *grad_strides,
            ignore_index, label_smoothing,
            HAS_WEIGHT=weight is not None, HAS_SMOOTHING=label_smoothing > 0, ONE_CLASS=C == 1,
            WITH_GRAD=with_grad, PER_PIXEL=per_pixel, BITS=8 if C < 255 else 16,
            WIDE=cells + lanes.cells >= 2**31, **lanes.constexprs(),
        )  # fmt: skip
        if not (per_pixel and with_grad):  # the forward pass has counted them
            common.add_bad_labels((bad_count, bad_index), target, record, None)
        result, scale = pixel_loss, loss
        if not per_pixel:
            result, scale = torch.empty((), **float32), torch.empty((), **float32)
            _reduce_kernel[(1,)](
                loss, denominator, bad_count, tiles, result, scale, MEAN=mean, BLOCK=1024
            )
        if not with_grad:
            return result, None
        gradient = bottom if grad_dtype == torch.float32 else torch.empty_like(logits)
        total, block = logits.numel(), 512
        _finish_kernel[(triton.cdiv(total, block),)](
            top, bottom, border, scale, gradient, total, C, h, w, *grad_strides,
            HAS_SCALE=not per_pixel, CELLS=lanes.cells, WIDE=total + block >= 2**31, BLOCK=block,
        )  # fmt: skip
    return result, gradient


def upsample_cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float, align_corners: bool, scale_h: float | None, scale_w: float | None,
    compute_grad: bool, record: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss, and the float32 gradient of a scalar reduction with the logits' strides (else empty).

    Args as the operator's; ``record`` is the device's bad-label record (int64 [5]).
    """
    none = reduction == "none"
    empty = torch.empty(0, dtype=torch.float32, device=logits.device)
    if logits.shape[0] == 0:
        if none:
            return torch.empty_like(target, dtype=torch.float32), empty
        value = torch.full(
            (),
            float("nan" if reduction == "mean" else 0),
            dtype=torch.float32,
            device=logits.device,
        )
        return value, torch.empty_like(logits, dtype=torch.float32) if compute_grad else empty
    geo = common.geometry(*logits.shape[2:], *target.shape[1:], align_corners, scale_h, scale_w)
    loss, gradient = _launch(
        logits, target, weight, None, record, ignore_index, label_smoothing, geo,
        per_pixel=none, with_grad=compute_grad and not none, mean=reduction == "mean",
        grad_dtype=torch.float32,
    )  # fmt: skip
    return loss, empty if gradient is None else gradient


def upsample_cross_entropy_backward(
    grad_output: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int,
    label_smoothing: float, align_corners: bool, scale_h: float | None, scale_w: float | None,
    record: Tensor,
) -> Tensor:  # fmt: skip
    """Gradient of ``reduction="none"`` for any upstream gradient [N, H, W], the logits' dtype."""
    if logits.shape[0] == 0:
        return torch.empty_like(logits)
    geo = common.geometry(*logits.shape[2:], *target.shape[1:], align_corners, scale_h, scale_w)
    _, gradient = _launch(
        logits, target, weight, grad_output, record, ignore_index, label_smoothing, geo,
        per_pixel=True, with_grad=True, mean=False, grad_dtype=logits.dtype,
    )  # fmt: skip
    return gradient
