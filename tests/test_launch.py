"""Prepared launches: what the driver gets, from the first call on and later; nothing runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import driver

from fcnseg.kernels import (
    common,
    conv_transpose_argmax,
    conv_transpose_cross_entropy,
    launch,
    upsample_argmax,
    upsample_confusion_matrix,
    upsample_cross_entropy,
)
from tests.fake_driver import FakeDriver

PLAIN = (False, None, None)


class Launcher:
    """Stands for what Triton makes of a compiled kernel: keeps the arguments of every launch."""

    def __init__(self, source: Any, metadata: Any, launches: list[tuple[str, tuple[Any, ...]]]):
        self.name, self.launches = metadata.name, launches

    def __call__(self, *args: Any) -> None:
        grid, stream, rest = args[:3], args[3], args[9:]  # between them: handles, hooks
        values = tuple((x.dtype, *x.shape) if isinstance(x, Tensor) else x for x in rest)
        self.launches.append((self.name, (*grid, stream, *values)))


class RecordingDriver(FakeDriver):
    """A driver without a device, which keeps what it should launch."""

    def __init__(self, arch: int) -> None:
        super().__init__(arch)
        self.launches: list[tuple[str, tuple[Any, ...]]] = []
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Launcher:
        return Launcher(source, metadata, self.launches)

    def load_binary(self, *args: Any) -> tuple[Any, ...]:
        return "module", "function", 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


#: One for all tests: Triton keeps compiled kernels, and these their launchers.
RECORDING = RecordingDriver(90)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingDriver]:
    before = driver._active
    driver.set_active(RECORDING)
    RECORDING.launches.clear()
    monkeypatch.setattr(launch, "keeps_plans", lambda device: True)
    launch.forget()
    yield RECORDING
    launch.forget()
    driver._active = before


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one at every launch that goes through Triton's own way."""
    calls: list[Any] = []
    run = triton.JITFunction.run

    def count(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(self)
        return run(self, *args, **options)

    monkeypatch.setattr(triton.JITFunction, "run", count)
    return calls


def steps() -> dict[str, Callable[[], Any]]:
    """Calls of the launchers."""
    logits = torch.empty(2, 5, 4, 6, dtype=torch.float16)
    target = torch.empty(2, 32, 48, dtype=torch.uint8)
    weight, record = torch.empty(5), torch.empty(5, dtype=torch.int64)
    upstream = torch.empty(2, 32, 48)
    matrix = torch.empty(5, 5, dtype=torch.int64)

    def scalar() -> None:
        loss = (logits, target, weight, 255, "mean", 0.1, *PLAIN, True, record)
        _, sums, edges = upsample_cross_entropy.upsample_cross_entropy_forward(*loss)
        upsample_cross_entropy.upsample_cross_entropy_gradient(
            upstream[0, 0, 0], sums, edges, logits, (32, 48), True, 0.1, *PLAIN
        )

    def none() -> None:
        loss = (logits, target, None, 255)
        upsample_cross_entropy.upsample_cross_entropy_forward(
            *loss, "none", 0.0, *PLAIN, True, record
        )
        upsample_cross_entropy.upsample_cross_entropy_backward(upstream, *loss, 0.0, *PLAIN, record)

    def conv_transpose(groups: int) -> None:
        kernel = torch.empty(5, 5 // groups, 4, 4, dtype=torch.float16)
        geometry = ((2, 2), (1, 1), (0, 0), groups, (1, 1), (0, 0))
        conv = (logits, kernel, target[:, :8, :12], None, weight, *geometry, 255)
        conv_transpose_cross_entropy.conv_transpose_cross_entropy_forward(
            *conv, "mean", 0.0, (True, True, False), record
        )
        conv_transpose_argmax.conv_transpose_argmax_forward(
            logits, kernel, None, (8, 12), *geometry, torch.int64
        )

    return {
        "scalar": scalar,
        "none": none,
        "argmax": lambda: upsample_argmax.upsample_argmax_forward(
            logits, (32, 48), *PLAIN, torch.int32
        ),
        "matrix": lambda: upsample_confusion_matrix.upsample_confusion_matrix_forward_(
            matrix, logits, target, 255, *PLAIN, record, None
        ),
        "full": lambda: conv_transpose(1),
        "grouped": lambda: conv_transpose(5),
    }


@pytest.mark.parametrize("name", steps())
@pytest.mark.long(14)
def test_later_launches_pass_what_the_first_one_passed(
    name: str, recording: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = steps()[name], counted_calls(monkeypatch)
    step()
    first, through_triton = list(recording.launches), len(calls)
    assert through_triton == len(first) >= 1
    for _ in range(2):
        recording.launches.clear()
        step()
        assert recording.launches == first
    assert len(calls) == through_triton


def test_a_kept_kernel_is_compiled_for_any_address(recording: RecordingDriver) -> None:
    @common.kernel
    def shift_kernel(x_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        offs = tl.arange(0, BLOCK)
        tl.store(x_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) + 1, mask=offs < n)

    x = torch.empty(64)
    for scalar in (16, 1, 7):
        for tensor in (x, x[1:]):
            launch.Launch(shift_kernel, (2,), (scalar,), BLOCK=32)(tensor)
    (kernels,) = (cache[0] for cache in shift_kernel.device_caches.values())
    assert len(kernels) == 1


def test_kernel_for_aligned_addresses_is_refused(recording: RecordingDriver) -> None:
    @triton.jit(do_not_specialize=["n"])
    def shift_kernel(x_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        offs = tl.arange(0, BLOCK)
        tl.store(x_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) + 1, mask=offs < n)

    with pytest.raises(RuntimeError, match="shift_kernel: x_ptr is specialised on its alignment"):
        launch.Launch(shift_kernel, (2,), (16,), BLOCK=32)(torch.empty(64))


def test_plans_are_kept_on_cuda_alone() -> None:
    made: list[tuple[Any, ...]] = []

    @launch.cached_plan
    def plan(device: torch.device, *key: Any) -> int:
        made.append((device, *key))
        return len(made)

    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert [plan(cpu, 1), plan(cpu, 1)] == [1, 2]
    assert [plan(cuda, 1), plan(cuda, 1), plan(cuda, 2), plan(torch.device("cuda", 1), 1)] == [
        3, 3, 4, 5
    ]  # fmt: skip


@pytest.mark.slow
def test_host_time_has_a_figure_for_every_operator(tmp_path: Path) -> None:
    out = tmp_path / "host_time.json"
    script = Path(__file__).parents[1] / "benchmarks" / "host_time.py"
    subprocess.run([sys.executable, str(script), "--calls", "2", "--json", str(out)], check=True)
    figures = json.loads(out.read_text())
    assert {name.split(",")[0].split(" ")[0] for name in figures} == {
        "upsample_cross_entropy", "upsample_argmax", "upsample_confusion_matrix_",
        "conv_transpose_cross_entropy", "conv_transpose_argmax",
    }  # fmt: skip
    assert all(value > 0 for value in figures.values())
