"""Launches the loss of bilinearly upsampled logits: lanes, bands, workspaces.

The maths stands in upsample_cross_entropy_cells.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fcnseg.kernels import common
from fcnseg.kernels.upsample_cross_entropy_cells import _upsample_cross_entropy_kernel
from fcnseg.kernels.upsample_cross_entropy_gather import _finish_kernel


def label_bits(num_classes: int) -> int:
    """Bits of a class, among which all ones are no class."""
    return num_classes.bit_length()


def tuned_lanes(
    geo: common.Geometry, num_classes: int, options: dict[str, bool], capability: int
) -> common.Lanes:
    """As many pixels a lane as its registers hold: a sum, then a factor, for each.

    ``options``: HAS_WEIGHT, HAS_SMOOTHING, WITH_GRAD, PER_PIXEL as the kernel's. All but a scalar
    loss of equal weights with its gradient take a logarithm or a load per pixel, and 16-bit labels
    twice the words: 8 x 8 pixels would spill. So would 8 rows before Ampere where a cell is larger
    than that, or with all options.
    """
    scalar = options["WITH_GRAD"] and not options["PER_PIXEL"]
    equal = not (options["HAS_WEIGHT"] or options["HAS_SMOOTHING"])
    large = capability >= 80 or max(geo.cell_h, geo.cell_w) <= 8
    if scalar and equal and num_classes <= 255 and large:
        return common.choose_lanes(geo, rows=8, columns=8)
    few = capability < 80 or (options["HAS_WEIGHT"] and options["HAS_SMOOTHING"])
    return common.choose_lanes(geo, rows=4 if few else 8, columns=4)


def choose_band(images: int, h: int, w: int, cells: int, multiprocessors: int) -> int:
    """Cell rows that a program walks down: the more, the less is staged in `top`.

    A multiprocessor holds about eight programs; as many rounds times rows as with one row, or
    hardly more.
    """

    def cost(rows: int) -> int:
        programs = triton.cdiv(images * triton.cdiv(h + 1, rows) * (w + 1), cells)
        return triton.cdiv(programs, 8 * multiprocessors) * rows

    costs = {rows: cost(rows) for rows in range(1, 9)}
    return max(rows for rows in costs if costs[rows] <= 1.05 * min(costs.values()))


def _launch(
    logits: Tensor, target: Tensor, weight: Tensor | None, upstream: Tensor | None,
    record: Tensor, ignore_index: int, label_smoothing: float, geo: common.Geometry,
    per_pixel: bool, with_grad: bool, mean: bool, grad_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(loss, gradient) of the kernel over cells and the one that gathers."""
    (N, C, h, w), (H, W) = logits.shape, target.shape[1:]
    options = {
        "HAS_WEIGHT": weight is not None, "HAS_SMOOTHING": label_smoothing > 0,
        "WITH_GRAD": with_grad, "PER_PIXEL": per_pixel,
    }  # fmt: skip
    multiprocessors = common.multiprocessors(logits.device)
    capability = common.capability(logits.device)
    lanes = tuned_lanes(geo, C, options, capability)
    # Where ptxas would rather spill a few registers than run fewer warps.
    few = capability < 80 or lanes.ROWS * lanes.COLUMNS < 32 or C == 1
    registers = {"maxnreg": 255} if few or (per_pixel and not with_grad) else {}
    band_rows = choose_band(N, h, w, lanes.cells, multiprocessors) if with_grad else 1
    bands = triton.cdiv(h + 1, band_rows)
    cells = N * bands * (w + 1)
    tiles = triton.cdiv(cells, lanes.cells)
    float32 = {"dtype": torch.float32, "device": logits.device}
    loss, denominator = torch.empty(tiles, **float32), torch.empty(tiles, **float32)
    bad_count = torch.empty(tiles, dtype=torch.int32, device=logits.device)
    bad_index = torch.empty(tiles, dtype=torch.int64, device=logits.device)
    result = torch.empty((N, H, W) if per_pixel and not with_grad else (), **float32)
    grad = top = border = gradient = loss
    if with_grad:
        grad = torch.empty_like(logits, dtype=torch.float32)
        top = torch.empty((N, bands, C, w), **float32)
        border = torch.empty((tiles, band_rows + 1, C), **float32)
        gradient = grad if grad_dtype == torch.float32 else torch.empty_like(logits)
    grad_strides = grad.stride() if with_grad else (0, 0, 0, 0)
    if weight is not None:
        weight = weight.contiguous()
    with common.device_of(logits):
        _upsample_cross_entropy_kernel[(tiles,)](
            logits, target, logits if weight is None else weight,
            logits if upstream is None else upstream, result,
            loss, denominator, bad_count, bad_index, grad, top, border,
            cells, bands, band_rows, C, h, w, H, W, *geo.axes,
            *logits.stride(), *target.stride(),
            *((0, 0, 0) if upstream is None else upstream.stride()),
            *(result.stride() or (0, 0, 0)), *grad_strides,
            ignore_index, label_smoothing,
            ONE_CLASS=C == 1, BITS=label_bits(C), WIDE=cells + lanes.cells >= 2**31, **options,
            **lanes.constexprs(), **registers,
        )  # fmt: skip
        # along whichever is contiguous
        block_j, block_c = 128, 1
        if grad_strides[1] == 1 and C > 1:
            block_j, block_c = 8, min(32, triton.next_power_of_2(C))
        blocks = N * h * triton.cdiv(C, block_c) * triton.cdiv(w, block_j) if with_grad else 1
        _finish_kernel[(min(blocks, 8 * multiprocessors),)](
            loss, denominator, bad_count, bad_index, tiles, result, target, record,
            grad, top, border, gradient, blocks, bands, band_rows, C, h, w, H, W,
            *target.stride(), *grad_strides,
            SCALAR=not per_pixel, MEAN=mean, RECORD=not (per_pixel and with_grad),
            WITH_GRAD=with_grad, CELLS=lanes.cells, PARTIALS=512 if with_grad else 1024,
            BLOCK_J=block_j, BLOCK_C=block_c, num_warps=1 if with_grad else 4,
        )  # fmt: skip
    return result, gradient if with_grad else None


