"""What the benchmarks share: their contract, problems, floors, and the measuring of one case.

The contract of a ``bench_NAME.py``, where NAME is an operator's stem:

    CASES                       {name: case}; a case has ``inputs()``, on device(), and ``tiny()``
    CUDA_CASES                  optional: these instead of CASES where device() is "cuda", the one
                                that matters most first
    SUMMARY                     optional: the names in CASES that make bench runs; all files: 12
    OPERATORS                   optional: what "fused" calls, where that is not the operator NAME
    MODES                       [Mode, ...]: the processes that measure it, see below
    MEMORY_CASES                the names in CASES whose memory is measured on the CPU
    implementation(name, case)  one step as a callable of no arguments, on inputs that nobody
                                writes to; it returns what it made and keeps none of it (so
                                autograd.grad, not .grad). Names: "fused", "eager", "compile" and
                                the peers; a peer that is not installed raises Unavailable(reason)
    check(case)                 asserts that "fused" is right, before anything is timed
    work(case)                  optional: the Work that cannot be avoided, for the floor
    facts(case)                 optional: {name: number}, into the file of results
    test_time(benchmark, name, case)   one pytest-benchmark round trip by time_case

and at its end ``main(__file__)`` of workers.py. Each Mode is a process in which its implementations
are timed in turn, case by case; memory on the CPU takes one more process each:

    python benchmarks/bench_NAME.py [--device cpu|cuda] [--threads N] [--cases CASE ...] [--quick]

prints a Markdown table and writes ``results/bench_NAME_DEVICE_DATE.json``.

1. Inputs are made once a case, on the device, and so is what ``check`` compares with.
2. Time: clocks.py. "fused", "eager" and so on are medians of single calls (on CUDA by events);
   "wall" and, of "fused", "graph" are the two other clocks.
3. Memory: memory.py.
4. Floor = max(bytes / copy bandwidth, operations / arithmetic rate, products / their rate), the
   rates measured in the same process with the same number of threads. An operation is what one lane
   issues: an add, a multiply or a multiply-add. Products are multiply-adds of a matrix product of
   half-precision operands on CUDA, where tensor cores may do them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from clocks import device, graph_replay, measure, rounds, statistics, synchronize, wall
from memory import cuda_peak_memory
from torch import Tensor

import fcnseg

# Eager gives every large tensor back to the kernel and faults it in again; this keeps the pages.
PAGE_KEEPING = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


class Unavailable(Exception):
    """An implementation cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """A problem: logits of ``scale`` randn, targets in blocks (or noise), 5% of it ignored."""

    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    dtype: torch.dtype = torch.float32
    scale: float = 3.0
    channels_last: bool = False
    noise: bool = False
    reduction: str = "mean"
    backward: bool = True
    labels: torch.dtype = torch.int64

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Logits and target; the memory belongs to all callers."""
        logits, target = _inputs(self, device())
        return logits.detach(), target

    def tiny(self) -> Case:
        """The same case, small: for warming up and for tests."""
        return dataclasses.replace(self, shape=(1, 2, 4, 4), size=(8, 8))


@functools.lru_cache(maxsize=1)
def _inputs(case: Case, where: str) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"generator": torch.Generator(where).manual_seed(0), "device": where}
    logits = (torch.randn(case.shape, **options) * case.scale).to(case.dtype)
    if case.channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    (N, C), (H, W) = case.shape[:2], case.size

    def grow(blocks: Tensor, edge: int) -> Tensor:
        return blocks.repeat_interleave(edge, 1).repeat_interleave(edge, 2)[:, :H, :W]

    if case.noise:
        target = torch.randint(C, (N, H, W), **options)
    else:
        target = grow(torch.randint(C, (N, H // 24 + 1, W // 24 + 1), **options), 24)
    ignored = torch.rand(N, H // 64 + 1, W // 64 + 1, **options) < 0.05
    target = torch.where(grow(ignored, 64), 255, target).to(case.labels)
    return logits, target.contiguous()


@dataclass(frozen=True)
class Work:
    """Bytes that must be read and written at least once, operations and products (4 above)."""

    read: int
    written: int
    operations: int = 0
    products: int = 0

    def floor(self, rates: Mapping[str, float]) -> dict[str, Any]:
        """Milliseconds of each bound; the floor is the larger one."""
        bounds = {
            "bytes": (self.read + self.written) / rates["bytes per ms"],
            "operations": self.operations / rates["operations per ms"],
        }
        if self.products:
            bounds["products"] = self.products / rates["products per ms"]
        bound = max(bounds, key=lambda name: bounds[name])
        return {
            "ms": bounds[bound],
            "bound": bound,
            "read ms": self.read / rates["bytes per ms"],
            **dataclasses.asdict(self),
        }


@dataclass(frozen=True)
class Mode:
    """A process: what runs in it, and its environment. ``name`` "" is the plain one."""

    name: str
    implementations: Sequence[str]
    cases: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


def cases_of(bench: ModuleType) -> dict[str, Any]:
    return getattr(bench, "CUDA_CASES", bench.CASES) if device() == "cuda" else bench.CASES


def in_one_process(modes: Sequence[Mode], cases: Sequence[str]) -> Mode:
    """All implementations that need no environment of their own, side by side on every case."""
    names = [name for mode in modes if not mode.environment for name in mode.implementations]
    return Mode("", list(dict.fromkeys(names)), cases)


def require_compiled(operator: str) -> None:
    """The fallback must not be called fused, on either device."""
    kind = fcnseg.build_info()["operators"][operator][device()]
    if kind not in ("c++", "triton", "cuda"):
        raise RuntimeError(
            f"fcnseg::{operator} runs on {kind!r} for {device()} tensors here; it may not be "
            "called fused. Build the extension (and install triton for CUDA) first"
        )


def require_compiled_file(bench: ModuleType) -> None:
    stem = bench.__name__.removeprefix("bench_")
    for operator in getattr(bench, "OPERATORS", (stem,)):
        require_compiled(operator)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def measure_case(
    bench: ModuleType,
    case: Any,
    names: Sequence[str],
    seconds: float,
    rates: Mapping[str, float],
) -> dict[str, Any]:
    """{implementation: statistics}; and "skipped", "failed", "floor", "facts", "memory"."""
    row: dict[str, Any] = {}
    runs: dict[str, Callable[[], Any]] = {}
    if "fused" in names:
        require_compiled_file(bench)
        bench.check(case)
    for name in names:
        try:
            run = bench.implementation(name, case)
            run()
            synchronize()
            runs[name] = run
        except Unavailable as reason:
            row.setdefault("skipped", {})[name] = str(reason)
        except torch.OutOfMemoryError:
            row.setdefault("skipped", {})[name] = "out of memory"
        except Exception as error:
            if name == "fused":
                raise
            row.setdefault("failed", {})[name] = first_line(error)
    row.update(measure(runs, seconds))
    if device() == "cuda":
        row["memory"] = {name: cuda_peak_memory(run) for name, run in runs.items()}
        for name, run in runs.items():
            row[name]["wall"] = wall(run)
        if "fused" in runs:
            try:
                replay = graph_replay(runs["fused"])
                row["fused"]["graph"] = statistics(rounds(replay, 21))["median"]
            except RuntimeError as error:
                row.setdefault("failed", {})["graph of fused"] = first_line(error)
    if "fused" in runs and hasattr(bench, "work"):
        row["floor"] = bench.work(case).floor(rates)
    if "fused" in runs and hasattr(bench, "facts"):
        row["facts"] = bench.facts(case)
    return row
