"""The Triton kernels of the transposed convolution on a CUDA device, through public functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE
from oracles import eager_conv_transpose, labels, normal
from torch import Tensor

import fcnseg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
Case = tuple[list[Tensor], Tensor, dict[str, Any]]


def make_case(
    channels: int, classes: int, groups: int, h: int, w: int, stride: int, kernel: int,
    dtype: torch.dtype = torch.float32, batch: int = 2, **geometry: Any,
) -> Case:  # fmt: skip
    """Input, weight and bias; target; geometry. The target is all that the crop leaves."""
    geometry = {"stride": stride, "groups": groups, **geometry}
    crop = geometry.get("crop", (0, 0))
    shapes = ((batch, channels, h, w), (channels, classes // groups, kernel, kernel), (classes,))
    tensors = [normal(shape, dtype, seed).cuda() for seed, shape in enumerate(shapes)]
    dilation, padding = geometry.get("dilation", 1), geometry.get("padding", 0)
    size = [
        (n - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 - c
        for n, c in zip((h, w), crop, strict=True)
    ]
    return tensors, labels((batch, *size), min(classes, 255), ignore=255).cuda(), geometry


def evaluate(loss_of: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Loss and gradients, for an upstream gradient not 1."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    loss = loss_of(*leaves)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device, dtype=torch.float64)
    gradients = torch.autograd.grad(loss, leaves, upstream.view(loss.shape).to(loss.dtype))
    return [loss.detach(), *gradients]


def fused(case: Case, **options: Any) -> list[Tensor]:
    tensors, target, geometry = case
    return evaluate(
        lambda input, weight, bias: fcnseg.conv_transpose_cross_entropy(
            input, weight, target, bias, ignore_index=255, **geometry, **options
        ),
        tensors,
    )


def eager(case: Case, dtype: torch.dtype, class_weight: Tensor | None = None, **options: Any
          ) -> list[Tensor]:  # fmt: skip
    tensors, target, geometry = case
    weight = None if class_weight is None else class_weight.to(dtype)

    def loss_of(input: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        z = eager_conv_transpose(input, kernel, target.shape[1:], bias, **geometry)
        return F.cross_entropy(z, target, weight, ignore_index=255, **options)

    return evaluate(loss_of, [tensor.to(dtype) for tensor in tensors])


def check(case: Case, **options: Any) -> None:
    """error(fused) <= error(eager in float32) + the tolerance of the operands' dtype."""
    dtype = case[0][0].dtype
    exact, flat = eager(case, torch.float64, **options), eager(case, torch.float32, **options)
    for our, expected, their in zip(fused(case, **options), exact, flat, strict=True):
        scale = max(expected.abs().max().item(), 1e-6)
        allowed = (their.double() - expected).abs().max().item()
        allowed += TOLERANCE[torch.float32 if our.dim() == 0 else dtype] * scale
        assert (our.double() - expected).abs().max().item() <= allowed
    fcnseg.check_labels()


@pytest.fixture(autouse=True)
def _without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager convolutions in full float32: the stricter oracle."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


