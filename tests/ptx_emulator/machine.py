"""Kernels, launches, and the running batch: all lanes of several CTAs in lockstep.

Divergence. Lanes at the same block run together; of all blocks with lanes the first in the text
runs next, so lanes meet again where compilers place the join. Barriers and warp-wide instructions
wait until the lanes that take part have arrived. With the schedules "forward" and "backward" the
first (last) warp of every CTA runs until it must wait, then the next one: what warps race for comes
out in another order than in lockstep.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from tests.ptx_emulator import wgmma
from tests.ptx_emulator.memory import POISON, UNSIGNED, Access, Buffer, Clock, Memory
from tests.ptx_emulator.parser import Imm, parse
from tests.ptx_emulator.report import Report
from tests.ptx_emulator.translate import Translator

WINDOW = 0x0000_0100_0000_0000  # generic addresses of shared memory
LOCAL_WINDOW = 0x0000_0200_0000_0000
MAX_LANES = 4096
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


class EmulatorError(RuntimeError):
    pass


class Kernel:
    """One entry of a PTX text.

    ``shared_bytes``: dynamic shared memory. ``launch`` takes the arguments in PTX order: torch
    tensors on the CPU, contiguous numpy arrays, ints, floats or None (a null pointer).
    """

    def __init__(
        self,
        ptx: str,
        name: str | None,
        num_warps: int = 0,
        shared_bytes: int = 0,
        threads: int = 0,
    ) -> None:
        entries = parse(ptx)
        self.entry = entries[name] if name is not None else next(iter(entries.values()))
        self.name = self.entry.name
        self.threads = threads or 32 * num_warps or self.entry.threads
        if not self.threads:
            raise EmulatorError("the number of threads is not known")
        self.symbols: dict[str, int] = {"window": WINDOW}
        at = 0
        for symbol, (size, align) in self.entry.shared.items():
            at = -(-at // align) * align
            self.symbols[symbol] = at
            at += size
        at = -(-at // 16) * 16 if self.entry.shared else 0
        for symbol in self.entry.dynamic:
            self.symbols[symbol] = at
        self.shared_bytes = at + shared_bytes
        at = 0
        for symbol, (size, align) in self.entry.local.items():
            at = -(-at // align) * align
            self.symbols[symbol] = at
            at += size
        self.local_bytes = at
        self.constants = {}
        for symbol, content in self.entry.constants.items():
            data = np.frombuffer(content or b"\0", np.uint8).copy()
            self.constants[symbol] = data
            self.symbols[symbol] = data.ctypes.data
        self.translator = Translator(self.entry, self.symbols)
        self.blocks = self.translator.blocks

    def launch(
        self,
        grid,
        args,
        memory: Memory | None = None,
        report: Report | None = None,
        races: bool = True,
        approx_noise: int = 0,
        names=None,
        block=None,
        schedule: str = "lockstep",
    ) -> Report:
        """``memory`` knows more buffers, and which bytes were never written; it is kept between
        launches. ``approx_noise``: up to that many ulp are added to approximate functions.
        ``schedule``: lockstep, forward or backward."""
        memory = Memory() if memory is None else memory
        report = Report() if report is None else report
        memory.new_launch()
        params = self._parameters(args, memory, names)
        for symbol, data in self.constants.items():
            if data.ctypes.data not in memory.by_base:
                memory.add_array(data, symbol)
        grid = (*grid, 1, 1)[:3]
        block = (*(block or (self.threads,)), 1, 1)[:3]
        launch = Launch(self, memory, report, grid, block, params, races, approx_noise, schedule)
        report.launches[self.name] += 1
        with np.errstate(all="ignore"):
            launch.run()
        return report

    def _parameters(self, args, memory, names) -> dict[str, np.ndarray]:
        given = list(args)
        wanted = self.entry.params
        if len(given) < len(wanted):  # scratch pointers that nobody allocates
            given += [None] * (len(wanted) - len(given))
        if len(given) != len(wanted):
            raise EmulatorError(f"{self.name} takes {len(wanted)} parameters, not {len(given)}")
        params = {}
        for index, ((name, size), value) in enumerate(zip(wanted, given, strict=True)):
            label = names[index] if names and index < len(names) else f"argument {index}"
            if hasattr(value, "data_ptr"):
                memory.add_tensor(value, label)
                value = value.data_ptr()
            elif isinstance(value, np.ndarray):
                memory.add_array(value, label)
                value = value.ctypes.data
            elif value is None:
                value = 0
            if isinstance(value, float):
                data = np.array([value], {2: np.float16, 4: np.float32, 8: np.float64}[size])
            elif isinstance(value, bytes):
                data = np.frombuffer(value, np.uint8)
            else:
                data = np.array([int(value) & (2 ** (8 * size) - 1)], UNSIGNED[size])
            params[name] = data.view(np.uint8)
        return params


class Launch:
    def __init__(self, kernel, memory, report, grid, block, params, races, noise, schedule) -> None:
        self.kernel, self.memory, self.report = kernel, memory, report
        self.grid, self.block, self.params = grid, block, params
        self.races, self.noise, self.schedule = races, noise, schedule

    def run(self) -> None:
        threads = int(np.prod(self.block))
        lanes = -(-threads // 32) * 32
        ctas = int(np.prod(self.grid))
        per_batch = max(1, MAX_LANES // lanes)
        executed = np.zeros(len(self.kernel.blocks), np.int64)  # by how many warps
        for first in range(0, ctas, per_batch):
            batch = Batch(self, first, min(per_batch, ctas - first), threads, lanes)
            batch.executed = executed
            batch.run()
        counts: Counter[str] = Counter()
        for block, times in zip(self.kernel.blocks, executed, strict=True):
            for kind, number in block.classes.items():
                counts[kind] += int(times) * number
        self.report.statistics.setdefault(self.kernel.name, Counter()).update(counts)


class Batch:
    """``S`` of the translated code: several CTAs, each padded to whole warps."""

    def __init__(self, launch: Launch, first: int, ctas: int, threads: int, lanes: int) -> None:
        self.launch, self.kernel = launch, launch.kernel
        self.ctas, self.cta_lanes = ctas, lanes
        self.n = ctas * lanes
        self.warps = self.n // 32
        self.lane = np.arange(self.n) % 32
        self.all = np.arange(self.n)
        self.cta = self.all // lanes
        self.clock = Clock(first * lanes, self.n, lanes)
        self.access = Access(launch.memory, self.clock, self.found, launch.races)
        thread = self.all % lanes
        self.alive = thread < threads
        linear = first + self.cta
        gx, gy, gz = launch.grid
        bx, by, bz = launch.block
        values = {
            "%tid.x": thread % bx,
            "%tid.y": thread // bx % by,
            "%tid.z": thread // bx // by,
            "%ctaid.x": linear % gx,
            "%ctaid.y": linear // gx % gy,
            "%ctaid.z": linear // gx // gy,
            "%ntid.x": bx,
            "%ntid.y": by,
            "%ntid.z": bz,
            "%nctaid.x": gx,
            "%nctaid.y": gy,
            "%nctaid.z": gz,
            "%laneid": self.lane,
            "%warpid": thread // 32,
            "%smid": linear % 132,
            "%nwarpid": 64,
            "%nsmid": 132,
            "%clock": 0,
            "%clock64": 0,
            "%globaltimer": 0,
            "%lanemask_eq": 1 << self.lane,
            "%lanemask_lt": (1 << self.lane) - 1,
            "%lanemask_le": (2 << self.lane) - 1,
            "%lanemask_gt": ~((2 << self.lane) - 1),
            "%lanemask_ge": ~((1 << self.lane) - 1),
            "%cluster_ctaid.x": 0,
            "%cluster_ctarank": 0,
            "%cluster_nctaid.x": 1,
            "%WARP_SZ": 32,
            "WARP_SZ": 32,
        }
        self.specials = {
            k: np.broadcast_to(np.asarray(v, np.int64), self.n).astype(np.uint32)
            for k, v in values.items()
        }
        self.stride = -(-max(16, self.kernel.shared_bytes) // 128) * 128
        self.shared = self._private("shared memory", self.stride, ctas, self.kernel.shared_bytes)
        self.local = None
        if self.kernel.local_bytes:
            size = -(-self.kernel.local_bytes // 16) * 16
            self.local = self._private("local memory", size, self.n, self.kernel.local_bytes)
            self.local_base = self.all * size
        self.shared_base = self.cta * self.stride
        self.pending = np.zeros(len(self.shared.data) // 4, np.int32)  # cp.async under way
        self.groups: list[list] = [[]]  # committed groups, then the open one
        self.shuffles: dict = {}
        self.wgmma = wgmma.Queue(self)

    def _private(self, name, stride, count, size) -> Buffer:
        raw = np.full(stride * count + 128, POISON, np.uint8)
        start = -raw.ctypes.data % 128
        data = raw[start : start + stride * count]
        buffer = Buffer(name, 0, data, np.zeros(len(data), np.uint8), granule=4, per_cta=size)
        buffer.per_cta = size
        buffer.describe = lambda offset: f"{name} byte {offset % stride}"
        return buffer

    # -- execution

    def run(self) -> None:
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
        fragments: dict[tuple[int, int], np.ndarray] = {}  # rank and block -> lanes
        self.waiting: dict[int, np.ndarray] = {}
        self.ready: dict[int, np.ndarray] = {}
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

    def _go(self, fragments, target, mask) -> None:
        if target < 0:
            self.alive = self.alive & ~mask
            return
        for rank, lanes in self.ranks:
            part = mask & lanes if len(self.ranks) > 1 else mask
            if part.any():
                here = fragments.get((rank, target))
                fragments[rank, target] = part if here is None else here | part

    def _complete(self, arrived, block) -> np.ndarray:
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

    def _arrive(self, pc, mask, block):
        if (early := self.ready.pop(pc, None)) is not None:
            fresh = mask & ~early
            if fresh.any():
                self.ready[pc] = early
                return self._arrive_fresh(pc, fresh, block, early)
            if (later := early & ~mask).any():  # of other ranks
                self.ready[pc] = later
            return mask
        return self._arrive_fresh(pc, mask, block, None)

    def _arrive_fresh(self, pc, mask, block, early):
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

    def _unblock(self, fragments) -> bool:
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

    def _release(self, fragments, pc, lanes) -> None:
        rest = self.waiting[pc] & ~lanes
        if rest.any():
            self.waiting[pc] = rest
        else:
            del self.waiting[pc]
        self.ready[pc] = self.ready[pc] | lanes if pc in self.ready else lanes
        self._go(fragments, pc, lanes)

    # -- used by translated code

    def found(self, kind, ins, count, example) -> None:
        self.launch.report.add(kind, self.kernel.name, ins, count, example)

    def count(self, mask) -> int:
        return self.n if mask is None else int(mask.sum())

    def branch(self, condition, yes, no):
        taken = np.count_nonzero(condition)
        if taken == 0:
            return no
        if taken == self.n:
            return yes
        return condition.copy(), yes, no  # the register may be overwritten

    def special(self, name):
        return self.specials[name]

    def parameter(self, name, offset, kind):
        size = np.dtype(kind).itemsize
        return np.ascontiguousarray(self.launch.params[name][offset : offset + size]).view(kind)[0]

    def approximately(self, values, approximate):
        noise = self.launch.noise
        if not (noise and approximate):
            return values
        bits = values.view(np.int32)
        shift = (bits.astype(np.int64) * 2654435761 >> 7) % (2 * noise + 1) - noise
        normal = np.isfinite(values) & (np.abs(values) > 1e-37)
        return np.where(normal, bits + shift.astype(np.int32), bits).view(np.float32)

    def _place(self, space, address, lanes):
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

    def _parts(self, space, address, mask):
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

    def load(self, ins, space, address, mask, size, count):
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

    def store(self, ins, space, address, mask, size, values):
        stacked = np.stack([np.broadcast_to(v, self.n) for v in values], 1)
        for lanes, buffer, where, offsets in self._parts(space, address, mask):
            if len(lanes):
                if buffer is self.shared:
                    self._check_pending(ins, offsets, size * len(values), lanes)
                    self.wgmma.note_write(ins, offsets, size * len(values), lanes)
                self.access.store(where, lanes, stacked[lanes], size, ins, buffer, offsets)

    def atomic(self, ins, space, address, mask, operation, kind, values, wanted):
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

    def _updater(self, operation, kind, values, wanted):
        def update(view, at, lanes):
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

    # -- asynchronous copies

    def copy_async(self, ins, target, source, size, filled, mask) -> None:
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

    def commit(self, mask) -> None:
        self.groups.append([])

    def wait(self, ins, mask, count) -> None:
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
                self.shared.defined.view(np.uint32)[words] = 0x01010101
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

    def _check_pending(self, ins, offsets, width, lanes) -> None:
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

    # -- warps

    def lanes_of(self, mode, b, c):
        key = (mode, b, c)
        if key not in self.shuffles:
            self.shuffles[key] = self.lanes_for(
                mode,
                np.full(self.n, b & 0xFFFFFFFF, np.uint32),
                np.full(self.n, c & 0xFFFFFFFF, np.uint32),
            )
        return self.shuffles[key]

    def lanes_for(self, mode, b, c):
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

    def check_sources(self, ins, j, mask) -> None:
        wrong = mask & ~mask[j]
        if wrong.any():
            self.found(
                "shfl from an inactive lane",
                ins,
                wrong.sum(),
                lambda: self.access.lane(int(np.flatnonzero(wrong)[0])),
            )

    def vote(self, mode, truth, mask):
        active = np.ones(self.n, bool) if mask is None else mask
        truth = np.broadcast_to(truth, self.n).reshape(-1, 32)
        active = active.reshape(-1, 32)
        if mode == "ballot":
            bits = ((truth & active).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
            return np.repeat(bits.astype(np.uint32), 32)
        every, some = (truth | ~active).all(1), (truth & active).any(1)
        return np.repeat({"all": every, "any": some, "uni": every | ~some}[mode], 32)

    def redux(self, operation, values, mask):
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

    def match(self, values, mask):
        active = np.ones(self.n, bool) if mask is None else mask
        rows = values.reshape(-1, 32)
        equal = (rows[:, :, None] == rows[:, None, :]) & active.reshape(-1, 1, 32)
        return (
            (equal.astype(np.uint64) << np.arange(32, dtype=np.uint64))
            .sum(2)
            .astype(np.uint32)
            .reshape(-1)
        )

    def elect(self, mask):
        active = (np.ones(self.n, bool) if mask is None else mask).reshape(-1, 32)
        out = np.zeros_like(active)
        out[np.arange(len(out)), active.argmax(1)] = True
        return (out & active).reshape(-1)

    def meet(self, mask) -> None:
        if mask is None:
            self.clock.met += 1
        else:
            self.clock.met[mask] += 1

    def sync_warp(self, mask) -> None:
        if mask is None:
            self.clock.warp += 1
        else:
            self.clock.warp[mask] += 1

    def sync_cta(self, mask) -> None:
        for clock in (self.clock.warp, self.clock.cta):
            if mask is None:
                clock += 1
            else:
                clock[mask] += 1

    def reduce_cta(self, kind, truth, mask):
        active = (np.ones(self.n, bool) if mask is None else mask).reshape(self.ctas, -1)
        truth = np.broadcast_to(truth, self.n).reshape(self.ctas, -1)
        if kind == "popc":
            out = (truth & active).sum(1).astype(np.uint32)
        else:
            out = (truth | ~active).all(1) if kind == "and" else (truth & active).any(1)
        return np.repeat(out, self.cta_lanes)

    # -- matrices

    def load_matrix(self, ins, address, mask, count, transposed):
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

    def store_matrix(self, ins, address, mask, values, transposed) -> None:
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
