"""The benchmarks' own arithmetic, and that their tables are those of the committed results."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fcnseg

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import clocks
import harness
import memory
import processes
import report
import result_files
import suite
import workers

RATES = {"bytes per ms": 1e6, "operations per ms": 1e9}
#: Of a worker process.
OPTIONS = {
    "threads": torch.get_num_threads(),
    "seconds": 0,
    "quick": True,
    "rehearse": False,
    "case_limit": None,
}
OPERATORS = fcnseg.build_info()["operators"]
compiled = pytest.mark.skipif(
    OPERATORS["upsample_argmax"]["cpu"] != "c++", reason="the compiled CPU operators are missing"
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(clocks.DEVICE_VARIABLE, "cpu")


def fake_bench(**implementations: Any) -> ModuleType:
    """A benchmark file: implementations by name; one that is an exception is raised."""
    bench = ModuleType("bench_fake")

    def implementation(name: str, case: Any) -> Any:
        if isinstance(implementations[name], Exception):
            raise implementations[name]
        return implementations[name]

    bench.implementation = implementation
    bench.CASES = {"only": harness.Case((1, 2, 4, 4), (8, 8))}
    bench.OPERATORS = ()
    bench.check = lambda case: None
    bench.work = lambda case: harness.Work(1000, 0)
    return bench


def test_statistics_are_quantiles_in_milliseconds() -> None:
    found = clocks.statistics([0.001 * i for i in (5, 1, 4, 2, 3, 6)])
    assert found == {"p20": 2.0, "median": 3.5, "p80": 5.0, "rounds": 6}


@pytest.mark.parametrize(
    ("work", "milliseconds", "bound"),
    [
        (harness.Work(3_000_000, 1_000_000, 1_000), 4.0, "bytes"),
        (harness.Work(3_000_000, 1_000_000, 8_000_000_000), 8.0, "operations"),
    ],
)
def test_floor_is_the_larger_bound(work: harness.Work, milliseconds: float, bound: str) -> None:
    floor = work.floor(RATES)
    assert (floor["ms"], floor["bound"], floor["read ms"]) == (milliseconds, bound, 3.0)


def test_rates_are_those_of_a_copy_and_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "rounds", lambda run, count: [0.004, 0.002, 0.003])
    rates = clocks.measure_rates(tiny=True)
    assert rates == {"bytes per ms": 2 * 4 * 2**18 / 2, "operations per ms": 64**3 / 2}


def test_measure_takes_turns_and_7_to_101_rounds() -> None:
    order = []

    def run(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    found = clocks.measure({"a": lambda: run("a", 0.002), "b": lambda: run("b", 1e-6)}, 0.001)
    assert found["a"]["rounds"] == 7
    assert 7 <= found["b"]["rounds"] <= 101
    assert found["a"]["median"] >= 2 > found["b"]["median"]
    assert "".join(dict.fromkeys(order[4:6])) == "a" and order[-1] == "b"
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * 4  # the warm-up and three passes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["reference", "c++", "triton", "cuda"])
def test_the_fallback_is_not_called_fused(
    monkeypatch: pytest.MonkeyPatch, device: str, kind: str
) -> None:
    other = {"cpu": "cuda", "cuda": "cpu"}[device]
    kinds = {device: kind, other: "reference" if kind != "reference" else "c++"}
    monkeypatch.setenv(clocks.DEVICE_VARIABLE, device)
    monkeypatch.setattr(fcnseg, "build_info", lambda: {"operators": {"upsample_argmax": kinds}})
    bench = fake_bench(fused=lambda: None)
    bench.OPERATORS = ("upsample_argmax",)
    if kind != "reference":
        harness.require_compiled_file(bench)
        return
    with pytest.raises(RuntimeError, match="may not be called fused"):
        harness.measure_case(bench, bench.CASES["only"], ["fused"], 0, RATES)


def test_device_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(clocks.DEVICE_VARIABLE, "tpu")
    with pytest.raises(ValueError, match="expected cpu or cuda, got 'tpu'"):
        clocks.device()


def test_a_peer_that_is_missing_or_fails_is_named() -> None:
    bench = fake_bench(
        fused=lambda: None,
        absent=harness.Unavailable("needs a package"),
        broken=ValueError("no\nmore"),
        hungry=torch.OutOfMemoryError("CUDA"),
    )
    names = ["absent", "broken", "hungry", "fused"]
    row = harness.measure_case(bench, bench.CASES["only"], names, 0, RATES)
    assert row["skipped"] == {"absent": "needs a package", "hungry": "out of memory"}
    assert row["failed"] == {"broken": "ValueError: no"}
    assert row["fused"]["rounds"] == 7
    assert row["floor"]["ms"] == 1e-3


def test_nothing_is_timed_before_it_is_right() -> None:
    bench = fake_bench(fused=lambda: pytest.fail("was timed"))

    def check(case: Any) -> None:
        raise AssertionError("wrong")

    bench.check = check
    with pytest.raises(AssertionError, match="wrong"):
        harness.measure_case(bench, bench.CASES["only"], ["fused"], 0, RATES)


def test_a_worker_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = fake_bench(fused=lambda: None)
    bench.CASES = {"good": bench.CASES["only"], "bad": bench.CASES["only"]}
    checked = []

    def check(case: Any) -> None:
        checked.append(case)
        if len(checked) == 2:
            assert len(json.loads(out.read_text())["done"]) == 1  # written before the next began
            raise AssertionError("the second one is wrong")

    bench.check = check
    monkeypatch.setitem(sys.modules, "bench_fake", bench)
    out = tmp_path / "found.json"
    tasks = [workers.task("bench_fake", case, ["fused"]) for case in ("good", "bad", "good")]
    workers.worker(json.dumps(OPTIONS | {"tasks": tasks, "out": str(out)}))
    done = json.loads(out.read_text())["done"]
    assert [list(each["row"]) for each in done] == [["fused", "floor"], [], ["fused", "floor"]]
    assert done[1]["failed"] == {"bad": "AssertionError: the second one is wrong"}
    printed = capsys.readouterr().out
    assert "bench_fake: good: fused" in printed
    assert "bench_fake: bad: FAILED: AssertionError: the second one is wrong" in printed


@pytest.fixture
def bad_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bench_bad.py: a case that is wrong, one that kills its process, one that hangs."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(workers, "GRACE", 0.3)
    (tmp_path / "bench_bad.py").write_text(
        "import os, signal, time\n"
        "import harness\n"
        "OPERATORS = ()\n"
        "NAMES = ('good', 'wrong', 'deadly', 'hanging', 'last')\n"
        "CASES = {n: harness.Case((1, 2, 4, 4), (8, 8), scale=i) for i, n in enumerate(NAMES)}\n"
        "def check(case):\n"
        "    name = NAMES[int(case.scale)]\n"
        "    assert name != 'wrong', 'it is wrong'\n"
        "    if name == 'deadly':\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if name == 'hanging':\n"
        "        signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "        time.sleep(600)\n"
        "def implementation(name, case):\n"
        "    return {'fused': lambda: None, 'other': lambda: None}[name]\n"
    )


def test_tasks_go_on_after_one_that_dies_or_hangs(bad_bench: None) -> None:
    names = ("good", "wrong", "deadly", "hanging", "last")
    tasks = [workers.task("bench_bad", name, ["fused"]) for name in names]
    seen: list[list[str]] = []

    def progress(found: dict[str, Any]) -> None:
        seen.append(list(found["files"].get("bench_bad", {"rows": {}})["rows"]))

    found = workers.run_tasks(
        tasks, threads=1, seconds=0, quick=True, case_limit=2, progress=progress
    )
    file = found["files"]["bench_bad"]
    assert list(file["rows"]) == ["good", "last"]
    assert file["failed"] == {
        "wrong": "AssertionError: it is wrong",
        "deadly": "the process: ended by SIGSEGV",
        "hanging": "the process: no end after 2 s",
    }
    assert ["good"] in seen  # long before the last one
    assert found["rates"]["bytes per ms"] > 0


def test_tasks_without_time_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], limit: float, **options: Any) -> str:
        done = [{"row": {"fused": {"median": 1}}, "failed": {}}]
        result_files.write(Path(json.loads(command[-1])["out"]), {"rates": RATES, "done": done})
        time.sleep(limit)
        return f"no end after {limit:.0f} s"

    monkeypatch.setattr(processes, "run", run)
    tasks = [workers.task("bench_bad", name, ["fused"]) for name in ("good", "hanging", "last")]
    tasks.append(workers.task("bench_bad", "good", ["other"]))
    found = workers.run_tasks(tasks, threads=1, seconds=0, quick=True, limit=0.1)
    file = found["files"]["bench_bad"]
    assert file["failed"] == {"hanging": "the process: no end after 0 s", "last": "no time left"}
    assert file["rows"]["good"]["skipped"] == {"other": "no time left"}


def test_a_file_that_does_not_import_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even before anything runs."""
    monkeypatch.setenv("OUT", str(tmp_path))
    names, reasons = suite.importable(["no_such_file", "bench_upsample_argmax"])
    assert names == ["bench_upsample_argmax"]
    assert reasons == {"no_such_file": "ModuleNotFoundError: No module named 'no_such_file'"}
    row = {"rows": {"only": {"fused": {"median": 1}}}, "failed": {}}

    def run_tasks(tasks: Any, progress: Any, **options: Any) -> dict[str, Any]:
        found = {"rates": RATES, "files": {"bench_upsample_argmax": row}}
        progress(found)
        return found

    monkeypatch.setattr(workers, "run_tasks", run_tasks)
    options = argparse.Namespace(threads=1, seconds=None, quick=True, timeout=None)
    files = suite.run_in_turn("gpu", [], reasons, options)
    (path,) = tmp_path.glob("gpu_*.json")
    assert json.loads(path.read_text())["files"] == files
    assert files["no_such_file"]["failed"] == {"file": reasons["no_such_file"]}
    assert files["bench_upsample_argmax"]["rows"] == row["rows"]


