"""The compiled counting of confusion matrices: label types, class counts, threads, layouts."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fcnseg
from fcnseg import _extension

ROOT = Path(__file__).parent.parent
DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def _expected(prediction: Tensor, target: Tensor, classes: int, ignore_index: int) -> Tensor:
    kept = target.long() != ignore_index
    bins = target.long()[kept] * classes + prediction.long()[kept]
    return torch.bincount(bins, minlength=classes * classes).view(classes, classes)


def _maps(classes: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    runs = torch.randint(classes, (size // 24 + 1,), generator=random)
    target = runs.repeat_interleave(24)[:size]
    noise = torch.randint(classes, (size,), generator=random)
    return torch.where(torch.rand(size, generator=random) < 0.1, noise, target), target


@pytest.mark.parametrize(("p", "t"), list(itertools.product(DTYPES, DTYPES)))
def test_label_dtypes(p: torch.dtype, t: torch.dtype) -> None:
    prediction, target = _maps(19, 5000)
    target[100:300] = 255 if t == torch.uint8 else 99
    ignored = int(target[100])
    prediction[150] = 200 if p == torch.uint8 else -7  # under an ignored target: not bad
    expected = _expected(prediction, target, 19, ignored)
    got = fcnseg.confusion_matrix(prediction.to(p), target.to(t), 19, ignore_index=ignored)
    assert torch.equal(got, expected)
    pybind = _extension.pybind
    if pybind is not None:
        arrays = prediction.to(p).numpy(), target.to(t).numpy()
        matrix, bad = pybind.confusion_matrix(*arrays, 19, ignored)
        assert (matrix == expected.numpy()).all() and bad[0] == 0


@pytest.mark.parametrize("classes", [1, 2, 150, 254, 255, 256, 4096])
def test_class_counts(classes: int) -> None:
    prediction, target = _maps(classes, 300_000)
    got = fcnseg.confusion_matrix(prediction.short(), target, classes)
    assert torch.equal(got, _expected(prediction, target, classes, -100))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_threads_and_unaligned_starts(dtype: torch.dtype) -> None:
    prediction, target = (labels.to(dtype) for labels in _maps(19, 300_000))
    before = torch.get_num_threads()
    try:
        for p, t in ((0, 0), (1, 0), (3, 7)):
            size = 299_900
            pair = prediction[p : p + size], target[t : t + size]
            counts = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                counts.append(fcnseg.confusion_matrix(*pair, 19))
            assert torch.equal(counts[0], counts[1])
            assert torch.equal(counts[0], _expected(*pair, 19, -100))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("where", ["prediction", "target"])
@pytest.mark.parametrize("value", [19, -1, 2**32 + 3])
def test_bad_label_is_named_and_nothing_counted(where: str, value: int) -> None:
    prediction, target = (labels.view(2, 50, 100) for labels in _maps(19, 10_000))
    {"prediction": prediction, "target": target}[where][1, 7, 9] = value
    matrix = torch.ones(19, 19, dtype=torch.int64)
    for order in ((0, 1, 2), (2, 0, 1)):
        permuted = prediction.permute(order), target.permute(order)
        place = [[1, 7, 9][axis] for axis in order]
        message = rf"{where} holds 1 value .* {value} at position \({', '.join(map(str, place))}\)"
        with pytest.raises(IndexError, match=message):
            fcnseg.confusion_matrix_(matrix, *permuted)
        assert torch.equal(matrix, torch.ones_like(matrix))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_instruction_set_is_exact_under_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "driver"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = str(ROOT / "tests" / "confusion_matrix_driver.cpp")
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", *sanitizers, f"-I{ROOT / 'csrc' / 'cpu'}"]
    subprocess.run(["g++", *flags, source, "-o", str(program)], check=True)
    for capability in ("default", "avx2", "avx512"):
        environment = {**os.environ, "FCNSEG_CPU_CAPABILITY": capability}
        run = subprocess.run([program], env=environment, capture_output=True, text=True)
        if "but this machine has only" in run.stderr:
            continue
        assert run.returncode == 0, run.stdout + run.stderr
        assert run.stdout == f"{capability}: 0 failures\n"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_against_bincount(data: st.DataObject) -> None:
    classes = data.draw(st.integers(1, 30))
    shape = data.draw(st.tuples(*[st.integers(0, 40)] * 3))
    prediction, target = (
        labels.view(shape)
        for labels in _maps(classes, shape[0] * shape[1] * shape[2], data.draw(st.integers(0, 99)))
    )
    order = data.draw(st.permutations(range(3)))
    prediction = prediction.to(data.draw(st.sampled_from(DTYPES))).permute(order)
    target = target.to(data.draw(st.sampled_from(DTYPES))).permute(order)
    if data.draw(st.booleans()):
        target = target.contiguous()
    ignored = data.draw(st.sampled_from([-100, 255, 0, classes - 1]))
    got = fcnseg.confusion_matrix(prediction, target, classes, ignore_index=ignored)
    assert torch.equal(got, _expected(prediction, target, classes, ignored))
