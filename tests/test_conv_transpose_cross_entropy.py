"""fcnseg.conv_transpose_cross_entropy against F.conv_transpose2d + F.cross_entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import assert_as_good_as_eager, eager_conv_transpose, evaluate, labels, normal
from torch import Tensor

import fcnseg
from fcnseg import _labels, _ops

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
# input, kernel, (H, W), geometry
GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int], dict[str, Any]]] = {
    "twice the stride, grouped": (
        (2, 5, 3, 4), (5, 1, 4, 4), (6, 8), {"stride": 2, "padding": 1, "groups": 5}
    ),
    "twice the stride, full": ((1, 4, 3, 2), (4, 3, 8, 8), (12, 8), {"stride": 4, "padding": 2}),
    "cropped": (
        (2, 3, 3, 4), (3, 5, 4, 4), (5, 7), {"stride": 2, "padding": 0, "crop": (1, 2)}
    ),
    "ragged": (
        (1, 4, 3, 5), (4, 3, 3, 5), (7, 15),
        {"stride": (2, 3), "padding": (0, 1), "output_padding": (0, 1), "groups": 2},
    ),
    "dilated": (
        (1, 2, 4, 3), (2, 3, 3, 2), (11, 6), {"stride": 2, "dilation": (2, 1), "crop": (0, 0)}
    ),
    "stride past the kernel": ((1, 2, 3, 3), (2, 3, 2, 2), (8, 8), {"stride": 3}),
    "one pixel": ((1, 3, 1, 1), (3, 2, 1, 1), (1, 1), {}),
    "one class": ((2, 2, 2, 3), (2, 1, 2, 2), (4, 6), {"stride": 2}),
}  # fmt: skip


def eager(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    crop: tuple[int, int] = (0, 0),
    geometry: dict[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    z = eager_conv_transpose(input, weight, target.shape[1:], bias, crop=crop, **(geometry or {}))
    class_weight = None if class_weight is None else class_weight.to(z.dtype)
    return F.cross_entropy(z, target.long(), class_weight, **options)


def check(tensors: list[Tensor], target: Tensor, geometry: dict[str, Any], **options: Any) -> None:
    """Values and the gradients of input, kernel and, if given, bias."""
    plain = dict(geometry)
    crop = plain.pop("crop", (0, 0))

    def fused(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return fcnseg.conv_transpose_cross_entropy(
            input, weight, target, bias, **geometry, **options
        )

    def oracle(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return eager(input, weight, target, bias, crop=crop, geometry=plain, **options)

    assert_as_good_as_eager(fused, oracle, tensors)


def operands(name: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], int]:
    """Input, kernel and bias of a geometry, and its number of classes."""
    shape, kernel, _, geometry = GEOMETRIES[name]
    classes = kernel[1] * geometry.get("groups", 1)
    tensors = [normal(shape, dtype), normal(kernel, dtype, 1), normal((classes,), dtype, 2)]
    return tensors, classes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_matches_eager(name: str, dtype: torch.dtype) -> None:
    shape, _, size, geometry = GEOMETRIES[name]
    tensors, classes = operands(name, dtype)
    target = labels((shape[0], *size), classes, ignore=255)
    for reduction in REDUCTIONS:
        options = {"ignore_index": 255, "reduction": reduction}
        check(tensors, target, geometry, **options)
        check(tensors[:2], target, geometry, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_options_match_eager(
    ignore_index: int, label_smoothing: float, reduction: str, dtype: torch.dtype
) -> None:
    tensors, classes = operands("cropped", dtype)
    check(
        tensors, labels((2, 5, 7), classes, ignore=ignore_index), GEOMETRIES["cropped"][3],
        class_weight=torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0]), ignore_index=ignore_index,
        reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_dtypes(dtype: torch.dtype) -> None:
    tensors, classes = operands("ragged")
    target = labels((1, 7, 15), classes, dtype, ignore=255)
    check(tensors, target, GEOMETRIES["ragged"][3], ignore_index=255)


def test_strides_do_not_matter() -> None:
    (input, weight, bias), classes = operands("ragged")
    target = labels((1, 7, 15), classes)
    layouts = [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
        lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    ]
    for layout in layouts:
        for t in (target, target.mT.contiguous().mT, target.repeat_interleave(2, 2)[..., ::2]):
            check([layout(input), layout(weight), bias], t, GEOMETRIES["ragged"][3])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batch(reduction: str) -> None:
    input = torch.zeros(0, 3, 2, 2, requires_grad=True)
    weight = normal((3, 4, 2, 2)).requires_grad_()
    target = torch.zeros(0, 4, 4, dtype=torch.uint8)
    loss = fcnseg.conv_transpose_cross_entropy(input, weight, target, stride=2, reduction=reduction)
    assert loss.shape == ((0, 4, 4) if reduction == "none" else ())
    assert loss.isnan() if reduction == "mean" else loss.sum() == 0
    to_input, to_weight = torch.autograd.grad(loss.sum(), (input, weight))
    assert to_input.shape == input.shape
    assert (to_weight == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored(reduction: str) -> None:
    tensors, _ = operands("cropped")
    leaves = [tensor.requires_grad_() for tensor in tensors]
    target = torch.full((2, 5, 7), 255, dtype=torch.uint8)
    loss = fcnseg.conv_transpose_cross_entropy(
        *leaves[:2], target, leaves[2], ignore_index=255, reduction=reduction,
        label_smoothing=0.1, **GEOMETRIES["cropped"][3],
    )  # fmt: skip
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    for gradient in torch.autograd.grad(loss.sum(), leaves):
        assert (gradient == 0).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["twice the stride, grouped", "twice the stride, full"])
def test_mean_of_pixels_that_weigh_nothing(name: str, label_smoothing: float) -> None:
    shape, _, size, geometry = GEOMETRIES[name]
    tensors, classes = operands(name)
    target = torch.zeros((shape[0], *size), dtype=torch.int64)
    target[:, 1, 1] = 255
    class_weight = torch.ones(classes)
    class_weight[0] = 0
    for value in evaluate(
        lambda input, weight, bias: fcnseg.conv_transpose_cross_entropy(
            input, weight, target, bias, class_weight=class_weight, ignore_index=255,
            label_smoothing=label_smoothing, **geometry,
        ),
        tensors,
    ):  # fmt: skip
        assert value.isnan().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_class_is_exactly_zero(reduction: str) -> None:
    tensors, _ = operands("one class")
    target = torch.zeros(2, 4, 6, dtype=torch.int32)
    for value in evaluate(
        lambda input, weight, bias: fcnseg.conv_transpose_cross_entropy(
            input, weight, target, bias, stride=2, reduction=reduction, label_smoothing=0.1
        ),
        tensors,
    ):
        assert (value == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: str) -> None:
    target = labels((2, 4, 5), 2, ignore=255)
    leaves = [normal(shape, torch.float64) for shape in ((2, 3, 2, 2), (3, 2, 3, 3), (2,))]

    def loss(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fcnseg.conv_transpose_cross_entropy(
            input, weight, target, bias, stride=2, crop=(1, 0), ignore_index=255,
            reduction=reduction, label_smoothing=0.1,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_frozen_operands_get_no_gradient(trained: tuple[int, ...], reduction: str) -> None:
    tensors, classes = operands("cropped")
    target, geometry = labels((2, 5, 7), classes), GEOMETRIES["cropped"][3]

    def gradients(wanted: tuple[int, ...]) -> dict[int, Tensor]:
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        fcnseg.conv_transpose_cross_entropy(
            *leaves[:2], target, leaves[2], reduction=reduction, **geometry
        ).sum().backward()
        return {i: leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}

    everything, some = gradients((0, 1, 2)), gradients(trained)
    assert set(some) == set(trained)
    for i, gradient in some.items():
        torch.testing.assert_close(gradient, everything[i])


def test_nothing_to_train_needs_no_graph() -> None:
    tensors, classes = operands("cropped")
    target, geometry = labels((2, 5, 7), classes), GEOMETRIES["cropped"][3]
    assert not fcnseg.conv_transpose_cross_entropy(*tensors[:2], target, **geometry).requires_grad
    tensors[1].requires_grad_()
    with torch.no_grad():
        loss = fcnseg.conv_transpose_cross_entropy(*tensors[:2], target, **geometry)
    assert not loss.requires_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_agrees(reduction: str) -> None:
    tensors, classes = operands("cropped", torch.float16)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    loss = fcnseg.conv_transpose_cross_entropy(
        *leaves[:2], labels((2, 5, 7), classes), leaves[2], reduction=reduction,
        **GEOMETRIES["cropped"][3],
    )  # fmt: skip
    first, _, third = (
        torch.autograd.grad(loss.sum() * scale, leaves, retain_graph=True)
        for scale in (1.0, 64.0, 1.0)
    )
    for one, other in zip(first, third, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_double_backward_says_why_not(reduction: str) -> None:
    tensors, classes = operands("cropped")
    input, weight, _ = (tensor.requires_grad_() for tensor in tensors)
    loss = fcnseg.conv_transpose_cross_entropy(
        input, weight, labels((2, 5, 7), classes), reduction=reduction, **GEOMETRIES["cropped"][3]
    )
    (gradient,) = torch.autograd.grad(loss.sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        gradient.pow(2).sum().backward()


def test_large_upstream_scale_saves_half_gradients_from_underflow() -> None:
    tensors = [normal((1, 3, 64, 64), torch.float16), normal((3, 3, 8, 8), torch.float16, 1) / 8]
    target = labels((1, 256, 256), 3)
    geometry = {"stride": 4, "padding": 2}
    gradients = []
    for dtype in (torch.float16, torch.float64):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        loss = fcnseg.conv_transpose_cross_entropy(*leaves, target, **geometry)
        gradients.append(torch.autograd.grad(loss * 65536, leaves)[0].double())
    torch.testing.assert_close(*gradients, rtol=2e-3, atol=1e-3)
    assert gradients[0].count_nonzero() == gradients[0].numel()


def test_autocast_casts_as_eager_does() -> None:
    tensors, classes = operands("cropped")
    target, geometry = labels((2, 5, 7), classes), dict(GEOMETRIES["cropped"][3])
    half = [tensor.bfloat16() for tensor in tensors]

    def fused(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fcnseg.conv_transpose_cross_entropy(input, weight, target, bias, **geometry)

    expected = evaluate(fused, half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = evaluate(fused, tensors)
        double = evaluate(fused, [tensor.double() for tensor in tensors])
        labelled = fcnseg.conv_transpose_argmax(*tensors[:2], (5, 7), tensors[2], **geometry)
    assert inside[0].dtype == torch.float32 and torch.equal(inside[0], expected[0])
    for gradient, half_gradient in zip(inside[1:], expected[1:], strict=True):
        assert gradient.dtype == torch.float32  # the leaf's
        assert torch.equal(gradient, half_gradient.float())
    assert double[0].dtype == torch.float64  # double precision stays
    assert torch.equal(
        labelled, fcnseg.conv_transpose_argmax(*half[:2], (5, 7), half[2], **geometry)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_gives_nan_where_eager_does(value: float) -> None:
    input, weight = normal((2, 3, 3, 4)), normal((3, 3, 2, 2), seed=1).abs()
    input[0, 0, 1, 2] = value
    target = labels((2, 6, 8), 3, ignore=255)
    for reduction in REDUCTIONS:
        options = {"ignore_index": 255, "reduction": reduction}
        ours = evaluate(
            lambda x, w, o=options: fcnseg.conv_transpose_cross_entropy(
                x, w, target, stride=2, **o
            ),
            [input, weight],
        )
        theirs = evaluate(
            lambda x, w, o=options: eager(x, w, target, geometry={"stride": 2}, **o),
            [input, weight],
        )
        for our, their in zip(ours, theirs, strict=True):
            assert our.isnan()[their.isnan()].all(), reduction


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.tuples(*[st.integers(1, 4) for _ in range(6)]),
    st.tuples(*[st.integers(1, 3) for _ in range(4)]),
    st.sampled_from([1, 2]),
    st.integers(0, 2),
    st.sampled_from(REDUCTIONS),
    st.integers(0, 99),
)
def test_any_geometry_matches_eager(
    sizes: tuple[int, ...],
    steps: tuple[int, ...],
    groups: int,
    padding: int,
    reduction: str,
    seed: int,
) -> None:
    channels, per_group, h, w, kernel_h, kernel_w = sizes
    stride, dilation = steps[:2], steps[2:]
    full = [
        (n - 1) * stride[i] - 2 * padding + dilation[i] * (k - 1) + 1
        for i, (n, k) in enumerate(((h, kernel_h), (w, kernel_w)))
    ]
    assume(min(full) >= 1)
    crop = (full[0] // 3, full[1] // 4)
    geometry = {
        "stride": stride, "dilation": dilation, "padding": padding, "groups": groups, "crop": crop
    }  # fmt: skip
    size = [n - c for n, c in zip(full, crop, strict=True)]
    check(
        [
            normal((2, channels * groups, h, w), seed=seed),
            normal((channels * groups, per_group, kernel_h, kernel_w), seed=seed + 1),
        ],
        labels((2, *size), per_group * groups, ignore=255, seed=seed),
        geometry, ignore_index=255, reduction=reduction,
    )  # fmt: skip


# -- bad labels --------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bad_labels_raise(reduction: str) -> None:
    tensors, classes = operands("cropped")
    target = labels((2, 5, 7), classes)
    target[1, 2, 3], target[1, 4, 0] = 2**32 + 3, -1
    with pytest.raises(
        IndexError,
        match=r"target holds 2 values outside \[0, 5\) .* "
        r"the first is 4294967299 at position \(1, 2, 3\)",
    ):
        fcnseg.conv_transpose_cross_entropy(
            *tensors[:2], target, reduction=reduction, **GEOMETRIES["cropped"][3]
        )


def test_cuda_policy_turns_loss_and_gradients_to_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_labels, "_records", {})
    monkeypatch.delenv("FCNSEG_CHECK_LABELS", raising=False)
    # float64: what runs on any device
    input, weight = (normal(shape, torch.float64) for shape in ((1, 3, 2, 2), (3, 4, 2, 2)))
    target = labels((1, 4, 4), 4)
    target[0, 1, 2] = 4
    for reduction in ("mean", "sum"):
        results = _ops._conv_transpose_cross_entropy_cuda(
            input, weight, target, None, None,
            [2, 2], [0, 0], [0, 0], 1, [1, 1], [0, 0], -100, reduction, 0.0, [True, True, False],
        )  # fmt: skip
        assert all(tensor.isnan().all() for tensor in results[:3])
    loss, *_ = _ops._conv_transpose_cross_entropy_cuda(
        input, weight, target, None, None,
        [2, 2], [0, 0], [0, 0], 1, [1, 1], [0, 0], -100, "none", 0.0, [True, True, False],
    )  # fmt: skip
    assert torch.equal(loss.isnan(), target == 4)
    with pytest.raises(IndexError, match=r"holds 3 values .* first is 4 at position \(0, 1, 2\)"):
        fcnseg.check_labels()


# -- the module --------------------------------------------------------------------------------


def test_module_equals_the_function_and_shares_the_state_dict_of_the_convolution() -> None:
    class_weight = torch.tensor([0.5, 2.0, 1.0, 3.0])
    criterion = fcnseg.ConvTransposeCrossEntropyLoss(
        4, 4, 4, stride=2, padding=1, groups=2, class_weight=class_weight, ignore_index=255,
        label_smoothing=0.1,
    )  # fmt: skip
    convolution = torch.nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=2)
    criterion.load_state_dict(convolution.state_dict())
    input, target = normal((2, 4, 3, 4)), labels((2, 6, 8), 4, torch.uint8, ignore=255)
    loss = criterion(input, target)
    expected = F.cross_entropy(
        convolution(input), target.long(), class_weight, ignore_index=255, label_smoothing=0.1
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(criterion.weight.grad, convolution.weight.grad)
    torch.testing.assert_close(criterion.bias.grad, convolution.bias.grad)
    labelled = criterion.predict(input, (6, 8), dtype=torch.uint8)
    assert torch.equal(labelled, convolution(input).argmax(1).to(torch.uint8))
