"""The Triton kernels in Triton's interpreter, against the float64 reference.

``test_triton.py`` runs this file in a process of its own: TRITON_INTERPRET is read when triton is
imported, and nothing can be compiled afterwards. An inner iteration takes milliseconds whatever its
width, so sizes are small.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import torch
import triton_interpreter
from kernel_cases import GEOMETRIES, LAYOUTS, PLAIN, Geometry, lay_out
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fcnseg import reference
from fcnseg.kernels import (
    common,
    upsample_confusion_matrix,
    upsample_cross_entropy,
)
from fcnseg.kernels.bad_labels import record_bad_labels
from fcnseg.kernels.upsample_argmax import upsample_argmax_forward
from fcnseg.kernels.upsample_confusion_matrix import upsample_confusion_matrix_forward_
from fcnseg.kernels.upsample_cross_entropy import (
    upsample_cross_entropy_backward,
    upsample_cross_entropy_forward,
    upsample_cross_entropy_gradient,
)

triton_interpreter.prepare()


def make_record() -> Tensor:
    return torch.zeros(5, dtype=torch.int64)


def loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str,
    smoothing: float, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both passes: loss, and the float32 gradient of a scalar reduction (else empty)."""
    args = (ignore_index, reduction, smoothing, *rest)
    loss, sums, edges = upsample_cross_entropy_forward(logits, target, weight, *args)
    if sums.numel() == 0:
        assert edges.numel() == 0 or logits.shape[0] == 0
        return loss, sums
    options = (target.shape[1:], weight is not None, smoothing, *rest[:3])
    gradient = torch.full_like(sums, math.nan)
    upsample_cross_entropy_gradient(torch.tensor(1.0), sums, edges, gradient, *options)
    return loss, gradient


def make_case(
    N: int, C: int, h: int, w: int, H: int, W: int, dtype: torch.dtype = torch.float32,
    spread: float = 2.0, labels: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    torch.manual_seed(N + C + h + w + H + W)
    logits = (torch.randn(N, C, h, w) * spread).to(dtype)
    target = torch.randint(0, min(C, 255), (N, H, W))
    target[torch.rand(N, H, W) < 0.1] = 255
    return logits, target.to(labels)


def close(actual: Tensor, expected: Tensor, eager: Tensor) -> None:
    """No worse than eager in the same arithmetic, plus rounding."""
    assert actual.shape == expected.shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    error = (actual.double() - expected).abs().max().item() if expected.numel() else 0.0
    eager_error = (eager.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= eager_error + 2e-6 * scale


def check_loss(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
    smoothing: float = 0.0, geometry: Geometry = PLAIN, ignore_index: int = 255,
) -> None:  # fmt: skip
    args: tuple[Any, ...] = (ignore_index, reduction, smoothing, *geometry)
    record = make_record()
    wide = logits.double(), target, None if weight is None else weight.double()
    flat = logits.float(), target, weight
    loss, gradient = loss_and_gradient(logits, target, weight, *args, True, record)
    expected = reference.upsample_cross_entropy(*wide, *args, True)
    eager = reference.upsample_cross_entropy(*flat, *args, True)
    assert loss.dtype == torch.float32
    close(loss, expected[0], eager[0])
    if reduction != "none":
        assert gradient.dtype == torch.float32
        assert gradient.stride() == torch.empty_like(logits).stride()
        close(gradient, expected[1], eager[1])
        loss_alone, empty = loss_and_gradient(logits, target, weight, *args, False, record)
        assert empty.numel() == 0
        close(loss_alone, expected[0], eager[0])
    else:
        upstream = torch.randn(target.shape)
        args = (ignore_index, smoothing, *geometry)
        gradient = upsample_cross_entropy_backward(upstream, logits, target, weight, *args, record)
        expected_gradient = reference.upsample_cross_entropy_backward(
            upstream.double(), *wide, *args
        )
        eager_gradient = reference.upsample_cross_entropy_backward(upstream, *flat, *args)
        assert gradient.dtype == logits.dtype
        close(gradient, expected_gradient, eager_gradient.to(logits.dtype))
    assert not record.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_options(reduction: str, smoothing: float, weighted: bool) -> None:
    logits, target = make_case(2, 5, 3, 4, 24, 32)
    check_loss(logits, target, torch.rand(5) if weighted else None, reduction, smoothing)


@pytest.mark.parametrize(("sizes", "geometry"), GEOMETRIES)
def test_geometry(sizes: tuple[int, int, int, int], geometry: Geometry) -> None:
    logits, target = make_case(1, 3, *sizes)
    check_loss(logits, target, geometry=geometry)
    size = target.shape[1:]
    z = reference.upsample(logits.double(), size, *geometry)
    label = upsample_argmax_forward(logits, size, *geometry, torch.int64)
    picked = z.gather(1, label[:, None])[:, 0]
    assert (z.amax(1) - picked).max() <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("labels", [torch.uint8, torch.int32])
def test_dtypes(dtype: torch.dtype, labels: torch.dtype) -> None:
    logits, target = make_case(1, 4, 3, 3, 24, 24, dtype, labels=labels)
    check_loss(logits, target)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 4, 31, 32])
