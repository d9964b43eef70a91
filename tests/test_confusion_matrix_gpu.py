"""The CUDA C++ confusion matrix on a CUDA device, through the public functions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from oracles import bincount_matrix
from torch import Tensor

import fcnseg
from fcnseg import ConfusionMatrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available()
        or fcnseg.build_info()["operators"]["confusion_matrix_"]["cuda"] != "cuda",
        reason="needs a CUDA device and a build for it",
    ),
]

DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def maps(
    shape: tuple[int, ...], num_classes: int, *dtypes: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Runs of 24 pixels, one prediction in ten random; true pixels of 255 if no class is."""
    random = torch.Generator("cuda").manual_seed(seed)
    size = torch.Size(shape).numel()

    def draw(count: int) -> Tensor:
        return torch.randint(num_classes, (count,), generator=random, device="cuda")

    target = draw(size // 24 + 1).repeat_interleave(24)[:size]
    wrong = torch.rand(size, generator=random, device="cuda") < 0.1
    prediction = torch.where(wrong, draw(size), target)
    if num_classes <= 255:
        target[torch.rand(size, generator=random, device="cuda") < 0.1] = 255
    prediction_dtype, target_dtype = dtypes or (torch.int64, torch.int64)
    return prediction.to(prediction_dtype).view(shape), target.to(target_dtype).view(shape)


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    fcnseg.confusion_matrix(*maps((4, 4), 2), 2, ignore_index=255)  # what the first call sets up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("prediction", "target"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("num_classes", [2, 19, 150])
def test_every_pair_of_dtypes(
    num_classes: int, prediction: torch.dtype, target: torch.dtype
) -> None:
    pair = maps((3, 301, 299), num_classes, prediction, target)
    expected = bincount_matrix(*pair, num_classes, 255)
    assert torch.equal(fcnseg.confusion_matrix(*pair, num_classes, ignore_index=255), expected)
    fcnseg.check_labels()


# 27 and 28: eight tables or one; 113 and on: more shared memory than without opting in; 4096:
# global memory.
@pytest.mark.parametrize("num_classes", [2, 3, 19, 27, 28, 110, 113, 150, 200, 242, 300, 4096])
def test_class_counts(num_classes: int) -> None:
    pair = maps((2, 512, 1024), num_classes)
    expected = bincount_matrix(*pair, num_classes, 255 if num_classes <= 255 else -100)
    matrix = fcnseg.confusion_matrix(
        *pair, num_classes, ignore_index=255 if num_classes <= 255 else -100
    )
    assert torch.equal(matrix, expected)
    fcnseg.check_labels()


@pytest.mark.parametrize(("prediction", "target"), [(torch.uint8, torch.int64), (torch.uint8,) * 2])
def test_unaligned_starts_and_sizes(prediction: torch.dtype, target: torch.dtype) -> None:
    p, t = maps((10_000,), 19, prediction, target)
    for p_start, t_start, size in itertools.product((0, 1, 3), (0, 1, 7), (0, 1, 15, 17, 9_001)):
        pair = p[p_start : p_start + size], t[t_start : t_start + size]
        matrix = fcnseg.confusion_matrix(*pair, 19, ignore_index=255)
        assert torch.equal(matrix, bincount_matrix(*pair, 19, 255))


def test_strides() -> None:
    p, t = maps((3, 33, 65), 19)
    expected = bincount_matrix(p, t, 19, 255)
    for pair in (
        (p.mT.contiguous().mT, t),
        (p.mT.contiguous().mT, t.mT.contiguous().mT),
        (p.repeat_interleave(2, 2)[..., ::2], t),
    ):
        assert torch.equal(fcnseg.confusion_matrix(*pair, 19, ignore_index=255), expected)
    matrix = torch.ones(19, 38, dtype=torch.int64, device="cuda")[:, ::2]
    fcnseg.confusion_matrix_(matrix, p, t, ignore_index=255)
    assert torch.equal(matrix, expected + 1)


@pytest.mark.parametrize("num_classes", [5, 150, 300])
def test_bad_labels_are_counted_and_left_out(num_classes: int) -> None:
    p, t = (labels.clone() for labels in maps((2, 50, 100), num_classes))
    t[t == 255] = 0
    expected_bad = [(0, 3, 7), (1, 0, 0), (1, 20, 1), (1, 20, 2), (1, 49, 99)]
    p[0, 3, 7], t[1, 0, 0], t[1, 49, 99] = num_classes, -1, 2**32 + 1
    p[1, 20, 1], p[1, 20, 2] = 2**32 + 3, -1
    keep = torch.ones_like(t, dtype=torch.bool)
    for place in expected_bad:
        keep[place] = False
    expected = bincount_matrix(p[keep], t[keep], num_classes, -100)
    matrix = fcnseg.confusion_matrix(p, t, num_classes)
    assert torch.equal(matrix, expected)
    message = rf"holds 5 values .* first is {num_classes} at position \(0, 3, 7\)"
    with pytest.raises(IndexError, match=message):
        fcnseg.check_labels()
    metric = ConfusionMatrix(num_classes, device="cuda")
    metric.update(p, t)
    metric.update(p, t)
    assert torch.equal(metric.matrix, 2 * expected)
    with pytest.raises(IndexError, match=r"10 counted pixels had a prediction or target outside"):
        metric.compute()


# A thread walks down a picture; rows that are no whole vectors, that are longer than all threads
# reach, or of which there is one.
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 33, 2051), (1, 3, 300_000), (1, 1), (4_000, 17)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_widths(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pair = maps(shape, 19, dtype, dtype)
    expected = bincount_matrix(*pair, 19, 255)
    assert torch.equal(fcnseg.confusion_matrix(*pair, 19, ignore_index=255), expected)


@pytest.mark.parametrize("num_classes", [19, 150, 300])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_ignored_labels_that_no_byte_holds(num_classes: int, dtype: torch.dtype) -> None:
    p, t = maps((2, 301, 299), num_classes, dtype, dtype)
    t[t == 255] = -100
    t[1, 50:90] = -100
    matrix = fcnseg.confusion_matrix(p, t, num_classes)
    assert torch.equal(matrix, bincount_matrix(p, t, num_classes, -100))
    fcnseg.check_labels()


@pytest.mark.usefixtures("no_synchronisation")
@pytest.mark.parametrize("num_classes", [19, 150, 300])
def test_update_neither_waits_nor_allocates(num_classes: int) -> None:
    pair = maps((2, 256, 512), num_classes, torch.int64, torch.uint8)
    metric = ConfusionMatrix(num_classes, ignore_index=255, device="cuda")
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    metric.update(*pair)
    fcnseg.confusion_matrix_(metric.matrix, *pair, ignore_index=255)
    # The second call without `invalid` has three counters of its own; nothing else.
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before <= 1
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(metric.compute(), 2 * bincount_matrix(*pair, num_classes, 255))


@pytest.mark.parametrize("num_classes", [19, 150, 300])
def test_capture_and_replay(num_classes: int) -> None:
    p, t = maps((2, 256, 512), num_classes)
    metric = ConfusionMatrix(num_classes, ignore_index=255, device="cuda")
    metric.update(p, t)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metric.update(p, t)
    metric.reset()
    expected = torch.zeros_like(metric.matrix)
    for seed in (1, 2, 3):
        new_p, new_t = maps((2, 256, 512), num_classes, seed=seed)
        p.copy_(new_p)
        t.copy_(new_t)
        graph.replay()
        expected += bincount_matrix(p, t, num_classes, 255)
    assert torch.equal(metric.compute(), expected)


def test_runs_on_the_current_stream() -> None:
    p, t = maps((8, 1024, 1024), 19)
    metric = ConfusionMatrix(19, ignore_index=255, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        p.copy_(t.clamp(max=18))  # a launch on another stream would not see it
        metric.update(p, t)
    stream.synchronize()
    assert int(metric.matrix.sum()) == int(metric.matrix.diagonal().sum())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_device_of_the_tensors_need_not_be_current() -> None:
    pair = tuple(labels.to("cuda:1") for labels in maps((2, 100, 100), 150))
    with torch.cuda.device(0):
        matrix = fcnseg.confusion_matrix(*pair, 150, ignore_index=255)
        assert torch.cuda.current_device() == 0
    assert matrix.device == pair[0].device
    assert torch.equal(matrix, bincount_matrix(*pair, 150, 255))


@pytest.mark.slow
def test_more_than_2_to_the_31_pixels() -> None:
    size = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 3 * size:
        pytest.skip("needs 6.5 GB of the device's memory")
    t = torch.zeros(size, dtype=torch.uint8, device="cuda")
    p = torch.zeros(size, dtype=torch.uint8, device="cuda")
    t[-3:], p[-2:] = 1, 1
    assert fcnseg.confusion_matrix(p, t, 2).tolist() == [[size - 3, 0], [1, 2]]
    p[-1] = 7
    fcnseg.confusion_matrix(p, t, 2)
    with pytest.raises(IndexError, match=r"holds 1 value .* first is 7"):
        fcnseg.check_labels()
