"""Memory of the emulated device: bounds, alignment, uninitialised bytes, races.

Races. Every granule (the smallest element accessed) keeps who wrote it last and who read it: the
lane, and two clocks of that lane, counted by barriers of its CTA and by barriers that its warp took
part in. Two accesses of one launch by different lanes are ordered if
1. both lanes are in one warp and the warp's clock moved between them, or
2. they are in one CTA and the CTA's clock moved between them.
Else, if one is a write and not both are atomic, that is a race, whatever order the emulator took.
Lanes of different CTAs are never ordered inside a launch.

Inside a warp shfl.sync and the like order execution, though not memory: a write after another
lane's read with one of them between is reported apart, as harmless.

Replicas. Triton holds small tensors several times: all holders load, one stores. Where the writer
itself read the address in the very instruction in which the other lane did, the race is reported
apart as a replica's: harmless inside a warp, and elsewhere if the late value is not used.
"""

from __future__ import annotations

import bisect
import ctypes
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

POISON = 0xFF  # NaN, or -1
SHARED_READS = 4096  # instructions remembered in which several lanes read one address
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Clock:
    """Lanes of the running batch: who they are and how often they were synchronised."""

    def __init__(self, first_lane: int, lanes: int, cta_lanes: int) -> None:
        self.cta_lanes = cta_lanes
        self.gid = np.arange(first_lane, first_lane + lanes, dtype=np.int64)
        self.cta = np.zeros(lanes, np.int32)
        self.warp = np.zeros(lanes, np.int32)
        self.met = np.zeros(lanes, np.int32)  # warp-wide instructions


class Shadow:
    """Accesses of one launch to one buffer."""

    def __init__(self, nbytes: int, granule: int) -> None:
        self.granule = granule
        size = nbytes // granule + 1
        self.atomic = np.zeros(size, bool)
        # last writer, last reader, another reader; each lane, CTA clock, warp clock, meetings
        self.slots = {
            k: (np.full(size, -1, np.int64), *(np.zeros(size, np.int32) for _ in "123"))
            for k in "wrq"
        }
        self.written = False
        self.step = np.zeros(size, np.int64)  # of the last read
        self.several = np.zeros(size, np.int64)  # of the last one by several lanes
        self.readers: OrderedDict[int, tuple] = OrderedDict()

    def replicas(self, at, writer, reader):
        """Whether both lanes took part in the last read of these granules, one instruction."""
        out = np.zeros(len(at), bool)
        for index in np.flatnonzero(self.several[at] == self.step[at]):
            event = self.readers.get(int(self.step[at[index]]))
            if event is not None:
                together = event[1][event[0] == at[index]]
                out[index] = (together == writer[index]).any() and (together == reader[index]).any()
        return out

    def refine(self, granule: int) -> None:
        times = self.granule // granule
        self.atomic = np.repeat(self.atomic, times)
        self.slots = {k: tuple(np.repeat(a, times) for a in v) for k, v in self.slots.items()}
        self.step, self.several = np.repeat(self.step, times), np.repeat(self.several, times)
        self.readers.clear()
        self.granule = granule

    def concurrent(self, slot: str, at, clock: Clock, lanes):
        """Which accesses in a slot are by another lane and not ordered before these lanes."""
        who, cta_clock, warp_clock = (a[at] for a in self.slots[slot][:3])
        gid = clock.gid[lanes]
        other = (who >= 0) & (who != gid)
        if not other.any():
            return other, who
        same_warp = who >> 5 == gid >> 5
        same_cta = who // clock.cta_lanes == gid // clock.cta_lanes
        free = np.where(
            same_warp, warp_clock == clock.warp[lanes], ~same_cta | (cta_clock == clock.cta[lanes])
        )
        return other & free, who

    def record(self, slot: str, at, clock: Clock, lanes) -> None:
        who, cta_clock, warp_clock, met = self.slots[slot]
        who[at] = clock.gid[lanes]
        met[at] = clock.met[lanes]
        cta_clock[at] = clock.cta[lanes]
        warp_clock[at] = clock.warp[lanes]


