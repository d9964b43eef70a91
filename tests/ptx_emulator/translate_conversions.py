"""Translates comparisons and conversions."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx_emulator.element_types import DTYPES
from tests.ptx_emulator.operands import Operands
from tests.ptx_emulator.parser import (
    Instruction,
    Pair,
)

COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
UNORDERED = {
    "equ": "~(({a} < {b}) | ({a} > {b}))",
    "neu": "{a} != {b}",
    "ltu": "~({a} >= {b})",
    "leu": "~({a} > {b})",
    "gtu": "~({a} <= {b})",
    "geu": "~({a} < {b})",
    "num": "({a} == {a}) & ({b} == {b})",
    "nan": "({a} != {a}) | ({b} != {b})",
}


class Conversions(Operands):
    """Instructions that compare or convert numbers."""

    def compare(self, ins: Instruction, name: str, kind: str, a: Any, b: Any) -> str:
        """Expression for a comparison, ordered or not."""
        if kind in ("f16", "bf16"):
            text: tuple[str, ...] = self.src(a, "u2"), self.src(b, "u2")
            if kind == "f16":
                text = tuple(f"np.asarray({t}).view(f2)" for t in text)
            else:
                text = tuple(f"from_bf16({t})" for t in text)
        else:
            dtype = DTYPES[kind]
            text = self.src(a, dtype), self.src(b, dtype)
            if "ftz" in ins.op:
                text = tuple(f"ftz({t})" for t in text)
        a, b = text
        if name in UNORDERED:
            return UNORDERED[name].format(a=a, b=b)
        if name == "ne" and kind in ("f16", "bf16", "f32", "f64"):
            return f"({a} < {b}) | ({a} > {b})"
        return f"{a} {COMPARE[name]} {b}"

    def op_setp(self, ins: Instruction) -> None:
        target, a, b, *rest = ins.operands
        name = ins.op[1]
        text = self.compare(ins, name, ins.op[-1], a, b)
        second = None
        if isinstance(target, Pair):
            target, second = target.first, target.second
        join = next((j for j in ("and", "or", "xor") if j in ins.op[2:]), None)
        sign = {"and": "&", "or": "|", "xor": "^"}.get(join or "")
        self.emit(f"t = {text}")
        if join:
            c = self.src(rest[0], "b1")
            first, other = f"t {sign} {c}", f"~t {sign} {c}"
        else:
            first, other = "t", "~t"
        if second is not None:
            self.emit(f"o = {other}")
        self.put(target, first, "b1")
        if second is not None:
            self.put(second, "o", "b1")

    def op_set(self, ins: Instruction) -> None:
        target, a, b, *rest = ins.operands
        if rest:
            return self.unsupported()
        text = self.compare(ins, ins.op[1], ins.op[-1], a, b)
        if ins.op[-2] == "f32":
            self.put(target, f"where({text}, f4(1), f4(0))", "f4")
        else:
            self.put(target, f"where({text}, u4(0xFFFFFFFF), u4(0))", "u4")

    def op_cvt(self, ins: Instruction) -> None:
        to, of = ins.op[-2], ins.op[-1]
        target, source, *more = ins.operands
        mode = next(
            (m for m in ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna") if m in ins.op),
            None,
        )
        if "relu" in ins.op or "satfinite" in ins.op:
            return self.unsupported()
        if to in ("f16x2", "bf16x2") and of == "f32":
            high, low = (self.array(x, "f4") for x in (source, more[0]))
            if to == "f16x2":
                high, low = (f"{x}.astype(f2).view(u2)" for x in (high, low))
            else:
                high, low = (f"to_bf16({x}, {mode!r})" for x in (high, low))
            self.put(target, f"({high}.astype(u4) << 16) | {low}", "u4")
            return
        if to == "tf32" and of == "f32":
            a = self.array(source, "f4")
            self.put(
                target, f"to_tf32({a})" if mode == "rna" else f"{a}.view(u4) & 0xFFFFE000", "u4"
            )
            return
        if to not in DTYPES or of not in DTYPES or "x2" in to + of:
            return self.unsupported()
        float_to, float_of = (
            to in ("f16", "bf16", "f32", "f64"),
            of in ("f16", "bf16", "f32", "f64"),
        )
        kind, have = DTYPES[to], DTYPES[of]
        if not float_of:
            a = self.array(source, have)
            if not float_to:
                if "sat" in ins.op:
                    info = np.iinfo(np.dtype(kind))
                    least = max(int(info.min), int(np.iinfo(np.dtype(have)).min))
                    most = min(int(info.max), int(np.iinfo(np.dtype(have)).max))
                    a = f"np.clip({a}, {least}, {most})"
                self.put(target, f"{a}.astype({kind})", kind)
            elif to == "bf16":
                self.put(target, f"bf16_of_f64({a}.astype(f8))", "u2")
            elif mode in ("rz", "rm", "rp") and to == "f32":
                self.put(target, f"narrow({a}.astype(f8), {mode!r})", "f4")
            else:
                self.put(target, f"{a}.astype({kind})", kind)
            return
        if of == "bf16":
            a = f"from_bf16({self.array(source, 'u2')})"
        elif of == "f16":
            a = f"{self.array(source, 'u2')}.view(f2)"
        else:
            a = self.array(source, have)
        if "ftz" in ins.op and of == "f32":
            a = f"ftz({a})"
        if not float_to:
            self.put(target, f"to_int({a}, {kind}, {mode!r})", kind)
        elif mode in ("rni", "rzi", "rmi", "rpi"):
            self.put(target, f"round_to_integral({a}, {mode!r}).astype({kind})", kind)
        elif to == "bf16":
            if of == "f64":
                return self.put(target, f"bf16_of_f64({a})", "u2")
            self.put(target, f"to_bf16({a}.astype(f4), {mode!r})", "u2")
        elif to == "f32" and of == "f64":
            text = f"narrow({a}, {mode!r})"
            self.put(target, f"ftz({text})" if "ftz" in ins.op else text, "f4")
        else:
            text = f"{a}.astype({kind})"
            self.put(target, f"sat({text})" if "sat" in ins.op else text, kind)
