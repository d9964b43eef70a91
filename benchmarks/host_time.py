"""What a call of each Triton operator costs on the host, without a GPU.

    python benchmarks/host_time.py [--calls N] [--json FILE]

prints microseconds a call: the implementation for CUDA tensors from the dispatcher on, that is
plan, allocations and launches, with CPU tensors, kernels compiled for sm_90 and a driver that
launches nothing. Not in it: the dispatcher, autograd, the CUDA allocator and the driver itself. The
least of five repetitions is shown, since other processes only add to it. Problems are small,
because what PyTorch's own operators compute around the kernels (packing the weights of a transposed
convolution) is computed here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fcnseg import _ops
from fcnseg.kernels import launch

BILINEAR = (False, None, None)


class NoDriver:
    """What Triton asks a driver for; launches nothing."""

    target = GPUTarget("cuda", 90, 32)

    def __init__(self) -> None:
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None

    def load_binary(self, *args: Any) -> tuple[Any, ...]:
        return "module", "function", 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and call of each operator."""
    logits = torch.zeros(2, 19, 4, 4, dtype=torch.float16)
    target = torch.zeros(2, 32, 32, dtype=torch.int64)
    upstream, one = torch.zeros(2, 32, 32), torch.ones(())
    matrix, invalid = torch.zeros(19, 19, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    loss = (logits, target, None, 255)

    def forward() -> tuple[torch.Tensor, ...]:
        return _ops._upsample_cross_entropy_cuda(*loss, "mean", 0.0, *BILINEAR, True)

    _, sums, edges = forward()
    gradient = (one, sums, edges, logits, (32, 32), False, 0.0, *BILINEAR)
    yield "upsample_cross_entropy, forward", forward
    yield (
        "upsample_cross_entropy, backward",
        lambda: _ops._upsample_cross_entropy_gradient_cuda(*gradient),
    )
    yield (
        'upsample_cross_entropy "none", forward',
        lambda: _ops._upsample_cross_entropy_cuda(*loss, "none", 0.0, *BILINEAR, True),
    )
    yield (
        'upsample_cross_entropy "none", backward',
        lambda: _ops._upsample_cross_entropy_backward_cuda(upstream, *loss, 0.0, *BILINEAR),
    )
    yield (
        "upsample_argmax",
        lambda: _ops._upsample_argmax_cuda(logits, (32, 32), *BILINEAR, torch.int64),
    )
    yield (
        "upsample_confusion_matrix_",
        lambda: _ops._upsample_confusion_matrix_cuda(
            matrix, logits, target, 255, *BILINEAR, invalid
        ),
    )
    for name, groups, classes in (("full", 1, 19), ("grouped", 19, 1)):
        weight = torch.zeros(19, classes, 4, 4, dtype=torch.float16)
        geometry = ((2, 2), (1, 1), (0, 0), groups, (1, 1), (0, 0))
        small = target[:, :8, :8]
        conv = (logits, weight, small, None, None, *geometry, 255, "mean", 0.0, (True, True, False))
        labels = (logits, weight, None, (8, 8), *geometry, torch.int64)
        yield (
            f"conv_transpose_cross_entropy, {name}, forward",
            lambda conv=conv: _ops._conv_transpose_cross_entropy_cuda(*conv),
        )
        yield (
            f"conv_transpose_argmax, {name}",
            lambda labels=labels: _ops._conv_transpose_argmax_cuda(*labels),
        )


def microseconds(call: Callable[[], Any], count: int) -> float:
    """Of one call: the least of five repetitions, after the kernels are compiled."""
    for _ in range(3):
        call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count)
    return round(min(times) * 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="host time of a call of each Triton operator")
    parser.add_argument("--calls", type=int, default=300, help="of each repetition")
    parser.add_argument("--json", type=Path, help="the figures go there too")
    options = parser.parse_args()
    driver.set_active(NoDriver())
    launch.keeps_plans = lambda device: True  # as for CUDA tensors
    figures = {name: microseconds(call, options.calls) for name, call in calls()}
    print("| operator | microseconds a call |\n|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {value} |")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
