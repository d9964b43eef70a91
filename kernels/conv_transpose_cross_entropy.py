"""Transposed convolution + softmax cross entropy over phases, with the gradients of its operands.

Maths. One axis; both are alike. s stride, d dilation, g = gcd(s, d), k taps.
1. Output row y takes sample i through tap u where y + shift = i s + d u, shift = padding + crop.
   Cell b and phase r of row y: y + shift = b s + r, 0 <= r < s. A cell is what a stride covers.
2. Taps of phase r: d u = r (mod s): none unless g divides r, else u_t = u_0 + t s/g with
   u_0 = (r/g) (d/g)^-1 mod s/g, and their samples are b - floor(d u_0 / s) - t d/g. All cells share
   the taps of a phase. Where d = 1 and k = m s: taps r + t s, samples b - t, t < m.
3. z_c = bias_c + sum_tap sum_ci x_ci(sample) W_ci,c(tap); for one phase and tap a matrix product
   [cells, C_in] x [C_in, C], or with one channel a class (groups = C) a product of elements
4. lse = log sum_c exp(z_c); l = A lse - sum_c b_c z_c, b_c = (1-e) w_y [c = y] + (e/C) w_c,
   A = sum_c b_c; dz_c = A exp(z_c - lse) - b_c
5. dX_ci(sample) = sum_phase sum_tap sum_c dz_c W_ci,c(tap)
6. dW_ci,c(tap) = sum_cells x_ci(sample) dz_c; dbias_c = sum_pixels dz_c

Shapes. input [N, C_in, h, w] fp16/bf16/fp32, any strides; weight repacked as [kh, kw, K, C],
K = C_in / groups (a copy of its own size); target [N, H, W]; gradients float32.

Who owns what. The first kernel's program owns a block of cells and walks over the phases; z, the
softmax and dz live in registers. Where k is s or 2 s it also keeps the sums of eq. 5 of the cells'
1, 2 or 4 samples in registers and writes them to planes of the cells' size, one a sample, which
`_gather_input_kernel` shifts and adds. For every other geometry it runs once for the loss and once
more over blocks of samples: there it walks over all taps and makes dz anew for each (SAMPLES). The
second kernel's program owns one phase (or one tap), a block of channels by classes and a split of
the cells, makes dz again and sums eq. 6 in registers; splits are added in order by
`_gather_weight_kernel`. One kernel cannot do both: a cell's sums need all phases of few cells, a
tap's sums all cells of few phases. The scalar reduction and the bad-label record are a launch of
their own: the factor 1/denominator is known only after the loss. No atomics; nothing of the
target's size is written but what reduction="none" returns. More than one block of classes: the
softmax is a first walk over them, dz a second.

Modes. "dot": groups = 1 on the tensor cores, cells by classes; products of half operands are exact,
sums float32. dz is rounded to nearest in TF32 (11 bits, as eager's half dz, but with the range of
float32) and multiplied in TF32, which holds half weights exactly; float32 operands take three TF32
products. "full", "groups", "classes": classes by cells on the ordinary cores in float32, for groups
= 1 before sm_80, any groups, groups = C.

Numerics. Exponentials in base 2 relative to the pixel's largest z. Sums in float32 per program,
then in order. NaN comes out where it does in eager: a tap without sample adds nothing, as 0 times
an infinite weight is NaN; cells that the crop leaves out take part in the gradients, times 0.
Offsets are int64.

Source: Long, Shelhamer and Darrell, "Fully convolutional networks", 2015, for the operator; Shi et
al., "Is the deconvolution layer the same as a convolutional layer?", 2016, for the phases;
torch.nn.functional.conv_transpose2d and cross_entropy for the expression.
"""

# ruff: noqa: RUF005  (Triton has no (*a, b))
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcnseg.kernels import common
from fcnseg.kernels.common import add_to_record, load_labels, split_cells
from fcnseg.kernels.launch import launch, on_device
from fcnseg.kernels.reduction import counted_weight, reduction_scale
from fcnseg.kernels.upsample_cross_entropy_cells import LN2, LOG2E

# --- device ---------------------------------------------------------------------------------------


@triton.jit
def axis_taps(phase, axis):
    """First tap of a phase, how far its sample lies before the cell, number of taps (eq. 2)."""
    stride, kernel, step, _hop, gcd, inverse, dilation, _shift, _samples, _pixels = axis
    first = phase // gcd * inverse % step
    some = (phase % gcd == 0) & (first < kernel)
    return first, dilation * first // stride, tl.where(some, (kernel - first + step - 1) // step, 0)


