"""ConfusionMatrix (the module) and the scores of a matrix."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracles import bincount_matrix, labels, normal

import fcnseg
from fcnseg import ConfusionMatrix, _ops
from fcnseg.metrics import scores


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    prediction = labels((2, 9, 11), 4, torch.uint8, seed=seed)
    return prediction, labels((2, 9, 11), 4, torch.uint8, ignore=255, seed=seed + 100)


def filled(seed: int = 0) -> ConfusionMatrix:
    metric = ConfusionMatrix(4, ignore_index=255)
    metric.update(*batch(seed))
    return metric


def test_update_adds_labels() -> None:
    metric = ConfusionMatrix(4, ignore_index=255)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for seed in range(3):
        prediction, target = batch(seed)
        assert metric.update(prediction, target) is None
        expected += bincount_matrix(prediction, target, 4, 255)
    assert torch.equal(metric.compute(), expected)


def test_update_upsamples_logits() -> None:
    logits = normal((2, 4, 3, 4)).requires_grad_()
    _, target = batch()
    metric = ConfusionMatrix(4, ignore_index=255)
    metric.update(logits, target)
    prediction = fcnseg.upsample_argmax(logits, target.shape[1:])
    assert torch.equal(metric.compute(), bincount_matrix(prediction, target, 4, 255))
    assert not metric.matrix.requires_grad


def test_calling_the_module_updates_it() -> None:
    metric = ConfusionMatrix(4, ignore_index=255)
    metric(*batch())
    assert torch.equal(metric.compute(), filled().compute())


def test_compute_copies() -> None:
    metric = filled()
    computed = metric.compute()
    computed.zero_()
    assert metric.matrix.sum() > 0
    assert metric.compute().dtype == torch.int64


def test_reset() -> None:
    metric = filled()
    matrix = metric.matrix
    metric.reset()
    assert metric.compute().sum() == 0
    assert metric.matrix is matrix  # still the buffer that others may hold


def test_bad_update_counts_nothing() -> None:
    metric = filled()
    before = metric.compute()
    prediction, target = batch(1)
    target[1, 2, 3] = 77
    with pytest.raises(IndexError, match=r"target holds 1 value .* 77 at position \(1, 2, 3\)"):
        metric.update(prediction, target)
    with pytest.raises(IndexError, match="77 at position"):
        metric.update(normal((2, 4, 3, 4)), target)
    assert torch.equal(metric.compute(), before)


def test_update_checks_its_arguments() -> None:
    metric = ConfusionMatrix(3)
    target = torch.zeros(2, 6, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="matrix must have one row per class of prediction, 4"):
        metric.update(normal((2, 4, 3, 3)), target)
    with pytest.raises(ValueError, match="prediction must have the target's shape"):
        metric.update(target[:1], target)
    with pytest.raises(TypeError, match="prediction must be a tensor, got list"):
        metric.update([0], target)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target must have the batch size of prediction"):
        metric.update(normal((1, 3, 3, 3)), target)


def test_merge_state() -> None:
    first, second, third = filled(0), filled(1), filled(2)
    expected = first.compute() + second.compute() + third.compute()
    second_before = second.compute()
    assert first.merge_state(metric for metric in (second, third)) is first
    assert torch.equal(first.compute(), expected)
    assert torch.equal(second.compute(), second_before)


def test_merge_state_refuses_another_number_of_classes() -> None:
    metric = filled()
    before = metric.compute()
    with pytest.raises(ValueError, match="num_classes 4, got 5"):
        metric.merge_state([filled(1), ConfusionMatrix(5)])
    assert torch.equal(metric.compute(), before)  # nothing was added by halves


def test_state_dict_round_trip(tmp_path: Path) -> None:
    metric = filled()
    assert set(metric.state_dict()) == {"matrix", "invalid"}
    torch.save(metric.state_dict(), tmp_path / "metric.pt")
    restored = ConfusionMatrix(4, ignore_index=255)
    restored.load_state_dict(torch.load(tmp_path / "metric.pt", weights_only=True))
    assert torch.equal(restored.compute(), metric.compute())
    restored.update(*batch(1))
    assert torch.equal(restored.compute(), metric.compute() + filled(1).compute())


def test_cuda_policy_counts_invalid_pixels_until_compute() -> None:
    # The implementation for CUDA builds without the extension, plain PyTorch, on CPU tensors.
    metric = ConfusionMatrix(4, ignore_index=255)
    prediction, target = batch()
    prediction[0, 0, :2] = 9
    target[0, 0, :2] = torch.tensor([1, 255])  # the second one is ignored, so not invalid
    target[1, 3, 3] = 8
    _ops._confusion_matrix_reference_cuda(metric.matrix, prediction, target, 255, metric.invalid)
    keep = (prediction < 4) & ((target < 4) | (target == 255))
    expected = bincount_matrix(prediction[keep], target[keep], 4, 255)
    assert torch.equal(metric.matrix, expected)
    with pytest.raises(IndexError, match=r"2 counted pixels had a .* outside \[0, 4\)"):
        metric.compute()
    other = ConfusionMatrix(4).merge_state([metric])
    with pytest.raises(IndexError, match="2 counted pixels"):
        other.compute()
    metric.reset()
    assert metric.compute().sum() == 0


def _sync_in_process(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    metric = filled(rank)
    metric.sync()
    torch.save(metric.state_dict(), f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_sync_sums_over_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_sync_in_process, args=(str(tmp_path),), nprocs=2)
    expected = filled(0).compute() + filled(1).compute()
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(state["matrix"], expected)


def test_sync_alone_does_nothing() -> None:
    metric = filled()
    before = metric.compute()
    metric.sync()
    assert torch.equal(metric.compute(), before)


def test_scores() -> None:
    matrix = torch.tensor([[5, 1, 0, 0], [2, 6, 0, 2], [0, 0, 0, 0], [1, 0, 0, 3]])
    result = scores(matrix)
    nan = math.nan
    torch.testing.assert_close(
        result.iou, torch.tensor([5 / 9, 6 / 11, nan, 3 / 6]).double(), equal_nan=True
    )
    torch.testing.assert_close(
        result.dice, torch.tensor([10 / 14, 12 / 17, nan, 6 / 9]).double(), equal_nan=True
    )
    torch.testing.assert_close(
        result.accuracy, torch.tensor([5 / 6, 6 / 10, nan, 3 / 4]).double(), equal_nan=True
    )
    assert result.mean_iou == pytest.approx((5 / 9 + 6 / 11 + 3 / 6) / 3)
    assert result.mean_dice == pytest.approx((10 / 14 + 12 / 17 + 6 / 9) / 3)
    assert result.mean_accuracy == pytest.approx((5 / 6 + 6 / 10 + 3 / 4) / 3)
    assert result.pixel_accuracy == pytest.approx(14 / 20)
    assert result.frequency_weighted_iou == pytest.approx((6 * 5 / 9 + 10 * 6 / 11 + 4 / 2) / 20)


def test_scores_of_a_class_that_is_only_predicted() -> None:
    result = scores(torch.tensor([[3, 1], [0, 0]]))
    assert result.iou.tolist() == [0.75, 0.0]  # a union of 1: it counts
    assert result.mean_iou == 0.375
    assert result.accuracy[0] == 0.75 and result.accuracy[1].isnan()
    assert result.mean_accuracy == 0.75
    assert result.frequency_weighted_iou == 0.75


def test_scores_of_nothing() -> None:
    result = scores(torch.zeros(3, 3, dtype=torch.int64))
    assert result.iou.isnan().all() and result.dice.isnan().all() and result.accuracy.isnan().all()
    for name in (
        "mean_iou", "mean_dice", "mean_accuracy", "pixel_accuracy", "frequency_weighted_iou"
    ):  # fmt: skip
        assert math.isnan(getattr(result, name)), name


def test_scores_do_not_overflow_or_change_the_matrix() -> None:
    matrix = torch.full((2, 2), 2**60, dtype=torch.int64)
    result = scores(matrix)
    assert result.mean_iou == pytest.approx(1 / 3)
    assert (matrix == 2**60).all()
