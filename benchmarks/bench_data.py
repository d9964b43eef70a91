"""Samples a second and core, from PNG files of Cityscapes' size to augmented crops.

    python benchmarks/bench_data.py [--images 12] [--size 1024 2048] [--crop 768 768] [--workers 2]

Draws street scenes at full size into a temporary folder, compressed as real ones are (PNG's level 6
and adaptive filters), and reads them all once, so that files come from memory. Then times the
stages of a sample in one process with one thread, and a DataLoader. Processor time is shown beside
the clock's: other programs disturb it less.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from clocks import statistics
from result_files import save
from torch.utils.data import DataLoader

from fcnseg import data
from fcnseg.data import dataset as reading
from fcnseg.data import synthetic


def times(function: Callable[[int], Any], count: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per call of ``function(0)`` to ``function(count - 1)``, by both clocks."""
    function(0)
    wall, cpu = [], []
    for index in [*range(count)] * rounds:
        start, before = time.perf_counter(), time.process_time()
        function(index)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - before)
    return {"wall": statistics(wall), "cpu": statistics(cpu), "cpu_mean": 1e3 * float(np.mean(cpu))}


def main() -> None:
    parser = argparse.ArgumentParser(description="data pipeline: samples a second and core")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("H", "W"))
    parser.add_argument("--crop", type=int, nargs=2, default=(768, 768), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=3, help="times that each image is read")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data.worker_init_fn(0)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        root = synthetic.write_cityscapes(
            Path(folder) / "scenes", train=options.images, val=1, size=tuple(options.size)
        )
        transform = data.TrainTransform(tuple(options.crop))
        samples = data.Cityscapes(root, transform=transform)
        for path, _ in samples.files:
            bgr = cv2.imread(str(path))
            cv2.imwrite(str(path), bgr, [cv2.IMWRITE_PNG_COMPRESSION, 6])
        sizes = [[path.stat().st_size for path in pair] for pair in samples.files]
        pairs = [samples.load(index) for index in range(options.images)]
        stages: dict[str, Callable[[int], Any]] = {
            "image: read and decode": lambda i: reading.read_image(samples.files[i][0]),
            "label: read, decode, map, check": samples.load_label,
            "augment": lambda i: transform(*pairs[i], epoch=1, index=i),
            "whole sample": lambda i: samples[i],
        }
        found = {name: times(run, options.images, options.rounds) for name, run in stages.items()}

        start_up = 2 * options.workers  # batches until all workers run
        count = options.batch_size * (start_up + 8 * max(1, options.workers))
        loader = DataLoader(
            samples,
            sampler=[index % options.images for index in range(count)],
            batch_size=options.batch_size,
            num_workers=options.workers,
            worker_init_fn=data.worker_init_fn,
        )
        batches = iter(loader)
        for _ in range(start_up):
            next(batches)
        start, seen = time.perf_counter(), 0
        for images, _ in batches:
            seen += len(images)
        rate = seen / (time.perf_counter() - start)

    megabytes = np.mean(sizes, 0) / 1e6
    height, width = options.size
    print(
        f"{options.images} images of {width}x{height}, {megabytes[0]:.2f} MB and labels of "
        f"{megabytes[1]:.2f} MB on average; OpenCV {cv2.__version__}; load {load[0]:.1f}"
    )
    print("| stage | ms, median | p20 | p80 | processor, mean |\n|---|---|---|---|---|")
    for name, row in found.items():
        wall = row["wall"]
        print(
            f"| {name} | {wall['median']:.1f} | {wall['p20']:.1f} | {wall['p80']:.1f} "
            f"| {row['cpu_mean']:.1f} |"
        )
    per_core = 1e3 / found["whole sample"]["wall"]["median"]
    per_cpu = 1e3 / found["whole sample"]["cpu_mean"]
    print(
        f"one process: {per_core:.1f} samples/s ({per_cpu:.1f} per second of processor time); "
        f"DataLoader with {options.workers} workers: {rate:.1f} samples/s"
    )
    content = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "megabytes": {"image": megabytes[0], "label": megabytes[1]},
        "load_before": load,
        "milliseconds": found,
        "samples_per_second": {"one process": per_core, "loader": rate},
    }
    print(save("bench_data", content))


if __name__ == "__main__":
    main()
