"""Bilinear upsampling + softmax cross entropy over cells, with the low-resolution gradient.

Maths. A pixel i of cell (i, j) at row r, column k; x_c its four samples of class c, v its weights.
1. z_c = sum_corner v_corner x_c,corner = a_ck + r d_ck: linear down a column
2. lse = log sum_c exp(z_c);  exp(a + r d) = exp(a) exp(d)^r: two exponentials per class and column,
   then one multiplication and one addition per pixel
3. l_i = A_i lse - sum_c b_ic z_c,  b_ic = (1-e) w_y [c = y] + (e/C) w_c,  A_i = sum_c b_ic
4. gradient of a corner: sum_i v_corner u_i (A_i exp(z_c - lse) - b_ic), u the upstream gradient
5. sum_i v u A_i exp(z_c - lse) = sum_k exp(a_ck) sum_r v (u A/s)_kr exp(d_ck)^r: Horner's rule in
   r, and its derivative for the factor r of v (v is linear in r, and in k): two multiply-adds
6. sum_i v [y_i = c] follows from the moments (1, r, k, r k) of the pixels that carry label c; the
   same sums give sum_i z_y for eq. 3. The labels lie in bit planes, a bit a pixel: the pixels of c
   are the AND of as many words as a label has bits, and their moments are bit counts. Classes that
   no pixel of the program carries skip this. With an upstream gradient a pixel, its bits select u.

Shapes. logits [N, C, h, w] fp16/bf16/fp32, any strides; target [N, H, W]; gradient float32.

Who owns what. A lane owns a cell (common.py, 4) and keeps the sums of its pixels in registers. Pass
0 over the classes finds the shift and the spread of the cell; pass 1 sums exponentials; pass 2 runs
eqs. 5, 6 and writes. A program walks down the cell rows of a band and adds what the next row gives
to the samples above it to what it stored there before. Neighbouring lanes share samples: a lane
adds its left neighbour's sums to those of its right one (an exchange in registers). So only the
upper sums of a band's first cell row (`top`) and the left sums of a program's first cells
(`border`) lie outside the gradient. `_finish_kernel` adds them and scales; each of its programs
sums the denominators anew, in one order, and program 0 writes the loss and the bad-label record.
Nothing of full resolution is written and no atomics are used.

Numerics. Sums in float32 per program, float64 across programs. Exponentials are relative to the
largest sample of the cell, in base 2. Guard: eq. 2 is taken where no class varies by more than
SPREAD inside any cell of the row: then an exponential lost to underflow is below 2^-34 of its
pixel's sum. Elsewhere, and for infinite or NaN samples, the plain path takes one exponential per
pixel and class after the eager expression, so that NaN comes out where it does there. Offsets are
int64.

Instructions on the path of eq. 2, sm_90, a lane of 8 x 8 pixels (SASS): per class 29 in pass 0, 175
in pass 1, 334 in pass 2 and 79 more for a class that a pixel of the program carries, that is 8.4 to
9.7 per pixel and class, where eqs. 2 and 5 alone take 4; per pixel 39, of which 22 read the label.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, for the shift;
torch.nn.functional.interpolate and cross_entropy for the expression.
"""

# ruff: noqa: RUF005  (Triton has no (*a, b))
from __future__ import annotations

import triton
import triton.language as tl

from fcnseg.kernels import common
from fcnseg.kernels.common import (
    cell_axis,
    corner_offsets,
    count_bad,
    load_corners,
    load_labels,
    load_pixels,
    split_cells,
    store_pixels,
)
from fcnseg.kernels.reduction import TRACE, counted_weight

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SPREAD = tl.constexpr(32.0)  # natural units: e^32 = 2^46; float32 holds 2^-126


