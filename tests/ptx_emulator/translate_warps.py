"""Translates what lanes do together: shuffles, votes, barriers, matrix products."""

from __future__ import annotations

from tests.ptx_emulator.element_types import DTYPES
from tests.ptx_emulator.operands import Operands
from tests.ptx_emulator.parser import (
    Imm,
    Instruction,
    Pair,
    Vector,
)


class WarpInstructions(Operands):
    """Instructions of warps, warp groups and CTAs."""

    def op_shfl(self, ins: Instruction) -> None:
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

    def op_vote(self, ins: Instruction) -> None:
        self.emit(f"S.meet({self.mask})")
        target, p = ins.operands[:2]
        text = self.src(p, "b1")
        if isinstance(p, Imm):
            text = f"full(S.n, {text})"
        kind = "u4" if "ballot" in ins.op else "b1"
        self.vector = True
        self.put(target, f"S.vote({ins.op[2]!r}, {text}, {self.mask})", kind)

    def op_activemask(self, ins: Instruction) -> None:
        self.vector = True
        self.put(ins.operands[0], f"S.vote('ballot', full(S.n, True), {self.mask})", "u4")

    def op_redux(self, ins: Instruction) -> None:
        self.emit(f"S.meet({self.mask})")
        target, a = ins.operands[:2]
        kind = ins.op[-1]
        if kind == "f32":
            return self.unsupported()
        dtype = DTYPES[kind]
        self.put(target, f"S.redux({ins.op[2]!r}, {self.array(a, dtype)}, {self.mask})", dtype)

    def op_match(self, ins: Instruction) -> None:
        self.emit(f"S.meet({self.mask})")
        target, a = ins.operands[:2]
        if ins.op[1] != "any":
            return self.unsupported()
        dtype = DTYPES[ins.op[-1]]
        self.put(target, f"S.match({self.array(a, dtype)}, {self.mask})", "u4")

    def op_elect(self, ins: Instruction) -> None:
        target = ins.operands[0]
        self.vector = True
        self.emit(f"t = S.elect({self.mask})")
        if isinstance(target, Pair):
            self.put(target.second, "t", "b1")

    def op_bar(self, ins: Instruction) -> None:
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

    def op_barrier(self, ins: Instruction) -> None:
        self.op_bar(ins)

    # -- matrices

    def op_mma(self, ins: Instruction) -> None:
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

    def op_ldmatrix(self, ins: Instruction) -> None:
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

    def op_stmatrix(self, ins: Instruction) -> None:
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

    def op_fence(self, ins: Instruction) -> None:
        if ins.op[1:3] == ["proxy", "async"]:
            self.emit(f"S.wgmma.fence({self.mask})")

    def op_wgmma(self, ins: Instruction) -> None:
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