@triton.jit
def make_operands(
    input_ptr, weight_ptr, bias_ptr, C, K, per_group, num_channels, h, w,
    stride_n, stride_c, stride_h, stride_w,
    MODE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """source and weight, as the functions below take them. In mode "dot" `pack_operands` has laid
    them out: sizes that are whole blocks let the compiler see that loads are aligned, as a new
    allocation is."""
    if MODE == "dot":
        stored_rows = tl.cdiv(K, BLOCK_K) * BLOCK_K
        stored_columns = tl.cdiv(C, BLOCK_C) * BLOCK_C
        row = tl.cast(w, tl.int64) * stored_rows
        source = (input_ptr, num_channels, h * row, 1, row, stored_rows)
        return source, (weight_ptr, bias_ptr, C, K, per_group, stored_rows, stored_columns)
    else:
        source = (input_ptr, num_channels, stride_n, stride_c, stride_h, stride_w)
        if MODE == "classes":
            return source, (weight_ptr, bias_ptr, C, 1, 1, 1, C)
        else:
            return source, (weight_ptr, bias_ptr, C, K, per_group, K, C)


@triton.jit
def per_class(x, MODE: tl.constexpr):
    """A vector over classes (or channels) as a tile: [1, C] in mode "dot", else [C, 1]."""
    return x[None, :] if MODE == "dot" else x[:, None]


@triton.jit
def per_cell(x, MODE: tl.constexpr):
    return x[:, None] if MODE == "dot" else x[None, :]


@triton.jit
def load_samples(source, offs, inside, channels, MODE: tl.constexpr, OPERAND: tl.constexpr):
    """Tile of the input at offs [BLOCK], 0 outside, for the vector of channels."""
    input_ptr, num_channels, _stride_n, stride_c, _stride_h, _stride_w = source
    if MODE == "dot":  # channels are neighbours and padded with zeros
        start = tl.multiple_of(input_ptr + offs, 16)
        pointers = start[:, None] + channels[None, :]
        return tl.load(pointers, mask=inside[:, None], other=0.0).to(OPERAND)
    else:
        offs = offs[None, :] + (channels.to(tl.int64) * stride_c)[:, None]
        mask = inside[None, :] & (channels < num_channels)[:, None]
        return tl.load(input_ptr + offs, mask=mask, other=0.0).to(OPERAND)


@triton.jit
def sample_offsets(source, n, row, column, axis_y, axis_x):
    _input_ptr, _num_channels, stride_n, _stride_c, stride_h, stride_w = source
    inside = (row >= 0) & (row < axis_y[8]) & (column >= 0) & (column < axis_x[8])
    offs = n * stride_n + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    return offs, inside


@triton.jit
def load_weight_tile(tap, weight, channels, classes, OPERAND: tl.constexpr):
    """W of the tap at this pointer; one of channels, classes is a row, the other a column. Padded
    with zeros: no mask."""
    return tl.load(tap + channels * weight[6] + classes).to(OPERAND)


@triton.jit
def load_weight_row(tap, weight, channel, classes):
    """W[channel, classes] of the tap at this pointer, 0 past the last class."""
    offs = tl.cast(channel, tl.int64) * weight[6] + classes
    return tl.load(tap + offs, mask=classes < weight[2], other=0.0).to(tl.float32)


@triton.jit
def held_samples(
    source, n, cell_y, cell_x, axis_y, axis_x,
    MODE: tl.constexpr, OPERAND: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The samples of a cell's TAPS_Y x TAPS_X taps, all channels: one tile each; and which lie in
    the input."""
    xs = ()
    masks = ()
    for a in tl.static_range(TAPS_Y * TAPS_X):
        offs, inside = sample_offsets(
            source, n, cell_y - a // TAPS_X, cell_x - a % TAPS_X, axis_y, axis_x
        )
        channels = tl.arange(0, BLOCK_K)
        xs = xs + (load_samples(source, offs, inside, channels, MODE, OPERAND),)
        masks = masks + (inside,)
    return xs, masks


@triton.jit
def tap_pointer(weight, tap_y, tap_x, axis_x, MODE: tl.constexpr):
    weight_ptr, _bias_ptr, _C, _K, _per_group, stored_rows, stored_columns = weight
    tap = weight_ptr + (tap_y * axis_x[1] + tap_x).to(tl.int64) * stored_rows * stored_columns
    return tl.multiple_of(tap, 16) if MODE == "dot" else tap


@triton.jit
def held_weights(
    weight, phase_y, phase_x, axis_y, axis_x,
    MODE: tl.constexpr, OPERAND: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """W of a phase's taps: tiles [BLOCK_K, BLOCK_C], vectors [BLOCK_C] in mode "classes"."""
    classes = tl.arange(0, BLOCK_C)
    ws = ()
    for a in tl.static_range(TAPS_Y * TAPS_X):
        tap_y = phase_y + a // TAPS_X * axis_y[0]
        tap_x = phase_x + a % TAPS_X * axis_x[0]
        tap = tap_pointer(weight, tap_y, tap_x, axis_x, MODE)
        if MODE == "dot":
            channels = tl.arange(0, BLOCK_K)[:, None]
            w = load_weight_tile(tap, weight, channels, classes[None, :], OPERAND)
        else:
            w = load_weight_row(tap, weight, 0, classes)
        ws = ws + (w,)
    return ws


@triton.jit
def _bias_tile(
    weight, classes, HAS_BIAS: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    bias_ptr = weight[1]
    C = weight[2]
    shape: tl.constexpr = [BLOCK, BLOCK_C] if MODE == "dot" else [BLOCK_C, BLOCK]
    z = tl.zeros(shape, tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + classes, mask=classes < C, other=0.0).to(tl.float32)
        z += per_class(bias, MODE)
    return z


@triton.jit
def held_logits(
    xs, masks, ws, weight, HAS_BIAS: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """z (eq. 3) from samples and weights in registers, -inf past the last class."""
    classes = tl.arange(0, BLOCK_C)
    z = _bias_tile(weight, classes, HAS_BIAS, MODE, BLOCK, BLOCK_C)
    for a in tl.static_range(TAPS):
        if MODE == "dot":
            with_tap = tl.dot(xs[a], ws[a], z, input_precision=PRECISION)
        else:
            with_tap = z + per_class(ws[a], MODE) * xs[a]
        z = tl.where(per_cell(masks[a], MODE), with_tap, z)  # 0 times an infinite weight is NaN
    return tl.where(per_class(classes < weight[2], MODE), z, float("-inf"))


@triton.jit
def walked_logits(
    source, weight, n, cell_y, cell_x, phase_y, phase_x, axis_y, axis_x, first_class,
    HAS_BIAS: tl.constexpr, MODE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z (eq. 3) of a block of classes for any geometry and number of channels."""
    _weight_ptr, _bias_ptr, C, K, per_group, stored_rows, _stored_columns = weight
    classes = first_class + tl.arange(0, BLOCK_C)
    z = _bias_tile(weight, classes, HAS_BIAS, MODE, BLOCK, BLOCK_C)
    tap_y, before_y, taps_y = axis_taps(phase_y, axis_y)
    tap_x, before_x, taps_x = axis_taps(phase_x, axis_x)
    for t in range(taps_y * taps_x):
        t_y = t // taps_x
        t_x = t - t_y * taps_x
        offs, inside = sample_offsets(
            source, n, cell_y - before_y - t_y * axis_y[3],
            cell_x - before_x - t_x * axis_x[3], axis_y, axis_x,
        )  # fmt: skip
        tap = tap_pointer(weight, tap_y + t_y * axis_y[2], tap_x + t_x * axis_x[2], axis_x, MODE)
        if MODE == "dot":
            for k in range(0, stored_rows, BLOCK_K):
                channels = k + tl.arange(0, BLOCK_K)
                x = load_samples(source, offs, inside, channels, MODE, OPERAND)
                w = load_weight_tile(tap, weight, channels[:, None], classes[None, :], OPERAND)
                product = tl.dot(x, w, input_precision=PRECISION)
                z += tl.where(inside[:, None], product, 0.0)
        else:
            for k in range(K):
                w = load_weight_row(tap, weight, k, classes)
                x = channel_samples(source, offs, inside, classes, k, K, per_group, MODE, OPERAND)
                z = tl.where(per_cell(inside, MODE), z + per_class(w, MODE) * x, z)
    return tl.where(per_class(classes < C, MODE), z, float("-inf"))


@triton.jit
def channel_samples(
    source, offs, inside, classes, k, K, per_group, MODE: tl.constexpr, OPERAND: tl.constexpr
):
    """Each class's k-th channel: a row [1, BLOCK] where all classes share it."""
    input_ptr, _num_channels, _stride_n, stride_c, _stride_h, _stride_w = source
    if MODE == "full":
        offs += tl.cast(k, tl.int64) * stride_c
        return tl.load(input_ptr + offs, mask=inside, other=0.0).to(OPERAND)[None, :]
    else:
        channels = classes
        if MODE == "groups":
            channels = classes // per_group * K + k
        return load_samples(source, offs, inside, channels, MODE, OPERAND)


@triton.jit
def _no_classes(BLOCK: tl.constexpr):
    """Softmax state of no class: largest z, sum of exponentials, z of the label, sum over classes
    of w (largest - z), sum of w."""
    zero = tl.zeros([BLOCK], tl.float32)
    return tl.full([BLOCK], float("-inf"), tl.float32), zero, zero, zero, zero


@triton.jit
def _add_classes(
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
def _slope(
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
def _load_pixels(
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
def _for_tensor_cores(dz, PRECISION: tl.constexpr):
    """dz to the nearest TF32 number; the tensor core alone would cut it off."""
    if PRECISION == "tf32":
        bits = (dz.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(dz == dz, bits.to(tl.float32, bitcast=True), dz)
    else:
        return dz


@triton.jit
def _pixels(item, item_columns, i, j, axis_y, axis_x, SAMPLES: tl.constexpr):
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


@triton.jit
def _add_input_gradient(
    acc, dz, w, tap, weight, classes, first_channel, HELD: tl.constexpr,
    MODE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """acc + dz times the transposed W of one tap (eq. 5); w is that W if HELD."""
    if MODE == "dot":
        if HELD:
            back = tl.trans(w).to(tl.float32)
        else:
            channels = first_channel + tl.arange(0, BLOCK_I)
            back = load_weight_tile(tap, weight, channels[None, :], classes[:, None], tl.float32)
        return tl.dot(dz, back, acc, input_precision=PRECISION)
    elif MODE == "classes":
        if not HELD:
            w = load_weight_row(tap, weight, 0, classes)
        return acc + per_class(w, MODE) * dz
    else:
        _weight_ptr, _bias_ptr, C, K, per_group, _stored_rows, _stored_columns = weight
        rows = tl.arange(0, BLOCK_I)
        for r in range(BLOCK_I):
            channel = first_channel + r
            group = channel // K
            mine = (classes // per_group == group) & (classes < C)
            row = load_weight_row(tap, weight, channel - group * K, classes)
            # dz of other groups may be NaN
            product = tl.where(mine[:, None], row[:, None] * dz, 0.0)
            acc += tl.where((rows == r)[:, None], tl.sum(product, 0)[None, :], 0.0)
        return acc


@common.kernel
def _conv_transpose_cross_entropy_kernel(
    input_ptr, weight_ptr, bias_ptr, target_ptr, class_weight_ptr, upstream_ptr, pixel_loss_ptr,
    loss_ptr, denominator_ptr, bad_count_ptr, bad_index_ptr, plane_ptr,
    positions, rows, columns, first_row, first_column, items, item_columns,
    C, K, per_group, num_channels, h, w, H, W,
    stride_y, kernel_y, step_y, hop_y, gcd_y, inverse_y, dilation_y, shift_y,
    stride_x, kernel_x, step_x, hop_x, gcd_x, inverse_x, dilation_x, shift_x,
    stride_input_n, stride_input_c, stride_input_h, stride_input_w,
    stride_target_n, stride_target_h, stride_target_w,
    stride_upstream_n, stride_upstream_h, stride_upstream_w,
    ignore_index, smoothing,
    LOSS: tl.constexpr, WITH_GRAD: tl.constexpr, HAS_UPSTREAM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    ONE_CLASS: tl.constexpr, ONE_BLOCK: tl.constexpr, SAMPLES: tl.constexpr, WIDE: tl.constexpr,
    MODE: tl.constexpr, HELD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """LOSS: "sum" for a program's partial sums, "pixel" for each pixel's, "" for none. WITH_GRAD:
    the planes of eq. 5 for channels (in mode "classes", classes) of block program_id(1)."""
    tile = tl.program_id(0)
    block = tl.program_id(1)
    axis_y = (stride_y, kernel_y, step_y, hop_y, gcd_y, inverse_y, dilation_y, shift_y, h, H)
    axis_x = (stride_x, kernel_x, step_x, hop_x, gcd_x, inverse_x, dilation_x, shift_x, w, W)
    source, weight = make_operands(
        input_ptr, weight_ptr, bias_ptr, C, K, per_group, num_channels, h, w,
        stride_input_n, stride_input_c, stride_input_h, stride_input_w, MODE, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    target_strides = (stride_target_n, stride_target_h, stride_target_w)
    upstream_strides = (stride_upstream_n, stride_upstream_h, stride_upstream_w)
    TAPS: tl.constexpr = TAPS_Y * TAPS_X
    n, i, j, _, mask = split_cells(tile, positions, rows, columns - 1, BLOCK, 1, WIDE)
    i += first_row
    j += first_column

    if HELD:
        xs, masks = held_samples(
            source, n, i, j, axis_y, axis_x, MODE, OPERAND, TAPS_Y, TAPS_X, BLOCK_K
        )
    shape: tl.constexpr = [BLOCK, BLOCK_I] if MODE == "dot" else [BLOCK_I, BLOCK]
    accs = ()
    if WITH_GRAD:
        for _a in tl.static_range(TAPS):
            accs = accs + (tl.zeros(shape, tl.float32),)
    loss = tl.zeros([BLOCK], tl.float32)
    denominator = tl.zeros([BLOCK], tl.float32)
    bad_count = tl.zeros([BLOCK], tl.int32)
    bad_index = tl.full([BLOCK], common.NO_INDEX, tl.int64)

    for item in range(items):
        item_y, item_x, cell_y, cell_x, phase_y, phase_x, y, x, here = _pixels(
            item, item_columns, i, j, axis_y, axis_x, SAMPLES
        )
        here = here & mask
        label, bad, own, upstream = _load_pixels(
            target_ptr, class_weight_ptr, upstream_ptr, n, y, x, here, C, ignore_index,
            target_strides, upstream_strides, HAS_WEIGHT, HAS_UPSTREAM,
        )  # fmt: skip

        state = _no_classes(BLOCK)
        if ONE_BLOCK:
            if HELD:
                ws = held_weights(
                    weight, phase_y, phase_x, axis_y, axis_x, MODE, OPERAND, TAPS_Y, TAPS_X,
                    BLOCK_K, BLOCK_C,
                )  # fmt: skip
                z = held_logits(
                    xs, masks, ws, weight, HAS_BIAS, MODE, PRECISION, TAPS, BLOCK, BLOCK_C
                )
            else:
                ws = ()
                z = walked_logits(
                    source, weight, n, cell_y, cell_x, phase_y, phase_x, axis_y, axis_x, 0,
                    HAS_BIAS, MODE, OPERAND, PRECISION, BLOCK, BLOCK_C, BLOCK_K,
                )  # fmt: skip
            classes = tl.arange(0, BLOCK_C)
            state = _add_classes(
                state, z, label, classes, C, class_weight_ptr, HAS_WEIGHT, HAS_SMOOTHING, MODE
            )
        else:
            for c in range(0, C, BLOCK_C):
                z = walked_logits(
                    source, weight, n, cell_y, cell_x, phase_y, phase_x, axis_y, axis_x, c,
                    HAS_BIAS, MODE, OPERAND, PRECISION, BLOCK, BLOCK_C, BLOCK_K,
                )  # fmt: skip
                classes = c + tl.arange(0, BLOCK_C)
                state = _add_classes(
                    state, z, label, classes, C, class_weight_ptr, HAS_WEIGHT, HAS_SMOOTHING, MODE
                )

        if LOSS != "":
            peak, total, z_label, spread, weight_sum = state
            shift = finite_shift(peak)
            if ONE_CLASS:
                pixel_loss = own * (z_label - z_label)  # zero, or NaN with z
            else:
                log_sum = tl.log2(total) * LN2
                pixel_loss = (1.0 - smoothing) * own * (shift - z_label + log_sum)
                if HAS_SMOOTHING:
                    pixel_loss += smoothing / C * (spread + weight_sum * log_sum)
            pixel_loss = tl.where(label >= 0, pixel_loss, 0.0)
            flat = (n * H + y) * W + x
            if LOSS == "pixel":
                pixel_loss = tl.where(bad, float("nan"), pixel_loss)
                tl.store(pixel_loss_ptr + flat, pixel_loss, mask=here & (block == 0))
            else:
                loss += pixel_loss
                denominator += counted_weight(own, label >= 0, HAS_WEIGHT)
            bad_count += tl.where(bad, 1, 0)
            bad_index = tl.minimum(bad_index, tl.where(bad, flat, common.NO_INDEX))

        if WITH_GRAD:
            tap_y = item_y
            tap_x = item_x
            if ONE_BLOCK:
                dz = _slope(
                    z, state, label, own, upstream, here, classes, C, class_weight_ptr, smoothing,
                    HAS_WEIGHT, HAS_SMOOTHING, HAS_UPSTREAM, ONE_CLASS, MODE,
                )  # fmt: skip
                dz = _for_tensor_cores(dz, PRECISION)
                added = ()
                for a in tl.static_range(TAPS):
                    tap = tap_pointer(
                        weight, tap_y + a // TAPS_X * stride_y, tap_x + a % TAPS_X * stride_x,
                        axis_x, MODE,
                    )  # fmt: skip
                    held = dz
                    if HELD:
                        held = ws[a]
                    acc = _add_input_gradient(
                        accs[a], dz, held, tap, weight, classes, block * BLOCK_I,
                        HELD, MODE, PRECISION, BLOCK_I,
                    )  # fmt: skip
                    added = added + (acc,)
                accs = added
            else:
                first_class = 0
                last_class = C
                if MODE == "classes":
                    first_class = block * BLOCK_C
                    last_class = first_class + 1
                for c in range(first_class, last_class, BLOCK_C):
                    z = walked_logits(
                        source, weight, n, cell_y, cell_x, phase_y, phase_x, axis_y, axis_x, c,
                        HAS_BIAS, MODE, OPERAND, PRECISION, BLOCK, BLOCK_C, BLOCK_K,
                    )  # fmt: skip
                    classes = c + tl.arange(0, BLOCK_C)
                    dz = _slope(
                        z, state, label, own, upstream, here, classes, C, class_weight_ptr,
                        smoothing, HAS_WEIGHT, HAS_SMOOTHING, HAS_UPSTREAM, ONE_CLASS, MODE,
                    )  # fmt: skip
                    dz = _for_tensor_cores(dz, PRECISION)
                    added = ()
                    for a in tl.static_range(TAPS):
                        tap = tap_pointer(
                            weight, tap_y + a // TAPS_X * stride_y, tap_x + a % TAPS_X * stride_x,
                            axis_x, MODE,
                        )  # fmt: skip
                        acc = _add_input_gradient(
                            accs[a], dz, dz, tap, weight, classes, block * BLOCK_I,
                            False, MODE, PRECISION, BLOCK_I,
                        )  # fmt: skip
                        added = added + (acc,)
                    accs = added

    if LOSS != "":
        first = block == 0
        if LOSS == "sum":
            tl.store(loss_ptr + tile, tl.sum(loss, 0), mask=first)
            tl.store(denominator_ptr + tile, tl.sum(denominator, 0), mask=first)
        tl.store(bad_count_ptr + tile, tl.sum(bad_count, 0), mask=first)
        tl.store(bad_index_ptr + tile, tl.min(bad_index, 0), mask=first)
    if WITH_GRAD:
        flat = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        channels = block * BLOCK_I + tl.arange(0, BLOCK_I)
        plane = tl.cast(positions, tl.int64) * num_channels
        if MODE == "dot":  # [taps, positions, channels], else [taps, channels, positions]
            offs = (flat * num_channels)[:, None] + channels[None, :]
        else:
            offs = (channels.to(tl.int64) * positions)[:, None] + flat[None, :]
        inside = per_cell(mask, MODE) & per_class(channels < num_channels, MODE)
        for a in tl.static_range(TAPS):
            tl.store(plane_ptr + plane * a + offs, accs[a], mask=inside)


@common.kernel
def _weight_gradient_kernel(
    input_ptr, weight_ptr, bias_ptr, target_ptr, class_weight_ptr, upstream_ptr,
    weight_partial_ptr, bias_partial_ptr,
    tiles, splits, tiles_per_split, class_blocks,
    positions, rows, columns, first_row, first_column, items, item_columns,
    C, K, per_group, num_channels, h, w, H, W,
    stride_y, kernel_y, step_y, hop_y, gcd_y, inverse_y, dilation_y, shift_y,
    stride_x, kernel_x, step_x, hop_x, gcd_x, inverse_x, dilation_x, shift_x,
    stride_input_n, stride_input_c, stride_input_h, stride_input_w,
    stride_target_n, stride_target_h, stride_target_w,
    stride_upstream_n, stride_upstream_h, stride_upstream_w,
    ignore_index, smoothing,
    WITH_GRAD: tl.constexpr, WITH_BIAS: tl.constexpr, HAS_UPSTREAM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    ONE_CLASS: tl.constexpr, ONE_BLOCK: tl.constexpr, SAMPLES: tl.constexpr, WIDE: tl.constexpr,
    MODE: tl.constexpr, HELD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Partial sums of eq. 6, of an item (a phase, or with SAMPLES a tap), a split, a block of
    classes and one of channels. WITH_BIAS needs phases: they meet every pixel once."""
    program = tl.program_id(0)
    item = program % items
    split = program // items % splits
    block = program // items // splits
    class_block = block % class_blocks
    channel_block = block // class_blocks
    axis_y = (stride_y, kernel_y, step_y, hop_y, gcd_y, inverse_y, dilation_y, shift_y, h, H)
    axis_x = (stride_x, kernel_x, step_x, hop_x, gcd_x, inverse_x, dilation_x, shift_x, w, W)
    source, weight = make_operands(
        input_ptr, weight_ptr, bias_ptr, C, K, per_group, num_channels, h, w,
        stride_input_n, stride_input_c, stride_input_h, stride_input_w, MODE, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    target_strides = (stride_target_n, stride_target_h, stride_target_w)
    upstream_strides = (stride_upstream_n, stride_upstream_h, stride_upstream_w)
    TAPS: tl.constexpr = TAPS_Y * TAPS_X
    # tiles a tap: one [BLOCK_I, BLOCK_C], or one [BLOCK_C, BLOCK] for each of BLOCK_I channels
    SUMS: tl.constexpr = 1 if MODE == "dot" else BLOCK_I
    CELLS: tl.constexpr = 0 if MODE == "dot" else 1
    classes = class_block * BLOCK_C + tl.arange(0, BLOCK_C)
    first_channel = channel_block * BLOCK_I

    tile_shape: tl.constexpr = [BLOCK, BLOCK_C] if MODE == "dot" else [BLOCK_C, BLOCK]
    shape: tl.constexpr = [BLOCK_I, BLOCK_C] if MODE == "dot" else tile_shape
    accs = ()
    if WITH_GRAD:
        for _a in tl.static_range(TAPS * SUMS):
            accs = accs + (tl.zeros(shape, tl.float32),)
    if WITH_BIAS:
        bias_sum = tl.zeros([BLOCK_C], tl.float32)
    if HELD:
        ws = held_weights(
            weight, item // item_columns, item % item_columns, axis_y, axis_x, MODE, OPERAND,
            TAPS_Y, TAPS_X, BLOCK_K, BLOCK_C,
        )  # fmt: skip

    begin = split * tiles_per_split
    for tile in range(begin, tl.minimum(begin + tiles_per_split, tiles)):
        n, i, j, _, mask = split_cells(tile, positions, rows, columns - 1, BLOCK, 1, WIDE)
        i += first_row
        j += first_column
        _item_y, _item_x, cell_y, cell_x, phase_y, phase_x, y, x, here = _pixels(
            item, item_columns, i, j, axis_y, axis_x, SAMPLES
        )
        here = here & mask
        label, _bad, own, upstream = _load_pixels(
            target_ptr, class_weight_ptr, upstream_ptr, n, y, x, here, C, ignore_index,
            target_strides, upstream_strides, HAS_WEIGHT, HAS_UPSTREAM,
        )  # fmt: skip

        state = _no_classes(BLOCK)
        if HELD:
            xs, masks = held_samples(
                source, n, i, j, axis_y, axis_x, MODE, OPERAND, TAPS_Y, TAPS_X, BLOCK_K
            )
            z = held_logits(xs, masks, ws, weight, HAS_BIAS, MODE, PRECISION, TAPS, BLOCK, BLOCK_C)
        else:
            if not ONE_BLOCK:
                for c in range(0, C, BLOCK_C):
                    z_block = walked_logits(
                        source, weight, n, cell_y, cell_x, phase_y, phase_x, axis_y, axis_x, c,
                        HAS_BIAS, MODE, OPERAND, PRECISION, BLOCK, BLOCK_C, BLOCK_K,
                    )  # fmt: skip
                    state = _add_classes(
                        state, z_block, label, c + tl.arange(0, BLOCK_C), C, class_weight_ptr,
                        HAS_WEIGHT, HAS_SMOOTHING, MODE,
                    )  # fmt: skip
            z = walked_logits(
                source, weight, n, cell_y, cell_x, phase_y, phase_x, axis_y, axis_x,
                class_block * BLOCK_C, HAS_BIAS, MODE, OPERAND, PRECISION, BLOCK, BLOCK_C, BLOCK_K,
            )  # fmt: skip
        if ONE_BLOCK:
            state = _add_classes(
                state, z, label, classes, C, class_weight_ptr, HAS_WEIGHT, HAS_SMOOTHING, MODE
            )
        dz = _slope(
            z, state, label, own, upstream, here, classes, C, class_weight_ptr, smoothing,
            HAS_WEIGHT, HAS_SMOOTHING, HAS_UPSTREAM, ONE_CLASS, MODE,
        )  # fmt: skip
        if WITH_BIAS:
            bias_sum += tl.sum(dz, CELLS)
        if WITH_GRAD:
            dz = _for_tensor_cores(dz, PRECISION)
            if MODE == "dot":
                # A pixel's NaN is no part of a tap without sample, but would be as 0 * NaN: it
                # goes over to the samples.
                stray = tl.sum(dz * 0.0, 1)
                dz = tl.where((stray == stray)[:, None], dz, 0.0)
            added = ()
            for a in tl.static_range(TAPS):
                offs, inside = sample_offsets(
                    source, n, i - a // TAPS_X, j - a % TAPS_X, axis_y, axis_x
                )
                inside = inside & mask
                if MODE == "dot":
                    if HELD:
                        sample = xs[a]
                    else:
                        channels = first_channel + tl.arange(0, BLOCK_I)
                        sample = load_samples(source, offs, inside, channels, MODE, OPERAND)
                    sample = sample.to(tl.float32) + tl.where(inside, stray, 0.0)[:, None]
                    acc = tl.dot(tl.trans(sample), dz, accs[a], input_precision=PRECISION)
                    added = added + (acc,)
                else:
                    for r in tl.static_range(BLOCK_I):
                        if HELD:
                            sample = xs[a]
                        else:
                            k = first_channel + r
                            sample = channel_samples(
                                source, offs, inside & (k < K), classes, k, K, per_group, MODE,
                                OPERAND,
                            )  # fmt: skip
                        product = tl.where(per_cell(inside, MODE), sample * dz, 0.0)
                        added = added + (accs[a * BLOCK_I + r] + product,)
            accs = added

    if WITH_GRAD:
        for a in tl.static_range(TAPS):
            tap_y = item // item_columns + a // TAPS_X * stride_y
            tap_x = item % item_columns + a % TAPS_X * stride_x
            whole = tl.cast(kernel_y * kernel_x, tl.int64) * K * C
            offs = split * whole + (tap_y * kernel_x + tap_x).to(tl.int64) * K * C
            if MODE == "dot":
                channels = first_channel + tl.arange(0, BLOCK_I)
                at = offs + channels.to(tl.int64)[:, None] * C + classes[None, :]
                inside = (channels < K)[:, None] & (classes < C)[None, :]
                tl.store(weight_partial_ptr + at, accs[a], mask=inside)
            else:
                for r in tl.static_range(BLOCK_I):
                    k = first_channel + r
                    at = offs + k.to(tl.int64) * C + classes
                    total = tl.sum(accs[a * BLOCK_I + r], 1)
                    tl.store(weight_partial_ptr + at, total, mask=(classes < C) & (k < K))
    if WITH_BIAS:
        at = (item.to(tl.int64) * splits + split) * C + classes
        inside = (classes < C) & (channel_block == 0)
        tl.store(bias_partial_ptr + at, bias_sum, mask=inside)


@common.kernel
def _reduce_kernel(
    loss_ptr, denominator_ptr, bad_count_ptr, bad_index_ptr, target_ptr, record_ptr, out_ptr,
    scale_ptr, partials, H, W, stride_n, stride_h, stride_w,
    SCALAR: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The programs' bad labels into the record; the scalar loss and the gradients' factor."""
    add_to_record(
        bad_count_ptr, bad_index_ptr, partials, target_ptr, record_ptr, record_ptr, H, W,
        stride_n, stride_h, stride_w, False, BLOCK,
    )  # fmt: skip
    if SCALAR:
        offs = tl.arange(0, BLOCK)
        loss = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, partials, BLOCK):
            part = tl.load(loss_ptr + begin + offs, mask=begin + offs < partials, other=0.0)
            loss += part.to(tl.float64)
        scale, poison = reduction_scale(denominator_ptr, bad_count_ptr, partials, MEAN, BLOCK)
        # all ignored: 0 * inf is NaN, as the mean is; the gradient is 0
        tl.store(out_ptr, (tl.sum(loss, 0) * scale + poison).to(tl.float32))
        scale = tl.where(scale == float("inf"), 1.0, scale)
        tl.store(scale_ptr, (scale + poison).to(tl.float32))


@common.kernel
def _gather_input_kernel(
    plane_ptr, scale_ptr, grad_ptr, total, positions, num_channels, h, w, rows, columns,
    first_row, first_column, stride_n, stride_c, stride_h, stride_w,
    HAS_SCALE: tl.constexpr, MODE: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of each sample: the sum of what its cells left in the planes, times the scale."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    flat = tl.cast(tl.program_id(0), INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = flat < total
    # neighbours in the planes' memory
    if MODE == "dot":
        c = flat % num_channels
        flat = flat // num_channels
        j = flat % w
        flat = flat // w
        i = flat % h
        n = flat // h
    else:
        j = flat % w
        flat = flat // w
        i = flat % h
        flat = flat // h
        c = flat % num_channels
        n = flat // num_channels
    n = n.to(tl.int64)
    plane = tl.cast(positions, tl.int64) * num_channels
    value = tl.zeros([BLOCK], tl.float32)
    for a in tl.static_range(TAPS_Y):
        row = i + a - first_row
        for b in tl.static_range(TAPS_X):
            column = j + b - first_column
            inside = mask & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
            position = (n * rows + row) * columns + column
            if MODE == "dot":
                offs = position * num_channels + c
            else:
                offs = c.to(tl.int64) * positions + position
            offs += plane * (a * TAPS_X + b)
            value += tl.load(plane_ptr + offs, mask=inside, other=0.0)
    if HAS_SCALE:
        value *= tl.load(scale_ptr)
    offs = n * stride_n + c.to(tl.int64) * stride_c
    offs += i.to(tl.int64) * stride_h + j.to(tl.int64) * stride_w
    tl.store(grad_ptr + offs, value, mask=mask)


@common.kernel
def _gather_weight_kernel(
    partial_ptr, scale_ptr, grad_ptr, partials, total, C, K, per_group, kernel_x,
    stride_channel, stride_class, stride_h, stride_w,
    HAS_SCALE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the weight (of the bias: no taps, one channel) from [partials, kh, kw, K, C]."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = flat < total
    parts = tl.arange(0, PARTS)[:, None]
    sums = tl.zeros([PARTS, BLOCK], tl.float32)
    for begin in range(0, partials, PARTS):
        part = begin + parts
        offs = part.to(tl.int64) * total + flat[None, :]
        sums += tl.load(partial_ptr + offs, mask=(part < partials) & mask[None, :], other=0.0)
    value = tl.sum(sums, 0)
    if HAS_SCALE:
        value *= tl.load(scale_ptr)
    c = flat % C
    k = flat // C % K
    tap = flat // C // K
    offs = (c // per_group * K + k) * stride_channel + c % per_group * stride_class
    offs += tap // kernel_x * stride_h + tap % kernel_x * stride_w
    tl.store(grad_ptr + offs, value, mask=mask)


# --- host -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One axis of the geometry (eqs. 1, 2)."""

    stride: int
    kernel: int
    dilation: int
    shift: int
    samples: int
    pixels: int

    @functools.cached_property
    def args(self) -> tuple[int, ...]:
        """stride, kernel, step and hop of the taps of a phase, gcd, inverse, dilation, shift."""
        gcd = math.gcd(self.stride, self.dilation)
        step, hop = self.stride // gcd, self.dilation // gcd
        inverse = pow(hop, -1, step) if step > 1 else 0
        return self.stride, self.kernel, step, hop, gcd, inverse, self.dilation, self.shift

    @functools.cached_property
    def first_cell(self) -> int:
        return self.shift // self.stride

    @functools.cached_property
    def cells(self) -> int:
        return (self.shift + self.pixels - 1) // self.stride - self.first_cell + 1

    @functools.cached_property
    def taps(self) -> int:
        """Taps of every phase where these are r + t s, t < 1 or 2; else 0."""
        plain = self.dilation == 1 and self.kernel in (self.stride, 2 * self.stride)
        return self.kernel // self.stride if plain else 0


@dataclass(frozen=True)
class Walk:
    """What the programs' positions and a walk's items are."""

    rows: int
    columns: int
    first_row: int
    first_column: int
    items: tuple[int, int]
    samples: bool
    taps: tuple[int, int]

    def args(self, batch: int) -> tuple[int, ...]:
        rows, columns = self.rows, self.columns
        starts = (self.first_row, self.first_column)
        return batch * rows * columns, rows, columns, *starts, math.prod(self.items), self.items[1]


@dataclass(frozen=True)
class Problem:
    """Sizes and geometry of one call, from the operator's arguments."""

    classes: int
    channels: int
    groups: int
    y: Axis
    x: Axis

    @functools.cached_property
    def channels_per_group(self) -> int:
        return self.channels // self.groups

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """C, K, classes per group, C_in, h, w, H, W."""
        per_group = self.classes // self.groups
        small, large = (self.y.samples, self.x.samples), (self.y.pixels, self.x.pixels)
        return self.classes, self.channels_per_group, per_group, self.channels, *small, *large

    @functools.cached_property
    def fast(self) -> bool:
        return self.y.taps > 0 and self.x.taps > 0

    @functools.cached_property
    def phases(self) -> Walk:
        """Cells and, as items, phases."""
        return Walk(
            self.y.cells, self.x.cells, self.y.first_cell, self.x.first_cell,
            (self.y.stride, self.x.stride), False, (self.y.taps, self.x.taps),
        )  # fmt: skip

    @functools.cached_property
    def gradient_walk(self) -> Walk:
        """Phases too, where few taps allow that, and also the cells that the target does not cover:
        eager multiplies their values by 0, which shows what is not finite. Else samples and, as
        items, taps."""
        if self.fast:
            rows, columns = (
                max(axis.samples + axis.taps - 1, axis.first_cell + axis.cells)
                for axis in (self.y, self.x)
            )
            return replace(self.phases, rows=rows, columns=columns, first_row=0, first_column=0)
        items = self.y.kernel, self.x.kernel
        return Walk(self.y.samples, self.x.samples, 0, 0, items, True, (1, 1))


def make_problem(
    input: Tensor, weight: Tensor, size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], groups: int, dilation: Sequence[int], crop: Sequence[int],
) -> Problem:  # fmt: skip
    return _make_problem(
        input.shape, weight.shape, *map(tuple, (size, stride, padding, dilation, crop)), groups
    )


@functools.lru_cache(maxsize=256)
def _make_problem(
    input: tuple[int, ...], weight: tuple[int, ...], size: tuple[int, ...],
    stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
    crop: tuple[int, ...], groups: int,
) -> Problem:  # fmt: skip
    y, x = (
        Axis(stride[a], weight[2 + a], dilation[a], padding[a] + crop[a], input[2 + a], size[a])
        for a in range(2)
    )
    return Problem(weight[1] * groups, input[1], groups, y, x)


@dataclass(frozen=True)
class Blocks:
    """Mode and block sizes of a kernel. BLOCK_I: channels whose gradient a program sums."""

    MODE: str
    OPERAND: tl.dtype
    PRECISION: str
    HELD: bool
    BLOCK: int
    BLOCK_C: int
    BLOCK_K: int
    BLOCK_I: int
    num_warps: int
    num_stages: int = 2
    maxnreg: int | None = None  # 255: ptxas would rather spill a few than run fewer warps


OPERANDS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@functools.lru_cache(maxsize=256)
def tuned_blocks(
    problem: Problem, dtype: torch.dtype, capability: int, of_weight: bool = False
) -> Blocks:
    """Tiles that fit in registers, of the loss's kernel or of that of the weight's gradient."""
    power = triton.next_power_of_2
    C, channels, K, groups = (
        problem.classes, problem.channels, problem.channels_per_group, problem.groups
    )  # fmt: skip
    if groups == 1 and C > 1 and capability >= 80:
        # float32 operands and their parts for TF32 take four times the registers
        wide = dtype == torch.float32
        widest = 16 if wide and (C > 32 or not 90 <= capability < 120) else 32
        block_c = min(max(16, power(C)), widest)
        block_k = min(max(16, power(channels)), 16 if wide else 32)
        mode = ("dot", OPERANDS[dtype], "tf32x3" if wide else "tf32")
        block = 64
        # Blackwell: what is held leaves no registers for loads ahead, and too few on sm_120
        held = problem.fast and max(C, channels) <= 32 and not wide and capability < 120
        if of_weight:
            # half a block of the loss's kernel fills the same rows of the packed weight
            block, block_c = (16, 16) if wide else (32, block_c)
            held = False
        # Before 3.7.1 Triton lets wgmma read what cp.async wrote, with no fence between (#10537).
        # With one stage there is no cp.async; the parts of float32 operands pass through registers.
        unfenced = 90 <= capability < 100 and common.is_before(triton.__version__, (3, 7, 1))
        single = (held and capability >= 100) or (unfenced and not wide)
        sizes = (block, block_c, block_k, block_k)
        return Blocks(*mode, held, *sizes, block // 16, 1 if single else 2, maxnreg=255)
    block_c = max(2, power(C)) if C <= 256 else 64
    block = max(2, 256 // block_c) if C <= 256 else 2  # 8 elements of a tile a thread
    warps = max(1, block_c // 128)
    if groups == C == channels:
        held = problem.fast and C <= 256
        block_i = 1 if of_weight else block_c
        mode = ("classes", tl.float32, "ieee")
        sizes = (block, block_c, block_c, block_i)
        return Blocks(*mode, held, *sizes, warps, maxnreg=255)
    block_i = min(2, power(K)) if of_weight else min(max(2, power(channels)), 64)
    mode = ("full" if groups == 1 else "groups", tl.float32, "ieee")
    return Blocks(*mode, False, block, block_c, 1, block_i, warps, maxnreg=255)


PROGRAMS = 1024  # of the weight's gradient: several for each multiprocessor of a large GPU
MAX_SPLITS = 64


@dataclass(frozen=True)
class _Call:
    """Arguments that both kernels take."""

    problem: Problem
    blocks: Blocks  # of the loss's kernel
    weight_blocks: Blocks
    input: Tensor
    weight: Tensor  # [kh, kw, K, C], packed
    bias: Tensor | None
    target: Tensor
    class_weight: Tensor | None
    upstream: Tensor | None
    ignore_index: int
    label_smoothing: float

    def tensors(self) -> tuple[Tensor, ...]:
        return (
            self.input, self.weight, self.input if self.bias is None else self.bias, self.target,
            self.input if self.class_weight is None else self.class_weight,
            self.input if self.upstream is None else self.upstream,
        )  # fmt: skip

    def geometry(self, walk: Walk) -> tuple[int, ...]:
        upstream = (0, 0, 0) if self.upstream is None else self.upstream.stride()
        return (
            *walk.args(self.input.shape[0]), *self.problem.sizes,
            *self.problem.y.args, *self.problem.x.args, *self.input.stride(),
            *self.target.stride(), *upstream,
        )  # fmt: skip

    def constexprs(self, walk: Walk, blocks: Blocks) -> dict[str, object]:
        positions = walk.args(self.input.shape[0])[0]
        return {
            "HAS_UPSTREAM": self.upstream is not None, "HAS_BIAS": self.bias is not None,
            "HAS_WEIGHT": self.class_weight is not None,
            "HAS_SMOOTHING": self.label_smoothing > 0, "ONE_CLASS": self.problem.classes == 1,
            "ONE_BLOCK": self.problem.classes <= blocks.BLOCK_C, "SAMPLES": walk.samples,
            "WIDE": positions + blocks.BLOCK >= 2**31, **vars(blocks),
        }  # fmt: skip

    def tiles(self, walk: Walk, blocks: Blocks) -> int:
        return triton.cdiv(walk.args(self.input.shape[0])[0], blocks.BLOCK)


def pack_operands(
    problem: Problem, blocks: Blocks, input: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The weight as [kh, kw, K, C]. For the tensor cores K and C are filled up with zeros to whole
    blocks, and so are the input's channels, which become neighbours: aligned loads, no masks."""
    C, K = problem.sizes[:2]
    kernel = weight.shape[2:]
    packed = weight.unflatten(0, (problem.groups, K)).permute(3, 4, 1, 0, 2)
    packed = packed.reshape(*kernel, K, C)
    if blocks.MODE != "dot":
        return input, packed.contiguous()
    rows = triton.cdiv(K, blocks.BLOCK_K) * blocks.BLOCK_K
    columns = triton.cdiv(C, blocks.BLOCK_C) * blocks.BLOCK_C
    filled = weight.new_zeros((*kernel, rows, columns))
    filled[:, :, :K, :C] = packed
    N, _, h, w = input.shape
    samples = input.new_zeros((N, h, w, rows))
    samples[..., :K] = input.permute(0, 2, 3, 1)
    return samples.permute(0, 3, 1, 2), filled


def _launch_loss(
    call: _Call, walk: Walk, loss: str, partials: tuple[Tensor, ...], planes: Tensor | None
) -> None:
    """Per pixel into partials[0] or as partial sums."""
    blocks = call.blocks
    channel_blocks = 1
    if planes is not None:
        channel_blocks = triton.cdiv(call.problem.channels, blocks.BLOCK_I)
    taps = walk.taps if blocks.HELD or planes is not None else (1, 1)
    # axis 1 holds 65535 blocks, that is a million channels
    launch(
        _conv_transpose_cross_entropy_kernel, (call.tiles(walk, blocks), channel_blocks),
        (*call.tensors(), *partials, partials[0] if planes is None else planes),
        (*call.geometry(walk), call.ignore_index, call.label_smoothing),
        LOSS=loss, WITH_GRAD=planes is not None, TAPS_Y=taps[0], TAPS_X=taps[1],
        **call.constexprs(walk, blocks),
    )  # fmt: skip


def _make_planes(call: _Call, walk: Walk) -> Tensor:
    """For every tap, position and channel. Neighbours in memory: channels for the tensor cores,
    else positions."""
    positions = walk.args(call.input.shape[0])[0]
    size = math.prod(walk.taps) * positions * call.problem.channels
    return torch.empty(size, dtype=torch.float32, device=call.input.device)


def _gather_input(
    call: _Call, walk: Walk, planes: Tensor, scale: Tensor | None, gradient: Tensor
) -> None:
    channels, h, w = gradient.shape[1:]
    total, block = gradient.numel(), 512
    launch(
        _gather_input_kernel, (triton.cdiv(total, block),),
        (planes, planes if scale is None else scale, gradient),
        (
            total, walk.args(gradient.shape[0])[0], channels, h, w, walk.rows, walk.columns,
            walk.first_row, walk.first_column, *gradient.stride(),
        ),
        HAS_SCALE=scale is not None, MODE=call.blocks.MODE,
        TAPS_Y=walk.taps[0], TAPS_X=walk.taps[1], WIDE=total + block >= 2**31, BLOCK=block,
    )  # fmt: skip


def _sum_weight(
    call: _Call, walk: Walk, with_weight: bool, with_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Partial sums [splits, kh, kw, K, C] of the weight's gradient, [items splits, C] of the
    bias's."""
    problem, blocks = call.problem, call.weight_blocks
    class_blocks = triton.cdiv(problem.classes, blocks.BLOCK_C)
    channel_blocks = 1
    if with_weight:
        channel_blocks = triton.cdiv(problem.channels_per_group, blocks.BLOCK_I)
    items, tiles = math.prod(walk.items), call.tiles(walk, blocks)
    wanted = triton.cdiv(PROGRAMS, items * class_blocks * channel_blocks)
    per_split = triton.cdiv(tiles, max(1, min(wanted, tiles, MAX_SPLITS)))
    splits = triton.cdiv(tiles, per_split)
    float32 = {"dtype": torch.float32, "device": call.input.device}
    sizes = (*call.weight.shape[:2], problem.channels_per_group, problem.classes)
    weight = torch.empty((splits, *sizes), **float32) if with_weight else None
    bias = torch.empty((items * splits, problem.classes), **float32) if with_bias else None
    taps = walk.taps if blocks.HELD or with_weight else (1, 1)
    unused = call.input
    launch(
        _weight_gradient_kernel, (items * splits * class_blocks * channel_blocks,),
        (
            *call.tensors(), unused if weight is None else weight,
            unused if bias is None else bias,
        ),
        (
            tiles, splits, per_split, class_blocks, *call.geometry(walk), call.ignore_index,
            call.label_smoothing,
        ),
        WITH_GRAD=with_weight, WITH_BIAS=with_bias, TAPS_Y=taps[0],
        TAPS_X=taps[1], **call.constexprs(walk, blocks),
    )  # fmt: skip
    return weight, bias


def _gather_weight(
    partials: Tensor, scale: Tensor | None, gradient: Tensor, K: int, per_group: int
) -> None:
    """Into the gradient of a weight [C_in, C / groups, kh, kw] or a bias [C]."""
    total, block = math.prod(partials.shape[1:]), 128
    is_weight = gradient.dim() == 4
    strides = gradient.stride() if is_weight else (0, gradient.stride(0), 0, 0)
    launch(
        _gather_weight_kernel, (triton.cdiv(total, block),),
        (partials, partials if scale is None else scale, gradient),
        (
            partials.shape[0], total, partials.shape[-1], K, per_group,
            gradient.shape[3] if is_weight else 1, *strides,
        ),
        HAS_SCALE=scale is not None, PARTS=16, BLOCK=block,
    )  # fmt: skip


def _gradients(
    call: _Call, planes: Tensor | None, scale: Tensor | None,
    gradients: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Fills the gradients that are tensors. ``planes`` of the loss's own walk, if made there."""
    problem, walk = call.problem, call.problem.gradient_walk
    to_input, to_weight, to_bias = gradients
    if to_input is not None:
        if planes is None:
            planes = _make_planes(call, walk)
            # no loss is stored: any tensor stands for the partial sums
            _launch_loss(call, walk, "", (call.input,) * 5, planes)
        _gather_input(call, walk, planes, scale, to_input)
    weight_sums, bias_sums = None, None
    together = problem.fast or to_weight is None  # taps meet some pixels twice, or never
    if to_weight is not None or (to_bias is not None and together):
        weight_walk = walk if to_weight is not None else problem.phases
        weight_sums, bias_sums = _sum_weight(
            call, weight_walk, to_weight is not None, to_bias is not None and together
        )
    if to_bias is not None and not together:
        _, bias_sums = _sum_weight(call, problem.phases, False, True)
    if to_weight is not None and weight_sums is not None:
        K, per_group = problem.sizes[1:3]
        _gather_weight(weight_sums, scale, to_weight, K, per_group)
    if to_bias is not None and bias_sums is not None:
        _gather_weight(bias_sums, scale, to_bias, 1, problem.classes)


def _make_call(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    class_weight: Tensor | None, upstream: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], groups: int, dilation: Sequence[int], crop: Sequence[int],
    ignore_index: int, label_smoothing: float,
) -> _Call:  # fmt: skip
    size = target.shape[1:]
    problem = make_problem(input, weight, size, stride, padding, groups, dilation, crop)
    arch = common.capability(input.device)
    blocks = tuned_blocks(problem, input.dtype, arch)
    weight_blocks = tuned_blocks(problem, input.dtype, arch, of_weight=True)
    input, weight = pack_operands(problem, blocks, input, weight)
    return _Call(
        problem, blocks, weight_blocks, input, weight,
        None if bias is None else bias.contiguous(), target,
        None if class_weight is None else class_weight.contiguous(),
        upstream, ignore_index, label_smoothing,
    )  # fmt: skip


def conv_transpose_cross_entropy_forward(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    class_weight: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    output_padding: Sequence[int], groups: int, dilation: Sequence[int], crop: Sequence[int],
    ignore_index: int, reduction: str, label_smoothing: float, compute_grad: Sequence[bool],
    record: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, and the float32 gradients of a scalar reduction, each with its tensor's strides (empty
    where not wanted).

    Args as the operator's; ``record`` is the device's bad-label record (int64 [5]).
    """
    none = reduction == "none"
    float32 = {"dtype": torch.float32, "device": input.device}
    classes = weight.new_empty(weight.shape[1] * groups)
    gradients = [
        torch.empty_like(tensor, dtype=torch.float32) if wanted and not none else None
        for tensor, wanted in zip((input, weight, classes), compute_grad, strict=True)
    ]
    filled = [torch.empty(0, **float32) if g is None else g for g in gradients]
    if input.shape[0] == 0:
        for gradient in filled:
            gradient.zero_()
        value = torch.full((), float("nan" if reduction == "mean" else 0), **float32)
        return torch.empty(target.shape, **float32) if none else value, *filled
    call = _make_call(
        input, weight, target, bias, class_weight, None, stride, padding, groups, dilation, crop,
        ignore_index, label_smoothing,
    )  # fmt: skip
    with_planes = gradients[0] is not None and call.problem.fast
    walk = call.problem.gradient_walk if with_planes else call.problem.phases
    tiles = call.tiles(walk, call.blocks)
    loss, denominator = torch.empty(tiles, **float32), torch.empty(tiles, **float32)
    bad_count = torch.empty(tiles, dtype=torch.int32, device=input.device)
    bad_index = torch.empty(tiles, dtype=torch.int64, device=input.device)
    pixel_loss = torch.empty(target.shape, **float32) if none else loss
    with on_device(input):
        planes = _make_planes(call, walk) if with_planes else None
        _launch_loss(
            call, walk, "pixel" if none else "sum",
            (pixel_loss, loss, denominator, bad_count, bad_index), planes,
        )  # fmt: skip
        value, scale = torch.empty((), **float32), torch.empty((), **float32)
        launch(
            _reduce_kernel, (1,),
            (loss, denominator, bad_count, bad_index, target, record, value, scale),
            (tiles, *target.shape[1:], *target.stride()),
            SCALAR=not none, MEAN=reduction == "mean", BLOCK=1024,
        )  # fmt: skip
        if none:
            return pixel_loss, *filled
        _gradients(call, planes, scale, gradients)
    return value, *filled


def conv_transpose_cross_entropy_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    class_weight: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    output_padding: Sequence[int], groups: int, dilation: Sequence[int], crop: Sequence[int],
    ignore_index: int, label_smoothing: float, compute_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``reduction="none"`` for any upstream gradient [N, H, W], their tensors' dtypes
    (empty where not wanted)."""
    tensors = (input, weight, input.new_empty(0) if bias is None else bias)
    gradients = [
        torch.empty_like(tensor) if wanted else None
        for tensor, wanted in zip(tensors, compute_grad, strict=True)
    ]
    to_input, to_weight, to_bias = (
        tensor.new_empty(0) if gradient is None else gradient
        for tensor, gradient in zip(tensors, gradients, strict=True)
    )
    if input.shape[0] == 0:
        for gradient in (to_input, to_weight, to_bias):
            gradient.zero_()
        return to_input, to_weight, to_bias
    call = _make_call(
        input, weight, target, bias, class_weight, grad_output, stride, padding, groups, dilation,
        crop, ignore_index, label_smoothing,
    )  # fmt: skip
    with on_device(input):
        _gradients(call, None, None, gradients)
    return to_input, to_weight, to_bias
