"""The lanes of a running batch: who they are, what their CTAs share, what they may ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx_emulator import wgmma
from tests.ptx_emulator.checked_access import Access
from tests.ptx_emulator.memory import POISON, Array, Buffer
from tests.ptx_emulator.parser import Instruction
from tests.ptx_emulator.shadow import Clock

if TYPE_CHECKING:
    from tests.ptx_emulator.kernel import Launch

WINDOW = 0x0000_0100_0000_0000  # generic addresses of shared memory
LOCAL_WINDOW = 0x0000_0200_0000_0000


class EmulatorError(RuntimeError):
    """The emulator was asked for what it cannot do."""


class Lanes:
    """Several CTAs, each padded to whole warps, as arrays over all of their lanes."""

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
        defined = self.shared.defined
        assert defined is not None
        self.shared_defined = defined
        self.local = None
        if self.kernel.local_bytes:
            size = -(-self.kernel.local_bytes // 16) * 16
            self.local = self._private("local memory", size, self.n, self.kernel.local_bytes)
            self.local_base = self.all * size
        self.shared_base = self.cta * self.stride
        self.pending = np.zeros(len(self.shared.data) // 4, np.int32)  # cp.async under way
        self.groups: list[list[Any]] = [[]]  # committed groups, then the open one
        self.shuffles: dict[Any, Any] = {}
        self.wgmma = wgmma.Queue(self)

    def _private(self, name: str, stride: int, count: int, size: int) -> Buffer:
        raw = np.full(stride * count + 128, POISON, np.uint8)
        start = -raw.ctypes.data % 128
        data = raw[start : start + stride * count]
        buffer = Buffer(
            name, 0, data, np.zeros(len(data), np.uint8), granule=4, per_cta=size, stride=stride
        )
        return buffer

    def found(
        self, kind: str, ins: Instruction, count: Any, example: Callable[[], str] | None
    ) -> None:
        """Reports a finding of this kernel."""
        self.launch.report.add(kind, self.kernel.name, ins, count, example)

    def count(self, mask: Array | None) -> int:
        """How many lanes a mask holds."""
        return self.n if mask is None else int(mask.sum())

    def branch(self, condition: Array, yes: int, no: int) -> int | tuple[Array, int, int]:
        """One target where all lanes agree, else who goes where."""
        taken = np.count_nonzero(condition)
        if taken == 0:
            return no
        if taken == self.n:
            return yes
        return condition.copy(), yes, no  # the register may be overwritten

    def special(self, name: str) -> Array:
        """A special register, like %tid.x."""
        return self.specials[name]

    def parameter(self, name: str, offset: int, kind: Any) -> Any:
        """An element of a kernel parameter."""
        size = np.dtype(kind).itemsize
        return np.ascontiguousarray(self.launch.params[name][offset : offset + size]).view(kind)[0]

    def approximately(self, values: Array, approximate: bool) -> Array:
        """Perturbs what the device only approximates, where a run asks for noise."""
        noise = self.launch.noise
        if not (noise and approximate):
            return values
        bits = values.view(np.int32)
        shift = (bits.astype(np.int64) * 2654435761 >> 7) % (2 * noise + 1) - noise
        normal = np.isfinite(values) & (np.abs(values) > 1e-37)
        return np.where(normal, bits + shift.astype(np.int32), bits).view(np.float32)
