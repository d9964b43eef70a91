"""PTX blocks -> Python functions over numpy arrays of lanes.

A block becomes ``f(R, S, m)``: R the registers, arrays [lanes]; S the running batch (batch.py); m
the mask of active lanes, None in the variant for all lanes. It returns the next block, -1 at the
end, or (condition, block if true, block if false).
"""

from __future__ import annotations

from tests.ptx_emulator.blocks import TERMINATORS, BlockFunction
from tests.ptx_emulator.parser import Instruction
from tests.ptx_emulator.translate_arithmetic import Arithmetic
from tests.ptx_emulator.translate_bits import Bits
from tests.ptx_emulator.translate_conversions import Conversions
from tests.ptx_emulator.translate_memory import MemoryInstructions
from tests.ptx_emulator.translate_warps import WarpInstructions

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


class Translator(Arithmetic, Bits, Conversions, MemoryInstructions, WarpInstructions):
    """The functions of an entry's blocks, made when they are first wanted."""

    def function(self, index: int, masked: bool) -> BlockFunction:
        """Makes the function of a block, and keeps it."""
        block = self.blocks[index]
        source = self.source(index, masked)
        scope: dict[str, BlockFunction] = {}
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
        """The text of that function."""
        block = self.blocks[index]
        self.lines = []
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

    def terminate(self, ins: Instruction, index: int) -> bool:
        """A branch, or the end; whether the block ends here for sure."""
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
