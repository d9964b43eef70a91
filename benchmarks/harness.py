"""What the benchmarks share: problems, clocks, floors, processes, tables, files of results.

The contract of a ``bench_NAME.py``, where NAME is an operator's stem:

    CASES                       {name: case}; a case has ``inputs()``, on device(), and ``tiny()``
    CUDA_CASES                  optional: these instead of CASES where device() is "cuda"
    SUMMARY                     optional: the names in CASES that make bench runs; all files: 12
    OPERATORS                   optional: what "fused" calls, where that is not the operator NAME
    implementation(name, case)  one step as a callable of no arguments, on inputs of its own; it
                                returns what it made and keeps none of it (so autograd.grad, not
                                .grad). Names: "fused", "eager", "compile" and the peers; a peer
                                that is not installed raises Unavailable(reason)
    check(case)                 asserts that "fused" is right, before anything is timed
    work(case)                  optional: the Work that cannot be avoided, for the floor
    facts(case)                 optional: {name: number}, into the file of results
    test_time(benchmark, name, case)   one pytest-benchmark round trip by time_case

and at its end ``main(__file__, modes, columns, memory_cases)``. Each Mode is a process in which its
implementations are timed in turn, case by case; memory on the CPU takes one more process each:

    python benchmarks/bench_NAME.py [--device cpu|cuda] [--threads N] [--cases CASE ...] [--quick]

prints a Markdown table and writes ``results/bench_NAME_DEVICE_DATE.json``.

1. Time. CPU: the clock around a call, implementations in turn, three times over. CUDA: events
   around a call, after the L2 cache was overwritten and while the device is held back until the
   host has queued all launches; "wall" is the clock over calls back to back, launches included;
   "graph" is the events around the replay of a CUDA graph of "fused".
2. Memory. CPU: growth of the peak of the resident set over one call. CUDA: of the allocator's.
3. Floor = max(bytes / copy bandwidth, operations / arithmetic rate), both rates measured in the
   same process with the same number of threads: bytes read and written by a large copy per second;
   fp32 multiply-adds of a large matrix product per second. An operation is what one lane issues:
   an add, a multiply or a multiply-add.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fcnseg

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
DEVICE_VARIABLE = "FCNSEG_BENCH_DEVICE"
# Eager gives every large tensor back to the kernel and faults it in again; this keeps the pages.
PAGE_KEEPING = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


class Unavailable(Exception):
    """An implementation cannot run here; the message says why."""


def device() -> str:
    """ "cpu" or "cuda": where the benchmarks run."""
    found = os.environ.get(DEVICE_VARIABLE) or ("cuda" if torch.cuda.is_available() else "cpu")
    if found not in ("cpu", "cuda"):
        raise ValueError(f"{DEVICE_VARIABLE}: expected cpu or cuda, got {found!r}")
    return found


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

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        logits = (torch.randn(self.shape, generator=generator) * self.scale).to(self.dtype)
        if self.channels_last:
            logits = logits.to(memory_format=torch.channels_last)
        (N, C), (H, W) = self.shape[:2], self.size

        def grow(blocks: Tensor, edge: int) -> Tensor:
            return blocks.repeat_interleave(edge, 1).repeat_interleave(edge, 2)[:, :H, :W]

        if self.noise:
            target = torch.randint(C, (N, H, W), generator=generator)
        else:
            blocks = torch.randint(C, (N, H // 24 + 1, W // 24 + 1), generator=generator)
            target = grow(blocks, 24)
        ignored = torch.rand(N, H // 64 + 1, W // 64 + 1, generator=generator) < 0.05
        target = torch.where(grow(ignored, 64), 255, target).contiguous()
        return logits.to(device()), target.to(device())

    def tiny(self) -> Case:
        """The same case, small: for warming up and for tests."""
        return dataclasses.replace(self, shape=(1, 2, 4, 4), size=(8, 8))


@dataclass(frozen=True)
class Work:
    """Bytes that must be read and written at least once, and operations (3 above)."""

    read: int
    written: int
    operations: int = 0

    def floor(self, rates: Mapping[str, float]) -> dict[str, Any]:
        """Milliseconds of each bound; the floor is the larger one."""
        by_bytes = (self.read + self.written) / rates["bytes per ms"]
        by_operations = self.operations / rates["operations per ms"]
        return {
            "ms": max(by_bytes, by_operations),
            "bound": "bytes" if by_bytes >= by_operations else "operations",
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


# --- clocks ---------------------------------------------------------------------------------------


def statistics(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    data = torch.tensor(seconds, dtype=torch.float64) * 1e3
    found = {
        name: round(data.quantile(q).item(), 4)
        for name, q in (("p20", 0.2), ("median", 0.5), ("p80", 0.8))
    }
    return {**found, "rounds": len(seconds)}


def synchronize() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


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


def _cuda_rounds(run: Callable[[], Any], count: int) -> list[float]:
    """Device time of each call (1 above)."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush = torch.empty(
        max(64 << 20, 2 * properties.L2_cache_size), dtype=torch.uint8, device="cuda"
    )
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
        flush.zero_()
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


