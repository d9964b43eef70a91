"""Launches the loss of bilinearly upsampled logits: lanes, bands, workspaces.

The maths stands in upsample_cross_entropy_cells.py (loss and sums) and
upsample_cross_entropy_gather.py (what is made of the sums). A call is two launches forward and one
backward; with ``reduction="none"`` two and two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fcnseg.kernels import common
from fcnseg.kernels.launch import Launch, cached_plan, on_device
from fcnseg.kernels.upsample_cross_entropy_cells import _upsample_cross_entropy_kernel
from fcnseg.kernels.upsample_cross_entropy_gather import (
    ALONG_C,
    ALONG_NONE,
    ALONG_W,
    HEAD,
    _gradient_kernel,
    _loss_kernel,
)

MIN_BAND_ROWS = 3  # what is staged in `top` is then at most a third of the gradient's size
MAX_BAND_ROWS = 8
STAGED = 1 / 8  # what a band's first row costs more, staged in `top`, in rows
ALONE = 1.5  # a scheduler with one program takes as long as it would for one and a half


def registers(options: dict[str, bool], num_classes: int, capability: int) -> int:
    """Registers a thread: 144, of which 14 warps fit into a multiprocessor, where the kernel needs
    no more; else what there are, where ptxas would rather spill a few than run fewer warps."""
    return 144 if _is_plain(options, num_classes) and 80 <= capability < 100 else 255


def _is_plain(options: dict[str, bool], num_classes: int) -> bool:
    """Whether it is a scalar loss of equal weights with its gradient, of 8-bit labels."""
    scalar = options["WITH_GRAD"] and not options["PER_PIXEL"]
    equal = not (options["HAS_WEIGHT"] or options["HAS_SMOOTHING"])
    return scalar and equal and num_classes <= 255


def label_bits(num_classes: int) -> int:
    """Bits of a class, among which all ones are no class."""
    return num_classes.bit_length()


def tuned_lanes(
    geo: common.Geometry, num_classes: int, options: dict[str, bool], capability: int
) -> common.Lanes:
    """As many pixels a lane as its registers hold: a sum, then a factor, for each.

    ``options``: HAS_WEIGHT, HAS_SMOOTHING, WITH_GRAD, PER_PIXEL as the kernel's. All but a scalar
    loss of equal weights with its gradient take a logarithm or a load per pixel, and 16-bit labels
    twice the words: 8 x 8 pixels would spill. So would 8 rows before Ampere, with all options, or
    for a scalar loss without gradient, which loads four samples a pixel.
    """
    if _is_plain(options, num_classes):
        return common.choose_lanes(geo, rows=8, columns=8)
    all_options = options["HAS_WEIGHT"] and options["HAS_SMOOTHING"]
    alone = not (options["WITH_GRAD"] or options["PER_PIXEL"])
    few = capability < 80 or all_options or alone
    return common.choose_lanes(geo, rows=4 if few else 8, columns=4)


def choose_band(images: int, h: int, w: int, cells: int, multiprocessors: int) -> int:
    """Cell rows that a program walks down: the more, the less is staged in `top`.

    A multiprocessor has four schedulers, and a program is one warp, which a scheduler issues for.
    The time is that of the fullest scheduler: its programs share its issue slots, and one alone
    leaves a part of them empty. Among the heights that take about as long as the best
    (5%) the largest is taken. Bands are lower than MIN_BAND_ROWS only where the programs do not
    fill the device: the problem is small then, and so is what it stages.
    """
    schedulers = 4 * multiprocessors

    def programs(rows: int) -> int:
        """Programs of the fullest scheduler."""
        all_programs = triton.cdiv(images * triton.cdiv(h + 1, rows) * (w + 1), cells)
        return triton.cdiv(all_programs, schedulers)

    def time(rows: int) -> float:
        return max(programs(rows), ALONE) * (rows + STAGED)

    heights = range(1 if programs(1) == 1 else MIN_BAND_ROWS, MAX_BAND_ROWS + 1)
    times = {rows: time(rows) for rows in heights}
    return max(rows for rows in times if times[rows] <= 1.05 * min(times.values()))


@dataclass(frozen=True)
class Bands:
    """How the cells of a problem are dealt to programs, and what they stage between them."""

    lanes: common.Lanes
    band_rows: int
    bands: int  # of an image
    cells: int  # of the first cell row of every band
    tiles: int  # programs
    edges: int  # floats of scale, `top` and `border`


def deal_bands(
    shape: tuple[int, int, int, int], geo: common.Geometry, options: dict[str, bool],
    device: torch.device,
) -> Bands:  # fmt: skip
    """``shape``: the logits'; ``options``: as those of ``tuned_lanes``."""
    N, C, h, w = shape
    lanes = tuned_lanes(geo, C, options, common.capability(device))
    band_rows = 1
    if options["WITH_GRAD"]:
        band_rows = choose_band(N, h, w, lanes.cells, common.multiprocessors(device))
    bands = triton.cdiv(h + 1, band_rows)
    cells = N * bands * (w + 1)
    tiles = triton.cdiv(cells, lanes.cells)
    edges = HEAD + N * bands * C * w + tiles * (band_rows + 1) * C if options["WITH_GRAD"] else 0
    return Bands(lanes, band_rows, bands, cells, tiles, edges)


