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

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fcnseg.kernels import common
from fcnseg.kernels.conv_transpose_cells import _conv_transpose_cross_entropy_kernel
from fcnseg.kernels.conv_transpose_gather import (
    _gather_input_kernel,
    _gather_weight_kernel,
    _reduce_kernel,
)
from fcnseg.kernels.conv_transpose_plan import (
    Blocks,
    Problem,
    Walk,
    make_problem,
    pack_operands,
    tuned_blocks,
)
from fcnseg.kernels.conv_transpose_weight import _weight_gradient_kernel
from fcnseg.kernels.launch import launch, on_device

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
