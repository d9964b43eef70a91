"""What the kernels over cells share: geometry, lanes, labels, the bad-label record.

1. Coordinates. Output row y reads the source coordinate s(y) = step (y + half) - half, half = 1/2,
   or 0 with align_corners: rows f = floor(s) and f + 1 with weights 1 - (s - f) and s - f.
2. A cell (i, j), i in [0, h], j in [0, w], is the set of output pixels with floor(s(y)) = i - 1 and
   floor(s(x)) = j - 1: all pixels between the same four samples. Cells 0, h (and 0, w) hold the
   pixels beyond the outermost samples, where the coordinate is clamped: all weight on one sample.
   start(i) = min {y : s(y) >= i - 1}; cell i holds rows start(i) .. start(i + 1) - 1.
   s is one fused multiply-add, so every program sees the same, monotonic s and no pixel is lost.
3. Inside a cell the weight of the lower sample is linear: weight + r slope for the r-th row.
4. Lanes. Cells are numbered along rows, then images; a program takes BLOCK / SPLIT consecutive
   cells and a lane takes one cell, or one of the SPLIT vertical strips of a wide one. It holds
   ROWS x COLUMNS pixels at a time in registers: as many values [BLOCK] in the loss, else ROWS of
   [COLUMNS, BLOCK]. With the lanes in the last dimension and BLOCK = 32 num_warps, Triton's default
   layout keeps COLUMNS in a thread, so that a sum over the columns of a cell needs no exchange.
   Larger cells loop. Where columns are summed, pixels are loaded and stored flat, [COLUMNS BLOCK]:
   else Triton 3.6 deals columns to lanes.
5. A label is bad outside [0, C) and different from ignore_index. Each program writes how many it
   met and the lowest flat index; a program of the launch after it adds them up, in the same order
   every time, and puts the sum where all launches of the device keep theirs. Launches on several
   streams may do that at the same moment, so it takes one integer atomic, and only where a label is
   bad.

Source: ATen/native/UpSample.h (area_pixel_compute_source_index).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

NO_INDEX = tl.constexpr(2**63 - 1)


def kernel(function: Callable[..., Any] | None = None, *, unit_strides: Sequence[str] = ()) -> Any:
    """``triton.jit`` for a kernel that is compiled once for all sizes, layouts and addresses.

    Triton makes constants of scalars that are 1, and compiles anew for scalars and addresses that
    are multiples of 16. A first image of another size, or a tensor that starts elsewhere, would
    compile in the middle of a run, or of the capture of a CUDA graph. So of the parameters that are
    no ``tl.constexpr``, a pointer (``*_ptr``) is not told by its alignment, and a scalar not by its
    value. What is aligned by construction, a kernel may say itself by ``tl.multiple_of``.

    Args:
        unit_strides: parameters that become constants where they are 1 all the same.
    """
    if function is None:
        return functools.partial(kernel, unit_strides=unit_strides)
    runtime = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if "constexpr" not in str(parameter.annotation)
    ]
    pointers = [name for name in runtime if name.endswith("_ptr")]
    scalars = [name for name in runtime if name not in (*pointers, *unit_strides)]
    return triton.jit(
        function,
        do_not_specialize=scalars,
        do_not_specialize_on_alignment=[*pointers, *unit_strides],
    )


# --- device ---------------------------------------------------------------------------------------


@triton.jit
def source(y, step, half):
    return tl.fma(y.to(tl.float32) + half, step, -half)  # eq. 1


@triton.jit
def cell_start(cell, samples, pixels, step, inverse_step, half):
    """First row of each cell (eq. 2)."""
    edge = (cell - 1).to(tl.float32)
    guess = (edge + half) * inverse_step - half
    y = tl.minimum(tl.maximum(guess, 0.0), pixels * 1.0).to(tl.int32) - 1
    y = tl.maximum(y, 0)
    for _step in tl.static_range(3):  # the guess is at most one off, on either side
        y += tl.where((y < pixels) & (source(y, step, half) < edge), 1, 0)
    # A step of 0 (one row, or one sample, with align_corners): every pixel has coordinate 0.
    y = tl.where(inverse_step > 0, y, tl.where(cell <= 1, 0, pixels))
    return tl.where(cell <= 0, 0, tl.where(cell > samples, pixels, y))


@triton.jit
def cell_axis(cell, samples, pixels, step, inverse_step, half):
    """First pixel, number of pixels, the two samples, and weight, slope of the second (eq. 3)."""
    start = cell_start(cell, samples, pixels, step, inverse_step, half)
    count = cell_start(cell + 1, samples, pixels, step, inverse_step, half) - start
    weight = tl.fma(start.to(tl.float32) + half, step, -(half + (cell - 1).to(tl.float32)))
    # An empty cell (downsampling) starts beyond itself: no weight outside [0, 1] may arise.
    inside = (cell > 0) & (cell < samples) & (count > 0)
    weight = tl.where(inside, weight, tl.where(cell == 0, 1.0, 0.0))
    slope = tl.where(inside & (count > 1), step, 0.0)
    # Before the first sample the weight lies on sample 0; the other one still has weight 0, not no
    # part, as in the eager expression: 0 * inf is NaN there too.
    first = tl.minimum(tl.where(cell == 0, 1, cell - 1), samples - 1)
    second = tl.minimum(cell, samples - 1)  # a band may reach past the last cell
    return start, count, first, second, weight, slope


@triton.jit
def split_cells(
    tile, cells, bands, w, BLOCK: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr
):
    """Image, band, cell column and strip of each lane; lanes past the end get the last cell.

    ``cells`` counts those of the first cell row of every band; a band of one row is a cell row.
    """
    lane = tl.arange(0, BLOCK)
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    flat = tl.cast(tile, INDEX) * (BLOCK // SPLIT) + lane // SPLIT
    mask = flat < cells
    flat = tl.minimum(flat, tl.cast(cells - 1, INDEX))
    row = flat // (w + 1)
    n = row // bands
    j = (flat - row * (w + 1)).to(tl.int32)
    band = (row - n * bands).to(tl.int32)
    return n.to(tl.int64), band, j, lane % SPLIT, mask


@triton.jit
def corner_offsets(n, i0, i1, j0, j1, stride_n, stride_h, stride_w):
    image = n * stride_n
    row0 = image + i0.to(tl.int64) * stride_h
    row1 = image + i1.to(tl.int64) * stride_h
    left = j0.to(tl.int64) * stride_w
    right = j1.to(tl.int64) * stride_w
    return row0 + left, row0 + right, row1 + left, row1 + right


@triton.jit
def load_corners(logits_ptr, corners, c, stride_c):
    """The four samples of class c, float32."""
    ptr = logits_ptr + tl.cast(c, tl.int64) * stride_c
    return (
        tl.load(ptr + corners[0]).to(tl.float32),
        tl.load(ptr + corners[1]).to(tl.float32),
        tl.load(ptr + corners[2]).to(tl.float32),
        tl.load(ptr + corners[3]).to(tl.float32),
    )


@triton.jit
def load_pixels(ptr, offs, mask, other):
    """Elements at offs, [COLUMNS, BLOCK] (eq. 4)."""
    flat = tl.reshape(offs, [offs.numel])
    value = tl.load(ptr + flat, mask=tl.reshape(mask, [offs.numel]), other=other)
    return tl.reshape(value, offs.shape)


@triton.jit
def store_pixels(ptr, offs, value, mask):
    flat = tl.reshape(offs, [offs.numel])
    tl.store(ptr + flat, tl.reshape(value, [offs.numel]), mask=tl.reshape(mask, [offs.numel]))


@triton.jit
def read_labels(target_ptr, offs, mask, C, ignore_index):
    """Labels as int32, and the masks of valid and of bad ones (eq. 5); others are ignored or
    outside ``mask``."""
    label = load_pixels(target_ptr, offs, mask, 0)
    if target_ptr.dtype.element_ty == tl.int64:
        good = label.to(tl.uint64, bitcast=True) < tl.cast(C, tl.uint64)
    else:
        label = label.to(tl.int32)
        good = label.to(tl.uint32, bitcast=True) < tl.cast(C, tl.uint32)
    kept = mask & (label != ignore_index)
    return label.to(tl.int32), kept & good, kept & (good == 0)


@triton.jit
def load_labels(target_ptr, offs, mask, C, ignore_index):
    """Class, -1 where ignored, bad or outside ``mask``; and the mask of bad labels (eq. 5)."""
    label, valid, bad = read_labels(target_ptr, offs, mask, C, ignore_index)
    return tl.where(valid, label, -1), bad


@triton.jit
def count_bad(bad, flat, bad_count, bad_index):
    """Adds the bad labels among [COLUMNS, BLOCK] pixels to a lane's count and lowest flat index."""
    if tl.max(tl.max(bad.to(tl.int32), 0), 0) > 0:  # hardly ever
        bad_count += tl.sum(bad.to(tl.int32), 0)
        bad_index = tl.minimum(bad_index, tl.min(tl.where(bad, flat, NO_INDEX), 0))
    return bad_count, bad_index