def needs_64_bits(
    shape: tuple[int, int, int, int], logits_strides: tuple[int, ...], deal: Bands
) -> bool:
    """Whether 32 bits do not number the cells, the logits or the sums at the samples."""
    reach = sum((size - 1) * stride for size, stride in zip(shape, logits_strides, strict=True))
    return max(reach, math.prod(shape), deal.edges, deal.cells + deal.lanes.cells) >= 2**31


def edges_size(
    shape: tuple[int, int, int, int], size: tuple[int, int], weighted: bool, label_smoothing: float,
    align_corners: bool, scale_h: float | None, scale_w: float | None, device: torch.device,
) -> int:  # fmt: skip
    """Floats of the second workspace of a scalar loss with gradient, on ``device``."""
    geo = common.geometry(*shape[2:], *size, align_corners, scale_h, scale_w)
    return deal_bands(shape, geo, _options(weighted, label_smoothing, True, False), device).edges


def _options(weighted: bool, smoothing: float, with_grad: bool, per_pixel: bool) -> dict[str, bool]:
    return {
        "HAS_WEIGHT": weighted, "HAS_SMOOTHING": smoothing > 0, "WITH_GRAD": with_grad,
        "PER_PIXEL": per_pixel,
    }  # fmt: skip


def gradient_tile(C: int, along: int) -> tuple[int, int, int]:
    """(BLOCK_C, BLOCK_J, CLASSES) of the gradient kernel, which do not depend on h and w: other
    sizes compile nothing anew.

    32 elements lie along the contiguous dimension, where it has that many: a whole line of the
    cache for each access of a warp.
    """
    if along == ALONG_C:
        block_c = min(32, triton.next_power_of_2(C))
        return block_c, 128 // block_c, 4 * block_c
    return 4, 32, 32


@dataclass(frozen=True)
class _Forward:
    """Plan of the loss, and of the sums for its gradient."""

    deal: Bands
    cells: Launch
    loss: Launch


