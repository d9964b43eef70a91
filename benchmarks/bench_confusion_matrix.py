"""confusion_matrix of two label maps against torch.bincount, NumPy and torchmetrics.

python benchmarks/bench_confusion_matrix.py [--cases CASE ...]     (see harness.py)

`map` is made of blocks of 24 pixels with one prediction in ten random, `noise` is random.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from clocks import device, time_case
from harness import Mode, Unavailable, Work, require_compiled
from torch import Tensor
from workers import main

import fcnseg

IGNORED = 255


@dataclass(frozen=True)
class Case:
    """Two label maps [N, H, W]."""

    dtype: torch.dtype
    noise: bool = False
    shape: tuple[int, int, int] = (2, 1024, 2048)
    classes: int = 19

    def inputs(self) -> tuple[Tensor, Tensor]:
        return label_maps(self, device())

    def tiny(self) -> Case:
        return dataclasses.replace(self, shape=(1, 16, 16))


@functools.lru_cache(maxsize=1)
def label_maps(case: Case, where: str) -> tuple[Tensor, Tensor]:
    """Nothing writes to them: the implementations share them."""
    options: dict[str, Any] = {"generator": torch.Generator(where).manual_seed(0), "device": where}
    (n, height, width), classes = case.shape, case.classes
    prediction = torch.randint(classes, case.shape, **options)
    if case.noise:
        target = torch.randint(classes, case.shape, **options)
    else:
        blocks = torch.randint(classes, (n, height // 24 + 1, width // 24 + 1), **options)
        target = blocks.repeat_interleave(24, 1).repeat_interleave(24, 2)[:, :height, :width]
        wrong = torch.rand(case.shape, **options) < 0.1
        prediction = torch.where(wrong, prediction, target)
    return prediction.to(case.dtype), target.to(case.dtype).contiguous()


CASES = {
    "map, uint8": Case(torch.uint8),
    "map, int64": Case(torch.int64),
    "noise, uint8": Case(torch.uint8, noise=True),
    "noise, int64": Case(torch.int64, noise=True),
    "map, 150 classes, int64": Case(torch.int64, classes=150),
}
SUMMARY = ["map, uint8", "map, int64"]
CUDA_CASES = {
    f"8x1024x2048, {name}": dataclasses.replace(CASES[name], shape=(8, 1024, 2048))
    for name in ("map, int64", "map, uint8", "noise, int64")
}
PEERS = ["eager", "compile", "numpy", "torchmetrics"]
MODES = [Mode("", [*PEERS, "fused"], list(CASES))]
MEMORY_CASES = list(CASES)


def bincount(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    kept = target != IGNORED
    bins = target[kept].long() * classes + prediction[kept]
    return torch.bincount(bins, minlength=classes**2).view(classes, classes)


def numpy_bincount(prediction: np.ndarray, target: np.ndarray, classes: int) -> np.ndarray:
    kept = target != IGNORED
    bins = target[kept].astype(np.int64) * classes + prediction[kept]
    return np.bincount(bins, minlength=classes**2).reshape(classes, classes)


def implementation(name: str, case: Case) -> Callable[[], Any]:
    """The matrix [C, C]; "eager" is torch.bincount."""
    prediction, target = case.inputs()
    classes = case.classes
    if name == "fused":
        return lambda: fcnseg.confusion_matrix(prediction, target, classes, ignore_index=IGNORED)
    if name == "numpy":
        if device() == "cuda":
            raise Unavailable("CPU only")
        arrays = prediction.numpy(), target.numpy()
        return lambda: numpy_bincount(*arrays, classes)
    if name == "torchmetrics":
        try:
            module = importlib.import_module("torchmetrics.functional.classification")
        except (ImportError, RuntimeError) as error:
            raise Unavailable("needs torchmetrics and a torchvision that loads") from error
        count = module.multiclass_confusion_matrix
        return lambda: count(prediction, target, classes, ignore_index=IGNORED, validate_args=False)
    matrix = bincount
    if name == "compile":
        torch._dynamo.reset()
        matrix = torch.compile(bincount, dynamic=False)
    return lambda: matrix(prediction, target, classes)


def work(case: Case) -> Work:
    pixels = case.shape[0] * case.shape[1] * case.shape[2]
    return Work(2 * case.dtype.itemsize * pixels, 8 * case.classes**2)


def check(case: Case) -> None:
    """Before anything is timed."""
    expected = implementation("eager", case)()
    assert torch.equal(implementation("fused", case)(), expected)
    for name in ("numpy", "torchmetrics"):
        try:
            found = implementation(name, case)()
        except Unavailable:
            continue
        assert torch.equal(torch.as_tensor(found, device=expected.device), expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*PEERS, "fused"])
def test_time(benchmark: Any, case: str, name: str) -> None:
    require_compiled("confusion_matrix")
    torch.set_num_threads(1)
    if name == "fused":
        check(CASES[case])
    try:
        run = implementation(name, CASES[case])
    except Unavailable as reason:
        pytest.skip(str(reason))
    time_case(benchmark, run, case, name)


if __name__ == "__main__":
    main(__file__)
