"""fcnseg.upsample_argmax and conv_transpose_argmax against the argmax of float64 logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import eager_conv_transpose, eager_upsample, normal
from torch import Tensor

import fcnseg

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# [N, C, h, w], (H, W), scale_factor
GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, int], Any]] = {
    "ragged": ((2, 5, 4, 6), (13, 17), None),
    "size 1": ((1, 3, 1, 1), (1, 1), None),
    "one wide cell": ((1, 4, 1, 1), (5, 64), None),
    "one row": ((2, 3, 1, 5), (7, 9), None),
    "to size 1": ((1, 3, 4, 5), (1, 1), None),
    "identity": ((1, 3, 5, 4), (5, 4), None),
    "times 8": ((1, 19, 9, 5), (72, 40), None),
    "down": ((2, 3, 9, 11), (4, 5), None),
    "one class": ((2, 1, 3, 4), (7, 9), None),
    "many classes": ((1, 151, 3, 4), (17, 19), None),
    "scale": ((1, 3, 5, 7), (11, 16), 2.3),
    "scale pair": ((2, 3, 5, 7), (12, 12), (2.5, 1.75)),
}


def assert_labels(result: Tensor, z: Tensor, largest: float) -> None:
    """Equal to the argmax of ``z`` in float64 wherever its top two are clearly apart."""
    assert result.shape == (z.shape[0], *z.shape[2:])
    if z.shape[1] == 1:
        assert (result == 0).all()
        return
    top = z.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-5 * largest
    assert torch.equal(result[clear].long(), z.argmax(1)[clear])
    # Where they are not, the label is one of the two.
    chosen = z.gather(1, result.long()[:, None])[:, 0]
    assert (top[:, 0] - chosen <= 1e-5 * largest).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_upsample_matches_float64(name: str, align_corners: bool, dtype: torch.dtype) -> None:
    shape, size, scale_factor = GEOMETRIES[name]
    logits = normal(shape, dtype)
    options = {"align_corners": align_corners, "scale_factor": scale_factor}
    z = eager_upsample(logits.double(), size, **options)
    for label_dtype in (torch.uint8, torch.int32, torch.int64):
        result = fcnseg.upsample_argmax(logits, size, dtype=label_dtype, **options)
        assert result.dtype == label_dtype and result.is_contiguous()
        assert_labels(result, z, logits.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_give_the_lowest_index(dtype: torch.dtype) -> None:
    logits = normal((2, 3, 4, 5), dtype).repeat_interleave(3, dim=1)  # each class three times
    result = fcnseg.upsample_argmax(logits, (13, 17))
    assert (result % 3 == 0).all()
    assert (fcnseg.upsample_argmax(torch.zeros(1, 40, 3, 3, dtype=dtype), 9) == 0).all()


def test_upsample_of_strided_logits() -> None:
    logits = normal((2, 5, 4, 6))
    expected = fcnseg.upsample_argmax(logits, (13, 17))
    for strided in (
        logits.contiguous(memory_format=torch.channels_last),
        logits.repeat_interleave(2, dim=3)[..., ::2],
        logits.transpose(0, 3).contiguous().transpose(0, 3),
        F.pad(logits, (1, 1, 2, 2))[..., 2:-2, 1:-1],
    ):
        assert torch.equal(fcnseg.upsample_argmax(strided, (13, 17)), expected)


def test_size_may_be_a_number() -> None:
    logits = normal((1, 3, 4, 5))
    expected = fcnseg.upsample_argmax(logits, (9, 9))
    assert torch.equal(fcnseg.upsample_argmax(logits, 9), expected)
    assert torch.equal(fcnseg.upsample_argmax(logits, [9, 9]), expected)


def test_uint8_holds_256_classes() -> None:
    logits = torch.zeros(1, 256, 2, 2)
    logits[:, 255] = 1
    assert (fcnseg.upsample_argmax(logits, 3, dtype=torch.uint8) == 255).all()


def test_empty_batch() -> None:
    result = fcnseg.upsample_argmax(torch.zeros(0, 3, 2, 2), (5, 7))
    assert result.shape == (0, 5, 7) and result.dtype == torch.int64
    result = fcnseg.conv_transpose_argmax(torch.zeros(0, 3, 2, 2), normal((3, 4, 2, 2)), (3, 3))
    assert result.shape == (0, 3, 3)


def test_labels_have_no_gradient() -> None:
    logits, weight = normal((1, 3, 2, 2)).requires_grad_(), normal((3, 2, 2, 2)).requires_grad_()
    assert not fcnseg.upsample_argmax(logits, 4).requires_grad
    assert not fcnseg.conv_transpose_argmax(logits, weight, 3).requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_logits_follow_torch_argmax(value: float) -> None:
    logits = normal((2, 4, 4, 5))
    logits[0, 2, 1, 2] = value
    for size in ((13, 17), (4, 5)):
        expected = eager_upsample(logits, size).argmax(1)
        assert torch.equal(fcnseg.upsample_argmax(logits, size), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("shape", "kernel", "size", "crop", "geometry"),
    [
        ((2, 5, 3, 4), (5, 1, 4, 4), (6, 8), (0, 0), {"stride": 2, "padding": 1, "groups": 5}),
        ((1, 4, 3, 2), (4, 3, 8, 8), (12, 8), (0, 0), {"stride": 4, "padding": 2}),
        ((2, 3, 3, 4), (3, 5, 4, 4), (5, 7), (1, 2), {"stride": 2}),
        ((1, 2, 4, 3), (2, 3, 3, 2), (11, 6), (0, 0), {"stride": 2, "dilation": (2, 1)}),
        ((1, 2, 3, 3), (2, 3, 2, 2), (8, 8), (0, 0), {"stride": 3}),
        ((1, 2, 1, 1), (2, 1, 1, 1), (1, 1), (0, 0), {}),
    ],
)
def test_conv_transpose_matches_float64(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    size: tuple[int, int],
    crop: tuple[int, int],
    geometry: dict[str, Any],
    biased: bool,
    dtype: torch.dtype,
) -> None:
    input, weight = normal(shape, dtype), normal(kernel, dtype, 1)
    classes = kernel[1] * geometry.get("groups", 1)
    bias = normal((classes,), dtype, 2) if biased else None
    z = eager_conv_transpose(
        input.double(), weight.double(), size, None if bias is None else bias.double(),
        crop=crop, **geometry,
    )  # fmt: skip
    largest = max(input.abs().max().item(), z.abs().max().item())
    for label_dtype in (torch.uint8, torch.int32, torch.int64):
        result = fcnseg.conv_transpose_argmax(
            input, weight, size, bias, crop=crop, dtype=label_dtype, **geometry
        )
        assert result.dtype == label_dtype and result.is_contiguous()
        assert_labels(result, z, largest)


def test_conv_transpose_ties_and_strides() -> None:
    input, weight = normal((2, 3, 4, 5)), normal((3, 2, 4, 4), seed=1).repeat_interleave(2, dim=1)
    expected = fcnseg.conv_transpose_argmax(input, weight, (8, 10), stride=2, padding=1)
    assert (expected % 2 == 0).all()
    for x, w in (
        (input.contiguous(memory_format=torch.channels_last), weight),
        (input, weight.transpose(2, 3).contiguous().transpose(2, 3)),
    ):
        result = fcnseg.conv_transpose_argmax(x, w, (8, 10), stride=2, padding=1)
        assert (result % 2 == 0).all()
        assert (result == expected).float().mean() > 0.99
