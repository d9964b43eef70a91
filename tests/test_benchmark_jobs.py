"""Jobs of a benchmark under deadlines: none holds up the next, and what was found is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import jobs
import processes
from clocks import DEVICE_VARIABLE
from jobs import Job
from processes import environment

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")


JOBS = """
import os, subprocess, sys, time

def do(what, **more):
    if what == "raise":
        raise ValueError("no\\nmore")
    if what == "die":
        os._exit(3)
    if what == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(more["pids"], "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    return {"pid": os.getpid()}
"""


@pytest.fixture
def function(tmp_path: Path) -> tuple[str, dict[str, str]]:
    """The name of a function for jobs, and the environment in which it is found."""
    (tmp_path / "fake_jobs.py").write_text(JOBS)
    path = os.pathsep.join([environment()["PYTHONPATH"], str(tmp_path)])
    return "fake_jobs:do", environment() | {"PYTHONPATH": path}


def job(name: str, what: str, limit: float = 60, least: float = 0, **more: Any) -> Job:
    return Job(name, {"what": what, **more.pop("arguments", {})}, limit, least, **more)


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@needs_proc
@pytest.mark.long(8)
def test_no_job_holds_up_the_next(tmp_path: Path, function: tuple[str, dict[str, str]]) -> None:
    pids = tmp_path / "pids"
    todo = [
        Job(jobs.HEADER, {"command": "test"}, 60, 0),
        job("first", "pid"),
        job("second", "pid"),
        job("hangs", "hang", limit=5, kind="slow", arguments={"pids": str(pids)}),
        job("later", "pid", kind="slow"),
        job("raises", "raise"),
        job("dies", "die"),
        job("too long", "pid", least=1e6),
        job("last", "pid"),
    ]
    path = tmp_path / "results.json"
    results = jobs.Results("some", todo, {"tf32": "off"}, str, path)
    order = []

    def keep(done: Job, outcome: dict[str, Any]) -> None:
        results.keep(done, outcome)
        order.append(done.name)
        rows = json.loads(path.read_text())["rows"]  # valid at every moment
        assert sum("not reached" in row.get("dropped", "") for row in rows) == len(todo) - len(
            order
        )

    began = time.monotonic()
    jobs.run_jobs(function[0], todo, 500, keep, environment=function[1])
    assert time.monotonic() - began < 120
    assert order == [
        jobs.HEADER, "first", "second", "hangs", "raises", "dies", "too long", "last", "later",
    ]  # fmt: skip
    content = json.loads(path.read_text())
    assert content["name"] == "some" and content["header"]["tf32"] == "off"
    assert content["header"]["kind"] == "cpu" and content["header"]["command"] == "test"
    first, second, hangs, later, raises, dies, too_long, last = content["rows"]
    assert first["pid"] == second["pid"] != last["pid"]  # warm, and new after a failure
    assert last["pid"] == later["pid"]
    assert hangs["failed"] == "no end after 5 s" and hangs["what"] == "hang"
    assert raises["failed"] == "ValueError: no"
    assert dies["failed"] == "exit status 3"
    assert too_long["dropped"].endswith("s were left, it needs 1000000")
    for pid in map(int, pids.read_text().split()):
        assert not alive(pid)


def test_what_finds_no_time_is_named(function: tuple[str, dict[str, str]]) -> None:
    todo = [job("hangs", "hang", arguments={"pids": os.devnull}), job("second", "pid", least=1)]
    found = {}
    began = time.monotonic()
    jobs.run_jobs(
        function[0],
        todo,
        2,
        lambda done, outcome: found.update({done.name: outcome}),
        environment=function[1],
    )
    assert time.monotonic() - began < 30
    assert found["hangs"]["failed"] == "the time of all jobs was over"
    assert found["second"]["dropped"] == "0 s were left, it needs 1"


def test_a_device_that_fails_ends_the_benchmark() -> None:
    todo = [Job(jobs.HEADER, {}, 1, 0)]
    results = jobs.Results("some", todo, {}, str, False)
    with pytest.raises(SystemExit, match=r"some: the device cannot be used: .*no driver"):
        results.keep(todo[0], {"failed": "RuntimeError: no driver"})


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_benchmark_that_is_ended_leaves_its_results_and_no_process(
    tmp_path: Path, function: tuple[str, dict[str, str]], number: signal.Signals
) -> None:
    """SIGINT is what a part of gpu.py gets at its deadline, and SIGKILL ten seconds later."""
    path, pids = tmp_path / "results.json", tmp_path / "pids"
    code = f"""
import os, jobs
from pathlib import Path
todo = [
    jobs.Job(jobs.HEADER, {{"command": "test"}}, 60, 0),
    jobs.Job("first", {{"what": "pid"}}, 60, 0),
    jobs.Job("hangs", {{"what": "hang", "pids": {str(pids)!r}}}, 60, 0),
]
results = jobs.Results("some", todo, {{}}, str, Path({str(path)!r}))
jobs.run_jobs({function[0]!r}, todo, 100, results.keep, environment=os.environ)
"""
    benchmark = subprocess.Popen([sys.executable, "-c", code], env=function[1])
    end = time.monotonic() + 60
    while not (pids.exists() and pids.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    worker, child = map(int, pids.read_text().split())
    time.sleep(0.5)  # the outcome of the first job is being read
    benchmark.send_signal(number)
    benchmark.wait(timeout=processes.GRACE)
    if number == signal.SIGKILL:  # nobody is left to end what the job itself had started
        os.kill(child, signal.SIGKILL)
    while (alive(worker) or alive(child)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(worker) and not alive(child)
    first, hangs = json.loads(path.read_text())["rows"]
    assert first["pid"] == worker
    assert hangs["dropped"] == "it was not reached"