@cached_plan
def _forward_plan(
    device: torch.device, shape: tuple[int, int, int, int], logits_strides: tuple[int, ...],
    sums_strides: tuple[int, ...], dtypes: tuple[torch.dtype | None, ...], size: tuple[int, int],
    target_strides: tuple[int, ...], upstream_strides: tuple[int, ...],
    loss_strides: tuple[int, ...], ignore_index: int, label_smoothing: float, align_corners: bool,
    scale_h: float | None, scale_w: float | None, per_pixel: bool, with_grad: bool, mean: bool,
) -> _Forward:  # fmt: skip
    """``dtypes``: of logits, target, weight and upstream; None where there is none."""
    (_, C, h, w), (H, W) = shape, size
    geo = common.geometry(h, w, H, W, align_corners, scale_h, scale_w)
    options = _options(dtypes[2] is not None, label_smoothing, with_grad, per_pixel)
    deal = deal_bands(shape, geo, options, device)
    lanes = deal.lanes
    one_group = geo.cell_h <= lanes.ROWS and geo.cell_w <= lanes.COLUMNS * lanes.SPLIT
    cells = Launch(
        _upsample_cross_entropy_kernel, (deal.tiles,),
        (
            deal.cells, deal.bands, deal.band_rows, C, h, w, H, W, *geo.axes, *logits_strides,
            *target_strides, *upstream_strides, *loss_strides, *sums_strides, ignore_index,
            label_smoothing,
        ),
        ONE_CLASS=C == 1, BITS=label_bits(C), WIDE=needs_64_bits(shape, logits_strides, deal),
        ONE_GROUP=one_group, **options, **lanes.constexprs(),
        maxnreg=registers(options, C, common.capability(device)),
    )  # fmt: skip
    loss = Launch(
        _loss_kernel, (1,), (deal.tiles, H, W, *target_strides),
        SCALAR=not per_pixel, MEAN=mean, WITH_GRAD=with_grad, HEAD=HEAD, BLOCK=1024, num_warps=4,
        maxnreg=128,  # else ptxas spills a few for more warps, of which one program has no use
    )  # fmt: skip
    return _Forward(deal, cells, loss)


@cached_plan
def _gradient_plan(
    device: torch.device, shape: tuple[int, int, int, int], strides: tuple[int, ...],
    dtypes: tuple[torch.dtype | None, ...], size: tuple[int, ...], weighted: bool,
    label_smoothing: float, align_corners: bool, scale_h: float | None, scale_w: float | None,
    per_pixel: bool,
) -> Launch:  # fmt: skip
    """``strides``: of sums and gradient; ``dtypes``: of gradient and upstream (None: there is
    none)."""
    N, C, h, w = shape
    geo = common.geometry(h, w, *size, align_corners, scale_h, scale_w)
    options = _options(weighted, label_smoothing, True, per_pixel)
    deal = deal_bands(shape, geo, options, device)
    along = ALONG_W if strides[3] == 1 else ALONG_C if strides[1] == 1 else ALONG_NONE
    block_c, block_j, classes = gradient_tile(C, along)
    programs = N * h * triton.cdiv(C, classes) * triton.cdiv(w, block_j)
    return Launch(
        _gradient_kernel, (programs,),
        (N, C, h, w, deal.bands, deal.band_rows, *strides),
        SCALAR=not per_pixel, ALONG=along, HEAD=HEAD, CELLS=deal.lanes.cells, CLASSES=classes,
        WIDE=block_c * strides[1] + block_j * strides[3] >= 2**31, BLOCK_C=block_c,
        BLOCK_J=block_j, num_warps=1,
    )  # fmt: skip


