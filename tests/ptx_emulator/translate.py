"""PTX blocks -> Python functions over numpy arrays of lanes.

A block becomes ``f(R, S, m)``: R the registers, arrays [lanes]; S the running batch (machine.py); m
the mask of active lanes, None in the variant for all lanes. It returns the next block, -1 at the
end, or (condition, block if true, block if false).
"""

from __future__ import annotations

import struct
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from tests.ptx_emulator import semantics
from tests.ptx_emulator.parser import (
    Address,
    Entry,
    Imm,
    Instruction,
    Pair,
    PtxError,
    Reg,
    Special,
    Symbol,
    Vector,
)

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
FLOATING = {
    "add",
    "sub",
    "mul",
    "fma",
    "mad",
    "div",
    "min",
    "max",
    "neg",
    "abs",
    "ex2",
    "lg2",
    "rcp",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "tanh",
    "selp",
    "copysign",
    "cvt",
}
NO_EFFECT = {
    "membar",
    "prefetch",
    "prefetchu",
    "griddepcontrol",
    "nanosleep",
    "setmaxnreg",
    "discard",
    "applypriority",
    "pmevent",
}
WARP_SYNC = {"shfl", "vote", "match", "redux", "mma", "ldmatrix", "stmatrix", "elect"}
TERMINATORS = {"bra", "ret", "exit", "trap"}
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


@dataclass
class Block:
    index: int
    code: list[Instruction]
    sync: str | None = None  # warp, group (of four warps) or cta
    full: object = None
    masked: object = None
    classes: dict[str, int] | None = None


def opcode_class(ins: Instruction) -> str:
    """What an instruction mostly costs."""
    op = ins.op
    base = op[0]
    if base in ("ld", "st", "atom", "red"):
        space = next(
            (
                p.split("::")[0]
                for p in op
                if p.split("::")[0] in ("global", "shared", "local", "param")
            ),
            "generic",
        )
        return f"{base}.{space}"
    if base in ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"):
        return "special function"
    if base == "div" or base == "rem":
        return "division"
    if base == "cvt":
        return "conversion"
    if base in ("mma", "wgmma", "cp", "ldmatrix", "stmatrix", "shfl", "redux"):
        return base
    if base in ("bar", "barrier"):
        return "barrier"
    if base in ("bra", "ret", "exit"):
        return "branch"
    if base in ("mov", "selp", "prmt", "cvta"):
        return "move, select"
    if base == "setp":
        return "compare"
    kind = op[-1]
    if kind in ("f32", "f16", "bf16", "f16x2", "bf16x2"):
        return {"fma": "fp32 fma", "mul": "fp32 mul", "add": "fp32 add", "sub": "fp32 add"}.get(
            base, "fp32 other"
        )
    if kind == "f64":
        return "fp64"
    return "integer 64" if kind in ("s64", "u64", "b64") else "integer"


def make_blocks(entry: Entry) -> tuple[list[Block], dict[str, int]]:
    blocks: list[Block] = [Block(0, [])]
    labels: dict[str, int] = {}

    def start() -> None:
        if blocks[-1].code:
            blocks.append(Block(len(blocks), []))

    for item in entry.code:
        if isinstance(item, str):
            start()
            labels[item] = blocks[-1].index
            continue
        sync = None
        if item.op[0] in WARP_SYNC or item.op[:2] == ["bar", "warp"]:
            sync = "warp"
        elif item.op[0] in ("bar", "barrier"):
            sync = "cta"
        elif item.op[:2] == ["wgmma", "mma_async"]:
            sync = "group"
        if sync:
            start()
            blocks[-1].sync = sync
        blocks[-1].code.append(item)
        if item.op[0] in TERMINATORS:
            start()
    if not blocks[-1].code:
        blocks[-1].code.append(Instruction(["ret"], [], None, False, "end", "ret"))
    for block in blocks:
        classes: dict[str, int] = defaultdict(int)
        for ins in block.code:
            classes[opcode_class(ins)] += 1
        block.classes = dict(classes)
    return blocks, labels