def upsample_cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float, align_corners: bool, scale_h: float | None, scale_w: float | None,
    compute_grad: bool, record: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss, and the float32 gradient of a scalar reduction with the logits' strides (else empty).

    Args as the operator's; ``record`` is the device's bad-label record (int64 [5]).
    """
    none = reduction == "none"
    empty = torch.empty(0, dtype=torch.float32, device=logits.device)
    if logits.shape[0] == 0:
        if none:
            return torch.empty(target.shape, dtype=torch.float32, device=logits.device), empty
        value = torch.full(
            (),
            float("nan" if reduction == "mean" else 0),
            dtype=torch.float32,
            device=logits.device,
        )
        return value, torch.empty_like(logits, dtype=torch.float32) if compute_grad else empty
    geo = common.geometry(*logits.shape[2:], *target.shape[1:], align_corners, scale_h, scale_w)
    loss, gradient = _launch(
        logits, target, weight, None, record, ignore_index, label_smoothing, geo,
        per_pixel=none, with_grad=compute_grad and not none, mean=reduction == "mean",
        grad_dtype=torch.float32,
    )  # fmt: skip
    return loss, empty if gradient is None else gradient


def upsample_cross_entropy_backward(
    grad_output: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int,
    label_smoothing: float, align_corners: bool, scale_h: float | None, scale_w: float | None,
    record: Tensor,
) -> Tensor:  # fmt: skip
    """Gradient of ``reduction="none"`` for any upstream gradient [N, H, W], the logits' dtype."""
    if logits.shape[0] == 0:
        return torch.empty_like(logits)
    geo = common.geometry(*logits.shape[2:], *target.shape[1:], align_corners, scale_h, scale_w)
    _, gradient = _launch(
        logits, target, weight, grad_output, record, ignore_index, label_smoothing, geo,
        per_pixel=True, with_grad=True, mean=False, grad_dtype=logits.dtype,
    )  # fmt: skip
    return gradient
