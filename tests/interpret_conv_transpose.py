"""The Triton kernels of the transposed convolution in Triton's interpreter, against float64.

``test_triton.py`` runs this file in a process of its own, like ``interpret_kernels.py``.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import torch
import triton.language as tl
import triton_interpreter
from conftest import TOLERANCE
from torch import Tensor
from torch.nn.functional import cross_entropy

from fcnseg import reference
from fcnseg.kernels import common, conv_transpose_plan
from fcnseg.kernels.conv_transpose_argmax import conv_transpose_argmax_forward
from fcnseg.kernels.conv_transpose_cross_entropy import (
    conv_transpose_cross_entropy_backward,
    conv_transpose_cross_entropy_forward,
)

triton_interpreter.prepare()

ALL = (True, True, True)
Case = tuple[list[Tensor], Tensor, tuple[Any, ...]]


def make_record() -> Tensor:
    return torch.zeros(5, dtype=torch.int64)


def make_case(
    shape: Sequence[int], kernel: Sequence[int], size: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32, labels: torch.dtype = torch.int64, *,
    stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0, groups: int = 1,
    dilation: int | tuple[int, int] = 1, crop: tuple[int, int] = (0, 0),
) -> Case:  # fmt: skip
    """(input, weight, bias), target, geometry in the operator's order; the size defaults to all
    that the crop leaves."""
    pairs = [
        (v, v) if isinstance(v, int) else v for v in (stride, padding, output_padding, dilation)
    ]
    geometry = (*pairs[:3], groups, pairs[3], crop)
    if size is None:
        meta = torch.empty(shape, device="meta"), torch.empty(kernel, device="meta")
        full = reference._full_size(*meta, *pairs[:3], pairs[3])
        size = [n - c for n, c in zip(full, crop, strict=True)]
    generator = torch.Generator().manual_seed(sum(shape) + sum(kernel))
    classes = kernel[1] * groups
    input, weight, bias = (
        torch.randn(tuple(sizes), generator=generator) for sizes in (shape, kernel, (classes,))
    )
    target = torch.randint(0, min(classes, 255), (shape[0], *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    return [input.to(dtype), weight.to(dtype), bias.to(dtype)], target.to(labels), geometry


def close(actual: Tensor, expected: Tensor, eager: Tensor, dtype: torch.dtype) -> None:
    """No worse than eager in float32 plus the tolerance of the operands' dtype."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    scale = expected.abs().max().item()
    error = (actual.double() - expected).abs().max().item()
    eager_error = (eager.double() - expected).abs().max().item()
    assert error <= eager_error + TOLERANCE[dtype] * scale, (error, eager_error, scale)


def check(
    case: Case, reduction: str = "mean", class_weight: Tensor | None = None,
    smoothing: float = 0.0, ignore_index: int = 255, wanted: Sequence[bool] = ALL,
    with_bias: bool = True,
) -> None:  # fmt: skip
    tensors, target, geometry = case
    dtype = tensors[0].dtype
    bias = tensors[2] if with_bias else None
    wanted = (*wanted[:2], wanted[2] and with_bias)
    record = make_record()

    def widened(to: torch.dtype) -> tuple[Any, ...]:
        input, weight = (t.to(to) for t in tensors[:2])
        return (
            input, weight, target, None if bias is None else bias.to(to),
            None if class_weight is None else class_weight.to(to), *geometry,
        )  # fmt: skip

    operands = (*tensors[:2], target, bias, class_weight, *geometry)
    args = (ignore_index, reduction, smoothing, wanted)
    results = conv_transpose_cross_entropy_forward(*operands, *args, record)
    expected = reference.conv_transpose_cross_entropy(*widened(torch.float64), *args)
    eager = reference.conv_transpose_cross_entropy(*widened(torch.float32), *args)
    names = ("loss", "input", "weight", "bias")
    scalar = reduction != "none"
    for name, ours, exact, theirs in zip(names, results, expected, eager, strict=True):
        assert ours.dtype == torch.float32, name
        close(ours, exact, theirs, dtype if name != "loss" else torch.float32)
    for ours, tensor, want in zip(results[1:], tensors, wanted, strict=True):
        assert not (want and scalar) or ours.stride() == torch.empty_like(tensor).stride()
    if not scalar:
        upstream = torch.randn(target.shape, generator=torch.Generator().manual_seed(1)) + 1
        args = (ignore_index, smoothing, wanted)
        results = conv_transpose_cross_entropy_backward(upstream, *operands, *args)
        expected = reference.conv_transpose_cross_entropy_backward(
            upstream.double(), *widened(torch.float64), *args
        )
        eager = reference.conv_transpose_cross_entropy_backward(
            upstream, *widened(torch.float32), *args
        )
        for ours, exact, theirs, want in zip(results, expected, eager, wanted, strict=True):
            assert ours.dtype == dtype
            if want:
                close(ours, exact, theirs.to(dtype), dtype)
    assert not record.any()


