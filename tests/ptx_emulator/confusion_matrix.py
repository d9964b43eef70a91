"""How the CUDA C++ confusion matrix is compiled by NVRTC and launched in the emulator."""

from __future__ import annotations

import functools
import itertools
import math
import struct
from pathlib import Path

import numpy as np

from tests.ptx_emulator.kernel import Kernel
from tests.ptx_emulator.memory import Array, Memory
from tests.ptx_emulator.nvrtc import Nvrtc, library
from tests.ptx_emulator.report import Report

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
HEADER = "confusion_matrix_kernel.cuh"
LIBRARY = library()
TYPES = {"Label8": np.uint8, "Label16": np.int16, "Label32": np.int32, "Label64": np.int64}
Pair = tuple[str, str]  # types of prediction and target
PAIRS: tuple[Pair, ...] = tuple(itertools.product(TYPES, TYPES))
SAME: tuple[Pair, ...] = tuple((name, name) for name in TYPES)
#: Threads of a block, and tables in its shared memory.
STRATEGIES = {"count_replicated": (256, 8), "count_single": (1024, 1), "count_global": (256, 0)}
IGNORED = 255
EXTRA_BINS = 2  # of a table: ignored and invalid pixels


def expression(strategy: str, prediction: str, target: str) -> str:
    return f"&fcnseg::{strategy}<fcnseg::{prediction}, fcnseg::{target}>"


def expressions(pairs: tuple[Pair, ...]) -> list[str]:
    counting = [expression(strategy, *pair) for strategy in STRATEGIES for pair in pairs]
    return [*counting, "&fcnseg::record_invalid"]


@functools.cache
def compiled(
    arch: int, pairs: tuple[Pair, ...] = SAME, source: str = f'#include "{HEADER}"\n'
) -> tuple[str, dict[str, str]]:
    assert LIBRARY is not None
    return Nvrtc(LIBRARY).compile(source, CUDA, arch, expressions(pairs))


def machine_code(arch: int, pairs: tuple[Pair, ...]) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes by expression."""
    assert LIBRARY is not None
    source = f'#include "{HEADER}"\n'
    return Nvrtc(LIBRARY).machine_code(source, CUDA, arch, expressions(pairs))


def expected(prediction: Array, target: Array, classes: int) -> tuple[Array, list[int]]:
    """The matrix, and the counters: bad pixels, ignored ones, the first bad one (-1: none)."""
    p, t = prediction.astype(np.int64), target.astype(np.int64)
    kept = t != IGNORED
    good = kept & (t >= 0) & (t < classes) & (p >= 0) & (p < classes)
    matrix = np.bincount(t[good] * classes + p[good], minlength=classes**2)
    bad = np.flatnonzero(kept & ~good)
    counters = [len(bad), int((~kept).sum()), int(bad[0]) if len(bad) else -1]
    return matrix.reshape(classes, classes), counters


def pixels_of(
    prediction: Array, target: Array, classes: int, threads: int = 1, columns: int = 0
) -> bytes:
    """The struct Pixels; columns and rows as launch_plan.h has them."""
    pointers = prediction.ctypes.data, target.ctypes.data
    narrow = min(prediction.itemsize, target.itemsize)
    vectors = math.ceil(target.size / max(8, 16 // narrow))
    columns = columns or threads
    rows = math.ceil(math.ceil(vectors / columns) / (threads // columns))
    return struct.pack("<QQqiiqq", *pointers, target.size, classes, columns, IGNORED, rows)


def launch(
    kernel: Kernel,
    strategy: str,
    maps: tuple[Array, Array],
    classes: int,
    report: Report,
    *,
    blocks: int = 1,
    columns: int = 0,
    schedule: str = "lockstep",
    every_counter: bool = True,
) -> tuple[Array, Array]:
    """Counts into a matrix of ones; returns it and the counters (invalid, ignored, ~first)."""
    prediction, target = maps
    kernel.threads, tables = STRATEGIES[strategy]
    kernel.shared_bytes = 4 * tables * (classes**2 + EXTRA_BINS)
    memory = Memory()
    matrix = np.ones((classes, classes), np.uint64)
    counters = np.zeros(3, np.uint64)
    for name, array in (("prediction", prediction), ("target", target), ("counters", counters)):
        memory.add_array(array, name)
    at = counters.ctypes.data
    pointers = struct.pack("<QQQ", at, *((at + 8, at + 16) if every_counter else (0, 0)))
    pixels = pixels_of(prediction, target, classes, kernel.threads * blocks, columns)
    kernel.launch((blocks,), [pixels, matrix, pointers], memory, report, schedule=schedule)
    return matrix, counters
