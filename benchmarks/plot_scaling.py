"""Time and added memory of the loss, fused and eager, against pixels, classes and threads.

    python benchmarks/plot_scaling.py [--device cpu|cuda]

writes results/scaling_DEVICE_DATE.json; report.py draws it.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import clocks
import memory
import result_files
import torch
from bench_upsample_cross_entropy import implementation
from harness import Case, require_compiled

MODULE = "bench_upsample_cross_entropy"
PIXELS = [Case((1, 19, edge, edge), (8 * edge, 8 * edge)) for edge in (16, 32, 64, 128, 192)]
CLASSES = [Case((1, C, 32, 32), (256, 256)) for C in (2, 10, 19, 50, 100, 150, 300)]
TITLES = {
    "pixels": "19 classes, 8x upsampling",
    "classes": "256 x 256 pixels, 8x upsampling",
    "threads": "19 classes, 1024 x 1024 pixels",
}


def measure(case: Case, name: str, threads: int, with_memory: bool) -> dict[str, float]:
    torch.set_num_threads(threads)
    step = implementation(name, case)
    point: dict[str, float] = {
        "pixels": case.size[0] * case.size[1],
        "classes": case.shape[1],
        "threads": threads,
        "milliseconds": clocks.measure({name: step}, 0.5)[name]["median"],
    }
    if with_memory and clocks.device() == "cuda":
        point["megabytes"] = memory.cuda_peak_memory(step)
    elif with_memory:
        point["megabytes"] = memory.peak_memory(MODULE, name, case)
    return point


def draw(content: dict[str, Any]) -> Any:
    from matplotlib import pyplot as plt

    axes = [axis for axis in TITLES if axis in content]
    figure, panels = plt.subplots(2, len(axes), figsize=(4.5 * len(axes), 7), layout="constrained")
    for column, axis in zip(panels.T, axes, strict=True):
        for panel, unit in zip(column, ("milliseconds", "megabytes"), strict=True):
            for name, points in content[axis].items():
                if unit in points[0]:
                    x, y = [p[axis] for p in points], [max(p[unit], 0.01) for p in points]
                    panel.loglog(x, y, "o-", label=name)
            if not panel.lines:
                panel.set_axis_off()
                continue
            panel.set_xlabel(axis)
            panel.set_ylabel(f"{unit}, forward + backward")
            panel.grid(alpha=0.3)
            panel.legend()
        column[0].set_title(TITLES[axis])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="scaling of the fused loss")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=clocks.device())
    os.environ[clocks.DEVICE_VARIABLE] = parser.parse_args().device
    require_compiled("upsample_cross_entropy")
    content: dict[str, Any] = {
        axis: {
            name: [measure(case, name, 1, True) for case in cases] for name in ("eager", "fused")
        }
        for axis, cases in (("pixels", PIXELS), ("classes", CLASSES))
    }
    if clocks.device() == "cpu":
        cores = os.cpu_count() or 1
        counts = sorted({1, cores, *(2**i for i in range(cores.bit_length()) if 2**i <= cores)})
        content["threads"] = {
            name: [measure(PIXELS[3], name, threads, False) for threads in counts]
            for name in ("eager", "fused")
        }
    print(os.path.relpath(result_files.save("scaling", content)))


if __name__ == "__main__":
    main()
