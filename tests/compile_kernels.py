"""Compile the Triton kernels for GPUs that need not be present, and check what they use.

``python -m tests.compile_kernels`` prints one line per kernel, configuration and architecture and
fails where a kernel spills, passes a ceiling, or holds a float atomic. ALL=1 compiles every
configuration for every architecture; otherwise that is done for sm_70 and sm_90 and the others get
one configuration per kernel. An argument restricts it to the lines that hold it; JOBS sets the
number of processes. It runs in processes of its own: the interpreter of Triton, which the tests
use, cannot compile.

A family of kernels adds its configurations by a generator in GENERATORS.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fcnseg.kernels import (
    common,
    upsample_argmax,
    upsample_confusion_matrix,
    upsample_cross_entropy,
)
from fcnseg.kernels.common import Lanes

ARCHS = (70, 75, 80, 86, 89, 90, 100, 120)
ALL_CONFIGURATIONS = (70, 90)
MAX_SHARED = 48 * 1024
FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.[\w.:]*\.(?:f16|bf16|f32|f64|f16x2|bf16x2)\b")

Configuration = tuple[str, Any, dict[str, Any], int]  # name, kernel, arguments, register ceiling


class FakeDriver:
    """What Triton asks a driver before it compiles, answered for any architecture."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # a device key of its own, so that caches do not mix

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack, shared and local bytes of the only kernel in ``cubin``."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", out.stdout + out.stderr)
    assert found is not None, out
    return dict(
        zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True)
    )


def _arguments(kernel: Any, dtypes: dict[str, torch.dtype], **constexprs: Any) -> dict[str, Any]:
    """Arguments by name: pointers from ``dtypes``, floats by their names, else an odd integer."""
    floats = {"step_h", "inverse_h", "step_w", "inverse_w", "half", "smoothing"}
    out: dict[str, Any] = {}
    for name in inspect.signature(kernel.fn).parameters:
        if name in constexprs:
            continue
        if name.endswith("_ptr"):
            out[name] = dtypes.get(name, torch.float32)
        elif name in floats:
            out[name] = 0.125
        elif name == "ignore_index":
            out[name] = 255
        else:
            out[name] = 97
    if "stride_logits_w" in out:
        out["stride_logits_w"] = 1
    return {**out, **constexprs}


LABELS = {"bad_count_ptr": torch.int32, "bad_index_ptr": torch.int64}


def _geometry(factor: float) -> common.Geometry:
    return common.geometry(96, 96, int(96 * factor), int(96 * factor), False, None, None)


