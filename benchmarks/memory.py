"""Peak memory that a call adds. CPU: of the resident set; CUDA: of the allocator's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import processes
import torch
from clocks import DEVICE_VARIABLE

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


def peak_memory(module: str, name: str, case: Any) -> float:
    """Growth of the resident set's peak over one call on the CPU, MB, in a new process (Linux)."""
    command = [sys.executable, "-c", _PEAK, module, name, repr(case)]
    finished = subprocess.run(
        command,
        env=processes.environment({DEVICE_VARIABLE: "cpu"}),
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
