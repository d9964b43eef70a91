"""fcnseg.evaluate against cityscapesscripts: time and equality of every score.

    python benchmarks/bench_evaluate.py [--pairs 50] [--size 1024 2048] [--instances 30]

cityscapesscripts' distributions on PyPI hold no Cython source, so it counts in NumPy. The last
line gives it a compiled count of the confusion matrix in the Cython module's place (its instance
scores are NumPy either way).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from cityscapes_files import write_pairs
from cityscapes_oracle import import_cityscapesscripts, official_scores, same

from fcnseg import _extension, evaluate


def compiled_count(
    prediction: np.ndarray, truth: np.ndarray, matrix: np.ndarray, _labels: list[int]
) -> np.ndarray:
    """What cityscapesscripts' Cython module does, by fcnseg's C++."""
    assert _extension.pybind is not None
    counted, _ = _extension.pybind.confusion_matrix(prediction, truth, len(matrix), -1)
    matrix += counted.astype(np.ulonglong)
    return matrix


@dataclass(frozen=True, order=True)
class Spent:
    """Seconds: by the clock, and of all processes' CPU time (which other programs disturb less)."""

    wall: float
    cpu: float

    def line(self, name: str, base: Spent | None = None) -> str:
        text = f"{name:42s}{self.wall:8.2f} s wall {self.cpu:8.2f} s CPU"
        if base is None:
            return text
        return f"{text}   {self.wall / base.wall:5.1f}x wall {self.cpu / base.cpu:5.1f}x CPU"


def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Spent, Any]:
    start, before = time.perf_counter(), sum(os.times()[:4])
    result = function(*args, **kwargs)
    return Spent(time.perf_counter() - start, sum(os.times()[:4]) - before), result


def main() -> None:
    parser = argparse.ArgumentParser(description="fcnseg.evaluate against cityscapesscripts")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("H", "W"))
    parser.add_argument("--instances", type=int, default=30, help="boxes per image")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    official = import_cityscapesscripts()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pairs(root, options.pairs, tuple(options.size), instances=options.instances)
        pairs, *_ = evaluate.find_cityscapes_pairs(root / "results", root)
        for pair in pairs:  # all runs read from memory
            for path in pair.files():
                path.read_bytes()
        folders = str(root / "results"), str(root)
        command = [sys.executable, "-m", "fcnseg.evaluate", *folders, "--quiet"]
        command += ["--workers", str(options.workers)]
        ours, one, process, theirs, compiled = ([] for _ in range(5))
        for _ in range(options.repeats):  # in turn, so that what disturbs one disturbs all
            spent, found = timed(evaluate.evaluate_cityscapes, *folders, workers=options.workers)
            ours.append(spent)
            one.append(timed(evaluate.evaluate_cityscapes, *folders, workers=1)[0])
            process.append(timed(subprocess.run, command, check=True, capture_output=True)[0])
            official.CSUPPORT = False
            spent, expected = timed(official_scores, official, pairs)
            theirs.append(spent)
            if not same(found.result, expected):
                sys.exit("the scores differ from those of cityscapesscripts")
            if _extension.pybind is not None:
                official.CSUPPORT = True
                official.addToConfusionMatrix = SimpleNamespace(cEvaluatePair=compiled_count)
                compiled.append(timed(official_scores, official, pairs)[0])
    height, width = options.size
    print(
        f"{len(pairs)} pairs of {width}x{height}, {options.instances} boxes of things each, "
        f"{os.cpu_count()} cores; every score equal; fastest of {options.repeats}"
    )
    base = min(ours)
    print(base.line(f"fcnseg, {options.workers} processes"))
    print(min(one).line("fcnseg, 1 process"))
    print(min(process).line("python -m fcnseg.evaluate, with start-up"))
    print(min(theirs).line("cityscapesscripts", base))
    if compiled:
        print(min(compiled).line("cityscapesscripts, compiled count", base))


if __name__ == "__main__":
    main()
