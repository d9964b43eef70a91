"""Worker processes: they measure tasks one by one, and whoever started them sees each at once.

A task is {"module", "case", "implementations"}. Its process writes the row of the case into a file
as soon as it is measured; ``run_tasks`` follows that file. A task that does not end in time, or
that takes its process with it, is named as failed, and the ones after it go on in a new process.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import processes
import result_files
import tables
import torch
from clocks import DEVICE_VARIABLE, device, measure_rates, synchronize
from harness import Mode, cases_of, first_line, in_one_process, measure_case
from memory import peak_memory

GRACE = 3.0  # seconds; less than that of a deadline around this process
START = 60.0  # seconds for a process to start and to measure the rates, and to end
#: What is kept is written, and CUDA and the compiler take long to take down.
CODE = "import os, sys, workers; workers.worker(sys.argv[1]); sys.stdout.flush(); os._exit(0)"
GO_ON = 75  # exit status: the device answers no more, but would to a new process
NO_TIME = "no time left"
#: Else torch.compile starts a process per core, which import and wait while others are timed. The
#: same in a rehearsal: the caches are of one configuration.
ONE_COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
INTERRUPTED = "ended by SIGINT"  # as processes.run words it; from outside, at a deadline of all


def task(module: str, case: str, implementations: Sequence[str]) -> dict[str, Any]:
    return {"module": module, "case": case, "implementations": list(implementations)}


# --- the process ----------------------------------------------------------------------------------


def rehearse_case(bench: Any, case: Any, names: Sequence[str]) -> None:
    """Every implementation once, so that the compilers' caches on the disk have it."""
    for name in names:
        try:
            bench.implementation(name, case)()
            synchronize()
        except Exception as error:
            print(f"{bench.__name__}: {name}: {first_line(error)}", flush=True)


def device_answers() -> bool:
    """A fault of a kernel leaves a CUDA process unable to do anything more."""
    try:
        synchronize()
    except RuntimeError:
        return False
    return True


def worker(text: str) -> None:
    """Writes {"rates", "done": [{"row", "failed"}, ...]}, as long as the list of tasks."""
    options = json.loads(text)
    out = Path(options["out"])
    torch.set_num_threads(options["threads"])
    rates = {} if options["rehearse"] else measure_rates(options["quick"])
    for name, rate in rates.items():
        print(f"{name}: {rate:.4g}", flush=True)
    content: dict[str, Any] = {"rates": rates, "done": []}
    result_files.write(out, content)
    for each in options["tasks"]:
        label = f"{each['module']}: {each['case']}"
        if options["case_limit"] is not None:  # where it hangs, before it is ended
            faulthandler.dump_traceback_later(max(options["case_limit"] - 1, 0.1))
        row: dict[str, Any] = {}
        failed: dict[str, str] = {}
        try:
            bench = importlib.import_module(each["module"])
            case = cases_of(bench)[each["case"]]
            case = case.tiny() if options["quick"] else case
            names = each["implementations"]
            if options["rehearse"]:
                rehearse_case(bench, case, names)
            else:
                row = measure_case(bench, case, names, options["seconds"], rates)
                print(f"{label}: {tables.sentence(row)}", flush=True)
        except Exception as error:
            failed[each["case"]] = f"{type(error).__name__}: {error}"[:1000]
            print(f"{label}: FAILED: {first_line(error)}", flush=True)
        for which, reason in row.pop("failed", {}).items():
            failed[f"{each['case']}, {which}"] = reason
        content["done"].append({"row": row, "failed": failed})
        result_files.write(out, content)
        if not device_answers():
            os._exit(GO_ON)  # nothing can be freed
        gc.collect()
        if device() == "cuda":
            torch.cuda.empty_cache()
    faulthandler.cancel_dump_traceback_later()


# --- who started it -------------------------------------------------------------------------------