def _run_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, upstream: Tensor | None, record: Tensor,
    ignore_index: int, label_smoothing: float, bilinear: tuple[bool, float | None, float | None],
    per_pixel: bool, with_grad: bool, mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, sums, edges) of the kernel over cells and, unless an upstream gradient a pixel is
    given, of the loss kernel; without gradient the last two are empty."""
    device, size = logits.device, target.shape[1:]
    if weight is not None:
        weight = weight.contiguous()
    float32 = {"dtype": torch.float32, "device": device}
    sums = torch.empty_like(logits, dtype=torch.float32) if with_grad else torch.empty(0, **float32)
    result = torch.empty(target.shape if per_pixel and not with_grad else (), **float32)
    plan = _forward_plan(
        device, logits.shape, logits.stride(), sums.stride() if with_grad else (0, 0, 0, 0),
        (logits.dtype, target.dtype, None if weight is None else weight.dtype,
         None if upstream is None else upstream.dtype),
        size, target.stride(), (0, 0, 0) if upstream is None else upstream.stride(),
        result.stride() or (0, 0, 0), ignore_index, label_smoothing, *bilinear, per_pixel,
        with_grad, mean,
    )  # fmt: skip
    deal = plan.deal
    partial = torch.empty((2, deal.tiles), **float32)
    loss, denominator = partial[0], partial[1]
    bad_count = torch.empty(deal.tiles, dtype=torch.int32, device=device)
    bad_index = torch.empty(deal.tiles, dtype=torch.int64, device=device)
    edges = torch.empty(deal.edges, **float32)
    top = border = edges
    if with_grad:
        tops = HEAD + logits.shape[0] * deal.bands * logits.shape[1] * logits.shape[3]
        top, border = edges[HEAD:], edges[tops:]
    with on_device(logits):
        plan.cells(
            logits, target, logits if weight is None else weight,
            logits if upstream is None else upstream, result, loss, denominator, bad_count,
            bad_index, sums, top, border,
        )  # fmt: skip
        if upstream is None:
            plan.loss(loss, denominator, bad_count, bad_index, result, edges, target, record)
    return result, sums, edges


def upsample_cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float, align_corners: bool, scale_h: float | None, scale_w: float | None,
    compute_grad: bool, record: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, and the workspaces that ``upsample_cross_entropy_gradient`` turns into the gradient of
    a scalar reduction: sums with the logits' strides and edges, float32 (else empty).

    Args as the operator's; ``record`` is the device's bad-label record (int64 [5]).
    """
    none = reduction == "none"
    with_grad = compute_grad and not none
    bilinear = (align_corners, scale_h, scale_w)
    if logits.shape[0] == 0:
        float32 = {"dtype": torch.float32, "device": logits.device}
        loss = torch.full(
            target.shape if none else (), float("nan" if reduction == "mean" else 0), **float32
        )
        if not with_grad:
            return loss, torch.empty(0, **float32), torch.empty(0, **float32)
        edges = edges_size(
            logits.shape, target.shape[1:], weight is not None, label_smoothing, *bilinear,
            logits.device,
        )  # fmt: skip
        return loss, torch.empty_like(logits, dtype=torch.float32), torch.empty(edges, **float32)
    return _run_forward(
        logits, target, weight, None, record, ignore_index, label_smoothing, bilinear,
        per_pixel=none, with_grad=with_grad, mean=reduction == "mean",
    )  # fmt: skip


def upsample_cross_entropy_gradient(
    grad_output: Tensor, sums: Tensor, edges: Tensor, out: Tensor, size: tuple[int, ...],
    weighted: bool, label_smoothing: float, align_corners: bool, scale_h: float | None,
    scale_w: float | None,
) -> None:  # fmt: skip
    """Writes the gradient of a scalar reduction for the upstream ``grad_output`` (a scalar) into
    ``out``, which has the strides of ``sums`` or is ``sums``. The options are the forward's;
    ``weighted``: whether it had class weights."""
    if sums.shape[0] == 0:
        return
    plan = _gradient_plan(
        sums.device, sums.shape, sums.stride(), (out.dtype, grad_output.dtype), size, weighted,
        label_smoothing, align_corners, scale_h, scale_w, False,
    )  # fmt: skip
    with on_device(sums):
        plan(sums, edges, grad_output, out)


def upsample_cross_entropy_backward(
    grad_output: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int,
    label_smoothing: float, align_corners: bool, scale_h: float | None, scale_w: float | None,
    record: Tensor,
) -> Tensor:  # fmt: skip
    """Gradient of ``reduction="none"`` for any upstream gradient [N, H, W], the logits' dtype."""
    gradient = torch.empty_like(logits)
    if logits.shape[0] == 0:
        return gradient
    bilinear = (align_corners, scale_h, scale_w)
    _, sums, edges = _run_forward(
        logits, target, weight, grad_output, record, ignore_index, label_smoothing, bilinear,
        per_pixel=True, with_grad=True, mean=False,
    )  # fmt: skip
    plan = _gradient_plan(
        logits.device, logits.shape, sums.stride(), (logits.dtype, None), target.shape[1:],
        weight is not None, label_smoothing, *bilinear, True,
    )  # fmt: skip
    with on_device(logits):
        plan(sums, edges, edges, gradient)
    return gradient
