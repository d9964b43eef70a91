"""What the CUDA C++ confusion matrix costs: registers, spills and instructions for a pixel.

    python -m tests.ptx_emulator.count_confusion_matrix [--arch 70 90] [--only REGEX]

Registers and spilled bytes are those of the machine code that NVRTC makes. Instructions are those
of the PTX that warps execute in the emulator, times 32, as in ``count``; what a launch without
pixels takes (tables) is left out. The maps are a picture of 2048 columns: ``runs`` has smooth
regions, a prediction that is wrong in parts of them and elsewhere two pixels off, and ignored
regions; its pair of labels changes every 75 pixels or so. ``noise`` has a random pair everywhere.
"""

from __future__ import annotations

import argparse
import re
import sys

import numpy as np

from tests.ptx_emulator.confusion_matrix import (
    IGNORED,
    LIBRARY,
    SAME,
    STRATEGIES,
    TYPES,
    Pair,
    compiled,
    expected,
    expression,
    launch,
    machine_code,
)
from tests.ptx_emulator.kernel import Kernel
from tests.ptx_emulator.memory import Array
from tests.ptx_emulator.report import Report

PAIRS: tuple[Pair, ...] = (*SAME, ("Label64", "Label8"))
#: Classes that each kernel is for.
CLASSES = {"count_replicated": 19, "count_single": 150, "count_global": 300}
HEIGHT, WIDTH = 32, 2048


def regions(rng: np.random.Generator, kinds: int, size: int) -> Array:
    """[HEIGHT, WIDTH]: the largest of ``kinds`` random fields, each linear between points that lie
    ``size`` pixels apart."""
    shape = (kinds, HEIGHT // size + 2, WIDTH // size + 2)
    fields = rng.normal(size=shape)
    for axis, pixels in ((1, HEIGHT), (2, WIDTH)):
        at = (np.arange(pixels) + 0.5) / size
        low = at.astype(np.int64)
        weight = (at - low).reshape(-1, *[1] * (2 - axis))
        fields = np.take(fields, low, axis) * (1 - weight) + np.take(fields, low + 1, axis) * weight
    return fields.argmax(0)


def label_maps(kind: str, classes: int, pair: Pair) -> tuple[Array, Array]:
    """Prediction and target, "runs" or "noise"."""
    rng = np.random.default_rng(1)
    if kind == "noise":
        prediction, target = rng.integers(0, classes, (2, HEIGHT, WIDTH))
    else:
        kinds = 7
        target = regions(rng, kinds, 192) * (classes // kinds)
        wrong = regions(rng, kinds, 192) * (classes // kinds)
        prediction = np.where(regions(rng, 6, 256) == 0, wrong, np.roll(target, 2, 1))
        target = np.where(regions(rng, 12, 256) == 0, IGNORED, target)
    return prediction.astype(TYPES[pair[0]]), target.astype(TYPES[pair[1]])


def instructions(kernel: Kernel, strategy: str, maps: tuple[Array, Array], classes: int) -> float:
    """Per pixel; raises where the counts are wrong or the emulator finds a fault."""

    def total(pixels: int) -> int:
        report = Report()
        part = maps[0].reshape(-1)[:pixels], maps[1].reshape(-1)[:pixels]
        vector = max(8, 16 // min(labels.itemsize for labels in part))
        matrix, _ = launch(kernel, strategy, part, classes, report, columns=WIDTH // vector)
        if not report.ok or (matrix != expected(*part, classes)[0] + 1).any():
            raise RuntimeError(f"{kernel.name}: wrong counts\n{report}")
        return sum(report.statistics[kernel.name].values())

    pixels = maps[0].size
    return 32 * (total(pixels) - total(0)) / pixels


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[70, 90])
    parser.add_argument("--only", default="", help="kernels and label types that match")
    options = parser.parse_args()
    if LIBRARY is None:
        sys.exit("needs nvidia-cuda-nvrtc-cu12")
    for arch in options.arch:
        ptx, names = compiled(arch, PAIRS)
        used = machine_code(arch, PAIRS)
        for strategy, classes in CLASSES.items():
            for pair in PAIRS:
                title = f"sm_{arch} {strategy:<17} C={classes:<4}" + " ".join(pair)
                if not re.search(options.only, title):
                    continue
                name = expression(strategy, *pair)
                kernel = Kernel(ptx, names[name], threads=STRATEGIES[strategy][0])
                registers, spilled = used[name]
                line = f"{title:<48}{registers:>4} registers{spilled:>4} B spilled"
                for kind in ("runs", "noise"):
                    maps = label_maps(kind, classes, pair)
                    line += f"  {kind} {instructions(kernel, strategy, maps, classes):5.1f}"
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
