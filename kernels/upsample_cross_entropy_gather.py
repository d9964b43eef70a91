"""What follows the kernel over cells: the scalar loss after it, and the gradient in backward.

Maths. Notation and sums are those of upsample_cross_entropy_cells.py.
1. scale = 1 for "sum", 1 / (sum of the programs' denominators) for "mean"
2. loss = scale (sum of the programs' losses)
3. gradient of sample (i, j) = scale u (S(i, j) + top + border), u the upstream gradient: S is what
   the programs stored in the sample's place, `top` what the first cell row of the band below gave
   to it, `border` what the first cell of the program on its right gave to it

Shapes. sums float32 with the strides of the logits [N, C, h, w]; edges float32 [HEAD + bands C w N
+ tiles (band_rows + 1) C]: the scale, `top` as [N, bands, C, w], `border` as
[tiles, band_rows + 1, C]; gradient in the logits' dtype.

Who owns what. One program of the loss kernel sums over the programs of the kernel over cells and
writes the loss, the scale and the bad-label record. A program of the gradient kernel owns BLOCK_J
samples of one row and CLASSES of their classes, a tile [BLOCK_C, BLOCK_J] at a time. Few samples
take more than S: each element reads one or two values and writes one, and the gradient may be
written over the sums.

Numerics. Sums over programs in float64, in one order. The gradient is float32 until it is rounded
once, to the logits' dtype. What belongs to a whole tile is addressed in int64, what belongs to an
element in int32 from there, unless WIDE.

Source: upsample_cross_entropy_cells.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fcnseg.kernels import common
from fcnseg.kernels.common import add_to_record
from fcnseg.kernels.reduction import reduction_scale

HEAD = 32  # floats before `top`: a whole line of the cache for the scale
#: Which dimension of the samples is contiguous, where one is (a constexpr of the gradient kernel).
ALONG_NONE, ALONG_W, ALONG_C = 0, 1, 2


@common.kernel
def _loss_kernel(
    loss_ptr, denominator_ptr, bad_count_ptr, bad_index_ptr, result_ptr, edges_ptr, target_ptr,
    record_ptr, partials, H, W, stride_target_n, stride_target_h, stride_target_w,
    SCALAR: tl.constexpr, MEAN: tl.constexpr, WITH_GRAD: tl.constexpr, HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Eqs. 1 and 2, and the bad-label record: one program. Without SCALAR the record alone."""
    if SCALAR:
        scale, poison = reduction_scale(denominator_ptr, bad_count_ptr, partials, MEAN, BLOCK)
        offs = tl.arange(0, BLOCK)
        loss = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, partials, BLOCK):
            part = tl.load(loss_ptr + begin + offs, mask=begin + offs < partials, other=0.0)
            loss += part.to(tl.float64)
        # all ignored: 0 * inf is NaN, as the mean is
        tl.store(result_ptr, (tl.sum(loss, 0) * scale + poison).to(tl.float32))
        if WITH_GRAD:
            # all ignored: the gradient is 0, not NaN
            scale = tl.where(scale == float("inf"), 1.0, scale)
            # all of the line: what is returned twice for the same input is equal
            head = tl.zeros([HEAD], tl.float32) + (scale + poison).to(tl.float32)
            tl.store(edges_ptr + tl.arange(0, HEAD), head)
    add_to_record(
        bad_count_ptr, bad_index_ptr, partials, target_ptr, record_ptr, record_ptr, H, W,
        stride_target_n, stride_target_h, stride_target_w, False, BLOCK,
    )  # fmt: skip


