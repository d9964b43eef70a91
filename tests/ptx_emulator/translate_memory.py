"""Translates accesses to memory: loads, stores, atomics, asynchronous copies."""

from __future__ import annotations

from typing import Any

from tests.ptx_emulator.element_types import DTYPES, SIZE
from tests.ptx_emulator.operands import Operands
from tests.ptx_emulator.parser import (
    Imm,
    Instruction,
    Reg,
    Symbol,
    Vector,
)


class MemoryInstructions(Operands):
    """Instructions that access memory."""

    def space(self, ins: Instruction) -> str:
        """The state space that an instruction names, else generic."""
        for part in ins.op:
            name = part.split("::")[0]
            if name in ("global", "shared", "local", "param", "const"):
                return name
        return "generic"

    def op_ld(self, ins: Instruction) -> None:
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

    def op_ldu(self, ins: Instruction) -> None:
        self.op_ld(ins)

    def op_st(self, ins: Instruction) -> None:
        target, source = ins.operands[:2]
        size = SIZE[DTYPES[ins.op[-1]]]
        sources = source.items if isinstance(source, Vector) else (source,)
        values = ", ".join(self.array(item, f"u{size}") for item in sources)
        self.emit(
            f"S.store({self.name}, {self.space(ins)!r}, {self.address(target)}, {self.mask}, "
            f"{size}, ({values},))"
        )

    def op_atom(self, ins: Instruction) -> None:
        self.atomic(ins, ins.operands[0], ins.operands[1], ins.operands[2:])

    def op_red(self, ins: Instruction) -> None:
        self.atomic(ins, None, ins.operands[0], ins.operands[1:])

    def atomic(self, ins: Instruction, target: Any, address: Any, sources: list[Any]) -> None:
        """An atomic with or without result."""
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

    def op_cp(self, ins: Instruction) -> None:
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
