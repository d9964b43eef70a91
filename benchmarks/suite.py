"""Sets of benchmarks, each into one file of results.

    python benchmarks/suite.py summary    make bench: the cases that the files name in SUMMARY
    python benchmarks/suite.py matrix     make bench-full: every case, every process
    python benchmarks/suite.py gpu        a part of make gpu: every case, shorter
    python benchmarks/suite.py ... [--device cpu|cuda] [--threads N] [--seconds S] [--quick]

writes ``results/SET_DEVICE_DATE.json`` (or into $OUT): {"name", "header", "files": {NAME: what
harness.run_file found}}. On a CUDA device each takes every case. A file that fails is named at the
end; the others run all the same. --timeout is for all files; each may take twice its share of what
is left.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

SUMMARY_LIMIT = 12
COMMANDS = {"summary": "make bench", "matrix": "make bench-full", "gpu": "make gpu"}
SECONDS = {"summary": 1.0, "matrix": 2.0, "gpu": 0.3}  # per implementation and case


def modules() -> list[str]:
    """The benchmark files that keep the contract of harness.py; the main one first, then losses."""
    # read, not imported: the others may import what is not installed
    files = sorted(harness.HERE.glob("bench_*.py"))
    kept = [path.stem for path in files if re.search(r"^CASES\b", path.read_text(), re.MULTILINE)]
    first = "bench_upsample_cross_entropy"
    return sorted(kept, key=lambda name: (name != first, "cross_entropy" not in name, name))


def summary_cases(module: str) -> list[str]:
    return list(getattr(importlib.import_module(module), "SUMMARY", ()))


def run(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What a benchmark file found, run as a script."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "file.json"
        command = [sys.executable, str(harness.HERE / f"{module}.py"), "--json", str(out)]
        subprocess.run([*command, *arguments], cwd=harness.ROOT)
        if not out.exists():
            return {"rows": {}, "failed": {"file": "it ended without results"}}
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="sets of benchmarks")
    parser.add_argument("set", choices=tuple(COMMANDS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default=harness.device())
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="per implementation and case")
    parser.add_argument("--timeout", type=float, help="seconds of all files")
    parser.add_argument("--quick", action="store_true", help="tiny problems: a test of the code")
    options = parser.parse_args()
    os.environ[harness.DEVICE_VARIABLE] = options.device
    seconds = options.seconds or SECONDS[options.set]
    start, files, failed = time.monotonic(), {}, []
    todo = modules()
    for i, module in enumerate(todo):
        arguments = ["--device", options.device, "--threads", str(options.threads)]
        arguments += ["--seconds", str(seconds), *(["--quick"] if options.quick else [])]
        if options.timeout is not None:
            left = options.timeout - (time.monotonic() - start)
            arguments += ["--timeout", str(max(1.0, min(left, 2 * left / (len(todo) - i))))]
        if options.set != "matrix":
            arguments.append("--plain")
        if options.set == "summary" and options.device == "cpu":
            cases = summary_cases(module)
            if not cases:
                continue
            arguments += ["--cases", *cases]
        print(f"\n{module}", flush=True)
        files[module] = run(module, arguments)
        failed += [f"{module}: {name}: {why}" for name, why in files[module]["failed"].items()]
        path = harness.save(options.set, {"files": files}, COMMANDS[options.set])
    print(f"\n{os.path.relpath(path)}, {time.monotonic() - start:.0f} s")
    for line in failed:
        print(f"FAILED: {line}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