def _cross_entropy(arch: int) -> Iterator[Configuration]:
    kernel = upsample_cross_entropy._upsample_cross_entropy_kernel
    mean = {"HAS_WEIGHT": False, "HAS_SMOOTHING": False, "WITH_GRAD": True, "PER_PIXEL": False}
    fp32, int64 = torch.float32, torch.int64
    cases: list[tuple[str, torch.dtype, torch.dtype, dict[str, bool], float, int]] = [
        ("mean fp32 x8 C=19", fp32, int64, {}, 8, 19),
        ("mean fp16 x8 C=19", torch.float16, int64, {}, 8, 19),
        ("mean bf16 x8 C=19 uint8", torch.bfloat16, torch.uint8, {}, 8, 19),
        ("mean fp32 x8 C=19 int32", fp32, torch.int32, {}, 8, 19),
        ("mean fp32 x4 C=19", fp32, int64, {}, 4, 19),
        ("mean fp32 x16 C=21", fp32, int64, {}, 16, 21),
        ("mean fp32 x32 C=21", fp32, int64, {}, 32, 21),
        ("mean fp32 x2.25 C=19", fp32, int64, {}, 2.25, 19),
        ("mean fp32 down C=19", fp32, int64, {}, 0.5, 19),
        ("mean fp32 x8 C=1", fp32, int64, {}, 8, 1),
        ("mean fp32 x8 C=150", fp32, int64, {}, 8, 150),
        ("mean fp16 x8 C=171", torch.float16, int64, {}, 8, 171),
        ("mean fp32 x8 C=1000", fp32, int64, {}, 8, 1000),
        ("mean fp32 x8 C=19 weight", fp32, int64, {"HAS_WEIGHT": True}, 8, 19),
        ("mean fp32 x8 C=19 smoothing", fp32, int64, {"HAS_SMOOTHING": True}, 8, 19),
        ("mean fp32 x8 C=1000 both", fp32, int64,
         {"HAS_WEIGHT": True, "HAS_SMOOTHING": True}, 8, 1000),
        ("loss only fp32 x8 C=19", fp32, int64, {"WITH_GRAD": False}, 8, 19),
        ("none fp32 x8 C=19", fp32, int64, {"PER_PIXEL": True, "WITH_GRAD": False}, 8, 19),
        ("none fp32 x8 C=19 both", fp32, int64,
         {"PER_PIXEL": True, "WITH_GRAD": False, "HAS_WEIGHT": True, "HAS_SMOOTHING": True}, 8, 19),
        ("none backward fp32 x8 C=19", fp32, int64, {"PER_PIXEL": True}, 8, 19),
        ("none backward fp32 x8 C=1000 both", fp32, int64,
         {"PER_PIXEL": True, "HAS_WEIGHT": True, "HAS_SMOOTHING": True}, 8, 1000),
    ]  # fmt: skip
    for name, logits, labels, changes, factor, num_classes in cases:
        dtypes = {**LABELS, "logits_ptr": logits, "target_ptr": labels}
        options = mean | changes
        lanes = upsample_cross_entropy.tuned_lanes(_geometry(factor), num_classes, options, arch)
        arguments = _arguments(
            kernel, dtypes, ONE_CLASS=num_classes == 1, BITS=num_classes.bit_length(), WIDE=False,
            **options, **lanes.constexprs(),
        )  # fmt: skip
        yield name, kernel, arguments, 255


def _finish(arch: int) -> Iterator[Configuration]:
    kernel = upsample_cross_entropy._finish_kernel
    dtypes = {**LABELS, "target_ptr": torch.int64, "record_ptr": torch.int64}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("mean", {}),
        ("mean channels_last", {"stride_c": 1}),
        ("sum", {"MEAN": False}),
        ("loss only", {"WITH_GRAD": False}),
        ("none", {"SCALAR": False, "WITH_GRAD": False}),
        ("none backward", {"SCALAR": False, "RECORD": False}),
    ]
    for name, changes in cases:
        arguments = _arguments(
            kernel, dtypes, SCALAR=True, MEAN=True, RECORD=True, WITH_GRAD=True, CELLS=32,
            WIDE=False, PARTIALS=1024, BLOCK=512,
        )  # fmt: skip
        yield name, kernel, arguments | changes, 128


def _argmax(arch: int) -> Iterator[Configuration]:
    kernel = upsample_argmax._upsample_argmax_kernel
    cases = [
        ("fp32 x8 int64", torch.float32, torch.int64, Lanes(8, 4, 2, 1)),
        ("fp16 x8 int64", torch.float16, torch.int64, Lanes(8, 4, 2, 1)),
        ("bf16 x8 uint8", torch.bfloat16, torch.uint8, Lanes(8, 4, 2, 1)),
        ("fp32 x4 int32", torch.float32, torch.int32, Lanes(4, 4, 1, 1)),
        ("fp32 x32 int64", torch.float32, torch.int64, Lanes(8, 4, 8, 1)),
        ("fp32 down int64", torch.float32, torch.int64, Lanes(1, 2, 1, 1)),
    ]
    for name, logits, labels, lanes in cases:
        dtypes = {"logits_ptr": logits, "label_ptr": labels}
        arguments = _arguments(kernel, dtypes, WIDE=False, **lanes.constexprs())
        yield name, kernel, arguments | {"stride_w": 1}, 208


