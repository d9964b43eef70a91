"""upsample_cross_entropy against F.interpolate + F.cross_entropy, eager and compiled.

python benchmarks/bench_upsample_cross_entropy.py [--cases CASE ...]     (see harness.py)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clocks import device, time_case
from harness import PAGE_KEEPING, Case, Mode, Unavailable, Work, require_compiled
from torch import Tensor
from workers import main

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
SUMMARY = ["19 classes", "19 classes, channels_last", "150 classes", "bfloat16", "reduction none"]
LARGE = ((16, 19, 96, 96), (768, 768))
HALF = Case(*LARGE, dtype=torch.float16)
CUDA_CASES = {
    "16x19x96x96 to 768x768, fp16": HALF,
    "8x150x64x64 to 512x512, fp16": Case((8, 150, 64, 64), (512, 512), dtype=torch.float16),
    "16x19x96x96, fp16, reduction none": dataclasses.replace(HALF, reduction="none"),
    "16x19x96x96, fp16, logits x10": dataclasses.replace(HALF, scale=30.0),
    "16x19x96x96, fp16, uint8 targets": dataclasses.replace(HALF, labels=torch.uint8),
    "16x19x96x96 to 768x768, fp32": Case(*LARGE),
    "8x150x64x64 to 512x512, fp32": Case((8, 150, 64, 64), (512, 512)),
    "16x19x96x96, fp16, channels_last": dataclasses.replace(HALF, channels_last=True),
    "16x19x96x96, fp16, noise targets": dataclasses.replace(HALF, noise=True),
}
MODES = [
    Mode("", ["eager", "compile", "fused", "liger"], list(CASES)),
    Mode("AVX2", ["eager", "fused"], MAIN[:1], {"FCNSEG_CPU_CAPABILITY": "avx2"}),
    Mode("eager with page-keeping malloc", ["eager"], MAIN, PAGE_KEEPING),
]
MEMORY_CASES = [*MAIN, "bfloat16", "reduction none", "forward only"]
#: Relative errors allowed beyond those of rounded_eager.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LOSS_TOLERANCE = 1e-5


def eager_loss(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    z = F.interpolate(logits, target.shape[1:], mode="bilinear")
    return F.cross_entropy(z, target.long(), ignore_index=255, reduction=reduction)


def fused_loss(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    return fcnseg.upsample_cross_entropy(logits, target, ignore_index=255, reduction=reduction)


def liger_loss(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Liger's kernel wants [pixels, C]: full-resolution logits, permuted."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    z = F.interpolate(logits, target.shape[1:], mode="bilinear")
    z = z.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
    return LigerCrossEntropyLoss(ignore_index=255, reduction=reduction)(z, target.long().flatten())


Step = Callable[[], tuple[Tensor, Tensor | None]]


def step_of(loss: Callable[..., Tensor], case: Case, logits: Tensor, target: Tensor) -> Step:
    """The loss, and (unless forward only) the gradient; of a loss per pixel for random weights."""
    logits.requires_grad_(case.backward)
    upstream = None
    if case.reduction == "none":
        generator = torch.Generator(target.device).manual_seed(1)
        upstream = torch.rand(target.shape, generator=generator, device=target.device)

    def step() -> tuple[Tensor, Tensor | None]:
        value = loss(logits, target, case.reduction)
        if not case.backward:
            return value, None
        weights = None if upstream is None else upstream.to(value.dtype)
        (gradient,) = torch.autograd.grad(value, logits, weights)
        return value.detach(), gradient

    return step


def implementation(name: str, case: Case) -> Step:
    """One step: the loss, and (unless forward only) the gradient."""
    loss: Callable[..., Tensor] = fused_loss if name == "fused" else eager_loss
    if name == "compile":
        torch._dynamo.reset()
        loss = torch.compile(eager_loss, dynamic=False)
    if name == "liger":
        if find_spec("liger_kernel") is None:
            raise Unavailable("needs liger_kernel")
        if device() == "cpu" or case.reduction == "none":
            raise Unavailable("CUDA and a scalar loss only")
        loss = liger_loss
    return step_of(loss, case, *case.inputs())


@functools.lru_cache(maxsize=1)
def exact(case: Case) -> tuple[Tensor, Tensor | None]:
    """Loss and gradient in float64, of the same logits."""
    logits, target = case.inputs()
    return step_of(eager_loss, case, logits.double(), target)()


def rounded_eager(case: Case) -> tuple[Tensor, Tensor | None]:
    """Eager in float32, its gradient rounded once to the logits' dtype.

    In half, eager's sums over more than 65504 pixels are infinite: it is timed, but no measure.
    """
    logits, target = case.inputs()
    loss, gradient = step_of(eager_loss, case, logits.float(), target)()
    return loss, None if gradient is None else gradient.to(case.dtype)


@functools.lru_cache(maxsize=2)
def errors(case: Case, name: str) -> dict[str, float]:
    """Of loss and gradient, relative, against float64; ``name``: "fused" or "eager"."""
    ours = implementation("fused", case)() if name == "fused" else rounded_eager(case)
    return {
        part: ((found.double() - expected).norm() / expected.norm()).item()
        for part, found, expected in zip(("loss", "gradient"), ours, exact(case), strict=True)
        if found is not None and expected is not None
    }


def work(case: Case) -> Work:
    """Four vector operations per pixel and class: two in the sum over classes (add, next power),
    two in the gradient (Horner's rule for a value and a slope)."""
    (N, C, h, w), (H, W) = case.shape, case.size
    samples, pixels = N * C * h * w * case.dtype.itemsize, N * H * W
    labels, none = case.labels.itemsize * pixels, case.reduction == "none"
    return Work(
        read=samples + labels + (4 * pixels if none and case.backward else 0),
        written=(samples if case.backward else 0) + (4 * pixels if none else 4),
        operations=pixels * C * (4 if case.backward else 2),
    )


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
    for name in ("fused", "eager"):
        found |= {f"{part} error, {name}": error for part, error in errors(case, name).items()}
    return found


def check(case: Case) -> None:
    """Before anything is timed."""
    ours, theirs = errors(case, "fused"), errors(case, "eager")
    assert ours["loss"] <= theirs["loss"] + LOSS_TOLERANCE, (ours, theirs)
    if case.backward:
        assert ours["gradient"] <= theirs["gradient"] + TOLERANCE[case.dtype], (ours, theirs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["eager", "compile", "fused"])
def test_time(benchmark: Any, case: str, name: str) -> None:
    require_compiled("upsample_cross_entropy")
    torch.set_num_threads(1)
    if name == "fused":
        check(CASES[case])
    time_case(benchmark, implementation(name, CASES[case]), case, name)


if __name__ == "__main__":
    main(__file__)
