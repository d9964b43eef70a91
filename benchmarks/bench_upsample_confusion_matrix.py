"""upsample_confusion_matrix against F.interpolate + argmax + bincount.

python benchmarks/bench_upsample_confusion_matrix.py [--cases CASE ...]     (see harness.py)
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
    "19 classes, 1024x2048": Case((1, 19, 128, 256), (1024, 2048)),
    "150 classes, 512x512": Case((2, 150, 64, 64), (512, 512)),
}
SUMMARY = ["19 classes, 1024x2048"]
MODES = [
    Mode("", ["eager", "compile", "fused"], list(CASES)),
    Mode("eager with page-keeping malloc", ["eager"], list(CASES), PAGE_KEEPING),
]
MEMORY_CASES = list(CASES)
CUDA_CASES = {
    "1x19x128x256 to 1024x2048, fp16": Case((1, 19, 128, 256), (1024, 2048), dtype=torch.float16),
    "1x19x128x256 to 1024x2048, fp32": Case((1, 19, 128, 256), (1024, 2048)),
    "1x150x128x128 to 512x683, fp16": Case((1, 150, 128, 128), (512, 683), dtype=torch.float16),
}


def count(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    kept = target != 255
    bins = target[kept] * num_classes + prediction[kept]
    return torch.bincount(bins, minlength=num_classes**2).view(num_classes, num_classes)


def eager_matrix(logits: Tensor, target: Tensor, size: tuple[int, int]) -> Tensor:
    z = F.interpolate(logits, size, mode="bilinear")
    return count(z.argmax(1), target, logits.shape[1])


def implementation(name: str, case: Case) -> Callable[[], Tensor]:
    """The matrix [C, C]."""
    logits, target = case.inputs()
    if name == "fused":
        return lambda: fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255)
    matrix = eager_matrix
    if name == "compile":
        torch._dynamo.reset()
        matrix = torch.compile(eager_matrix, dynamic=False)
    return lambda: matrix(logits, target, case.size)


def work(case: Case) -> Work:
    """As upsample_argmax, without labels but with a target, int64."""
    (N, C, h, w), (H, W) = case.shape, case.size
    samples = N * C * h * w
    labels = case.labels.itemsize * N * H * W
    return Work(samples * case.dtype.itemsize + labels, 8 * C * C, 4 * samples)


def check(case: Case) -> None:
    """Before anything is timed: the matrix of fcnseg's labels, and near to that of eager's."""
    logits, target = case.inputs()
    matrix, expected = implementation("fused", case)(), implementation("eager", case)()
    labels = fcnseg.upsample_argmax(logits, case.size)
    assert torch.equal(matrix, count(labels, target, logits.shape[1]))
    # half logits: eager rounds them after the upsampling, and then meets ties
    share = 1e-5 if case.dtype == torch.float32 else 2e-2
    assert (matrix - expected).abs().sum() <= share * target.numel()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["eager", "compile", "fused"])
def test_time(benchmark: Any, case: str, name: str) -> None:
    require_compiled("upsample_confusion_matrix")
    torch.set_num_threads(1)
    if name == "fused":
        check(CASES[case])
    time_case(benchmark, implementation(name, CASES[case]), case, name)


if __name__ == "__main__":
    main(__file__)
