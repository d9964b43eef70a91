"""Loads, stores and atomics with their checks: bounds, alignment, uninitialised bytes, races."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.ptx_emulator.memory import UNSIGNED, Array, Buffer, Memory
from tests.ptx_emulator.parser import Instruction
from tests.ptx_emulator.shadow import SHARED_READS, Clock, Shadow

#: Applies an atomic to a view at indices for lanes, and returns the old values.
Update = Callable[[Array, Array, Array], Array]
#: Of a kind, an instruction, a count, and what makes an example.
Found = Callable[[str, Instruction, Any, Callable[[], str] | None], None]
Groups = Iterator[tuple[Buffer, Array, Array]]


class Access:
    """Loads, stores and atomics of one batch of lanes, with their checks."""

    def __init__(self, memory: Memory, clock: Clock, found: Found, races: bool = True) -> None:
        self.memory = memory
        self.clock = clock
        self.found = found  # found(kind, instruction, count, example)
        self.races = races
        self.reads = 0

    # -- addressing

    def groups(
        self,
        address: Array,
        lanes: Array,
        width: int,
        ins: Instruction,
        buffer: Buffer | None = None,
        offsets: Any = None,
    ) -> Groups:
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

    def inside(
        self, buffer: Buffer, offsets: Array, lanes: Array, width: int, ins: Instruction
    ) -> Groups:
        """The accesses to one buffer; those outside of every view of it are reported, and made."""
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

    def lane(self, lane: Any) -> str:
        """How reports call a lane of the batch."""
        return self.gid_name(int(self.clock.gid[lane]))

    def gid_name(self, gid: int) -> str:
        """How reports call a lane of the launch."""
        return f"CTA {gid // self.clock.cta_lanes} thread {gid % self.clock.cta_lanes}"

    # -- accesses: lanes are indices into the batch

    def load(
        self,
        address: Array,
        lanes: Array,
        size: int,
        count: int,
        ins: Instruction,
        buffer: Buffer | None = None,
        offsets: Any = None,
    ) -> Array:
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

    def store(
        self,
        address: Array,
        lanes: Array,
        values: Array,
        size: int,
        ins: Instruction,
        buffer: Buffer | None = None,
        offsets: Any = None,
        atomic: bool = False,
    ) -> None:
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

    def atomic(
        self,
        address: Array,
        lanes: Array,
        update: Update,
        size: int,
        ins: Instruction,
        buffer: Buffer | None = None,
        offsets: Any = None,
    ) -> Array:
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

    def granules(
        self, target: Buffer, at: Array, size: int, who: Array
    ) -> tuple[Shadow, Array, Array, int]:
        """The shadow of a buffer, granules and lanes of the accesses, granules of an element."""
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

    def note_read(self, target: Buffer, at: Array, size: int, who: Array, ins: Instruction) -> None:
        """Reports reads that race with writes, and remembers who read."""
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

    def note_write(
        self,
        target: Buffer,
        at: Array,
        size: int,
        who: Array,
        ins: Instruction,
        same: Array,
        kept: Array,
        atomic: bool,
    ) -> None:
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
                for pair, which in (
                    ("one instruction, one address", lost & ~kept & one_cta),
                    ("write after write", lost & ~kept & ~one_cta),
                    (None, lost & kept & ~one_cta),
                ):
                    self.tell(target, shadow, pair, which, writer, at, lanes, ins)
                if (lost & kept & one_cta).any():
                    self.found("same-value writes", ins, (lost & kept & one_cta).sum(), None)

    def tell(
        self,
        target: Buffer,
        shadow: Shadow,
        what: str | None,
        race: Array,
        other: Array,
        at: Array,
        lanes: Array,
        ins: Instruction,
    ) -> None:
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
                lambda: (
                    f"{self.lane(lanes[first])} and {self.gid_name(int(other[first]))}: "
                    f"{target.describe(int(at[first]) * shadow.granule)}"
                ),
            )
