"""Labels of a lane's pixels as bit planes: which pixels carry a class, and their moments.

1. A lane of ROWS x COLUMNS pixels (common.py, 4) packs its labels into words of four rows, a byte a
   row: one word for each column and each 8 bits of a label. A pixel without a label has ones.
2. Plane b of four rows holds bit b of every label: a byte a row, a bit a column. The pixels of
   class c are the AND of as many words as a label has bits; those without a label have only ones.
3. Moments of a set of pixels: the sums of 1, r, k, r k over its rows r and columns k. Bits are
   counted in all four bytes of a word at once.

The parallel bit count is Hacker's Delight's (Warren, 2012, section 5-1).
"""

# ruff: noqa: RUF005  (Triton has no (*a, b))
from __future__ import annotations

import triton
import triton.language as tl

from fcnseg.kernels.common import NO_INDEX


@triton.constexpr_function
def _word(bits: int) -> int:
    """32 bits as the int32 that has them."""
    return bits if bits < 2**31 else bits - 2**32


@triton.constexpr_function
def _cover(quad: int, rows: int, columns: int) -> int:
    """The word with a bit for each pixel of four rows of a lane."""
    height = min(4, rows - 4 * quad)
    return _word(((1 << columns) - 1) * (0x01010101 & ((1 << (8 * height)) - 1)))


@triton.jit
def _load_label(target_ptr, offs, here, C, ignore_index):
    """Label of each lane's pixel, whether it is a class, and whether it is bad. Outside ``here``,
    and where it is ignored, it may be the class that is ignored."""
    if target_ptr.dtype.element_ty == tl.int64:
        label = tl.load(target_ptr + offs, mask=here, other=ignore_index)
        known = label.to(tl.uint64, bitcast=True) < tl.cast(C, tl.uint64)
        bad = (known == 0) & (label != ignore_index)
        return label.to(tl.int32), known, bad
    else:
        label = tl.load(target_ptr + offs, mask=here, other=0).to(tl.int32)
        known = here & (label.to(tl.uint32, bitcast=True) < tl.cast(C, tl.uint32))
        return label, known, here & (known == 0) & (label != ignore_index)


