"""conv_transpose_cross_entropy against F.conv_transpose2d + F.cross_entropy.

python benchmarks/bench_conv_transpose_cross_entropy.py [--cases CASE ...]     (see harness.py)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from clocks import device, time_case
from harness import PAGE_KEEPING, Mode, require_compiled
from torch import Tensor
from workers import main

import fcnseg


@dataclass(frozen=True)
class Case(harness.Case):
    """Kernels of twice the stride; ``grouped``: every class from its own channel, else from all."""

    grouped: bool = True

    def tiny(self) -> Case:
        return dataclasses.replace(self, shape=(1, 2, 4, 4), size=(8, 8))

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input, kernel, bias and target; the logits are as large as the input."""
        input, target = self.inputs()
        C, edge = self.shape[1], 2 * self.stride
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(C, 1 if self.grouped else C, edge, edge, generator=generator)
        weight = weight / (4 * weight.shape[1]) ** 0.5
        bias = torch.randn(C, generator=generator)
        weight, bias = (x.to(input.device, self.dtype) for x in (weight, bias))
        return input, weight, bias, target

    @property
    def stride(self) -> int:
        return self.size[0] // self.shape[2]

    @property
    def geometry(self) -> dict[str, int]:
        groups = self.shape[1] if self.grouped else 1
        return {"stride": self.stride, "padding": self.stride // 2, "groups": groups}


STANDARD = ((2, 19, 64, 128), (512, 1024))
CASES = {
    "grouped, 19 classes": Case(*STANDARD),
    "full, 19 classes": Case(*STANDARD, grouped=False),
    "full, 150 classes": Case((2, 150, 64, 64), (512, 512), grouped=False),
    "grouped, 150 classes": Case((2, 150, 64, 64), (512, 512)),
    "grouped, stride 2": Case((2, 19, 256, 512), (512, 1024)),
    "grouped, stride 16": Case((2, 19, 32, 64), (512, 1024)),
    "grouped, stride 32": Case((2, 19, 16, 32), (512, 1024)),
    "full, 21 classes, stride 32": Case((2, 21, 16, 16), (512, 512), grouped=False),
    "grouped, channels_last": Case(*STANDARD, channels_last=True),
    "grouped, bfloat16": Case(*STANDARD, dtype=torch.bfloat16),
    "grouped, reduction none": Case(*STANDARD, reduction="none"),
    "grouped, forward only": Case(*STANDARD, backward=False),
}
CUDA_CASES = {
    "grouped, fp16": Case(*STANDARD, dtype=torch.float16),
    "full, fp16": Case(*STANDARD, dtype=torch.float16, grouped=False),
    "grouped, fp32": Case(*STANDARD),
    "full, fp32": Case(*STANDARD, grouped=False),
    "full, 150 classes, fp16": Case(
        (2, 150, 64, 64), (512, 512), dtype=torch.float16, grouped=False
    ),
}
MAIN = list(CASES)[:3]
SUMMARY = list(CASES)[:2]
MODES = [
    Mode("", ["eager", "compile", "fused"], list(CASES)),
    Mode("AVX2", ["eager", "fused"], MAIN[:2], {"FCNSEG_CPU_CAPABILITY": "avx2"}),
    Mode("eager with page-keeping malloc", ["eager"], MAIN[:2], PAGE_KEEPING),
]
MEMORY_CASES = list(CASES)
#: Error allowed beyond that of eager in float32, rounded.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def eager_loss(
    input: Tensor, weight: Tensor, bias: Tensor, target: Tensor, reduction: str, **geometry: int
) -> Tensor:
    z = F.conv_transpose2d(input, weight, bias, **geometry)
    return F.cross_entropy(z, target.long(), ignore_index=255, reduction=reduction)


def fused_loss(
    input: Tensor, weight: Tensor, bias: Tensor, target: Tensor, reduction: str, **geometry: int
) -> Tensor:
    return fcnseg.conv_transpose_cross_entropy(
        input, weight, target, bias, ignore_index=255, reduction=reduction, **geometry
    )


