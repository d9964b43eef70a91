"""Who accessed which bytes of a buffer in a launch, and whether two accesses are a race.

Every granule (the smallest element accessed) keeps who wrote it last and who read it: the
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

from collections import OrderedDict

import numpy as np

from tests.ptx_emulator.memory import Array

SHARED_READS = 4096  # instructions remembered in which several lanes read one address


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
        self.slots: dict[str, tuple[Array, ...]] = {
            k: (np.full(size, -1, np.int64), *(np.zeros(size, np.int32) for _ in "123"))
            for k in "wrq"
        }
        self.written = False
        self.step = np.zeros(size, np.int64)  # of the last read
        self.several = np.zeros(size, np.int64)  # of the last one by several lanes
        self.readers: OrderedDict[int, tuple[Array, Array]] = OrderedDict()

    def replicas(self, at: Array, writer: Array, reader: Array) -> Array:
        """Whether both lanes took part in the last read of these granules, one instruction."""
        out = np.zeros(len(at), bool)
        for index in np.flatnonzero(self.several[at] == self.step[at]):
            event = self.readers.get(int(self.step[at[index]]))
            if event is not None:
                together = event[1][event[0] == at[index]]
                out[index] = (together == writer[index]).any() and (together == reader[index]).any()
        return out

    def refine(self, granule: int) -> None:
        """Goes over to smaller granules, which inherit what is known."""
        times = self.granule // granule
        self.atomic = np.repeat(self.atomic, times)
        self.slots = {k: tuple(np.repeat(a, times) for a in v) for k, v in self.slots.items()}
        self.step, self.several = np.repeat(self.step, times), np.repeat(self.several, times)
        self.readers.clear()
        self.granule = granule

    def concurrent(self, slot: str, at: Array, clock: Clock, lanes: Array) -> tuple[Array, Array]:
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

    def record(self, slot: str, at: Array, clock: Clock, lanes: Array) -> None:
        """Writes down an access of lanes."""
        who, cta_clock, warp_clock, met = self.slots[slot]
        who[at] = clock.gid[lanes]
        met[at] = clock.met[lanes]
        cta_clock[at] = clock.cta[lanes]
        warp_clock[at] = clock.warp[lanes]
