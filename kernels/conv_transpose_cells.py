"""The loss of a transposed convolution's cells, and the planes of the input's gradient.

Maths, and who owns what: conv_transpose_cross_entropy.py, eqs. 3 to 5.
"""

# ruff: noqa: RUF005  (Triton has no (*a, b))
from __future__ import annotations

import triton
import triton.language as tl

from fcnseg.kernels import common
from fcnseg.kernels.common import split_cells
from fcnseg.kernels.conv_transpose_logits import (
    held_logits,
    held_samples,
    held_weights,
    load_weight_row,
    load_weight_tile,
    make_operands,
    per_cell,
    per_class,
    tap_pointer,
    walked_logits,
)
from fcnseg.kernels.conv_transpose_softmax import (
    add_classes,
    finite_shift,
    for_tensor_cores,
    item_pixels,
    load_targets,
    no_classes,
    slopes,
)
from fcnseg.kernels.reduction import LN2, counted_weight


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
        item_y, item_x, cell_y, cell_x, phase_y, phase_x, y, x, here = item_pixels(
            item, item_columns, i, j, axis_y, axis_x, SAMPLES
        )
        here = here & mask
        label, bad, own, upstream = load_targets(
            target_ptr, class_weight_ptr, upstream_ptr, n, y, x, here, C, ignore_index,
            target_strides, upstream_strides, HAS_WEIGHT, HAS_UPSTREAM,
        )  # fmt: skip

        state = no_classes(BLOCK)
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
            state = add_classes(
                state, z, label, classes, C, class_weight_ptr, HAS_WEIGHT, HAS_SMOOTHING, MODE
            )
        else:
            for c in range(0, C, BLOCK_C):
                z = walked_logits(
                    source, weight, n, cell_y, cell_x, phase_y, phase_x, axis_y, axis_x, c,
                    HAS_BIAS, MODE, OPERAND, PRECISION, BLOCK, BLOCK_C, BLOCK_K,
                )  # fmt: skip
                classes = c + tl.arange(0, BLOCK_C)
                state = add_classes(
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
                dz = slopes(
                    z, state, label, own, upstream, here, classes, C, class_weight_ptr, smoothing,
                    HAS_WEIGHT, HAS_SMOOTHING, HAS_UPSTREAM, ONE_CLASS, MODE,
                )  # fmt: skip
                dz = for_tensor_cores(dz, PRECISION)
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
                    dz = slopes(
                        z, state, label, own, upstream, here, classes, C, class_weight_ptr,
                        smoothing, HAS_WEIGHT, HAS_SMOOTHING, HAS_UPSTREAM, ONE_CLASS, MODE,
                    )  # fmt: skip
                    dz = for_tensor_cores(dz, PRECISION)
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