@triton.jit
def load_label_words(
    target_ptr, offs, stride_h, stride_w, rows, columns, C, ignore_index,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Packed labels (1) of the pixels at offs + r stride_h + k stride_w, r < rows, k < columns, the
    ignored class among them, and how many are bad: [BLOCK] each."""
    BYTES: tl.constexpr = (BITS + 7) // 8
    stride_w = tl.cast(stride_w, tl.int64)
    some_bad = tl.zeros_like(rows)
    NONE: tl.constexpr = 255 if BYTES == 1 else -1
    words = ()
    for quad in tl.static_range((ROWS + 3) // 4):
        quad_words = ()
        for _word in tl.static_range(COLUMNS * BYTES):
            quad_words = quad_words + (tl.zeros_like(rows),)
        # a loop, not unrolled: the loads of a whole cell in flight would take the registers
        fields = min(4, ROWS - 4 * quad)
        for field in range(fields):
            row = 4 * quad + fields - 1 - field
            row_offs = offs + tl.cast(row, tl.int64) * stride_h
            longer = ()
            for k in tl.static_range(COLUMNS):
                here = (row < rows) & (k < columns)
                label, known, bad = _load_label(
                    target_ptr, row_offs + k * stride_w, here, C, ignore_index
                )
                label = tl.where(known, label, NONE)
                some_bad += tl.where(bad, 1, 0)
                for byte in tl.static_range(BYTES):
                    part = label if BYTES == 1 else (label >> (8 * byte)) & 255
                    longer = longer + (quad_words[k * BYTES + byte] * 256 + part,)
            quad_words = longer
        words = words + quad_words
    return words, some_bad


@triton.jit
def labels_of(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """Labels from packed words, pixel (r, k) at k ROWS + r; ones where there is none."""
    BYTES: tl.constexpr = (BITS + 7) // 8
    labels = ()
    for k in tl.static_range(COLUMNS):
        for r in tl.static_range(ROWS):
            label = (words[(r // 4 * COLUMNS + k) * BYTES] >> (8 * (r % 4))) & 255
            for byte in tl.static_range(1, BYTES):
                word = words[(r // 4 * COLUMNS + k) * BYTES + byte]
                label = label | (((word >> (8 * (r % 4))) & 255) << (8 * byte))
            labels = labels + (label,)
    return labels


@triton.jit
def label_planes(
    words, C, ignore_index, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Planes (2): BITS words [BLOCK] for each four rows, from packed labels, without the ignored
    class."""
    BYTES: tl.constexpr = (BITS + 7) // 8
    planes = ()
    for quad in tl.static_range((ROWS + 3) // 4):
        for b in tl.static_range(BITS):
            plane = tl.zeros_like(words[0])
            for k in tl.static_range(COLUMNS):
                word = words[(quad * COLUMNS + k) * BYTES + b // 8]
                moved = word << (k - b % 8) if k >= b % 8 else word >> (b % 8 - k)
                plane = plane | (moved & _word(0x01010101 << k))
            planes = planes + (plane,)
    ignored = pixels_of(planes, ignore_index, ROWS, COLUMNS, BITS)
    is_class = (ignore_index >= 0) & (ignore_index < C)
    kept = ()
    for quad in tl.static_range((ROWS + 3) // 4):
        none = tl.where(is_class, ignored[quad], 0)
        for b in tl.static_range(BITS):
            kept = kept + (planes[quad * BITS + b] | none,)
    return kept


@triton.jit
def _union(a, b):
    return a | b


@triton.jit
def buckets_of(labels, SHIFT: tl.constexpr):
    """A bit for each of up to 32 ranges of 2^SHIFT classes: none of a program's labels lies in a
    range whose bit is not set."""
    buckets = tl.zeros_like(labels[0])
    for pixel in tl.static_range(len(labels)):
        buckets = buckets | (1 << ((labels[pixel] >> SHIFT) & 31))
    return tl.reduce(buckets, 0, _union)


@triton.jit
def pixels_of(planes, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """The pixels of class c: a word [BLOCK] for each four rows, laid out as the planes."""
    c = tl.cast(c, tl.int32)
    pixels = ()
    for quad in tl.static_range((ROWS + 3) // 4):
        same = tl.full(planes[0].shape, _cover(quad, ROWS, COLUMNS), tl.int32)
        for b in tl.static_range(BITS):
            same = same & ~(planes[quad * BITS + b] ^ ((c << (31 - b)) >> 31))
        pixels = pixels + (same,)
    return pixels


@triton.jit
def labelled_pixels(planes, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """The pixels that have a label, laid out as the planes."""
    pixels = ()
    for quad in tl.static_range((ROWS + 3) // 4):
        none = planes[quad * BITS]
        for b in tl.static_range(1, BITS):
            none = none & planes[quad * BITS + b]
        pixels = pixels + ((none ^ -1) & _cover(quad, ROWS, COLUMNS),)
    return pixels


@triton.constexpr_function
def pixel_bit(r: int, k: int) -> int:
    """The bit of pixel (r, k) in its word."""
    return _word(1 << (8 * (r % 4) + k))


@triton.jit
def moments_of(pixels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Moments (3) of pixels, float32 [BLOCK]: the sums of 1, r, k, r k."""
    count = 0
    by_row = 0
    by_column = 0
    by_both = 0
    for quad in tl.static_range((ROWS + 3) // 4):
        # in every byte (row): n, how many bits are set; k, the sum of their positions
        word = pixels[quad].to(tl.uint32, bitcast=True)
        odd = (word >> 1) & 0x55555555
        pairs = word - odd
        odd = (odd & 0x33333333) + ((odd >> 2) & 0x33333333)
        high = (pairs >> 2) & 0x33333333
        n = (pairs & 0x33333333) + high
        if COLUMNS <= 4:
            k = odd + 2 * high
        else:
            upper = (n >> 4) & 0x0F0F0F0F
            n = (n & 0x0F0F0F0F) + upper
            k = (odd + (odd >> 4)) & 0x0F0F0F0F
            k += 2 * ((high + (high >> 4)) & 0x0F0F0F0F) + 4 * upper
        # sums of the four bytes, times 1 or the row; none passes 168, so no carry
        n_all = ((n * 0x01010101) >> 24).to(tl.int32)
        k_all = ((k * 0x01010101) >> 24).to(tl.int32)
        count += n_all
        by_column += k_all
        by_row += ((n * 0x00010203) >> 24).to(tl.int32) + 4 * quad * n_all
        by_both += ((k * 0x00010203) >> 24).to(tl.int32) + 4 * quad * k_all
    return (
        count.to(tl.float32),
        by_row.to(tl.float32),
        by_column.to(tl.float32),
        by_both.to(tl.float32),
    )


@triton.jit
def add_bad_labels(count_ptr, index_ptr, count, index):
    """Adds bad labels of lanes to a program's count and lowest flat index, which it keeps in memory
    because they hardly ever change."""
    tl.debug_barrier()  # between a store and the loads of other threads
    before = tl.load(count_ptr)
    first = tl.load(index_ptr)
    tl.debug_barrier()
    tl.store(count_ptr, before + tl.sum(count, 0))
    tl.store(index_ptr, tl.minimum(first, tl.min(index, 0)))


@triton.jit
def count_bad_labels(
    target_ptr, offs, stride_h, stride_w, flat, W, rows, columns, C, ignore_index, some_bad,
    bad_count_ptr, bad_index_ptr, pixel_loss_ptr, loss_offs, stride_loss_h, stride_loss_w,
    MARK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Reads the labels again if any is bad: how many, and the lowest flat index. MARK: their losses
    become NaN."""
    if tl.max(some_bad, 0) > 0:  # hardly ever
        bad_index = tl.full(offs.shape, NO_INDEX, tl.int64)
        for pixel in range(tl.minimum(tl.max(rows, 0), ROWS) * COLUMNS):
            row = pixel // COLUMNS
            k = pixel % COLUMNS
            here = (row < rows) & (k < columns)
            step = tl.cast(row, tl.int64) * stride_h + tl.cast(k, tl.int64) * stride_w
            _, _, bad = _load_label(target_ptr, offs + step, here, C, ignore_index)
            here_flat = flat + tl.cast(row, tl.int64) * W + k
            bad_index = tl.minimum(bad_index, tl.where(bad, here_flat, NO_INDEX))
            if MARK:
                step = tl.cast(row, tl.int64) * stride_loss_h + tl.cast(k, tl.int64) * stride_loss_w
                nan = tl.full(offs.shape, float("nan"), tl.float32)
                tl.store(pixel_loss_ptr + loss_offs + step, nan, mask=bad)
        add_bad_labels(bad_count_ptr, bad_index_ptr, some_bad, bad_index)