class Translator:
    def __init__(self, entry: Entry, symbols: dict[str, int]) -> None:
        self.entry = entry
        self.symbols = symbols  # addresses of shared, local, constant arrays
        self.blocks, self.labels = make_blocks(entry)
        self.slots: dict[Reg, int] = {}
        self.storage: list[str] = []
        self.namespace: dict[str, object] = {
            name: getattr(semantics, name) for name in dir(semantics) if not name.startswith("__")
        }
        self.namespace |= {"np": np, "b1": np.bool_}
        self.constants: dict[object, str] = {}
        self._choose_storage()
        self.read: set[Reg] = set()
        for ins in entry.code:
            if not isinstance(ins, str):
                for operand in ins.operands[1:]:
                    self._note_read(operand)
                if ins.op[0] in ("st", "red", "bra") and ins.operands:
                    self._note_read(ins.operands[0])
                if ins.predicate:
                    self.read.add(ins.predicate)

    def _note_read(self, operand) -> None:
        if isinstance(operand, Reg):
            self.read.add(operand)
        elif isinstance(operand, Address):
            self._note_read(operand.base)
        elif isinstance(operand, Vector):
            for item in operand.items:
                self._note_read(item)
        elif isinstance(operand, Pair):
            self._note_read(operand.second)

    # -- registers

    def _choose_storage(self) -> None:
        """Registers of 32 and 64 bits hold floats where every writer makes floats."""
        parent: dict[Reg, Reg] = {}

        def find(reg: Reg) -> Reg:
            while parent.get(reg, reg) != reg:
                reg = parent[reg]
            return reg

        votes: dict[Reg, set[str]] = defaultdict(set)
        pending = []
        for ins in self.entry.code:
            if isinstance(ins, str) or not ins.operands or ins.op[0] in ("st", "red", "bra"):
                continue
            target = ins.operands[0]
            targets = [target] if isinstance(target, Reg) else []
            if isinstance(target, Pair):
                targets = [t for t in (target.first, target.second) if isinstance(t, Reg)]
            if isinstance(target, Vector):
                targets = [t for t in target.items if isinstance(t, Reg)]
            vote = "u"
            if ins.op[0] == "mov" and targets == [target]:
                source = ins.operands[1]
                if isinstance(source, Reg):
                    a, b = find(target), find(source)
                    if a != b:
                        parent[a] = b
                    continue
                if isinstance(source, Imm) and (source.float_bits or source.bits == 0):
                    vote = "f" if source.float_bits else None
            elif ins.op[0] in FLOATING:
                kind = ins.op[-2] if ins.op[0] == "cvt" else ins.op[-1]
                vote = "f" if kind in ("f32", "f64") else "u"
            elif ins.op[0] in ("mma", "wgmma") and "f32" in ins.op and target is ins.operands[0]:
                vote = "f"
            for reg in targets:
                if vote:
                    pending.append((reg, vote))
        for reg, vote in pending:
            votes[find(reg)].add(vote)
        for reg in self.entry.registers.values():
            self.slots[reg] = len(self.storage)
            kind = STORAGE.get(reg.type)
            if kind is None:
                bits = reg.type[1:]
                size = {"32": "4", "64": "8"}.get(bits)
                if size is None:
                    raise PtxError(f"register of type {reg.type}")
                kind = ("f" if votes[find(reg)] == {"f"} else "u") + size
            self.storage.append(kind)

    def constant(self, value) -> str:
        key = (type(value).__name__, np.asarray(value).tobytes())
        if key not in self.constants:
            name = f"K{len(self.constants)}"
            self.constants[key] = name
            self.namespace[name] = value
        return self.constants[key]

    # -- operands

    def src(self, operand, kind: str) -> str:
        """Expression for an operand read as this dtype."""
        if isinstance(operand, Reg):
            self.vector = True
            slot = self.slots[operand]
            have = self.storage[slot]
            text = f"R[{slot}]"
            if have == kind:
                return text
            if SIZE[have] == SIZE[kind]:
                return f"{text}.view({kind})"
            if have[0] == "f":
                text = f"{text}.view(u{SIZE[have]})"
            if SIZE[have] < SIZE[kind]:  # wider than the register: zero-extended
                return f"{text}.astype(u{SIZE[kind]}).view({kind})"
            return f"{text}.astype(u{SIZE[kind]}).view({kind})"
        if isinstance(operand, Imm):
            if kind in ("f4", "f8"):
                if operand.float_bits == 32:
                    value = struct.unpack("<f", struct.pack("<I", operand.bits))[0]
                elif operand.float_bits == 64:
                    value = struct.unpack("<d", struct.pack("<Q", operand.bits))[0]
                elif kind == "f4":
                    value = np.uint32(operand.bits & 0xFFFFFFFF).view(np.float32)
                else:
                    value = np.uint64(operand.bits & (2**64 - 1)).view(np.float64)
                return self.constant(np.dtype(kind).type(value))
            if kind == "b1":
                return "b1(True)" if operand.bits else "b1(False)"
            bits = operand.bits & (2 ** (8 * SIZE[kind]) - 1)
            return self.constant(np.array(bits, f"u{SIZE[kind]}").view(kind)[()])
        if isinstance(operand, Special):
            self.vector = True
            name = operand.name
            return f"S.special({name!r})" + ("" if kind == "u4" else f".astype(u{SIZE[kind]})")
        if isinstance(operand, Symbol) and operand.name in self.symbols:
            return self.constant(np.array(self.symbols[operand.name], f"u{SIZE[kind]}")[()])
        if isinstance(operand, Pair) and operand.first == "not":
            return f"~{self.src(operand.second, kind)}"
        raise PtxError(f"operand {operand} in {self.ins.text}")

    def address(self, operand) -> str:
        base = operand.base
        if isinstance(base, Reg):
            text = self.src(base, f"u{SIZE[self.storage[self.slots[base]]]}")
            if operand.offset:
                sign = "+" if operand.offset > 0 else "-"
                text = f"{text} {sign} {abs(operand.offset)}"
            return text
        if isinstance(base, Symbol) and base.name in self.symbols:
            return f"full(S.n, {self.symbols[base.name] + operand.offset}, u8)"
        if isinstance(base, Imm):
            return f"full(S.n, {base.bits + operand.offset}, u8)"
        raise PtxError(f"address {operand} in {self.ins.text}")

    def put(self, target, text: str, kind: str, fresh: bool = True) -> None:
        """Write an expression of this dtype; ``fresh`` if nobody else holds its array."""
        if isinstance(target, Symbol) and target.name == "_":
            return
        if not isinstance(target, Reg):
            raise PtxError(f"target {target} in {self.ins.text}")
        slot = self.slots[target]
        want = self.storage[slot]
        if kind != want:
            if SIZE[kind] == SIZE[want]:
                text = f"({text}).view({want})"
            else:  # a wider register takes the sign or zeros; a narrower one what fits
                wide = f"{kind[0] if kind[0] in 'iu' else 'u'}{SIZE[want]}"
                if kind[0] == "f":
                    text = f"({text}).view(u{SIZE[kind]})"
                text = f"({text}).astype({wide}).view({want})"
                fresh = True
        if self.mask is not None:
            self.emit(f"copyto(R[{slot}], {text}, where={self.mask})")
        elif not self.vector:
            self.emit(f"R[{slot}] = full(S.n, {text}, {want})")
        elif fresh:
            self.emit(f"R[{slot}] = {text}")
        else:
            self.emit(f"R[{slot}] = ({text}).copy()")

    # -- blocks

    def emit(self, line: str) -> None:
        self.lines.append("    " + line)

    def function(self, index: int, masked: bool):
        block = self.blocks[index]
        source = self.source(index, masked)
        scope: dict[str, object] = {}
        exec(
            compile(source, f"<block {index} of {self.entry.name}>", "exec"), self.namespace, scope
        )
        function = scope["block"]
        if masked:
            block.masked = function
        else:
            block.full = function
        return function

    def source(self, index: int, masked: bool) -> str:
        block = self.blocks[index]
        self.lines: list[str] = []
        self.masked = masked
        ended = False
        for ins in block.code:
            self.ins = ins
            self.name = self.constant_object(ins)
            self.vector = False
            self.mask = "m" if masked else None
            if ins.op[0] in TERMINATORS:
                ended = self.terminate(ins, index)
                break
            if ins.predicate is not None:
                truth = f"R[{self.slots[ins.predicate]}]"
                if ins.negated:
                    truth = "~" + truth
                self.emit(f"k = m & {truth}" if masked else f"k = {truth}")
                self.mask = "k"
            handler = getattr(self, "op_" + ins.op[0], None)
            if ins.op[0] in NO_EFFECT:
                continue
            if handler is None:
                self.unsupported()
            else:
                handler(ins)
        if not ended:
            self.emit(f"return {index + 1}")
        return "def block(R, S, m):\n" + "\n".join(self.lines) + "\n"

    def constant_object(self, ins: Instruction) -> str:
        name = f"I{ins.index}"
        self.namespace[name] = ins
        return name

    def unsupported(self) -> None:
        self.emit(f"raise NotImplementedError({f'{self.ins.text} ({self.ins.location})'!r})")

    def terminate(self, ins: Instruction, index: int) -> bool:
        if ins.op[0] == "trap":
            self.emit(f"S.found('trap', {self.name}, S.count(m), None)")
            target = -1
        elif ins.op[0] == "bra":
            target = self.labels[ins.operands[0].name]
        else:
            target = -1
        if ins.predicate is None:
            self.emit(f"return {target}")
            return True
        truth = f"R[{self.slots[ins.predicate]}]"
        if ins.negated:
            truth = "~" + truth
        if self.masked:
            self.emit(f"return ({truth}, {target}, {index + 1})")
        else:
            self.emit(f"return S.branch({truth}, {target}, {index + 1})")
        return True

    # -- moves and selections

    def op_mov(self, ins) -> None:
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

    def op_selp(self, ins) -> None:
        target, a, b, p = ins.operands
        kind = DTYPES[ins.op[-1]]
        if ins.op[-1] in ("b32", "b64") and self.storage[self.slots[target]][0] == "f":
            kind = self.storage[self.slots[target]]
        self.put(
            target, f"where({self.src(p, 'b1')}, {self.src(a, kind)}, {self.src(b, kind)})", kind
        )

    def op_slct(self, ins) -> None:
        target, a, b, c = ins.operands
        kind, test = DTYPES[ins.op[-2]], DTYPES[ins.op[-1]]
        self.put(
            target,
            f"where({self.src(c, test)} >= 0, {self.src(a, kind)}, {self.src(b, kind)})",
            kind,
        )

    def op_cvta(self, ins) -> None:
        target, source = ins.operands
        kind = DTYPES[ins.op[-1]]
        text = self.src(source, kind)
        if "shared" in ins.op:
            sign = "-" if "to" in ins.op else "+"
            text = f"{text} {sign} {self.constant(np.uint64(self.symbols['window']))}"
        self.put(target, text, kind, fresh=False)

    def op_createpolicy(self, ins) -> None:
        self.put(ins.operands[0], "u8(0)", "u8")

    def op_prmt(self, ins) -> None:
        target, a, b, c = ins.operands
        if len(ins.op) > 2:
            return self.unsupported()
        a, b, c = (self.src(x, "u4") for x in (a, b, c))
        self.put(target, f"prmt({a}, {b}, {c})", "u4")

    # -- arithmetic

    def arithmetic(self, ins, integer: str, single: str) -> None:
        """Two operands: ``integer`` and ``single`` are expressions of {a} and {b}."""
        target, a, b = ins.operands
        kind = ins.op[-1]
        if "cc" in ins.op:
            return self.unsupported()
        if kind[0] in "usb" and not kind.startswith("bf"):
            dtype = "u" + DTYPES[kind][1]
            self.put(target, integer.format(a=self.src(a, dtype), b=self.src(b, dtype)), dtype)
            return
        self.floating(ins, single, a, b)

    def floating(self, ins, text: str, *operands) -> None:
        """A float operation of any width, with ftz, saturation and rounding mode."""
        target, kind = ins.operands[0], ins.op[-1]
        names = dict(zip("abc", operands, strict=False))
        flush, mode = "ftz" in ins.op, next((m for m in ("rz", "rm", "rp") if m in ins.op), "rn")
        if kind == "f32":
            values = {n: self.src(o, "f4") for n, o in names.items()}
            if flush:
                values = {n: f"ftz({v})" for n, v in values.items()}
            if mode != "rn":
                values = {
                    n: f"f8({v})" if v[0] == "K" else f"{v}.astype(f8)" for n, v in values.items()
                }
                out = f"narrow({text.format(**values)}, {mode!r})"
            else:
                out = text.format(**values)
            if flush:
                out = f"ftz({out})"
            if "sat" in ins.op:
                out = f"sat({out})"
            self.put(target, out, "f4")
        elif kind == "f64":
            values = {n: self.src(o, "f8") for n, o in names.items()}
            self.put(target, text.replace("fma32", "fma64").format(**values), "f8")
        elif kind in ("f16", "f16x2"):
            dtype = DTYPES[kind]
            values = {
                n: f"np.asarray({self.src(o, f'u{SIZE[dtype]}')}).reshape(-1).view(f2)"
                for n, o in names.items()
            }
            out = text.replace("fma32", "fma16").format(**values)
            self.put(target, f"({out}).view(u{SIZE[dtype]})", f"u{SIZE[dtype]}")
        elif kind in ("bf16", "bf16x2"):
            size = SIZE[DTYPES[kind]]
            values = {
                n: f"from_bf16(np.asarray({self.src(o, f'u{size}')}).reshape(-1).view(u2))"
                ".astype(f8)"
                for n, o in names.items()
            }
            out = text.replace("fma32({a}, {b}, {c})", "{a} * {b} + {c}").format(**values)
            self.put(target, f"bf16_of_f64({out}).view(u{size})", f"u{size}")
        else:
            self.unsupported()

    def op_add(self, ins) -> None:
        self.arithmetic(ins, "{a} + {b}", "{a} + {b}")

    def op_sub(self, ins) -> None:
        self.arithmetic(ins, "{a} - {b}", "{a} - {b}")

    def op_mul(self, ins) -> None:
        target, a, b = ins.operands
        kind = ins.op[-1]
        if "wide" in ins.op:
            self.put(
                target,
                self.wide(kind, a, b),
                f"{kind[0]}{2 * SIZE[DTYPES[kind]]}".replace("s", "i"),
            )
        elif "hi" in ins.op:
            dtype = DTYPES[kind]
            self.put(target, f"mul_hi({self.src(a, dtype)}, {self.src(b, dtype)})", dtype)
        else:
            self.arithmetic(ins, "{a} * {b}", "{a} * {b}")

    def wide(self, kind: str, a, b) -> str:
        dtype = DTYPES[kind]
        twice = f"{dtype[0]}{2 * SIZE[dtype]}"
        return f"{self.src(a, dtype)}.astype({twice}) * {self.src(b, dtype)}.astype({twice})"

    def op_mad(self, ins) -> None:
        target, a, b, c = ins.operands
        kind = ins.op[-1]
        if kind[0] == "f":
            return self.op_fma(ins)
        if "cc" in ins.op:
            return self.unsupported()
        dtype = DTYPES[kind]
        if "wide" in ins.op:
            twice = f"{dtype[0]}{2 * SIZE[dtype]}"
            self.put(target, f"{self.wide(kind, a, b)} + {self.src(c, twice)}", twice)
        elif "hi" in ins.op:
            self.put(
                target,
                f"mul_hi({self.src(a, dtype)}, {self.src(b, dtype)}) + {self.src(c, dtype)}",
                dtype,
            )
        else:
            plain = "u" + dtype[1]
            self.put(
                target, f"{self.src(a, plain)} * {self.src(b, plain)} + {self.src(c, plain)}", plain
            )

    def op_fma(self, ins) -> None:
        if ins.op[-1] == "f32" and any(m in ins.op for m in ("rz", "rm", "rp")):
            return self.floating(ins, "{a} * {b} + {c}", *ins.operands[1:])
        self.floating(ins, "fma32({a}, {b}, {c})", *ins.operands[1:])

    def op_div(self, ins) -> None:
        target, a, b = ins.operands
        kind = ins.op[-1]
        if kind[0] == "f":
            return self.floating(ins, "{a} / {b}", a, b)
        dtype = DTYPES[kind]
        self.put(target, f"div_int({self.array(a, dtype)}, {self.src(b, dtype)})", dtype)

    def array(self, operand, dtype: str) -> str:
        text = self.src(operand, dtype)
        return text if isinstance(operand, Reg) else f"full(S.n, {text}, {dtype})"

    def op_rem(self, ins) -> None:
        target, a, b = ins.operands
        dtype = DTYPES[ins.op[-1]]
        self.put(target, f"rem_int({self.array(a, dtype)}, {self.src(b, dtype)})", dtype)

    def op_abs(self, ins) -> None:
        self.unary(ins, "np.abs({a})", "np.abs({a})")

    def op_neg(self, ins) -> None:
        self.unary(ins, "-{a}", "-{a}")

    def unary(self, ins, integer: str, single: str) -> None:
        target, a = ins.operands
        kind = ins.op[-1]
        if kind[0] in "us":
            self.put(target, integer.format(a=self.src(a, DTYPES[kind])), DTYPES[kind])
        elif kind in ("f16x2", "bf16x2", "bf16", "f16"):
            size = SIZE[DTYPES[kind]]
            sign = {2: 0x8000, 4: 0x80008000}[size]
            text = self.src(a, f"u{size}")
            operation = (
                f"{text} ^ {sign}"
                if ins.op[0] == "neg"
                else f"{text} & {sign ^ (2 ** (8 * size) - 1)}"
            )
            self.put(target, operation, f"u{size}")
        else:
            self.floating(ins, single, a)

    def op_min(self, ins) -> None:
        self.extreme(ins, "min")

    def op_max(self, ins) -> None:
        self.extreme(ins, "max")

    def extreme(self, ins, which: str) -> None:
        target, *sources = ins.operands
        kind = ins.op[-1]
        if kind[0] in "us":
            dtype = DTYPES[kind]
            a, b = (self.src(x, dtype) for x in sources)
            self.put(target, f"np.{which}imum({a}, {b})", dtype)
            return
        name = f"f{which}_nan" if "NaN" in ins.op else f"f{which}"
        text = f"{name}({{a}}, {{b}})"
        if len(sources) == 3:
            text = f"{name}({text}, {{c}})"
        if "xorsign" in ins.op:
            return self.unsupported()
        self.floating(ins, text, *sources)

    def op_copysign(self, ins) -> None:
        target, a, b = ins.operands
        dtype = DTYPES[ins.op[-1]]
        self.put(target, f"np.copysign({self.src(b, dtype)}, {self.src(a, dtype)})", dtype)

    def op_testp(self, ins) -> None:
        target, a = ins.operands
        dtype = DTYPES[ins.op[-1]]
        test = {
            "finite": "np.isfinite({a})",
            "infinite": "np.isinf({a})",
            "notanumber": "np.isnan({a})",
            "number": "~np.isnan({a})",
        }.get(ins.op[1])
        if test is None:
            return self.unsupported()
        self.put(target, test.format(a=self.src(a, dtype)), "b1")

    def special_function(self, ins, function: str) -> None:
        target, a = ins.operands
        kind = ins.op[-1]
        if kind == "f32":
            self.put(
                target,
                f"S.approximately(approx({function}, {self.src(a, 'f4')}, {'ftz' in ins.op}), "
                f"{'approx' in ins.op})",
                "f4",
            )
        elif kind == "f64":
            self.put(target, f"{function}({self.src(a, 'f8')})", "f8")
        else:
            self.unsupported()

    def op_ex2(self, ins) -> None:
        self.special_function(ins, "np.exp2")

    def op_lg2(self, ins) -> None:
        self.special_function(ins, "np.log2")

    def op_rcp(self, ins) -> None:
        self.special_function(ins, "rcp")

    def op_sqrt(self, ins) -> None:
        self.special_function(ins, "np.sqrt")

    def op_rsqrt(self, ins) -> None:
        self.special_function(ins, "rsqrt")

    def op_sin(self, ins) -> None:
        self.special_function(ins, "np.sin")

    def op_cos(self, ins) -> None:
        self.special_function(ins, "np.cos")

    def op_tanh(self, ins) -> None:
        self.special_function(ins, "np.tanh")

    # -- bits

    def bitwise(self, ins, text: str) -> None:
        target, *sources = ins.operands
        dtype = DTYPES[ins.op[-1]]
        values = {n: self.src(s, dtype) for n, s in zip("ab", sources, strict=False)}
        self.put(target, text.format(**values), dtype)

    def op_and(self, ins) -> None:
        self.bitwise(ins, "{a} & {b}")

    def op_or(self, ins) -> None:
        self.bitwise(ins, "{a} | {b}")

    def op_xor(self, ins) -> None:
        self.bitwise(ins, "{a} ^ {b}")

    def op_not(self, ins) -> None:
        self.bitwise(ins, "~{a}")

    def op_shl(self, ins) -> None:
        self.shift(ins, "<<")

    def op_shr(self, ins) -> None:
        self.shift(ins, ">>")

    def shift(self, ins, sign: str) -> None:
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

    def op_popc(self, ins) -> None:
        self.put(ins.operands[0], f"popc({self.array(ins.operands[1], DTYPES[ins.op[-1]])})", "u4")

    def op_clz(self, ins) -> None:
        self.put(ins.operands[0], f"clz({self.array(ins.operands[1], DTYPES[ins.op[-1]])})", "u4")

    def op_brev(self, ins) -> None:
        kind = DTYPES[ins.op[-1]]
        self.put(ins.operands[0], f"brev({self.array(ins.operands[1], kind)})", kind)

    def op_bfind(self, ins) -> None:
        kind = ins.op[-1]
        size = SIZE[DTYPES[kind]]
        a = self.array(ins.operands[1], f"u{size}")
        self.put(ins.operands[0], f"bfind({a}, {kind[0] == 's'}, {'shiftamt' in ins.op})", "u4")

    def op_bfe(self, ins) -> None:
        target, a, b, c = ins.operands
        kind = DTYPES[ins.op[-1]]
        self.put(
            target, f"bfe({self.array(a, kind)}, {self.src(b, 'u4')}, {self.src(c, 'u4')})", kind
        )

    def op_bfi(self, ins) -> None:
        target, a, b, c, d = ins.operands
        kind = DTYPES[ins.op[-1]]
        self.put(
            target,
            f"bfi({self.array(a, kind)}, {self.array(b, kind)}, {self.src(c, 'u4')}, "
            f"{self.src(d, 'u4')})",
            kind,
        )

    def op_lop3(self, ins) -> None:
        target, a, b, c, table = ins.operands[:5]
        a, b, c = (self.src(x, "u4") for x in (a, b, c))
        self.put(target, f"lop3({a}, {b}, {c}, {table.bits})", "u4")

    def op_shf(self, ins) -> None:
        target, a, b, c = ins.operands
        a, b, c = (self.src(x, "u4") for x in (a, b, c))
        self.put(target, f"funnel({a}, {b}, {c}, {ins.op[1] == 'l'}, {ins.op[2] == 'clamp'})", "u4")

    # -- comparison and conversion

    def compare(self, ins, name: str, kind: str, a, b) -> str:
        if kind in ("f16", "bf16"):
            text = self.src(a, "u2"), self.src(b, "u2")
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

    def op_setp(self, ins) -> None:
        target, a, b, *rest = ins.operands
        name = ins.op[1]
        text = self.compare(ins, name, ins.op[-1], a, b)
        second = None
        if isinstance(target, Pair):
            target, second = target.first, target.second
        join = next((j for j in ("and", "or", "xor") if j in ins.op[2:]), None)
        sign = {"and": "&", "or": "|", "xor": "^"}.get(join)
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

    def op_set(self, ins) -> None:
        target, a, b, *rest = ins.operands
        if rest:
            return self.unsupported()
        text = self.compare(ins, ins.op[1], ins.op[-1], a, b)
        if ins.op[-2] == "f32":
            self.put(target, f"where({text}, f4(1), f4(0))", "f4")
        else:
            self.put(target, f"where({text}, u4(0xFFFFFFFF), u4(0))", "u4")

    def op_cvt(self, ins) -> None:
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
                    low = max(int(info.min), int(np.iinfo(np.dtype(have)).min))
                    high = min(int(info.max), int(np.iinfo(np.dtype(have)).max))
                    a = f"np.clip({a}, {low}, {high})"
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

    # -- memory

    def space(self, ins) -> str:
        for part in ins.op:
            name = part.split("::")[0]
            if name in ("global", "shared", "local", "param", "const"):
                return name
        return "generic"

    def op_ld(self, ins) -> None:
        target, source = ins.operands[:2]
        kind = DTYPES[ins.op[-1]]
        size = SIZE[kind]
        targets = target.items if isinstance(target, Vector) else (target,)
        if self.space(ins) == "param":
            for i, item in enumerate(targets):
                self.vector = False
                offset = source.offset + i * size
                self.put(item, f"S.parameter({source.base.name!r}, {offset}, {kind})", kind)
            return
        self.emit(
            f"v = S.load({self.name}, {self.space(ins)!r}, {self.address(source)}, {self.mask}, "
            f"{size}, {len(targets)})"
        )
        self.vector = True
        for i, item in enumerate(targets):
            column = "v.reshape(-1)" if len(targets) == 1 else f"v[:, {i}].copy()"
            self.put(item, column if kind[0] == "u" else f"{column}.view({kind})", kind)

    def op_ldu(self, ins) -> None:
        self.op_ld(ins)

    def op_st(self, ins) -> None:
        target, source = ins.operands[:2]
        size = SIZE[DTYPES[ins.op[-1]]]
        sources = source.items if isinstance(source, Vector) else (source,)
        values = ", ".join(self.array(item, f"u{size}") for item in sources)
        self.emit(
            f"S.store({self.name}, {self.space(ins)!r}, {self.address(target)}, {self.mask}, "
            f"{size}, ({values},))"
        )

    def op_atom(self, ins) -> None:
        self.atomic(ins, ins.operands[0], ins.operands[1], ins.operands[2:])

    def op_red(self, ins) -> None:
        self.atomic(ins, None, ins.operands[0], ins.operands[1:])

    def atomic(self, ins, target, address, sources) -> None:
        operation = next(
            (
                p
                for p in ins.op
                if p in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
            ),
            None,
        )
        kind = ins.op[-1]
        if operation is None or kind not in DTYPES or "x2" in kind or isinstance(target, Vector):
            return self.unsupported()
        dtype = DTYPES[kind]
        values = ", ".join(
            self.array(s, f"u{SIZE[dtype]}") for s in sources if not isinstance(s, Symbol)
        )
        wanted = isinstance(target, Reg) and target in self.read
        self.emit(
            f"v = S.atomic({self.name}, {self.space(ins)!r}, {self.address(address)}, {self.mask}, "
            f"{operation!r}, {kind!r}, ({values},), {wanted})"
        )
        self.vector = True
        if wanted:
            self.put(target, "v", f"u{SIZE[dtype]}")

    def op_cp(self, ins) -> None:
        name = ins.op[2] if len(ins.op) > 2 else ""
        if ins.op[1] != "async" or name in ("bulk", "mbarrier") or "bulk" in ins.op:
            return self.unsupported()
        if name == "commit_group":
            self.emit(f"S.commit({self.mask})")
        elif name in ("wait_group", "wait_all"):
            count = ins.operands[0].bits if ins.operands else 0
            if name == "wait_all":
                self.emit(f"S.commit({self.mask})")
            self.emit(f"S.wait({self.name}, {self.mask}, {count})")
        else:
            target, source, size, *rest = ins.operands
            given = [r for r in rest if isinstance(r, Reg | Imm)]
            filled = self.array(given[0], "u4") if given else f"full(S.n, {size.bits}, u4)"
            self.emit(
                f"S.copy_async({self.name}, {self.address(target)}, {self.address(source)}, "
                f"{size.bits}, {filled}, {self.mask})"
            )

    # -- warps

    def op_shfl(self, ins) -> None:
        self.emit(f"S.meet({self.mask})")
        target, a, b, c, _members = ins.operands
        second = None
        if isinstance(target, Pair):
            target, second = target.first, target.second
        a = self.array(a, "u4")
        if isinstance(b, Imm) and isinstance(c, Imm):
            lanes = f"S.lanes_of({ins.op[2]!r}, {b.bits}, {c.bits})"
        else:
            lanes = f"S.lanes_for({ins.op[2]!r}, {self.array(b, 'u4')}, {self.array(c, 'u4')})"
        self.emit(f"j, ok = {lanes}")
        if self.mask is not None:
            self.emit(f"S.check_sources({self.name}, j, {self.mask})")
        self.vector = True
        self.put(target, f"{a}[j]", "u4")
        if second is not None:
            self.put(second, "ok", "b1", fresh=False)

    def op_vote(self, ins) -> None:
        self.emit(f"S.meet({self.mask})")
        target, p = ins.operands[:2]
        text = self.src(p, "b1")
        if isinstance(p, Imm):
            text = f"full(S.n, {text})"
        kind = "u4" if "ballot" in ins.op else "b1"
        self.vector = True
        self.put(target, f"S.vote({ins.op[2]!r}, {text}, {self.mask})", kind)

    def op_activemask(self, ins) -> None:
        self.vector = True
        self.put(ins.operands[0], f"S.vote('ballot', full(S.n, True), {self.mask})", "u4")

    def op_redux(self, ins) -> None:
        self.emit(f"S.meet({self.mask})")
        target, a = ins.operands[:2]
        kind = ins.op[-1]
        if kind == "f32":
            return self.unsupported()
        dtype = DTYPES[kind]
        self.put(target, f"S.redux({ins.op[2]!r}, {self.array(a, dtype)}, {self.mask})", dtype)

    def op_match(self, ins) -> None:
        self.emit(f"S.meet({self.mask})")
        target, a = ins.operands[:2]
        if ins.op[1] != "any":
            return self.unsupported()
        dtype = DTYPES[ins.op[-1]]
        self.put(target, f"S.match({self.array(a, dtype)}, {self.mask})", "u4")

    def op_elect(self, ins) -> None:
        target = ins.operands[0]
        self.vector = True
        self.emit(f"t = S.elect({self.mask})")
        if isinstance(target, Pair):
            self.put(target.second, "t", "b1")

    def op_bar(self, ins) -> None:
        if ins.op[1] == "warp":
            self.emit(f"S.sync_warp({self.mask})")
        elif ins.op[1] == "sync" or ins.op[1:3] == ["cta", "sync"]:
            self.emit(f"S.sync_cta({self.mask})")
        elif "red" in ins.op:
            kind = "popc" if "popc" in ins.op else ("and" if "and" in ins.op else "or")
            truth = self.src(ins.operands[-1], "b1")
            self.emit(f"S.sync_cta({self.mask})")
            self.vector = True
            self.put(
                ins.operands[0],
                f"S.reduce_cta({kind!r}, {truth}, {self.mask})",
                "u4" if kind == "popc" else "b1",
            )
        else:
            self.unsupported()

    def op_barrier(self, ins) -> None:
        self.op_bar(ins)

    # -- matrices

    def op_mma(self, ins) -> None:
        self.emit(f"S.meet({self.mask})")
        shape = next(p for p in ins.op if p[0] == "m" and p[1].isdigit())
        kinds = ins.op[-4:]
        if not shape.startswith("m16n8") or kinds[1] not in ("tf32", "f16", "bf16"):
            return self.unsupported()
        d, a, b, c = (x.items for x in ins.operands)
        a, b = (", ".join(self.src(x, "u4") for x in items) for items in (a, b))
        c = ", ".join(self.array(x, "u4") for x in c)
        self.emit(f"v = mma({kinds[1]!r}, {kinds[0]!r}, [{a}], [{b}], [{c}])")
        for i, item in enumerate(d):
            self.put(item, f"v[{i}]", "f4" if kinds[0] == "f32" else "u4")

    def op_ldmatrix(self, ins) -> None:
        self.emit(f"S.meet({self.mask})")
        count = next((int(p[1:]) for p in ins.op if p in ("x1", "x2", "x4")), 0)
        if "m8n8" not in ins.op or not count:
            return self.unsupported()
        target, source = ins.operands
        targets = target.items if isinstance(target, Vector) else (target,)
        self.emit(
            f"v = S.load_matrix({self.name}, {self.address(source)}, {self.mask}, {count}, "
            f"{'trans' in ins.op})"
        )
        for i, item in enumerate(targets):
            self.put(item, f"v[{i}]", "u4")

    def op_stmatrix(self, ins) -> None:
        self.emit(f"S.meet({self.mask})")
        count = next((int(p[1:]) for p in ins.op if p in ("x1", "x2", "x4")), 0)
        if "m8n8" not in ins.op or not count:
            return self.unsupported()
        target, source = ins.operands
        sources = source.items if isinstance(source, Vector) else (source,)
        values = ", ".join(self.array(s, "u4") for s in sources)
        self.emit(
            f"S.store_matrix({self.name}, {self.address(target)}, {self.mask}, ({values},), "
            f"{'trans' in ins.op})"
        )

    def op_fence(self, ins) -> None:
        if ins.op[1:3] == ["proxy", "async"]:
            self.emit(f"S.wgmma.fence({self.mask})")

    def op_wgmma(self, ins) -> None:
        name = ins.op[1]
        if name == "fence":
            return
        if name == "commit_group":
            self.emit(f"S.wgmma.commit({self.mask})")
        elif name == "wait_group":
            self.emit(f"S.wgmma.wait({self.mask}, {ins.operands[0].bits})")
        else:
            shape = next(p for p in ins.op if p[0] == "m" and p[1].isdigit())
            m, rest = shape[1:].split("n")
            n, k = rest.split("k")
            to, kind = ins.op[-3], ins.op[-1]
            if to != "f32" or kind not in ("f16", "bf16", "tf32"):
                return self.unsupported()
            d, a, b, scale, *flags = ins.operands
            flags = [f.bits for f in flags]
            in_registers = isinstance(a, Vector)
            transposes = flags[2:] if flags[2:] else [0, 0]
            if in_registers and len(transposes) == 1:
                transposes = [0, *transposes]
            left = (
                f"[{', '.join(self.src(x, 'u4') for x in a.items)}]"
                if in_registers
                else self.src(a, "u8")
            )
            old = ", ".join(self.array(x, "u4") for x in d.items)
            signs = tuple(-1 if f == 0xFFFFFFFF or f < 0 else f for f in flags[:2])
            self.emit(
                f"v = S.wgmma.multiply({self.name}, {self.mask}, ({m}, {n}, {k}), {kind!r}, "
                f"[{old}], {left}, {self.src(b, 'u8')}, {self.src(scale, 'b1')}, "
                f"{signs}, {tuple(transposes)})"
            )
            self.vector = True
            for i, item in enumerate(d.items):
                self.put(item, f"v[{i}]", "f4")
