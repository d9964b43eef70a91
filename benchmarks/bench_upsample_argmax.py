"""upsample_argmax against F.interpolate + argmax, on the CPU.

python benchmarks/bench_upsample_argmax.py [--cases CASE ...]     (see harness.py)
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

CASES = {
    "19 classes": Case((2, 19, 64, 128), (512, 1024)),
    "150 classes": Case((2, 150, 64, 64), (512, 512)),
}


def implementation(name: str, case: Case) -> Callable[[], Tensor]:
    """Labels, int64."""
    logits = case.inputs()[0]
    if name == "fused":
        return lambda: fcnseg.upsample_argmax(logits, case.size)
    return lambda: F.interpolate(logits, case.size, mode="bilinear").argmax(1)


def check(case: Case) -> None:
    """Before anything is timed."""
    labels = implementation("fused", case)()
    logits = case.inputs()[0]
    for n in range(len(logits)):
        z = F.interpolate(logits[n : n + 1].double(), case.size, mode="bilinear")
        chosen = z.gather(1, labels[n][None, None])[:, 0]
        assert (z.amax(1) - chosen <= 1e-5 * logits.abs().max()).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["eager", "fused"])
def test_time(benchmark: Any, case: str, name: str) -> None:
    require_compiled("upsample_argmax")
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
