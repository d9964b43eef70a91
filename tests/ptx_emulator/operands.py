"""Registers and operands as expressions of the Python code that a block becomes."""

from __future__ import annotations

import struct
from collections import defaultdict
from typing import Any

import numpy as np

from tests.ptx_emulator import semantics
from tests.ptx_emulator.blocks import make_blocks
from tests.ptx_emulator.element_types import SIZE, STORAGE
from tests.ptx_emulator.parser import (
    Address,
    Entry,
    Imm,
    Instruction,
    Operand,
    Pair,
    PtxError,
    Reg,
    Special,
    Symbol,
    Vector,
)

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


class Operands:
    """What translators of instructions share; R is the registers, S the running batch.

    While a block is translated: ``ins`` is the instruction, ``name`` its name in the code,
    ``mask`` the name of the mask of the lanes that take part, and ``vector`` whether what was
    read so far is an array of lanes and no number.
    """

    ins: Instruction
    name: str
    mask: str | None
    vector: bool
    lines: list[str]

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

    def _note_read(self, operand: Operand) -> None:
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
            vote: str | None = "u"
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
            held = STORAGE.get(reg.type)
            if held is None:
                bits = reg.type[1:]
                size = {"32": "4", "64": "8"}.get(bits)
                if size is None:
                    raise PtxError(f"register of type {reg.type}")
                held = ("f" if votes[find(reg)] == {"f"} else "u") + size
            self.storage.append(held)

    def constant(self, value: Any) -> str:
        """A name in the code for a value."""
        key = (type(value).__name__, np.asarray(value).tobytes())
        if key not in self.constants:
            name = f"K{len(self.constants)}"
            self.constants[key] = name
            self.namespace[name] = value
        return self.constants[key]

    # -- operands

    def src(self, operand: Operand, kind: str) -> str:
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

    def address(self, operand: Any) -> str:
        """Expression for an address."""
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

    def put(self, target: Operand, text: str, kind: str, fresh: bool = True) -> None:
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

    def emit(self, line: str) -> None:
        """Adds a line to the function."""
        self.lines.append("    " + line)

    def array(self, operand: Operand, dtype: str) -> str:
        """As ``src``, but always an array of lanes."""
        text = self.src(operand, dtype)
        return text if isinstance(operand, Reg) else f"full(S.n, {text}, {dtype})"

    def constant_object(self, ins: Instruction) -> str:
        """A name in the code for an instruction, which reports show."""
        name = f"I{ins.index}"
        self.namespace[name] = ins
        return name

    def unsupported(self) -> None:
        """The function raises where it comes to this instruction, and not before."""
        self.emit(f"raise NotImplementedError({f'{self.ins.text} ({self.ins.location})'!r})")
