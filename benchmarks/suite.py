"""Sets of benchmarks, each into one file of results.

    python benchmarks/suite.py summary    make bench: the cases that the files name in SUMMARY
    python benchmarks/suite.py matrix     make bench-full: every case, every process
    python benchmarks/suite.py smoke      make gpu-check: the first case of every file, short
    python benchmarks/suite.py gpu        make gpu-measure: every case, in order of worth
    python benchmarks/suite.py rehearse   the cases of gpu once, in parallel and untimed
    python benchmarks/suite.py ... [--device cpu|cuda] [--threads N] [--seconds S] [--timeout S]
                                   [--quick]

writes ``results/SET_DEVICE_DATE.json`` (or into $OUT): {"name", "header", "files": {NAME: what
workers.run_file found}}. The file is written anew whenever something was measured; a rehearsal
writes none, it fills the caches of the compilers. On a CUDA device each set takes every case. What
fails is named at the end; the others run all the same. --timeout: seconds of all files.

The gpu set measures in one process while nothing breaks it: first two cases of every file, the
losses before the others; then the rest; and torch.compile, which takes longest to get ready, last,
except for the very first case. --quick takes two cases of every file and leaves torch.compile out.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import clocks
import result_files
import tables
import workers
from harness import Mode, cases_of, first_line, in_one_process
from processes import HERE

SUMMARY_LIMIT = 12
COMMANDS = {"summary": "make bench", "matrix": "make bench-full",
            "smoke": "make gpu-check", "gpu": "make gpu-measure"}  # fmt: skip
SECONDS = {"summary": 1.0, "matrix": 2.0, "smoke": 0.1, "gpu": 0.3}  # per implementation and case
#: Of one case in a set of make gpu; torch.compile may take half of it.
CASE_LIMIT = 40.0


def modules() -> list[str]:
    """The benchmark files that keep the contract of harness.py; the main one first, then losses."""
    # read, not imported: the others may import what is not installed
    files = sorted(HERE.glob("bench_*.py"))
    kept = [path.stem for path in files if re.search(r"^CASES\b", path.read_text(), re.MULTILINE)]
    first = "bench_upsample_cross_entropy"
    return sorted(kept, key=lambda name: (name != first, "cross_entropy" not in name, name))


def importable(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Those that import here, and why the others do not."""
    kept, reasons = [], {}
    for name in names:
        try:
            importlib.import_module(name)
            kept.append(name)
        except Exception as error:  # whatever it is, the other files are measured
            reasons[name] = first_line(error)
    return kept, reasons


def summary_cases(module: str) -> list[str]:
    return list(getattr(importlib.import_module(module), "SUMMARY", ()))


def implementations(module: str) -> list[str]:
    """Those that need no environment, eager's and ours first."""
    bench = importlib.import_module(module)
    names = in_one_process(bench.MODES, []).implementations
    return sorted(names, key=lambda name: name not in ("eager", "fused"))


def gpu_tasks(names: Sequence[str]) -> list[dict[str, Any]]:
    """In order of worth."""
    cases = {name: list(cases_of(importlib.import_module(name))) for name in names}
    pairs = [(name, case) for name in names for case in cases[name][:2]]
    pairs += [(name, case) for name in names for case in cases[name][2:]]
    tasks = []
    for i, (name, case) in enumerate(pairs):
        kept = [each for each in implementations(name) if i == 0 or each != "compile"]
        tasks.append(workers.task(name, case, kept))
    compiled = [pair for pair in pairs[1:] if "compile" in implementations(pair[0])]
    return tasks + [workers.task(name, case, ["compile"]) for name, case in compiled]


def smoke_tasks(names: Sequence[str]) -> list[dict[str, Any]]:
    first = {name: next(iter(cases_of(importlib.import_module(name)))) for name in names}
    return [workers.task(name, case, ["eager", "fused"]) for name, case in first.items()]


def rehearsal_tasks(names: Sequence[str]) -> list[dict[str, Any]]:
    """What compiles something: our kernels first."""
    ours = [{**each, "implementations": ["fused"]}
            for each in gpu_tasks(names) if "fused" in each["implementations"]]  # fmt: skip
    theirs = [{**each, "implementations": ["compile"]}
              for each in gpu_tasks(names) if "compile" in each["implementations"]]  # fmt: skip
    return ours + theirs


