"""The training benchmarks: configurations, the search for the largest batch, tables, curves."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fcnseg

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_training_curves as curves
import bench_training_step as bench
import curves_table
import gpu
import jobs
import report
import result_files
import training_configurations as configurations
import training_table
from clocks import DEVICE_VARIABLE
from jobs import Job
from processes import environment
from torch import Tensor

compiled = pytest.mark.skipif(
    fcnseg.build_info()["operators"]["upsample_cross_entropy"]["cpu"] != "c++",
    reason="the compiled CPU operators are missing",
)
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)
COMMON = {"precision": "bf16", "tf32": False, "tiny": True}
PROBLEM = {"classes": 19, "size": [32, 64]}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")


@pytest.fixture
def numerics() -> Any:
    """One thread, no losses of other tests; afterwards PyTorch's switches are as they were."""
    backends, threads = torch.backends, torch.get_num_threads()
    torch.set_num_threads(1)
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark
    configurations._courses.clear()
    yield
    torch.set_num_threads(threads)
    (
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.allow_tf32,
        backends.cudnn.benchmark,
    ) = before


# --- the largest batch ----------------------------------------------------------------------------


def images_that_fit(
    limit: int, *, first: float = 10.0, each: float = 3.0
) -> tuple[Callable[[int], float], list[int]]:
    """A device on which ``limit`` images fit, and the batches that were tried on it."""
    tried: list[int] = []

    def attempt(batch: int) -> float:
        tried.append(batch)
        if batch > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return first + each * batch

    return attempt, tried


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 7, 20, 63, 500])
@pytest.mark.parametrize("believed", [0.5, 1.0, 1.01, 1.5, 100.0])
def test_the_search_finds_the_largest_batch(limit: int, believed: float) -> None:
    """However wrong the capacity is from which the first guess comes."""
    attempt, tried = images_that_fit(limit)
    capacity = believed * (10 + 3 * limit) + 0.5
    largest, peaks = configurations.search_batch(attempt, capacity)
    by_capacity = max(0, int((capacity - 10) / 3))
    assert largest == min(limit, by_capacity)
    assert len(tried) == len(set(tried)) == len(peaks) <= 40
    assert all((peak is None) == (batch > largest) for batch, peak in peaks.items())
    if believed == 1.0:
        assert len(tried) <= 4  # two to know the slope, the guess, and one more image


def test_the_search_ends_at_the_most() -> None:
    attempt, tried = images_that_fit(1000)
    assert configurations.search_batch(attempt, 1e9, most=6)[0] == 6 == max(tried)


def test_an_error_that_is_not_of_memory_is_raised() -> None:
    def attempt(batch: int) -> float:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        configurations.search_batch(attempt, 1e9)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("any"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        ("the capture failed: CUDA out of memory. Tried to allocate", True),
        ("the step waits for the device (loop.py:3)", False),
    ],
)
def test_what_is_out_of_memory(error: Any, expected: bool) -> None:
    assert configurations.is_out_of_memory(error) is expected


