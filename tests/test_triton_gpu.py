"""The Triton kernels on a CUDA device, through the public functions: ``pytest -m gpu``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TOLERANCE
from kernel_cases import GEOMETRIES, LAYOUTS, Geometry, lay_out
from oracles import eager_loss, eager_upsample
from torch import Tensor

import fcnseg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def make_case(
    N: int, C: int, h: int, w: int, H: int, W: int, dtype: torch.dtype = torch.float32,
    spread: float = 2.0, labels: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(N, C, h, w, device="cuda", generator=generator) * spread
    target = torch.randint(0, min(C, 255), (N, H, W), device="cuda", generator=generator)
    target[torch.rand(N, H, W, device="cuda", generator=generator) < 0.1] = 255
    return logits.to(dtype), target.to(labels)


def evaluate(
    function: Callable[..., Tensor], logits: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient for an upstream gradient that is not 1."""
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, target, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = torch.randn(loss.shape, device="cuda", generator=generator) + 2
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
    return loss.detach(), gradient


def fused(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return evaluate(fcnseg.upsample_cross_entropy, logits, target, ignore_index=255, **options)


def check(logits: Tensor, target: Tensor, **options: Any) -> None:
    """error(fused) <= error(eager in float32, rounded) + tolerance, against float64."""
    options = {"ignore_index": 255, **options}
    weight = options.pop("weight", None)
    double = None if weight is None else weight.double()
    exact = evaluate(eager_loss, logits.double(), target, weight=double, **options)
    theirs = evaluate(eager_loss, logits.float(), target, weight=weight, **options)
    ours = evaluate(fcnseg.upsample_cross_entropy, logits, target, weight=weight, **options)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == logits.dtype
    for our, their, expected in zip(ours, theirs, exact, strict=True):
        assert our.shape == expected.shape
        scale = max(expected.abs().max().item(), 1e-6)
        error = (our.double() - expected).abs().max().item()
        their_error = (their.to(our.dtype).double() - expected).abs().max().item()
        assert error <= their_error + TOLERANCE[our.dtype] * scale
    fcnseg.check_labels()


def as_options(geometry: Geometry) -> dict[str, Any]:
    align_corners, scale_h, scale_w = geometry
    scale = None if scale_h is None else (scale_h, scale_w)
    return {"align_corners": align_corners, "scale_factor": scale}


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_values_and_gradients(dtype: torch.dtype, reduction: str, align_corners: bool) -> None:
    logits, target = make_case(2, 19, 12, 17, 96, 133, dtype)
    check(logits, target, reduction=reduction, align_corners=align_corners)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sizes", [(4, 19, 96, 96, 768, 768), (2, 150, 64, 64, 512, 512)])
def test_real_sizes(dtype: torch.dtype, channels_last: bool, sizes: tuple[int, ...]) -> None:
    logits, target = make_case(*sizes, dtype)
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    check(logits, target)
    check(logits, target, reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_options(reduction: str, label_smoothing: float, weighted: bool) -> None:
    logits, target = make_case(2, 21, 16, 12, 128, 96)
    weight = torch.rand(21, device="cuda") if weighted else None
    check(logits, target, weight=weight, reduction=reduction, label_smoothing=label_smoothing)


@pytest.mark.parametrize("num_classes", [1, 2, 21, 31, 32, 150, 171, 254, 255, 256, 1000])
def test_number_of_classes(num_classes: int) -> None:
    logits, target = make_case(1, num_classes, 6, 7, 48, 56)
    if num_classes == 256:
        target[target == 255] = 254
    check(logits, target)
    if num_classes in (1, 32, 1000):  # each of these compiles anew
        check(logits, target, weight=torch.rand(num_classes, device="cuda"), label_smoothing=0.1)
        check(logits, target, reduction="none")


def test_one_class_is_exactly_zero() -> None:
    logits, target = make_case(2, 1, 12, 12, 96, 96)
    loss, gradient = fused(logits, target, label_smoothing=0.3)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize(("sizes", "geometry"), GEOMETRIES)
def test_geometry(sizes: tuple[int, ...], geometry: Geometry) -> None:
    logits, target = make_case(3, 5, *sizes)
    check(logits, target, **as_options(geometry))
    check(logits, target, reduction="none", **as_options(geometry))


@pytest.mark.parametrize(
    "sizes",
    [(65, 129, 513, 1025), (32, 64, 1024, 2048), (40, 40, 160, 160), (97, 97, 769, 769)],
)
@pytest.mark.parametrize("align_corners", [False, True])
def test_geometry_of_networks(sizes: tuple[int, ...], align_corners: bool) -> None:
    check(*make_case(2, 19, *sizes), align_corners=align_corners)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strides(layout: str, reduction: str) -> None:
    check(*lay_out(layout, *make_case(2, 19, 12, 16, 96, 128)), reduction=reduction)


@pytest.mark.parametrize("labels", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [-100, 255, 3])
def test_targets(labels: torch.dtype, ignore_index: int) -> None:
    logits, target = make_case(2, 19, 12, 12, 96, 96)
    target[target == 255] = 3 if ignore_index == -100 else ignore_index
    check(logits, target.to(labels), ignore_index=ignore_index)


@pytest.mark.parametrize("spread", [8.0, 30.0, 100.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_large_spread(spread: float, reduction: str) -> None:
    check(*make_case(2, 19, 12, 16, 96, 128, spread=spread), reduction=reduction)


def test_all_ignored_and_empty_batch() -> None:
    logits, target = make_case(2, 5, 8, 8, 64, 64)
    target.fill_(255)
    for batch in (2, 0):
        for reduction, value in (("mean", math.nan), ("sum", 0.0)):
            loss, gradient = fused(logits[:batch], target[:batch], reduction=reduction)
            torch.testing.assert_close(loss.item(), value, equal_nan=True)
            assert gradient.shape == logits[:batch].shape
            # An upstream gradient times 0: eager's is 0, too.
            assert not gradient.any()
        loss, gradient = fused(logits[:batch], target[:batch], reduction="none")
        assert not loss.any()
        assert not gradient.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_logits(value: float) -> None:
    logits, target = make_case(1, 5, 12, 12, 96, 96)
    for position in ((0, 0), (1, 1), (1, 7), (11, 11)):
        logits[0, 1, position[0], position[1]] = value
        for reduction in ("mean", "none"):
            loss, gradient = fused(logits, target, reduction=reduction)
            expected = evaluate(eager_loss, logits, target, ignore_index=255, reduction=reduction)
            assert torch.equal(loss.isnan(), expected[0].isnan())
            assert torch.equal(gradient.isnan(), expected[1].isnan())


def test_float64() -> None:
    logits, target = make_case(1, 19, 12, 12, 96, 96)
    loss, gradient = fused(logits.double(), target)
    expected = evaluate(eager_loss, logits.double(), target, ignore_index=255)
    assert loss.dtype == gradient.dtype == torch.float64
    torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-9, atol=1e-15)


def test_backward_twice_agrees() -> None:
    logits, target = make_case(2, 19, 12, 12, 96, 96, torch.float16)
    logits.requires_grad_()
    loss = fcnseg.upsample_cross_entropy(logits, target, ignore_index=255) * 65536
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)
    assert first.isfinite().all()


# --- bad labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 5, 2**31, 2**32 + 3, -(2**63)])
def test_bad_label_of_a_scalar_loss(bad: int) -> None:
    logits, target = make_case(2, 5, 8, 8, 64, 64)
    target[1, 3, 4] = bad
    target[1, 60, 0] = -7
    for reduction in ("mean", "sum"):
        loss, gradient = fused(logits, target, reduction=reduction)
        assert loss.isnan()
        assert gradient.isnan().all()
        with pytest.raises(IndexError, match=rf"2 values.* {bad} at position \(1, 3, 4\)"):
            fcnseg.check_labels()
    target[1, 3, 4] = target[1, 60, 0] = 255
    check(logits, target)  # the context lives and the record is empty


def test_bad_label_of_pixel_losses() -> None:
    logits, target = make_case(2, 5, 8, 8, 64, 64)
    target[1, 30, 36] = 5  # between samples 3 and 4 downwards, 4 and 5 across
    loss, gradient = fused(logits, target, reduction="none")
    assert loss.isnan().nonzero().tolist() == [[1, 30, 36]]
    expected = torch.zeros_like(gradient, dtype=torch.bool)
    expected[1, :, 3:5, 4:6] = True
    assert torch.equal(gradient.isnan(), expected)
    with pytest.raises(IndexError, match=r"1 value .* 5 at position \(1, 30, 36\)"):
        fcnseg.check_labels()


def test_check_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = make_case(1, 5, 8, 8, 64, 64)
    fcnseg.upsample_cross_entropy(logits, target, ignore_index=255)
    monkeypatch.setenv("FCNSEG_CHECK_LABELS", "1")
    with (
        pytest.raises(RuntimeError, match="FCNSEG_CHECK_LABELS"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        fcnseg.upsample_cross_entropy(logits, target, ignore_index=255)
    target[0, 1, 2] = 9
    with pytest.raises(IndexError, match=r"9 at position \(0, 1, 2\)"):
        fcnseg.upsample_cross_entropy(logits, target, ignore_index=255)


# --- argmax and the confusion matrix --------------------------------------------------------------


def check_argmax(logits: Tensor, size: tuple[int, int], **options: Any) -> None:
    label = fcnseg.upsample_argmax(logits, size, **options)
    z = eager_upsample(logits.double(), size, **options)
    picked = z.gather(1, label[:, None])[:, 0]
    assert (z.amax(1) - picked).max() <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(2, 19, 16, 17, 128, 136), (1, 19, 128, 256, 1024, 2048)])
def test_argmax(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    logits, target = make_case(*sizes, dtype)
    check_argmax(logits, (target.shape[1], target.shape[2]))


@pytest.mark.parametrize(("sizes", "geometry"), GEOMETRIES)
def test_argmax_geometry(sizes: tuple[int, int, int, int], geometry: Geometry) -> None:
    logits, _ = make_case(2, 5, *sizes)
    check_argmax(logits, sizes[2:], **as_options(geometry))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_argmax_of_ties(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 2, 9, 9, device="cuda").repeat(1, 3, 1, 1)
    label = fcnseg.upsample_argmax(logits, (72, 63), dtype=dtype)
    assert label.dtype == dtype
    assert label.max() <= 1


@pytest.mark.parametrize("num_classes", [2, 5, 19, 31, 32, 150])
@pytest.mark.parametrize("labels", [torch.uint8, torch.int64])
def test_confusion_matrix(num_classes: int, labels: torch.dtype) -> None:
    logits, target = make_case(2, num_classes, 16, 17, 128, 136, labels=labels)
    prediction = fcnseg.upsample_argmax(logits, (128, 136))
    expected = fcnseg.confusion_matrix(prediction, target, num_classes, ignore_index=255)
    assert torch.equal(fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255), expected)
    matrix = torch.ones(num_classes, num_classes, dtype=torch.int64, device="cuda").t()
    fcnseg.upsample_confusion_matrix_(matrix, logits, target, ignore_index=255)
    assert torch.equal(matrix, expected + 1)


def test_confusion_matrix_counts_bad_labels() -> None:
    logits, target = make_case(2, 19, 16, 17, 128, 136)
    target[1, 2, 3] = 19
    matrix = fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255)
    assert matrix.sum() == (target != 255).sum() - 1
    with pytest.raises(IndexError, match=r"19 at position \(1, 2, 3\)"):
        fcnseg.check_labels()


# --- determinism, dispatch, graphs, size ----------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("sizes", [(4, 19, 48, 48, 384, 384), (16, 19, 96, 96, 768, 768)])
def test_bitwise_equal_over_20_runs(reduction: str, sizes: tuple[int, ...]) -> None:
    logits, target = make_case(*sizes)
    torch.use_deterministic_algorithms(True)
    try:
        first = fused(logits, target, reduction=reduction)
        for _ in range(20):
            again = fused(logits, target, reduction=reduction)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first[1].isfinite().all()  # that mode fills new tensors with NaN


@pytest.mark.parametrize("num_classes", [19, 150])
def test_no_synchronisation(num_classes: int) -> None:
    logits, target = make_case(2, num_classes, 12, 12, 96, 96)
    leaf = logits.detach().requires_grad_()
    upstream = torch.ones(2, 96, 96, device="cuda")
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device="cuda")

    def run() -> None:
        for reduction, gradient in (("mean", upstream[0, 0, 0]), ("none", upstream)):
            loss = fcnseg.upsample_cross_entropy(leaf, target, ignore_index=255,
                                                 reduction=reduction)  # fmt: skip
            torch.autograd.grad(loss, leaf, gradient)
        fcnseg.upsample_argmax(logits, (96, 96))
        fcnseg.upsample_confusion_matrix_(matrix, logits, target, ignore_index=255)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_a_hundredth_of_eager() -> None:
    logits, target = make_case(16, 19, 96, 96, 768, 768)

    def peak(function: Callable[..., Tensor]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        leaf = logits.detach().requires_grad_()
        function(leaf, target, ignore_index=255).backward()
        return torch.cuda.max_memory_allocated() - before

    peak(fcnseg.upsample_cross_entropy)  # compiles
    # The sums, 1 / 64 of a plane, what is staged beside them, and for half logits the gradient.
    assert peak(fcnseg.upsample_cross_entropy) <= 0.01 * peak(eager_loss)


def test_opcheck() -> None:
    logits, target = make_case(2, 5, 8, 8, 64, 64)
    leaf = logits.detach().requires_grad_()
    for reduction in ("mean", "none"):
        args = (leaf, target, None, 255, reduction, 0.1, False, None, None, True)
        torch.library.opcheck(torch.ops.fcnseg.upsample_cross_entropy.default, args)
    torch.library.opcheck(
        torch.ops.fcnseg.upsample_argmax.default,
        (logits, [64, 64], False, None, None, torch.int64),
    )
    matrix = torch.zeros(5, 5, dtype=torch.int64, device="cuda")
    torch.library.opcheck(
        torch.ops.fcnseg.upsample_confusion_matrix_.default,
        (matrix, logits, target, 255, False, None, None, None),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_keeps_one_node(reduction: str) -> None:
    logits, target = make_case(2, 19, 12, 12, 96, 96)
    options = {"ignore_index": 255, "reduction": reduction}
    compiled = torch.compile(fcnseg.upsample_cross_entropy, fullgraph=True)
    expected = evaluate(fcnseg.upsample_cross_entropy, logits, target, **options)
    actual = evaluate(compiled, logits, target, **options)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-6, atol=0)
    argmax = torch.compile(fcnseg.upsample_argmax, fullgraph=True)
    assert torch.equal(argmax(logits, (96, 96)), fcnseg.upsample_argmax(logits, (96, 96)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_graph_capture_and_replay(reduction: str) -> None:
    logits, target = make_case(2, 19, 12, 12, 96, 96)
    static = logits.clone().requires_grad_()
    upstream = torch.randn((2, 96, 96) if reduction == "none" else (), device="cuda")
    matrix = torch.zeros(19, 19, dtype=torch.int64, device="cuda")

    def step() -> tuple[Tensor, Tensor, Tensor]:
        loss = fcnseg.upsample_cross_entropy(static, target, ignore_index=255, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, static, upstream)
        label = fcnseg.upsample_argmax(static.detach(), (96, 96))
        fcnseg.upsample_confusion_matrix_(matrix, static.detach(), target, ignore_index=255)
        return loss.detach(), gradient, label

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    static.data.copy_(torch.randn_like(logits))
    matrix.zero_()
    graph.replay()
    replayed = [tensor.clone() for tensor in (*captured, matrix)]
    matrix.zero_()
    for actual, expected in zip(replayed, (*step(), matrix), strict=True):
        assert torch.equal(actual, expected)


def test_current_device_is_the_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    logits, target = make_case(2, 19, 12, 12, 96, 96)
    expected = fused(logits, target)
    leaf = logits.to("cuda:1").requires_grad_()
    loss = fcnseg.upsample_cross_entropy(leaf, target.to("cuda:1"), ignore_index=255)
    assert torch.equal(loss.detach().to("cuda:0"), expected[0])


@pytest.mark.slow
def test_more_than_2_31_logits() -> None:
    logits = torch.zeros(1, 33, 8192, 8192, device="cuda", dtype=torch.float16)  # 2.2e9
    logits[:, 32] = 4
    target = torch.full((1, 8192, 8192), 32, device="cuda", dtype=torch.uint8)
    label = fcnseg.upsample_argmax(logits, (8192, 8192), dtype=torch.uint8)
    assert (label == 32).all()
    loss, gradient = fused(logits, target, reduction="sum")
    partition = 32 + math.exp(4)
    assert math.isclose(loss.item(), 8192**2 * math.log(partition / math.exp(4)), rel_tol=1e-5)
    upstream = gradient[0, 0, 0, 0].item() * partition
    assert 0.1 < abs(upstream) < 10
    for c, p in ((0, 1 / partition), (31, 1 / partition), (32, -32 / partition)):
        plane = gradient[0, c].float()
        torch.testing.assert_close(plane, torch.full_like(plane, upstream * p), rtol=2e-3, atol=0)


@pytest.mark.slow
def test_more_than_2_31_pixels() -> None:
    side = 46400
    logits = torch.zeros(1, 2, 64, 64, device="cuda")
    target = torch.zeros(1, side, side, device="cuda", dtype=torch.uint8)
    target[0, -1, -1] = 255
    loss, gradient = fused(logits, target)
    assert math.isclose(loss.item(), math.log(2), rel_tol=1e-5)
    torch.testing.assert_close(gradient[:, 0], -gradient[:, 1], rtol=1e-4, atol=0)
    assert (gradient[:, 1] != 0).all()
    target[0, -1, -1] = 7
    loss, _ = fused(logits, target)
    assert loss.isnan()
    with pytest.raises(IndexError, match=rf"7 at position \(0, {side - 1}, {side - 1}\)"):
        fcnseg.check_labels()
    target[0, -1, -1] = 1
    matrix = fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255)
    assert matrix.tolist() == [[side * side - 1, 0], [1, 0]]
