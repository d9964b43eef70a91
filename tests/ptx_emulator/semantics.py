"""What instructions compute, over arrays of lanes. Names here are visible to translated code."""

from __future__ import annotations

from typing import Any

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
where, copyto, full = np.where, np.copyto, np.full
TINY = f4(2.0**-126)


def ftz(x: Any) -> Any:
    """Subnormal float32 -> zero of its sign."""
    small = np.abs(x) < TINY
    if small.any():
        return where(small, np.copysign(f4(0), x), x)
    return x


def sat(x: Any) -> Any:
    """To [0, 1], NaN to 0."""
    return np.fmax(np.fmin(x, x.dtype.type(1)), x.dtype.type(0))


def fma32(a: Any, b: Any, c: Any) -> Any:
    """One rounding, but for ties of the sum in float64: the product is exact there."""
    return (np.multiply(a, b, dtype=f8) + c).astype(f4)


def fma64(a: Any, b: Any, c: Any) -> Any:
    """One rounding: error-free product and sum, then the sum of the parts."""
    a, b, c = np.broadcast_arrays(*(np.asarray(x, f8) for x in (a, b, c)))
    split = 134217729.0
    ah = a * split
    ah = ah - (ah - a)
    bh = b * split
    bh = bh - (bh - b)
    al, bl = a - ah, b - bh
    p = a * b
    e = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s = p + c
    t = s - p
    low = (p - (s - t)) + (c - t)
    exact = s + (low + e)
    return where(np.isfinite(exact), exact, s)


def fma16(a: Any, b: Any, c: Any) -> Any:
    """a b + c in half precision, rounded once."""
    return (a.astype(f8) * b.astype(f8) + c.astype(f8)).astype(f2)


def from_bf16(x: Any) -> Any:
    """Bits of bfloat16 -> float32."""
    return (x.astype(u4) << 16).view(f4)


def to_bf16(x: Any, mode: str = "rn") -> Any:
    """float32 -> bits of bfloat16."""
    bits = np.ascontiguousarray(x, f4).view(u4)
    out = (bits if mode == "rz" else bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return where(np.isnan(x), u4(0x7FFF), out).astype(u2)


def bf16_of_f64(x: Any) -> Any:
    """One rounding: to odd in float32 first."""
    near = x.astype(f4)
    bits = near.view(u4).copy()
    wide = near.astype(f8)
    inexact = (wide != x) & np.isfinite(x)
    away = inexact & (np.abs(wide) > np.abs(x))
    bits = where(away, bits - 1, bits)
    bits = where(inexact, bits | 1, bits)
    return to_bf16(bits.view(f4))


def to_tf32(x: Any) -> Any:
    """rna: nearest, ties away from zero."""
    bits = x.view(u4)
    return where(np.isfinite(x), (bits + 0x1000) & u4(0xFFFFE000), bits)


def fmin(a: Any, b: Any) -> Any:
    """The smaller; a number where the other is NaN."""
    out = np.fmin(a, b)
    zero = out == 0
    if zero.any():  # -0 < +0
        signed = np.signbit(a) & (a == 0) | np.signbit(b) & (b == 0)
        out = where(zero, where(signed, out.dtype.type(-0.0), out.dtype.type(0)), out)
    return out


def fmax(a: Any, b: Any) -> Any:
    """The larger; a number where the other is NaN."""
    out = np.fmax(a, b)
    zero = out == 0
    if zero.any():
        plus = ~np.signbit(a) & (a == 0) | ~np.signbit(b) & (b == 0)
        out = where(zero, where(plus, out.dtype.type(0), out.dtype.type(-0.0)), out)
    return out


def fmin_nan(a: Any, b: Any) -> Any:
    """The smaller; NaN where either is."""
    return where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), fmin(a, b))


def fmax_nan(a: Any, b: Any) -> Any:
    """The larger; NaN where either is."""
    return where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), fmax(a, b))


def div_int(a: Any, b: Any) -> Any:
    """Towards zero; all ones where b is 0."""
    zero = b == 0
    if a.dtype.kind == "u":
        out = a // where(zero, a.dtype.type(1), b)
    else:
        safe = where(zero, a.dtype.type(1), b)
        out = a // safe
        rest = a - out * safe
        out = out + ((rest != 0) & (out < 0)).astype(a.dtype)
    return where(zero, a.dtype.type(-1 if a.dtype.kind == "i" else np.iinfo(a.dtype).max), out)


def rem_int(a: Any, b: Any) -> Any:
    """The rest of ``div_int``; a where b is 0."""
    zero = b == 0
    safe = where(zero, a.dtype.type(1), b)
    return where(zero, a, a - div_int(a, safe) * safe)


