"""What the kernels cost: registers, spills, and instructions for a pixel, for a pixel and class.

    python -m tests.ptx_emulator.count [--arch 70 90] [--classes 19 150] [--only REGEX]
        [--json FILE]

A line per operator and kernel. Registers and spilled bytes are those of the machine code that ptxas
makes. Instructions are those of the PTX that warps execute in the emulator, times 32: each counts
for all lanes of its warp, idle ones too. They compare two versions of a kernel; they are no time.
Below each line stand the instructions a pixel by what they are.

The shapes are small, so launchers are told of a GPU of one multiprocessor: a program then has about
as much to do as it has with a large batch on a real one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from tests.compile_kernels import resources
from tests.fake_driver import FakeDriver
from tests.ptx_emulator import launchers
from tests.ptx_emulator.bilinear_cases import make
from tests.ptx_emulator.launchers import Loss, launches_on
from tests.ptx_emulator.triton_bridge import Session

F16, U8, I64 = torch.float16, torch.uint8, torch.int64
PLAIN = (False, None, None)
STRIDE = 8  # of bilinear upsampling


@dataclass(frozen=True)
class Row:
    """What one kernel of an operator costs; instructions are a pixel's, those of all launches."""

    arch: int
    classes: int
    operator: str
    kernel: str
    launches: int
    registers: int
    spilled_bytes: int
    per_pixel: float
    per_pixel_and_class: float
    by_kind: dict[str, float]

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {number:.2f}" for kind, number in self.by_kind.items())
        return (
            f"sm_{self.arch} C={self.classes:<4}{self.operator:<28}{self.kernel:<36}"
            f"{self.registers:>4} registers{self.spilled_bytes:>5} B spilled"
            f"{self.per_pixel:>10.1f} a pixel{self.per_pixel_and_class:>8.2f} a pixel and class\n"
            f"        {kinds}"
        )


Launch = Callable[[], object]


def bilinear_operators(classes: int) -> Iterator[tuple[str, int, Launch]]:
    """Name, output pixels and launch of each operator over bilinearly upsampled fp16 logits."""
    samples = 24 if classes < 100 else 16
    size = (samples * STRIDE,) * 2
    pixels = size[0] * size[1]
    logits, target = make(1, classes, samples, samples, *size, F16)
    record = launchers.no_record()
    matrix = torch.zeros(classes, classes, dtype=I64)

    def loss(options: Loss) -> Launch:
        upstream = torch.ones(target.shape if options.per_pixel else ())
        return lambda: launchers.bilinear_loss(
            logits, target, None, options, PLAIN, upstream, record
        )

    yield "loss", pixels, loss(Loss())
    yield "loss smoothing", pixels, loss(Loss(smoothing=0.1))
    yield "loss none", pixels, loss(Loss(reduction="none"))
    yield "argmax", pixels, lambda: launchers.upsample_argmax_forward(logits, size, *PLAIN, U8)
    yield (
        "confusion matrix",
        pixels,
        lambda: launchers.upsample_confusion_matrix_forward_(
            matrix, logits, target, 255, *PLAIN, record, None
        ),
    )


def conv_transpose_operators(classes: int) -> Iterator[tuple[str, int, Launch]]:
    """The same of transposed convolutions, full and one channel a class, of fp16 operands.

    As many cells as fill the blocks of programs; fewer pixels a cell the more classes there are.
    """
    samples, stride = 15, 4 if classes < 100 else 2
    size = (samples * stride,) * 2
    pixels = size[0] * size[1]
    x, target = make(1, classes, samples, samples, *size, F16)

    def loss(weight: Tensor, geometry: launchers.ConvGeometry) -> Launch:
        operands = (x, weight, target, None, None)
        wanted, record = (True, True, False), launchers.no_record()
        return lambda: launchers.conv_transpose_loss(
            operands, geometry, Loss(), wanted, None, record
        )

    def argmax(weight: Tensor, geometry: launchers.ConvGeometry) -> Launch:
        return lambda: launchers.conv_transpose_argmax_forward(x, weight, None, size, *geometry, U8)

    for name, groups in (("full", 1), ("grouped", classes)):
        weight = torch.randn(classes, classes // groups, 2 * stride, 2 * stride).to(F16)
        geometry = ((stride,) * 2, (stride // 2,) * 2, (0, 0), groups, (1, 1), (0, 0))
        yield f"conv {name} loss", pixels, loss(weight, geometry)
        yield f"conv {name} argmax", pixels, argmax(weight, geometry)


class CompilingDriver(FakeDriver):
    """A device of its own, so that machine code is made and not the emulator's PTX is found."""

    def get_current_device(self) -> int:
        return 1000 + self.target.arch


def machine_code(
    arch: int, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]
) -> dict[str, dict[str, int]]:
    """The most registers and spilled bytes of any variant of each kernel that was launched."""
    before = driver._active
    driver.set_active(CompilingDriver(arch))
    used: dict[str, dict[str, int]] = {}
    try:
        for function, args, options in launches:
            compiled = function.run(*args, grid=(1,), warmup=True, **options)
            found = resources(compiled.asm["cubin"])
            worst = used.setdefault(compiled.metadata.name, {"registers": 0, "spilled": 0})
            worst["registers"] = max(worst["registers"], found["registers"])
            worst["spilled"] = max(worst["spilled"], found["stack"] + found["local"])
    finally:
        driver._active = before
    return used


def rows(arch: int, classes: int, only: str) -> Iterator[Row]:
    """The table of one architecture and number of classes."""
    operators = [*bilinear_operators(classes), *conv_transpose_operators(classes)]
    for operator, pixels, launch in operators:
        if not re.search(only, operator):
            continue
        launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        session = Session(arch, races=False, on_launch=lambda *launched: launches.append(launched))
        with launches_on(session, multiprocessors=1):
            launch()
        used = machine_code(arch, launches)
        for kernel, counts in session.report.statistics.items():
            total = 32 * sum(counts.values())
            yield Row(
                arch,
                classes,
                operator,
                kernel,
                session.report.launches[kernel],
                used[kernel]["registers"],
                used[kernel]["spilled"],
                total / pixels,
                total / pixels / classes,
                {kind: 32 * number / pixels for kind, number in Counter(counts).most_common()},
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[70, 90])
    parser.add_argument("--classes", type=int, nargs="+", default=[19, 150])
    parser.add_argument("--only", default="", help="operators that this regular expression finds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Triton {triton.__version__}, fp16 operands, labels int64 in, uint8 out")
    found = []
    for arch in options.arch:
        for classes in options.classes:
            for row in rows(arch, classes, options.only):
                print(row, flush=True)
                found.append(row)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