def merge(into: dict[str, Any], row: Mapping[str, Any]) -> None:
    """A row, into an earlier row of the same case."""
    for key, value in row.items():
        if key in ("skipped", "memory", "facts"):
            into.setdefault(key, {}).update(value)
        else:
            into[key] = value


class _Follower:
    """What one process has written so far, added to what was found before it."""

    def __init__(
        self, out: Path, tasks: Sequence[Mapping[str, Any]], found: dict[str, Any],
        case_limit: float | None, progress: Callable[[], None],
    ) -> None:  # fmt: skip
        self.out, self.tasks, self.found = out, tasks, found
        self.case_limit, self.progress = case_limit, progress
        self.done, self.since = 0, time.monotonic()
        self.seen: tuple[int, int] | None = None

    def file(self, index: int) -> dict[str, Any]:
        empty: dict[str, Any] = {"rows": {}, "failed": {}}
        return self.found["files"].setdefault(self.tasks[index]["module"], empty)

    def collect(self, always: bool = True) -> None:
        try:
            status = self.out.stat()
        except FileNotFoundError:  # the process did not get so far
            return
        version = (status.st_mtime_ns, status.st_size)
        if version == self.seen and not always:
            return
        self.seen, self.since = version, time.monotonic()
        content = json.loads(self.out.read_text())
        self.found["rates"] = self.found["rates"] or content["rates"]
        for i in range(self.done, len(content["done"])):
            entry, case = content["done"][i], self.tasks[i]["case"]
            if entry["row"]:
                merge(self.file(i)["rows"].setdefault(case, {}), entry["row"])
            self.file(i)["failed"].update(entry["failed"])
        self.done = len(content["done"])
        self.progress()

    def __call__(self) -> str | None:
        self.collect(always=False)
        lasted = time.monotonic() - self.since
        if self.seen is None:
            return f"no start after {START:.0f} s" if lasted > START else None
        if self.done == len(self.tasks):
            return f"no end after {START:.0f} s more" if lasted > START else None
        if self.case_limit is not None and lasted > self.case_limit:
            return f"no end after {self.case_limit:.0f} s"
        return None

    def fail(self, index: int, reason: str) -> None:
        """A case that was measured before lacks only what this task would have added."""
        case = self.tasks[index]["case"]
        if case in self.file(index)["rows"]:
            skipped = self.file(index)["rows"][case].setdefault("skipped", {})
            skipped.update(dict.fromkeys(self.tasks[index]["implementations"], reason))
        else:
            self.file(index)["failed"][case] = reason


