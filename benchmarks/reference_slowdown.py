"""How much slower the PyTorch reference is than the compiled CPU operators that it stands in for.

``python benchmarks/reference_slowdown.py``: the operators of the self-test on a larger problem,
512 x 1024 pixels, with the compiled operators and, in another process, without them. One thread;
median milliseconds of losses with their gradients, of labels and of counts. The warning that fcnseg
gives without its compiled operators says the smallest and the largest ratio.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import torch

H, W = 512, 1024
CLASSES = (19, 150)
RUNS = 5

# What hides the compiled operators, in a process of its own.
WITHOUT = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name == "fcnseg._C" else find_spec(name, package))
"""
MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
import reference_slowdown
reference_slowdown.measure(int(sys.argv[2]))
"""


def measure(classes: int) -> None:
    """Print JSON: the median milliseconds of every operator."""
    from fcnseg import __main__ as self_test

    torch.set_num_threads(1)
    self_test.C, self_test.H, self_test.W = classes, H, W
    medians = {}
    for problem in self_test._problems(torch.device("cpu")):
        times = []
        for _ in range(1 + RUNS):
            start = time.perf_counter()
            problem.run_fused()
            times.append(time.perf_counter() - start)
        medians[problem.operator] = 1e3 * statistics.median(times[1:])
    print(json.dumps(medians))


def milliseconds(before: str, classes: int) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-c", before + MEASURE, sys.path[0], str(classes)]
    return dict(json.loads(subprocess.check_output(command, text=True)))


def main() -> None:
    print(f"{'classes':>7}  {'operator':<30}{'compiled':>11}{'reference':>13}{'slower':>9}")
    for classes in CLASSES:
        compiled, reference = milliseconds("", classes), milliseconds(WITHOUT, classes)
        for operator, ours in compiled.items():
            theirs = reference[operator]
            print(
                f"{classes:>7}  {operator:<30}{ours:>8.2f} ms{theirs:>10.1f} ms"
                f"{theirs / ours:>8.0f}x"
            )


if __name__ == "__main__":
    main()
