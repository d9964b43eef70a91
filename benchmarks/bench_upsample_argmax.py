"""upsample_argmax against F.interpolate + argmax.

python benchmarks/bench_upsample_argmax.py [--cases CASE ...]     (see harness.py)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clocks import time_case
from harness import PAGE_KEEPING, Case, Mode, Work, require_compiled
from torch import Tensor
from workers import main

import fcnseg

CASES = {
    "19 classes": Case((2, 19, 64, 128), (512, 1024)),
    "150 classes": Case((2, 150, 64, 64), (512, 512)),
}
SUMMARY = ["19 classes"]
MODES = [
    Mode("", ["eager", "compile", "fused"], list(CASES)),
    Mode("eager with page-keeping malloc", ["eager"], list(CASES), PAGE_KEEPING),
]
MEMORY_CASES = list(CASES)
CUDA_CASES = {
    "1x19x128x256 to 1024x2048, fp16": Case((1, 19, 128, 256), (1024, 2048), dtype=torch.float16),
    # SegFormer's on ADE20K, the case of NVIDIA/TensorRT-Model-Connect's pull request 488
    "1x150x128x128 to 512x683, fp16": Case((1, 150, 128, 128), (512, 683), dtype=torch.float16),
    "1x19x128x256 to 1024x2048, fp32": Case((1, 19, 128, 256), (1024, 2048)),
    "8x150x64x64 to 512x512, fp32": Case((8, 150, 64, 64), (512, 512)),
}


def eager_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear").argmax(1)


def implementation(name: str, case: Case) -> Callable[[], Tensor]:
    """Labels, int64."""
    logits = case.inputs()[0]
    if name == "fused":
        return lambda: fcnseg.upsample_argmax(logits, case.size)
    argmax = eager_argmax
    if name == "compile":
        torch._dynamo.reset()
        argmax = torch.compile(eager_argmax, dynamic=False)
    return lambda: argmax(logits, case.size)


def work(case: Case) -> Work:
    """Four comparisons per sample, where they tell the winner of a whole cell; labels in int64."""
    (N, C, h, w), (H, W) = case.shape, case.size
    samples = N * C * h * w
    return Work(samples * case.dtype.itemsize, 8 * N * H * W, 4 * samples)


def check(case: Case) -> None:
    """Before anything is timed."""
    labels = implementation("fused", case)()
    logits = case.inputs()[0]
    for n in range(len(logits)):
        z = F.interpolate(logits[n : n + 1].double(), case.size, mode="bilinear")
        chosen = z.gather(1, labels[n][None, None])[:, 0]
        assert (z.amax(1) - chosen <= 1e-5 * logits.abs().max()).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["eager", "compile", "fused"])
def test_time(benchmark: Any, case: str, name: str) -> None:
    require_compiled("upsample_argmax")
    torch.set_num_threads(1)
    if name == "fused":
        check(CASES[case])
    time_case(benchmark, implementation(name, CASES[case]), case, name)


if __name__ == "__main__":
    main(__file__)