def check_labels(case: Case, with_bias: bool = True) -> None:
    (input, weight, bias), target, geometry = case
    size = target.shape[1:]
    wide = bias.double() if with_bias else None
    z = reference.conv_transpose(input.double(), weight.double(), wide, size, *geometry)
    label = conv_transpose_argmax_forward(
        input, weight, bias if with_bias else None, size, *geometry, torch.int64
    )
    picked = z.gather(1, label[:, None])[:, 0]
    assert (z.amax(1) - picked).max() <= 1e-5 * z.abs().max()


@pytest.fixture(params=[70, 90])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The path without and the path with the tensor cores."""
    monkeypatch.setattr(common, "capability", lambda device: request.param)
    return request.param


GEOMETRIES: dict[str, Case] = {
    "full, k = 2 s": make_case((2, 5, 3, 4), (5, 3, 4, 4), stride=2, padding=1),
    "full, k = s": make_case((1, 3, 2, 3), (3, 4, 2, 2), stride=2),
    "full, k = 2 s by s": make_case((1, 3, 2, 3), (3, 4, 4, 3), stride=(2, 3), padding=(1, 0)),
    "full, cropped": make_case((2, 3, 3, 3), (3, 4, 4, 4), (3, 4), stride=2, crop=(3, 1)),
    "full, k = 3, s = 2": make_case(
        (1, 3, 3, 2), (3, 2, 3, 3), stride=2, padding=1, output_padding=1
    ),
    "full, k = 5, s = 3": make_case((1, 2, 2, 2), (2, 3, 5, 5), stride=3),
    "full, stride past the kernel": make_case((1, 2, 2, 3), (2, 3, 2, 2), stride=3),
    "full, dilated": make_case((1, 2, 3, 2), (2, 3, 3, 2), stride=2, dilation=(2, 1)),
    "full, dilated coprime": make_case((1, 2, 3, 2), (2, 3, 2, 3), stride=(3, 2), dilation=(2, 3)),
    "full, stride 1": make_case((1, 3, 4, 3), (3, 2, 3, 3), padding=1),
    "full, one pixel": make_case((1, 3, 1, 1), (3, 2, 1, 1)),
    "grouped, k = 2 s": make_case((2, 5, 3, 4), (5, 1, 4, 4), stride=2, padding=1, groups=5),
    "grouped, k = s": make_case((1, 3, 2, 3), (3, 1, 2, 2), stride=2, groups=3),
    "grouped, k = 3, s = 2": make_case((1, 3, 3, 2), (3, 1, 3, 3), stride=2, groups=3),
    "grouped, dilated": make_case((1, 3, 3, 2), (3, 1, 3, 2), stride=2, dilation=3, groups=3),
    "between, k = 2 s": make_case((1, 4, 2, 3), (4, 3, 4, 4), stride=2, padding=1, groups=2),
    "between, generic": make_case((2, 6, 2, 3), (6, 1, 3, 2), stride=2, groups=3),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry(name: str, capability: int) -> None:
    if capability < 80 and not name.startswith("full"):
        pytest.skip("the same path on every device")
    check(GEOMETRIES[name])
    check_labels(GEOMETRIES[name])


MODES = {
    "full": GEOMETRIES["full, k = 2 s"],
    "grouped": GEOMETRIES["grouped, k = 2 s"],
    "between": GEOMETRIES["between, generic"],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("smoothing", "weighted"), [(0.0, True), (0.1, False), (0.1, True)])
def test_options(mode: str, reduction: str, smoothing: float, weighted: bool) -> None:
    case = MODES[mode]
    classes = case[0][2].numel()
    weight = torch.linspace(0.0, 2.0, classes) if weighted else None
    check(case, reduction, weight, smoothing)


@pytest.mark.parametrize("name", ["full, k = 2 s", "full, k = 3, s = 2"])
def test_no_reduction_without_tensor_cores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "capability", lambda device: 75)
    check(GEOMETRIES[name], "none")


@pytest.mark.parametrize("name", ["full, k = 2 s", "full, k = 3, s = 2", "grouped, k = 2 s"])
@pytest.mark.parametrize("wanted", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_only_wanted_gradients(name: str, wanted: tuple[int, ...]) -> None:
    check(GEOMETRIES[name], wanted=[bool(w) for w in wanted])
    check(GEOMETRIES[name], "none", wanted=[bool(w) for w in wanted])


@pytest.mark.parametrize("name", ["full, k = 2 s", "full, k = 3, s = 2", "grouped, k = 2 s"])
def test_no_bias(name: str) -> None:
    check(GEOMETRIES[name], with_bias=False)
    check_labels(GEOMETRIES[name], with_bias=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_dtypes(
    dtype: torch.dtype, groups: int, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the interpreter multiplies bfloat16 wrongly: its values, in float32
    monkeypatch.setitem(conv_transpose_plan.OPERANDS, torch.bfloat16, tl.float32)
    labels = torch.uint8 if groups == 1 else torch.int32
    kernel = (4, 4 // groups, 4, 4)
    case = make_case((1, 4, 3, 3), kernel, None, dtype, labels, stride=2, groups=groups)
    check(case, reduction)
    check_labels(case)


def test_half_gradients_neither_overflow_nor_vanish() -> None:
    tensors, target, geometry = make_case((1, 4, 3, 3), (4, 3, 4, 4), None, torch.float16, stride=2)
    for factor in (2.0**20, 2.0**-30):
        check((tensors, target, geometry), "sum", torch.full((3,), factor))


@pytest.mark.parametrize(
    ("channels", "classes", "groups"),
    [
        (2, 1, 1), (1, 1, 1), (1, 2, 1), (40, 3, 1), (3, 20, 1), (3, 40, 1), (3, 70, 1), (70, 3, 1),
        (2, 2, 2), (40, 40, 40), (130, 130, 130), (260, 260, 260), (4, 66, 2), (132, 2, 2),
    ],
)  # fmt: skip
def test_number_of_classes_and_channels(channels: int, classes: int, groups: int) -> None:
    case = make_case((1, channels, 1, 2), (channels, classes // groups, 2, 1), groups=groups)
    check(case)
    check_labels(case)


def test_many_classes_without_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "capability", lambda device: 70)
    case = make_case((1, 2, 1, 2), (2, 258, 2, 2), stride=2)
    check(case)
    check_labels(case)


@pytest.mark.parametrize("groups", [1, 3])
def test_several_tiles_and_splits(groups: int) -> None:
    case = make_case((2, 3, 9, 11), (3, 3 // groups, 2, 2), stride=2, groups=groups)
    check(case)
    check_labels(case)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_class_is_exactly_zero(groups: int, reduction: str) -> None:
    (input, weight, bias), target, geometry = make_case((2, 2, 2, 3), (2, 1, 2, 2), stride=2)
    target.fill_(0)
    results = conv_transpose_cross_entropy_forward(
        input, weight, target, bias, torch.rand(1), *geometry, 255, reduction, 0.3, ALL,
        make_record(),
    )  # fmt: skip
    for result in results:
        assert not result.any()


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "sliced", "transposed"])
@pytest.mark.parametrize("mode", ["full", "grouped"])
def test_strides(mode: str, layout: str) -> None:
    (input, weight, bias), target, geometry = MODES[mode]
    if layout == "channels_last":
        input, weight = (t.to(memory_format=torch.channels_last) for t in (input, weight))
    elif layout == "expanded":
        input = input[:1].expand(2, -1, -1, -1)
        target = target[:, :1].expand(-1, target.shape[1], -1)
        bias = bias[:1].expand(bias.shape)
    elif layout == "sliced":
        input, weight = (t.repeat(1, 1, 2, 2)[:, :, ::2, 1::2] for t in (input, weight))
        target = target.repeat(1, 1, 2)[:, :, ::2]
        bias = bias.repeat(2)[::2]
    else:
        input, weight = (t.transpose(0, 3).contiguous().transpose(0, 3) for t in (input, weight))
        target = target.transpose(1, 2).contiguous().transpose(1, 2)
    check(([input, weight, bias], target, geometry))


def test_ignore_index_may_be_a_class() -> None:
    tensors, target, geometry = MODES["full"]
    target = torch.where(target == 255, 2, target)
    check((tensors, target, geometry), ignore_index=2)


@pytest.mark.parametrize("mode", MODES)
def test_all_ignored_and_empty_batch(mode: str) -> None:
    (input, weight, bias), target, geometry = MODES[mode]
    target = torch.full_like(target, 255)
    for reduction, value in (("mean", math.nan), ("sum", 0.0)):
        for batch in (1, 0):
            loss, *gradients = conv_transpose_cross_entropy_forward(
                input[:batch], weight, target[:batch], bias, None, *geometry, 255, reduction, 0.1,
                ALL, make_record(),
            )  # fmt: skip
            torch.testing.assert_close(loss.item(), value, equal_nan=True)
            for gradient, tensor in zip(gradients, (input[:batch], weight, bias), strict=True):
                assert gradient.shape == tensor.shape
                assert not gradient.any()
    upstream = torch.ones(target[:0].shape)
    for gradient, tensor in zip(
        conv_transpose_cross_entropy_backward(
            upstream, input[:0], weight, target[:0], bias, None, *geometry, 255, 0.1, ALL
        ),
        (input[:0], weight, bias),
        strict=True,
    ):
        assert gradient.shape == tensor.shape
        assert not gradient.any()
    size = target.shape[1:]
    labels = conv_transpose_argmax_forward(input[:0], weight, bias, size, *geometry, torch.uint8)
    assert labels.shape == (0, *size)


@pytest.mark.parametrize("name", ["full, k = 2 s", "full, k = 3, s = 2", "grouped, k = 2 s"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mean_of_pixels_that_weigh_nothing(name: str, smoothing: float) -> None:
    (input, weight, bias), target, geometry = GEOMETRIES[name]
    target = target.clamp(max=0)
    target[0, 1, 1] = 255
    class_weight = torch.ones_like(bias)
    class_weight[0] = 0
    options = (*geometry, 255, "mean", smoothing, ALL)
    args = (input, weight, target, bias, class_weight, *options)
    results = conv_transpose_cross_entropy_forward(*args, make_record())
    for result in (*results, *reference.conv_transpose_cross_entropy(*args)):
        assert result.isnan().all()
    target[0, 0, 0] = 1  # one pixel is enough, if it weighs hardly anything
    case = ([input, weight, bias], target, geometry)
    check(case, class_weight=class_weight * 2.0**-60, smoothing=smoothing)
    loss, *gradients = conv_transpose_cross_entropy_forward(
        input, weight, torch.full_like(target, 255), bias, torch.zeros_like(bias), *options,
        make_record(),
    )  # fmt: skip
    assert loss.isnan()
    for gradient in gradients:
        assert not gradient.any()


@pytest.mark.parametrize("name", ["full, k = 2 s", "full, k = 3, s = 2", "grouped, k = 2 s"])
def test_bad_label_of_a_scalar_loss(name: str) -> None:
    (input, weight, bias), target, geometry = GEOMETRIES[name]
    target = target.clone()
    target[-1, 2, 1] = 2**32 + 1
    target[-1, 4, 0] = -1
    record = make_record()
    args = (bias, None, *geometry, 255, "sum", 0.0, ALL)
    results = conv_transpose_cross_entropy_forward(input, weight, target, *args, record)
    for result in results:
        assert result.isnan().all()
    last = len(target) - 1
    assert record.tolist() == [2, 2**32 + 1, last, 2, 1]
    target[-1, 2, 1] = 0
    conv_transpose_cross_entropy_forward(input, weight, target, *args, record)
    assert record.tolist() == [3, 2**32 + 1, last, 2, 1]  # the first one stays


@pytest.mark.parametrize("name", ["full, k = 2 s", "full, k = 3, s = 2", "grouped, k = 2 s"])
def test_bad_label_of_pixel_losses(name: str) -> None:
    (input, weight, bias), target, geometry = GEOMETRIES[name]
    target = target.clone()
    target[0, 2, 1] = 99
    record = make_record()
    loss, *_ = conv_transpose_cross_entropy_forward(
        input, weight, target, bias, None, *geometry, 255, "none", 0.0, ALL, record
    )
    assert loss.isnan().nonzero().tolist() == [[0, 2, 1]]
    assert record.tolist() == [1, 99, 0, 2, 1]
    args = (input, weight, target, bias, None, *geometry, 255, 0.0, ALL)
    results = conv_transpose_cross_entropy_backward(torch.ones_like(loss), *args)
    expected = reference.conv_transpose_cross_entropy_backward(torch.ones_like(loss), *args)
    # what the pixel feeds: its samples, and its taps where a sample lies under them (aten's sums
    # may add 0 * NaN to others)
    assert torch.equal(results[0].isnan(), expected[0].isnan())
    assert results[1].isnan().any()
    assert not (results[1].isnan() & ~expected[1].isnan()).any()
    assert results[2].isnan().all()
    assert record.tolist() == [1, 99, 0, 2, 1]  # counted once


def products_by_tap(
    input: Tensor, weight: Tensor, bias: Tensor, target: Tensor, geometry: tuple[Any, ...]
) -> list[Tensor]:
    """The summed loss and its gradients: autograd through one matrix product a tap, of no other
    samples than those that the tap takes to a pixel."""
    *axes, groups, dilation, crop = geometry
    stride, padding, _ = axes
    leaves = [tensor.double().requires_grad_() for tensor in (input, weight, bias)]
    samples, taps = leaves[0].unflatten(1, (groups, -1)), leaves[1].unflatten(0, (groups, -1))
    full = reference._full_size(input, weight, *axes, dilation)
    z = leaves[2][:, None].expand(len(input), -1, math.prod(full))
    for tap in itertools.product(*map(range, weight.shape[2:])):
        at = [  # the pixel of each sample
            torch.arange(input.shape[2 + a]) * stride[a] + dilation[a] * tap[a] - padding[a]
            for a in range(2)
        ]
        rows, columns = ((at[a] >= 0) & (at[a] < full[a]) for a in range(2))
        x = samples[..., rows, :][..., columns]
        product = torch.einsum("ngkij,gkc->ngcij", x, taps[..., *tap]).flatten(1, 2).flatten(2)
        pixels = (at[0][rows, None] * full[1] + at[1][columns]).flatten()
        z = z.index_add(2, pixels, product)
    z = z.unflatten(2, full)[..., crop[0] :, crop[1] :]
    z = z[..., : target.shape[1], : target.shape[2]]
    loss = cross_entropy(z, target, ignore_index=255, reduction="sum")
    return [loss, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_not_finite_input(mode: str, value: float, capability: int) -> None:
    (input, weight, bias), target, geometry = MODES[mode]
    if capability < 80 and mode != "full":
        pytest.skip("the same path on every device")
    input = input.clone()
    input[0, 1, 1, 1] = value
    args = (input, weight, target, bias, None, *geometry, 255, "sum", 0.0, ALL)
    results = conv_transpose_cross_entropy_forward(*args, make_record())
    for ours, theirs in zip(results, reference.conv_transpose_cross_entropy(*args), strict=True):
        assert not (theirs.isnan() & ~ours.isnan()).any()
    args = (input, weight, bias, target.shape[1:], *geometry, torch.int64)
    assert torch.equal(conv_transpose_argmax_forward(*args), reference.conv_transpose_argmax(*args))


CROPPED: dict[str, Case] = {
    "full": make_case((1, 3, 3, 4), (3, 4, 4, 4), (2, 3), stride=2, padding=1, crop=(2, 3)),
    "grouped": make_case(
        (1, 4, 3, 4), (4, 1, 4, 4), (2, 3), stride=2, padding=1, crop=(2, 3), groups=4
    ),
    "between": make_case((1, 4, 3, 3), (4, 2, 3, 2), (3, 2), stride=2, crop=(2, 2), groups=2),
    "generic": make_case((1, 3, 3, 3), (3, 4, 3, 3), (3, 2), stride=2, padding=1, crop=(1, 2)),
}


@pytest.mark.parametrize("place", ["input", "weight", "last weight"])
@pytest.mark.parametrize("name", [*MODES, *(f"cropped {name}" for name in CROPPED)])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_borders_that_are_not_finite(name: str, place: str, value: float, capability: int) -> None:
    cases = MODES | {f"cropped {name}": case for name, case in CROPPED.items()}
    (input, weight, bias), target, geometry = cases[name]
    if capability < 80 and geometry[3] > 1:
        pytest.skip("the same path on every device")
    input, weight = input.clone(), weight.clone()
    if place == "input":
        input[0, 1, 0, 0] = value
    else:
        weight[1, 0, 0, 0 if place == "weight" else -1] = value
    operands = (input, weight, target, bias, None, *geometry)
    loss, *_ = conv_transpose_cross_entropy_forward(*operands, 255, "none", 0.0, ALL, make_record())
    expected, *_ = reference.conv_transpose_cross_entropy(*operands, 255, "none", 0.0, ALL)
    assert torch.equal(loss.isnan(), expected.isnan())
    assert torch.equal(loss.isinf(), expected.isinf())
    args = (input, weight, bias, target.shape[1:], *geometry, torch.int64)
    assert torch.equal(conv_transpose_argmax_forward(*args), reference.conv_transpose_argmax(*args))
    # Where gradients are NaN depends on aten's algorithm: in float64 it multiplies by 0 also where
    # a tap reaches beyond the output. Ours lie between the plain products and those.
    results = conv_transpose_cross_entropy_forward(*operands, 255, "sum", 0.0, ALL, make_record())
    least = products_by_tap(input, weight, bias, target, geometry)
    wide = (input.double(), weight.double(), target, bias.double(), None)
    most = reference.conv_transpose_cross_entropy(*wide, *geometry, 255, "sum", 0.0, ALL)
    for ours, few, many in zip(results, least, most, strict=True):
        assert not (few.isnan() & ~ours.isnan()).any()
        assert not (ours.isnan() & ~many.isnan()).any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("classes", [4, 80])
def test_argmax_of_ties(classes: int, dtype: torch.dtype) -> None:
    (input, weight, _), target, geometry = make_case((1, 3, 2, 3), (3, 2, 2, 2), stride=2)
    weight = weight.repeat(1, classes // 2, 1, 1)
    args = (input, weight, None, target.shape[1:], *geometry, dtype)
    label = conv_transpose_argmax_forward(*args)
    assert label.dtype == dtype
    assert torch.equal(label, reference.conv_transpose_argmax(*args))
    assert label.max() <= 1


def test_large_logits() -> None:
    tensors, target, geometry = MODES["full"]
    check(([tensors[0] * 100, tensors[1] * 10, tensors[2] - 5000], target, geometry))
