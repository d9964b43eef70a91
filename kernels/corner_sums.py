"""Sums over the pixels of a cell, as what they weigh at its four samples; and where these go.

A lane's sums belong to the four samples around its cell (common.py, 4). Neighbouring lanes share
samples: a lane adds the left sums of the lane after it to its own right ones, by an exchange in
registers. A program adds the upper sums of a cell row to the lower ones of the row before.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_samples(logits_ptr, corners, c, stride_c):
    """The four samples of class c, float32. The offsets are added up class by class: in 32 bits,
    where they fit, they take half the registers of four addresses."""
    first = c * stride_c
    return (
        tl.load(logits_ptr + (corners[0] + first)).to(tl.float32),
        tl.load(logits_ptr + (corners[1] + first)).to(tl.float32),
        tl.load(logits_ptr + (corners[2] + first)).to(tl.float32),
        tl.load(logits_ptr + (corners[3] + first)).to(tl.float32),
    )


@triton.jit
def corner_sums(moments, wy, dy, wx, dx):
    """Weights of the four samples, upper left, upper right, lower left, lower right, summed over
    pixels whose sums of 1, r, k, r k are ``moments``."""
    count, by_row, by_column, by_both = moments
    lower = wy * count + dy * by_row
    right = wx * count + dx * by_column
    lower_right = wy * right + dy * (wx * by_row + dx * by_both)
    upper_right = right - lower_right
    lower_left = lower - lower_right
    return count - lower - upper_right, upper_right, lower_left, lower_right


@triton.jit
def add_to_samples(
    sums, place, c, C, add_upper, add_lower, BLOCK: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Strips -> cells -> samples of class c; stores, or adds to what this program stored before.

    ``place``: pointer, offsets and stride along classes of the upper samples, the same of the lower
    ones, pointer and offset of the left border (C upper sums, then C lower ones), and the masks of
    the three.
    """
    upper_left, upper_right, lower_left, lower_right = sums
    upper_ptr, upper, stride_upper, lower_ptr, lower, stride_lower = place[:6]
    border_ptr, border, mask_upper, mask_lower, mask_left = place[6:]
    CELLS: tl.constexpr = BLOCK // SPLIT
    upper_ptr += upper + c * stride_upper
    lower_ptr += lower + c * stride_lower
    next_border_ptr = border_ptr + (border + c + C)
    border_ptr += border + c
    if SPLIT > 1:
        upper_left = tl.sum(tl.reshape(upper_left, [CELLS, SPLIT]), 1)
        upper_right = tl.sum(tl.reshape(upper_right, [CELLS, SPLIT]), 1)
        lower_left = tl.sum(tl.reshape(lower_left, [CELLS, SPLIT]), 1)
        lower_right = tl.sum(tl.reshape(lower_right, [CELLS, SPLIT]), 1)
    if CELLS > 1:
        cell = tl.arange(0, CELLS)
        has_next = cell + 1 < CELLS
        following = tl.minimum(cell + 1, CELLS - 1)
        upper_right += tl.where(has_next, tl.gather(upper_left, following, 0), 0.0)
        lower_right += tl.where(has_next, tl.gather(lower_left, following, 0), 0.0)
    upper_right += tl.load(upper_ptr, mask=mask_upper & add_upper, other=0.0)
    lower_right += tl.load(lower_ptr, mask=mask_lower & add_lower, other=0.0)
    upper_left += tl.load(border_ptr, mask=mask_left & add_upper, other=0.0)
    lower_left += tl.load(next_border_ptr, mask=mask_left & add_lower, other=0.0)
    tl.store(upper_ptr, upper_right, mask=mask_upper)
    tl.store(lower_ptr, lower_right, mask=mask_lower)
    tl.store(border_ptr, upper_left, mask=mask_left)
    tl.store(next_border_ptr, lower_left, mask=mask_left)
