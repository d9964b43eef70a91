"""Logits of a transposed convolution: samples, weights, and their products, for a block of cells.

Maths, shapes, modes and numerics: conv_transpose_cross_entropy.py, eqs. 1 to 3. A logit lives in
registers alone: "held" ones are made of samples and weights that stay there too, where a phase has
few taps; "walked" ones by a walk over the taps of any geometry and over the channels.
"""

# ruff: noqa: RUF005  (Triton has no (*a, b))
from __future__ import annotations

import triton
import triton.language as tl


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
