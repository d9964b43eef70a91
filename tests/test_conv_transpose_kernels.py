"""The compiled transposed-convolution kernels: geometries, tiles, ranges, threads, memory, sizes.

``test_cpu_kernels.py`` runs this file again on each of the other instruction sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import eager_conv_transpose, evaluate, labels, normal
from test_argmax import assert_labels
from test_conv_transpose_cross_entropy import check
from test_cpu_kernels import DTYPES, LAYOUTS, REDUCTIONS, block_labels, relative_error, run
from torch import Tensor

import fcnseg

pytestmark = pytest.mark.skipif(
    fcnseg.build_info()["operators"]["conv_transpose_cross_entropy"]["cpu"] != "c++",
    reason="the compiled CPU operators are missing",
)


def full_size(
    input: Sequence[int], kernel: Sequence[int], geometry: dict[str, Any]
) -> tuple[int, int]:
    """Height and width of the transposed convolution's output."""
    with torch.device("meta"):
        z = F.conv_transpose2d(torch.empty(*input), torch.empty(*kernel), **geometry)
    return z.shape[2], z.shape[3]


def check_argmax(
    input: Tensor, weight: Tensor, size: tuple[int, int], bias: Tensor, **geometry: Any
) -> None:
    z = eager_conv_transpose(input.double(), weight.double(), size, bias.double(), **geometry)
    result = fcnseg.conv_transpose_argmax(input, weight, size, bias, **geometry)
    assert_labels(result, z, max(z.abs().max().item(), input.abs().max().item()))


def check_both(input: Tensor, weight: Tensor, geometry: dict[str, Any], **options: Any) -> None:
    """Loss, all gradients and labels, on the whole output."""
    classes = weight.shape[1] * geometry.get("groups", 1)
    size = full_size(input.shape, weight.shape, geometry)
    bias = normal((classes,), input.dtype, 2)
    target = labels((len(input), *size), classes, ignore=255)
    check([input, weight, bias], target, geometry, ignore_index=255, **options)
    check_argmax(input, weight, size, bias, **geometry)


# input, kernel, geometry
GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "grouped 4 / 2": ((2, 5, 4, 9), (5, 1, 4, 4), {"stride": 2, "padding": 1, "groups": 5}),
    "grouped 16 / 8": ((1, 19, 5, 17), (19, 1, 16, 16), {"stride": 8, "padding": 4, "groups": 19}),
    "grouped 64 / 32": ((1, 3, 2, 3), (3, 1, 64, 64), {"stride": 32, "padding": 16, "groups": 3}),
    "grouped 3 / 1": ((1, 4, 5, 18), (4, 1, 3, 3), {"padding": 1, "groups": 4}),
    "grouped 2 / 2": ((1, 4, 5, 7), (4, 1, 2, 2), {"stride": 2, "groups": 4}),
    "grouped 5 / 3": ((1, 3, 5, 7), (3, 1, 5, 5), {"stride": 3, "padding": 2, "groups": 3}),
    "grouped, dilated": ((1, 3, 5, 7), (3, 1, 4, 3), {"stride": 2, "dilation": 3, "groups": 3}),
    "grouped, far apart": ((1, 3, 3, 3), (3, 1, 2, 2), {"stride": 5, "groups": 3}),
    "full 4 / 2": ((2, 5, 4, 9), (5, 7, 4, 4), {"stride": 2, "padding": 1}),
    "full 16 / 8": ((1, 19, 3, 17), (19, 19, 16, 16), {"stride": 8, "padding": 4}),
    "full 3 / 1": ((1, 3, 5, 18), (3, 6, 3, 3), {"padding": 1}),
    "full 5 / 3": (
        (1, 4, 5, 7), (4, 2, 5, 5), {"stride": 3, "padding": 2, "output_padding": 1}
    ),
    "full, dilated": ((1, 3, 6, 7), (3, 4, 3, 3), {"stride": (1, 2), "dilation": 2}),
    "dilated past the stride": ((1, 2, 9, 5), (2, 3, 3, 3), {"dilation": (4, 1), "padding": 1}),
    "groups between": ((1, 6, 4, 9), (6, 2, 4, 4), {"stride": 2, "padding": 1, "groups": 3}),
    "one channel to many": ((1, 1, 4, 5), (1, 40, 4, 4), {"stride": 2, "padding": 1}),
    "many channels to two": ((1, 40, 3, 5), (40, 2, 4, 4), {"stride": 2, "padding": 1}),
    "150 classes": ((1, 150, 2, 3), (150, 150, 4, 4), {"stride": 2, "padding": 1}),
    "300 classes, grouped": ((1, 300, 2, 2), (300, 1, 2, 2), {"stride": 2, "groups": 300}),
    "wide": ((1, 2, 2, 150), (2, 1, 4, 4), {"stride": 2, "padding": 1, "groups": 2}),
    "wide, full": ((1, 2, 2, 150), (2, 3, 4, 4), {"stride": 2, "padding": 1}),
    "tall": ((1, 3, 70, 2), (3, 1, 4, 4), {"stride": 2, "padding": 1, "groups": 3}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, dtype):
    shape, kernel, geometry = GEOMETRIES[name]
    check_both(normal(shape, dtype), normal(kernel, dtype, 1), geometry)


