"""Types of PTX as numpy names them, their sizes, and what registers of a type are kept as."""

from __future__ import annotations

DTYPES = {
    "u8": "u1",
    "s8": "i1",
    "b8": "u1",
    "u16": "u2",
    "s16": "i2",
    "b16": "u2",
    "f16": "f2",
    "bf16": "u2",
    "u32": "u4",
    "s32": "i4",
    "b32": "u4",
    "f32": "f4",
    "tf32": "u4",
    "f16x2": "u4",
    "bf16x2": "u4",
    "u64": "u8",
    "s64": "i8",
    "b64": "u8",
    "f64": "f8",
    "pred": "b1",
}
SIZE = {
    "b1": 1,
    "u1": 1,
    "i1": 1,
    "u2": 2,
    "i2": 2,
    "f2": 2,
    "u4": 4,
    "i4": 4,
    "f4": 4,
    "u8": 8,
    "i8": 8,
    "f8": 8,
}
STORAGE = {
    "pred": "b1",
    "b8": "u1",
    "u8": "u1",
    "s8": "u1",
    "b16": "u2",
    "u16": "u2",
    "s16": "u2",
    "f16": "u2",
    "bf16": "u2",
    "f32": "f4",
    "f64": "f8",
}
