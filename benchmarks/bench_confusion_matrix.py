"""Confusion matrix on the CPU against torch.bincount, NumPy and torchmetrics.

    python -m pytest benchmarks/bench_confusion_matrix.py -s

2 x 1024 x 2048 pixels, 19 classes: `map` is made of blocks of 24 pixels with one prediction in ten
random, `noise` is random. Equality is checked first; the ratios are of medians.
"""

import importlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import fcnseg

CLASSES, IGNORED, SHAPE = 19, 255, (2, 1024, 2048)
_medians: dict[tuple[str, str, int, str], float] = {}


def label_maps(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(CLASSES, SHAPE, generator=random)
    n, height, width = SHAPE
    if kind == "noise":
        target = torch.randint(CLASSES, SHAPE, generator=random)
        return noise.to(dtype), target.to(dtype)
    blocks = torch.randint(CLASSES, (n, height // 24 + 1, width // 24 + 1), generator=random)
    target = blocks.repeat_interleave(24, 1).repeat_interleave(24, 2)[:, :height, :width]
    prediction = torch.where(torch.rand(SHAPE, generator=random) < 0.1, noise, target)
    return prediction.to(dtype), target.to(dtype).contiguous()


def fused(prediction: Tensor, target: Tensor) -> Tensor:
    return fcnseg.confusion_matrix(prediction, target, CLASSES, ignore_index=IGNORED)


def bincount(prediction: Tensor, target: Tensor) -> Tensor:
    kept = target != IGNORED
    bins = target[kept].long() * CLASSES + prediction[kept]
    return torch.bincount(bins, minlength=CLASSES**2).view(CLASSES, CLASSES)


def numpy(prediction: Tensor, target: Tensor) -> Tensor:
    p, t = prediction.numpy(), target.numpy()
    kept = t != IGNORED
    bins = t[kept].astype(np.int64) * CLASSES + p[kept]
    return torch.from_numpy(np.bincount(bins, minlength=CLASSES**2)).view(CLASSES, CLASSES)


def torchmetrics(prediction: Tensor, target: Tensor) -> Tensor:
    try:
        module = importlib.import_module("torchmetrics.functional.classification")
    except ImportError:
        pytest.skip("needs torchmetrics")
    count = module.multiclass_confusion_matrix
    return count(prediction, target, CLASSES, ignore_index=IGNORED, validate_args=False)


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    each.__name__: each for each in (fused, bincount, numpy, torchmetrics)
}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["uint8", "int64"])
@pytest.mark.parametrize("kind", ["map", "noise"])
def test_confusion_matrix(benchmark, kind: str, dtype: str, threads: int, method: str) -> None:
    maps = label_maps(kind, getattr(torch, dtype))
    assert torch.equal(METHODS[method](*maps), fused(*maps))
    benchmark.pedantic(METHODS[method], maps, rounds=7, warmup_rounds=1)
    if benchmark.stats is not None:  # None with --benchmark-disable
        _medians[kind, dtype, threads, method] = benchmark.stats.stats.median
        ours = _medians.get((kind, dtype, threads, "fused"))
        if ours is not None:
            median = _medians[kind, dtype, threads, method]
            print(
                f"\n{kind} {dtype}, {threads} threads, {method}: "
                f"{median * 1e3:.2f} ms, {median / ours:.1f} x fused"
            )
