"""What the kernels of a device use: registers, spills, occupancy, and the profiler's table.

    python benchmarks/kernel_profile.py [--device cpu|cuda] [--quick] [--launch]

prints it and writes ``results/profile_DEVICE_DATE.json``. Registers are those of the kernels that
the driver loaded; the CPU has none to show. --launch only runs the loss, for a profiler outside.

Occupancy: blocks on a multiprocessor = the least that registers (65536, given to warps in units of
256), shared memory, threads and the limit of blocks allow; times warps of a block, over all warps.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import clocks
import harness
import result_files
import suite
import torch

LAUNCHES = 4  # steps of the loss with --launch
REGISTERS = 65536
MAX_BLOCKS = {75: 16, 86: 16, 87: 16, 89: 24}  # of a multiprocessor; else 32


def occupancy(
    registers: int, warps: int, shared: int, shared_memory: int, max_warps: int, max_blocks: int
) -> float:
    """Share of a multiprocessor's warps that can be resident."""
    blocks = min(max_blocks, max_warps // warps)
    if registers > 0:
        blocks = min(blocks, REGISTERS // (-(-registers * 32 // 256) * 256 * warps))
    if shared > 0:
        blocks = min(blocks, shared_memory // shared)
    return blocks * warps / max_warps


def triton_kernels() -> Iterator[tuple[str, Any]]:
    """Module, name and function of everything that is compiled by Triton."""
    kernels = importlib.import_module("fcnseg.kernels")
    for each in pkgutil.walk_packages(kernels.__path__, "fcnseg.kernels."):
        module = importlib.import_module(each.name)
        for name, function in vars(module).items():
            if hasattr(function, "fn") and function.__module__ == module.__name__:
                yield f"{each.name.removeprefix('fcnseg.kernels.')}.{name}", function


def compiled_kernels() -> Iterator[tuple[str, Any]]:
    """Name and handle of each Triton kernel that this process has launched on CUDA."""
    for name, function in triton_kernels():
        for device_cache in getattr(function, "device_caches", {}).values():
            for kernel in device_cache[0].values():
                yield name, kernel


def resources() -> list[dict[str, Any]]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    max_warps = properties.max_threads_per_multi_processor // 32
    max_blocks = MAX_BLOCKS.get(10 * properties.major + properties.minor, 32)
    rows = []
    for name, kernel in compiled_kernels():
        kernel._init_handles()
        warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
        share = occupancy(
            kernel.n_regs,
            warps,
            shared,
            properties.shared_memory_per_multiprocessor,
            max_warps,
            max_blocks,
        )
        rows.append(
            {
                "kernel": name,
                "registers": kernel.n_regs,
                "spills": kernel.n_spills,
                "shared": shared,
                "warps": warps,
                "occupancy": round(share, 3),
            }
        )
    return rows


def step_of(bench: ModuleType, quick: bool) -> Any:
    """The fused step of a file's first case on this device."""
    case = next(iter(harness.cases_of(bench).values()))
    return bench.implementation("fused", case.tiny() if quick else case)


def profiler_table(step: Any) -> str:
    """Of five steps, by the device's time."""
    cuda = clocks.device() == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step()
    clocks.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(5):
            step()
        clocks.synchronize()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60)


def main() -> None:
    parser = argparse.ArgumentParser(description="registers, occupancy, profile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=clocks.device())
    parser.add_argument("--quick", action="store_true", help="tiny problems: a test of the code")
    parser.add_argument("--launch", action="store_true")
    options = parser.parse_args()
    os.environ[clocks.DEVICE_VARIABLE] = options.device
    loss = importlib.import_module("bench_upsample_cross_entropy")
    if options.launch:
        step = step_of(loss, options.quick)
        for _ in range(LAUNCHES):
            step()
        clocks.synchronize()
        return
    for name in suite.modules():
        bench = importlib.import_module(name)
        try:
            harness.require_compiled_file(bench)
        except RuntimeError as error:
            print(f"skipped {name}: {error}")
            continue
        step_of(bench, options.quick)()
    clocks.synchronize()
    rows = resources() if options.device == "cuda" else []
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    about = result_files.header()
    result_files.save("profile", {"kernels": rows}, about)
    text = profiler_table(step_of(loss, options.quick))
    print(text)
    content = {"kernels": rows, "profiler": text.splitlines()}
    path = result_files.save("profile", content, about)
    print(os.path.relpath(path))


if __name__ == "__main__":
    main()
