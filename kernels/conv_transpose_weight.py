"""Partial sums of the gradients of a transposed convolution's weight and bias.

Maths, and who owns what: conv_transpose_cross_entropy.py, eq. 6.
"""

# ruff: noqa: RUF005  (Triton has no (*a, b))
from __future__ import annotations

import triton.language as tl

from fcnseg.kernels import common
from fcnseg.kernels.common import split_cells
from fcnseg.kernels.conv_transpose_logits import (
    channel_samples,
    held_logits,
    held_samples,
    held_weights,
    load_samples,
    make_operands,
    per_cell,
    sample_offsets,
    walked_logits,
)
from fcnseg.kernels.conv_transpose_softmax import (
    add_classes,
    for_tensor_cores,
    item_pixels,
    load_targets,
    no_classes,
    slopes,
)


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
        _item_y, _item_x, cell_y, cell_x, phase_y, phase_x, y, x, here = item_pixels(
            item, item_columns, i, j, axis_y, axis_x, SAMPLES
        )
        here = here & mask
        label, _bad, own, upstream = load_targets(
            target_ptr, class_weight_ptr, upstream_ptr, n, y, x, here, C, ignore_index,
            target_strides, upstream_strides, HAS_WEIGHT, HAS_UPSTREAM,
        )  # fmt: skip

        state = no_classes(BLOCK)
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
                    state = add_classes(
                        state, z_block, label, c + tl.arange(0, BLOCK_C), C, class_weight_ptr,
                        HAS_WEIGHT, HAS_SMOOTHING, MODE,
                    )  # fmt: skip
            z = walked_logits(
                source, weight, n, cell_y, cell_x, phase_y, phase_x, axis_y, axis_x,
                class_block * BLOCK_C, HAS_BIAS, MODE, OPERAND, PRECISION, BLOCK, BLOCK_C, BLOCK_K,
            )  # fmt: skip
        if ONE_BLOCK:
            state = add_classes(
                state, z, label, classes, C, class_weight_ptr, HAS_WEIGHT, HAS_SMOOTHING, MODE
            )
        dz = slopes(
            z, state, label, own, upstream, here, classes, C, class_weight_ptr, smoothing,
            HAS_WEIGHT, HAS_SMOOTHING, HAS_UPSTREAM, ONE_CLASS, MODE,
        )  # fmt: skip
        if WITH_BIAS:
            bias_sum += tl.sum(dz, CELLS)
        if WITH_GRAD:
            dz = for_tensor_cores(dz, PRECISION)
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
