"""Accesses of a batch to memory: loads, stores, atomics, and asynchronous copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.ptx_emulator.checked_access import Update
from tests.ptx_emulator.lanes import EmulatorError, Lanes
from tests.ptx_emulator.memory import UNSIGNED, Array, Buffer
from tests.ptx_emulator.parser import Instruction

FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


class Accesses(Lanes):
    """What translated code calls to reach memory."""

    def _place(self, space: str, address: Array, lanes: Array) -> tuple[Buffer | None, Array, Any]:
        """Buffer, addresses and offsets of an access; None for global memory."""
        if space in ("global", "const"):
            return None, address, None
        if space == "shared":
            address = address.astype(np.int64)
            return self.shared, address, address + self.shared_base[lanes]
        if space == "local":
            address = address.astype(np.int64)
            return self.local, address, address + self.local_base[lanes]
        raise EmulatorError(f"{space} memory")

    def _parts(
        self, space: str, address: Array, mask: Array | None
    ) -> Iterator[tuple[Array, Buffer | None, Array, Any]]:
        """(lanes, buffer, address, offsets) of an access, split where generic addresses differ."""
        lanes = self.all if mask is None else np.flatnonzero(mask)
        if mask is not None:
            address = address[lanes]
        if space != "generic":
            yield lanes, *self._place(space, address, lanes)
            return
        high = address >> np.uint64(40)
        for window, name in ((1, "shared"), (2, "local")):
            inside = high == window
            if inside.any():
                some = np.flatnonzero(inside)
                local = address[some] - np.uint64(window << 40)
                yield lanes[some], *self._place(name, local, lanes[some])
        some = np.flatnonzero((high != 1) & (high != 2))
        if len(some):
            yield lanes[some], None, address[some], None

    def load(
        self,
        ins: Instruction,
        space: str,
        address: Array,
        mask: Array | None,
        size: int,
        count: int,
    ) -> Array:
        """[lanes, count] elements of ``size`` bytes that the lanes of the mask read."""
        out = None
        for lanes, buffer, where, offsets in self._parts(space, address, mask):
            if len(lanes) == 0:
                continue
            if buffer is self.shared:
                self._check_pending(ins, offsets, size * count, lanes)
            values = self.access.load(where, lanes, size, count, ins, buffer, offsets)
            if len(lanes) == self.n:
                return values
            if out is None:
                out = np.zeros((self.n, count), UNSIGNED[size])
            out[lanes] = values
        return np.zeros((self.n, count), UNSIGNED[size]) if out is None else out

    def store(
        self,
        ins: Instruction,
        space: str,
        address: Array,
        mask: Array | None,
        size: int,
        values: tuple[Array, ...],
    ) -> None:
        """The lanes of the mask write ``values``, one array for each element of a vector."""
        stacked = np.stack([np.broadcast_to(v, self.n) for v in values], 1)
        for lanes, buffer, where, offsets in self._parts(space, address, mask):
            if len(lanes):
                if buffer is self.shared:
                    self._check_pending(ins, offsets, size * len(values), lanes)
                    self.wgmma.note_write(ins, offsets, size * len(values), lanes)
                self.access.store(where, lanes, stacked[lanes], size, ins, buffer, offsets)

    def atomic(
        self,
        ins: Instruction,
        space: str,
        address: Array,
        mask: Array | None,
        operation: str,
        kind: str,
        values: tuple[Array, ...],
        wanted: bool,
    ) -> Array:
        """The values before a read-modify-write; zeros where nobody wants them."""
        size = (16 if kind == "bf16" else int(kind[1:])) // 8
        out = np.zeros(self.n, UNSIGNED[size])
        for lanes, buffer, where, offsets in self._parts(space, address, mask):
            if len(lanes):
                out[lanes] = self.access.atomic(
                    where,
                    lanes,
                    self._updater(operation, kind, values, wanted),
                    size,
                    ins,
                    buffer,
                    offsets,
                )
        return out

    def _updater(
        self, operation: str, kind: str, values: tuple[Array, ...], wanted: bool
    ) -> Update:
        def update(view: Array, at: Array, lanes: Array) -> Array:
            mine = [np.broadcast_to(v, self.n)[lanes] for v in values]
            typed = view
            if kind[0] == "s":
                typed = view.view(f"i{view.dtype.itemsize}")
            elif kind in FLOATS:
                typed = view.view(FLOATS[kind])
            elif kind == "bf16":
                raise NotImplementedError("bf16 atomics")
            mine = [m.view(typed.dtype) for m in mine]
            ufunc = {
                "add": np.add,
                "min": np.minimum,
                "max": np.maximum,
                "and": np.bitwise_and,
                "or": np.bitwise_or,
                "xor": np.bitwise_xor,
            }.get(operation)
            if ufunc is not None and not wanted:
                ufunc.at(typed, at, mine[0])
                return np.zeros(len(at), view.dtype)
            old = np.empty(len(at), typed.dtype)
            for i, where in enumerate(at):
                before = old[i] = typed[where]
                new = mine[0][i]
                if ufunc is not None:
                    new = ufunc(before, new)
                elif operation == "cas":
                    new = mine[1][i] if before == new else before
                elif operation == "inc":
                    new = 0 if before >= new else before + 1
                elif operation == "dec":
                    new = new if before == 0 or before > new else before - 1
                typed[where] = new
            return old.view(view.dtype)

        return update

    def copy_async(
        self,
        ins: Instruction,
        target: Array,
        source: Array,
        size: int,
        filled: Array,
        mask: Array | None,
    ) -> None:
        """Reads now, writes at the wait: what is read in between is reported."""
        lanes = self.all if mask is None else np.flatnonzero(mask)
        data = np.zeros((self.n, size), np.uint8)
        given = np.broadcast_to(filled, self.n)
        for part in np.unique(given[lanes]):
            some = lanes[given[lanes] == part]
            if part:
                part = int(part)
                unit = next(u for u in (8, 4, 2, 1) if part % u == 0)
                width = part // unit
                values = self.access.load(source[some], some, unit, width, ins)
                data[some, :part] = np.ascontiguousarray(values).view(np.uint8)
        address = target.astype(np.int64)[lanes]
        offsets = address + self.shared_base[lanes]
        good = (address >= 0) & (address + size <= self.kernel.shared_bytes) & (address % size == 0)
        if not good.all():
            wrong = int(np.flatnonzero(~good)[0])
            self.found(
                "shared memory out of bounds or misaligned",
                ins,
                (~good).sum(),
                lambda: f"{self.access.lane(lanes[wrong])}: byte {int(address[wrong])}",
            )
            lanes, offsets = lanes[good], offsets[good]
        words = (offsets[:, None] // 4 + np.arange(size // 4)).reshape(-1)
        np.add.at(self.pending, words, 1)
        if self.launch.races and len(lanes):  # a write may happen from now on
            at = offsets[:, None] // 4 + np.arange(size // 4)
            none = np.zeros(at.shape, bool)
            self.access.note_write(self.shared, at, 4, lanes, ins, none, none, False)
        self.groups[-1].append((ins, lanes, offsets, data[lanes]))

    def commit(self, mask: Array | None) -> None:
        """cp.async.commit_group: the copies so far become a group to be waited for."""
        self.groups.append([])

    def wait(self, ins: Instruction, mask: Array | None, count: int) -> None:
        """All but the latest ``count`` groups are complete for the lanes of the mask."""
        last = len(self.groups) - 1 - count
        for group in self.groups[: max(0, last)]:
            for index, (copy, lanes, offsets, data) in enumerate(group):
                here = np.ones(len(lanes), bool) if mask is None else mask[lanes]
                if not here.any():
                    continue
                some = offsets[here]
                size = data.shape[1]
                words = some[:, None] // 4 + np.arange(size // 4)
                view = self.shared.view(4)
                view[words] = np.ascontiguousarray(data[here]).view(np.uint32)
                self.wgmma.note_write(copy, some, size, lanes[here])
                self.shared_defined.view(np.uint32)[words] = 0x01010101
                np.add.at(self.pending, words.reshape(-1), -1)
                if self.launch.races:
                    none = np.zeros(words.shape, bool)
                    self.access.note_write(
                        self.shared, words, 4, lanes[here], copy, none, ~none, False
                    )
                group[index] = (copy, lanes[~here], offsets[~here], data[~here])
        while (
            len(self.groups) > 1
            and all(len(g[1]) == 0 for g in self.groups[0])
            and len(self.groups) - 1 > count
        ):
            self.groups.pop(0)

    def _check_pending(self, ins: Instruction, offsets: Array, width: int, lanes: Array) -> None:
        if not self.pending.any():
            return
        first, last = offsets // 4, (offsets + width - 1) // 4
        inside = (first >= 0) & (last < len(self.pending))
        busy = inside.copy()
        busy[inside] = (self.pending[first[inside]] > 0) | (self.pending[last[inside]] > 0)
        if busy.any():
            at = int(np.flatnonzero(busy)[0])
            self.found(
                "access before cp.async was waited for",
                ins,
                busy.sum(),
                lambda: f"{self.access.lane(lanes[at])}: {self.shared.describe(int(offsets[at]))}",
            )
