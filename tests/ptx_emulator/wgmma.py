"""Warp-group matrix instructions of sm_90 (wgmma), whose operands lie in shared memory.

A descriptor holds start address / 16 (14 bits), leading and stride byte offset / 16 (at bits 16 and
32) and the swizzle (bits 62, 63: none, 128, 64, 32 bytes). With rows of S bytes (S = 16 unswizzled)
1. K-major: address(r, byte b of k) = start + (r / 8) stride + (r % 8) S + b; unswizzled the second
   16 bytes of k lie at the leading offset
2. MN-major, elements of 2 bytes: runs of S bytes along r, `leading` apart; rows k % 8 of S bytes,
   groups of eight `stride` apart; unswizzled the two offsets swap roles
3. swizzle: address bits 4.. are XORed with bits 7..: 3, 2, 1 of them
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx_emulator.memory import Array
from tests.ptx_emulator.parser import Instruction
from tests.ptx_emulator.semantics import f2, f4, f8, fragment_a, from_bf16, u4

if TYPE_CHECKING:
    from tests.ptx_emulator.lanes import Lanes

SWIZZLE = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}  # row bytes, mask of XORed bits


class Queue:
    """Operands that issued instructions may still read, and who fenced when."""

    def __init__(self, batch: Lanes) -> None:
        self.batch = batch
        size = len(batch.shared.data) // 4
        self.reading = np.zeros(size, np.int32)
        self.groups: list[list[tuple[Array, Array]]] = [[]]
        self.step = 1
        self.write_step = np.zeros(size, np.int64)
        self.writer = np.zeros(size, np.int64)
        self.fence_step = np.zeros(batch.n, np.int64)
        self.used = False

    # -- what stores and fences report

    def note_write(self, ins: Instruction, offsets: Array, width: int, lanes: Array) -> None:
        """Remembers who wrote when; reports what is overwritten while it may be read."""
        words = offsets[:, None] // 4 + np.arange(max(1, width // 4))
        words = words.clip(0, len(self.writer) - 1)  # what lies outside is reported elsewhere
        self.step += 1
        self.write_step[words] = self.step
        self.writer[words] = lanes[:, None]
        if self.used:
            busy = self.reading[words] > 0
            if busy.any():
                row = int(np.flatnonzero(busy.any(1))[0])
                self.batch.found(
                    "shared memory written while wgmma may read it",
                    ins,
                    busy.any(1).sum(),
                    lambda: (
                        f"{self.batch.access.lane(lanes[row])}: "
                        f"{self.batch.shared.describe(int(offsets[row]))}"
                    ),
                )

    def fence(self, mask: Array | None) -> None:
        """fence.proxy.async: what lanes wrote so far is ordered before what wgmma reads."""
        self.step += 1
        if mask is None:
            self.fence_step[:] = self.step
        else:
            self.fence_step[mask] = self.step

    def commit(self, mask: Array | None) -> None:
        """wgmma.commit_group."""
        self.groups.append([])

    def wait(self, mask: Array | None, count: int) -> None:
        """wgmma.wait_group: older groups no longer read shared memory."""
        last = max(0, len(self.groups) - 1 - count)
        for group in self.groups[:last]:
            for index, (lanes, words) in enumerate(group):
                done = np.ones(len(lanes), bool) if mask is None else mask[lanes]
                if done.any():
                    np.add.at(self.reading, words[done].reshape(-1), -1)
                    group[index] = (lanes[~done], words[~done])
        while len(self.groups) - 1 > count and not any(len(g[0]) for g in self.groups[0]):
            self.groups.pop(0)

    # -- the product

    def matrix(
        self,
        ins: Instruction,
        descriptor: Array,
        firsts: Array,
        rows: int,
        depth: int,
        kind: str,
        transposed: int,
        split: bool,
    ) -> Array:
        """[groups, rows, depth] float64 from shared memory; ``split``: a quarter of the rows for
        each warp, else all rows for all warps."""
        batch = self.batch
        size = 4 if kind == "tf32" else 2
        start = (descriptor & 0x3FFF).astype(np.int64) * 16
        leading = ((descriptor >> np.uint64(16)) & np.uint64(0x3FFF)).astype(np.int64) * 16
        stride = ((descriptor >> np.uint64(32)) & np.uint64(0x3FFF)).astype(np.int64) * 16
        mode = int(descriptor[0] >> np.uint64(62))
        width, bits = SWIZZLE[mode]
        start, leading, stride = (x[:, None, None] for x in (start, leading, stride))
        r = np.arange(rows)[None, :, None]
        k = np.arange(depth)[None, None, :]
        if not transposed:
            byte = k * size
            address = start + r // 8 * stride + r % 8 * width
            address = address + (byte if mode else byte // 16 * leading + byte % 16)
        else:
            byte = r * size
            far, near = (leading, stride) if mode else (stride, leading)
            address = start + byte % width + byte // width * far + k % 8 * width + k // 8 * near
        address = address ^ (((address >> 7) & bits) << 4)
        inside = (address >= 0) & (address + size <= batch.kernel.shared_bytes)
        if not inside.all():
            batch.found("shared memory out of bounds", ins, (~inside).sum(), None)
            address = np.where(inside, address, 0)
        offsets = address + batch.shared_base[firsts][:, None, None]
        self._check(ins, offsets, firsts, split)
        values = batch.shared.view(size)[offsets // size]
        if kind == "tf32":
            return (values & u4(0xFFFFE000)).view(f4).astype(f8)
        return (from_bf16(values) if kind == "bf16" else values.view(f2)).astype(f8)

    def _check(self, ins: Instruction, offsets: Array, firsts: Array, split: bool) -> None:
        batch = self.batch
        words = offsets // 4
        known = batch.shared_defined[offsets]
        if (known == 0).any():
            batch.found(
                "uninitialised shared memory",
                ins,
                (known == 0).sum(),
                lambda: f"{batch.access.lane(firsts[0])}: an operand",
            )
        if (batch.pending[words] > 0).any():
            batch.found("access before cp.async was waited for", ins, 1, None)
        for warp in range(4):
            part = words[:, 16 * warp : 16 * warp + 16] if split else words
            lanes = firsts + 32 * warp
            flat = part.reshape(len(firsts), -1)
            unique = np.unique(flat[0]) if len(flat) == 1 else None
            flat = flat if unique is None else unique[None, :]
            fenced = np.maximum(self.fence_step[self.writer[flat]], self.fence_step[lanes][:, None])
            late = (self.write_step[flat] > 0) & (fenced < self.write_step[flat])
            if late.any():
                batch.found(
                    "wgmma reads what no fence.proxy.async ordered",
                    ins,
                    late.sum(),
                    lambda: f"{batch.access.lane(lanes[0])}",
                )
            if batch.launch.races:
                batch.access.note_read(batch.shared, flat, 4, lanes, ins)
        all_words = words.reshape(len(firsts), -1)
        np.add.at(self.reading, all_words.reshape(-1), 1)
        self.groups[-1].append((firsts, all_words))

    def multiply(
        self,
        ins: Instruction,
        mask: Array | None,
        shape: tuple[int, int, int],
        kind: str,
        d: list[Array],
        a: Any,
        b: Array,
        scale: Any,
        signs: tuple[int, int],
        transposes: tuple[int, int],
    ) -> list[Array]:
        """New registers d: D = A B (+ D where scale); a: four registers or a descriptor."""
        batch = self.batch
        self.used = True
        if batch.cta_lanes % 128:
            raise NotImplementedError("wgmma in a CTA of fewer than four warps")
        _, n, depth = shape
        firsts = np.arange(0, batch.n, 128)
        if mask is not None:
            firsts = firsts[mask[firsts]]
        groups = firsts // 128
        right = self.matrix(ins, b[firsts], firsts, n, depth, kind, transposes[1], False)
        if isinstance(a, list):
            left = fragment_a(a, kind).reshape(-1, 64, depth)[groups]
        else:
            left = self.matrix(ins, a[firsts], firsts, 64, depth, kind, transposes[0], True)
        product = (left * signs[0]) @ (right * signs[1]).transpose(0, 2, 1)
        lane = np.arange(128)
        row = lane // 32 * 16 + (lane % 32 >> 2)
        keep = np.broadcast_to(scale, batch.n)
        out = []
        for i, register in enumerate(d):
            part = np.zeros((batch.n // 128, 128), f8)
            part[groups] = product[:, row + 8 * (i >> 1 & 1), i // 4 * 8 + 2 * (lane & 3) + (i & 1)]
            old = np.where(keep, register.view(f4), f4(0)).astype(f8)
            out.append((part.reshape(-1) + old).astype(f4))
        return out