@pytest.mark.parametrize("width", [3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65])
def test_rows_of_any_width(width):
    """Around the edges of a vector and of a tile; the target ends inside a cell."""
    for per_group, groups in ((1, 3), (3, 1)):
        geometry = {"stride": 4, "padding": 2, "groups": groups}
        tensors = [normal((1, 3, 2, width)), normal((3, per_group, 8, 8), seed=1)]
        for crop in (0, 3):
            size = (7, 4 * width - crop)
            check(
                tensors, labels((1, *size), 3, ignore=255),
                {**geometry, "crop": (1, crop)}, ignore_index=255, label_smoothing=0.1,
            )  # fmt: skip


# -- accuracy and ranges ---------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_gradients_are_accurate(scale, grouped):
    classes = 19
    geometry = {"stride": 8, "padding": 4, "groups": classes if grouped else 1}
    weight = normal((classes, 1 if grouped else classes, 16, 16), seed=1)
    tensors = [normal((1, classes, 16, 32)), scale * weight / weight.shape[1] ** 0.5]
    target = block_labels((1, 128, 256), classes)

    def fused(input: Tensor, weight: Tensor) -> Tensor:
        return fcnseg.conv_transpose_cross_entropy(
            input, weight, target, ignore_index=255, **geometry
        )

    def eager(input: Tensor, weight: Tensor) -> Tensor:
        z = F.conv_transpose2d(input, weight, **geometry)
        return F.cross_entropy(z, target, ignore_index=255)

    exact = evaluate(eager, [tensor.double() for tensor in tensors])
    ours = evaluate(fused, tensors)
    for found, expected in zip(ours, exact, strict=True):
        assert relative_error(found, expected) <= 1e-6


@pytest.mark.parametrize("class_weight", [1.0, 1e6])
@pytest.mark.parametrize("offset", [-90.0, -75.0, -40.0, 40.0, 75.0, 90.0])
def test_logits_far_from_zero(offset, class_weight):
    """On both sides of the bound up to which their maximum is not subtracted."""
    tensors = [normal((1, 5, 4, 9)), normal((5, 1, 4, 4), seed=1), torch.full((5,), offset)]
    geometry = {"stride": 2, "padding": 1, "groups": 5}
    target = labels((1, 8, 18), 5, ignore=255)
    weight = class_weight * torch.arange(1.0, 6.0)
    for reduction in REDUCTIONS:
        check(tensors, target, geometry, ignore_index=255, class_weight=weight, reduction=reduction)


@pytest.mark.parametrize("class_weight", [1e-30, 1e-8, 1e-2])
def test_small_class_weights_of_large_logits(class_weight):
    """What they are divided by, sums of powers, does not make them denormal."""
    tensors = [0.01 * normal((1, 2, 4, 9)), normal((2, 1, 4, 4), seed=1), torch.full((2,), 84.0)]
    geometry = {"stride": 2, "padding": 1, "groups": 2}
    target = labels((1, 8, 18), 2)
    class_weight = torch.full((2,), class_weight)

    def fused(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fcnseg.conv_transpose_cross_entropy(
            input, weight, target, bias, class_weight=class_weight, **geometry
        )

    def eager(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = F.conv_transpose2d(input, weight, bias, **geometry)
        return F.cross_entropy(z, target, class_weight.to(z.dtype))

    exact = evaluate(eager, [tensor.double() for tensor in tensors])
    for found, expected in zip(evaluate(fused, tensors), exact, strict=True):
        # float32 logits of 84 are right to 4e-6
        assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1000.0, 1e6, 1e18])