def for_a_dry_run(tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two cases of every file, without torch.compile, which takes longer than all the rest."""
    pairs = list(dict.fromkeys((each["module"], each["case"]) for each in tasks))
    names = [module for module, _ in pairs]
    kept = [pair for i, pair in enumerate(pairs) if names[:i].count(pair[0]) < 2]
    few = [
        {**each, "implementations": [x for x in each["implementations"] if x != "compile"]}
        for each in tasks
        if (each["module"], each["case"]) in kept
    ]
    return [each for each in few if each["implementations"]]


def run_in_turn(
    name: str,
    tasks: Sequence[dict[str, Any]],
    reasons: Mapping[str, str],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The files of a set of make gpu, saved whenever something was found.

    ``reasons``: why files do not import.
    """
    about = result_files.header(COMMANDS[name])
    load = [round(x, 2) for x in os.getloadavg()]

    def files(found: dict[str, Any]) -> dict[str, Any]:
        more = {"threads": options.threads, "load_before": load, "rates": found["rates"]}
        absent = {module: {"rows": {}, "failed": {"file": why}} for module, why in reasons.items()}
        return {module: more | file for module, file in (found["files"] | absent).items()}

    found = workers.run_tasks(
        tasks,
        threads=options.threads,
        seconds=0.01 if options.quick else options.seconds or SECONDS[name],
        quick=options.quick,
        limit=options.timeout,
        case_limit=CASE_LIMIT,
        environment=workers.ONE_COMPILER,
        progress=lambda found: result_files.save(name, {"files": files(found)}, about) and None,
    )
    return files(found)


def run_files(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The files of a set that are run one after the other, each with its modes."""
    about = result_files.header(COMMANDS[name])
    end = math.inf if options.timeout is None else time.monotonic() + options.timeout
    files: dict[str, Any] = {}
    for module in modules():
        print(f"\n{module}", flush=True)
        try:
            bench = importlib.import_module(module)
            cases = list(cases_of(bench))
            if name == "summary" and options.device == "cpu":
                cases = summary_cases(module)
            modes: Sequence[Mode] = bench.MODES
            if options.quick or options.device == "cuda" or name == "summary":
                modes = [in_one_process(modes, cases)]
            files[module] = workers.run_file(
                module,
                modes,
                cases,
                bench.MEMORY_CASES,
                threads=options.threads,
                seconds=0.01 if options.quick else options.seconds or SECONDS[name],
                quick=options.quick,
                limit=None if options.timeout is None else max(end - time.monotonic(), 0.1),
            )
        except ImportError as error:
            files[module] = {"rows": {}, "failed": {"file": f"{type(error).__name__}: {error}"}}
        print(tables.table(files[module]["rows"]))
        result_files.save(name, {"files": files}, about)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description="sets of benchmarks")
    parser.add_argument("set", choices=(*COMMANDS, "rehearse"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default=clocks.device())
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="per implementation and case")
    parser.add_argument("--timeout", type=float, help="seconds of all files")
    parser.add_argument("--quick", action="store_true", help="tiny problems: a test of the code")
    options = parser.parse_args()
    os.environ[clocks.DEVICE_VARIABLE] = options.device
    start = time.monotonic()
    ways = {"smoke": smoke_tasks, "gpu": gpu_tasks, "rehearse": rehearsal_tasks}
    if options.set in ways:
        names, reasons = importable(modules())
        tasks = ways[options.set](names)
        tasks = for_a_dry_run(tasks) if options.quick else tasks
    if options.set == "rehearse":
        count = max(1, min(16, os.cpu_count() or 1))
        workers.rehearse(tasks, count, quick=options.quick, limit=options.timeout)
        print(f"{len(tasks)} rehearsed, {time.monotonic() - start:.0f} s")
        return
    if options.set in ways:
        files = run_in_turn(options.set, tasks, reasons, options)
    else:
        files = run_files(options.set, options)
    print(f"\n{time.monotonic() - start:.0f} s")
    failed = [
        f"{module}: {name}: {why}"
        for module, file in files.items()
        for name, why in file["failed"].items()
    ]
    for line in failed:
        print(f"FAILED: {line}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
