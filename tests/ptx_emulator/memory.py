"""Global memory of the emulated device: buffers by address, and what was written of each."""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.ptx_emulator.shadow import Shadow

POISON = 0xFF  # NaN, or -1
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Array = np.ndarray[Any, Any]


@dataclass
class Buffer:
    """A range of addresses, what of it was written, and what may be accessed."""

    name: str
    base: int
    data: np.ndarray  # uint8
    defined: np.ndarray | None = None  # bytes written so far, uint8 0 or 1; None: all
    allowed: np.ndarray | None = None  # bytes that belong to a view; None: all
    granule: int = 16
    shadow: Shadow | None = None
    keep: object = None  # whatever owns the memory
    per_cta: int = 0  # shared memory: bytes of each CTA
    stride: int = 0  # and how far they lie apart
    views: dict[int, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nbytes = len(self.data)

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.base + self.nbytes

    def view(self, size: int) -> np.ndarray:
        """The elements of ``size`` bytes, as unsigned integers."""
        if size not in self.views:
            self.views[size] = self.data[: self.nbytes // size * size].view(UNSIGNED[size])
        return self.views[size]

    def describe(self, offset: int) -> str:
        """How reports call a byte."""
        if self.per_cta:
            return f"{self.name} byte {offset % self.stride}"
        return f"{self.name} byte {offset} of {self.nbytes}"


class Memory:
    """Global memory: buffers by address."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.bases: list[int] = []
        self.by_base: dict[int, Buffer] = {}

    def add(self, buffer: Buffer) -> Buffer:
        """Makes a buffer known."""
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

    def add_tensor(self, tensor: Any, name: str, defined: bool = True) -> Buffer:
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
        """Poisons a buffer that counts as never written."""
        if not defined:
            buffer.data[:] = POISON
            buffer.defined = np.zeros(buffer.nbytes, np.uint8)
        return buffer

    def remove(self, buffer: Buffer) -> None:
        """Forgets a buffer."""
        at = self.buffers.index(buffer)
        del self.buffers[at], self.bases[at], self.by_base[buffer.base]

    def new_launch(self) -> None:
        """Accesses of earlier launches are ordered before those to come."""
        for buffer in self.buffers:
            buffer.shadow = None

    def find(self, address: int) -> Buffer | None:
        """The last buffer that begins at or before an address."""
        at = bisect.bisect(self.bases, address) - 1
        return self.buffers[at] if at >= 0 else None
