"""conv_transpose_argmax against F.conv_transpose2d + argmax.

python benchmarks/bench_conv_transpose_argmax.py [--cases CASE ...]     (see harness.py)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_conv_transpose_cross_entropy import STANDARD, Case, split_products
from clocks import time_case
from harness import PAGE_KEEPING, Mode, Work, require_compiled
from torch import Tensor
from workers import main

import fcnseg

CASES = {
    "grouped, 19 classes": Case(*STANDARD),
    "full, 19 classes": Case(*STANDARD, grouped=False),
    "grouped, 150 classes": Case((2, 150, 64, 64), (512, 512)),
    "grouped, stride 32": Case((2, 19, 16, 32), (512, 1024)),
}
SUMMARY = list(CASES)[:1]
MODES = [
    Mode("", ["eager", "compile", "fused"], list(CASES)),
    Mode("eager with page-keeping malloc", ["eager"], list(CASES), PAGE_KEEPING),
]
MEMORY_CASES = list(CASES)
CUDA_CASES = {
    "grouped, fp16": Case(*STANDARD, dtype=torch.float16),
    "full, fp16": Case(*STANDARD, dtype=torch.float16, grouped=False),
    "grouped, fp32": Case(*STANDARD),
}


def eager_argmax(input: Tensor, weight: Tensor, bias: Tensor, **geometry: int) -> Tensor:
    return F.conv_transpose2d(input, weight, bias, **geometry).argmax(1)


def implementation(name: str, case: Case) -> Callable[[], Tensor]:
    """Labels, int64."""
    input, weight, bias, _ = case.operands()
    if name == "fused":
        return lambda: fcnseg.conv_transpose_argmax(input, weight, case.size, bias, **case.geometry)
    argmax = eager_argmax
    if name == "compile":
        torch._dynamo.reset()
        argmax = torch.compile(eager_argmax, dynamic=False)
    return lambda: argmax(input, weight, bias, **case.geometry)


def work(case: Case) -> Work:
    """A multiply-add per pixel, class, tap and channel; labels in int64."""
    (N, C, h, w), (H, W) = case.shape, case.size
    channels = 1 if case.grouped else C
    weights = C * channels * (2 * case.stride) ** 2
    read = (N * C * h * w + weights) * case.dtype.itemsize
    pixels = N * H * W
    operations, products = split_products(case, pixels * C * 4 * channels, pixels * C)
    return Work(read, 8 * pixels, operations, products)


def check(case: Case) -> None:
    """Before anything is timed."""
    labels = implementation("fused", case)()
    input, weight, bias, _ = case.operands()
    for n in range(len(input)):
        z = F.conv_transpose2d(
            input[n : n + 1].double(), weight.double(), bias.double(), **case.geometry
        )
        chosen = z.gather(1, labels[n][None, None])[:, 0]
        assert (z.amax(1) - chosen <= 1e-5 * z.abs().max()).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["eager", "compile", "fused"])
def test_time(benchmark: Any, case: str, name: str) -> None:
    require_compiled("conv_transpose_argmax")
    torch.set_num_threads(2)
    if name == "fused":
        check(CASES[case])
    time_case(benchmark, implementation(name, CASES[case]), case, name)


if __name__ == "__main__":
    main(__file__)