@triton.jit
def _places(row, index, j0, j, band_rows, C, w, CELLS: tl.constexpr):
    """Where in `border` lies what the cells right of samples j0 + j gave, for class 0; and the mask
    of the samples for which that cell is the first one of its program."""
    first = row * (w + 1) + 1 + j0
    local = (first % CELLS).to(tl.int32) + j
    offs = local // CELLS * ((band_rows + 1) * C)
    return (first // CELLS * (band_rows + 1) + index) * C + offs, local % CELLS == 0


@triton.jit
def _from_first_row(
    top_ptr, border_ptr, row, c0, j0, c, j, mask, band_rows, C, w, CELLS: tl.constexpr
):  # fmt: skip
    """What the first cell row of a band gave to the samples above it."""
    value = tl.load(top_ptr + (row * C + c0) * w + j0 + (c * w + j), mask=mask, other=0.0)
    places, first = _places(row, 0, j0, j, band_rows, C, w, CELLS)
    return value + tl.load(border_ptr + places + c0 + c, mask=mask & first, other=0.0)


@common.kernel
def _gradient_kernel(
    sums_ptr, edges_ptr, upstream_ptr, out_ptr,
    N, C, h, w, bands, band_rows, stride_n, stride_c, stride_h, stride_w,
    SCALAR: tl.constexpr, ALONG: tl.constexpr, WIDE: tl.constexpr, HEAD: tl.constexpr,
    CELLS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Eq. 3 for BLOCK_J samples of one row and CLASSES classes; scale and u are 1 without
    SCALAR."""
    program = tl.program_id(0)
    blocks_j = (w + BLOCK_J - 1) // BLOCK_J
    rest = program // blocks_j
    j0 = (program - rest * blocks_j) * BLOCK_J
    groups = (C + CLASSES - 1) // CLASSES
    row_of_samples = rest // groups
    first_class = (rest - row_of_samples * groups) * CLASSES
    image = row_of_samples // h
    i = row_of_samples - image * h
    n = tl.cast(image, tl.int64)

    c = tl.arange(0, BLOCK_C)[:, None]  # [BLOCK_C, 1]
    j = tl.arange(0, BLOCK_J)[None, :]  # [1, BLOCK_J]
    if ALONG == 1:
        stride_w = 1
    if ALONG == 2:
        stride_c = 1
    start = n * stride_n + tl.cast(i, tl.int64) * stride_h + tl.cast(j0, tl.int64) * stride_w
    if WIDE:
        offs = c.to(tl.int64) * stride_c + j.to(tl.int64) * stride_w
    else:
        offs = c * stride_c + j * stride_w

    top_ptr = edges_ptr + HEAD
    border_ptr = top_ptr + tl.cast(N, tl.int64) * bands * C * w
    band = i // band_rows
    row = n * bands + band
    places, first = _places(row, i - band * band_rows + 1, j0, j, band_rows, C, w, CELLS)
    scale = 1.0
    if SCALAR:
        scale = tl.load(edges_ptr)
        upstream = tl.load(upstream_ptr).to(tl.float32)

    for c0 in range(first_class, tl.minimum(first_class + CLASSES, C), BLOCK_C):
        mask = (c < C - c0) & (j < w - j0)
        here = start + tl.cast(c0, tl.int64) * stride_c
        value = tl.load(sums_ptr + here + offs, mask=mask, other=0.0)
        value += tl.load(border_ptr + places + c0 + c, mask=mask & first, other=0.0)
        if (i + 1) % band_rows == 0:
            value += _from_first_row(
                top_ptr, border_ptr, row + 1, c0, j0, c, j, mask, band_rows, C, w, CELLS
            )
        # Beyond the first row of samples the second one has weight 0, and gets 0 * NaN all the
        # same, as in eager; so do columns.
        if i == tl.minimum(1, h - 1):
            value += _from_first_row(
                top_ptr, border_ptr, n * bands, c0, j0, c, j, mask, band_rows, C, w, CELLS
            )
        if j0 == 0:
            nans = tl.where((j == 0) & (value != value), 1, 0)
            beside = (tl.max(nans, 1)[:, None] > 0) & (j == 1)
            value = tl.where(beside, float("nan"), value)
        if SCALAR:
            value = value * scale * upstream
        tl.store(out_ptr + here + offs, value.to(out_ptr.dtype.element_ty), mask=mask)
