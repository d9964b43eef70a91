"""What the benchmarks share: problems, processes, the table, the file of results.

A ``bench_NAME.py`` holds ``CASES``, ``implementation(name, case)`` and a pytest-benchmark function
``test_time`` that checks correctness first. As a script it runs itself under pytest-benchmark once
per ``Mode``, each in a process of its own, then measures memory, prints a Markdown table and
writes ``results/NAME_DEVICE_DATE.json``:

    python benchmarks/bench_NAME.py [--cases CASE ...]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fcnseg

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
# Eager gives every large tensor back to the kernel and faults it in again; this keeps the pages.
PAGE_KEEPING = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


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
        return logits, torch.where(grow(ignored, 64), 255, target).contiguous()


@dataclass(frozen=True)
class Mode:
    """A process: what runs in it, and its environment. ``name`` "" is the plain one."""

    name: str
    implementations: Sequence[str]
    cases: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


def header() -> dict[str, Any]:
    """What the numbers belong to."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        model = names[0].split(": ")[1] if names else model
    return {
        "device": f"{os.cpu_count()} x {model}",
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "build_info": fcnseg.build_info(),
    }


def require_compiled(operator: str) -> None:
    """The fallback must not be called fused."""
    kind = fcnseg.build_info()["operators"][operator]["cpu"]
    if kind != "c++":
        raise RuntimeError(f"fcnseg::{operator} runs on {kind!r} here; build the extension first")


def time_case(benchmark: Any, run: Callable[[], Any], case: str, name: str) -> None:
    """Under pytest-benchmark: some two seconds of rounds, 7 to 101 of them."""
    run()
    start = time.perf_counter()
    run()
    once = time.perf_counter() - start
    benchmark.extra_info.update({"case": case, "implementation": name})
    benchmark.pedantic(run, rounds=min(101, max(7, int(2.0 / once))), warmup_rounds=1)


def statistics(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    data = torch.tensor(seconds, dtype=torch.float64) * 1e3
    return {
        name: round(data.quantile(q).item(), 4)
        for name, q in (("p20", 0.2), ("median", 0.5), ("p80", 0.8))
    }


_PEAK = """
import dataclasses, importlib, sys
import torch

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1])

torch.set_num_threads(1)
bench = importlib.import_module(sys.argv[1])
case = eval(sys.argv[3], {"Case": bench.Case, "torch": torch})
bench.implementation(sys.argv[2], dataclasses.replace(case, shape=(1, 2, 4, 4), size=(8, 8)))()
run = bench.implementation(sys.argv[2], case)
try:
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
except OSError:
    pass
before = status("VmHWM")
run()
print(status("VmHWM") - before)
"""


def peak_memory(module: str, name: str, case: Case) -> float:
    """Growth of the resident set's peak over one call, MB, in a new process (Linux)."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}"}
    command = [sys.executable, "-c", _PEAK, module, name, repr(case)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return round(int(finished.stdout) / 1024, 2)


def run_mode(file: Path, mode: Mode, cases: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{case: {implementation: statistics}} of one process."""
    nodes = [
        f"{file}::test_time[{name}-{case}]"
        for case in mode.cases
        if case in cases
        for name in mode.implementations
    ]
    found: dict[str, dict[str, Any]] = {}
    if not nodes:
        return found
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}", **mode.environment}
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nodes,
             f"--benchmark-json={report}", "--benchmark-columns=median,rounds"],
            cwd=HERE, env=environment, check=True,
        )  # fmt: skip
        for each in json.loads(report.read_text())["benchmarks"]:
            info = each["extra_info"]
            row = found.setdefault(info["case"], {})
            row[info["implementation"]] = statistics(each["stats"]["data"])
    return found


def table(rows: dict[str, dict[str, Any]], columns: Sequence[str]) -> str:
    """Medians; how many times faster fused is; memory."""
    lines = ["| case | fused, ms |"]
    for column in columns:
        lines[0] += f" {column}, ms | ratio |"
    lines[0] += " memory fused / eager, MB |"
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for case, row in rows.items():
        ours = row["fused"]["median"]
        line = f"| {case} | {ours:.2f} |"
        for column in columns:
            if column in row:
                theirs = row[column]["median"]
                line += f" {theirs:.1f} | {theirs / ours:.1f}x |"
            else:
                line += " | |"
        memory = row.get("memory")
        lines.append(line + (f" {memory['fused']} / {memory['eager']} |" if memory else " |"))
    return "\n".join(lines)


def save(name: str, content: dict[str, Any]) -> Path:
    """Write ``results/NAME_DEVICE_DATE.json``."""
    about = header()
    words = "".join(x if x.isalnum() else " " for x in about["device"]).lower().split()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{'-'.join(words)}_{about['date']}.json"
    path.write_text(json.dumps({"header": about, **content}, indent=1) + "\n")
    return path


def main(
    file: str, modes: Sequence[Mode], columns: Sequence[str], memory_cases: Sequence[str]
) -> None:
    """Run a benchmark file as the head of this one says."""
    path = Path(file).resolve()
    sys.path.insert(0, str(HERE))
    bench = importlib.import_module(path.stem)
    parser = argparse.ArgumentParser(description=f"{path.stem}: time, memory, accuracy")
    parser.add_argument("--cases", nargs="+", choices=bench.CASES, default=list(bench.CASES))
    cases = parser.parse_args().cases
    load = os.getloadavg()
    rows: dict[str, dict[str, Any]] = {}
    for mode in modes:
        for case, found in run_mode(path, mode, cases).items():
            if "fused" in mode.implementations:
                rows[f"{case}, {mode.name}" if mode.name else case] = found
            elif mode.implementations == ["eager"]:
                rows[case][mode.name] = found["eager"]
            else:  # one implementation at several numbers of threads: the better one
                rows[case][mode.name] = min(found.values(), key=lambda each: each["median"])
    for case in cases:
        if case in memory_cases:
            rows[case]["memory"] = {
                name: peak_memory(path.stem, name, bench.CASES[case]) for name in ("fused", "eager")
            }
        if hasattr(bench, "facts"):
            rows[case]["facts"] = bench.facts(bench.CASES[case])
    print(table(rows, columns))
    print(save(path.stem, {"load_before": load, "milliseconds": rows}))
