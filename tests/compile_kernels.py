"""Compile the Triton kernels for GPUs that need not be present, and check what they use.

``python -m tests.compile_kernels`` prints one line per kernel, configuration and architecture and
fails where a kernel spills, passes a ceiling, or holds a float atomic. ALL=1 compiles every
configuration for every architecture; otherwise that is done for sm_70 and sm_90 and the others get
one configuration per kernel. An argument restricts it to the lines that hold it; PART=2/8 compiles
the second of every eight; JOBS sets the number of processes. It runs in processes of its own: the
interpreter of Triton, which the tests use, cannot compile.

A family of kernels adds its configurations by a generator in GENERATORS. CONV=1 compiles those of
the transposed convolution instead, which take minutes.
"""

from __future__ import annotations

import contextlib
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
from unittest import mock

import pytest
import torch
import triton
from triton.runtime import driver

from fcnseg.kernels import (
    bad_labels,
    common,
    conv_transpose_argmax,
    conv_transpose_cross_entropy,
    upsample_argmax,
    upsample_confusion_matrix,
    upsample_cross_entropy,
)
from tests import coalesce_once
from tests.fake_driver import FakeDriver

ARCHS = (70, 75, 80, 86, 89, 90, 100, 120)
ALL_CONFIGURATIONS = (70, 90)
# Bytes of shared memory: what needs no opt-in; from Ampere on, where tl.dot stages its operands,
# what still lets several programs share a multiprocessor (opt-in limits: 99 to 227 KB).
MAX_SHARED = {arch: 48 * 1024 if arch < 80 else 64 * 1024 for arch in ARCHS}
FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.[\w.:]*\.(?:f16|bf16|f32|f64|f16x2|bf16x2)\b")

Configuration = tuple[str, Any, dict[str, Any], int]  # name, kernel, arguments, register ceiling


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