def step_of(
    loss: Callable[..., Tensor], case: Case, operands: tuple[Tensor, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    """The loss, and (unless forward only) the gradients of input, kernel and bias."""
    *leaves, target = operands
    for leaf in leaves:
        leaf.requires_grad_(case.backward)
    upstream = None
    if case.reduction == "none":
        upstream = torch.rand(target.shape, generator=torch.Generator().manual_seed(2))
        upstream = upstream.to(target.device)

    def step() -> tuple[Tensor, ...]:
        value = loss(*leaves, target, case.reduction, **case.geometry)
        if not case.backward:
            return (value,)
        seed = None if upstream is None else upstream.to(value.dtype)
        return value.detach(), *torch.autograd.grad(value, leaves, seed)

    return step


def implementation(name: str, case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """One step."""
    loss = fused_loss if name == "fused" else eager_loss
    if name == "compile":
        torch._dynamo.reset()
        loss = torch.compile(eager_loss, dynamic=False)
    return step_of(loss, case, case.operands())


@functools.lru_cache(maxsize=1)
def errors(case: Case) -> dict[str, list[float]]:
    """Of loss and gradients, relative, against float64 on the same operands.

    "eager" is eager in float32, its gradients rounded once to the operands' dtype: in half, its
    sums over more than 65504 pixels are infinite.
    """
    *operands, target = case.operands()
    exact = step_of(eager_loss, case, (*(x.double() for x in operands), target))()
    loss, *gradients = step_of(eager_loss, case, (*(x.float() for x in operands), target))()
    found = {
        "fused": implementation("fused", case)(),
        "eager": (loss, *(gradient.to(case.dtype) for gradient in gradients)),
    }
    return {
        name: [
            ((ours.double() - expected).norm() / expected.norm()).item()
            for ours, expected in zip(each, exact, strict=True)
        ]
        for name, each in found.items()
    }


def facts(case: Case) -> dict[str, float]:
    parts = ["loss", *(["input", "weight", "bias"] if case.backward else [])]
    return {
        f"error of {part}, {name}": error
        for name, found in errors(case).items()
        for part, error in zip(parts, found, strict=True)
    }


def check(case: Case) -> None:
    """Before anything is timed."""
    found = errors(case)
    for ours, theirs in zip(found["fused"], found["eager"], strict=True):
        assert ours <= theirs + TOLERANCE[case.dtype], found


def split_products(case: Case, products: int, others: int) -> tuple[int, int]:
    """Operations and products: tensor cores may do the products of all channels in 16 bits.

    Where lanes do them, ``others``, what is done for the softmax or the maximum, is left out: they
    are few, and partly done while the products are waited for.
    """
    if device() == "cuda" and not case.grouped and case.dtype.itemsize == 2:
        return others, products
    return products, 0


def work(case: Case) -> Any:
    """A multiply-add per pixel, class, tap and channel: for the logits and for two gradients."""
    (N, C, h, w), (H, W) = case.shape, case.size
    samples, pixels = N * C * h * w * case.dtype.itemsize, N * H * W
    weights = C * (1 if case.grouped else C) * (2 * case.stride) ** 2 * case.dtype.itemsize
    labels = case.labels.itemsize * pixels
    none, passes = case.reduction == "none", 3 if case.backward else 1
    products = pixels * C * 4 * (1 if case.grouped else C) * passes
    operations, products = split_products(case, products, 4 * pixels * C)
    return harness.Work(
        read=samples + weights + labels + (4 * pixels if none and case.backward else 0),
        written=(samples + weights if case.backward else 0) + (4 * pixels if none else 4),
        operations=operations,
        products=products,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["eager", "compile", "fused"])
def test_time(benchmark: Any, case: str, name: str) -> None:
    require_compiled("conv_transpose_cross_entropy")
    torch.set_num_threads(2)
    if name == "fused":
        check(CASES[case])
    time_case(benchmark, implementation(name, CASES[case]), case, name)


if __name__ == "__main__":
    main(__file__)