def test_number_of_classes(num_classes: int) -> None:
    logits, target = make_case(1, num_classes, 1, 2, 4, 9)
    check_loss(logits, target)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_labels_of_more_than_8_bits(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upsample_cross_entropy, "label_bits", lambda num_classes: 9)
    check_loss(*make_case(1, 5, 2, 3, 15, 24), reduction=reduction)  # 8 rows and 7
    check_loss(*make_case(1, 5, 3, 2, 3, 19), reduction=reduction)  # one row, strips


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_offsets_of_64_bits(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upsample_cross_entropy, "needs_64_bits", lambda *_: True)
    check_loss(*make_case(1, 3, 2, 3, 16, 24), reduction=reduction)


@pytest.mark.parametrize("columns", [33, 35, 39])
def test_lanes_reach_far_beyond_their_cells_at_the_limit_of_the_guard(columns: int) -> None:
    # cells of up to 5, 6 or 7 columns in lanes of 8, samples as far apart as the guard allows:
    # powers past the cell are huge, and meet factors of 0
    torch.manual_seed(columns)
    logits = torch.where(torch.rand(1, 5, 4, 7) < 0.5, -16.0, 16.0)
    target = torch.randint(0, 5, (1, 26, columns))
    check_loss(logits, target)
    check_loss(logits, target, reduction="sum")


def test_one_class_is_exactly_zero() -> None:
    logits = torch.randn(1, 1, 2, 2)
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    loss, gradient = loss_and_gradient(
        logits, target, torch.rand(1), 255, "mean", 0.3, *PLAIN, True, make_record()
    )
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("spread", [8.0, 100.0])
def test_large_spread_takes_the_plain_path(spread: float, reduction: str) -> None:
    logits, target = make_case(1, 4, 2, 3, 12, 18, spread=spread)
    check_loss(logits, target, torch.rand(4), reduction, 0.1)


@pytest.mark.parametrize("rows", [2, 3, 8])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bands_of_cell_rows(rows: int, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upsample_cross_entropy, "choose_band", lambda *_: rows)
    # seven cell rows; both paths; lanes of several bands in a program, and borders between programs
    logits, target = make_case(1, 3, 6, 16, 12, 33)
    logits[0, :, 4:, 3] *= 30
    check_loss(logits, target, reduction=reduction)
    check_loss(*make_case(1, 3, 1, 1, 5, 30), reduction=reduction)


@pytest.mark.parametrize(
    ("images", "h", "w", "cells"),
    [(16, 96, 96, 32), (8, 64, 64, 32), (2, 64, 128, 16), (1, 1, 1, 1), (1000, 128, 256, 32)],
)
def test_bands_keep_the_schedulers_busy(images: int, h: int, w: int, cells: int) -> None:
    rows = upsample_cross_entropy.choose_band(images, h, w, cells, 132)
    schedulers = 4 * 132

    def programs(rows: int) -> int:
        return math.ceil(images * math.ceil((h + 1) / rows) * (w + 1) / cells)

    # rows that the fullest scheduler walks, against an even share of all of them
    fullest = math.ceil(programs(rows) / schedulers) * rows
    share = programs(1) / schedulers
    assert fullest <= max(1.35 * share, share + 3)
    # what is staged is at most a third of the gradient, where the programs fill the device
    assert rows >= 3 or programs(1) <= schedulers


@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("ignore_index", [-100, 255, 2])
def test_ignored_value(target_dtype: torch.dtype, ignore_index: int) -> None:
    logits, target = make_case(1, 4, 2, 2, 8, 8)
    target[target == 255] = 2 if ignore_index == -100 else ignore_index
    check_loss(logits, target.to(target_dtype), ignore_index=ignore_index)


class Launches:
    """Stands for kernels: counts their launches and runs nothing."""

    count = 0

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        self.count += 1