@triton.jit
def _label_planes(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """Bit b of every label (eq. 6): BITS words [BLOCK] for each four rows, a byte a row, a bit a
    column, from words [COLUMNS, BLOCK] of packed labels."""
    PER_QUAD: tl.constexpr = 1 if BITS <= 8 else 2
    ONES: tl.constexpr = 0x01010101 if BITS <= 8 else 0x00010001
    column = tl.arange(0, COLUMNS)[:, None]
    planes = ()
    for quad in tl.static_range((ROWS + 3) // 4):
        for b in tl.static_range(BITS):
            plane = tl.sum(((words[quad * PER_QUAD] >> b) & ONES) << column, 0)
            if PER_QUAD == 2:
                plane += tl.sum(((words[quad * PER_QUAD + 1] >> b) & ONES) << (column + 8), 0)
            planes = planes + (plane,)
    return planes


@triton.jit
def _pixels_of(planes, c, QUAD: tl.constexpr, BYTES: tl.constexpr, COLUMNS: tl.constexpr,
               BITS: tl.constexpr):  # fmt: skip
    """The pixels of class c among four rows: a word [BLOCK], laid out as the planes."""
    COVER: tl.constexpr = ((1 << COLUMNS) - 1) * (0x01010101 & ((1 << (8 * BYTES)) - 1))
    same = tl.full(planes[0].shape, COVER if COVER < 2**31 else COVER - 2**32, tl.int32)
    for b in tl.static_range(BITS):
        same = same & (planes[QUAD * BITS + b] ^ (((c >> b) & 1) - 1))
    return same


@triton.jit
def _moments(pixels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of 1, r, k, r k over the pixels (eq. 6), float32 [BLOCK]."""
    count = 0
    by_row = 0
    by_column = 0
    by_both = 0
    for quad in tl.static_range((ROWS + 3) // 4):
        # in every byte (row): n, how many bits are set; k, the sum of their positions
        word = pixels[quad].to(tl.uint32, bitcast=True)
        odd = (word >> 1) & 0x55555555
        pairs = word - odd
        odd = (odd & 0x33333333) + ((odd >> 2) & 0x33333333)
        high = (pairs >> 2) & 0x33333333
        n = (pairs & 0x33333333) + high
        if COLUMNS <= 4:
            k = odd + 2 * high
        else:
            upper = (n >> 4) & 0x0F0F0F0F
            n = (n & 0x0F0F0F0F) + upper
            k = (odd + (odd >> 4)) & 0x0F0F0F0F
            k += 2 * ((high + (high >> 4)) & 0x0F0F0F0F) + 4 * upper
        # sums of the four bytes, times 1 or the row; none passes 168, so no carry
        n_all = ((n * 0x01010101) >> 24).to(tl.int32)
        k_all = ((k * 0x01010101) >> 24).to(tl.int32)
        count += n_all
        by_column += k_all
        by_row += ((n * 0x00010203) >> 24).to(tl.int32) + 4 * quad * n_all
        by_both += ((k * 0x00010203) >> 24).to(tl.int32) + 4 * quad * k_all
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
def _relative(samples, shift):
    """The four samples in units of log 2, less shift."""
    a00, a01, a10, a11 = samples
    return a00 * LOG2E - shift, a01 * LOG2E - shift, a10 * LOG2E - shift, a11 * LOG2E - shift


@triton.jit
def _exponentials(samples, weight_x, wy, dy):
    """exp2 of eq. 1 at the first row, and of its step, of relative samples."""
    a00, a01, a10, a11 = samples
    slope = a01 - a00
    step = a10 - a00
    twist = a11 - a10 - slope
    start = (a00 + wy * step)[None, :] + (slope + wy * twist)[None, :] * weight_x
    fall = (dy * step)[None, :] + (dy * twist)[None, :] * weight_x
    return tl.exp2(start), tl.exp2(fall)


@triton.jit
def _interpolate(samples, weight_x, weight_y):
    """z of eq. 1 from four samples, [COLUMNS, BLOCK]: the eager expression."""
    a00, a01, a10, a11 = samples
    upper = (1.0 - weight_x) * a00 + weight_x * a01
    lower = (1.0 - weight_x) * a10 + weight_x * a11
    return (1.0 - weight_y) * upper + weight_y * lower


@triton.jit
def _load_interpolated(logits_ptr, corners, c, stride_c, weight_x, weight_y):
    a00, a01, a10, a11 = load_corners(logits_ptr, corners, c, stride_c)
    samples = (a00[None, :], a01[None, :], a10[None, :], a11[None, :])
    return _interpolate(samples, weight_x, weight_y)


@triton.jit
def _load_labelled(
    logits_ptr, corners, label, valid, stride_c, shift, weight_x, weight_y
):  # fmt: skip
    """z of each pixel's own class, in units of log 2, less shift: [COLUMNS, BLOCK]."""
    offs = tl.where(valid, label, 0).to(tl.int64) * stride_c
    a00 = load_pixels(logits_ptr, offs + corners[0][None, :], valid, 0.0).to(tl.float32)
    a01 = load_pixels(logits_ptr, offs + corners[1][None, :], valid, 0.0).to(tl.float32)
    a10 = load_pixels(logits_ptr, offs + corners[2][None, :], valid, 0.0).to(tl.float32)
    a11 = load_pixels(logits_ptr, offs + corners[3][None, :], valid, 0.0).to(tl.float32)
    return _interpolate(_relative((a00, a01, a10, a11), shift[None, :]), weight_x, weight_y)


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _take_exponent(x):
    """x = m 2^e with m in [1, 2), for positive normal x: m and e + 127."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True), bits >> 23


@triton.jit
def _add_to_cells(
    sums, upper_ptr, lower_ptr, border_ptr, next_border_ptr, mask_upper, mask_lower, mask_border,
    add_upper, add_lower, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Strips -> cells -> samples; stores, or adds to what this program stored for other pixels."""
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
    upper_right += tl.load(upper_ptr, mask=mask_upper & add_upper, other=0.0)
    lower_right += tl.load(lower_ptr, mask=mask_lower & add_lower, other=0.0)
    upper_left += tl.load(border_ptr, mask=mask_border & add_upper, other=0.0)
    lower_left += tl.load(next_border_ptr, mask=mask_border & add_lower, other=0.0)
    tl.store(upper_ptr, upper_right, mask=mask_upper)
    tl.store(lower_ptr, lower_right, mask=mask_lower)
    tl.store(border_ptr, upper_left, mask=mask_border)
    tl.store(next_border_ptr, lower_left, mask=mask_border)


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
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
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
    sample_ptr = grad_ptr + cell_n * stride_grad_n + cell_j.to(tl.int64) * stride_grad_w
    top_row = (cell_n * bands + cell_band) * C
    top_ptr += top_row * w + cell_j
    border_ptr += tile.to(tl.int64) * (band_rows + 1) * C + tl.zeros([CELLS], tl.int64)

    loss = tl.zeros([BLOCK], tl.float32)
    denominator = tl.zeros([BLOCK], tl.float32)
    bad_count = tl.zeros([BLOCK], tl.int32)
    bad_index = tl.full([BLOCK], common.NO_INDEX, tl.int64)
    k = tl.arange(0, COLUMNS)[:, None]  # [COLUMNS, 1]
    column_groups = (tl.maximum(tl.max(columns, 0), 1) + SPLIT * COLUMNS - 1) // (SPLIT * COLUMNS)

    for band_row in range(band_rows):
        i = lane_band * band_rows + band_row
        y0, rows, i0, i1, wy, dy = cell_axis(i, h, H, step_h, inverse_h, half)
        inside = mask & (i <= h)
        rows = tl.where(inside, rows, 0)
        corners = corner_offsets(
            n, i0, i1, j0, j1, stride_logits_n, stride_logits_h, stride_logits_w
        )
        # The first row's upper sums wait in `top`; the others' are added to the row before.
        cell_i = cell_band * band_rows + band_row
        lower_ptr = sample_ptr + cell_i.to(tl.int64) * stride_grad_h
        upper_ptr = lower_ptr - stride_grad_h
        stride_upper = tl.cast(stride_grad_c, tl.int64)
        if band_row == 0:
            upper_ptr = top_ptr
            stride_upper = tl.cast(w, tl.int64)
        mask_sample = mask_cell & (cell_j < w)
        mask_upper = mask_sample & (cell_i <= h)
        mask_lower = mask_sample & (cell_i < h)
        mask_left = mask_border & (cell_i <= h)
        row_border_ptr = border_ptr + tl.cast(band_row, tl.int64) * C

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

        # Cells without pixels write zeros; a row past the last one does nothing.
        most_rows = tl.max(tl.maximum(rows, tl.where(inside, 1, 0)), 0)
        if ONE_CLASS or plain:
            for group in range(most_rows * column_groups):
                tl.debug_barrier()  # between the stores of a sample and the loads that add to it
                row = group % most_rows
                # sums in one dimension first: Triton 3.7 mixes up [1, BLOCK] values that both
                # branches share when it changes their layout
                first_column = (group // most_rows * SPLIT + strip) * COLUMNS
                column = first_column[None, :] + k
                left = tl.where(row < rows, columns - first_column, 0)
                here = k < left[None, :]  # [COLUMNS, BLOCK]
                y = (y0 + row).to(tl.int64)
                x = (x0 + first_column)[None, :].to(tl.int64) + k
                offs = (n * stride_target_n + y * stride_target_h)[None, :] + x * stride_target_w
                label, bad = load_labels(target_ptr, offs, here, C, ignore_index)
                valid = label >= 0
                flat = ((n * H + y) * W)[None, :] + x
                bad_count, bad_index = count_bad(bad, flat, bad_count, bad_index)
                # Beyond the last sample both rows are the last one: the eager weights add to 1
                # there, and 0 * inf arises only where the eager weight is 0.
                at_end_y = tl.fma((y0 + row).to(tl.float32) + half, step_h, -(half + h - 1))
                at_end_x = tl.fma(x.to(tl.float32) + half, step_w, -(half + w - 1))
                grad_y = (wy + row * dy)[None, :]
                grad_x = wx[None, :] + column * dx[None, :]
                weight_y = tl.where((i == h)[None, :], at_end_y[None, :], grad_y)
                weight_x = tl.where((j == w)[None, :], at_end_x, grad_x)

                highest = tl.full([COLUMNS, BLOCK], float("-inf"), tl.float32)
                for c in range(C):
                    z = _load_interpolated(
                        logits_ptr, corners, c, stride_logits_c, weight_x, weight_y
                    )
                    highest = tl.maximum(highest, z)
                exponentials = tl.zeros([COLUMNS, BLOCK], tl.float32)
                z_label = tl.zeros([COLUMNS, BLOCK], tl.float32)
                z_smooth = tl.zeros([COLUMNS, BLOCK], tl.float32)
                for c in range(C):
                    z = _load_interpolated(
                        logits_ptr, corners, c, stride_logits_c, weight_x, weight_y
                    )
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
                    own = load_pixels(weight_ptr, label, valid, 0.0).to(tl.float32)
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
                        upstream = load_pixels(upstream_ptr, offs, here, 0.0)
                        upstream = tl.where(valid, upstream.to(tl.float32), 0.0)
                        upstream = tl.where(bad, float("nan"), upstream)
                    else:
                        pixel_loss = tl.where(bad, float("nan"), pixel_loss)
                        offs = (n * stride_loss_n + y * stride_loss_h)[None, :] + x * stride_loss_w
                        store_pixels(pixel_loss_ptr, offs, pixel_loss, here)
                else:
                    loss += tl.sum(pixel_loss, 0)
                    denominator += tl.sum(counted_weight(own, valid, HAS_WEIGHT), 0)

                if WITH_GRAD:
                    for c in range(C):
                        z = _load_interpolated(
                            logits_ptr, corners, c, stride_logits_c, weight_x, weight_y
                        )
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
                        # An ignored pixel's NaN counts, as in the eager gradient; one outside
                        # does not.
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
                        channel = tl.cast(c, tl.int64)
                        _add_to_cells(
                            sums, upper_ptr + channel * stride_upper,
                            lower_ptr + channel * stride_grad_c, row_border_ptr + c,
                            row_border_ptr + C + c, mask_upper, mask_lower, mask_left,
                            (group > 0) | (band_row > 0), group > 0, BLOCK, SPLIT,
                        )  # fmt: skip
        else:
            # Labels are packed in bytes, or in 16 bits where they do not fit: word PER_QUAD q + s
            # holds rows 4 q + s, 4 q + s + PER_QUAD, ...; a label of ones is no label.
            PER_QUAD: tl.constexpr = 1 if BITS <= 8 else 2
            FIELD_BITS: tl.constexpr = 8 * PER_QUAD
            FIELD: tl.constexpr = (1 << FIELD_BITS) - 1
            QUADS: tl.constexpr = (ROWS + 3) // 4
            shift = peak * LOG2E
            loss_2 = tl.zeros([BLOCK], tl.float32)  # in units of log 2
            row_groups = (most_rows + ROWS - 1) // ROWS
            for group in range(row_groups * column_groups):
                tl.debug_barrier()  # between the stores of a sample and the loads that add to it
                first_row = group % row_groups * ROWS
                first_column = (group // row_groups * SPLIT + strip) * COLUMNS
                column = first_column[None, :] + k
                # columns past the cell repeat its last one: their factors are 0, and 0 * inf is not
                last = tl.maximum(columns - 1, 0)[None, :]
                weight_x = wx[None, :] + tl.minimum(column, last) * dx[None, :]
                group_wy = wy + first_row * dy
                group_wx = wx + first_column * dx
                x = (x0 + first_column)[None, :].to(tl.int64) + k

                poison = tl.zeros([BLOCK], tl.float32)
                words = ()
                for quad in tl.static_range(QUADS):
                    for s in tl.static_range(PER_QUAD):
                        word = tl.full([COLUMNS, BLOCK], -1, tl.int32)
                        # a loop, not unrolled: the loads of a whole cell in flight would take
                        # the registers
                        fields = (min(4, ROWS - 4 * quad) - s + PER_QUAD - 1) // PER_QUAD
                        for field in range(fields):
                            row = first_row + 4 * quad + s + field * PER_QUAD
                            here = k < tl.where(row < rows, columns - first_column, 0)[None, :]
                            y = (y0 + row).to(tl.int64)
                            offs = (n * stride_target_n + y * stride_target_h)[None, :]
                            offs += x * stride_target_w
                            label, bad = load_labels(target_ptr, offs, here, C, ignore_index)
                            word ^= ((label ^ -1) & FIELD) << (FIELD_BITS * field)
                            if PER_PIXEL and WITH_GRAD:
                                some = tl.max(bad.to(tl.int32), 0) > 0
                                poison = tl.where(some, float("nan"), poison)
                            else:
                                flat = ((n * H + y) * W)[None, :] + x
                                bad_count, bad_index = count_bad(bad, flat, bad_count, bad_index)
                                if PER_PIXEL:
                                    loss_here = tl.where(bad, float("nan"), 0.0)
                                    unlabelled = here & (label < 0)
                                    offs = (n * stride_loss_n + y * stride_loss_h)[None, :]
                                    offs += x * stride_loss_w
                                    store_pixels(pixel_loss_ptr, offs, loss_here, unlabelled)
                        if HAS_WEIGHT and not PER_PIXEL:  # some label: see counted_weight
                            labelled = tl.max((word != -1).to(tl.int32), 0) > 0
                            denominator += tl.where(labelled, TRACE, 0.0)
                        words = words + (word,)

                # pass 1 (eq. 2)
                sums = ()
                for _row in tl.static_range(ROWS):
                    sums = sums + (tl.zeros([COLUMNS, BLOCK], tl.float32),)
                z00 = tl.zeros([BLOCK], tl.float32)  # samples times weights, over the classes
                z01 = tl.zeros([BLOCK], tl.float32)
                z10 = tl.zeros([BLOCK], tl.float32)
                z11 = tl.zeros([BLOCK], tl.float32)
                for c in range(C):
                    samples = load_corners(logits_ptr, corners, c, stride_logits_c)
                    samples = _relative(samples, shift)
                    e, q = _exponentials(samples, weight_x, group_wy, dy)
                    larger = ()
                    for r in tl.static_range(ROWS):
                        larger = larger + (sums[r] + e,)
                        if r + 1 < ROWS:
                            e = e * q
                    sums = larger
                    if HAS_SMOOTHING and not WITH_GRAD:
                        class_weight = 1.0
                        if HAS_WEIGHT:
                            class_weight = tl.load(weight_ptr + c).to(tl.float32)
                        z00 += class_weight * samples[0]
                        z01 += class_weight * samples[1]
                        z10 += class_weight * samples[2]
                        z11 += class_weight * samples[3]

                # Equal weights: one logarithm of the product of the sums, whose exponents are
                # added apart so that it stays in range.
                ONE_LOG: tl.constexpr = not (PER_PIXEL or HAS_WEIGHT)
                mantissa = tl.full([COLUMNS, BLOCK], 1.0, tl.float32)
                exponent = tl.zeros([COLUMNS, BLOCK], tl.int32)
                factors = ()  # u A / s of eq. 5
                hots = ()  # (1-e) w_y u
                valid_n = tl.zeros([COLUMNS, BLOCK], tl.float32)
                valid_r = tl.zeros([COLUMNS, BLOCK], tl.float32)
                for r in tl.static_range(ROWS):
                    word = words[r // 4 * PER_QUAD + r % PER_QUAD]
                    label = (word >> (FIELD_BITS * (r % 4 // PER_QUAD))) & FIELD
                    valid = label != FIELD
                    own = tl.where(valid, 1.0, 0.0)
                    upstream = own
                    if HAS_WEIGHT:
                        own = load_pixels(weight_ptr, label, valid, 0.0).to(tl.float32)
                    factor = own
                    if HAS_SMOOTHING:
                        factor = kept * own + tl.where(valid, share * weight_sum, 0.0)
                    total = tl.where(valid, sums[r], 1.0)
                    y = (y0 + first_row + r).to(tl.int64)
                    log_total = 0.0
                    if ONE_LOG:
                        fraction, power = _take_exponent(total)
                        mantissa *= fraction
                        exponent += power
                    elif not (PER_PIXEL and WITH_GRAD):
                        log_total = factor * tl.log2(total)
                    if not PER_PIXEL:
                        denominator += tl.sum(own, 0)
                    if not WITH_GRAD:
                        weight_y = (group_wy + r * dy)[None, :]
                        z = _load_labelled(
                            logits_ptr, corners, label, valid, stride_logits_c, shift, weight_x,
                            weight_y,
                        )  # fmt: skip
                        pixel_loss = log_total - kept * own * z
                        if HAS_SMOOTHING:
                            z = (z00[None, :], z01[None, :], z10[None, :], z11[None, :])
                            z = _interpolate(z, weight_x, weight_y)
                            pixel_loss -= tl.where(valid, share * z, 0.0)
                        if PER_PIXEL:
                            offs = (n * stride_loss_n + y * stride_loss_h)[None, :]
                            offs += x * stride_loss_w
                            store_pixels(pixel_loss_ptr, offs, pixel_loss * LN2, valid)
                        else:
                            loss_2 += tl.sum(pixel_loss, 0)
                    else:
                        if PER_PIXEL:
                            offs = (n * stride_upstream_n + y * stride_upstream_h)[None, :]
                            offs += x * stride_upstream_w
                            upstream = load_pixels(upstream_ptr, offs, valid, 0.0)
                            upstream = upstream.to(tl.float32)
                            hots = hots + (kept * own * upstream,)
                            factor *= upstream
                        elif HAS_WEIGHT:
                            loss_2 += tl.sum(log_total, 0)
                        valid_n += upstream
                        valid_r += upstream * r
                        inverse = tl.rsqrt(total)
                        factors = factors + (factor * (inverse * inverse),)

                if ONE_LOG:
                    mantissa, power = _take_exponent(mantissa)
                    exponent += power
                    mantissa = tl.reduce(mantissa, 0, _multiply)
                    log_sum = tl.log2(mantissa) + (tl.sum(exponent, 0) - 127 * (ROWS + 1) * COLUMNS)
                    loss_2 += log_sum * (kept + share * C if HAS_SMOOTHING else 1.0)

                # pass 2 (eqs. 3 to 6)
                if WITH_GRAD:
                    planes = _label_planes(words, ROWS, COLUMNS, BITS)
                    if HAS_SMOOTHING:
                        moments = (
                            tl.sum(valid_n, 0),
                            tl.sum(valid_r, 0),
                            tl.sum(valid_n * k, 0),
                            tl.sum(valid_r * k, 0),
                        )
                        s00, s01, s10, s11 = _corner_sums(moments, group_wy, dy, group_wx, dx)
                    for c in range(C):
                        samples = load_corners(logits_ptr, corners, c, stride_logits_c)
                        samples = _relative(samples, shift)
                        pixels = ()
                        some = tl.zeros([BLOCK], tl.int32)
                        for quad in tl.static_range(QUADS):
                            same = _pixels_of(
                                planes, c, quad, min(4, ROWS - 4 * quad), COLUMNS, BITS
                            )
                            some |= same
                            pixels = pixels + (same,)
                        present = tl.max(tl.where(some != 0, 1, 0), 0) > 0
                        class_weight = 1.0
                        if HAS_WEIGHT:
                            class_weight = tl.load(weight_ptr + c).to(tl.float32)
                        m00 = tl.zeros([BLOCK], tl.float32)
                        m01 = tl.zeros([BLOCK], tl.float32)
                        m10 = tl.zeros([BLOCK], tl.float32)
                        m11 = tl.zeros([BLOCK], tl.float32)
                        hot_value = tl.zeros([COLUMNS, BLOCK], tl.float32)
                        hot_slope = tl.zeros([COLUMNS, BLOCK], tl.float32)
                        if present:
                            if PER_PIXEL:
                                for r in tl.static_range(ROWS):
                                    bit = pixels[r // 4][None, :] >> (8 * (r % 4) + k)
                                    hot = tl.where((bit & 1) != 0, hots[r], 0.0)
                                    hot_value += hot
                                    hot_slope += hot * r
                            else:
                                moments = _moments(pixels, ROWS, COLUMNS)
                                m00, m01, m10, m11 = _corner_sums(
                                    moments, group_wy, dy, group_wx, dx
                                )
                                if HAS_WEIGHT or HAS_SMOOTHING:
                                    m00 *= kept * class_weight
                                    m01 *= kept * class_weight
                                    m10 *= kept * class_weight
                                    m11 *= kept * class_weight
                        if HAS_SMOOTHING:
                            m00 += share * class_weight * s00
                            m01 += share * class_weight * s01
                            m10 += share * class_weight * s10
                            m11 += share * class_weight * s11
                        if not PER_PIXEL:
                            loss_2 -= m00 * samples[0] + m01 * samples[1]
                            loss_2 -= m10 * samples[2] + m11 * samples[3]
                        e, q = _exponentials(samples, weight_x, group_wy, dy)
                        value = factors[ROWS - 1]
                        slope = tl.zeros([COLUMNS, BLOCK], tl.float32)
                        for r in tl.static_range(1, ROWS):
                            slope = slope * q + value
                            value = value * q + factors[ROWS - 1 - r]
                        value *= e
                        slope *= e * q  # sum_r r (u A / s) e q^r
                        if PER_PIXEL:
                            value -= hot_value
                            slope -= hot_slope
                        whole = tl.sum(value, 0)
                        right = tl.sum(weight_x * value, 0)
                        if PER_PIXEL:
                            whole += poison
                            right += poison
                        lower = group_wy * whole + dy * tl.sum(slope, 0)
                        lower_right = group_wy * right + dy * tl.sum(weight_x * slope, 0)
                        upper_right = right - lower_right
                        lower_left = lower - lower_right
                        corner_sums = (
                            whole - lower - upper_right - m00,
                            upper_right - m01,
                            lower_left - m10,
                            lower_right - m11,
                        )
                        channel = tl.cast(c, tl.int64)
                        _add_to_cells(
                            corner_sums, upper_ptr + channel * stride_upper,
                            lower_ptr + channel * stride_grad_c, row_border_ptr + c,
                            row_border_ptr + C + c, mask_upper, mask_lower, mask_left,
                            (group > 0) | (band_row > 0), group > 0, BLOCK, SPLIT,
                        )  # fmt: skip
            loss += loss_2 * LN2

    if not PER_PIXEL:
        tl.store(loss_ptr + tile, tl.sum(loss, 0))
        tl.store(denominator_ptr + tile, tl.sum(denominator, 0))
    if not (PER_PIXEL and WITH_GRAD):  # the forward pass has counted them
        tl.store(bad_count_ptr + tile, tl.sum(bad_count, 0))
        tl.store(bad_index_ptr + tile, tl.min(bad_index, 0))