def run_tasks(
    tasks: Sequence[Mapping[str, Any]],
    *,
    threads: int,
    seconds: float,
    quick: bool,
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
    case_limit: float | None = None,
    rehearse: bool = False,
    progress: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """{"rates", "files": {module: {"rows", "failed"}}}, in the order of ``tasks``.

    ``seconds`` of every implementation. ``limit``: of all tasks; ``case_limit``: of each.
    ``progress`` is told whenever something was found.
    """
    found: dict[str, Any] = {"rates": {}, "files": {}}
    end = math.inf if limit is None else time.monotonic() + limit
    todo = list(tasks)
    while todo:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            options = {
                "tasks": todo, "threads": threads, "seconds": seconds, "quick": quick,
                "rehearse": rehearse, "case_limit": case_limit, "out": str(out),
            }  # fmt: skip
            follower = _Follower(out, todo, found, case_limit, lambda: progress(found))
            reason = processes.run(
                [sys.executable, "-c", CODE, json.dumps(options)],
                min(end - time.monotonic(), 1e9),
                environment=processes.environment(
                    {DEVICE_VARIABLE: device(), **(environment or {})}
                ),
                grace=GRACE,
                group=False,
                give_up=follower,
            )  # fmt: skip
            follower.collect()
        done = follower.done
        if reason == f"exit status {GO_ON}":
            todo = todo[done:]
            continue
        if reason is not None and done < len(todo):
            follower.fail(done, f"the process: {reason}")
            done += 1
            out_of_time = time.monotonic() >= end
            # where one does not start, nor does another
            if out_of_time or reason == INTERRUPTED or follower.seen is None:
                for index in range(done, len(todo)):
                    follower.fail(index, NO_TIME if out_of_time else f"the process: {reason}")
                done = len(todo)
        elif reason is not None:
            follower.file(done - 1)["failed"]["process"] = reason
        progress(found)
        todo = todo[done:]
    return found


def rehearse(
    tasks: Sequence[Mapping[str, Any]], count: int, *, quick: bool, limit: float | None
) -> None:
    """The tasks once, in ``count`` processes at a time; nothing is timed and nothing kept."""
    with ThreadPoolExecutor(count) as pool:
        shares = [tasks[i::count] for i in range(min(count, len(tasks)))]
        waiting = [
            pool.submit(run_tasks, share, threads=1, seconds=0, quick=quick, limit=limit,
                        rehearse=True, environment=ONE_COMPILER)
            for share in shares
        ]  # fmt: skip
        for each in waiting:
            each.result()


def run_file(
    module: str,
    modes: Sequence[Mode],
    cases: Sequence[str],
    memory_cases: Sequence[str],
    *,
    threads: int,
    seconds: float,
    quick: bool,
    limit: float | None = None,
) -> dict[str, Any]:
    """{"threads", "load_before", "rates", "rows", "failed"} of a benchmark file."""
    known = cases_of(importlib.import_module(module))
    out: dict[str, Any] = {
        "threads": threads,
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "rates": {},
        "rows": {},
        "failed": {},
    }
    rows = out["rows"]
    end = math.inf if limit is None else time.monotonic() + limit
    for mode in modes:
        tasks = [task(module, x, mode.implementations) for x in cases if x in mode.cases]
        if not tasks:
            continue
        found = run_tasks(
            tasks, threads=threads, seconds=seconds, quick=quick, environment=mode.environment,
            limit=None if limit is None else max(end - time.monotonic(), 0.1),
        )  # fmt: skip
        out["rates"] = out["rates"] or found["rates"]
        file = found["files"].get(module, {"rows": {}, "failed": {}})
        for name, reason in file["failed"].items():
            out["failed"][f"{name}, {mode.name}" if mode.name else name] = reason
        for case, row in file["rows"].items():
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


def main(file: str) -> None:
    """Run a benchmark file as the head of harness.py says."""
    module = Path(file).resolve().stem
    parser = argparse.ArgumentParser(description=f"{module}: time, memory, floor")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device())
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="per implementation and case")
    parser.add_argument("--timeout", type=float, help="seconds of all processes")
    parser.add_argument("--quick", action="store_true", help="tiny problems: a test of the code")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    os.environ[DEVICE_VARIABLE] = options.device
    sys.path.insert(0, str(processes.HERE))
    bench = importlib.import_module(module)
    known = cases_of(bench)
    cases = options.cases or list(known)
    if unknown := [case for case in cases if case not in known]:
        parser.error(f"--cases: no {unknown[0]!r} on {options.device}; choose from {list(known)}")
    # what allocators and instruction sets do is a question of the CPU's
    one_process = options.quick or options.device == "cuda"
    content = run_file(
        module,
        [in_one_process(bench.MODES, cases)] if one_process else bench.MODES,
        cases,
        bench.MEMORY_CASES,
        threads=options.threads,
        seconds=0.01 if options.quick else options.seconds,
        quick=options.quick,
        limit=options.timeout,
    )
    print(tables.table(content["rows"]))
    if not options.quick:
        print(os.path.relpath(result_files.save(module, content)))
    for name, reason in content["failed"].items():
        print(f"FAILED: {name}: {reason}", file=sys.stderr)
    sys.exit(1 if content["failed"] else 0)
