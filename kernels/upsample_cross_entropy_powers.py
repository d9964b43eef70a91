"""The loss over cells by powers: a cell row whose classes vary within the guard.

Maths and notation: upsample_cross_entropy_cells.py. A lane's pixels are tuples of [BLOCK] values,
pixel (r, k) at k ROWS + r: no value has a dimension besides the lanes.

Numerics. The guard: the four samples of a class differ by less than 2^46 as exponentials.
1. Exponentials are 2^CENTRE e^(z - peak), CENTRE half of the guard. In a cell they are at most
   2^23, and the class of the peak is at least 2^-23 everywhere: so are the sums, and 1/s is at most
   2^23.
2. An E that underflows (below 2^-126) belongs to a class below 2^-149 of the peak at the first
   pixel, so below 2^-103 in the cell, where the sum is at least 2^-46: it loses 2^-57 of a sum.
3. Every product E P^k (Q T^k)^r along the way is the exponential of a pixel, or of one beyond the
   cell, where the lane has more rows or columns. It reaches less than twice as far as the cell in
   x, so that E P^k stays below 2^(23 + 46), and Q T^k below 2^69: pass 2 multiplies them with a
   factor of 0. In pass 1 the sum of such a pixel may become infinite or NaN, and is not read.
4. Horner's sums are at most 64 x 49 x 2^23 2^46, times weights and upstream gradient.
5. Rounding. Q T^k has k roundings and enters the r-th power, E P^k has k: with the powers at most
   63 half units in the last place, in the last of 8 x 8 pixels, and on average a quarter of that.
   Passes 1 and 2 take the same products in the same order up to that of the powers, so that most of
   what a class gains in s it gains in exp(z).
"""

# ruff: noqa: RUF005  (Triton has no (*a, b))
from __future__ import annotations

import triton
import triton.language as tl

from fcnseg.kernels.corner_sums import add_to_samples, corner_sums, load_samples
from fcnseg.kernels.label_planes import (
    buckets_of,
    count_bad_labels,
    label_planes,
    labelled_pixels,
    labels_of,
    load_label_words,
    moments_of,
    pixel_bit,
    pixels_of,
)
from fcnseg.kernels.reduction import LN2, LOG2E, TRACE

#: Exponentials are taken 2^CENTRE times too large: half of the guard's range (see Numerics).
CENTRE = tl.constexpr(23)


@triton.jit
def _exponents(samples, shift, weights):
    """z of eq. 1 in units of log 2, less shift: at the first pixel, and what it gains a column on,
    a row on, and both on."""
    wy, dy, wx, dx, dydx = weights
    a00 = samples[0] * LOG2E - shift
    a01 = samples[1] * LOG2E - shift
    a10 = samples[2] * LOG2E - shift
    a11 = samples[3] * LOG2E - shift
    across = a01 - a00
    down = a10 - a00
    twist = a11 - a10 - across
    first = a00 + wy * down
    across += wy * twist
    return first + wx * across, dx * across, dy * (down + wx * twist), dydx * twist


@triton.jit
def _take_exponent(x):
    """x = m 2^e with m in [1, 2), for positive normal x: m and e + 127."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True), bits >> 23


@triton.jit
def _sum_exponentials(
    logits_ptr, corners, stride_c, weight_ptr, C, shift, weights,
    HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pass 1 (eq. 2): the pixels' sums over the classes, 2^CENTRE times too large; with SMOOTH the
    exponents times class weights, summed over the classes."""
    sums = ()
    for _pixel in tl.static_range(ROWS * COLUMNS):
        sums = sums + (tl.zeros_like(shift),)
    z0 = tl.zeros_like(shift)
    z1 = tl.zeros_like(shift)
    z2 = tl.zeros_like(shift)
    z3 = tl.zeros_like(shift)
    for c in range(C):
        samples = load_samples(logits_ptr, corners, c, stride_c)
        first, across, down, twist = _exponents(samples, shift, weights)
        e = tl.exp2(first + CENTRE)
        p = tl.exp2(across)
        q = tl.exp2(down)
        t = tl.exp2(twist)
        larger = ()
        for k in tl.static_range(COLUMNS):
            power = e
            square = q * q
            for r in tl.static_range(ROWS):
                if r % 2 == 0:
                    larger = larger + (sums[k * ROWS + r] + power,)
                else:
                    larger = larger + (sums[k * ROWS + r] + power * q,)
                    power = power * square
            e = e * p
            q = q * t
        sums = larger
        if SMOOTH:
            class_weight = 1.0
            if HAS_WEIGHT:
                class_weight = tl.load(weight_ptr + c).to(tl.float32)
            z0 += class_weight * first
            z1 += class_weight * across
            z2 += class_weight * down
            z3 += class_weight * twist
    return sums, (z0, z1, z2, z3)