def mul_hi(a: Any, b: Any) -> Any:
    """The upper half of the product."""
    kind = a.dtype
    if kind.itemsize <= 4:
        wide = np.dtype(f"{kind.kind}8")
        return (a.astype(wide) * np.asarray(b).astype(wide) >> (8 * kind.itemsize)).astype(kind)
    # 64 bits: by halves, unsigned, then the signed correction
    b = np.broadcast_to(np.asarray(b, kind), a.shape)
    x, y = a.view(u8), np.ascontiguousarray(b).view(u8)
    low = u8(0xFFFFFFFF)
    x0, x1, y0, y1 = x & low, x >> u8(32), y & low, y >> u8(32)
    mid = x1 * y0 + (x0 * y0 >> u8(32))
    mid2 = x0 * y1 + (mid & low)
    high = x1 * y1 + (mid >> u8(32)) + (mid2 >> u8(32))
    if kind.kind == "i":
        high = high - where(a < 0, y, u8(0)) - where(b < 0, x, u8(0))
    return high.view(kind)


def to_int(x: Any, kind: Any, mode: str) -> Any:
    """Float -> integer, saturating, NaN to 0."""
    x = x.astype(f8)
    if mode == "rzi":
        x = np.trunc(x)
    elif mode == "rni":
        x = np.rint(x)
    elif mode == "rmi":
        x = np.floor(x)
    else:
        x = np.ceil(x)
    info = np.iinfo(kind)
    nan = np.isnan(x)
    low, high = x <= float(info.min), x >= float(info.max)
    safe = where(nan | low | high, 0.0, x).astype(kind)
    out = where(low, kind(info.min), where(high, kind(info.max), safe))
    return where(nan, kind(0), out).astype(kind)


def round_to_integral(x: Any, mode: str) -> Any:
    """To an integer, as a float."""
    kind = x.dtype
    done = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode](x)
    return done.astype(kind)


def narrow(x: Any, mode: str) -> Any:
    """float64 -> float32 with rounding mode rn, rz, rm or rp."""
    near = x.astype(f4)
    if mode == "rn":
        return near
    wide = near.astype(f8)
    if mode == "rz":
        fix = np.abs(wide) > np.abs(x)
        towards = f4(0)
    elif mode == "rm":
        fix, towards = wide > x, f4(-np.inf)
    else:
        fix, towards = wide < x, f4(np.inf)
    return where(fix & np.isfinite(x), np.nextafter(near, towards), near)


def approx(function: Any, x: Any, flush: bool) -> Any:
    """Through float64, rounded once: better than the device, within its documented bound."""
    if flush:
        x = ftz(x)
    out = function(x.astype(f8)).astype(f4)
    return ftz(out) if flush else out


def rsqrt(x: Any) -> Any:
    return 1.0 / np.sqrt(x)


def rcp(x: Any) -> Any:
    return 1.0 / x


POPCOUNT = np.array([bin(i).count("1") for i in range(256)], u4)


def popc(x: Any) -> Any:
    """Bits set."""
    return POPCOUNT[x.view(u1).reshape(len(x), -1)].sum(1, dtype=u4)


def clz(x: Any) -> Any:
    """Zeros before the first bit set."""
    bits = 8 * x.dtype.itemsize
    out = np.full(len(x), bits, u4)
    for bit in range(bits):
        out = where((x >> x.dtype.type(bit)) & x.dtype.type(1) != 0, u4(bits - 1 - bit), out)
    return out


def bfind(x: Any, signed: bool, shiftamt: bool) -> Any:
    """Position of the first bit that is no sign; all ones where there is none."""
    if signed:
        x = where(x.view(f"i{x.dtype.itemsize}") < 0, ~x, x)
    lead = clz(x)
    bits = u4(8 * x.dtype.itemsize)
    none = lead == bits
    return where(none, u4(0xFFFFFFFF), lead if shiftamt else bits - u4(1) - lead)


def brev(x: Any) -> Any:
    """Bits in the opposite order."""
    kind = x.dtype.type
    out = np.zeros_like(x)
    bits = 8 * x.dtype.itemsize
    for bit in range(bits):
        out |= ((x >> kind(bit)) & kind(1)) << kind(bits - 1 - bit)
    return out


def bfe(x: Any, start: Any, length: Any) -> Any:
    """x signed or unsigned; start, length uint32."""
    bits = 8 * x.dtype.itemsize
    start = np.broadcast_to(np.asarray(start, i8) & 255, x.shape)
    length = np.broadcast_to(np.asarray(length, i8) & 255, x.shape)
    wide = x.view(f"u{x.dtype.itemsize}").astype(u8)
    keep = np.minimum(length, bits)
    mask = where(keep >= 64, u8(0xFFFFFFFFFFFFFFFF), (u8(1) << keep.astype(u8)) - u8(1))
    field = where(start < bits, wide >> np.minimum(start, 63).astype(u8), u8(0)) & mask
    if x.dtype.kind == "i":
        sign_at = np.minimum(start + length - 1, bits - 1)
        sign = (wide >> np.maximum(sign_at, 0).astype(u8)) & u8(1)
        available = np.clip(bits - start, 0, keep)
        fill = where(available >= 64, u8(0), ~u8(0) << available.astype(u8))
        field = where((sign != 0) & (length > 0), field & ~fill | fill, field)
    return field.astype(f"u{x.dtype.itemsize}").view(x.dtype)


