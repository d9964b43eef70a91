"""Kernels and their launches: arguments, shared memory, batches of CTAs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx_emulator.batch import Batch
from tests.ptx_emulator.lanes import WINDOW, EmulatorError
from tests.ptx_emulator.memory import UNSIGNED, Array, Memory
from tests.ptx_emulator.parser import parse
from tests.ptx_emulator.report import Report
from tests.ptx_emulator.translator import Translator

MAX_LANES = 4096


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


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
        grid: Sequence[int],
        args: Sequence[Any],
        memory: Memory | None = None,
        report: Report | None = None,
        races: bool = True,
        approx_noise: int = 0,
        names: Sequence[str] | None = None,
        block: Sequence[int] | None = None,
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
        launch = Launch(
            self, memory, report, _three(grid), _three(block or (self.threads,)), params, races,
            approx_noise, schedule,
        )  # fmt: skip
        report.launches[self.name] += 1
        with np.errstate(all="ignore"):
            launch.run()
        return report

    def _parameters(
        self, args: Sequence[Any], memory: Memory, names: Sequence[str] | None
    ) -> dict[str, Array]:
        """The bytes of every parameter; arrays and tensors become known to the memory."""
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


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, run in batches of CTAs."""

    kernel: Kernel
    memory: Memory
    report: Report
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: dict[str, Array]
    races: bool
    noise: int
    schedule: str

    def run(self) -> None:
        """Runs every CTA, and counts the instructions of each kind that warps executed."""
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