def test_a_file_that_does_not_import_is_named() -> None:
    tasks = [workers.task("no_such_file", "only", ["fused"])]
    found = workers.run_tasks(tasks, threads=1, seconds=0, quick=True)
    reason = "ModuleNotFoundError: No module named 'no_such_file'"
    assert found["files"]["no_such_file"]["failed"] == {"only": reason}


def test_competitors_with_an_environment_go_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = fake_bench()
    monkeypatch.setitem(sys.modules, "bench_fake", bench)

    def run_tasks(tasks: Any, environment: Any, **options: Any) -> dict[str, Any]:
        names = tasks[0]["implementations"]
        times = {name: clocks.statistics([0.001 * len(name)]) for name in names}
        rows = {each["case"]: {**times, "skipped": {"peer": "why"}} for each in tasks}
        failed = {"x": "y"} if environment else {}
        return {"rates": RATES, "files": {"bench_fake": {"rows": rows, "failed": failed}}}

    monkeypatch.setattr(workers, "run_tasks", run_tasks)
    modes = [
        harness.Mode("", ["eager", "fused"], ["only"]),
        harness.Mode("AVX2", ["fused"], ["only"], {"A": "1"}),
        harness.Mode("page-keeping", ["eager"], ["only"], {"B": "1"}),
        harness.Mode("torch.compile", ["compile"], ["only", "none"]),
    ]
    found = workers.run_file("bench_fake", modes, ["only"], [], threads=1, seconds=0, quick=False)
    assert set(found["rows"]) == {"only", "only, AVX2"}
    row = found["rows"]["only"]
    assert set(row) == {"eager", "fused", "page-keeping", "compile", "skipped"}
    assert row["page-keeping"] == row["eager"] and row["compile"]["median"] == 7
    assert found["failed"] == {"x, AVX2": "y", "x, page-keeping": "y"}
    together = harness.in_one_process(modes, ["only"])
    assert together == harness.Mode("", ["eager", "fused", "compile"], ["only"])


