"""Labels straight from the input of a transposed convolution: convolution + argmax over phases.

Maths.
1. z as in conv_transpose_cross_entropy.py, eqs. 1 to 3
2. label = the lowest c with z_c = max z; the first NaN counts as the maximum, as in torch.argmax

Shapes. input [N, C_in, h, w] fp16/bf16/fp32, any strides; weight repacked as [kh, kw, K, C]; labels
[N, H, W] uint8, int32 or int64.

Who owns what. A program owns a block of cells and walks over the phases, as in the loss. No logit
is written.

Numerics. Products of half operands are exact, sums float32; ties are those of eq. 1's sums. Offsets
are int64.

Source: torch.nn.functional.conv_transpose2d, torch.argmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcnseg.kernels import common
from fcnseg.kernels.common import split_cells
from fcnseg.kernels.conv_transpose_logits import (
    held_logits,
    held_samples,
    held_weights,
    make_operands,
    walked_logits,
)
from fcnseg.kernels.conv_transpose_plan import (
    make_problem,
    pack_operands,
    tuned_blocks,
)
from fcnseg.kernels.launch import launch, on_device


@triton.jit
def _better(best, label, z, first_class, C, MODE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Best value and its label (eq. 2) with a block of classes more."""
    AXIS: tl.constexpr = 1 if MODE == "dot" else 0
    classes = first_class + tl.arange(0, BLOCK_C)
    classes = classes[None, :] if MODE == "dot" else classes[:, None]
    peak = tl.max(tl.where(z == z, z, float("-inf")), AXIS)
    at_peak = z == (peak[:, None] if MODE == "dot" else peak[None, :])
    lowest = tl.min(tl.where(at_peak, classes, C), AXIS)
    not_a_number = tl.min(tl.where(z == z, C, classes), AXIS)
    peak = tl.where(not_a_number < C, float("nan"), peak)
    lowest = tl.where(not_a_number < C, not_a_number, lowest)
    # not (peak <= best): larger or NaN; a NaN that is the best stays
    better = (best == best) & ((peak <= best) == 0)
    return tl.where(better, peak, best), tl.where(better, lowest, label)


@common.kernel
def _conv_transpose_argmax_kernel(
    input_ptr, weight_ptr, bias_ptr, label_ptr,
    positions, rows, columns, first_row, first_column, items, item_columns,
    C, K, per_group, num_channels, h, w, H, W,
    stride_y, kernel_y, step_y, hop_y, gcd_y, inverse_y, dilation_y, shift_y,
    stride_x, kernel_x, step_x, hop_x, gcd_x, inverse_x, dilation_x, shift_x,
    stride_n, stride_c, stride_h, stride_w,
    HAS_BIAS: tl.constexpr, ONE_BLOCK: tl.constexpr, WIDE: tl.constexpr, MODE: tl.constexpr,
    HELD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    axis_y = (stride_y, kernel_y, step_y, hop_y, gcd_y, inverse_y, dilation_y, shift_y, h, H)
    axis_x = (stride_x, kernel_x, step_x, hop_x, gcd_x, inverse_x, dilation_x, shift_x, w, W)
    source, weight = make_operands(
        input_ptr, weight_ptr, bias_ptr, C, K, per_group, num_channels, h, w,
        stride_n, stride_c, stride_h, stride_w, MODE, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    n, i, j, _, mask = split_cells(tl.program_id(0), positions, rows, columns - 1, BLOCK, 1, WIDE)
    i += first_row
    j += first_column
    if HELD:
        xs, masks = held_samples(
            source, n, i, j, axis_y, axis_x, MODE, OPERAND, TAPS_Y, TAPS_X, BLOCK_K
        )
    for item in range(items):
        phase_y = item // item_columns
        phase_x = item - phase_y * item_columns
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        label = tl.zeros([BLOCK], tl.int32)
        if HELD:
            ws = held_weights(
                weight, phase_y, phase_x, axis_y, axis_x, MODE, OPERAND, TAPS_Y, TAPS_X, BLOCK_K,
                BLOCK_C,
            )  # fmt: skip
            z = held_logits(
                xs, masks, ws, weight, HAS_BIAS, MODE, PRECISION, TAPS_Y * TAPS_X, BLOCK, BLOCK_C
            )
            best, label = _better(best, label, z, 0, C, MODE, BLOCK_C)
        elif ONE_BLOCK:
            z = walked_logits(
                source, weight, n, i, j, phase_y, phase_x, axis_y, axis_x, 0, HAS_BIAS, MODE,
                OPERAND, PRECISION, BLOCK, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            best, label = _better(best, label, z, 0, C, MODE, BLOCK_C)
        else:
            for c in range(0, C, BLOCK_C):
                z = walked_logits(
                    source, weight, n, i, j, phase_y, phase_x, axis_y, axis_x, c, HAS_BIAS,
                    MODE, OPERAND, PRECISION, BLOCK, BLOCK_C, BLOCK_K,
                )  # fmt: skip
                best, label = _better(best, label, z, c, C, MODE, BLOCK_C)
        y = (i * stride_y + phase_y - shift_y).to(tl.int64)
        x = (j * stride_x + phase_x - shift_x).to(tl.int64)
        here = mask & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        offs = (n * H + y) * W + x
        tl.store(label_ptr + offs, label.to(label_ptr.dtype.element_ty), mask=here)


def conv_transpose_argmax_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], output_padding: Sequence[int], groups: int,
    dilation: Sequence[int], crop: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Labels [N, H, W]; args as the operator's."""
    labels = torch.empty((input.shape[0], *size), dtype=dtype, device=input.device)
    if input.shape[0] == 0:
        return labels
    problem = make_problem(input, weight, size, stride, padding, groups, dilation, crop)
    blocks = tuned_blocks(problem, input.dtype, common.capability(input.device))
    input, weight = pack_operands(problem, blocks, input, weight)
    walk = problem.phases
    positions = walk.args(input.shape[0])[0]
    taps = walk.taps if blocks.HELD else (1, 1)
    constexprs = {name: value for name, value in vars(blocks).items() if name != "BLOCK_I"}
    with on_device(input):
        launch(
            _conv_transpose_argmax_kernel, (triton.cdiv(positions, blocks.BLOCK),),
            (input, weight, input if bias is None else bias.contiguous(), labels),
            (
                *walk.args(input.shape[0]), *problem.sizes, *problem.y.args, *problem.x.args,
                *input.stride(),
            ),
            HAS_BIAS=bias is not None,
            ONE_BLOCK=problem.classes <= blocks.BLOCK_C,
            WIDE=positions + blocks.BLOCK >= 2**31, TAPS_Y=taps[0], TAPS_X=taps[1],
            **constexprs,
        )  # fmt: skip
    return labels
