"""fcnseg.confusion_matrix[_] and upsample_confusion_matrix[_] against torch.bincount."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import bincount_matrix, labels, normal
from torch import Tensor

import fcnseg
from fcnseg import _extension, _labels, _ops

LABELS = [torch.uint8, torch.int32, torch.int64]
PAIRS = list(itertools.product(LABELS, LABELS))


def maps(
    shape: tuple[int, ...],
    num_classes: int,
    prediction_dtype: torch.dtype = torch.int64,
    target_dtype: torch.dtype = torch.int64,
    ignore: int | None = 255,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    prediction = labels(shape, num_classes, prediction_dtype, seed=seed)
    return prediction, labels(shape, num_classes, target_dtype, ignore=ignore, seed=seed + 1)


@pytest.mark.parametrize(("prediction_dtype", "target_dtype"), PAIRS)
@pytest.mark.parametrize("num_classes", [1, 2, 19, 151])
@pytest.mark.parametrize("shape", [(7,), (2, 33, 17), (1, 1, 1), (0, 4, 4), (2, 2, 3, 5), ()])
def test_matches_bincount(
    shape: tuple[int, ...],
    num_classes: int,
    prediction_dtype: torch.dtype,
    target_dtype: torch.dtype,
) -> None:
    prediction, target = maps(shape, num_classes, prediction_dtype, target_dtype)
    expected = bincount_matrix(prediction, target, num_classes, 255)
    matrix = fcnseg.confusion_matrix(prediction, target, num_classes, ignore_index=255)
    assert matrix.dtype == torch.int64 and torch.equal(matrix, expected)
    ones = torch.ones_like(matrix)
    assert fcnseg.confusion_matrix_(ones, prediction, target, ignore_index=255) is ones
    assert torch.equal(ones, expected + 1)


def test_counts_many_pixels_with_any_number_of_threads() -> None:
    prediction, target = maps((3, 301, 299), 19, torch.uint8, torch.uint8)
    expected = bincount_matrix(prediction, target, 19, 255)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            matrix = fcnseg.confusion_matrix(prediction, target, 19, ignore_index=255)
            assert torch.equal(matrix, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("ignore_index", [0, 2])
def test_ignored_class_is_of_the_target_alone(ignore_index: int) -> None:
    prediction, target = maps((2, 20, 20), 3, ignore=None)
    matrix = fcnseg.confusion_matrix(prediction, target, 3, ignore_index=ignore_index)
    assert torch.equal(matrix, bincount_matrix(prediction, target, 3, ignore_index))
    assert matrix[ignore_index].sum() == 0 and matrix[:, ignore_index].sum() > 0


def test_predictions_at_ignored_pixels_may_be_anything() -> None:
    prediction, target = torch.tensor([0, 99, -5, 1]), torch.tensor([0, 255, 255, 0])
    matrix = fcnseg.confusion_matrix(prediction, target, 2, ignore_index=255)
    assert matrix.tolist() == [[1, 1], [0, 0]]


def test_everything_ignored() -> None:
    target = torch.full((2, 5, 7), 255, dtype=torch.uint8)
    assert fcnseg.confusion_matrix(target, target, 4, ignore_index=255).sum() == 0
    logits = normal((2, 4, 2, 3))
    assert fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255).sum() == 0


def test_strides_do_not_matter() -> None:
    prediction, target = maps((2, 9, 11), 5)
    expected = bincount_matrix(prediction, target, 5, 255)

    def layouts(tensor: Tensor) -> list[Tensor]:
        return [
            tensor,
            tensor.transpose(1, 2).contiguous().transpose(1, 2),
            tensor.repeat_interleave(2, dim=2)[:, :, ::2],
            F.pad(tensor, (2, 1, 1, 3))[:, 1:-3, 2:-1],
        ]

    for p, t in itertools.product(layouts(prediction), layouts(target)):
        assert torch.equal(fcnseg.confusion_matrix(p, t, 5, ignore_index=255), expected)
    p, t = prediction[:1].expand(2, -1, -1), target[:1].expand(2, -1, -1)
    matrix = fcnseg.confusion_matrix(p, t, 5, ignore_index=255)
    assert torch.equal(matrix, bincount_matrix(p, t, 5, 255))


def test_matrix_of_any_strides() -> None:
    prediction, target = maps((2, 9, 11), 5)
    expected = bincount_matrix(prediction, target, 5, 255)
    logits = normal((2, 5, 3, 4))
    streamed = bincount_matrix(fcnseg.upsample_argmax(logits, (9, 11)), target, 5, 255)
    for matrix in (
        torch.ones(5, 5, dtype=torch.int64).t(),
        torch.ones(9, 11, dtype=torch.int64)[2:7, 1::2],
        torch.ones(10, 5, dtype=torch.int64)[::2],
    ):
        fcnseg.confusion_matrix_(matrix, prediction, target, ignore_index=255)
        assert torch.equal(matrix, expected + 1)
        fcnseg.upsample_confusion_matrix_(matrix, logits, target, ignore_index=255)
        assert torch.equal(matrix, expected + streamed + 1)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from(PAIRS),
    st.sampled_from([None, 0, 255]),
    st.integers(0, 99),
)
def test_any_maps_match_bincount(
    shape: list[int],
    num_classes: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    ignore: int | None,
    seed: int,
) -> None:
    prediction, target = maps(tuple(shape), num_classes, *dtypes, ignore, seed)
    ignore_index = -100 if ignore is None else ignore
    matrix = fcnseg.confusion_matrix(prediction, target, num_classes, ignore_index=ignore_index)
    assert torch.equal(matrix, bincount_matrix(prediction, target, num_classes, ignore_index))


# -- bad labels --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prediction", "target"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_bad_label_raises_and_counts_nothing(name: str, contiguous: bool) -> None:
    given = dict(zip(("prediction", "target"), maps((2, 9, 11), 5, ignore=None), strict=True))
    given[name][1, 4, 7] = 5
    given[name][1, 8, 0] = -1
    if not contiguous:
        given = {key: map_.mT.contiguous().mT for key, map_ in given.items()}
    matrix = torch.ones(5, 5, dtype=torch.int64)
    expected = (
        rf"{name} holds 2 values outside \[0, 5\) and different from ignore_index; "
        r"the first is 5 at position \(1, 4, 7\)"
    )
    with pytest.raises(IndexError, match=expected):
        fcnseg.confusion_matrix_(matrix, **given)
    assert (matrix == 1).all()
    with pytest.raises(IndexError, match=expected):
        fcnseg.confusion_matrix(**given, num_classes=5)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.int64, 2**32 + 3),
        (torch.int64, -(2**32) + 3),
        (torch.int64, 2**63 - 1),
        (torch.int64, -(2**63)),
        (torch.int32, 2**31 - 1),
        (torch.int32, -(2**31)),
        (torch.uint8, 255),
        (torch.uint8, 156),  # -100, the default ignore_index, in 8 bits
    ],
)
def test_labels_are_compared_in_64_bits(dtype: torch.dtype, value: int) -> None:
    right = torch.zeros(1, 4, 4, dtype=dtype)
    wrong = right.clone()
    wrong[0, 3, 1] = value
    for pair in ((right, wrong), (wrong, right)):
        with pytest.raises(IndexError, match=rf"first is {value} at position \(0, 3, 1\)"):
            fcnseg.confusion_matrix(*pair, 5)
    logits = normal((1, 5, 2, 2))
    matrix = torch.ones(5, 5, dtype=torch.int64)
    with pytest.raises(IndexError, match=rf"first is {value} at position \(0, 3, 1\)"):
        fcnseg.upsample_confusion_matrix_(matrix, logits, wrong)
    assert (matrix == 1).all()
    with pytest.raises(IndexError, match=rf"first is {value} at position \(0, 3, 1\)"):
        fcnseg.upsample_confusion_matrix(logits, wrong)


def test_bad_label_among_many_pixels() -> None:
    prediction, target = maps((2, 400, 400), 5, torch.uint8, torch.uint8)
    target[1, 399, 399] = 7
    target[1, 20, 30] = 6
    target[0, 399, 1] = 5
    matrix = torch.zeros(5, 5, dtype=torch.int64)
    with pytest.raises(IndexError, match=r"3 values .* first is 5 at position \(0, 399, 1\)"):
        fcnseg.confusion_matrix_(matrix, prediction, target, ignore_index=255)
    assert (matrix == 0).all()


# -- what the CUDA implementation does with bad labels, on CPU tensors -----------------------------


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_labels, "_records", {})
    monkeypatch.delenv("FCNSEG_CHECK_LABELS", raising=False)


@pytest.mark.usefixtures("records")
def test_cuda_policy_leaves_bad_pixels_out_and_records_them() -> None:
    prediction, target = maps((2, 9, 11), 5)
    prediction[0, 1, 2], target[0, 1, 2] = 9, 0
    target[1, 0, 0] = -3
    keep = (prediction < 5) & ((target == 255) | ((target >= 0) & (target < 5)))
    matrix = torch.zeros(5, 5, dtype=torch.int64)
    _ops._confusion_matrix_reference_cuda(matrix, prediction, target, 255)
    assert torch.equal(matrix, bincount_matrix(prediction[keep], target[keep], 5, 255))
    with pytest.raises(IndexError, match=r"holds 2 values .* first is 9 at position \(0, 1, 2\)"):
        fcnseg.check_labels()
    fcnseg.check_labels()  # it was reset


@pytest.mark.usefixtures("records")
def test_cuda_policy_checks_at_once_if_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FCNSEG_CHECK_LABELS", "1")
    matrix = torch.zeros(2, 2, dtype=torch.int64)
    wrong, right = torch.tensor([0, 4, 1]), torch.tensor([0, 1, 1])
    _ops._confusion_matrix_reference_cuda(matrix, right, right, -100)
    with pytest.raises(IndexError, match="first is 4"):
        _ops._confusion_matrix_reference_cuda(matrix, wrong, right, -100)


@pytest.mark.usefixtures("records")
@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 2, 3), (2, 1, 2, 3)])
def test_record_takes_labels_of_any_rank(shape: tuple[int, ...]) -> None:
    matrix = torch.zeros(2, 2, dtype=torch.int64)
    wrong = torch.zeros(shape, dtype=torch.int64)
    wrong.view(-1)[-1] = 4
    _ops._confusion_matrix_reference_cuda(matrix, wrong, torch.zeros_like(wrong), -100)
    with pytest.raises(IndexError, match=r"1 value .* first is 4"):
        fcnseg.check_labels()


# -- straight from logits --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "size", "scale_factor"),
    [
        ((2, 5, 4, 6), (13, 17), None),
        ((1, 3, 1, 1), (5, 64), None),
        ((0, 3, 2, 2), (5, 6), None),
        ((2, 3, 9, 11), (4, 5), None),
        ((1, 19, 3, 2), (24, 16), 8),
        ((2, 3, 5, 7), (12, 12), (2.5, 1.75)),
    ],
)
@pytest.mark.parametrize("align_corners", [False, True])
def test_streamed_counts_are_those_of_the_labels(
    align_corners: bool,
    shape: tuple[int, ...],
    size: tuple[int, int],
    scale_factor: float | tuple[float, float] | None,
    dtype: torch.dtype,
) -> None:
    logits = normal(shape, dtype)
    options = {"align_corners": align_corners, "scale_factor": scale_factor}
    prediction = fcnseg.upsample_argmax(logits, size, **options)
    for label_dtype in LABELS:
        target = labels((shape[0], *size), shape[1], label_dtype, ignore=255)
        expected = bincount_matrix(prediction, target, shape[1], 255)
        matrix = fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255, **options)
        assert torch.equal(matrix, expected)
        ones = torch.ones_like(matrix)
        result = fcnseg.upsample_confusion_matrix_(
            ones, logits, target, ignore_index=255, **options
        )
        assert result is ones and torch.equal(ones, expected + 1)


def test_streamed_counts_of_strided_tensors() -> None:
    logits, target = normal((2, 5, 4, 6)), labels((2, 13, 17), 5, torch.uint8, ignore=255)
    expected = fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255)
    for x in (
        logits.contiguous(memory_format=torch.channels_last),
        logits.repeat_interleave(2, dim=3)[..., ::2],
        logits.transpose(0, 3).contiguous().transpose(0, 3),
    ):
        for t in (target, target.mT.contiguous().mT, target.repeat_interleave(2, 2)[..., ::2]):
            assert torch.equal(fcnseg.upsample_confusion_matrix(x, t, ignore_index=255), expected)


def test_streamed_counts_need_no_gradient() -> None:
    logits = normal((2, 5, 4, 6)).requires_grad_()
    target = labels((2, 8, 8), 5)
    assert not fcnseg.upsample_confusion_matrix(logits, target).requires_grad


# -- NumPy -----------------------------------------------------------------------------------------


@pytest.mark.skipif(_extension.pybind is None, reason="fcnseg._pybind was not built")
@pytest.mark.parametrize(("prediction_dtype", "target_dtype"), PAIRS)
def test_numpy_entry_point_equals_the_operator(
    prediction_dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    prediction, target = maps((2, 9, 11), 5, prediction_dtype, target_dtype)
    assert _extension.pybind is not None
    matrix, report = _extension.pybind.confusion_matrix(
        prediction.numpy(), target.numpy(), 5, ignore_index=255
    )
    assert matrix.dtype == np.int64 and report[0] == 0
    expected = fcnseg.confusion_matrix(prediction, target, 5, ignore_index=255)
    assert np.array_equal(matrix, expected.numpy())


@pytest.mark.skipif(_extension.pybind is None, reason="fcnseg._pybind was not built")
def test_numpy_entry_point_reports_bad_labels() -> None:
    assert _extension.pybind is not None
    count = _extension.pybind.confusion_matrix
    right = np.array([0, 1, 1, 0])
    wrong = np.array([0, 1, 7, -1])
    assert count(right, wrong, 2)[1] == (2, 2, 7, 0)
    assert count(wrong, right, 2)[1] == (2, 2, 7, 1)
    with pytest.raises(ValueError, match="same number of elements, got 3 and 4"):
        count(right[:3], right, 2)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        count(right, right, 0)
    with pytest.raises(TypeError):
        count(right.astype(np.float32), right, 2)