def _confusion_matrix(arch: int) -> Iterator[Configuration]:
    kernel = upsample_confusion_matrix._upsample_confusion_matrix_kernel
    dtypes = {
        "target_ptr": torch.int64, "matrix_ptr": torch.int64, "copies_ptr": torch.int32,
        "bad_count_ptr": torch.int64, "bad_index_ptr": torch.int64,
    }  # fmt: skip
    lanes = Lanes(8, 4, 2, 1)
    for num_classes in (2, 19, 150):
        for logits in (torch.float32, torch.float16):
            size = upsample_confusion_matrix.bins(num_classes)
            arguments = _arguments(
                kernel, {**dtypes, "logits_ptr": logits}, BINS=size, WIDE=False,
                **lanes.constexprs(),
            )  # fmt: skip
            yield f"C={num_classes} {str(logits)[6:]} x8", kernel, arguments, 255
    kernel = upsample_confusion_matrix._gather_kernel
    dtypes |= {"record_ptr": torch.int64, "invalid_ptr": torch.int64}
    for has_copies in (True, False):
        arguments = _arguments(
            kernel, dtypes, HAS_COPIES=has_copies, HAS_INVALID=False, BLOCK=256, PARTIALS=1024
        )
        yield "copies" if has_copies else "record", kernel, arguments, 80


GENERATORS: list[Callable[[int], Iterator[Configuration]]] = [
    _cross_entropy,
    _finish,
    _argmax,
    _confusion_matrix,
]


def configurations(arch: int) -> list[Configuration]:
    return [configuration for generate in GENERATORS for configuration in generate(arch)]


def compile_one(kernel: Any, arguments: dict[str, Any]) -> Any:
    names = list(inspect.signature(kernel.fn).parameters)
    values = [arguments[name] for name in names]  # dtypes stand for pointers by position only
    options = {name: value for name, value in arguments.items() if name not in names}
    return kernel.warmup(*values, grid=(1,), **options)


def compile_and_check(job: tuple[int, int]) -> tuple[str, bool]:
    """The line about configuration ``index`` for ``arch``, and whether it is in order."""
    arch, index = job
    driver.set_active(FakeDriver(arch))
    name, kernel, arguments, max_registers = configurations(arch)[index]
    compiled = compile_one(kernel, arguments)
    used = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    problems = []
    if used["stack"] or used["local"]:
        problems.append("spills")
    if used["registers"] > max_registers:
        problems.append(f"more than {max_registers} registers")
    if compiled.metadata.shared > MAX_SHARED:
        problems.append(f"more than {MAX_SHARED} bytes of shared memory")
    if FLOAT_ATOMIC.search(ptx):
        problems.append("float atomic")
    if arch < 80 and "mma." in ptx:
        problems.append("matrix instruction")
    line = (
        f"sm_{arch:<4}{kernel.fn.__name__:<36}{name:<32}{used['registers']:>4} registers"
        f"{compiled.metadata.shared:>7} B shared"
        f"{used['stack'] + used['local']:>6} B spilled  {', '.join(problems) or 'ok'}"
    )
    return line, not problems


def jobs(only: str, every: bool) -> Iterator[tuple[int, int]]:
    for arch in ARCHS:
        seen: set[str] = set()
        for index, (name, kernel, _, _) in enumerate(configurations(arch)):
            kernel_name = kernel.fn.__name__
            if not every and arch not in ALL_CONFIGURATIONS and kernel_name in seen:
                continue
            if only in f"sm_{arch} {kernel_name} {name}":
                seen.add(kernel_name)
                yield arch, index


def main() -> int:
    every = os.environ.get("ALL", "0") not in ("", "0")
    todo = list(jobs(sys.argv[1] if len(sys.argv) > 1 else "", every))
    processes = int(os.environ.get("JOBS", os.cpu_count() or 1))
    failures = 0
    with multiprocessing.get_context("spawn").Pool(min(processes, len(todo))) as pool:
        for line, good in pool.imap(compile_and_check, todo):
            failures += not good
            print(line, flush=True)
    print(f"{len(todo)} compiled, {failures} failed")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
