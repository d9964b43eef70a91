"""Clocks of the benchmarks, and the rates of the machine that floors are made of.

CPU: the clock around a call. CUDA, three ways:

``rounds``        events around a call, on a device whose L2 cache is clean and holds none of the
                  operands, and that is held back until the host has queued all launches
``graph_replay``  the same around the replay of a CUDA graph of the call: no launch in it at all
``wall``          the clock over calls back to back, the host's work included
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

DEVICE_VARIABLE = "FCNSEG_BENCH_DEVICE"


def device() -> str:
    """ "cpu" or "cuda": where the benchmarks run."""
    found = os.environ.get(DEVICE_VARIABLE) or ("cuda" if torch.cuda.is_available() else "cpu")
    if found not in ("cpu", "cuda"):
        raise ValueError(f"{DEVICE_VARIABLE}: expected cpu or cuda, got {found!r}")
    return found


def synchronize() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def statistics(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    data = torch.tensor(seconds, dtype=torch.float64) * 1e3
    found = {
        name: round(data.quantile(q).item(), 4)
        for name, q in (("p20", 0.2), ("median", 0.5), ("p80", 0.8))
    }
    return {**found, "rounds": len(seconds)}


def time_case(benchmark: Any, run: Callable[[], Any], case: str, name: str) -> None:
    """Under pytest-benchmark: some two seconds of rounds, 7 to 101 of them."""

    def whole() -> None:
        run()
        synchronize()

    whole()
    start = time.perf_counter()
    whole()
    once = time.perf_counter() - start
    benchmark.extra_info.update({"case": case, "implementation": name, "device": device()})
    benchmark.pedantic(whole, rounds=min(101, max(7, int(2.0 / once))), warmup_rounds=1)


def _cpu_rounds(run: Callable[[], Any], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


class _Flush:
    """Empties the L2 cache of the operands, and leaves no line in it that must be written back.

    Overwriting alone would leave up to the whole cache of changed lines, which the device writes
    back while the next call runs and is timed. Reading another buffer, twice as large as the cache,
    writes them back before.
    """

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        count = max(64 << 20, 2 * properties.L2_cache_size) // 4
        self.written = torch.empty(count, dtype=torch.float32, device="cuda")
        self.read = torch.zeros(count, dtype=torch.float32, device="cuda")
        self.total = torch.empty((), dtype=torch.float32, device="cuda")

    def __call__(self) -> None:
        self.written.zero_()
        torch.sum(self.read, dim=0, out=self.total)


def _cuda_rounds(run: Callable[[], Any], count: int) -> list[float]:
    """Device time of each call."""
    flush = _Flush()
    torch.cuda.synchronize()
    start_of_call = time.perf_counter()
    run()
    host = time.perf_counter() - start_of_call
    torch.cuda.synchronize()
    # 2 GHz or less; at most 20 ms, for what waits for the device itself
    hold_back = int(min(1.5 * host + 1e-4, 0.02) * 2e9)
    seconds = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        torch.cuda._sleep(hold_back)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3)
    return seconds


def rounds(run: Callable[[], Any], count: int) -> list[float]:
    """Seconds of ``count`` calls, each."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return (_cuda_rounds if device() == "cuda" else _cpu_rounds)(run, count)
    finally:
        if collecting:
            gc.enable()


def measure(runs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, float]]:
    """Statistics of each, some ``seconds`` of it, in turn, three times over.

    7 to 101 rounds; 3 where one takes longer than five seconds.
    """
    counts: dict[str, int] = {}
    found: dict[str, list[float]] = {}
    for name, run in runs.items():
        run()  # compiles
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        once = time.perf_counter() - start
        counts[name] = min(101, max(3 if once > 5 else 7, int(seconds / once)))
        found[name] = []
    for i in range(3):
        for name, run in runs.items():
            found[name] += rounds(run, (counts[name] + i) // 3)
    return {name: statistics(each) for name, each in found.items()}


def wall(run: Callable[[], Any], seconds: float = 0.2) -> float:
    """Milliseconds of a call, back to back with 4 to 49 others (CUDA), once compiled."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = min(50, max(5, int(seconds / (time.perf_counter() - start))))
    start = time.perf_counter()
    for _ in range(count):
        run()
    torch.cuda.synchronize()
    return round((time.perf_counter() - start) * 1e3 / count, 4)


def graph_replay(run: Callable[[], Any]) -> Callable[[], None]:
    """The replay of a CUDA graph of one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure_rates(tiny: bool = False) -> dict[str, float]:
    """Of this process, with its threads, per millisecond.

    Bytes read and written by a large copy; fp32 multiply-adds of a large matrix product, as
    operations; on CUDA also fp16 ones, as products.
    """
    large = device() == "cuda"
    count = 1 << (18 if tiny else 27 if large else 26)
    source = torch.ones(count, device=device())
    copy = torch.empty_like(source)
    edge = 64 if tiny else 8192 if large else 1024
    a = torch.randn(edge, edge, device=device())
    out = torch.empty_like(a)
    fastest = {}
    runs: dict[str, Callable[[], Any]] = {
        "bytes": lambda: copy.copy_(source),
        "operations": lambda: torch.mm(a, a, out=out),
    }
    if large:
        half, half_out = a.half(), out.half()
        runs["products"] = lambda: torch.mm(half, half, out=half_out)
    amounts = {"bytes": 2 * 4 * count, "operations": edge**3, "products": edge**3}
    for name, run in runs.items():
        run()
        fastest[name] = min(rounds(run, 7)) * 1e3
    return {f"{name} per ms": amounts[name] / fastest[name] for name in runs}