@dataclass
class Buffer:
    name: str
    base: int
    data: np.ndarray  # uint8
    defined: np.ndarray | None = None  # bytes written so far, uint8 0 or 1; None: all
    allowed: np.ndarray | None = None  # bytes that belong to a view; None: all
    granule: int = 16
    shadow: Shadow | None = None
    keep: object = None  # whatever owns the memory
    per_cta: int = 0  # shared memory: bytes of each CTA
    views: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nbytes = len(self.data)

    @property
    def end(self) -> int:
        return self.base + self.nbytes

    def view(self, size: int) -> np.ndarray:
        if size not in self.views:
            self.views[size] = self.data[: self.nbytes // size * size].view(UNSIGNED[size])
        return self.views[size]

    def describe(self, offset: int) -> str:
        if self.per_cta:
            return f"shared memory byte {offset % self.per_cta}"
        return f"{self.name} byte {offset} of {self.nbytes}"


class Memory:
    """Global memory: buffers by address."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.bases: list[int] = []
        self.by_base: dict[int, Buffer] = {}

    def add(self, buffer: Buffer) -> Buffer:
        at = bisect.bisect(self.bases, buffer.base)
        self.bases.insert(at, buffer.base)
        self.buffers.insert(at, buffer)
        self.by_base[buffer.base] = buffer
        return buffer

    def add_array(self, array: np.ndarray, name: str, defined: bool = True) -> Buffer:
        """A contiguous array; of an array that it is a view of, no other part may be accessed."""
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        flat = root.reshape(-1).view(np.uint8)
        if array.size == 0:
            return Buffer(name, id(array), np.zeros(0, np.uint8))
        assert array.flags.c_contiguous and np.shares_memory(flat, root), "needs contiguous arrays"
        assert flat.ctypes.data % 16 == 0, "needs an aligned array"
        buffer = self.by_base.get(flat.ctypes.data)
        if buffer is None or buffer.nbytes != flat.nbytes:
            if buffer is not None:
                self.remove(buffer)
            buffer = Buffer(name, flat.ctypes.data, flat, granule=array.itemsize, keep=root)
            buffer.allowed = np.zeros(flat.nbytes, np.uint8)
            self.declare(self.add(buffer), defined)
        if buffer.allowed is not None:
            start = array.ctypes.data - buffer.base
            buffer.allowed[start : start + array.nbytes] = 1
            if buffer.allowed.all():
                buffer.allowed = None
        return buffer

    def add_tensor(self, tensor, name: str, defined: bool = True) -> Buffer:
        """A torch tensor's storage; only the elements of views that were added may be accessed."""
        storage = tensor.untyped_storage()
        base, nbytes = storage.data_ptr(), storage.nbytes()
        if nbytes == 0:
            return Buffer(name, base, np.zeros(0, np.uint8))
        buffer = self.by_base.get(base)
        if buffer is not None and buffer.nbytes != nbytes:
            self.remove(buffer)
            buffer = None
        item = tensor.element_size()
        if buffer is None:
            data = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(base))
            buffer = Buffer(name, base, data, granule=item, keep=storage)
            buffer.allowed = np.zeros(nbytes, np.uint8)
            self.declare(self.add(buffer), defined)
        elif name not in buffer.name.split("/"):
            buffer.name += "/" + name
        buffer.granule = min(buffer.granule, item)
        if buffer.allowed is not None and tensor.numel():
            start = tensor.storage_offset() * item
            view = np.lib.stride_tricks.as_strided(
                buffer.allowed[start:],
                (*tensor.shape, item),
                (*(s * item for s in tensor.stride()), 1),
            )
            view[...] = 1
            if buffer.allowed.all():
                buffer.allowed = None
        return buffer

    def declare(self, buffer: Buffer, defined: bool) -> Buffer:
        if not defined:
            buffer.data[:] = POISON
            buffer.defined = np.zeros(buffer.nbytes, np.uint8)
        return buffer

    def remove(self, buffer: Buffer) -> None:
        at = self.buffers.index(buffer)
        del self.buffers[at], self.bases[at], self.by_base[buffer.base]

    def new_launch(self) -> None:
        for buffer in self.buffers:
            buffer.shadow = None

    def find(self, address: int) -> Buffer | None:
        at = bisect.bisect(self.bases, address) - 1
        return self.buffers[at] if at >= 0 else None