def test_large_logits(scale, reduction):
    for kernel, groups in (((5, 1, 4, 4), 5), ((5, 3, 4, 4), 1)):
        geometry = {"stride": 2, "padding": 1, "groups": groups}
        check_both(scale * normal((1, 5, 4, 9)), normal(kernel, seed=1), geometry,
                   reduction=reduction)  # fmt: skip


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype, grouped):
    """NaN exactly where eager has it in float64; argmax then follows torch.argmax."""
    geometry = {"stride": 2, "padding": 1, "groups": 4 if grouped else 1}
    weight = normal((4, 1 if grouped else 4, 4, 4), dtype, 1)
    target = labels((1, 10, 14), 4, ignore=255)
    for seed, special in enumerate((torch.nan, torch.inf, -torch.inf)):
        input = normal((1, 4, 5, 7), dtype, seed)
        input[0, 2, 0, 0] = input[0, 1, 3, 3] = special

        def eager(x: Tensor, w: Tensor) -> Tensor:
            z = F.conv_transpose2d(x, w, **geometry)
            return F.cross_entropy(z, target, ignore_index=255, reduction="none")

        def fused(x: Tensor, w: Tensor) -> Tensor:
            return fcnseg.conv_transpose_cross_entropy(
                x, w, target, ignore_index=255, reduction="none", **geometry
            )

        expected = evaluate(eager, [input.double(), weight.double()])
        ours = evaluate(fused, [input, weight])
        for found, exact in zip(ours[:2], expected[:2], strict=True):
            assert torch.equal(found.isnan(), exact.isnan())
        assert ours[2].isnan()[expected[2].isnan()].all()
        tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5)
        assert torch.allclose(ours[0].double(), expected[0], rtol=1e-4, equal_nan=True)
        assert torch.allclose(
            ours[1].double(), expected[1], rtol=tolerance, atol=tolerance, equal_nan=True
        )
        z = F.conv_transpose2d(input.double(), weight.double(), **geometry)
        found = fcnseg.conv_transpose_argmax(input, weight, (10, 14), **geometry)
        assert torch.equal(found, z.argmax(1))


def test_nan_outside_the_target_reaches_the_kernel_as_in_eager():
    input, weight = normal((1, 2, 4, 4)), normal((2, 2, 2, 2), seed=1)
    input[0, 1, 3, 3] = torch.nan
    target = labels((1, 4, 4), 2)  # of 8 x 8
    for dtype in (torch.float32, torch.float64):
        tensors = [input.to(dtype), weight.to(dtype)]

        def fused(x: Tensor, w: Tensor) -> Tensor:
            return fcnseg.conv_transpose_cross_entropy(x, w, target, stride=2)

        def eager(x: Tensor, w: Tensor) -> Tensor:
            return F.cross_entropy(F.conv_transpose2d(x, w, stride=2)[..., :4, :4], target)

        ours, theirs = evaluate(fused, tensors), evaluate(eager, tensors)
        for found, expected in zip(ours, theirs, strict=True):
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_lowest_index_among_ties():
    input = normal((1, 3, 5, 17)).repeat_interleave(3, dim=1)  # each class three times
    weight = normal((3, 1, 4, 4), seed=1).repeat_interleave(3, dim=0)
    geometry = {"stride": 2, "padding": 1, "groups": 9}
    assert (fcnseg.conv_transpose_argmax(input, weight, (10, 34), **geometry) % 3 == 0).all()


# -- threads ---------------------------------------------------------------------------------------


