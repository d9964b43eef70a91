"""What the losses share when they sum over programs: the denominator of a mean, and its inverse.

Numerics. Sums over programs are float64 and taken in one order, so that every program that needs
one gets the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TRACE = tl.constexpr(2.0**-126)  # the smallest normal float32
MOST_PIXELS = tl.constexpr(2.0**40)


@triton.jit
def counted_weight(own, valid, HAS_WEIGHT: tl.constexpr):
    """What pixels add to the denominator. A trace of each valid one: pixels that weigh nothing are
    told from pixels that are all ignored, and no other weight changes."""
    if HAS_WEIGHT:
        own += tl.where(valid, TRACE, 0.0)
    return own


@triton.jit
def reduction_scale(
    denominator_ptr, bad_count_ptr, partials, MEAN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """1 or 1 / denominator (float64), inf if all are ignored, NaN if none weighs anything (0 / 0);
    and NaN or 0 for a bad label. The same in every program."""
    offs = tl.arange(0, BLOCK)
    denominator = tl.zeros([BLOCK], tl.float64)
    bad = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, partials, BLOCK):
        mask = begin + offs < partials
        if MEAN:
            part = tl.load(denominator_ptr + begin + offs, mask=mask, other=0.0)
            denominator += part.to(tl.float64)
        bad |= tl.load(bad_count_ptr + begin + offs, mask=mask, other=0)
    scale = tl.cast(1.0, tl.float64)
    if MEAN:
        total = tl.sum(denominator, 0)
        traces = (total > 0) & (total < TRACE * MOST_PIXELS)
        scale = tl.where(traces, float("nan"), 1.0 / total)
    return scale, tl.where(tl.max(bad, 0) != 0, float("nan"), 0.0)
