"""upsample_confusion_matrix against F.interpolate + argmax + bincount, on the CPU.

python benchmarks/bench_upsample_confusion_matrix.py [--cases CASE ...]     (see harness.py)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import PAGE_KEEPING, Case, Mode, main, require_compiled, time_case
from torch import Tensor

import fcnseg

CASES = {"19 classes, 1024x2048": Case((1, 19, 128, 256), (1024, 2048))}


def count(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    kept = target != 255
    bins = target[kept] * num_classes + prediction[kept]
    return torch.bincount(bins, minlength=num_classes**2).view(num_classes, num_classes)


def implementation(name: str, case: Case) -> Callable[[], Tensor]:
    """The matrix [C, C]."""
    logits, target = case.inputs()
    if name == "fused":
        return lambda: fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255)

    def eager() -> Tensor:
        z = F.interpolate(logits, case.size, mode="bilinear")
        return count(z.argmax(1), target, logits.shape[1])

    return eager


def check(case: Case) -> None:
    """Before anything is timed: the matrix of fcnseg's labels, and near to that of eager's."""
    logits, target = case.inputs()
    matrix, expected = implementation("fused", case)(), implementation("eager", case)()
    labels = fcnseg.upsample_argmax(logits, case.size)
    assert torch.equal(matrix, count(labels, target, logits.shape[1]))
    assert (matrix - expected).abs().sum() <= 1e-5 * target.numel()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["eager", "fused"])
def test_time(benchmark: Any, case: str, name: str) -> None:
    require_compiled("upsample_confusion_matrix")
    torch.set_num_threads(1)
    if name == "fused":
        check(CASES[case])
    time_case(benchmark, implementation(name, CASES[case]), case, name)


if __name__ == "__main__":
    main(
        __file__,
        [
            Mode("", ["eager", "fused"], list(CASES)),
            Mode("eager with page-keeping malloc", ["eager"], list(CASES), PAGE_KEEPING),
        ],
        ["eager", "eager with page-keeping malloc"],
        list(CASES),
    )
