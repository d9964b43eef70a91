"""What lanes of a batch do together: shuffles, votes, barriers, matrices in shared memory."""

from __future__ import annotations

import numpy as np

from tests.ptx_emulator.accesses import Accesses
from tests.ptx_emulator.memory import Array
from tests.ptx_emulator.parser import Instruction


class Exchanges(Accesses):
    """What translated code calls for a warp, a warp group or a CTA."""

    def lanes_of(self, mode: str, b: int, c: int) -> tuple[Array, Array]:
        """As ``lanes_for``, where the operands are immediate: worked out once."""
        key = (mode, b, c)
        if key not in self.shuffles:
            self.shuffles[key] = self.lanes_for(
                mode,
                np.full(self.n, b & 0xFFFFFFFF, np.uint32),
                np.full(self.n, c & 0xFFFFFFFF, np.uint32),
            )
        return self.shuffles[key]

    def lanes_for(self, mode: str, b: Array, c: Array) -> tuple[Array, Array]:
        """Source lane of shfl.sync and whether it is in range."""
        b, c = (b & 31).astype(np.int64), c.astype(np.int64)
        segment, clamp = (c >> 8) & 31, c & 31
        lane = self.lane
        highest = (lane & segment) | (clamp & ~segment & 31)
        lowest = lane & segment
        if mode == "up":
            j = lane - b
            ok = j >= highest
        elif mode == "down":
            j = lane + b
            ok = j <= highest
        elif mode == "bfly":
            j = lane ^ b
            ok = j <= highest
        else:
            j = lowest | (b & ~segment & 31)
            ok = j <= highest
        j = np.where(ok, j, lane)
        return self.all - lane + j, ok

    def check_sources(self, ins: Instruction, j: Array, mask: Array) -> None:
        """Reports lanes that shuffle from a lane which takes no part."""
        wrong = mask & ~mask[j]
        if wrong.any():
            self.found(
                "shfl from an inactive lane",
                ins,
                wrong.sum(),
                lambda: self.access.lane(int(np.flatnonzero(wrong)[0])),
            )

    def vote(self, mode: str, truth: Array, mask: Array | None) -> Array:
        """vote.sync: ballot, all, any or uni of a predicate over each warp."""
        active = np.ones(self.n, bool) if mask is None else mask
        truth = np.broadcast_to(truth, self.n).reshape(-1, 32)
        active = active.reshape(-1, 32)
        if mode == "ballot":
            bits = ((truth & active).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
            return np.repeat(bits.astype(np.uint32), 32)
        every, some = (truth | ~active).all(1), (truth & active).any(1)
        return np.repeat({"all": every, "any": some, "uni": every | ~some}[mode], 32)

    def redux(self, operation: str, values: Array, mask: Array | None) -> Array:
        """redux.sync: a reduction of integers over each warp."""
        ufunc = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[operation]
        if mask is not None:
            info = np.iinfo(values.dtype)
            neutral = {"min": info.max, "max": info.min, "and": -1 if info.min else info.max}.get(
                operation, 0
            )
            values = np.where(mask, values, values.dtype.type(neutral))
        return np.repeat(ufunc.reduce(values.reshape(-1, 32), axis=1, dtype=values.dtype), 32)

    def match(self, values: Array, mask: Array | None) -> Array:
        """match.any.sync: which lanes of the warp hold the same value."""
        active = np.ones(self.n, bool) if mask is None else mask
        rows = values.reshape(-1, 32)
        equal = (rows[:, :, None] == rows[:, None, :]) & active.reshape(-1, 1, 32)
        return (
            (equal.astype(np.uint64) << np.arange(32, dtype=np.uint64))
            .sum(2)
            .astype(np.uint32)
            .reshape(-1)
        )

    def elect(self, mask: Array | None) -> Array:
        """elect.sync: the first lane of each warp that takes part."""
        active = (np.ones(self.n, bool) if mask is None else mask).reshape(-1, 32)
        out = np.zeros_like(active)
        out[np.arange(len(out)), active.argmax(1)] = True
        return (out & active).reshape(-1)

    def meet(self, mask: Array | None) -> None:
        """The lanes were in one warp-wide instruction, which orders execution, not memory."""
        if mask is None:
            self.clock.met += 1
        else:
            self.clock.met[mask] += 1

    def sync_warp(self, mask: Array | None) -> None:
        """A barrier of the warp: orders memory among its lanes."""
        if mask is None:
            self.clock.warp += 1
        else:
            self.clock.warp[mask] += 1

    def sync_cta(self, mask: Array | None) -> None:
        """A barrier of the CTA: orders memory among its lanes."""
        for clock in (self.clock.warp, self.clock.cta):
            if mask is None:
                clock += 1
            else:
                clock[mask] += 1

    def reduce_cta(self, kind: str, truth: Array, mask: Array | None) -> Array:
        """barrier.red: how many lanes of the CTA hold a predicate, or whether all or any do."""
        active = (np.ones(self.n, bool) if mask is None else mask).reshape(self.ctas, -1)
        truth = np.broadcast_to(truth, self.n).reshape(self.ctas, -1)
        if kind == "popc":
            out = (truth & active).sum(1).astype(np.uint32)
        else:
            out = (truth | ~active).all(1) if kind == "and" else (truth & active).any(1)
        return np.repeat(out, self.cta_lanes)

    def load_matrix(
        self, ins: Instruction, address: Array, mask: Array | None, count: int, transposed: bool
    ) -> list[Array]:
        """ldmatrix: registers of 8 x 8 matrices of 16 bits, whose rows lanes point at."""
        lanes = self.lane < 8 * count
        if mask is not None:
            lanes = lanes & mask
        rows = self.load(ins, "shared", address, lanes, 4, 4)
        rows = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, 32, 8)
        lane = np.arange(32)
        out = []
        for i in range(count):
            matrix = rows[:, 8 * i : 8 * i + 8]
            if transposed:
                matrix = matrix.transpose(0, 2, 1)
            pair = np.stack([matrix[:, lane >> 2, 2 * (lane & 3) + e] for e in range(2)], -1)
            out.append(np.ascontiguousarray(pair).reshape(-1, 2).view(np.uint32)[:, 0])
        return out

    def store_matrix(
        self,
        ins: Instruction,
        address: Array,
        mask: Array | None,
        values: tuple[Array, ...],
        transposed: bool,
    ) -> None:
        """stmatrix: the opposite of ``load_matrix``."""
        rows = np.zeros((self.warps, 32, 8), np.uint16)
        lane = np.arange(32)
        for i, register in enumerate(values):
            pair = np.ascontiguousarray(register).view(np.uint16).reshape(-1, 32, 2)
            matrix = np.zeros((self.warps, 8, 8), np.uint16)
            for e in range(2):
                matrix[:, lane >> 2, 2 * (lane & 3) + e] = pair[:, :, e]
            rows[:, 8 * i : 8 * i + 8] = matrix.transpose(0, 2, 1) if transposed else matrix
        words = rows.reshape(self.n, 8).view(np.uint32)
        lanes = self.lane < 8 * len(values)
        if mask is not None:
            lanes = lanes & mask
        self.store(ins, "shared", address, lanes, 4, tuple(words[:, k] for k in range(4)))