class Allocations(TorchDispatchMode):
    """Adds up the bytes of the tensors made inside."""

    size = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if str(function).startswith("aten.empty"):
            self.size += out.numel() * out.element_size()
        return out


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    launches = Launches()
    for module, names in (
        (
            upsample_cross_entropy,
            ("_upsample_cross_entropy_kernel", "_loss_kernel", "_gradient_kernel"),
        ),
        (upsample_confusion_matrix, ("_upsample_confusion_matrix_kernel", "_gather_kernel")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, launches)
    return launches


@pytest.mark.parametrize(("N", "C", "h", "factor"), [(16, 19, 96, 8), (8, 150, 64, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_is_a_hundredth_of_eager(
    N: int, C: int, h: int, factor: int, dtype: torch.dtype, launches: Launches
) -> None:
    logits = torch.empty(N, C, h, h, dtype=dtype)
    target = torch.empty(N, h * factor, h * factor, dtype=torch.int64)
    size = tuple(target.shape[1:])
    with Allocations() as forward:
        _, sums, edges = upsample_cross_entropy_forward(
            logits, target, None, 255, "mean", 0.0, *PLAIN, True, make_record()
        )
    assert launches.count == 2
    with Allocations() as backward:
        # As autograd does: float32 gradients take the place of the sums.
        out = sums if dtype == torch.float32 else torch.empty_like(logits)
        options = (size, False, 0.0, *PLAIN)
        upsample_cross_entropy_gradient(torch.empty(()), sums, edges, out, *options)
    assert launches.count == 3
    # Eager holds the upsampled logits, their log-softmax and its gradient, here in float32. A
    # float32 tensor of the logits' size is 4 / 768 of that.
    eager = 3 * 4 * target.numel() * C
    kept = 4 * (sums.numel() + edges.numel())
    assert 4 * logits.numel() <= kept <= forward.size
    assert max(forward.size, kept + backward.size) <= 0.01 * eager


def test_launches(launches: Launches) -> None:
    """Two for every loss, and one for the gradient of a scalar one."""
    logits, target = make_case(1, 40, 2, 2, 8, 8)
    record = make_record()
    upsample_cross_entropy_forward(logits, target, None, 255, "none", 0.0, *PLAIN, True, record)
    assert launches.count == 2
    upsample_cross_entropy_backward(
        torch.ones(1, 8, 8), logits, target, None, 255, 0.0, *PLAIN, record
    )
    assert launches.count == 4
    for num_classes in (5, 40):
        matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        upsample_confusion_matrix_forward_(
            matrix, logits[:, :num_classes], target, 255, *PLAIN, record, None
        )
    assert launches.count == 8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # bfloat16 is truncated here
def test_gradient_is_scaled_and_rounded_once(layout: str, dtype: torch.dtype) -> None:
    logits, target = lay_out(layout, *make_case(2, 37, 3, 4, 12, 16, dtype))
    loss = (logits, target, None, 255, "mean", 0.0, *PLAIN, True, make_record())
    _, sums, edges = upsample_cross_entropy_forward(*loss)
    options = ((12, 16), False, 0.0, *PLAIN)
    once, scaled = torch.empty_like(sums), torch.empty_like(logits)
    upsample_cross_entropy_gradient(torch.tensor(1.0), sums, edges, once, *options)
    before = sums.clone()
    upsample_cross_entropy_gradient(torch.tensor(65536.0), sums, edges, scaled, *options)
    # not (once rounded) x 65536: 1e-7 is no float16
    assert torch.equal(scaled, (once * 65536.0).to(dtype))
    assert torch.equal(sums, before)
    upsample_cross_entropy_gradient(torch.tensor(-3.0), sums, edges, sums, *options)
    assert torch.equal(sums, once * -3.0)


def test_both_paths_agree_at_the_limit_of_the_guard() -> None:
    logits, target = make_case(1, 4, 3, 3, 24, 24)
    logits = logits.clamp(-16, 16)
    logits[0, :, 1] = torch.tensor([16.0, -16.0, 16.0, -16.0])[:, None]
    logits[0, :, 2] = -logits[0, :, 1]  # a spread of exactly 32
    check_loss(logits, target)
    check_loss(logits * 1.001, target)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str) -> None:
    check_loss(*lay_out(layout, *make_case(2, 4, 3, 4, 24, 32)))


def test_ignore_index_may_be_a_class() -> None:
    logits, target = make_case(1, 4, 3, 3, 24, 24)
    target[target == 255] = 2
    check_loss(logits, target, ignore_index=2)


def test_all_ignored_and_empty_batch() -> None:
    logits, target = make_case(1, 3, 2, 2, 8, 8)
    target.fill_(255)
    for reduction, value in (("mean", math.nan), ("sum", 0.0)):
        for batch in (1, 0):
            loss, gradient = loss_and_gradient(
                logits[:batch], target[:batch], None, 255, reduction, 0.0, *PLAIN, True,
                make_record(),
            )  # fmt: skip
            torch.testing.assert_close(loss.item(), value, equal_nan=True)
            assert gradient.shape == logits[:batch].shape
            assert not gradient.any()
    assert upsample_argmax_forward(logits[:0], (8, 8), *PLAIN, torch.uint8).shape == (0, 8, 8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("spread", [2.0, 100.0])
def test_mean_of_pixels_that_weigh_nothing(spread: float, smoothing: float) -> None:
    logits, target = make_case(1, 3, 3, 3, 12, 12, spread=spread)
    target.clamp_(max=1)
    target[0, 7, 3] = 255
    args = (255, "mean", smoothing, *PLAIN, True)
    for weight in (torch.tensor([0.0, 0.0, 1.0]), torch.zeros(3)):
        loss, gradient = loss_and_gradient(logits, target, weight, *args, make_record())
        expected = reference.upsample_cross_entropy(logits, target, weight, *args)
        for result in (loss, gradient, *expected):
            assert result.isnan().all()
    target[0, 1, 1] = 2  # one pixel is enough, if it weighs hardly anything
    check_loss(logits, target, torch.tensor([0.0, 0.0, 2.0**-60]), "mean", smoothing)
    loss, gradient = loss_and_gradient(
        logits, torch.full_like(target, 255), torch.zeros(3), *args, make_record()
    )
    assert loss.isnan()
    assert not gradient.any()


def test_bad_label_of_a_scalar_loss() -> None:
    logits, target = make_case(2, 3, 2, 2, 8, 8)
    target[1, 2, 5] = 2**32 + 1
    target[1, 7, 0] = -1
    record = make_record()
    args = (None, 255, "sum", 0.0, *PLAIN, True)
    loss, gradient = loss_and_gradient(logits, target, *args, record)
    assert loss.isnan()
    assert gradient.isnan().all()
    assert record.tolist() == [2, 2**32 + 1, 1, 2, 5]
    target[1, 2, 5] = 0
    loss_and_gradient(logits, target, *args, record)
    assert record.tolist() == [3, 2**32 + 1, 1, 2, 5]  # the first one stays


def test_bad_label_of_pixel_losses() -> None:
    logits, target = make_case(1, 3, 4, 4, 16, 16)
    target[0, 6, 7] = 3  # between samples 1 and 2, downwards and across
    record = make_record()
    loss, _ = loss_and_gradient(logits, target, None, 255, "none", 0.0, *PLAIN, True, record)
    assert loss.isnan().nonzero().tolist() == [[0, 6, 7]]
    assert record.tolist() == [1, 3, 0, 6, 7]
    gradient = upsample_cross_entropy_backward(
        torch.ones(1, 16, 16), logits, target, None, 255, 0.0, *PLAIN, record
    )
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1:3, 1:3] = True
    assert torch.equal(gradient.isnan(), expected.expand(1, 3, 4, 4))
    assert record.tolist() == [1, 3, 0, 6, 7]  # counted once


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_bad_labels_of_pytorch_expressions(dtype: torch.dtype) -> None:
    labels = torch.zeros(3, 7, 5, dtype=dtype).transpose(1, 2)  # [3, 5, 7]
    labels[1, 2, 6], labels[2, 4, 1] = 9, 8
    record, bad = make_record(), labels > 2
    for _ in range(2):
        record_bad_labels(record, labels, bad.sum(), bad.flatten().byte().argmax())
        record_bad_labels(record, labels, torch.tensor(0), torch.tensor(0))
    assert record.tolist() == [4, 9, 1, 2, 6]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [(0, 0), (1, 1), (1, 2), (2, 1)])
def test_not_finite_logits(value: float, position: tuple[int, int]) -> None:
    logits, target = make_case(1, 3, 3, 3, 12, 12)
    logits[0, 1, position[0], position[1]] = value
    args = (None, 255, "sum", 0.0, *PLAIN, True)
    loss, gradient = loss_and_gradient(logits, target, *args, make_record())
    eager = reference.upsample_cross_entropy(logits, target, *args)
    assert loss.isnan() or not eager[0].isnan()
    assert torch.equal(gradient.isnan(), eager[1].isnan())
    label = upsample_argmax_forward(logits, (12, 12), *PLAIN, torch.int64)
    assert torch.equal(label, reference.upsample_argmax(logits, (12, 12), *PLAIN, torch.int64))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_whose_sums_and_products_overflow(reduction: str) -> None:
    logits, target = make_case(1, 3, 2, 3, 12, 18)
    check_loss(torch.full_like(logits, 3e38), target, reduction=reduction)
    check_loss(torch.full_like(logits, -3e38), target, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_argmax_of_ties(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 2, 3, 3).repeat(1, 3, 1, 1)
    label = upsample_argmax_forward(logits, (24, 21), *PLAIN, dtype)
    expected = reference.upsample_argmax(logits, (24, 21), *PLAIN, dtype)
    assert label.dtype == dtype
    assert torch.equal(label, expected)
    assert label.max() <= 1


FLT_MAX = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    "values",
    [
        {(0, 2, 1, 1): math.nan, (0, 1, 2, 2): math.nan, (1, 0, 0, 0): math.inf},
        {(0, 3, 1, 1): math.inf, (0, 1, 1, 1): math.inf, (0, 2, 1, 2): -math.inf},
        {(0, c, 1, 1): -math.inf for c in range(4)},
        {(n, c, i, j): FLT_MAX for n in (0, 1) for c in (1, 3) for i in (0, 1) for j in (1, 2)},
        {(0, 1, 1, 1): FLT_MAX, (0, 2, 1, 1): FLT_MAX, (0, 1, 1, 2): -FLT_MAX},
    ],
    ids=["NaN", "inf", "-inf", "largest", "largest of both signs"],
)
def test_labels_of_logits_that_overflow(values: dict[tuple[int, ...], float]) -> None:
    logits, target = make_case(2, 4, 3, 3, 24, 24)  # weights that float32 holds exactly
    for index, value in values.items():
        logits[index] = value
    expected = reference.upsample_argmax(logits, (24, 24), *PLAIN, torch.int64)
    label = upsample_argmax_forward(logits, (24, 24), *PLAIN, torch.int64)
    assert torch.equal(label, expected)
    counted, matrix = torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.int64)
    reference.confusion_matrix_(counted, expected, target, 255)
    upsample_confusion_matrix_forward_(matrix, logits, target, 255, *PLAIN, make_record(), None)
    assert torch.equal(matrix, counted)


@pytest.mark.parametrize("num_classes", [5, 40])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("programs", [1, 3, 1584])
def test_confusion_matrix(
    num_classes: int, counted: bool, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few programs: runs of equal pairs go on from tile to tile."""
    monkeypatch.setattr(upsample_confusion_matrix, "residency", lambda _: (168, programs))
    monkeypatch.setattr(common, "multiprocessors", lambda device: 1)
    logits, target = make_case(2, num_classes, 3, 3, 12, 15)
    logits[0, 2] += 50.0
    target[0, :9] = 2
    target[1, 3, 4] = num_classes
    matrix = torch.ones(num_classes, num_classes, dtype=torch.int64).t()
    expected = matrix.clone()
    prediction = reference.upsample_argmax(logits, (12, 15), *PLAIN, torch.int64)
    reference.confusion_matrix_(expected, prediction, target, 255)
    record, invalid = make_record(), torch.ones(1, dtype=torch.int64) if counted else None
    upsample_confusion_matrix_forward_(matrix, logits, target, 255, *PLAIN, record, invalid)
    assert torch.equal(matrix, expected)
    assert record.tolist() == ([0] * 5 if counted else [1, num_classes, 1, 3, 4])
    assert invalid is None or invalid.item() == 2


def test_confusion_matrix_of_bad_labels() -> None:
    logits, target = make_case(2, 5, 3, 3, 24, 24)
    bad = torch.rand(target.shape) < 0.3
    target[bad] = 77
    record = make_record()
    matrix = torch.zeros(5, 5, dtype=torch.int64)
    upsample_confusion_matrix_forward_(matrix, logits, target, 255, *PLAIN, record, None)
    assert matrix.sum() == ((target != 77) & (target != 255)).sum()
    assert record.tolist() == [bad.sum().item(), 77, *bad.nonzero()[0].tolist()]


def test_largest_cell_is_exact() -> None:
    for samples, pixels, half in ((96, 768, 0.5), (7, 50, 0.5), (5, 35, 0.5), (96, 768, 0.0)):
        geo = common.geometry(samples, 1, pixels, 1, half == 0, None, None)
        y = torch.arange(pixels, dtype=torch.float64)
        cell = (geo.step_h * (y + half) - half).float().floor().clamp(-1, samples - 1)
        assert geo.cell_h == cell.unique(return_counts=True)[1].max()
