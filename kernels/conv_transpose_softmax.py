"""Softmax over blocks of classes, slopes of the logits, pixels and labels of a walk's items.

Maths and numerics: conv_transpose_cross_entropy.py, eqs. 1 and 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fcnseg.kernels.common import load_labels
from fcnseg.kernels.conv_transpose_logits import (
    per_cell,
    per_class,
)
from fcnseg.kernels.reduction import LOG2E


@triton.jit
def no_classes(BLOCK: tl.constexpr):
    """Softmax state of no class: largest z, sum of exponentials, z of the label, sum over classes
    of w (largest - z), sum of w."""
    zero = tl.zeros([BLOCK], tl.float32)
    return tl.full([BLOCK], float("-inf"), tl.float32), zero, zero, zero, zero


@triton.jit
def add_classes(
    state, z, label, classes, C, class_weight_ptr, HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """The softmax state with a block of classes more (eq. 4)."""
    AXIS: tl.constexpr = 1 if MODE == "dot" else 0
    peak, total, z_label, spread, weight_sum = state
    before = finite_shift(peak)
    peak = tl.maximum(peak, tl.max(z, AXIS))
    shift = finite_shift(peak)
    # before any finite z the sum is 0, and 0 * exp(before - shift) may be 0 * inf
    total = tl.where(total == 0.0, 0.0, total * tl.exp2((before - shift) * LOG2E))
    total += tl.sum(tl.exp2((z - per_cell(shift, MODE)) * LOG2E), AXIS)
    own = per_class(classes, MODE) == per_cell(label, MODE)
    z_label += tl.sum(tl.where(own, z, 0.0), AXIS)
    if HAS_SMOOTHING:
        w = _class_weights(class_weight_ptr, classes, C, HAS_WEIGHT)
        spread += weight_sum * (shift - before)
        far = per_class(w, MODE) * (per_cell(shift, MODE) - z)
        spread += tl.sum(tl.where(per_class(classes < C, MODE), far, 0.0), AXIS)
        weight_sum += tl.sum(w, 0)
    return peak, total, z_label, spread, weight_sum


@triton.jit
def finite_shift(peak):
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _class_weights(class_weight_ptr, classes, C, HAS_WEIGHT: tl.constexpr):
    mask = classes < C
    if HAS_WEIGHT:
        return tl.load(class_weight_ptr + classes, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.where(mask, 1.0, 0.0)


@triton.jit
def _own_weight(class_weight_ptr, label, HAS_WEIGHT: tl.constexpr):
    """w_y, 0 where there is no valid label."""
    valid = label >= 0
    if HAS_WEIGHT:
        return tl.load(class_weight_ptr + label, mask=valid, other=0.0).to(tl.float32)
    else:
        return tl.where(valid, 1.0, 0.0)


@triton.jit
def slopes(
    z, state, label, own, upstream, here, classes, C, class_weight_ptr, smoothing,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_UPSTREAM: tl.constexpr,
    ONE_CLASS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """dz (eq. 4), 0 outside the target. An ignored pixel's NaN counts, as in the eager gradient."""
    peak, total, _z_label, _spread, weight_sum = state
    if ONE_CLASS:
        dz = tl.where(per_class(classes < C, MODE), z - z, 0.0)  # zero, or NaN with z
    else:
        shift = finite_shift(peak)
        kept = (1.0 - smoothing) * own
        factor = own
        hot = tl.where(per_class(classes, MODE) == per_cell(label, MODE), per_cell(kept, MODE), 0.0)
        if HAS_SMOOTHING:
            share = tl.where(label >= 0, smoothing / C, 0.0)
            factor = kept + share * weight_sum
            w = _class_weights(class_weight_ptr, classes, C, HAS_WEIGHT)
            hot += per_cell(share, MODE) * per_class(w, MODE)
        p = tl.exp2((z - per_cell(shift, MODE)) * LOG2E) * per_cell(1.0 / total, MODE)
        dz = per_cell(factor, MODE) * p - hot
    if HAS_UPSTREAM:
        dz *= per_cell(upstream, MODE)
    return tl.where(per_cell(here, MODE), dz, 0.0)


@triton.jit
def load_targets(
    target_ptr, class_weight_ptr, upstream_ptr, n, y, x, here, C, ignore_index,
    target_strides, upstream_strides, HAS_WEIGHT: tl.constexpr, HAS_UPSTREAM: tl.constexpr,
):  # fmt: skip
    """Label, where it is bad, w_y and upstream gradient (w_y again if there is none)."""
    offs = n * target_strides[0] + y * target_strides[1] + x * target_strides[2]
    label, bad = load_labels(target_ptr, offs, here, C, ignore_index)
    own = _own_weight(class_weight_ptr, label, HAS_WEIGHT)
    upstream = own
    if HAS_UPSTREAM:
        offs = n * upstream_strides[0] + y * upstream_strides[1] + x * upstream_strides[2]
        upstream = tl.load(upstream_ptr + offs, mask=here, other=0.0).to(tl.float32)
        upstream = tl.where(bad, float("nan"), tl.where(label >= 0, upstream, 0.0))
    return label, bad, own, upstream


@triton.jit
def for_tensor_cores(dz, PRECISION: tl.constexpr):
    """dz to the nearest TF32 number; the tensor core alone would cut it off."""
    if PRECISION == "tf32":
        bits = (dz.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(dz == dz, bits.to(tl.float32, bitcast=True), dz)
    else:
        return dz


@triton.jit
def item_pixels(item, item_columns, i, j, axis_y, axis_x, SAMPLES: tl.constexpr):
    """Cells, phase and pixels of one item of a walk. Positions i, j are cells and an item a phase,
    or with SAMPLES samples and an item a tap. Also the item's row and column."""
    item_y = item // item_columns
    item_x = item - item_y * item_columns
    if SAMPLES:
        reach_y = axis_y[6] * item_y
        reach_x = axis_x[6] * item_x
        cell_y = i + reach_y // axis_y[0]
        cell_x = j + reach_x // axis_x[0]
        phase_y = reach_y % axis_y[0]
        phase_x = reach_x % axis_x[0]
    else:
        cell_y = i
        cell_x = j
        phase_y = item_y
        phase_x = item_x
    y = cell_y * axis_y[0] + phase_y - axis_y[7]  # eq. 1
    x = cell_x * axis_x[0] + phase_x - axis_x[7]
    here = (y >= 0) & (y < axis_y[9]) & (x >= 0) & (x < axis_x[9])
    return item_y, item_x, cell_y, cell_x, phase_y, phase_x, y.to(tl.int64), x.to(tl.int64), here
