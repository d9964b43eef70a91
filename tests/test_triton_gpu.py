"""The Triton kernels on a CUDA device, through the public functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fcnseg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def make_case(
    N: int, C: int, h: int, w: int, H: int, W: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(N, C, h, w, device="cuda", generator=generator) * 3
    target = torch.randint(0, min(C, 255), (N, H, W), device="cuda", generator=generator)
    target[torch.rand(N, H, W, device="cuda", generator=generator) < 0.1] = 255
    return logits.to(dtype).requires_grad_(), target


def eager(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    align_corners = options.pop("align_corners", False)
    logits = logits.detach().clone().requires_grad_()
    z = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=align_corners)
    loss = F.cross_entropy(z, target, ignore_index=255, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).view(loss.shape)
    (loss * weights.to(loss.dtype)).sum().backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def fused(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss = fcnseg.upsample_cross_entropy(logits, target, ignore_index=255, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).view(loss.shape)
    (loss * weights).sum().backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def check(logits: Tensor, target: Tensor, **options: Any) -> None:
    weight = options.pop("weight", None)
    wide = eager(logits.double(), target, weight=None if weight is None else weight.double(),
                 **options)  # fmt: skip
    flat = eager(logits.float(), target, weight=weight, **options)
    for actual, expected, other in zip(
        fused(logits, target, weight=weight, **options), wide, flat, strict=True
    ):
        scale = max(expected.abs().max().item(), 1e-3)
        allowed = (other.to(actual.dtype).double() - expected).abs().max().item() + 3e-6 * scale
        assert (actual.double() - expected).abs().max().item() <= allowed
    fcnseg.check_labels()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_values_and_gradients(dtype: torch.dtype, reduction: str, align_corners: bool) -> None:
    logits, target = make_case(2, 19, 12, 17, 96, 133, dtype)
    check(logits, target, reduction=reduction, align_corners=align_corners)


@pytest.mark.parametrize("num_classes", [1, 2, 21, 150, 171, 254, 255, 1000])
def test_number_of_classes(num_classes: int) -> None:
    logits, target = make_case(1, num_classes, 6, 7, 48, 56)
    target[target >= num_classes] = 255
    weight = torch.rand(num_classes, device="cuda")
    check(logits, target)
    check(logits, target, weight=weight, label_smoothing=0.1)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 9, 11), (7, 9, 7, 9), (9, 11, 4, 3), (2, 2, 64, 130), (40, 40, 160, 160)]
)
def test_geometry(sizes: tuple[int, int, int, int]) -> None:
    check(*make_case(3, 5, *sizes))


def test_channels_last_and_large_spread() -> None:
    logits, target = make_case(2, 19, 12, 16, 96, 128)
    check(logits.detach().to(memory_format=torch.channels_last), target)
    check(logits.detach() * 30, target)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bitwise_equal_over_20_runs(reduction: str) -> None:
    logits, target = make_case(4, 19, 48, 48, 384, 384)
    torch.use_deterministic_algorithms(True)
    try:
        first = fused(logits, target, reduction=reduction)
        for _ in range(20):
            again = fused(logits, target, reduction=reduction)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_bad_labels_are_recorded() -> None:
    logits, target = make_case(2, 5, 8, 8, 64, 64)
    target[1, 3, 4] = 2**32 + 3
    loss, gradient = fused(logits, target)
    assert loss.isnan()
    assert gradient.isnan().all()
    with pytest.raises(IndexError, match=r"4294967299 at position \(1, 3, 4\)"):
        fcnseg.check_labels()
    loss, gradient = fused(logits, target, reduction="none")
    assert loss.isnan().sum() == 1
    assert 0 < gradient.isnan().sum() <= 4 * 5
    with pytest.raises(IndexError):
        fcnseg.check_labels()


def test_all_ignored_and_empty_batch() -> None:
    logits, target = make_case(2, 5, 8, 8, 64, 64)
    for batch in (2, 0):
        loss, gradient = fused(logits[:batch], torch.full_like(target[:batch], 255))
        assert math.isnan(loss.item())
        assert not gradient.nan_to_num().any()


def test_opcheck() -> None:
    logits, target = make_case(2, 5, 8, 8, 64, 64)
    for reduction in ("mean", "none"):
        args = (logits, target, None, 255, reduction, 0.1, False, None, None, True)
        torch.library.opcheck(torch.ops.fcnseg.upsample_cross_entropy.default, args)
    torch.library.opcheck(
        torch.ops.fcnseg.upsample_argmax.default,
        (logits.detach(), [64, 64], False, None, None, torch.int64),
    )
    matrix = torch.zeros(5, 5, dtype=torch.int64, device="cuda")
    torch.library.opcheck(
        torch.ops.fcnseg.upsample_confusion_matrix_.default,
        (matrix, logits.detach(), target, 255, False, None, None, None),
    )


def test_compile_keeps_one_node() -> None:
    logits, target = make_case(2, 19, 12, 12, 96, 96)
    compiled = torch.compile(fcnseg.upsample_cross_entropy, fullgraph=True)
    loss = compiled(logits, target, ignore_index=255)
    loss.backward()
    expected = fused(logits, target)
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(logits.grad, expected[1])


def test_graph_capture_and_replay() -> None:
    logits, target = make_case(2, 19, 12, 12, 96, 96)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fused(logits, target)
    torch.cuda.current_stream().wait_stream(stream)
    static = logits.detach().clone().requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fcnseg.upsample_cross_entropy(static, target, ignore_index=255)
        (gradient,) = torch.autograd.grad(loss, static)
    other = torch.randn_like(static)
    static.data.copy_(other)
    graph.replay()
    expected = fused(other, target)
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.slow
def test_more_than_2_31_elements() -> None:
    logits = torch.zeros(1, 33, 8192, 8192, device="cuda", dtype=torch.float16)  # 2.2e9
    logits[:, 32] = 4
    target = torch.full((1, 8192, 8192), 32, device="cuda", dtype=torch.uint8)
    label = fcnseg.upsample_argmax(logits, (8192, 8192), dtype=torch.uint8)
    assert (label == 32).all()
    loss = fcnseg.upsample_cross_entropy(logits, target)
    assert math.isclose(loss.item(), math.log(1 + 32 * math.exp(-4)), rel_tol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax(dtype: torch.dtype) -> None:
    logits, _ = make_case(2, 19, 16, 17, 128, 136, dtype)
    logits = logits.detach()
    z = F.interpolate(logits.double(), (128, 136), mode="bilinear")
    label = fcnseg.upsample_argmax(logits, (128, 136))
    picked = z.gather(1, label[:, None])[:, 0]
    assert (z.amax(1) - picked).max() <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("num_classes", [5, 19, 150])
def test_confusion_matrix(num_classes: int) -> None:
    logits, target = make_case(2, num_classes, 16, 17, 128, 136)
    logits = logits.detach()
    label = fcnseg.upsample_argmax(logits, (128, 136))
    target[(target >= num_classes) & (target != 255)] = 255
    expected = fcnseg.confusion_matrix(label, target, num_classes, ignore_index=255)
    actual = fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255)
    assert torch.equal(actual, expected)