def wall(run: Callable[[], Any], count: int = 50) -> float:
    """Milliseconds of a call, back to back with others (CUDA)."""
    torch.cuda.synchronize()
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
    """Of this process, with its threads: bytes and operations per millisecond (3 above)."""
    large = device() == "cuda"
    count = 1 << (18 if tiny else 27 if large else 26)
    source = torch.ones(count, device=device())
    copy = torch.empty_like(source)
    edge = 64 if tiny else 8192 if large else 1024
    a = torch.randn(edge, edge, device=device())
    out = torch.empty_like(a)
    fastest = {}
    for name, run in (
        ("copy", lambda: copy.copy_(source)),
        ("product", lambda: torch.mm(a, a, out=out)),
    ):
        run()
        fastest[name] = min(rounds(run, 7)) * 1e3
    return {
        "bytes per ms": 2 * 4 * count / fastest["copy"],
        "operations per ms": edge**3 / fastest["product"],
    }


# --- memory ---------------------------------------------------------------------------------------

_PEAK = """
import importlib, os, sys
import torch

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1])

torch.set_num_threads(1)
bench = importlib.import_module(sys.argv[1])
case = eval(sys.argv[3], {**vars(importlib.import_module("harness")), **vars(bench)})
bench.implementation(sys.argv[2], case.tiny())()
run = bench.implementation(sys.argv[2], case)
try:
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
except OSError:
    pass
before = status("VmHWM")
run()
print(status("VmHWM") - before)
"""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a process that imports the benchmarks."""
    path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), **(extra or {})}


def peak_memory(module: str, name: str, case: Any) -> float:
    """Growth of the resident set's peak over one call on the CPU, MB, in a new process (Linux)."""
    command = [sys.executable, "-c", _PEAK, module, name, repr(case)]
    finished = subprocess.run(
        command,
        env=environment({DEVICE_VARIABLE: "cpu"}),
        capture_output=True,
        text=True,
        check=True,
    )
    return round(int(finished.stdout) / 1024, 2)


def cuda_peak_memory(run: Callable[[], Any]) -> float:
    """Growth of the allocator's peak over one call, MB; ``run`` has been called before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)


# --- a process of measurements --------------------------------------------------------------------


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
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            row.setdefault("failed", {})[name] = text[:200]
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
                row.setdefault("failed", {})["graph of fused"] = str(error).splitlines()[0][:200]
    if "fused" in runs and hasattr(bench, "work"):
        row["floor"] = bench.work(case).floor(rates)
    if "fused" in runs and hasattr(bench, "facts"):
        row["facts"] = bench.facts(case)
    return row


def worker(text: str) -> None:
    """The process of a Mode: writes {"rates", "rows", "failed"} to options["out"], case by case."""
    options = json.loads(text)
    torch.set_num_threads(options["threads"])
    bench = importlib.import_module(options["module"])
    cases = cases_of(bench)
    content: dict[str, Any] = {"rates": measure_rates(options["quick"]), "rows": {}, "failed": {}}
    for name in options["cases"]:
        print(f"{options['module']}: {name}", file=sys.stderr, flush=True)
        case = cases[name].tiny() if options["quick"] else cases[name]
        try:
            row = measure_case(
                bench, case, options["implementations"], options["seconds"], content["rates"]
            )
            content["rows"][name] = row
        except Exception as error:
            row = {}
            content["failed"][name] = f"{type(error).__name__}: {error}"[:1000]
        for which, reason in row.pop("failed", {}).items():
            content["failed"][f"{name}, {which}"] = reason
        Path(options["out"]).write_text(json.dumps(content))


def run_worker(
    module: str,
    mode: Mode,
    cases: Sequence[str],
    *,
    threads: int,
    seconds: float,
    quick: bool,
    timeout: float | None = None,
) -> dict[str, Any]:
    """What ``worker`` wrote; a process that dies or is out of time leaves what it had."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        options = {
            "module": module,
            "implementations": list(mode.implementations),
            "cases": list(cases),
            "threads": threads,
            "seconds": seconds,
            "quick": quick,
            "out": str(out),
        }
        command = [sys.executable, "-c", "import sys, harness; harness.worker(sys.argv[1])"]
        try:
            code = subprocess.run(
                [*command, json.dumps(options)],
                cwd=ROOT,
                env=environment({DEVICE_VARIABLE: device(), **mode.environment}),
                timeout=timeout,
            ).returncode
            reason = f"the process ended with {code}" if code else None
        except subprocess.TimeoutExpired:
            reason = f"no end after {timeout:.0f} s"
        empty: dict[str, Any] = {"rates": {}, "rows": {}, "failed": {}}
        content = json.loads(out.read_text()) if out.exists() else empty
        if reason is not None:
            content["failed"][f"process {mode.name!r}"] = reason
        return content


