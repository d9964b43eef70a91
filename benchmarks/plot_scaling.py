"""Time and added memory of the fused loss and of eager, against pixels and against classes.

python benchmarks/plot_scaling.py      writes results/scaling_DEVICE_DATE.json and .png
"""

from __future__ import annotations

import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from bench_upsample_cross_entropy import implementation
from harness import Case, peak_memory, require_compiled, save

PIXELS = [Case((1, 19, edge, edge), (8 * edge, 8 * edge)) for edge in (16, 32, 64, 128, 192)]
CLASSES = [Case((1, C, 32, 32), (256, 256)) for C in (2, 10, 19, 50, 100, 150, 300)]


def measure(case: Case, name: str) -> dict[str, float]:
    step = implementation(name, case)
    step()
    seconds = []
    while len(seconds) < 3 or (sum(seconds) < 0.5 and len(seconds) < 51):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {
        "pixels": case.size[0] * case.size[1],
        "classes": case.shape[1],
        "milliseconds": 1e3 * torch.tensor(seconds).median().item(),
        "megabytes": peak_memory("bench_upsample_cross_entropy", name, case),
    }


def main() -> None:
    require_compiled("upsample_cross_entropy")
    torch.set_num_threads(1)
    found = {
        axis: {name: [measure(case, name) for case in cases] for name in ("eager", "fused")}
        for axis, cases in (("pixels", PIXELS), ("classes", CLASSES))
    }
    path = save("scaling", found)
    figure, axes = plt.subplots(2, 2, figsize=(9, 7))
    for column, (axis, rows) in zip(axes.T, found.items(), strict=True):
        for panel, unit in zip(column, ("milliseconds", "megabytes"), strict=True):
            for name, points in rows.items():
                panel.loglog([p[axis] for p in points], [p[unit] for p in points], "o-", label=name)
            panel.set_xlabel(axis)
            panel.set_ylabel(f"{unit}, forward + backward")
            panel.grid(alpha=0.3)
            panel.legend()
    axes[0, 0].set_title("19 classes, 8x upsampling")
    axes[0, 1].set_title("256 x 256 pixels, 8x upsampling")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(path)


if __name__ == "__main__":
    main()