@triton.jit
def _log_and_inverse_sums(sums, labelled, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of equal weights: the sum of the logarithms of the labelled pixels' sums, by one logarithm of
    their product, whose exponents are added apart so that it stays in range; and the inverses.

    Other pixels' sums become infinite: of mantissa 1, exponent 128 and inverse 0.
    """
    product = tl.full(labelled[0].shape, 1.0, tl.float32)
    exponent = tl.zeros_like(labelled[0])
    inverses = ()
    for k in tl.static_range(COLUMNS):
        column = tl.full(labelled[0].shape, 1.0, tl.float32)
        for r in tl.static_range(ROWS):
            valid = (labelled[r // 4] & pixel_bit(r, k)) != 0
            total = tl.where(valid, sums[k * ROWS + r], float("inf"))
            mantissa, power = _take_exponent(total)
            column *= mantissa
            exponent += power
            inverse = tl.rsqrt(total)
            inverses = inverses + (inverse * inverse,)
        product *= column
    count, by_row, by_column, by_both = moments_of(labelled, ROWS, COLUMNS)
    whole = (exponent - 255 * ROWS * COLUMNS).to(tl.float32) + (128 - CENTRE) * count  # exact
    return tl.log2(product) + whole, inverses, (count, by_row, by_column, by_both)


@triton.jit
def _interpolate(samples, weight_x, weight_y):
    """z of eq. 1 from four samples: the eager expression."""
    a00, a01, a10, a11 = samples
    upper = (1.0 - weight_x) * a00 + weight_x * a01
    lower = (1.0 - weight_x) * a10 + weight_x * a11
    return (1.0 - weight_y) * upper + weight_y * lower


@triton.jit
def _load_labelled(
    logits_ptr, corners, label, valid, stride_c, shift, weight_x, weight_y
):  # fmt: skip
    """z of each pixel's own class, in units of log 2, less shift."""
    ptr = logits_ptr + tl.where(valid, label, 0).to(tl.int64) * stride_c
    a00 = tl.load(ptr + corners[0], mask=valid, other=0.0).to(tl.float32) * LOG2E - shift
    a01 = tl.load(ptr + corners[1], mask=valid, other=0.0).to(tl.float32) * LOG2E - shift
    a10 = tl.load(ptr + corners[2], mask=valid, other=0.0).to(tl.float32) * LOG2E - shift
    a11 = tl.load(ptr + corners[3], mask=valid, other=0.0).to(tl.float32) * LOG2E - shift
    return _interpolate((a00, a01, a10, a11), weight_x, weight_y)


@triton.jit
def _factors(
    sums, labels, labelled, weight_ptr, weight_sum, kept, share, upstream_ptr, upstream,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, PER_PIXEL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a gradient with weights or an upstream gradient a pixel: u A / s of eq. 5 of every pixel,
    its (1-e) w_y u, the moments of u (smoothing), and the sums of A log s and of w_y."""
    offs, stride_h, stride_w = upstream
    factors = ()
    hots = ()
    zero = tl.zeros(labelled[0].shape, tl.float32)
    log_sum = zero
    weight = zero
    count = zero
    by_row = zero
    by_column = zero
    by_both = zero
    for k in tl.static_range(COLUMNS):
        column = zero
        column_by_row = zero
        for r in tl.static_range(ROWS):
            valid = (labelled[r // 4] & pixel_bit(r, k)) != 0
            own = tl.where(valid, 1.0, 0.0)
            u = own
            if HAS_WEIGHT:
                label = labels[k * ROWS + r]
                own = tl.load(weight_ptr + label, mask=valid, other=0.0).to(tl.float32)
            factor = own
            if HAS_SMOOTHING:
                factor = kept * own + tl.where(valid, share * weight_sum, 0.0)
            total = tl.where(valid, sums[k * ROWS + r], 1.0)
            if PER_PIXEL:
                step = tl.cast(r, tl.int64) * stride_h + tl.cast(k, tl.int64) * stride_w
                u = tl.load(upstream_ptr + offs + step, mask=valid, other=0.0).to(tl.float32)
                hots = hots + (kept * own * u,)
                factor *= u
                column += u
                column_by_row += u * r
            else:
                log_sum += factor * (tl.log2(total) - CENTRE)
                weight += own
            inverse = tl.rsqrt(total)
            factors = factors + (factor * (inverse * inverse),)
        count += column
        by_row += column_by_row
        by_column += column * k
        by_both += column_by_row * k
    if not PER_PIXEL:
        count, by_row, by_column, by_both = moments_of(labelled, ROWS, COLUMNS)
    return factors, hots, (count, by_row, by_column, by_both), log_sum, weight


@triton.jit
def _pixel_losses(
    sums, exponents, labels, labelled, logits_ptr, corners, stride_c, shift, weights,
    weight_ptr, weight_sum, kept, share, rows, columns, pixel_loss_ptr, pixel_loss,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, PER_PIXEL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Without a gradient: stores the loss of each pixel (PER_PIXEL), or returns their sum in units
    of log 2 and that of w_y."""
    offs, stride_h, stride_w = pixel_loss
    wy, dy, wx, dx, _ = weights
    loss = tl.zeros_like(shift)
    weight = tl.zeros_like(shift)
    for k in tl.static_range(COLUMNS):
        for r in tl.static_range(ROWS):
            valid = (labelled[r // 4] & pixel_bit(r, k)) != 0
            label = labels[k * ROWS + r]
            own = tl.where(valid, 1.0, 0.0)
            if HAS_WEIGHT:
                own = tl.load(weight_ptr + label, mask=valid, other=0.0).to(tl.float32)
            z = _load_labelled(
                logits_ptr, corners, label, valid, stride_c, shift, wx + k * dx, wy + r * dy
            )
            log_total = tl.log2(tl.where(valid, sums[k * ROWS + r], 1.0)) - CENTRE
            if HAS_SMOOTHING:
                factor = kept * own + tl.where(valid, share * weight_sum, 0.0)
                z0, z1, z2, z3 = exponents
                smooth = (z0 + r * z2) + k * (z1 + r * z3)
                here = factor * log_total - kept * own * z - tl.where(valid, share * smooth, 0.0)
            else:
                here = own * (log_total - z)
            if PER_PIXEL:
                step = tl.cast(r, tl.int64) * stride_h + tl.cast(k, tl.int64) * stride_w
                inside = (r < rows) & (k < columns)
                here = tl.where(valid, here * LN2, 0.0)
                tl.store(pixel_loss_ptr + offs + step, here, mask=inside)
            else:
                loss += here
                weight += own
    return loss, weight


@triton.jit
def _moments_of_values(pixels, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Moments of ``pixels`` that count as much as ``values`` says."""
    count = tl.zeros(pixels[0].shape, tl.float32)
    by_row = count
    by_column = count
    by_both = count
    for k in tl.static_range(COLUMNS):
        column = tl.zeros_like(count)
        column_by_row = tl.zeros_like(count)
        for r in tl.static_range(ROWS):
            hot = tl.where((pixels[r // 4] & pixel_bit(r, k)) != 0, values[k * ROWS + r], 0.0)
            column += hot
            column_by_row += hot * r
        count += column
        by_row += column_by_row
        by_column += column * k
        by_both += column_by_row * k
    return count, by_row, by_column, by_both


@triton.jit
def _softmax_moments(factors, e, p, q, t, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Moments of u A / s exp(z) over a lane's pixels (eq. 5)."""
    count = tl.zeros_like(e)
    by_row = tl.zeros_like(e)
    counts = tl.zeros_like(e)  # sums of the sums so far: column k counts COLUMNS - k times
    by_rows = tl.zeros_like(e)
    for k in tl.static_range(COLUMNS):
        value = factors[k * ROWS + ROWS - 1]
        slope = tl.zeros_like(e)
        for r in tl.static_range(1, ROWS):
            slope = value if r == 1 else slope * q + value
            value = value * q + factors[k * ROWS + ROWS - 1 - r]
        count += e * value
        counts += count
        if ROWS > 1:
            by_row += e * (q * slope)  # e q may be infinite where slope is 0
            by_rows += by_row
        e = e * p
        q = q * t
    return count, by_row, count * COLUMNS - counts, by_row * COLUMNS - by_rows


@triton.jit
def _gradient(
    logits_ptr, corners, stride_c, weight_ptr, C, shift, weights, planes, buckets, factors, hots,
    smooth, kept, share, poison, place, add_upper, add_lower,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, PER_PIXEL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Pass 2 (eqs. 3 to 6): writes the sums at the samples; returns the sum of b z of eq. 3."""
    wy, dy, wx, dx, _ = weights
    BLOCK: tl.constexpr = shift.shape[0]
    SHIFT: tl.constexpr = max(BITS - 5, 0)
    loss = tl.zeros_like(shift)
    for c in range(C):
        samples = load_samples(logits_ptr, corners, c, stride_c)
        first, across, down, twist = _exponents(samples, shift, weights)
        e = tl.exp2(first + CENTRE)
        p = tl.exp2(across)
        q = tl.exp2(down)
        t = tl.exp2(twist)
        count, by_row, by_column, by_both = _softmax_moments(factors, e, p, q, t, ROWS, COLUMNS)
        if PER_PIXEL:
            count += poison
        class_weight = 1.0
        if HAS_WEIGHT:
            class_weight = tl.load(weight_ptr + c).to(tl.float32)
        if HAS_SMOOTHING:
            scale = share * class_weight
            n, r, k, rk = smooth
            count -= scale * n
            by_row -= scale * r
            by_column -= scale * k
            by_both -= scale * rk
            if not PER_PIXEL:
                loss += scale * (n * first + k * across + r * down + rk * twist)
        if (buckets >> (c >> SHIFT)) & 1 != 0:
            pixels = pixels_of(planes, c, ROWS, COLUMNS, BITS)
            if PER_PIXEL:
                n, r, k, rk = _moments_of_values(pixels, hots, ROWS, COLUMNS)
            else:
                n, r, k, rk = moments_of(pixels, ROWS, COLUMNS)
                if HAS_WEIGHT or HAS_SMOOTHING:
                    scale = kept * class_weight
                    n *= scale
                    r *= scale
                    k *= scale
                    rk *= scale
                loss += n * first + k * across + r * down + rk * twist
            count -= n
            by_row -= r
            by_column -= k
            by_both -= rk
        sums = corner_sums((count, by_row, by_column, by_both), wy, dy, wx, dx)
        add_to_samples(sums, place, c, C, add_upper, add_lower, BLOCK, SPLIT)
    return loss


@triton.jit
def row_by_powers(
    logits_ptr, target_ptr, weight_ptr, upstream_ptr, pixel_loss_ptr, bad_count_ptr, bad_index_ptr,
    corners, cell, strip, weights, peak, weight_sum, place, added, most_rows, column_groups,
    stride_c, target, upstream, pixel_loss, H, W, C, ignore_index, kept, share, loss, denominator,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, WITH_GRAD: tl.constexpr,
    PER_PIXEL: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, ONE_GROUP: tl.constexpr,
):  # fmt: skip
    """A cell row, its lanes' pixels ROWS x COLUMNS at a time.

    ``cell``: image, first row and column, rows and columns of each lane's cell. ``weights``: weight
    and slope of the lower sample, of the right one. ``target``, ``upstream``, ``pixel_loss``:
    strides. ``added``: whether the row before has stored upper sums. ``loss`` and ``denominator``
    are returned with this row's.
    """
    n, y0, x0, rows, columns = cell
    wy, dy, wx, dx = weights
    shift = peak * LOG2E
    row_groups = (most_rows + ROWS - 1) // ROWS
    for group in range(1 if ONE_GROUP else row_groups * column_groups):
        tl.debug_barrier()  # between the stores of a sample and the loads that add to it
        first_row = 0 if ONE_GROUP else group % row_groups * ROWS
        first_column = ((0 if ONE_GROUP else group // row_groups * SPLIT) + strip) * COLUMNS
        y = (y0 + first_row).to(tl.int64)
        x = (x0 + first_column).to(tl.int64)
        left_rows = rows - first_row
        left_columns = columns - first_column
        group_weights = (wy + first_row * dy, dy, wx + first_column * dx, dx, dy * dx)
        offs = n * target[0] + y * target[1] + x * target[2]
        loss_offs = n * pixel_loss[0] + y * pixel_loss[1] + x * pixel_loss[2]
        words, some_bad = load_label_words(
            target_ptr, offs, target[1], target[2], left_rows, left_columns, C, ignore_index,
            ROWS, COLUMNS, BITS,
        )  # fmt: skip
        planes = label_planes(words, C, ignore_index, ROWS, COLUMNS, BITS)
        labelled = labelled_pixels(planes, ROWS, COLUMNS, BITS)
        labels = labels_of(words, ROWS, COLUMNS, BITS)
        buckets = buckets_of(labels, max(BITS - 5, 0))
        poison = tl.where(some_bad != 0, float("nan"), 0.0)
        if WITH_GRAD and not PER_PIXEL:
            count_bad_labels(
                target_ptr, offs, target[1], target[2], (n * H + y) * W + x, W,
                left_rows, left_columns, C, ignore_index, some_bad, bad_count_ptr, bad_index_ptr,
                pixel_loss_ptr, loss_offs, pixel_loss[1], pixel_loss[2], False, ROWS, COLUMNS,
            )  # fmt: skip
        totals, exponents = _sum_exponentials(
            logits_ptr, corners, stride_c, weight_ptr, C, shift, group_weights, HAS_WEIGHT,
            HAS_SMOOTHING and not WITH_GRAD, ROWS, COLUMNS,
        )  # fmt: skip
        if WITH_GRAD:
            hots = ()
            if PER_PIXEL or HAS_WEIGHT:
                upstream_offs = n * upstream[0] + y * upstream[1] + x * upstream[2]
                factors, hots, smooth, log_sum, weight = _factors(
                    totals, labels, labelled, weight_ptr, weight_sum, kept, share, upstream_ptr,
                    (upstream_offs, upstream[1], upstream[2]), HAS_WEIGHT, HAS_SMOOTHING, PER_PIXEL,
                    ROWS, COLUMNS,
                )  # fmt: skip
                if HAS_WEIGHT:  # some label: see counted_weight
                    weight += tl.where(smooth[0] > 0, TRACE, 0.0)
            else:
                log_sum, factors, smooth = _log_and_inverse_sums(totals, labelled, ROWS, COLUMNS)
                weight = smooth[0]
                if HAS_SMOOTHING:
                    all_weight = kept + share * C
                    log_sum *= all_weight
                    scaled = ()
                    for pixel in tl.static_range(ROWS * COLUMNS):
                        scaled = scaled + (factors[pixel] * all_weight,)
                    factors = scaled
            product = _gradient(
                logits_ptr, corners, stride_c, weight_ptr, C, shift, group_weights, planes,
                buckets, factors, hots, smooth, kept, share, poison, place,
                (group > 0) | added, group > 0, HAS_WEIGHT, HAS_SMOOTHING, PER_PIXEL, ROWS, COLUMNS,
                SPLIT, BITS,
            )  # fmt: skip
            if not PER_PIXEL:
                loss += (log_sum - product) * LN2
                denominator += weight
        else:
            pixel_losses, weight = _pixel_losses(
                totals, exponents, labels, labelled, logits_ptr, corners, stride_c, shift,
                group_weights, weight_ptr, weight_sum, kept, share, left_rows, left_columns,
                pixel_loss_ptr, (loss_offs, pixel_loss[1], pixel_loss[2]), HAS_WEIGHT,
                HAS_SMOOTHING, PER_PIXEL, ROWS, COLUMNS,
            )  # fmt: skip
            count_bad_labels(
                target_ptr, offs, target[1], target[2], (n * H + y) * W + x, W,
                left_rows, left_columns, C, ignore_index, some_bad, bad_count_ptr, bad_index_ptr,
                pixel_loss_ptr, loss_offs, pixel_loss[1], pixel_loss[2], PER_PIXEL, ROWS, COLUMNS,
            )  # fmt: skip
            if not PER_PIXEL:
                loss += pixel_losses * LN2
                if HAS_WEIGHT:
                    some = labelled[0]
                    for quad in tl.static_range(1, (ROWS + 3) // 4):
                        some |= labelled[quad]
                    weight += tl.where(some != 0, TRACE, 0.0)
                denominator += weight
    return loss, denominator
