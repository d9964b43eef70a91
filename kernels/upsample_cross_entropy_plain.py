"""The loss over cells pixel by pixel: a cell row beyond the guard, or of one class.

Maths and notation: upsample_cross_entropy_cells.py. The expressions are the eager ones, one
exponential a pixel and class, so that NaN comes out where it does there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fcnseg.kernels.common import (
    NO_INDEX,
    count_bad,
    load_corners,
    load_labels,
    load_pixels,
    store_pixels,
)
from fcnseg.kernels.corner_sums import add_to_samples
from fcnseg.kernels.label_planes import add_bad_labels
from fcnseg.kernels.reduction import LN2, LOG2E, counted_weight


@triton.jit
def _load_interpolated(logits_ptr, corners, c, stride_c, weight_x, weight_y):
    """z of eq. 1, [COLUMNS, BLOCK]: the eager expression."""
    a00, a01, a10, a11 = load_corners(logits_ptr, corners, c, stride_c)
    upper = (1.0 - weight_x) * a00[None, :] + weight_x * a01[None, :]
    lower = (1.0 - weight_x) * a10[None, :] + weight_x * a11[None, :]
    return (1.0 - weight_y) * upper + weight_y * lower


@triton.jit
def row_pixel_by_pixel(
    logits_ptr, target_ptr, weight_ptr, upstream_ptr, pixel_loss_ptr, bad_count_ptr, bad_index_ptr,
    corners, cell, at_end, strip, weights, weight_sum, place, added, most_rows, column_groups,
    stride_c, target, upstreams, pixel_losses, h, w, H, W, step_h, step_w, half,
    C, ignore_index, kept, share, loss, denominator,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, ONE_CLASS: tl.constexpr,
    WITH_GRAD: tl.constexpr, PER_PIXEL: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A cell row, COLUMNS pixels of a row at a time. Arguments as ``row_by_powers`` has them;
    ``at_end``: whether a cell lies below the last sample, or right of it."""
    n, y0, x0, rows, columns = cell
    wy, dy, wx, dx = weights
    BLOCK: tl.constexpr = strip.shape[0]
    bad_count = tl.zeros([BLOCK], tl.int32)
    bad_index = tl.full([BLOCK], NO_INDEX, tl.int64)
    k = tl.arange(0, COLUMNS)[:, None]  # [COLUMNS, 1]
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
        offs = (n * target[0] + y * target[1])[None, :] + x * target[2]
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
        weight_y = tl.where(at_end[0][None, :], at_end_y[None, :], grad_y)
        weight_x = tl.where(at_end[1][None, :], at_end_x, grad_x)

        highest = tl.full([COLUMNS, BLOCK], float("-inf"), tl.float32)
        for c in range(C):
            z = _load_interpolated(logits_ptr, corners, c, stride_c, weight_x, weight_y)
            highest = tl.maximum(highest, z)
        exponentials = tl.zeros([COLUMNS, BLOCK], tl.float32)
        z_label = tl.zeros([COLUMNS, BLOCK], tl.float32)
        z_smooth = tl.zeros([COLUMNS, BLOCK], tl.float32)
        for c in range(C):
            z = _load_interpolated(logits_ptr, corners, c, stride_c, weight_x, weight_y)
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
                offs = (n * upstreams[0] + y * upstreams[1])[None, :]
                offs += x * upstreams[2]
                upstream = load_pixels(upstream_ptr, offs, here, 0.0)
                upstream = tl.where(valid, upstream.to(tl.float32), 0.0)
                upstream = tl.where(bad, float("nan"), upstream)
            else:
                pixel_loss = tl.where(bad, float("nan"), pixel_loss)
                offs = (n * pixel_losses[0] + y * pixel_losses[1])[None, :] + x * pixel_losses[2]
                store_pixels(pixel_loss_ptr, offs, pixel_loss, here)
        else:
            loss += tl.sum(pixel_loss, 0)
            denominator += tl.sum(counted_weight(own, valid, HAS_WEIGHT), 0)

        if WITH_GRAD:
            for c in range(C):
                z = _load_interpolated(logits_ptr, corners, c, stride_c, weight_x, weight_y)
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
                corner_sums = (
                    tl.sum(slope, 0) - lower - upper_right,
                    upper_right,
                    lower_left,
                    lower_right,
                )
                add_to_samples(
                    corner_sums, place, c, C, (group > 0) | added, group > 0, BLOCK, SPLIT
                )
    # the backward pass does not count again
    if not (PER_PIXEL and WITH_GRAD) and tl.max(bad_count, 0) > 0:
        add_bad_labels(bad_count_ptr, bad_index_ptr, bad_count, bad_index)
    return loss, denominator