def all_results(tensors: list[Tensor], target: Tensor, groups: int) -> list[Tensor]:
    geometry = {"stride": 4, "padding": 2, "groups": groups}
    classes = tensors[2].numel()
    options = {"ignore_index": 255, "label_smoothing": 0.1, **geometry}

    def loss(input: Tensor, weight: Tensor, bias: Tensor, **more: Any) -> Tensor:
        return fcnseg.conv_transpose_cross_entropy(input, weight, target, bias, **options, **more)

    class_weight = torch.linspace(0.5, 2, classes)
    return [
        *evaluate(loss, tensors),
        *evaluate(lambda *x: loss(*x, class_weight=class_weight, reduction="sum"), tensors),
        *evaluate(lambda *x: loss(*x, reduction="none"), tensors),
        fcnseg.conv_transpose_argmax(*tensors[:2], target.shape[1:], tensors[2], **geometry),
    ]


@pytest.mark.parametrize("groups", [7, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_threads_do_not_change_a_bit(dtype, groups):
    tensors = [normal((2, 7, 21, 33), dtype), normal((7, 7 // groups, 8, 8), dtype, 1)]
    tensors.append(normal((7,), dtype, 2))
    target = block_labels((2, 84, 132), 7)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(all_results(tensors, target, groups))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_calls_from_several_python_threads():
    inputs = [
        (
            [normal((1, 3, 9, 17), seed=i), normal((3, 1, 8, 8), seed=i + 9), normal((3,))],
            block_labels((1, 36, 68), 3, i),
            3,
        )
        for i in range(6)
    ]
    expected = [all_results(*each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: all_results(*each), inputs))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- any problem -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_problem(data):
    draw = data.draw
    groups, per_group, inputs = (
        draw(st.sampled_from(each)) for each in ([1, 2, 5], [1, 2, 7], [1, 3])
    )
    stride, dilation, kernel, padding, output_padding = (
        (draw(st.integers(low, high)), draw(st.integers(low, high)))
        for low, high in ((1, 5), (1, 3), (1, 6), (0, 2), (0, 2))
    )
    shape = (
        draw(st.integers(1, 2)),
        groups * inputs,
        draw(st.integers(1, 9)),
        draw(st.integers(1, 20)),
    )
    output_padding = tuple(
        min(extra, max(step, apart) - 1)
        for extra, step, apart in zip(output_padding, stride, dilation, strict=True)
    )
    full = [
        (shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1)
        + output_padding[i] + 1
        for i in range(2)
    ]  # fmt: skip
    assume(min(full) > 0)
    crop = tuple(draw(st.integers(0, n - 1)) for n in full)
    size = tuple(draw(st.integers(1, n - c)) for n, c in zip(full, crop, strict=True))
    dtype = draw(st.sampled_from(DTYPES))
    layouts = [LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))] for _ in range(2)]
    seed = draw(st.integers(0, 99))
    input = layouts[0](normal(shape, dtype, seed))
    weight = layouts[1](normal((shape[1], per_group, *kernel), dtype, seed + 1))
    bias = normal((groups * per_group,), dtype, seed + 2)
    geometry = {
        "stride": stride, "padding": padding, "output_padding": output_padding,
        "dilation": dilation, "groups": groups, "crop": crop,
    }  # fmt: skip
    ignore_index = draw(st.sampled_from([255, 0, -100]))
    target = labels((shape[0], *size), groups * per_group, ignore=ignore_index, seed=seed)
    integers = [torch.int64, torch.int32] + [torch.uint8] * (ignore_index >= 0)
    check(
        [input, weight, bias], target.to(draw(st.sampled_from(integers))), geometry,
        class_weight=draw(st.sampled_from([None, torch.linspace(0.1, 2, groups * per_group)])),
        ignore_index=ignore_index,
        label_smoothing=draw(st.sampled_from([0.0, 0.1])),
        reduction=draw(st.sampled_from(REDUCTIONS)),
    )  # fmt: skip
    if dtype in (torch.float32, torch.float64):
        check_argmax(input, weight, size, bias, **geometry)


# -- memory and sizes ------------------------------------------------------------------------------

PEAK = """
import sys
import torch
import torch.nn.functional as F
import fcnseg
from test_cpu_kernels import block_labels

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1])

torch.set_num_threads(1)
groups = int(sys.argv[2])

def step(C, h, w):
    input = torch.randn(2, C, h, w, requires_grad=True)
    weight = torch.randn(C, C if groups == 1 else 1, 16, 16, requires_grad=True)
    target = block_labels((2, 8 * h, 8 * w), C)
    geometry = {"stride": 8, "padding": 4, "groups": 1 if groups == 1 else C}
    def run():
        if sys.argv[1] == "fused":
            options = {**geometry, "ignore_index": 255}
            fcnseg.conv_transpose_cross_entropy(input, weight, target, **options).backward()
        else:
            z = F.conv_transpose2d(input, weight, **geometry)
            F.cross_entropy(z, target, ignore_index=255).backward()
    return run

step(2, 2, 2)()
run = step(19, 64, 128)
try:
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
except OSError:
    pass
before = status("VmHWM")
run()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("groups", [19, 1])
def test_peak_memory(groups):
    peak = {}
    for name in ("fused", "eager"):
        finished = run("-c", PEAK, name, str(groups))
        assert finished.returncode == 0, finished.stderr
        peak[name] = int(finished.stdout)
    assert peak["eager"] > 100_000  # kB: three planes of 80 MB
    assert peak["fused"] <= 0.05 * peak["eager"], peak


def check_gradient_at(
    input: Tensor, weight: Tensor, target: Tensor, gradient: Tensor, y: int, x: int, stride: int
) -> None:
    """The gradient of the sum at one pixel of image 0, from all output pixels that it reaches.

    Grouped, a kernel of twice the stride, half a stride of padding.
    """
    half = stride // 2
    starts = [max(i - 2, 0) for i in (y, x)]
    near = [slice(start, i + 3) for start, i in zip(starts, (y, x), strict=True)]
    leaf = input[:1, :, near[0], near[1]].double().requires_grad_()
    groups = input.shape[1]
    z = F.conv_transpose2d(leaf, weight.double(), stride=stride, padding=half, groups=groups)
    reached = [
        slice(max(stride * (i - start) - half, 0), stride * (i - start) + 3 * half)
        for start, i in zip(starts, (y, x), strict=True)
    ]
    top, left = (stride * start for start in starts)
    t = target[:1, top : top + z.shape[2], left : left + z.shape[3]].long()
    loss = F.cross_entropy(z, t, ignore_index=255, reduction="none")
    expected = torch.autograd.grad(loss[:, reached[0], reached[1]].sum(), leaf)[0]
    expected = expected[0, :, y - starts[0], x - starts[1]]
    found = gradient[0, :, y, x].double()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "edge", "stride"),
    [(150, 512, 8), (2, 2900, 16)],  # 2.5e9 virtual logits; 2.15e9 pixels
)
def test_sizes_past_32_bits(classes, edge, stride):
    full = edge * stride
    input, weight = normal((1, classes, edge, edge)), normal((classes, 1, 2 * stride, 2 * stride))
    row = labels((1, 1, full), classes, torch.uint8, ignore=255)
    target = row.expand(1, full, full).contiguous()
    target[0, ::7] = 1
    geometry = {"stride": stride, "padding": stride // 2, "groups": classes}
    leaf = input.clone().requires_grad_()
    loss = fcnseg.conv_transpose_cross_entropy(
        leaf, weight, target, ignore_index=255, reduction="sum", **geometry
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    for y, x in ((0, 0), (edge // 3, 7), (edge - 1, edge - 1)):
        check_gradient_at(input, weight, target, gradient, y, x, stride)
    prediction = fcnseg.conv_transpose_argmax(
        input, weight, (full, full), dtype=torch.uint8, **geometry
    )
    for y, x in ((0, 0), (edge // 2, edge // 3), (edge - 4, edge - 4)):
        near = input[:, :, max(y - 1, 0) : y + 5, max(x - 1, 0) : x + 5].double()
        z = F.conv_transpose2d(near, weight.double(), **geometry)
        above, before = (stride if i else 0 for i in (y, x))
        z = z[..., above : above + 2 * stride, before : before + 2 * stride]
        labelled = prediction[:, y * stride : (y + 2) * stride, x * stride : (x + 2) * stride]
        assert_labels(labelled, z, input.abs().max().item())
    target[0, full - 1, full - 2] = classes
    with pytest.raises(
        IndexError, match=rf"is {classes} at position \(0, {full - 1}, {full - 2}\)"
    ):
        fcnseg.conv_transpose_cross_entropy(input, weight, target, ignore_index=255, **geometry)