class Access:
    """Loads, stores and atomics of one batch of lanes, with their checks."""

    def __init__(self, memory: Memory, clock: Clock, found, races: bool = True) -> None:
        self.memory = memory
        self.clock = clock
        self.found = found  # found(kind, instruction, count, example)
        self.races = races
        self.reads = 0

    # -- addressing

    def groups(self, address, lanes, width, ins, buffer=None, offsets=None):
        """(buffer, offsets, lanes) of the accesses that are aligned and in bounds."""
        if len(lanes) == 0:
            return
        if width & (width - 1) == 0 and (bad := address & (width - 1)).any():
            wrong = np.flatnonzero(bad)
            self.found(
                "misaligned",
                ins,
                len(wrong),
                lambda: (
                    f"{self.lane(lanes[wrong[0]])}: address {int(address[wrong[0]]):#x}, "
                    f"{width} bytes"
                ),
            )
            good = bad == 0
            address, lanes = address[good], lanes[good]
            offsets = offsets[good] if offsets is not None else None
            if len(lanes) == 0:
                return
        if buffer is not None:  # shared memory
            inside = (address >= 0) & (address + width <= buffer.per_cta)
            if not inside.all():
                wrong = np.flatnonzero(~inside)
                self.found(
                    "shared memory out of bounds",
                    ins,
                    len(wrong),
                    lambda: (
                        f"{self.lane(lanes[wrong[0]])}: byte {int(address[wrong[0]])} of "
                        f"{buffer.per_cta}"
                    ),
                )
                offsets, lanes = offsets[inside], lanes[inside]
            if len(lanes):
                yield buffer, offsets, lanes
            return
        low, high = int(address.min()), int(address.max())
        one = self.memory.find(low)
        if one is not None and high + width <= one.end:
            yield from self.inside(one, address.astype(np.int64) - one.base, lanes, width, ins)
            return
        which = np.searchsorted(np.array(self.memory.bases, np.uint64), address, "right") - 1
        for index in np.unique(which):
            some = which == index
            part, who = address[some], lanes[some]
            target = self.memory.buffers[index] if index >= 0 else None
            beyond = np.ones(len(part), bool)
            if target is not None:
                beyond = part + np.uint64(width) > np.uint64(target.end)
            if beyond.any():
                wrong = np.flatnonzero(beyond)
                self.found(
                    "out of bounds",
                    ins,
                    len(wrong),
                    lambda: (
                        f"{self.lane(who[wrong[0]])}: address {int(part[wrong[0]]):#x}, "
                        + (
                            f"{int(part[wrong[0]]) - target.end} bytes past {target.name}"
                            if target is not None
                            else "before every buffer"
                        )
                    ),
                )
            if target is not None and not beyond.all():
                part, who = part[~beyond], who[~beyond]
                yield from self.inside(target, part.astype(np.int64) - target.base, who, width, ins)

    def inside(self, buffer, offsets, lanes, width, ins):
        allowed = buffer.allowed
        if allowed is not None:
            wrong = (allowed[offsets] == 0) | (allowed[offsets + width - 1] == 0)
            if wrong.any():
                first = int(np.flatnonzero(wrong)[0])
                self.found(
                    "outside of the view",
                    ins,
                    wrong.sum(),
                    lambda: f"{self.lane(lanes[first])}: {buffer.describe(int(offsets[first]))}",
                )
        yield buffer, offsets, lanes

    def lane(self, lane) -> str:
        return self.gid_name(int(self.clock.gid[lane]))

    def gid_name(self, gid: int) -> str:
        return f"CTA {gid // self.clock.cta_lanes} thread {gid % self.clock.cta_lanes}"

    # -- accesses: lanes are indices into the batch

    def load(self, address, lanes, size, count, ins, buffer=None, offsets=None):
        """[lanes, count] elements; poison where the access failed."""
        out = np.full((len(lanes), count), UNSIGNED[size](2 ** (8 * size) - 1))
        whole = len(lanes)
        for target, offs, who in self.groups(address, lanes, size * count, ins, buffer, offsets):
            at = offs // size
            at = at[:, None] + np.arange(count) if count > 1 else at[:, None]
            values = target.view(size)[at]
            if len(who) == whole:
                out = values
            else:
                out[np.searchsorted(lanes, who)] = values
            if target.defined is not None:
                known = target.defined[: len(target.view(size)) * size].view(UNSIGNED[size])[at]
                unknown = (known != UNSIGNED[size](0x0101010101010101 & (2 ** (8 * size) - 1))).any(
                    1
                )
                if unknown.any():
                    first = int(np.flatnonzero(unknown)[0])
                    kind = "uninitialised shared memory" if target.per_cta else "uninitialised"
                    self.found(
                        kind,
                        ins,
                        unknown.sum(),
                        lambda: f"{self.lane(who[first])}: {target.describe(int(offs[first]))}",
                    )
            if self.races:
                self.note_read(target, at, size, who, ins)
        return out

    def store(self, address, lanes, values, size, ins, buffer=None, offsets=None, atomic=False):
        """``values`` [lanes, count]."""
        count = values.shape[1]
        for target, offs, who in self.groups(address, lanes, size * count, ins, buffer, offsets):
            at = (offs // size)[:, None]
            if count > 1:
                at = at + np.arange(count)
            mine = values if len(who) == len(lanes) else values[np.searchsorted(lanes, who)]
            view = target.view(size)
            if self.races:
                same = view[at] == mine
                view[at] = mine
                self.note_write(target, at, size, who, ins, same, view[at] == mine, atomic)
            else:
                view[at] = mine
            if target.defined is not None:
                known = target.defined[: len(view) * size].view(UNSIGNED[size])
                known[at] = UNSIGNED[size](0x0101010101010101 & (2 ** (8 * size) - 1))

    def atomic(self, address, lanes, update, size, ins, buffer=None, offsets=None):
        """``update(view, index, lanes)`` applies and returns the old values, lane by lane."""
        out = np.full(len(lanes), UNSIGNED[size](2 ** (8 * size) - 1))
        for target, offs, who in self.groups(address, lanes, size, ins, buffer, offsets):
            at = offs // size
            if target.defined is not None:
                known = target.defined[: len(target.view(size)) * size].view(UNSIGNED[size])[at]
                unknown = known != UNSIGNED[size](0x0101010101010101 & (2 ** (8 * size) - 1))
                if unknown.any():
                    first = int(np.flatnonzero(unknown)[0])
                    self.found(
                        "uninitialised",
                        ins,
                        unknown.sum(),
                        lambda: f"{self.lane(who[first])}: {target.describe(int(offs[first]))}",
                    )
            old = update(target.view(size), at, who)
            out[np.searchsorted(lanes, who)] = old
            if self.races:
                none = np.zeros((len(who), 1), bool)
                self.note_write(target, at[:, None], size, who, ins, none, ~none, True)
        return out

    # -- races

    def granules(self, target, at, size, who):
        shadow = target.shadow
        if shadow is None:
            granule = min(target.granule, size)
            shadow = target.shadow = Shadow(target.nbytes, granule)
        if size < shadow.granule:
            shadow.refine(size)
        times = size // shadow.granule
        lanes = np.repeat(who, at.shape[1] * times) if at.shape[1] * times > 1 else who
        if times > 1:
            at = at[:, :, None] * times + np.arange(times)
        return shadow, at.reshape(-1), lanes, times

    def note_read(self, target, at, size, who, ins) -> None:
        shadow, at, lanes, _ = self.granules(target, at, size, who)
        clock = self.clock
        if shadow.written:
            race, writer = shadow.concurrent("w", at, clock, lanes)
            if race.any():
                self.tell(target, shadow, "read after write", race, writer, at, lanes, ins)
        last, reader = shadow.concurrent("r", at, clock, lanes)
        if last.any():
            stale = ~shadow.concurrent("q", at, clock, lanes)[0]
            push = last & (stale | (reader >> 5 != clock.gid[lanes] >> 5))
            if push.any():
                moved = at[push]
                for to, source in zip(shadow.slots["q"], shadow.slots["r"], strict=True):
                    to[moved] = source[moved]
        self.reads += 1
        shadow.record("r", at, clock, lanes)
        shadow.step[at] = self.reads
        # several lanes of this instruction may have read one granule
        lost = shadow.slots["r"][0][at] != clock.gid[lanes]
        if lost.any():
            also, who = at[lost], lanes[lost]
            kept, other = shadow.concurrent("q", also, clock, who)
            free = ~(kept & (other >> 5 != clock.gid[who] >> 5))
            shadow.record("q", also[free], clock, who[free])
            # rather one of another warp
            far = free & (shadow.slots["r"][0][also] >> 5 != clock.gid[who] >> 5)
            shadow.record("q", also[far], clock, who[far])
            shadow.several[at[lost]] = self.reads
            shadow.readers[self.reads] = (at, clock.gid[lanes])
            if len(shadow.readers) > SHARED_READS:
                shadow.readers.popitem(last=False)

    def note_write(self, target, at, size, who, ins, same, kept, atomic) -> None:
        """``same``: memory held this value before; ``kept``: it holds it afterwards."""
        shadow, at, lanes, times = self.granules(target, at, size, who)
        if times > 1:
            same, kept = np.repeat(same.reshape(-1), times), np.repeat(kept.reshape(-1), times)
        same, kept = same.reshape(-1), kept.reshape(-1)
        clock = self.clock
        if shadow.written:
            race, writer = shadow.concurrent("w", at, clock, lanes)
            if atomic:
                race &= ~shadow.atomic[at]
            if race.any():
                self.tell(target, shadow, "write after write", race & ~same, writer, at, lanes, ins)
                self.tell(target, shadow, None, race & same, writer, at, lanes, ins)
        for slot in "rq":
            race, reader = shadow.concurrent(slot, at, clock, lanes)
            if race.any():
                some = np.flatnonzero(race)
                replica = np.zeros(len(race), bool)
                replica[some] = shadow.replicas(at[some], clock.gid[lanes[some]], reader[some])
                one_warp = reader >> 5 == clock.gid[lanes] >> 5
                met = one_warp & ~replica & (shadow.slots[slot][3][at] != clock.met[lanes])
                for what, which in (
                    ("write after read", race & ~replica & ~met),
                    ("write after read in one warp, shfl between", race & met),
                    ("write after a replica's read, one warp", race & replica & one_warp),
                    ("write after a replica's read, other warp", race & replica & ~one_warp),
                ):
                    self.tell(target, shadow, what, which, reader, at, lanes, ins)
        shadow.record("w", at, clock, lanes)
        shadow.atomic[at] = atomic
        shadow.written = True
        if not atomic:
            lost = shadow.slots["w"][0][at] != clock.gid[lanes]
            if lost.any():
                writer = shadow.slots["w"][0][at]
                one_cta = writer // clock.cta_lanes == clock.gid[lanes] // clock.cta_lanes
                for what, which in (
                    ("one instruction, one address", lost & ~kept & one_cta),
                    ("write after write", lost & ~kept & ~one_cta),
                    (None, lost & kept & ~one_cta),
                ):
                    self.tell(target, shadow, what, which, writer, at, lanes, ins)
                if (lost & kept & one_cta).any():
                    self.found("same-value writes", ins, (lost & kept & one_cta).sum(), None)

    def tell(self, target, shadow, what, race, other, at, lanes, ins) -> None:
        """A finding for every kind of pair; ``what`` None: memory held the written value before."""
        one_cta = other // self.clock.cta_lanes == self.clock.gid[lanes] // self.clock.cta_lanes
        where = "shared" if target.per_cta else "global"
        for between, which in (("", race & one_cta), (" between CTAs", race & ~one_cta)):
            if not which.any():
                continue
            first = int(np.flatnonzero(which)[0])
            kind = f"{where} race{between}: {what or 'write of the same value'}"
            if what is None and not between:
                kind = "races, same value"
            self.found(
                kind,
                ins,
                which.sum(),
                lambda first=first: (
                    f"{self.lane(lanes[first])} and {self.gid_name(int(other[first]))}: "
                    f"{target.describe(int(at[first]) * shadow.granule)}"
                ),
            )
