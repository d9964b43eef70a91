"""Translates moves, selections and what works on bits."""

from __future__ import annotations

import numpy as np

from tests.ptx_emulator.element_types import DTYPES, SIZE
from tests.ptx_emulator.operands import Operands
from tests.ptx_emulator.parser import (
    Imm,
    Instruction,
    Reg,
    Special,
    Vector,
)


class Bits(Operands):
    """Instructions that move or change bits."""

    def op_mov(self, ins: Instruction) -> None:
        target, source = ins.operands
        kind = DTYPES[ins.op[-1]]
        size = SIZE[kind]
        if isinstance(source, Vector):  # pack, the lowest first
            part = size // len(source.items)
            terms = []
            for i, item in enumerate(source.items):
                piece = f"{self.src(item, f'u{part}')}.astype(u{size})"
                terms.append(f"({piece} << {8 * part * i})" if i else piece)
            self.put(target, " | ".join(terms), f"u{size}")
        elif isinstance(target, Vector):  # unpack
            part = size // len(target.items)
            text = self.src(source, f"u{size}")
            self.emit(f"t = {text}")
            for i, item in enumerate(target.items):
                shifted = f"(t >> {8 * part * i})" if i else "t"
                self.put(item, f"{shifted}.astype(u{part})", f"u{part}")
        else:
            if isinstance(source, Reg) and isinstance(target, Reg):
                kind = self.storage[self.slots[target]]
            elif isinstance(source, Special):
                kind = f"u{size}"
            self.put(target, self.src(source, kind), kind, fresh=False)

    def op_selp(self, ins: Instruction) -> None:
        target, a, b, p = ins.operands
        kind = DTYPES[ins.op[-1]]
        if ins.op[-1] in ("b32", "b64") and self.storage[self.slots[target]][0] == "f":
            kind = self.storage[self.slots[target]]
        self.put(
            target, f"where({self.src(p, 'b1')}, {self.src(a, kind)}, {self.src(b, kind)})", kind
        )

    def op_slct(self, ins: Instruction) -> None:
        target, a, b, c = ins.operands
        kind, test = DTYPES[ins.op[-2]], DTYPES[ins.op[-1]]
        self.put(
            target,
            f"where({self.src(c, test)} >= 0, {self.src(a, kind)}, {self.src(b, kind)})",
            kind,
        )

    def op_cvta(self, ins: Instruction) -> None:
        target, source = ins.operands
        kind = DTYPES[ins.op[-1]]
        text = self.src(source, kind)
        if "shared" in ins.op:
            sign = "-" if "to" in ins.op else "+"
            text = f"{text} {sign} {self.constant(np.uint64(self.symbols['window']))}"
        self.put(target, text, kind, fresh=False)

    def op_createpolicy(self, ins: Instruction) -> None:
        self.put(ins.operands[0], "u8(0)", "u8")

    def op_prmt(self, ins: Instruction) -> None:
        target, a, b, c = ins.operands
        if len(ins.op) > 2:
            return self.unsupported()
        a, b, c = (self.src(x, "u4") for x in (a, b, c))
        self.put(target, f"prmt({a}, {b}, {c})", "u4")

    def bitwise(self, ins: Instruction, text: str) -> None:
        """An expression of {a} and {b}."""
        target, *sources = ins.operands
        dtype = DTYPES[ins.op[-1]]
        values = {n: self.src(s, dtype) for n, s in zip("ab", sources, strict=False)}
        self.put(target, text.format(**values), dtype)

    def op_and(self, ins: Instruction) -> None:
        self.bitwise(ins, "{a} & {b}")

    def op_or(self, ins: Instruction) -> None:
        self.bitwise(ins, "{a} | {b}")

    def op_xor(self, ins: Instruction) -> None:
        self.bitwise(ins, "{a} ^ {b}")

    def op_not(self, ins: Instruction) -> None:
        self.bitwise(ins, "~{a}")

    def op_shl(self, ins: Instruction) -> None:
        self.shift(ins, "<<")

    def op_shr(self, ins: Instruction) -> None:
        self.shift(ins, ">>")

    def shift(self, ins: Instruction, sign: str) -> None:
        """numpy shifts as PTX does past the width: zeros, or the sign."""
        target, a, n = ins.operands
        kind = ins.op[-1]
        dtype = DTYPES[kind]
        if isinstance(n, Imm):
            amount = str(min(n.bits & 0xFFFFFFFF, 8 * SIZE[dtype]))
            if amount == str(8 * SIZE[dtype]) and dtype[0] == "i":
                amount = str(8 * SIZE[dtype] - 1)
            amount = f"{dtype}({amount})"
        elif SIZE[dtype] == 4:
            amount = self.src(n, dtype)
        else:
            amount = f"{self.src(n, 'u4')}.astype({dtype})"
        self.put(target, f"{self.array(a, dtype)} {sign} {amount}", dtype)

    def op_popc(self, ins: Instruction) -> None:
        self.put(ins.operands[0], f"popc({self.array(ins.operands[1], DTYPES[ins.op[-1]])})", "u4")

    def op_clz(self, ins: Instruction) -> None:
        self.put(ins.operands[0], f"clz({self.array(ins.operands[1], DTYPES[ins.op[-1]])})", "u4")

    def op_brev(self, ins: Instruction) -> None:
        kind = DTYPES[ins.op[-1]]
        self.put(ins.operands[0], f"brev({self.array(ins.operands[1], kind)})", kind)

    def op_bfind(self, ins: Instruction) -> None:
        kind = ins.op[-1]
        size = SIZE[DTYPES[kind]]
        a = self.array(ins.operands[1], f"u{size}")
        self.put(ins.operands[0], f"bfind({a}, {kind[0] == 's'}, {'shiftamt' in ins.op})", "u4")

    def op_bfe(self, ins: Instruction) -> None:
        target, a, b, c = ins.operands
        kind = DTYPES[ins.op[-1]]
        self.put(
            target, f"bfe({self.array(a, kind)}, {self.src(b, 'u4')}, {self.src(c, 'u4')})", kind
        )

    def op_bfi(self, ins: Instruction) -> None:
        target, a, b, c, d = ins.operands
        kind = DTYPES[ins.op[-1]]
        self.put(
            target,
            f"bfi({self.array(a, kind)}, {self.array(b, kind)}, {self.src(c, 'u4')}, "
            f"{self.src(d, 'u4')})",
            kind,
        )

    def op_lop3(self, ins: Instruction) -> None:
        target, a, b, c, table = ins.operands[:5]
        a, b, c = (self.src(x, "u4") for x in (a, b, c))
        self.put(target, f"lop3({a}, {b}, {c}, {table.bits})", "u4")

    def op_shf(self, ins: Instruction) -> None:
        target, a, b, c = ins.operands
        a, b, c = (self.src(x, "u4") for x in (a, b, c))
        self.put(target, f"funnel({a}, {b}, {c}, {ins.op[1] == 'l'}, {ins.op[2] == 'clamp'})", "u4")
