"""The sets of benchmarks of make gpu: which cases, in which order, and their rehearsal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import suite
import workers


def test_the_cases_that_matter_come_first_and_compile_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FCNSEG_BENCH_DEVICE", "cuda")
    tasks = suite.gpu_tasks(suite.modules())
    assert tasks[0]["case"] == "16x19x96x96 to 768x768, fp16"
    assert "compile" in tasks[0]["implementations"]
    assert tasks[1]["case"] == "8x150x64x64 to 512x512, fp16"
    assert "compile" not in tasks[1]["implementations"]
    first = list(dict.fromkeys(each["module"] for each in tasks[:12]))
    assert first == suite.modules()
    pairs = [(each["module"], each["case"]) for each in tasks]
    plain = [i for i, each in enumerate(tasks) if "fused" in each["implementations"]]
    later = [i for i, each in enumerate(tasks) if each["implementations"] == ["compile"]]
    assert max(plain) < min(later) and len(plain) + len(later) == len(tasks)
    assert sorted(pairs[i] for i in later) == sorted(set(pairs) - {pairs[0]})
    rehearsed = suite.rehearsal_tasks(suite.modules())
    for name in ("fused", "compile"):
        each = [(x["module"], x["case"]) for x in rehearsed if x["implementations"] == [name]]
        assert sorted(each) == sorted(set(pairs))


def test_every_measured_line_has_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the project set out to measure on a GPU."""
    monkeypatch.setenv("FCNSEG_BENCH_DEVICE", "cuda")
    cases = {name: suite.cases_of(suite.importlib.import_module(name)) for name in suite.modules()}
    loss = cases["bench_upsample_cross_entropy"].values()
    half, large = torch.float16, ((16, 19, 96, 96), (768, 768))
    described = [((x.shape, x.size), x.dtype, x.labels, x.reduction, x.scale) for x in loss]
    for expected in (
        (large, half, torch.int64, "mean", 3.0),
        (large, torch.float32, torch.int64, "mean", 3.0),
        (large, half, torch.uint8, "mean", 3.0),
        (large, half, torch.int64, "none", 3.0),
        (large, half, torch.int64, "mean", 30.0),
        (((8, 150, 64, 64), (512, 512)), half, torch.int64, "mean", 3.0),
    ):
        assert expected in described
    for name in ("cross_entropy", "argmax"):
        transposed = cases[f"bench_conv_transpose_{name}"].values()
        for grouped in (True, False):
            assert any(
                x.grouped is grouped and x.dtype == half and x.stride == 8
                and x.shape[:2] == (2, 19) and x.size == (512, 1024) for x in transposed
            )  # fmt: skip
    argmax = {(x.shape, x.size, x.dtype) for x in cases["bench_upsample_argmax"].values()}
    assert ((1, 19, 128, 256), (1024, 2048), half) in argmax
    assert ((1, 150, 128, 128), (512, 683), half) in argmax
    matrix = {(x.shape, x.size) for x in cases["bench_upsample_confusion_matrix"].values()}
    assert ((1, 19, 128, 256), (1024, 2048)) in matrix
    counted = {(x.shape, x.dtype) for x in cases["bench_confusion_matrix"].values()}
    assert {((8, 1024, 2048), torch.int64), ((8, 1024, 2048), torch.uint8)} <= counted


def test_rehearsal_names_what_fails_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bench:
        __name__ = "bench_fake"

        def __init__(self) -> None:
            self.ran: list[str] = []

        def implementation(self, name: str, case: Any) -> Any:
            if name == "bad":
                raise ValueError("no\nmore")
            return lambda: self.ran.append(name)

    monkeypatch.setenv("FCNSEG_BENCH_DEVICE", "cpu")
    bench = Bench()
    workers.rehearse_case(bench, None, ["bad", "fused"])
    assert bench.ran == ["fused"]
    assert capsys.readouterr().out == "bench_fake: bad: ValueError: no\n"