@triton.jit
def add_to_record(
    count_ptr, index_ptr, partials, target_ptr, record_ptr, invalid_ptr, H, W,
    stride_n, stride_h, stride_w, HAS_INVALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The programs' bad labels, into the record [count, value, n, y, x] or ``invalid`` (eq. 5).

    The launch that moves the count away from 0 owns the other fields and writes them. So with
    launches on several streams the count is exact, and value and position belong to one bad label,
    the first of the launch whose addition came first.
    """
    offs = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int64)
    first = tl.full([BLOCK], NO_INDEX, tl.int64)
    for begin in range(0, partials, BLOCK):
        mask = begin + offs < partials
        count += tl.load(count_ptr + begin + offs, mask=mask, other=0).to(tl.int64)
        first = tl.minimum(first, tl.load(index_ptr + begin + offs, mask=mask, other=NO_INDEX))
    total = tl.sum(count, 0)
    index = tl.min(first, 0)
    if total > 0:  # hardly ever
        if HAS_INVALID:
            tl.atomic_add(invalid_ptr, total, sem="relaxed")
        else:
            before = tl.atomic_add(record_ptr, total, sem="relaxed")
            if before == 0:
                row = index // W
                x = index - row * W
                n = row // H
                y = row - n * H
                value = tl.load(target_ptr + n * stride_n + y * stride_h + x * stride_w)
                tl.store(record_ptr + 1, value.to(tl.int64))
                tl.store(record_ptr + 2, n)
                tl.store(record_ptr + 3, y)
                tl.store(record_ptr + 4, x)


# --- host -----------------------------------------------------------------------------------------


def _step(samples: int, pixels: int, align_corners: bool, scale: float | None) -> float:
    if align_corners:
        return float(np.float32((samples - 1) / (pixels - 1))) if pixels > 1 else 0.0
    return float(np.float32(1.0 / scale if scale else samples / pixels))


def _extent(samples: int, pixels: int, step: float, half: float) -> int:
    """Pixels of the largest cell along an axis. The double holds the product exactly (eq. 1)."""
    y = np.arange(pixels, dtype=np.float64)
    cell = np.floor((step * (y + half) - half).astype(np.float32)).clip(-1, samples - 1)
    return int(np.bincount(cell.astype(np.int64) + 1).max())


@dataclass(frozen=True)
class Geometry:
    """Steps of eq. 1 and the size of the largest cell."""

    step_h: float
    step_w: float
    half: float
    cell_h: int
    cell_w: int

    @property
    def axes(self) -> tuple[float, ...]:
        """Kernel arguments: step and inverse step of either axis, and half."""
        inverse_h, inverse_w = (1 / s if s else 0.0 for s in (self.step_h, self.step_w))
        return self.step_h, inverse_h, self.step_w, inverse_w, self.half


@functools.lru_cache(maxsize=256)
def geometry(
    h: int,
    w: int,
    H: int,
    W: int,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> Geometry:
    half = 0.0 if align_corners else 0.5
    step_h = _step(h, H, align_corners, scale_h)
    step_w = _step(w, W, align_corners, scale_w)
    return Geometry(step_h, step_w, half, _extent(h, H, step_h, half), _extent(w, W, step_w, half))


@dataclass(frozen=True)
class Lanes:
    """How pixels are dealt to lanes (eq. 4)."""

    ROWS: int
    COLUMNS: int
    SPLIT: int
    num_warps: int

    @property
    def BLOCK(self) -> int:
        return 32 * self.num_warps

    @property
    def cells(self) -> int:
        """Cells of a program."""
        return self.BLOCK // self.SPLIT

    def constexprs(self) -> dict[str, int]:
        return {
            "ROWS": self.ROWS, "COLUMNS": self.COLUMNS, "SPLIT": self.SPLIT, "BLOCK": self.BLOCK,
            "num_warps": self.num_warps,
        }  # fmt: skip


def choose_lanes(geo: Geometry, rows: int, columns: int, num_warps: int = 1) -> Lanes:
    """Up to ``rows`` x ``columns`` pixels a lane; strips where a cell is wider."""
    power = triton.next_power_of_2
    rows = triton.cdiv(geo.cell_h, triton.cdiv(geo.cell_h, rows))  # groups of equal height
    columns = max(2, min(columns, power(geo.cell_w)))  # Triton 3.7 miscompiles [1, BLOCK]
    split = min(32, power(triton.cdiv(geo.cell_w, columns)))
    return Lanes(rows, columns, split, num_warps)


@functools.lru_cache(maxsize=64)
def capability(device: torch.device) -> int:
    """90 for sm_90; the interpreter stands for that one."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """132, those of an H100, for the interpreter."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_before(version: str, release: tuple[int, ...]) -> bool:
    """Whether a version string is older than a release: "3.7.1rc1" is older than (3, 7, 1), a local
    build of it ("3.7.1+git1234") is not, and what is no version counts as old."""
    found = re.match(r"v?(\d+(?:\.\d+)*)[-._]?(a|b|rc|alpha|beta|dev)?", version)
    if found is None:
        return True
    numbers = tuple(int(number) for number in found[1].split("."))
    return numbers < release or (numbers == release and found[2] is not None)