# --- files and tables -----------------------------------------------------------------------------


def _first_line(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def device_name() -> str:
    if device() == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        model = names[0].split(": ")[1] if names else model
    return f"{os.cpu_count()} x {model}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def header(command: str | None = None) -> dict[str, Any]:
    """What the numbers belong to."""
    if command is None:
        script = Path(sys.argv[0]).resolve()
        script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
        command = " ".join(["python", f"{script}", *sys.argv[1:]])
    commit = _first_line(["git", "rev-parse", "--short", "HEAD"])
    changed = _first_line(["git", "status", "--porcelain", "--untracked-files=no"])
    about = {
        "device": device_name(),
        "kind": device(),
        "driver": None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": f"{commit or 'unknown'}{' with changes' if changed else ''}",
        "command": command,
        "date": datetime.date.today().isoformat(),
        "build_info": fcnseg.build_info(),
    }
    if device() == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = _first_line(query)
        about["capability"] = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return about


def table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Medians; how many times longer the others took; memory; floor."""
    columns = [each for each in columns if any(each in row for row in rows.values())]
    lines = ["| case | fused, ms |"]
    for column in columns:
        lines[0] += f" {column} |"
    lines[0] += " memory, fused / eager, MB | floor, ms | fused / floor |"
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for case, row in rows.items():
        ours = row.get("fused", {}).get("median")
        line = f"| {case} | {milliseconds(ours)} |"
        for column in columns:
            line += f" {ratio(row, column)} |"
        line += f" {memory_cell(row)} | {floor_cells(row)} |"
        lines.append(line)
    return "\n".join(lines)


def milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(row: Mapping[str, Any], name: str) -> str:
    """Of a competitor's time to that of fused, as 12x, or why there is none."""
    if name in row and "fused" in row:
        times = row[name]["median"] / row["fused"]["median"]
        return f"{times:.1f}x" if times < 10 else f"{times:.0f}x"
    if name in row:
        return f"{milliseconds(row[name]['median'])} ms"
    return row.get("skipped", {}).get(name, "")


def memory_cell(row: Mapping[str, Any]) -> str:
    memory = row.get("memory", {})
    if "fused" not in memory or "eager" not in memory:
        return ""
    return f"{memory['fused']:.1f} / {memory['eager']:.0f}"


def floor_cells(row: Mapping[str, Any]) -> str:
    """Two cells: the floor and what bounds it; the multiple of it that fused took."""
    floor = row.get("floor")
    if floor is None or "fused" not in row:
        return "|"
    times = row["fused"]["median"] / floor["ms"]
    return f"{milliseconds(floor['ms'])} ({floor['bound']}) | {times:.1f}"


def results_path(name: str, about: Mapping[str, Any]) -> Path:
    words = "".join(x if x.isalnum() else " " for x in about["device"]).lower().split()
    folder = Path(os.environ.get("OUT") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}_{'-'.join(words)}_{about['date']}.json"


def save(name: str, content: dict[str, Any], command: str | None = None) -> Path:
    """Write ``NAME_DEVICE_DATE.json`` into $OUT, or into results/."""
    about = header(command)
    path = results_path(name, about)
    content = {"name": name, "header": about, **content}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def in_one_process(modes: Sequence[Mode], cases: Sequence[str]) -> Mode:
    """All implementations that need no environment of their own, side by side on every case."""
    names = [name for mode in modes if not mode.environment for name in mode.implementations]
    return Mode("", list(dict.fromkeys(names)), cases)


def run_file(
    module: str,
    modes: Sequence[Mode],
    cases: Sequence[str],
    memory_cases: Sequence[str],
    *,
    threads: int,
    seconds: float,
    quick: bool,
    timeout: float | None = None,
) -> dict[str, Any]:
    """{"threads", "load_before", "rates", "rows", "failed"} of a benchmark file."""
    bench = importlib.import_module(module)
    known = cases_of(bench)
    out: dict[str, Any] = {
        "threads": threads,
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "rates": {},
        "rows": {},
        "failed": {},
    }
    rows = out["rows"]
    for mode in modes:
        own = [case for case in cases if case in mode.cases]
        if not own:
            continue
        found = run_worker(
            module, mode, own, threads=threads, seconds=seconds, quick=quick, timeout=timeout
        )
        out["rates"] = out["rates"] or found["rates"]
        for name, reason in found["failed"].items():
            out["failed"][f"{name}, {mode.name}" if mode.name else name] = reason
        for case, row in found["rows"].items():
            if "fused" in mode.implementations:
                rows[f"{case}, {mode.name}" if mode.name else case] = row
                continue
            # a competitor in an environment of its own goes by the environment's name
            into = rows.setdefault(case, {})
            into.setdefault("skipped", {}).update(row.pop("skipped", {}))
            for name in mode.implementations:
                if name in row:
                    into[mode.name if mode.environment else name] = row[name]
    if device() == "cpu" and not quick:
        for case in cases:
            if case in memory_cases and "fused" in rows.get(case, {}):
                rows[case]["memory"] = {
                    name: peak_memory(module, name, known[case]) for name in ("fused", "eager")
                }
    return out


def main(
    file: str, modes: Sequence[Mode], columns: Sequence[str], memory_cases: Sequence[str]
) -> None:
    """Run a benchmark file as the head of this one says."""
    module = Path(file).resolve().stem
    parser = argparse.ArgumentParser(description=f"{module}: time, memory, floor")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device())
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="per implementation and case")
    parser.add_argument("--timeout", type=float, help="seconds of each process")
    parser.add_argument("--plain", action="store_true", help="one process, no environments")
    parser.add_argument("--quick", action="store_true", help="tiny problems: a test of the code")
    parser.add_argument("--json", type=Path, help="the rows go there instead of to results/")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    os.environ[DEVICE_VARIABLE] = options.device
    sys.path.insert(0, str(HERE))
    known = cases_of(importlib.import_module(module))
    cases = options.cases or list(known)
    if unknown := [case for case in cases if case not in known]:
        parser.error(f"--cases: no {unknown[0]!r} on {options.device}; choose from {list(known)}")
    # what allocators and instruction sets do is a question of the CPU's
    one_process = options.plain or options.quick or options.device == "cuda"
    content = run_file(
        module,
        [in_one_process(modes, cases)] if one_process else modes,
        cases,
        memory_cases,
        threads=options.threads,
        seconds=0.01 if options.quick else options.seconds,
        quick=options.quick,
        timeout=options.timeout,
    )
    print(table(content["rows"], [*columns, *_peers(content["rows"], columns)]))
    if options.json is not None:
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    elif not options.quick:
        print(os.path.relpath(save(module, content)))
    for name, reason in content["failed"].items():
        print(f"FAILED: {name}: {reason}", file=sys.stderr)
    sys.exit(1 if content["failed"] else 0)


def _peers(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Competitors in the rows, in order, that ``columns`` does not name."""
    names = [
        name
        for row in rows.values()
        for name in (
            *(key for key, value in row.items() if isinstance(value, dict) and "median" in value),
            *row.get("skipped", {}),
        )
    ]
    return [name for name in dict.fromkeys(names) if name not in ("fused", *columns)]
