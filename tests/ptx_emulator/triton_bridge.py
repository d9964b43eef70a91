"""Run ``kernel[grid](*args)`` of Triton through the emulator, with CPU tensors and no GPU.

    with emulate(90) as session:
        kernel[grid](x, y, n, BLOCK=128)
    print(session.report)

Kernels are compiled in this process for the chosen architecture. Memory that ``torch.empty`` and
its kin return inside is filled with NaN and counts as never written until somebody writes it.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from tests.fake_driver import FakeDriver
from tests.ptx_emulator.kernel import Kernel
from tests.ptx_emulator.memory import Array, Memory
from tests.ptx_emulator.report import Report

EMPTY = ("aten.empty", "aten.new_empty")
#: Apart from Triton's own cache: what lies here has no machine code.
CACHE = os.environ.get(
    "PTX_EMULATOR_CACHE",
    os.path.join(tempfile.gettempdir(), f"ptx_emulator_{os.getuid()}_{triton.__version__}"),
)


class _Allocations(TorchDispatchMode):
    """Which bytes of which tensor nobody has written."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if str(function).startswith(EMPTY) and isinstance(out, torch.Tensor):
            if out.device.type == "cpu" and out.numel():
                self.session.note_empty(out)
            return out
        schema = function._schema
        if schema.is_mutable:
            named = dict(zip((a.name for a in schema.arguments), args, strict=False))
            named |= kwargs or {}
            for argument in schema.arguments:
                value = named.get(argument.name)
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in value if isinstance(value, (list, tuple)) else (value,):
                        if isinstance(tensor, torch.Tensor):
                            self.session.note_written(tensor)
        return out


class Session:
    """What several launches share: an architecture, memory, findings, kernels."""

    def __init__(
        self,
        arch: int,
        races: bool = True,
        approx_noise: int = 0,
        on_launch: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None = None,
        schedule: str = "lockstep",
        transform: Callable[[str, str], str] | None = None,
    ) -> None:
        """``transform(name, ptx)`` may change the PTX of a kernel before it is translated."""
        self.arch = arch
        self.transform = transform
        self.schedule = schedule
        self.races, self.noise, self.on_launch = races, approx_noise, on_launch
        self.report = Report()
        self.memory = Memory()
        self.kernels: dict[str, Kernel] = {}
        self.launched: set[str] = set()  # names of kernels, whatever is forgotten
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.original: Any = triton.JITFunction.run

    def forget(self) -> None:
        """Drop all memory and findings, keep compiled kernels."""
        self.report, self.memory = Report(), Memory()

    # -- memory

    def note_empty(self, tensor: torch.Tensor) -> None:
        """Nobody has written this tensor yet."""
        old = self.memory.by_base.get(tensor.untyped_storage().data_ptr())
        if old is not None:
            self.memory.remove(old)
        buffer = self.memory.add_tensor(tensor, "empty", defined=False)
        buffer.allowed = np.zeros(buffer.nbytes, np.uint8)  # until a view is an argument

    def note_written(self, tensor: torch.Tensor) -> None:
        """PyTorch has written this tensor."""
        buffer = self.memory.by_base.get(tensor.untyped_storage().data_ptr())
        if buffer is not None and buffer.defined is not None and tensor.numel():
            self._bytes(buffer.defined, tensor)[...] = 1

    @staticmethod
    def _bytes(mask: Array, tensor: Tensor) -> Array:
        item = tensor.element_size()
        return np.lib.stride_tricks.as_strided(
            mask[tensor.storage_offset() * item :],
            (*tensor.shape, item),
            (*(s * item for s in tensor.stride()), 1),
        )

    def undefined(self, tensor: torch.Tensor) -> int:
        """Elements of a tensor that nobody has written."""
        if tensor.numel() == 0:
            return 0
        buffer = self.memory.by_base.get(tensor.untyped_storage().data_ptr())
        if buffer is None or buffer.defined is None:
            return 0
        return int((self._bytes(buffer.defined, tensor).min(-1) == 0).sum())

    # -- launches

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any) -> Any:
        """Compiles what ``function[grid](*args, **kwargs)`` would, and runs it in the emulator."""
        start = time.perf_counter()
        compiled = self.original(function, *args, grid=grid, warmup=True, **kwargs)
        self.seconds["compile"] += time.perf_counter() - start
        names = list(function.signature.parameters)
        bound = dict(zip(names, args, strict=False))
        bound |= {k: v for k, v in kwargs.items() if k in names}
        for name, parameter in inspect.signature(function.fn).parameters.items():
            if name not in bound and parameter.default is not inspect.Parameter.empty:
                bound[name] = parameter.default
        if callable(grid):
            grid = grid(bound)
        given = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
        start = time.perf_counter()
        kernel = self.kernels.get(compiled.hash)
        if kernel is None:
            ptx = compiled.asm["ptx"]
            if self.transform is not None:
                ptx = self.transform(compiled.metadata.name, ptx)
            kernel = self.kernels[compiled.hash] = Kernel(
                ptx,
                compiled.metadata.name,
                compiled.metadata.num_warps,
                compiled.metadata.shared,
            )
        values = [bound[name] for name in given]
        for size in (compiled.metadata.global_scratch_size, compiled.metadata.profile_scratch_size):
            if size:
                ctas = int(np.prod(grid))
                values.append(torch.empty(size * ctas, dtype=torch.uint8))
            else:
                values.append(None)
        values = values[: len(kernel.entry.params)]
        self.seconds["translate"] += time.perf_counter() - start
        self.launched.add(kernel.name)
        start = time.perf_counter()
        kernel.launch(
            tuple(int(g) for g in grid),
            values,
            self.memory,
            self.report,
            self.races,
            self.noise,
            given,
            schedule=self.schedule,
        )
        self.seconds["run"] += time.perf_counter() - start
        if self.on_launch is not None:
            self.on_launch(function, args, kwargs)
        return compiled


@contextlib.contextmanager
def emulate(
    arch: int = 90, session: Session | None = None, track_empty: bool = True, **options: Any
) -> Iterator[Session]:
    """Everything that Triton launches inside goes to the emulator."""
    session = session or Session(arch, **options)
    before, session.original = driver._active, triton.JITFunction.run
    make_cubin, cache = CUDABackend.make_cubin, knobs.cache.dir

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup:
            return session.original(function, *args, grid=grid, warmup=True, **kwargs)
        return session.run(function, args, kwargs, grid)

    driver.set_active(FakeDriver(session.arch))
    triton.JITFunction.run = run
    CUDABackend.make_cubin = lambda self, src, metadata, options, capability: b""
    knobs.cache.dir = CACHE
    try:
        with _Allocations(session) if track_empty else contextlib.nullcontext():
            yield session
    finally:
        triton.JITFunction.run = session.original
        CUDABackend.make_cubin, knobs.cache.dir = make_cubin, cache
        driver._active = before
