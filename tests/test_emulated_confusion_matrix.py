"""The CUDA C++ confusion matrix, compiled by NVRTC and executed without a GPU.

Counts are compared with numpy's. An access out of bounds, misaligned or to memory that nobody wrote
is a fault, and so is a race within or between blocks.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx_emulator import Kernel, Memory, Report
from tests.ptx_emulator.case import ARCHS
from tests.ptx_emulator.confusion_matrix import (
    CUDA,
    HEADER,
    IGNORED,
    LIBRARY,
    PAIRS,
    SAME,
    STRATEGIES,
    TYPES,
    Pair,
    compiled,
    expected,
    expression,
    launch,
    pixels_of,
)
from tests.ptx_emulator.count_confusion_matrix import instructions
from tests.ptx_emulator.count_confusion_matrix import label_maps as label_maps_of_a_picture
from tests.ptx_emulator.memory import Array

MIXED: tuple[Pair, ...] = (
    ("Label8", "Label64"),
    ("Label64", "Label8"),
    ("Label16", "Label32"),
)
#: Classes, pixels, pixels that the labels start past an aligned address, blocks, and how many
#: vectors lie between a thread's steps (0: as many as threads).
SHAPES = [(19, 3001, 0, 2, 9), (2, 700, 1, 1, 0), (19, 5, 3, 1, 1)]

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs nvidia-cuda-nvrtc-cu12")


def label_maps(classes: int, size: int, seed: int = 0) -> tuple[Array, Array]:
    """Runs of labels, a tenth ignored, a hundredth bad; most predictions are right."""
    rng = np.random.default_rng(seed)
    target = np.repeat(rng.integers(0, classes, size), rng.integers(1, 6, size))[:size]
    target[rng.random(size) < 0.1] = IGNORED
    right = rng.random(size) < 0.7
    prediction = np.where(right, target % classes, rng.integers(0, classes, size))
    target[rng.random(size) < 0.01] = classes + 3
    prediction[rng.random(size) < 0.01] = classes
    for labels in (prediction, target):  # bad in their high bits alone; good as bytes
        labels[rng.random(size) < 0.01] = 2**32 + 1
    return prediction, target


def count(
    kernel: Kernel,
    pair: Pair,
    strategy: str,
    shape: tuple[int, int, int, int, int],
    schedule: str,
    every_counter: bool,
    report: Report,
) -> None:
    """Launches a kernel on labels of these types, and compares what it counts."""
    classes, size, shift, blocks, columns = shape
    prediction, target = (
        labels.astype(TYPES[name])[shift:]
        for labels, name in zip(label_maps(classes, size + shift), pair, strict=True)
    )
    matrix, counters = launch(
        kernel, strategy, (prediction, target), classes, report, blocks=blocks, columns=columns,
        schedule=schedule, every_counter=every_counter,
    )  # fmt: skip
    wanted, found = expected(prediction, target, classes)
    case = (pair, shape, schedule)
    np.testing.assert_array_equal(matrix, wanted + 1, err_msg=str(case))
    assert int(counters[0]) == found[0], case
    if every_counter:
        first = int(~counters[2]) if counters[2] else -1
        assert [int(counters[1]), first] == found[1:], case


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("arch", "pairs"),
    [
        (70, SAME),
        (80, SAME),
        (90, (*SAME, *MIXED)),
        *(pytest.param(arch, PAIRS, marks=pytest.mark.slow) for arch in ARCHS),
    ],
)
def test_counts(arch: int, pairs: tuple[Pair, ...], strategy: str) -> None:
    """Pairs of label types, aligned or not, with all counters and with the count alone."""
    ptx, names = compiled(arch, pairs)
    report = Report()
    for pair in pairs:
        kernel = Kernel(ptx, names[expression(strategy, *pair)], threads=STRATEGIES[strategy][0])
        for shape in SHAPES:
            count(kernel, pair, strategy, shape, "lockstep", True, report)
            count(kernel, pair, strategy, shape, "backward", False, report)
    assert report.ok, report


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_is_found(barrier: int) -> None:
    """Before the counting, and before the sums of the tables."""
    pieces = (CUDA / HEADER).read_text().split("__syncthreads();")
    assert len(pieces) == 3
    source = "__syncthreads();".join(pieces[: barrier + 1]) + "__syncthreads();".join(
        pieces[barrier + 1 :]
    )
    ptx, names = compiled(90, SAME, source)
    kernel = Kernel(ptx, names[expression("count_replicated", "Label8", "Label8")], threads=256)
    report = Report()
    count(kernel, ("Label8", "Label8"), "count_replicated", SHAPES[0], "lockstep", True, report)
    assert any("shared race" in fault.kind for fault in report.faults()), report


@pytest.mark.parametrize("arch", ARCHS)
def test_record_of_the_first_bad_label(arch: int) -> None:
    """The record takes value and position of one call, and the counts of all."""
    ptx, names = compiled(arch)
    kernel = Kernel(ptx, names["&fcnseg::record_invalid"], threads=1)
    prediction, target = np.full(60, 1, np.uint8), np.zeros(60, np.int64)
    target[37], prediction[20] = 9, 77
    record, report = np.zeros(5, np.int64), Report()
    height, width = 4, 5

    def add(invalid: int, first: int) -> list[int]:
        memory = Memory()
        memory.add_array(prediction, "prediction")
        memory.add_array(target, "target")
        counters = np.array([invalid, 0, ~np.uint64(first) if invalid else 0], np.uint64)
        arguments = [pixels_of(prediction, target, 3), 1, 8, height, width, counters, record]
        kernel.launch((1,), arguments, memory, report)
        return [int(number) for number in record]

    assert add(0, 0) == [0] * 5
    assert add(2, 37) == [2, 9, 1, 3, 2]
    assert add(3, 20) == [5, 9, 1, 3, 2]
    record[:] = 0
    assert add(1, 20) == [1, 77, 1, 0, 0]  # the prediction is bad there, the target is not
    assert report.ok, report


@pytest.mark.parametrize(("label", "most"), [("Label8", 12), ("Label16", 16), ("Label64", 22)])
def test_instructions_of_a_pixel(label: str, most: float) -> None:
    """Pixel by pixel, without the packing of labels, it would be 26 to 28."""
    pair = (label, label)
    ptx, names = compiled(90)
    kernel = Kernel(ptx, names[expression("count_replicated", *pair)], threads=256)
    maps = label_maps_of_a_picture("runs", 19, pair)
    assert instructions(kernel, "count_replicated", maps, 19) < most