def bfi(a: Any, b: Any, start: Any, length: Any) -> Any:
    """b with ``length`` bits of a in it, from ``start`` on."""
    bits = 8 * b.dtype.itemsize
    start = np.broadcast_to(np.asarray(start, i8) & 255, b.shape)
    length = np.minimum(np.broadcast_to(np.asarray(length, i8) & 255, b.shape), bits)
    ones = where(length >= 64, ~u8(0), (u8(1) << np.minimum(length, 63).astype(u8)) - u8(1))
    at = np.minimum(start, 63).astype(u8)
    mask = where(start < bits, ones << at, u8(0))
    out = (b.astype(u8) & ~mask) | ((np.asarray(a).astype(u8) << at) & mask)
    return out.astype(b.dtype)


def prmt(a: Any, b: Any, selector: Any) -> Any:
    """Bytes of (b, a) picked by four selector nibbles; the nibble's top bit copies the sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    out = np.zeros(both.shape, u4)
    for k in range(4):
        nibble = (selector >> u4(4 * k)) & u4(15)
        byte = (both >> (u8(8) * (nibble & u4(7)).astype(u8))).astype(u4) & u4(255)
        sign = where(byte & u4(128) != 0, u4(255), u4(0))
        out |= where(nibble & u4(8) != 0, sign, byte) << u4(8 * k)
    return out


def lop3(a: Any, b: Any, c: Any, table: int) -> Any:
    """Any function of three bits, by its table of eight."""
    out = np.zeros(np.broadcast(a, b, c).shape, u4)
    for k in range(8):
        if table >> k & 1:
            out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return out


def funnel(a: Any, b: Any, amount: Any, left: bool, clamp: bool) -> Any:
    """shf: the words (b, a) shifted; high word for left, low word for right."""
    n = np.asarray(amount).astype(u4)
    n = np.minimum(n, u4(32)) if clamp else n & u4(31)
    both = np.asarray(a).astype(u8) | (np.asarray(b).astype(u8) << u8(32))
    if left:
        return ((both << n.astype(u8)) >> u8(32)).astype(u4)
    return (both >> n.astype(u8)).astype(u4)


def combine(low: Any, high: Any) -> Any:
    """A 64-bit word from two of 32."""
    return low.astype(u8) | (high.astype(u8) << u8(32))


# --- matrix fragments -----------------------------------------------------------------------------


def _lanes() -> tuple[Any, Any]:
    lane = np.arange(32)
    return lane >> 2, lane & 3


def _halves(register: Any, kind: str) -> Any:
    """[warps, 32, 2] float64 from packed 16-bit pairs."""
    pair = np.ascontiguousarray(register).view(u2).reshape(-1, 32, 2)
    return (from_bf16(pair) if kind == "bf16" else pair.view(f2)).astype(f8)


def _words(register: Any) -> Any:
    """[warps, 32] float64 from TF32: the tensor core ignores the low 13 bits."""
    return (register.view(u4) & u4(0xFFFFE000)).view(f4).reshape(-1, 32).astype(f8)


def fragment_a(registers: list[Any], kind: str) -> Any:
    """A [warps, 16, k] of mma.m16n8k* from its registers."""
    row, quad = _lanes()
    if kind == "tf32":
        out = np.zeros((len(registers[0]) // 32, 16, 2 * len(registers)), f8)
        for r, register in enumerate(registers):
            out[:, row + 8 * (r & 1), quad + 4 * (r >> 1)] = _words(register)
    else:
        out = np.zeros((len(registers[0]) // 32, 16, 4 * len(registers)), f8)
        for r, register in enumerate(registers):
            pair = _halves(register, kind)
            for e in range(2):
                out[:, row + 8 * (r & 1), 2 * quad + 8 * (r >> 1) + e] = pair[:, :, e]
    return out


def fragment_b(registers: list[Any], kind: str) -> Any:
    """B [warps, k, 8]."""
    column, quad = _lanes()
    step = 4 if kind == "tf32" else 8
    out = np.zeros((len(registers[0]) // 32, step * len(registers), 8), f8)
    for r, register in enumerate(registers):
        if kind == "tf32":
            out[:, quad + 4 * r, column] = _words(register)
        else:
            pair = _halves(register, kind)
            for e in range(2):
                out[:, 2 * quad + 8 * r + e, column] = pair[:, :, e]
    return out


def mma(kind: str, accumulator: str, a: list[Any], b: list[Any], c: list[Any]) -> list[Any]:
    """Registers of D = A B + C for mma.m16n8k*: sums in float64, rounded once."""
    product = fragment_a(a, kind) @ fragment_b(b, kind)
    row, quad = _lanes()
    out = []
    if accumulator == "f32":
        for r, register in enumerate(c):
            part = product[:, row + 8 * (r >> 1), 2 * quad + (r & 1)]
            out.append((part.reshape(-1) + register.view(f4)).astype(f4))
    else:
        for r, register in enumerate(c):
            pair = _halves(register, "f16")
            part = np.stack([product[:, row + 8 * r, 2 * quad + e] for e in range(2)], -1)
            out.append(np.ascontiguousarray((part + pair).astype(f2)).reshape(-1, 2).view(u4)[:, 0])
    return out