def test_a_second_row_adds_to_the_first() -> None:
    row = {"fused": {"median": 1}, "memory": {"fused": 2}, "skipped": {"liger": "absent"}}
    workers.merge(row, {"compile": {"median": 3}, "memory": {"compile": 4}})
    assert row == {
        "fused": {"median": 1},
        "compile": {"median": 3},
        "memory": {"fused": 2, "compile": 4},
        "skipped": {"liger": "absent"},
    }


def test_a_broken_device_is_left_to_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a fault of a kernel, every call of that process fails."""
    monkeypatch.setitem(sys.modules, "bench_fake", fake_bench(fused=lambda: None))
    monkeypatch.setattr(workers, "device_answers", lambda: False)

    class Left(Exception):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    tasks = [workers.task("bench_fake", "only", ["fused"])] * 2
    out = tmp_path / "found.json"
    with pytest.raises(Left, match=str(workers.GO_ON)):
        workers.worker(json.dumps(OPTIONS | {"tasks": tasks, "out": str(out)}))
    assert len(json.loads(out.read_text())["done"]) == 1

    starts = []

    def run(command: list[str], limit: float, **options: Any) -> str | None:
        asked = json.loads(command[-1])
        starts.append([each["case"] for each in asked["tasks"]])
        done = [{"row": {"fused": {"median": 1}}, "failed": {}}]
        result_files.write(Path(asked["out"]), {"rates": RATES, "done": done})
        return f"exit status {workers.GO_ON}" if len(asked["tasks"]) > 1 else None

    monkeypatch.setattr(processes, "run", run)
    tasks = [workers.task("bench_fake", case, ["fused"]) for case in "abc"]
    found = workers.run_tasks(tasks, threads=1, seconds=0, quick=True)
    assert starts == [["a", "b", "c"], ["b", "c"], ["c"]]
    assert list(found["files"]["bench_fake"]["rows"]) == ["a", "b", "c"]
    assert found["files"]["bench_fake"]["failed"] == {}


def test_header_names_what_the_numbers_belong_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(processes.HERE / "suite.py"), "matrix"])
    assert result_files.header()["command"] == "python benchmarks/suite.py matrix"
    about = result_files.header("make bench")
    assert about["command"] == "make bench" and about["kind"] == "cpu"
    assert about["torch"] == torch.__version__ and about["commit"] and about["date"]
    assert about["build_info"] == fcnseg.build_info()
    assert {"device", "driver", "cuda", "triton", "python"} <= set(about)


def test_results_go_where_out_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "new"))
    path = result_files.save("summary", {"files": {}})
    assert path.parent == tmp_path / "new" and path.name.startswith("summary_")
    assert json.loads(path.read_text())["name"] == "summary"


def test_summary_covers_the_operators_with_at_most_12_cases() -> None:
    cases = {name: suite.summary_cases(name) for name in suite.modules()}
    assert sum(map(len, cases.values())) <= suite.SUMMARY_LIMIT
    for name, chosen in cases.items():
        assert set(chosen) <= set(importlib.import_module(name).CASES), name
    operators = ("upsample_cross_entropy", "upsample_argmax", "upsample_confusion_matrix")
    for operator in (*operators, "confusion_matrix"):
        assert cases[f"bench_{operator}"], operator


@compiled
@pytest.mark.parametrize("name", suite.modules())
def test_one_case_of_each_file_runs(name: str) -> None:
    bench = importlib.import_module(name)
    case = next(iter(bench.CASES.values())).tiny()
    row = harness.measure_case(bench, case, ["eager", "fused"], 0.001, RATES)
    assert "skipped" not in row and "failed" not in row
    assert row["eager"]["rounds"] >= 7 and row["fused"]["rounds"] >= 7
    if hasattr(bench, "work"):
        assert row["floor"]["ms"] > 0


@compiled
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_sees_full_resolution_planes() -> None:
    case = harness.Case((1, 19, 32, 32), (512, 512))
    plane = 19 * 512 * 512 * 4 / 2**20
    assert memory.peak_memory("bench_upsample_argmax", "eager", case) >= plane
    assert memory.peak_memory("bench_upsample_argmax", "fused", case) < plane / 2


# --- the report -----------------------------------------------------------------------------------


def results(kind: str = "cpu") -> dict[str, Any]:
    def times(median: float) -> dict[str, float]:
        return {"p20": median, "median": median, "p80": median, "rounds": 7}

    fast = {
        "fused": times(2.0) | ({"wall": 2.5, "graph": 1.9} if kind == "cuda" else {}),
        "eager": times(50.0),
        "compile": times(1.0),
        "numpy": times(3.0),
        "memory": {"fused": 1.25, "eager": 300.4},
        "floor": harness.Work(500_000, 500_000, 10).floor(RATES),
        "skipped": {"liger": "needs liger_kernel"},
    }
    about = result_files.header("make bench") | {"kind": kind, "capability": "sm_90"}
    rows = {"first": fast, "second": {"fused": times(1.0)}}
    file = {"threads": 1, "load_before": [0.5], "rows": rows, "failed": {"third": "it is wrong"}}
    return {"name": "summary", "header": about, "files": {"bench_upsample_argmax": file}}


def test_table_shows_losses_and_what_is_missing() -> None:
    content = results()
    lines = report.table(content).splitlines()
    assert lines[2] == (
        "| `upsample_argmax` | first | 2 | 25x | 0.5x | numpy 1.5x | 1.2 / 300 | 1 (bytes) | 2.0 "
        "| 0.5 GB/s |"
    )
    assert len({line.count("|") for line in lines}) == 1
    assert report.missing(content) == [
        "Skipped: liger (needs liger_kernel).",
        "Failed: bench_upsample_argmax: third: it is wrong.",
    ]


def test_table_of_a_gpu_has_graph_wall_and_the_time_to_read_the_inputs() -> None:
    lines = report.table(results("cuda")).splitlines()
    assert "| 2 | 1.9 | 2.5 | 25x | 0.5x |" in lines[2]
    assert lines[2].endswith("| 0.5 GB/s | 0.5 | 4.0 |")
    assert len({line.count("|") for line in lines}) == 1


def test_report_is_a_function_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    for date, median in (("2026-01-02", 2.0), ("2026-01-03", 4.0)):
        content = results()
        row = content["files"]["bench_upsample_argmax"]["rows"]["first"]
        row["fused"]["median"] = median
        (tmp_path / f"summary_a-b_{date}.json").write_text(json.dumps(content))
    readme = tmp_path / "README.md"
    text = "before\n<!-- bench:summary -->\nold\n<!-- /bench -->\nafter\n"
    once = report.rewrite(text, readme)
    assert report.rewrite(once, readme) == once
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    assert "2026-01-03.json" in once and "2026-01-02.json" not in once
    assert report.stale_blocks(once, readme) == []
    assert report.stale_blocks(once.replace("| 4 |", "| 3 |"), readme) == ["summary"]
    assert report.stale_blocks(once.replace("2026-01-03", "2026-01-02"), readme) == ["summary"]


def test_plots_are_deterministic(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "summary_a_2026-01-01.json"
    file.write_text(json.dumps(results()))
    for name in ("a.png", "b.png"):
        report.plot(file, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("document", report.documents(), ids=lambda path: path.name)
def test_tables_match_the_committed_results(document: Path) -> None:
    """Mend with make bench-report."""
    assert report.stale_blocks(document.read_text(), document) == []
