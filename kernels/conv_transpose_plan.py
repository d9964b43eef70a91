"""Geometry, walks and block sizes of a transposed convolution, and its operands packed for them.

Maths and modes: conv_transpose_cross_entropy.py. Everything here is known from shapes, dtypes and
the device, except what `pack_operands` copies.
"""

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
