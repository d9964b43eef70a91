"""The running batch: all lanes of several CTAs in lockstep.

Divergence. Lanes at the same block run together; of all blocks with lanes the first in the text
runs next, so lanes meet again where compilers place the join. Barriers and warp-wide instructions
wait until the lanes that take part have arrived. With the schedules "forward" and "backward" the
first (last) warp of every CTA runs until it must wait, then the next one: what warps race for comes
out in another order than in lockstep.
"""

from __future__ import annotations

import numpy as np

from tests.ptx_emulator.blocks import Block
from tests.ptx_emulator.exchanges import Exchanges
from tests.ptx_emulator.memory import POISON, Array
from tests.ptx_emulator.parser import Imm

Fragments = dict[tuple[int, int], Array]  # rank and block -> mask of the lanes that are there


class Batch(Exchanges):
    """``S`` of the translated code: runs it until no lane is left.

    ``executed`` counts, for each block, the warps that have run it.
    """

    executed: Array

    def run(self) -> None:
        """Runs block after block, the first in the text that lanes have reached, to the end."""
        kernel = self.kernel
        R = [
            np.full(self.n, -1, np.int8).view(np.uint8).astype(np.bool_)
            if kind == "b1"
            else np.full(self.n * int(kind[1]), POISON, np.uint8).view(kind)
            for kind in kernel.translator.storage
        ]
        blocks, translator = kernel.blocks, kernel.translator
        warp = self.all % self.cta_lanes // 32
        if self.launch.schedule == "lockstep":
            self.ranks = [(0, np.ones(self.n, bool))]
        else:
            sign = -1 if self.launch.schedule == "backward" else 1
            self.ranks = [(sign * w, warp == w) for w in range(self.cta_lanes // 32)]
        fragments: Fragments = {}
        self.waiting: dict[int, Array] = {}
        self.ready: dict[int, Array] = {}
        full_run = bool(self.alive.all()) and len(self.ranks) == 1
        pc = 0
        if not full_run:
            self._go(fragments, 0, self.alive.copy())
        while True:
            if full_run:  # every lane is here
                mask, function = None, blocks[pc].full or translator.function(pc, False)
                self.executed[pc] += self.warps
            else:
                if not fragments and not self._unblock(fragments):
                    return
                first = min(fragments)
                pc, mask = first[1], fragments.pop(first)
                if blocks[pc].sync:
                    mask = self._arrive(pc, mask, blocks[pc])
                    if mask is None:
                        continue
                count = np.count_nonzero(mask)
                self.executed[pc] += np.count_nonzero(mask.reshape(-1, 32).any(1))
                if count == self.n:
                    mask, function = None, blocks[pc].full or translator.function(pc, False)
                    full_run = len(self.ranks) == 1
                else:
                    function = blocks[pc].masked or translator.function(pc, True)
            result = function(R, self, mask)
            if type(result) is int:
                if full_run:
                    if result < 0:
                        return
                    pc = result
                else:
                    self._go(fragments, result, np.ones(self.n, bool) if mask is None else mask)
            else:
                taken, yes, no = result
                full_run = False
                other = ~taken if mask is None else mask & ~taken
                self._go(fragments, yes, taken if mask is None else mask & taken)
                self._go(fragments, no, other)

    def _go(self, fragments: Fragments, target: int, mask: Array) -> None:
        if target < 0:
            self.alive = self.alive & ~mask
            return
        for rank, lanes in self.ranks:
            part = mask & lanes if len(self.ranks) > 1 else mask
            if part.any():
                here = fragments.get((rank, target))
                fragments[rank, target] = part if here is None else here | part

    def _complete(self, arrived: Array, block: Block) -> Array:
        """Lanes whose warp (group, CTA) has arrived at a block's first instruction."""
        if block.sync == "cta":
            width = self.cta_lanes
        else:
            width = 32 if block.sync == "warp" else min(128, self.cta_lanes)
        needed = self.alive.reshape(-1, width)
        ins = block.code[0]
        if block.sync == "warp":
            members = ins.operands[-1] if ins.operands else None
            if isinstance(members, Imm) and ins.op[0] in ("shfl", "vote", "redux", "match", "bar"):
                bits = (members.bits >> np.arange(32)) & 1 == 1
                needed = needed & bits
            elif ins.op[0] in ("shfl", "vote", "redux", "match"):
                return arrived
        elif (
            block.sync == "cta"
            and len(ins.operands) > 1
            and isinstance(ins.operands[1], Imm)
            and "red" not in ins.op
        ):
            number = ins.operands[1].bits  # any lanes, that many
            enough = arrived.reshape(-1, width).sum(1) >= number
            return arrived & np.repeat(enough, width)
        whole = (arrived.reshape(-1, width) | ~needed).all(1)
        return arrived & np.repeat(whole, width)

    def _arrive(self, pc: int, mask: Array, block: Block) -> Array | None:
        if (early := self.ready.pop(pc, None)) is not None:
            fresh = mask & ~early
            if fresh.any():
                self.ready[pc] = early
                return self._arrive_fresh(pc, fresh, block, early)
            if (later := early & ~mask).any():  # of other ranks
                self.ready[pc] = later
            return mask
        return self._arrive_fresh(pc, mask, block, None)

    def _arrive_fresh(
        self, pc: int, mask: Array, block: Block, early: Array | None
    ) -> Array | None:
        self.ready.pop(pc, None)
        here = self.waiting.pop(pc, None)
        arrived = mask if here is None else here | mask
        passed = self._complete(arrived, block)
        rest = arrived & ~passed
        if rest.any():
            self.waiting[pc] = rest
        if early is not None:
            passed = passed | early
        return passed if passed.any() else None

    def _unblock(self, fragments: Fragments) -> bool:
        """Nothing can run: lanes that wait may be enough now that others ended, or met at another
        instruction with the same barrier; else they are stuck."""
        if not self.waiting:
            return False
        blocks = self.kernel.blocks
        for pc in sorted(self.waiting):
            passed = self._complete(self.waiting[pc], blocks[pc])
            if passed.any():
                self._release(fragments, pc, passed)
                return True
        barriers: dict[object, list[int]] = {}
        for pc in self.waiting:
            if blocks[pc].sync == "cta":
                operand = blocks[pc].code[0].operands
                barriers.setdefault(str(operand[0]) if operand else "0", []).append(pc)
        for pcs in barriers.values():
            together = np.logical_or.reduce([self.waiting[pc] for pc in pcs])
            passed = self._complete(together, blocks[pcs[0]])
            if passed.any():
                for pc in pcs:
                    some = self.waiting[pc] & passed
                    if some.any():
                        self.found(
                            "barrier met at different instructions",
                            blocks[pc].code[0],
                            some.sum(),
                            None,
                        )
                        self._release(fragments, pc, some)
                return True
        pc = min(self.waiting)
        stuck = self.waiting[pc]
        first = int(np.flatnonzero(stuck)[0])
        self.found(
            "divergent " + blocks[pc].code[0].op[0],
            blocks[pc].code[0],
            stuck.sum(),
            lambda: f"{self.access.lane(first)} waits for lanes that never come",
        )
        self._release(fragments, pc, stuck)
        return True

    def _release(self, fragments: Fragments, pc: int, lanes: Array) -> None:
        rest = self.waiting[pc] & ~lanes
        if rest.any():
            self.waiting[pc] = rest
        else:
            del self.waiting[pc]
        self.ready[pc] = self.ready[pc] | lanes if pc in self.ready else lanes
        self._go(fragments, pc, lanes)