@compiled
@needs_proc
@pytest.mark.parametrize("configuration", bench.FITTED[:2])
def test_a_step_that_ran_out_of_memory_leaves_nothing(
    configuration: str, numerics: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fails in its backward pass; the next one starts clean."""
    steps: list[configurations.Step] = []
    made = configurations.Step.__init__

    def keep(self: configurations.Step, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        steps.append(self)
        self.model.classifier.weight.register_hook(planted)

    def planted(gradient: Tensor) -> None:
        if batch[-1] > 5:
            raise torch.OutOfMemoryError("planted")

    batch: list[int] = []
    given = configurations.Step.inputs

    def inputs(self: configurations.Step, size: int, *args: Any) -> tuple[Tensor, Tensor]:
        assert all(p.grad is None for p in self.model.parameters()) or batch[-1] <= 5
        batch.append(size)
        return given(self, size, *args)

    monkeypatch.setattr(configurations.Step, "__init__", keep)
    monkeypatch.setattr(configurations.Step, "inputs", inputs)
    outcome = configurations.do(
        "largest", configuration=configuration, capacity=1e12, most=9, **PROBLEM, **COMMON
    )
    assert outcome["largest_batch"] == 5 and set(batch) >= {1, 2, 5, 6}
    assert outcome["peaks_gb"]["6"] is None and outcome["peaks_gb"]["5"] > 0
    assert len(steps) == 1


@needs_proc
def test_on_the_cpu_the_peak_is_held_against_the_capacity(numerics: None) -> None:
    outcome = configurations.do(
        "largest", configuration="eager AMP", capacity=1.0, most=9, **PROBLEM, **COMMON
    )
    assert outcome["largest_batch"] == 0 and outcome["peaks_gb"] == {"1": None}


# --- a configuration ------------------------------------------------------------------------------


def measured(configuration: str, **options: Any) -> dict[str, Any]:
    given = {"batch": 2, "seconds": 0.01, "expected": None, **PROBLEM, **COMMON} | options
    return configurations.do("measure", configuration=configuration, **given)


@compiled
@needs_proc
@pytest.mark.long(5)
def test_every_configuration_is_measured_or_says_why_not(numerics: None) -> None:
    for configuration, options in configurations.CONFIGURATIONS.items():
        found = measured(configuration)
        if configuration == "+ CUDA graph" and not torch.cuda.is_available():
            assert found == {"skipped": "PyTorch sees no CUDA device"}
            continue
        assert len(found["losses"]) == configurations.CHECKED_STEPS
        assert found["losses"][-1] < found["losses"][0]
        assert len(set(found["losses"])) == configurations.CHECKED_STEPS
        assert found["images_per_second"] == pytest.approx(2e3 / found["step_ms"]["median"], 1e-2)
        assert found["step_ms"]["rounds"] >= 5 and found["memory_gb"] > 0
        assert ("check" in found) == (options.get("fused", False) and "compiled" not in options)


@compiled
@needs_proc
def test_nothing_is_timed_before_it_agrees(numerics: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "step_seconds", lambda *_: pytest.fail("was timed"))
    with pytest.raises(ValueError, match=r"the loss of step 1 is .* farther apart than 2%"):
        measured("+ fused loss", expected=[2.5] * configurations.CHECKED_STEPS)
    right = configurations.fused_loss
    monkeypatch.setattr(configurations, "fused_loss", lambda z, y: 1.001 * right(z, y))
    with pytest.raises(ValueError, match=r"the fused loss is 1\.0e-03 from eager's"):
        measured("+ fused loss")

    def wrong_gradient(logits: Tensor, target: Tensor) -> Tensor:
        loss = right(logits, target)
        return loss + 0.1 * (logits.mean() - logits.mean().detach())

    monkeypatch.setattr(configurations, "fused_loss", wrong_gradient)
    with pytest.raises(ValueError, match="the fused gradient is"):
        measured("+ fused loss")


def test_a_course_that_departs_is_named() -> None:
    expected = [3.0 - 0.1 * i for i in range(configurations.CHECKED_STEPS)]
    configurations.check_course([1.05 * x if i else x for i, x in enumerate(expected)], expected)
    with pytest.raises(ValueError, match=r"of step 4 is 3\.0000, without this change 2\.7000"):
        configurations.check_course([3.0] * len(expected), expected)
    with pytest.raises(ValueError, match="of step 2 is nan"):
        configurations.check_course([3.0, float("nan"), *expected[2:]], expected)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_losses_agree_within_their_tolerance(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 19, 8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, target = configurations.inputs(2, 19, (64, 128))
    found = configurations.compare_losses(logits, target)
    assert 0 <= found["loss"] <= 1e-5
    assert found["gradient"] <= configurations.GRADIENT_TOLERANCE[dtype] / 2


# --- what only a CUDA device runs, on stand-ins ---------------------------------------------------


class Device:
    """Records what is asked of it; every step takes 5 ms, the fourth one 50."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                device.log.append("event")
                self.at = device.now

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        self.now = 0.0
        monkeypatch.setenv(DEVICE_VARIABLE, "cuda")
        for name, value in {
            "Event": Event,
            "synchronize": lambda: self.log.append("wait"),
            "empty_cache": lambda: self.log.append("empty"),
            "reset_peak_memory_stats": lambda: self.log.append("reset"),
            "max_memory_allocated": lambda: 3_000_000_000,
            "current_device": lambda: 0,
            "get_device_properties": lambda index: argparse.Namespace(total_memory=80 << 30),
            "set_per_process_memory_fraction": lambda share: self.log.append(f"share {share}"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def step(self) -> None:
        self.log.append("step")
        self.now += 50.0 if self.log.count("step") == 4 else 5.0


def test_cuda_steps_follow_each_other_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    seconds = configurations.step_seconds(device.step, 5)
    assert seconds == pytest.approx([0.005, 0.005, 0.005, 0.05, 0.005])
    assert device.log == ["event", *["step", "event"] * 5, "wait"]


def test_cuda_memory_is_the_allocators_since_the_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    configurations.reset_peak()
    assert device.log == ["empty", "reset"] and configurations.peak_memory() == 3e9


@pytest.mark.parametrize(("capacity", "share"), [(60 << 30, 0.75), (100 << 30, 1.0)])
def test_cuda_memory_is_capped(
    monkeypatch: pytest.MonkeyPatch, numerics: None, capacity: int, share: float
) -> None:
    device = Device(monkeypatch)

    class Step:
        step = argparse.Namespace(reset=lambda: device.log.append("clean"))

        def __init__(self, configuration: str, *args: Any, **options: Any) -> None:
            assert device.log == [f"share {share}"]
            assert not torch.backends.cudnn.benchmark

        def inputs(self, batch: int, *args: Any) -> tuple[int, None]:
            return batch, None

        def __call__(self, x: int, target: None) -> None:
            device.log.append(f"{x}")
            if x > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(configurations, "Step", Step)
    outcome = configurations.largest_batch(
        "eager AMP", 19, (512, 1024), precision="bf16", tf32=False, tiny=False,
        capacity=capacity, most=5,
    )  # fmt: skip
    assert outcome["largest_batch"] == 3
    assert outcome["capacity_gb"] == round(min(capacity, 80 << 30) / 1e9, 3)
    at = device.log.index("4")
    assert device.log[at - 2 : at + 2] == ["empty", "reset", "4", "clean"]


@pytest.mark.parametrize(
    ("reason", "key"),
    [
        ("the capture failed: CUDA out of memory. Tried to allocate 2 GiB", "out_of_memory"),
        ("the step waits for the device (step.py:3)", "failed"),
    ],
)
@compiled
@needs_proc
def test_steps_without_their_graph_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, numerics: None, reason: str, key: str
) -> None:
    class Graphed:
        def __init__(self, step: Any) -> None:
            self.step, self.calls, self.reason = step, 0, None

        def __call__(self, *batch: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 4:
                self.reason = reason
            return self.step(*batch)

    monkeypatch.setattr(configurations, "GraphedTrainStep", Graphed)
    monkeypatch.setattr(configurations, "why_not", lambda: None)
    monkeypatch.setattr(configurations, "step_seconds", lambda *_: pytest.fail("was timed"))
    assert measured("+ CUDA graph") == {key: reason}


@compiled
@needs_proc
def test_a_graph_that_leaves_the_weights_alone_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, numerics: None
) -> None:
    class Graphed:
        reason = None

        def __init__(self, step: Any) -> None:
            self.step, self.calls = step, 0

        def __call__(self, *batch: Tensor) -> Tensor:
            self.calls += 1
            if self.calls < 4:
                self.loss = self.step(*batch)
            return self.loss

    monkeypatch.setattr(configurations, "GraphedTrainStep", Graphed)
    monkeypatch.setattr(configurations, "why_not", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(configurations, "step_seconds", lambda *_: pytest.fail("was timed"))
        with pytest.raises(ValueError, match="the step learns nothing"):
            measured("+ CUDA graph")
    monkeypatch.setattr(Graphed, "__call__", lambda self, *batch: self.step(*batch))
    assert measured("+ CUDA graph")["images_per_second"] > 0


# --- the table ------------------------------------------------------------------------------------


def arguments(**options: Any) -> argparse.Namespace:
    given = {
        "device": "cpu", "quick": False, "precision": "bf16", "tf32": False,
        "step_seconds": 2.0, "memory_cap": 72.0,
    }  # fmt: skip
    return argparse.Namespace(**given | options)


def test_the_plan_has_every_configuration_in_order_of_worth() -> None:
    header, *plan = bench.plan(arguments())
    assert header.name == jobs.HEADER and header.group == plan[0].group
    assert len({each.name for each in plan}) == len(plan) == 5 * 6 + 6
    asked = [each.arguments for each in plan]
    for classes, size, batch in (
        (19, [512, 1024], 2),
        (19, [512, 1024], 8),
        (19, [512, 1024], 16),
        (150, [512, 512], 8),
        (150, [512, 512], 16),
    ):
        own = [
            each["configuration"]
            for each in asked
            if each["kind"] == "measure"
            and (each["classes"], each["size"], each["batch"]) == (classes, size, batch)
        ]
        assert own == list(configurations.CONFIGURATIONS)
    first = [(each["classes"], each["batch"]) for each in asked[:10]]
    assert first == [(19, 2)] * 5 + [(19, 16)] * 5
    fitted = [(x["classes"], x["configuration"]) for x in asked if x["kind"] == "largest"]
    assert fitted == [
        *((classes, name) for classes in (19, 150) for name in ("eager AMP", "+ fused loss")),
        (19, "AMP channels_last"),
        (150, "AMP channels_last"),
    ]
    for each in plan:  # a search never shares a process, nor does what is compiled
        sharing = {other.kind for other in plan if other.group == each.group}
        assert len(sharing) == 1
        assert json.loads(json.dumps(each.arguments)) == each.arguments
        assert each.least < each.limit


def row(configuration: str, **outcome: Any) -> dict[str, Any]:
    asked = {"kind": "measure", "configuration": configuration, "batch": 2}
    return asked | PROBLEM | COMMON | outcome


def figures(rate: float) -> dict[str, Any]:
    times = {"p20": 1.0, "median": 2.0, "p80": 3.0, "rounds": 7}
    return {"images_per_second": rate, "step_ms": times, "memory_gb": 4.5}


def test_the_losses_to_agree_with_are_those_of_the_last_eager_configuration() -> None:
    plan = [each for each in bench.plan(arguments(quick=True)) if each.kind == "compiled"]
    rows = [
        row("eager fp32", size=[32, 64], losses=[1.0]),
        row("eager AMP", size=[32, 64], losses=[2.0]),
        row("+ fused loss", size=[32, 64], losses=[3.0]),
        row("eager AMP", size=[32, 64], losses=[4.0]) | {"batch": 16},
    ]
    expected = [bench.with_expected(each, rows)["expected"] for each in plan]
    assert expected == [[2.0], [4.0], None, None, None]
    assert bench.with_expected(Job(jobs.HEADER, {"command": "c"}, 1, 0), rows) == {"command": "c"}


def test_the_table_has_ratios_and_names_what_is_missing() -> None:
    fitted = {"kind": "largest", **PROBLEM, **COMMON, "capacity_gb": 77.3}
    rows = [
        row("eager fp32", out_of_memory="OutOfMemoryError: CUDA out of memory."),
        row("eager AMP", **figures(10.0)),
        row("+ fused loss", **figures(15.0)),
        row("+ CUDA graph", dropped="3 s were left, it needs 12"),
        row("+ compiled trunk", failed="no end after 150 s"),
        fitted | {"configuration": "eager AMP", "largest_batch": 20},
        fitted | {"configuration": "+ fused loss", "largest_batch": 30},
    ]
    text = training_table.table({"rows": rows})
    assert "| 19 | 32x64 | 2 | eager fp32 | out of memory | | | |\n" in text
    assert "| 19 | 32x64 | 2 | eager AMP | 10 | 1.00x | 2 (1 to 3) | 4.50 |\n" in text
    assert "| 19 | 32x64 | 2 | + fused loss | 15 | 1.50x | 2 (1 to 3) | 4.50 |\n" in text
    assert "| 19 | 32x64 | + fused loss | 77.3 | 30 | 1.50x |\n" in text
    assert "Dropped: 19 classes, batch 2, + CUDA graph (3 s were left, it needs 12)." in text
    assert "Failed: 19 classes, batch 2, + compiled trunk (no end after 150 s)." in text
    for block in text.split("\n\n"):
        lines = [each for each in block.splitlines() if each.startswith("|")]
        assert len({each.count("|") for each in lines}) <= 1
    assert training_table.line(rows[3]) == "dropped: 3 s were left, it needs 12"
    assert training_table.line(rows[5]) == "20 images fit 77.3 GB"
    assert training_table.line(rows[2]) == "15 images/s, peak 4.50 GB"


@compiled
@needs_proc
@pytest.mark.long(5)
def test_a_rehearsal_of_one_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench.plan(arguments(quick=True))
    short = [*whole[:6], next(each for each in whole if each.kind == "largest")]
    monkeypatch.setattr(bench, "plan", lambda args: short)
    monkeypatch.setenv("OUT", str(tmp_path / "new"))
    monkeypatch.setattr(sys, "argv", ["bench_training_step.py", "--device", "cpu", "--quick"])
    assert bench.main() == 0
    (path,) = (tmp_path / "new").iterdir()
    assert path.name.startswith("training_")
    content = json.loads(path.read_text())
    about = content["header"]
    assert (about["precision"], about["tf32"]) == ("AMP in bf16", "off")
    assert about["command"].startswith("python benchmarks/bench_training_step.py")
    assert [x["configuration"] for x in content["rows"] if "losses" in x] == bench.EAGER[:-1]
    assert content["rows"][-1]["largest_batch"] == 4


@pytest.mark.parametrize(
    ("capability", "precisions"),
    [([7, 0], ["fp16", "fp32 fp16"]), ([9, 0], ["", ""]), (None, ["", ""])],
)
def test_a_gpu_without_bfloat16_trains_in_fp16(
    tmp_path: Path, capability: list[int] | None, precisions: list[str]
) -> None:
    machine = {"python": sys.executable} | ({"capability": capability} if capability else {})
    options = argparse.Namespace(device="cpu", quick=False, machine=machine, slack=1.0)
    _, *parts = gpu.parts(options, tmp_path)["train"]
    training, losses = [" ".join(part.command) for part in parts]
    assert training.partition(" --precision ")[2] == precisions[0]
    assert losses.partition(" --precisions ")[2] == precisions[1]
    assert all("--device cpu" in command for command in (training, losses))


@compiled
@pytest.mark.slow
def test_make_gpu_train_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(gpu.__file__), "train", "--device", "cpu", "--quick"]
    done = subprocess.run(
        command, env=environment({"OUT": str(tmp_path)}), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name.partition("_")[0] for path in tmp_path.iterdir()}
    assert names == {"training", "curves", "train", "train.log"}
    (path,) = tmp_path.glob("training_*.json")
    content = json.loads(path.read_text())
    assert len(content["rows"]) == 36 and content["parts"]["training"].startswith("passed")
    for each in content["rows"]:
        assert {"images_per_second", "largest_batch", "skipped"} & set(each), each
    summary = (tmp_path / "train_summary.txt").read_text()
    assert "\ncurves: passed in " in summary and "\n150 classes, largest batch, " in summary


def test_the_report_takes_what_was_measured_and_no_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    about = result_files.header("make gpu-train") | {"kind": "cuda", "capability": "sm_90"}
    for name, rows in (
        ("training", [row("eager AMP", **figures(10.0)), row("+ fused loss", **figures(15.0))]),
        ("curves", [curve("eager", 0, 0.0), curve("eager", 1, 0.3), curve("fused", 0, 0.02)]),
    ):
        content = {"name": name, "header": about, "rows": rows}
        (tmp_path / f"{name}_a_2026-01-01.json").write_text(json.dumps(content))
        content["header"] = about | {"quick": True}
        (tmp_path / f"{name}_a_2026-01-02.json").write_text(json.dumps(content))
        document = tmp_path / "page.md"
        text = report.rewrite(f"<!-- bench:{name} -->\n<!-- /bench -->\n", document)
        assert f"`benchmarks/results/{name}_a_2026-01-01.json`" in text and "01-02" not in text
        assert ("| 1.50x |" if name == "training" else "| yes |") in text and ".png" not in text
        assert report.stale_blocks(text, document) == []


# --- curves ---------------------------------------------------------------------------------------


def curve(loss: str, seed: int, shift: float, again: bool = False) -> dict[str, Any]:
    losses = [3.0 - 0.01 * i + shift for i in range(20)]
    return {"precision": "fp16", "loss": loss, "seed": seed, "again": again, "losses": losses}


def test_curves_agree_within_the_spread_of_seeds() -> None:
    eager = [curve("eager", 0, 0.0), curve("eager", 1, 0.3), curve("eager", 0, 0.01, True)]
    (found,) = curves_table.verdicts([*eager, curve("fused", 0, 0.02), curve("fused", 1, 0.32)])
    assert found["agree"] is True and found["seeds"] == [0, 1]
    assert found["fused from eager"] == pytest.approx(0.02)
    assert found["eager from eager again"] == pytest.approx(0.01)
    assert found["eager from other seeds"] == pytest.approx(0.3)
    assert found["first"] == pytest.approx(0.02 / 3)
    (found,) = curves_table.verdicts([*eager, curve("fused", 0, 0.02), curve("fused", 1, -0.1)])
    assert found["agree"] is False and "| NO |" in curves_table.table(
        {"rows": [*eager, curve("fused", 1, -0.1)]}
    )
    (found,) = curves_table.verdicts([eager[0], curve("fused", 0, 0.0)])
    assert found["agree"] is None  # no second seed tells the spread
    missing = {"precision": "fp16", "loss": "fused", "seed": 0, "again": False, "dropped": "late"}
    assert "Dropped: fp16, seed 0, fused (late)." in curves_table.table({"rows": [*eager, missing]})


def test_a_distance_is_one_of_moving_means() -> None:
    noise = [0.5 * (-1) ** i for i in range(40)]
    assert curves_table.distance(noise, [0.0] * 40) == pytest.approx(0)
    assert curves_table.distance([0.0] * 36 + [1.0] * 4, [0.0] * 40) == 1
    assert not curves_table.distance([0.0] * 39 + [float("nan")], [0.0] * 40) <= 1


@compiled
@needs_proc
def test_curves_of_both_losses_agree_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    options = ["--quick", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_training_curves.py", *options])
    assert curves.main() == 0
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2 * 5 and all(len(each["losses"]) == 20 for each in rows)
    for found in curves_table.verdicts(rows):
        assert found["agree"] is True and found["eager from eager again"] == 0
        assert found["first"] < 1e-4
    assert capsys.readouterr().out.count("| yes |") == 2