GEOMETRIES: dict[str, tuple[Any, ...]] = {
    "full": (19, 19, 1, 7, 9, 8, 16),
    "full, many channels": (130, 21, 1, 5, 6, 4, 8),
    "full, many classes": (40, 150, 1, 5, 6, 4, 8),
    "full, k = s": (19, 7, 1, 7, 9, 2, 2),
    "full, k = 3": (19, 7, 1, 7, 9, 2, 3),
    "grouped": (19, 19, 19, 7, 9, 8, 16),
    "grouped, wide stride": (21, 21, 21, 3, 4, 32, 64),
    "grouped, many classes": (150, 150, 150, 5, 6, 4, 8),
    "grouped, more classes than a block": (300, 300, 300, 3, 4, 2, 4),
    "grouped, k = 3": (19, 19, 19, 7, 9, 2, 3),
    "between": (12, 6, 3, 7, 9, 4, 8),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_values_and_gradients(name: str, reduction: str, dtype: torch.dtype) -> None:
    check(make_case(*GEOMETRIES[name], dtype), reduction=reduction)


@pytest.mark.parametrize("geometry", [
    {"padding": 2}, {"padding": 1, "crop": (3, 1)}, {"dilation": 2}, {"dilation": 3, "padding": 1},
])  # fmt: skip
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_geometry(reduction: str, groups: int, geometry: dict[str, Any]) -> None:
    for stride, kernel in ((1, 3), (2, 4), (3, 5), (4, 3)):
        check(make_case(6, 6, groups, 5, 6, stride, kernel, **geometry), reduction=reduction)


@pytest.mark.parametrize("name", ["full", "grouped", "between", "full, many classes"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_options(name: str, dtype: torch.dtype) -> None:
    case = make_case(*GEOMETRIES[name], dtype)
    weight = torch.linspace(0.5, 2, case[0][2].numel(), device="cuda")
    for reduction in ("mean", "none"):
        check(case, class_weight=weight, label_smoothing=0.1, reduction=reduction)


@pytest.mark.parametrize("name", ["full", "grouped"])
def test_channels_last_and_label_dtypes(name: str) -> None:
    tensors, target, geometry = make_case(*GEOMETRIES[name], torch.float16)
    tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    expected = fused((tensors, target, geometry))
    for dtype in (torch.uint8, torch.int32):
        results = fused((tensors, target.to(dtype).mT.contiguous().mT, geometry))
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["full", "full, k = 3", "grouped", "grouped, many classes"])
def test_bitwise_equal_over_20_runs(name: str, reduction: str) -> None:
    shape = list(GEOMETRIES[name])
    shape[3:5] = 48, 50
    case = make_case(*shape, torch.float16)
    torch.use_deterministic_algorithms(True)
    try:
        first = fused(case, reduction=reduction)
        for _ in range(20):
            again = fused(case, reduction=reduction)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["full", "full, k = 3", "grouped"])
def test_bad_labels_are_recorded(name: str) -> None:
    tensors, target, geometry = make_case(*GEOMETRIES[name])
    target[1, 3, 4] = 2**32 + 3
    assert all(result.isnan().all() for result in fused((tensors, target, geometry)))
    with pytest.raises(IndexError, match=r"4294967299 at position \(1, 3, 4\)"):
        fcnseg.check_labels()
    loss, to_input, _, to_bias = fused((tensors, target, geometry), reduction="none")
    assert loss.isnan().nonzero().tolist() == [[1, 3, 4]]
    assert not to_input[0].isnan().any()
    assert 0 < to_input[1].isnan().sum() <= 4 * 19
    assert to_bias.isnan().all()
    with pytest.raises(IndexError, match="holds 1 value "):
        fcnseg.check_labels()


@pytest.mark.parametrize("name", ["full", "grouped"])
def test_all_ignored_and_empty_batch(name: str) -> None:
    tensors, target, geometry = make_case(*GEOMETRIES[name])
    for batch in (2, 0):
        ignored = torch.full_like(target[:batch], 255)
        loss, *gradients = fused(([tensors[0][:batch], *tensors[1:]], ignored, geometry))
        assert math.isnan(loss.item())
        assert not any(gradient.nan_to_num().any() for gradient in gradients)


@pytest.mark.parametrize("name", ["full", "full, k = 3", "grouped"])
def test_no_synchronisation_and_no_large_memory(name: str) -> None:
    shape = list(GEOMETRIES[name])
    shape[3:5] = 64, 64
    case = make_case(*shape, torch.float16)
    fused(case)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = fused(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tensors, target, _ = case
    logits = 2 * target.numel() * tensors[2].numel()  # bytes of the logits in half precision
    used = torch.cuda.max_memory_allocated() - before
    weight = tensors[1].numel() * 4
    # planes and copies of the input; up to 64 splits of the weight's gradient, and its copies
    assert used <= 12 * 4 * tensors[0].numel() + 68 * weight * 3
    if name == "grouped":
        assert used <= logits / 2
    assert len(results) == 4


def test_opcheck() -> None:
    for name in ("full", "grouped", "full, k = 3"):
        (input, weight, bias), target, geometry = make_case(*GEOMETRIES[name])
        stride, groups = [geometry["stride"]] * 2, geometry["groups"]
        conv = (stride, [0, 0], [0, 0], groups, [1, 1], [0, 0])
        leaves = [tensor.requires_grad_() for tensor in (input, weight, bias)]
        for reduction in ("mean", "none"):
            args = (*leaves[:2], target, leaves[2], None, *conv, 255, reduction, 0.1, [True] * 3)
            torch.library.opcheck(torch.ops.fcnseg.conv_transpose_cross_entropy.default, args)
        args = (input.detach(), weight.detach(), bias.detach(), list(target.shape[1:]), *conv)
        torch.library.opcheck(torch.ops.fcnseg.conv_transpose_argmax.default, (*args, torch.int64))


@pytest.mark.parametrize("name", ["full", "grouped"])
def test_compile_keeps_one_node(name: str) -> None:
    tensors, target, geometry = make_case(*GEOMETRIES[name], torch.float16)
    compiled = torch.compile(fcnseg.conv_transpose_cross_entropy, fullgraph=True)
    results = evaluate(
        lambda input, weight, bias: compiled(
            input, weight, target, bias, ignore_index=255, **geometry
        ),
        tensors,
    )
    for ours, expected in zip(results, fused((tensors, target, geometry)), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["full", "full, k = 3", "grouped"])
def test_graph_capture_and_replay(name: str) -> None:
    case = make_case(*GEOMETRIES[name], torch.float16)
    tensors, target, geometry = case
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fused(case)
    torch.cuda.current_stream().wait_stream(stream)
    static = [tensor.clone().requires_grad_() for tensor in tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fcnseg.conv_transpose_cross_entropy(
            *static[:2], target, static[2], ignore_index=255, **geometry
        )
        gradients = torch.autograd.grad(loss, static)
    others = [torch.randn_like(tensor) for tensor in tensors]
    for tensor, other in zip(static, others, strict=True):
        tensor.data.copy_(other)
    graph.replay()
    leaves = [other.requires_grad_() for other in others]
    expected = fcnseg.conv_transpose_cross_entropy(
        *leaves[:2], target, leaves[2], ignore_index=255, **geometry
    )
    assert torch.equal(loss.detach(), expected.detach())
    for ours, other in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_argmax(name: str, dtype: torch.dtype) -> None:
    (input, weight, bias), target, geometry = make_case(*GEOMETRIES[name], dtype)
    size = tuple(target.shape[1:])
    z = eager_conv_transpose(input.double(), weight.double(), size, bias.double(), **geometry)
    label = fcnseg.conv_transpose_argmax(input, weight, size, bias, **geometry)
    picked = z.gather(1, label[:, None])[:, 0]
    assert (z.amax(1) - picked).max() <= 1e-5 * z.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 33])
def test_more_than_2_31_logits(groups: int) -> None:
    # 33 x 8192 x 8192 = 2.2e9 virtual logits; class 32 leads by 4 everywhere
    input = torch.ones(1, 33, 1024, 1024, device="cuda", dtype=torch.float16)
    weight = torch.zeros(33, 33 // groups, 8, 8, device="cuda", dtype=torch.float16)
    weight[32, -1] = 4
    target = torch.full((1, 8192, 8192), 32, device="cuda", dtype=torch.uint8)
    geometry = {"stride": 8, "groups": groups}
    label = fcnseg.conv_transpose_argmax(input, weight, (8192, 8192), dtype=torch.uint8, **geometry)
    assert (label == 32).all()
    weight.requires_grad_()
    loss = fcnseg.conv_transpose_cross_entropy(input, weight, target, **geometry)
    assert math.isclose(loss.item(), math.log(1 + 32 * math.exp(-4)), rel_tol=1e-5)
    (gradient,) = torch.autograd.grad(loss, weight)
    # 64 taps share the derivative of the leading logit
    own = gradient[32, -1].double()
    assert torch.allclose(own, torch.full_like(own, (1 / (1 + 32 * math.exp(-4)) - 1) / 64),
                          rtol=2e-3)  # fmt: skip


@pytest.mark.slow
def test_more_than_2_31_pixels() -> None:
    input = torch.zeros(1, 2, 1024, 1026, device="cuda", dtype=torch.float16)
    weight = torch.zeros(2, 1, 46, 46, device="cuda", dtype=torch.float16)
    weight[1] = 1
    input[:, 1] = 4
    target = torch.ones(1, 1024 * 46, 1026 * 46, device="cuda", dtype=torch.uint8)  # 2.2e9
    loss = fcnseg.conv_transpose_cross_entropy(input, weight, target, stride=46, groups=2)
    assert math.isclose(loss.item(), math.log(1 + math.exp(-4)), rel_tol=1e-5)
    target[0, -1, -1] = 7
    assert fcnseg.conv_transpose_cross_entropy(input, weight, target, stride=46, groups=2).isnan()
    with pytest.raises(IndexError, match=r"is 7 at position \(0, 47103, 47195\)"):
        fcnseg.check_labels()
