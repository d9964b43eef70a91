"""upsample_cross_entropy against F.interpolate + F.cross_entropy, eager and compiled, on the CPU.

python benchmarks/bench_upsample_cross_entropy.py [--cases CASE ...]     (see harness.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import PAGE_KEEPING, Case, Mode, main, require_compiled, time_case
from torch import Tensor

import fcnseg

STANDARD = ((2, 19, 64, 128), (512, 1024))
CASES = {
    "19 classes": Case(*STANDARD),
    "19 classes, channels_last": Case(*STANDARD, channels_last=True),
    "150 classes": Case((2, 150, 64, 64), (512, 512)),
    "ragged": Case((2, 19, 65, 129), (513, 1025)),
    "bfloat16": Case(*STANDARD, dtype=torch.bfloat16),
    "logits x10": Case(*STANDARD, scale=30.0),
    "reduction none": Case(*STANDARD, reduction="none"),
    "forward only": Case(*STANDARD, backward=False),
    "noise targets": Case(*STANDARD, noise=True),
}
MAIN = list(CASES)[:4]
COMPILED = {"compile with 1 thread": 1, "compile with 2 threads": 2}


def eager_loss(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    z = F.interpolate(logits, target.shape[1:], mode="bilinear")
    return F.cross_entropy(z, target, ignore_index=255, reduction=reduction)


def fused_loss(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    return fcnseg.upsample_cross_entropy(logits, target, ignore_index=255, reduction=reduction)


def implementation(name: str, case: Case) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """One step: the loss, and (unless forward only) the gradient."""
    logits, target = case.inputs()
    logits.requires_grad_(case.backward)
    loss: Callable[..., Tensor] = fused_loss if name == "fused" else eager_loss
    if name in COMPILED:
        torch._dynamo.reset()
        loss = torch.compile(eager_loss, dynamic=False)
    upstream = None
    if case.reduction == "none":
        upstream = torch.rand(target.shape, generator=torch.Generator().manual_seed(1))
        upstream = upstream.to(loss(logits[:1], target[:1], "none").dtype)

    def step() -> tuple[Tensor, Tensor | None]:
        value = loss(logits, target, case.reduction)
        logits.grad = None
        if case.backward:
            value.backward(upstream)
        return value.detach(), logits.grad

    return step


def gradient_error(case: Case, name: str) -> float:
    """Relative, against float64 on the same logits."""
    logits, target = case.inputs()
    leaf = logits.double().requires_grad_()
    eager_loss(leaf, target, case.reduction).sum().backward()
    logits.requires_grad_()
    loss = fused_loss if name == "fused" else eager_loss
    loss(logits, target, case.reduction).sum().backward()
    assert logits.grad is not None and leaf.grad is not None
    return ((logits.grad.double() - leaf.grad).norm() / leaf.grad.norm()).item()


def direct_share(logits: Tensor) -> float:
    """Share of tiles (16 cells) whose log2 range exceeds 60: one exponential per pixel there."""
    z = logits.float()
    least = ((z - z.amax(1, keepdim=True)) * math.log2(math.e)).amin(1)  # [N, h, w]
    least = torch.minimum(least, least.roll(-1, 2))
    rows = torch.minimum(least[:, :-1], least[:, 1:])
    tiles = F.pad(rows, (0, -rows.shape[2] % 16)).unflatten(2, (-1, 16)).amin(3)
    return (tiles < -60).double().mean().item()


def facts(case: Case) -> dict[str, float]:
    found = {"direct tiles": direct_share(case.inputs()[0])}
    if case.backward:
        found["gradient error, fused"] = gradient_error(case, "fused")
        found["gradient error, eager"] = gradient_error(case, "eager")
    return found


def check(case: Case) -> None:
    """Before anything is timed."""
    strict = case.dtype == torch.float32 and case.scale <= 3
    if case.backward:
        assert gradient_error(case, "fused") <= (5e-7 if strict else 5e-3)
    loss, expected = implementation("fused", case)()[0], implementation("eager", case)()[0]
    rtol = 1e-5 if case.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss.float(), expected.float(), rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["eager", "fused", *COMPILED])
def test_time(benchmark: Any, case: str, name: str) -> None:
    require_compiled("upsample_cross_entropy")
    torch.set_num_threads(COMPILED.get(name, 1))
    if name == "fused":
        check(CASES[case])
    time_case(benchmark, implementation(name, CASES[case]), case, name)


if __name__ == "__main__":
    main(
        __file__,
        [
            Mode("", ["eager", "fused"], list(CASES)),
            Mode("AVX2", ["eager", "fused"], MAIN[:1], {"FCNSEG_CPU_CAPABILITY": "avx2"}),
            Mode("eager with page-keeping malloc", ["eager"], MAIN, PAGE_KEEPING),
            Mode("torch.compile", list(COMPILED), MAIN),
        ],
        ["eager", "eager with page-keeping malloc", "torch.compile"],
        [*MAIN, "bfloat16", "reduction none", "forward only"],
    )
