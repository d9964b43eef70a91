"""What the benchmarks do on a CUDA device, on stand-ins of it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import fcnseg

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import clocks
import harness
import kernel_profile
import memory
import result_files
import suite
import workers

compiled = pytest.mark.skipif(
    fcnseg.build_info()["operators"]["upsample_argmax"]["cpu"] != "c++",
    reason="the compiled CPU operators are missing",
)


class Properties:
    """Of an H100, as far as they are read."""

    major, minor = 9, 0
    L2_cache_size = 50 << 20
    max_threads_per_multi_processor = 2048
    shared_memory_per_multiprocessor = 233_472


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The log of what was asked of the device."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Any) -> float:
            return 2.5

    class Buffer:
        def __init__(self, *size: int) -> None:
            self.large = math.prod(size) * 4 >= 2 * Properties.L2_cache_size

        def zero_(self) -> None:
            assert self.large
            log.append("overwrite")

    def buffer(size: Any, dtype: torch.dtype, device: str) -> Buffer:
        assert dtype == torch.float32 and device == "cuda"
        return Buffer(*([size] if isinstance(size, int) else size))

    def total(buffer: Buffer, dim: int, out: Buffer) -> None:
        assert buffer.large and not out.large
        log.append("read")

    monkeypatch.setenv(clocks.DEVICE_VARIABLE, "cuda")
    monkeypatch.setattr(torch, "empty", buffer)
    monkeypatch.setattr(torch, "zeros", buffer)
    monkeypatch.setattr(torch, "sum", total)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("hold"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    return log


def test_cuda_rounds_start_cold_and_with_the_launches_queued(cuda: list[str]) -> None:
    assert clocks.rounds(lambda: cuda.append("run"), 2) == [0.0025, 0.0025]
    # what was overwritten is written back before the clock starts
    once = ["overwrite", "read", "hold", "event", "run", "event", "wait"]
    assert cuda == ["wait", "run", "wait", *once, *once]


def test_cuda_memory_is_the_growth_of_the_peak(
    cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: cuda.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 8 << 20)
    assert memory.cuda_peak_memory(lambda: cuda.append("run")) == 5
    assert cuda == ["wait", "reset", "run", "wait"]
    assert clocks.wall(lambda: cuda.append("run"), 0.0) >= 0
    assert cuda[4:] == ["wait", "run", "wait", *["run"] * 5, "wait"]  # none between the calls


def test_registers_are_those_of_the_loaded_kernels(
    cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    kernels = importlib.import_module("fcnseg.kernels.upsample_argmax")

    class Handle:
        metadata = SimpleNamespace(num_warps=4, shared=0)
        n_regs, n_spills = 255, 0

        def _init_handles(self) -> None:
            cuda.append("load")

    kernel = kernels._upsample_argmax_kernel
    if not hasattr(kernel, "device_caches"):
        pytest.skip("Triton's interpreter compiles nothing")
    for _, other in kernel_profile.triton_kernels():  # earlier tests may have compiled them
        if hasattr(other, "device_caches"):
            monkeypatch.setattr(other, "device_caches", {})
    monkeypatch.setattr(kernel, "device_caches", {0: ({"key": Handle()}, {}, None, None, None)})
    expected = {"registers": 255, "spills": 0, "shared": 0, "warps": 4, "occupancy": 0.125}
    assert kernel_profile.resources() == [
        {"kernel": "upsample_argmax._upsample_argmax_kernel", **expected}
    ]
    assert cuda == ["load"]


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "expected"),
    [
        (32, 4, 0, 1.0),  # 64 warps of 64
        (255, 4, 0, 0.125),  # 2 blocks of 4 warps
        (40, 1, 0, 0.5),  # 32 blocks of one warp
        (32, 4, 100_000, 0.125),  # 2 blocks fit the shared memory
    ],
)
def test_occupancy(registers: int, warps: int, shared: int, expected: float) -> None:
    assert kernel_profile.occupancy(registers, warps, shared, 233_472, 64, 32) == expected


# --- every case, on a device that is the CPU ------------------------------------------------------


class OnTheCpu(TorchFunctionMode):
    """Tensors that are asked for on CUDA are made on the CPU."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CUDA device that does its work at once, in the memory of the CPU."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = time.perf_counter()

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * (end.time - self.time)

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            assert isinstance(other, Stream)

    class Graph:
        captured = False

        def replay(self) -> None:
            assert self.captured

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        yield
        graph.captured = True

    class Generator(torch.Generator):
        def __new__(cls, device: str = "cpu") -> Generator:
            return super().__new__(cls, "cpu")

    monkeypatch.setenv(clocks.DEVICE_VARIABLE, "cuda")
    for name, value in {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": capture,
        "synchronize": lambda: None, "_sleep": lambda cycles: None, "empty_cache": lambda: None,
        "stream": lambda stream: contextlib.nullcontext(), "current_stream": Stream,
        "current_device": lambda: 0, "get_device_properties": lambda index: Properties,
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 1 << 20, "get_device_name": lambda: "NVIDIA H100",
        "get_device_capability": lambda: (9, 0),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(clocks, "_Flush", lambda: lambda: None)
    monkeypatch.setattr(torch, "Generator", Generator)
    kinds = {name: {"cuda": "triton"} for name in fcnseg.build_info()["operators"]}
    monkeypatch.setattr(fcnseg, "build_info", lambda: {"operators": kinds})
    with OnTheCpu():
        yield


@compiled
@pytest.mark.parametrize("name", suite.modules())
def test_every_cuda_case_is_measured_by_all_clocks(simulated: None, name: str) -> None:
    bench = importlib.import_module(name)
    rates = clocks.measure_rates(tiny=True)
    assert set(rates) == {"bytes per ms", "operations per ms", "products per ms"}
    names = [each for each in suite.implementations(name) if each != "compile"]
    for case in harness.cases_of(bench).values():
        row = harness.measure_case(bench, case.tiny(), names, 0, rates)
        assert "failed" not in row and row["floor"]["ms"] > 0
        for each in ("eager", "fused"):
            assert row[each]["rounds"] >= 7 and row[each]["wall"] > 0
            assert row["memory"][each] == 1.0
        assert row["fused"]["graph"] >= 0


@compiled
def test_a_worker_measures_on_the_device_and_compile_comes_later(
    simulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    tasks = suite.gpu_tasks(["bench_upsample_argmax"])
    tasks = [tasks[0], tasks[-1] | {"case": tasks[0]["case"]}]
    options = {"tasks": tasks, "threads": torch.get_num_threads(), "seconds": 0, "quick": True}
    out = tmp_path / "found.json"
    more = {"rehearse": False, "case_limit": 60, "out": str(out)}
    workers.worker(json.dumps(options | more))
    first, second = json.loads(out.read_text())["done"]
    assert first["failed"] == second["failed"] == {}
    row = dict(first["row"])
    workers.merge(row, second["row"])
    assert {"eager", "fused", "compile"} <= set(row)
    assert set(row["memory"]) == {"eager", "fused", "compile"}
    assert "graph" in row["fused"] and "wall" in row["compile"]


def test_products_bound_what_tensor_cores_may_do(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"bytes per ms": 1e3, "operations per ms": 1e3, "products per ms": 1e4}
    floor = harness.Work(1000, 1000, 5000, 90_000).floor(rates)
    assert (floor["ms"], floor["bound"]) == (9.0, "products")
    bench = importlib.import_module("bench_conv_transpose_cross_entropy")
    full, grouped = bench.CUDA_CASES["full, fp16"], bench.CUDA_CASES["grouped, fp16"]
    for device, products in (("cpu", False), ("cuda", True)):
        monkeypatch.setenv(clocks.DEVICE_VARIABLE, device)
        assert (bench.work(full).products > 0) is products
        assert bench.work(grouped).products == 0
        assert bench.work(bench.CUDA_CASES["full, fp32"]).products == 0


@compiled
@pytest.mark.parametrize("name", ["upsample_cross_entropy", "conv_transpose_cross_entropy"])
def test_half_losses_of_many_pixels_are_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager's own sums in half overflow there: it can say nothing about an error."""
    monkeypatch.setenv(clocks.DEVICE_VARIABLE, "cpu")
    bench = importlib.import_module(f"bench_{name}")
    case = next(iter(bench.CUDA_CASES.values()))
    case = dataclasses.replace(case, shape=(1, 3, 36, 36), size=(288, 288))
    assert case.dtype == torch.float16 and math.prod(case.size) > 65504
    assert not bench.implementation("eager", case)()[0].isfinite()
    bench.errors.cache_clear()
    bench.check(case)
    right = bench.fused_loss
    for factor in (1.01, math.nan):
        monkeypatch.setattr(bench, "fused_loss", lambda *x, k=factor, **y: right(*x, **y) * k)
        bench.errors.cache_clear()
        with pytest.raises(AssertionError):
            bench.check(case)
    bench.errors.cache_clear()


# --- what the figures belong to -------------------------------------------------------------------


def test_the_header_of_a_gpu_names_driver_and_architecture(
    simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_files, "_first_line", lambda command: command[0])
    about = result_files.header("make gpu-measure")
    assert about["device"] == "NVIDIA H100" and about["capability"] == "sm_90"
    assert about["driver"] == "nvidia-smi" and about["kind"] == "cuda"


@pytest.mark.parametrize(
    ("top", "variable", "expected"),
    [
        (str(result_files.ROOT), "1234567", "abcdef0 with changes"),  # git knows better
        (None, "1234567", "1234567"),
        (None, None, "unknown"),
        (str(result_files.ROOT.parent), "1234567", "1234567"),  # a copy inside another repository
        (str(result_files.ROOT.parent), None, "unknown"),
    ],
)
def test_a_copy_without_git_has_no_wrong_commit(
    monkeypatch: pytest.MonkeyPatch, top: str | None, variable: str | None, expected: str
) -> None:
    answers = {"--show-toplevel": top, "HEAD": "abcdef0", "--untracked-files=no": " M file"}
    monkeypatch.setattr(result_files, "_first_line", lambda command: answers[command[-1]])
    monkeypatch.delenv(result_files.COMMIT_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(result_files.COMMIT_VARIABLE, variable)
    assert result_files.commit() == expected