def recorded(
    arch: int, call: Callable[..., Any], *args: Any
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Kernels, and their arguments by name, that ``call(*args)`` launches on ``arch``.

    So the compiler sees what it sees on a GPU, strides of 1 that become constants for one. Nothing
    runs: the tensors may be large and empty.
    """
    launches: list[tuple[Any, dict[str, Any]]] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            names = list(inspect.signature(self.kernel.fn).parameters)
            return lambda *args, **options: launches.append(
                (self.kernel, dict(zip(names, args, strict=False)) | options)
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "capability", lambda device: arch)
        for module in [m for name, m in sys.modules.items() if name.startswith("fcnseg.kernels.")]:
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                    patch.setattr(module, name, Recorder(value))
        call(*args)
    yield from launches


def _case(
    num_classes: int, logits: torch.dtype, labels: torch.dtype, factor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pixels = int(96 * factor)
    record = torch.zeros(5, dtype=torch.int64)
    return (
        torch.empty(2, num_classes, 96, 96, dtype=logits),
        torch.empty(2, pixels, pixels, dtype=labels),
        record,
    )


FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
UINT8, INT32, INT64 = torch.uint8, torch.int32, torch.int64
PLAIN = (False, None, None)


def _loss_and_gradient(
    logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, *args: Any
) -> None:
    """Both passes of a loss; the gradient of half logits is half, of float32 ones in place."""
    smoothing, *geometry = args[2:6]
    _, sums, edges = upsample_cross_entropy.upsample_cross_entropy_forward(
        logits, target, weight, *args
    )
    if sums.numel():
        gradient = sums if logits.dtype == FP32 else torch.empty_like(logits)
        upsample_cross_entropy.upsample_cross_entropy_gradient(
            torch.empty(()), sums, edges, gradient, target.shape[1:], weight is not None, smoothing,
            *geometry,
        )  # fmt: skip


def _cross_entropy(arch: int) -> Iterator[Configuration]:
    # mean or none; what else; classes, logits, labels, factor
    cases: list[tuple[str, str, int, torch.dtype, torch.dtype, float]] = [
        ("mean", "", 19, FP32, INT64, 8),
        ("mean", "", 19, FP16, INT64, 8),
        ("mean", "", 19, BF16, UINT8, 8),
        ("mean", "channels_last", 19, FP16, INT32, 8),
        ("mean", "", 19, FP32, INT64, 7),
        ("mean", "", 19, FP32, INT64, 4),
        ("mean", "", 21, FP32, INT64, 16),
        ("mean", "", 21, FP32, INT64, 32),
        ("mean", "", 19, FP32, INT64, 2.25),
        ("mean", "", 19, FP32, INT64, 0.5),
        ("mean", "", 1, FP32, INT64, 8),
        ("mean", "", 150, FP32, INT64, 8),
        ("mean", "", 171, FP16, INT64, 8),
        ("mean", "", 1000, FP32, INT64, 8),
        ("mean", "weight", 19, FP32, INT64, 8),
        ("mean", "smoothing", 19, FP32, INT64, 8),
        ("sum", "weight smoothing", 1000, FP32, INT64, 8),
        ("mean", "forward", 19, FP32, INT64, 8),
        ("none", "forward", 19, FP32, INT64, 8),
        ("none", "forward weight smoothing", 19, FP32, INT64, 8),
        ("none", "backward", 19, FP32, INT64, 8),
        ("none", "backward weight smoothing", 1000, FP32, INT64, 8),
    ]
    done = set()
    for reduction, options, num_classes, dtype, labels, factor in cases:
        logits, target, record = _case(num_classes, dtype, labels, factor)
        if "channels_last" in options:
            logits = logits.to(memory_format=torch.channels_last)
        weight = torch.ones(num_classes) if "weight" in options else None
        loss = (weight, 255, 0.1 if "smoothing" in options else 0.0)
        if "backward" in options:
            launches = recorded(
                arch, upsample_cross_entropy.upsample_cross_entropy_backward,
                torch.empty(target.shape), logits, target, *loss, *PLAIN, record,
            )  # fmt: skip
        else:
            launches = recorded(
                arch, _loss_and_gradient, logits, target, *loss[:2], reduction, loss[2], *PLAIN,
                "forward" not in options, record,
            )  # fmt: skip
        name = f"{reduction} C={num_classes} {_short(dtype)} {_short(labels)} x{factor:g} {options}"
        for kernel, arguments in launches:
            if kernel.fn.__name__ in ("_loss_kernel", "_gradient_kernel"):
                # told apart by dtypes and constants alone; the same ones serve many losses
                key = tuple(
                    str(getattr(value, "dtype", value))
                    for key, value in arguments.items()
                    if key.endswith("_ptr") or key.isupper()
                )
                if (kernel, key) not in done:
                    done.add((kernel, key))
                    yield name, kernel, arguments, 128
            else:
                yield name, kernel, arguments, arguments["maxnreg"]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def _argmax(arch: int) -> Iterator[Configuration]:
    cases = [
        (19, FP32, INT64, 8), (19, FP16, INT64, 8), (19, BF16, UINT8, 8), (150, FP32, INT32, 4),
        (21, FP32, INT64, 32), (19, FP32, INT64, 0.5),
    ]  # fmt: skip
    for num_classes, dtype, labels, factor in cases:
        logits, target, _ = _case(num_classes, dtype, labels, factor)
        size = target.shape[1:]
        for kernel, arguments in recorded(
            arch, upsample_argmax.upsample_argmax_forward, logits, size, *PLAIN, labels
        ):
            yield f"{_short(dtype)} {_short(labels)} x{factor:g}", kernel, arguments, 168


def _confusion_matrix(arch: int) -> Iterator[Configuration]:
    cases = [(2, FP32, INT64), (19, FP32, INT64), (19, FP16, UINT8), (150, FP32, INT64)]
    for num_classes, dtype, labels in cases:
        logits, target, record = _case(num_classes, dtype, labels, 8)
        matrix = torch.empty(num_classes, num_classes, dtype=torch.int64)
        for kernel, arguments in recorded(
            arch, upsample_confusion_matrix.upsample_confusion_matrix_forward_, matrix, logits,
            target, 255, *PLAIN, record, None,
        ):  # fmt: skip
            ceiling = 80 if kernel.fn.__name__ == "_gather_kernel" else 255
            yield f"C={num_classes} {_short(dtype)} {_short(labels)}", kernel, arguments, ceiling


def _bad_labels(arch: int) -> Iterator[Configuration]:
    scalar = torch.empty((), dtype=INT64)
    for labels in (UINT8, INT64):
        _, target, record = _case(19, FP32, labels, 8)
        for kernel, arguments in recorded(
            arch, bad_labels.record_bad_labels, record, target, scalar, scalar
        ):
            yield _short(labels), kernel, arguments, 64


class _Recorder:
    """Stands for kernels: keeps what a launcher passes instead of launching."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **constexprs: Any) -> None:
            named = dict(zip(inspect.signature(self.kernel.fn).parameters, args, strict=False))
            arguments = {
                name: value.dtype if isinstance(value, torch.Tensor) else value
                for name, value in named.items()
            }
            self.launches.append((self.kernel, {**arguments, **constexprs}))

        return launch


def _launches(arch: int, launcher: Callable[..., Any], *args: Any) -> list[tuple[Any, Any]]:
    """The kernels of the transposed convolution that ``launcher`` starts, and their arguments."""
    launches: list[tuple[Any, dict[str, Any]]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(common, "capability", lambda device: arch))
        for module in (conv_transpose_cross_entropy, conv_transpose_argmax):
            for name, value in list(vars(module).items()):
                if name.endswith("_kernel"):
                    recorder = _Recorder(value, launches)
                    stack.enter_context(mock.patch.object(module, name, recorder))
        launcher(*args)
    return launches


def _conv_transpose(arch: int) -> Iterator[Configuration]:
    """What the launchers start for [2, C, 64, 128] to 512 x 1024, all the arguments included."""
    half, fp32 = torch.float16, torch.float32
    cases: list[tuple[str, torch.dtype, int, int, int, int, dict[str, Any]]] = [
        # name, dtype, input channels, classes, groups, stride (kernel 2 s), options
        ("full C=19 fp16", half, 19, 19, 1, 8, {}),
        ("full C=19 fp32", fp32, 19, 19, 1, 8, {}),
        ("full C=21 bf16 weight smoothing", torch.bfloat16, 21, 21, 1, 8,
         {"weighted": True, "smoothing": 0.1}),
        ("full C=21 fp32 weight smoothing", fp32, 21, 21, 1, 8,
         {"weighted": True, "smoothing": 0.1}),
        ("full C=150 fp16", half, 150, 150, 1, 8, {}),
        ("full C=150 fp32", fp32, 150, 150, 1, 8, {}),
        ("full C=21 of 512 fp16", half, 512, 21, 1, 2, {}),
        ("grouped C=19 fp16", half, 19, 19, 19, 8, {}),
        ("grouped C=19 fp32", fp32, 19, 19, 19, 8, {}),
        ("grouped C=21 bf16 weight smoothing", torch.bfloat16, 21, 21, 21, 32,
         {"weighted": True, "smoothing": 0.1}),
        ("grouped C=150 fp16", half, 150, 150, 150, 8, {}),
        ("grouped C=1000 fp32", fp32, 1000, 1000, 1000, 8, {}),
        ("between C=20 fp32", fp32, 40, 20, 4, 2, {}),
        ("none full C=19 fp16", half, 19, 19, 1, 8, {"reduction": "none"}),
        ("none grouped C=19 fp32", fp32, 19, 19, 19, 8, {"reduction": "none"}),
        ("generic full C=19 fp16", half, 19, 19, 1, 2, {"kernel": 3}),
        ("generic full C=19 fp32", fp32, 19, 19, 1, 2, {"kernel": 3}),
        ("generic grouped C=19 fp32", fp32, 19, 19, 19, 2, {"kernel": 3}),
    ]  # fmt: skip
    seen: list[tuple[Any, dict[str, Any]]] = []
    for name, dtype, channels, classes, groups, stride, options in cases:
        kernel = options.get("kernel", 2 * stride)
        none, smoothing = options.get("reduction") == "none", options.get("smoothing", 0.0)
        size = (64 * stride, 128 * stride)
        input, weight, bias, target = (
            torch.empty(shape, dtype=kind, device="meta")
            for shape, kind in (
                ((2, channels, 64, 128), dtype),
                ((channels, classes // groups, kernel, kernel), dtype),
                ((classes,), dtype),
                ((2, *size), torch.int64),
            )
        )
        class_weight = torch.empty_like(bias, dtype=fp32) if options.get("weighted") else None
        record = torch.empty(5, dtype=INT64, device="meta")
        geometry = ((stride,) * 2, (stride // 2,) * 2, (0, 0), groups, (1, 1), (0, 0))
        loss = (input, weight, target, bias, class_weight, *geometry, 255)
        wanted = (True, True, True)
        reduction = options.get("reduction", "mean")
        launches = _launches(
            arch, conv_transpose_cross_entropy.conv_transpose_cross_entropy_forward, *loss,
            reduction, smoothing, wanted, record,
        )  # fmt: skip
        if none:
            launches += _launches(
                arch, conv_transpose_cross_entropy.conv_transpose_cross_entropy_backward,
                torch.empty_like(target, dtype=fp32), *loss, smoothing, wanted,
            )  # fmt: skip
        launches += _launches(
            arch, conv_transpose_argmax.conv_transpose_argmax_forward, input, weight, bias, size,
            *geometry, torch.int64,
        )  # fmt: skip
        for launch in launches:
            if launch not in seen:
                seen.append(launch)
                yield name, *launch, 255


GENERATORS: list[Callable[[int], Iterator[Configuration]]] = [
    _cross_entropy,
    _argmax,
    _confusion_matrix,
    _bad_labels,
]
if os.environ.get("CONV", "0") not in ("", "0"):
    GENERATORS = [_conv_transpose]


def configurations(arch: int) -> list[Configuration]:
    return [configuration for generate in GENERATORS for configuration in generate(arch)]


def compile_one(kernel: Any, arguments: dict[str, Any]) -> Any:
    names = list(inspect.signature(kernel.fn).parameters)
    values = [arguments[name] for name in names]  # dtypes stand for pointers by position only
    options = {name: value for name, value in arguments.items() if name not in names}
    return kernel.warmup(*values, grid=(1,), **options)


def compile_and_check(arch: int, index: int) -> tuple[str, bool]:
    """The line about configuration ``index`` for ``arch``, and whether it is in order."""
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
    if compiled.metadata.shared > MAX_SHARED[arch]:
        problems.append(f"more than {MAX_SHARED[arch]} bytes of shared memory")
    if FLOAT_ATOMIC.search(ptx):
        problems.append("float atomic")
    if arch < 80 and "mma." in ptx:
        problems.append("matrix instruction")
    line = (
        f"sm_{arch:<4}{kernel.fn.__name__:<36}{name:<42}{used['registers']:>4} registers"
        f"{compiled.metadata.shared:>7} B shared"
        f"{used['stack'] + used['local']:>6} B spilled  {', '.join(problems) or 'ok'}"
    )
    return line, not problems


def jobs(only: str, every: bool) -> list[list[tuple[int, int]]]:
    """A configuration on all architectures that compile it is one job: they share work."""
    found: dict[str, list[tuple[int, int]]] = {}
    for arch in ARCHS:
        seen: set[str] = set()
        for index, (name, kernel, _, _) in enumerate(configurations(arch)):
            kernel_name = kernel.fn.__name__
            if not every and arch not in ALL_CONFIGURATIONS and kernel_name in seen:
                continue
            if only in f"sm_{arch} {kernel_name} {name}":
                seen.add(kernel_name)
                found.setdefault(f"{kernel_name} {name}", []).append((arch, index))
    return list(found.values())


def compile_and_check_all(job: list[tuple[int, int]]) -> list[tuple[str, bool]]:
    with coalesce_once.share():
        return [compile_and_check(*one) for one in job]


def main() -> int:
    every = os.environ.get("ALL", "0") not in ("", "0")
    todo = jobs(sys.argv[1] if len(sys.argv) > 1 else "", every)
    if not todo:
        sys.exit(f"no configuration's line holds {sys.argv[1]!r}")
    part, parts = map(int, os.environ.get("PART", "1/1").split("/"))
    todo = todo[part - 1 :: parts]
    processes = int(os.environ.get("JOBS", os.cpu_count() or 1))
    outcomes: list[bool] = []
    with multiprocessing.get_context("spawn").Pool(min(processes, len(todo))) as pool:
        for lines in pool.imap(compile_and_check_all, todo):
            outcomes += [good for _, good in lines]
            print(*(line for line, _ in lines), sep="\n", flush=True)
    failures = outcomes.count(False)
    print(f"{len(outcomes)} compiled, {failures} failed")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
