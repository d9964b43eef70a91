"""make gpu without a GPU: deadlines, logs, summaries, and a dry run on tiny problems."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fcnseg

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import broken_device
import gpu
import kernel_profile
import processes
import suite

OPERATORS = fcnseg.build_info()["operators"]
compiled = pytest.mark.skipif(
    OPERATORS["upsample_argmax"]["cpu"] != "c++", reason="the compiled CPU operators are missing"
)
MACHINE = {"python": "/usr/bin/python3", "torch": "2.11.0+cu130", "capability": [9, 0]}
DRY = ["--device", "cpu", "--quick"]
#: Ignores SIGINT, as does its child: only SIGKILL to the whole group ends them.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = os.fork()
if child:
    open(sys.argv[1], "w").write(str(child))
    print("it hangs", flush=True)
time.sleep(600)
"""
#: Writes down what it has when it is told to stop.
POLITE = """
import time
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("this much was done", flush=True)
    raise SystemExit(5)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def is_running(pid: int) -> bool:
    """Not even as a zombie that was not reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(true: Any, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.05)
    return False


# --- a process under a deadline -------------------------------------------------------------------


def test_a_process_that_ignores_sigint_is_killed_with_its_children(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log, child = tmp_path / "log", tmp_path / "child"
    log.write_text("before\n")
    start = time.monotonic()
    reason = processes.run(python(STUBBORN, str(child)), 3, log=log, grace=0.5)
    assert reason == "no end after 3 s"
    assert 3.5 <= time.monotonic() - start <= 10
    assert log.read_text() == "before\nit hangs\n"
    assert capfd.readouterr().out == "it hangs\n"
    assert wait_until(lambda: not is_running(int(child.read_text())))


def test_sigint_comes_before_sigkill(tmp_path: Path) -> None:
    log = tmp_path / "log"
    start = time.monotonic()
    assert processes.run(python(POLITE), 3, log=log, repeat=False) == "no end after 3 s"
    assert time.monotonic() - start < processes.GRACE  # it did not wait for SIGKILL
    assert log.read_text() == "this much was done\n"


def test_children_do_not_outlive_a_command_that_ends(tmp_path: Path) -> None:
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid)"
    log = tmp_path / "log"
    assert processes.run(python(code), 60, log=log, repeat=False) is None
    assert wait_until(lambda: not is_running(int(log.read_text())))


def test_how_a_command_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    assert processes.run(python("raise SystemExit(3)"), 60) == "exit status 3"
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    assert processes.run(python(killed), 60) == "ended by SIGSEGV"
    missing = processes.run(["/no/such/program"], 60)
    assert missing == "/no/such/program does not start: No such file or directory"
    monkeypatch.setattr(processes, "LARGEST_LOG", 1 << 20)
    endless = "while True: print('x' * 1000)"
    reason = processes.run(python(endless), 60, log=log, repeat=False, grace=0.1)
    assert reason == "more than 1 MB of output"
    gives_up = processes.run(python("import time; time.sleep(600)"), 60, give_up=lambda: "enough")
    assert gives_up == "enough"


def test_a_process_in_the_same_group_is_ended_alone(tmp_path: Path) -> None:
    """As workers are: the deadline around them must find them in its group."""
    code = "import os, sys; print(os.getpgid(0), flush=True); import time; time.sleep(600)"
    log = tmp_path / "log"
    run = processes.run(python(code), 2, log=log, repeat=False, group=False, grace=5)
    assert run == "no end after 2 s"
    assert log.read_text().splitlines()[0] == str(os.getpgid(0))


# --- stages ---------------------------------------------------------------------------------------


def options(device: str) -> argparse.Namespace:
    return argparse.Namespace(
        device=device, quick=False, slack=1.0, stages=[], parts=None, machine=MACHINE
    )


@pytest.mark.parametrize("stage", gpu.STAGES)
def test_a_stage_ends_in_its_time_even_if_every_part_hangs(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "find_tool", lambda name: f"/usr/bin/{name}")
    parts = gpu.parts(options("cuda"), tmp_path)[stage]
    assert not any(part.skip for part in parts)
    probing = gpu.PROBE_LIMIT + processes.STUCK
    limit = gpu.TRAIN_LIMIT if stage == "train" else gpu.STAGE_LIMIT
    assert probing + sum(part.longest() for part in parts) <= limit
    assert gpu.STAGE_LIMIT < 360 and gpu.TRAIN_LIMIT < 540


def test_a_machine_with_fewer_cores_may_take_longer(tmp_path: Path) -> None:
    slow = options("cuda")
    slow.slack = 2.0
    for name, each in gpu.parts(slow, tmp_path).items():
        for part, normal in zip(each, gpu.parts(options("cuda"), tmp_path)[name], strict=True):
            assert part.seconds == 2 * normal.seconds


def run_stages(table: Any, arguments: Sequence[str] = DRY) -> int:
    return gpu.main(list(arguments), lambda options, folder: table)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(processes, "GRACE", 0.5)
    return tmp_path / "out"


@pytest.mark.long(8)
def test_no_part_can_starve_the_next(
    out: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = {
        "check": [
            gpu.Part("hangs", 3, python(STUBBORN, str(tmp_path / "child"))),
            gpu.Part("breaks", 60, python("raise SystemExit(3)")),
            gpu.Part("absent", 60, skip="a tool is missing"),
            gpu.Part("runs", 60, python("print('it ran')"), note="without a plugin"),
        ],
        "measure": [gpu.Part("measures", 60, python("print('measured')"))],
        "sanitize": [gpu.Part("sanitizes", 60, python("raise SystemExit(1)"))],
    }
    start = time.monotonic()
    assert run_stages(table) == 1
    assert time.monotonic() - start < 60  # of the 600 s that it would sleep
    assert sorted(path.name for path in out.iterdir()) == [
        "check.log", "check_summary.txt", "measure.log", "measure_summary.txt",
    ]  # fmt: skip
    summary = (out / "check_summary.txt").read_text().splitlines()
    assert summary[:4] == [
        "make gpu-check: a dry run on the CPU",
        "hangs: FAILED: no end after 3 s",
        "breaks: FAILED: exit status 3",
        "absent: skipped: a tool is missing",
    ]
    assert summary[4] in [f"runs: passed in {i} s (without a plugin)" for i in range(9)]
    log = (out / "check.log").read_text()
    assert "it hangs" in log and "it ran" in log and "without a plugin" in log
    assert "measured" in (out / "measure.log").read_text()
    printed = capfd.readouterr()
    assert printed.err == "make gpu: failed: hangs, breaks\n"
    assert printed.out.count("it ran\n") == 1


def test_a_part_that_stretches_gets_what_was_left_over_and_no_more(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, float] = {}
    told: dict[str, str] = {}

    def run(command: list[str], seconds: float, **options: Any) -> None:
        given[command[0]], told[command[0]] = seconds, command[-1]

    monkeypatch.setattr(processes, "run", run)
    ending = processes.GRACE + processes.STUCK
    table = {
        "check": [
            gpu.Part("first", 100, ["first"]),
            gpu.Part("second", 50, ["second"], stretches=True, told=("--timeout", 6.0)),
            gpu.Part("absent", 90, skip="a tool is missing"),
            gpu.Part("third", 60, ["third"], told=("--timeout", 6.0)),
        ]
    }
    assert run_stages(table) == 0
    assert given["first"] == 100 and given["third"] == 60 and told["third"] == "54"
    # the first took no time; the third keeps its own, and the skipped one needs none
    expected = gpu.STAGE_LIMIT - 60 - 2 * ending
    assert expected - 5 <= given["second"] <= expected
    assert int(told["second"]) == round(given["second"] - 6)
    monkeypatch.setattr(gpu, "STAGE_LIMIT", 80.0)  # the time is gone: what is its own, it gets
    assert run_stages(table) == 0
    assert given["second"] == 50 and told["second"] == "44"


def test_a_file_that_cannot_be_read_does_not_end_the_run(out: Path) -> None:
    code = "import os; open(os.environ['OUT'] + '/gpu_x.json', 'w').write('{')"
    after = gpu.Part("after", 60, python(""))
    table = {"measure": [gpu.Part("benchmarks", 60, python(code)), after]}
    assert run_stages(table) == 0
    summary = (out / "measure_summary.txt").read_text()
    assert "after: passed in " in summary and "The figures cannot be read" in summary


def test_the_summary_says_what_a_machine_was_doing(out: Path) -> None:
    """When it was switched off."""
    code = f"import sys; print(open({str(out / 'check_summary.txt')!r}).read())"
    run_stages({"check": [gpu.Part("reads", 60, python(code))]})
    assert "reads: running since " in (out / "check.log").read_text()


def test_figures_are_in_the_summary_and_outcomes_in_the_results(out: Path) -> None:
    times = {"p20": 1.0, "median": 2.0, "p80": 3.0, "rounds": 7}
    rows = {"large": {"fused": times, "eager": times | {"median": 50.0}}}
    files = {"bench_upsample_argmax": {"rows": rows, "failed": {"small": "it is wrong"}}}
    code = (
        "import json, os, sys; from pathlib import Path; "
        "Path(os.environ['OUT'], 'smoke_x.json').write_text(sys.argv[1])"
    )
    out.mkdir()
    (out / "gpu_old.json").write_text(json.dumps({"files": {}}))
    os.utime(out / "gpu_old.json", (0, 0))
    command = python(code, json.dumps({"files": files}))
    assert run_stages({"check": [gpu.Part("smoke", 60, command)]}) == 0
    summary = (out / "check_summary.txt").read_text()
    assert "upsample_argmax, large: fused 2 ms; eager 25x\n" in summary
    assert "upsample_argmax, small: FAILED: it is wrong\n" in summary
    outcomes = json.loads((out / "smoke_x.json").read_text())["parts"]
    assert outcomes["smoke"].startswith("passed in ")
    assert json.loads((out / "gpu_old.json").read_text()) == {"files": {}}  # another day's


def test_a_build_may_do_without_cuda_but_nothing_follows_one_that_fails(out: Path) -> None:
    built: list[int] = []
    works = python("import os; raise SystemExit('FORCE_ONLY_CPU' not in os.environ)")
    plain = gpu.Part(
        "build without CUDA C++", 30, works, environment={"FORCE_ONLY_CPU": "1"},
        after=lambda: built.append(2),
    )  # fmt: skip
    after = gpu.Part("after", 60, python("print('it ran')"))
    build = gpu.Part("build", 60, works, otherwise=plain, after=lambda: built.append(1))
    assert run_stages({"check": [build, after]}) == 1
    assert built == [2]  # without CUDA C++: the next stage need not fail as slowly
    summary = (out / "check_summary.txt").read_text()
    assert "build: FAILED: exit status 1; build without CUDA C++: passed\n" in summary
    assert "after: passed in " in summary
    assert run_stages({"check": [gpu.Part("build", 60, works), after]}) == 1
    summary = (out / "check_summary.txt").read_text()
    assert "build: FAILED: exit status 1\nafter: skipped: the build failed\n" in summary


def test_a_build_that_hangs_leaves_time_for_the_one_without_cuda(out: Path) -> None:
    code = "import os, time; time.sleep(0 if 'FORCE_ONLY_CPU' in os.environ else 60)"
    plain = gpu.Part(
        "build without CUDA C++", 20, python(code), environment={"FORCE_ONLY_CPU": "1"}
    )
    assert run_stages({"check": [gpu.Part("build", 21, python(code), otherwise=plain)]}) == 1
    summary = (out / "check_summary.txt").read_text()
    assert "build: FAILED: no end after 1 s; build without CUDA C++: passed\n" in summary


def test_a_build_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "STAMP", tmp_path / "build" / "gpu.json")
    builders = ("setup.py", "build_backend.py", "pyproject.toml")
    for name in (*builders, "csrc/cpu/a.cpp", "fcnseg/_C.so", "fcnseg/_x.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def skipped(**changed: Any) -> str:
        other = options("cuda")
        other.machine = MACHINE | changed
        return gpu.build_part(other, 60).skip

    assert skipped() == ""
    after = gpu.build_part(options("cuda"), 60).after
    assert after is not None
    after()
    assert skipped() == "built before, for this device and Python"
    assert skipped(capability=[8, 0]) == skipped(torch="2.12.0") == skipped(python="/bin/p") == ""
    os.utime(tmp_path / "csrc/cpu/a.cpp", (time.time() + 9, time.time() + 9))
    assert skipped() != ""  # a copy of the same source
    (tmp_path / "csrc/cpu/a.cpp").write_text("int a;")
    assert skipped() == ""
    (tmp_path / "csrc/cpu/a.cpp").write_text("")
    assert skipped() != ""
    (tmp_path / "fcnseg/_C.so").write_text("made by somebody else")
    assert skipped() == ""
    (tmp_path / "fcnseg/_C.so").unlink()
    assert skipped() == ""


def test_the_second_stage_knows_what_the_first_has_built(out: Path) -> None:
    built: list[int] = []

    def table(options: argparse.Namespace, folder: Path) -> dict[str, list[gpu.Part]]:
        build = gpu.Part("build", 60, python(""), after=lambda: built.append(1))
        if built:
            build = gpu.Part("build", 60, skip="built before")
        return {"check": [build], "measure": [build]}

    assert gpu.main(DRY, table) == 0
    assert "build: passed in " in (out / "check_summary.txt").read_text()
    assert "build: skipped: built before\n" in (out / "measure_summary.txt").read_text()


def test_ncu_that_may_not_read_counters_is_no_failure(out: Path) -> None:
    assert run_stages({"measure": [gpu.Part("ncu", 60, python("raise SystemExit(1)"))]}) == 0
    assert "ncu: skipped: exit status 1" in (out / "measure_summary.txt").read_text()


def test_stages_and_parts_are_chosen_by_name(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = [gpu.Part(name, 60, python(f"print('{name}')")) for name in ("first", "second")]
    table = {"check": part[:1], "measure": part, "sanitize": part[:1]}
    assert run_stages(table, [*DRY, "sanitize"]) == 0
    assert [path.name for path in out.glob("*.log")] == ["sanitize.log"]
    assert run_stages(table, [*DRY, "measure", "--parts", "second"]) == 0
    assert "first" not in (out / "measure_summary.txt").read_text()
    for arguments, message in (
        (["mesure"], "no stage 'mesure'; choose from check, measure, train, sanitize"),
        (["check", "--parts", "second"], "--parts: no 'second'; choose from first"),
    ):
        with pytest.raises(SystemExit):
            run_stages(table, [*DRY, *arguments])
        assert message in capsys.readouterr().err


def test_who_ends_make_gpu_ends_its_parts(tmp_path: Path) -> None:
    """And leaves the summary."""
    child = tmp_path / "child"
    code = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    script = (
        "import runpy, sys, gpu\n"
        f"part = gpu.Part('sleeps', 60, [sys.executable, '-c', {code!r}])\n"
        "gpu.signal.signal(gpu.signal.SIGTERM, gpu.signal.default_int_handler)\n"
        f"gpu.main({DRY!r}, lambda options, folder: {{'check': [part]}})\n"
    )
    process = subprocess.Popen(
        python(script), env=processes.environment({"OUT": str(tmp_path)}), stderr=subprocess.PIPE
    )
    assert wait_until(lambda: child.exists() and child.read_text(), 60)
    process.send_signal(signal.SIGTERM)
    assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert not is_running(int(child.read_text()))
    assert "sleeps: running since" in (tmp_path / "check_summary.txt").read_text()


# --- the parts ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_make_gpu_stops_at_once_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(gpu.__file__)], env=processes.environment({"OUT": str(tmp_path)}),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("make gpu: no CUDA device: torch ")
    assert "make gpu PYTHON=" in done.stderr


def test_a_python_without_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PROBE", "import no_such_torch")
    with pytest.raises(SystemExit, match=r"torch does not import in .*no_such_torch"):
        gpu.probe()
    monkeypatch.setattr(gpu, "PROBE", "import time; time.sleep(600)")
    monkeypatch.setattr(gpu, "PROBE_LIMIT", 1)
    with pytest.raises(SystemExit, match=r"\(no end after 1 s\)"):
        gpu.probe()


def test_the_tests_part_takes_the_files_with_gpu_tests() -> None:
    names = [Path(path).name for path in gpu.gpu_tests()]
    assert names[0] == "test_triton_gpu.py" and "test_data.py" not in names


def test_tests_run_in_parallel_where_the_plugins_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 16)
    part = gpu.tests_part(options("cuda"), 170)
    command = " ".join(part.command)
    assert "-n 12 --timeout 120 --timeout-method thread" in command and part.note == ""
    assert "-m gpu and not slow -rfE --tb=short" in command
    assert part.environment["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    part = gpu.tests_part(options("cuda"), 170)
    assert "-n" not in part.command and "--timeout" not in part.command
    assert "without pytest-xdist" in part.note and "without pytest-timeout" in part.note


def test_ncu_asks_for_a_launch_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the loss launches the main kernel once; the launches of the others do not count."""
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu, "find_tool", lambda name: f"/usr/bin/{name}")
    command = list(gpu.ncu_part(options("cuda"), tmp_path, 30).command)
    value = dict(itertools.pairwise(command))
    assert value["--kernel-name"] == f"regex:^{gpu.MAIN_KERNEL}"
    assert int(value["--launch-skip"]) + int(value["--launch-count"]) <= kernel_profile.LAUNCHES
    assert value["--log-file"] == str(tmp_path / "ncu.log")
    kernels = {name.rsplit(".", 1)[1] for name, _ in kernel_profile.triton_kernels()}
    assert [name for name in kernels if name.startswith(gpu.MAIN_KERNEL)] == [gpu.MAIN_KERNEL]
    steps = []
    monkeypatch.setattr(kernel_profile, "step_of", lambda bench, quick: lambda: steps.append(1))
    monkeypatch.setattr(sys, "argv", ["kernel_profile.py", "--device", "cpu", "--launch"])
    monkeypatch.setenv(kernel_profile.clocks.DEVICE_VARIABLE, "cpu")
    kernel_profile.main()
    assert len(steps) == kernel_profile.LAUNCHES


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    table = gpu.parts(options("cuda"), tmp_path)
    skipped = {part.name: part.skip for stage in table.values() for part in stage if part.skip}
    assert skipped == {
        "ncu": "ncu is neither on the PATH nor in CUDA_HOME",
        "sanitizer": "compute-sanitizer is neither on the PATH nor in CUDA_HOME",
    }


# --- tests whose device breaks --------------------------------------------------------------------


@pytest.mark.parametrize("answers", [True, False])
def test_a_test_process_ends_when_its_device_breaks(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every later test of it would fail, whatever it tests."""
    left: list[int] = []

    def synchronize() -> None:
        if not answers:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(broken_device.os, "_exit", left.append)
    plugin = broken_device.BrokenDevice()
    report = argparse.Namespace(failed=True)
    plugin.pytest_runtest_logfinish()  # nothing failed: the device is not asked
    assert left == []
    plugin.pytest_runtest_logreport(report)
    plugin.pytest_runtest_logfinish()
    assert left == ([] if answers else [broken_device.STATUS])


# --- all of it ------------------------------------------------------------------------------------


@compiled
@pytest.mark.long(40)
def test_a_dry_run_with_a_part_that_hangs(tmp_path: Path) -> None:
    """Every part on tiny problems, and one among them that ignores SIGINT."""
    script = tmp_path / "planted.py"
    script.write_text(
        "import sys\n"
        "import gpu, processes\n"
        "processes.GRACE = 1.0\n"
        "def table(options, folder):\n"
        "    found = gpu.parts(options, folder)\n"
        f"    hang = [sys.executable, '-c', {STUBBORN!r}, {str(tmp_path / 'child')!r}]\n"
        "    found['check'].insert(1, gpu.Part('planted', 4, hang))\n"
        "    return found\n"
        f"sys.exit(gpu.main({[*DRY, '--slack', '3']!r}, table))\n"
    )
    out = tmp_path / "out"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script)], env=processes.environment({"OUT": str(out)}),
        capture_output=True, text=True,
    )  # fmt: skip
    assert time.monotonic() - start < 3 * 2 * gpu.STAGE_LIMIT
    assert done.returncode == 1 and done.stderr == "make gpu: failed: planted\n", done.stdout
    assert len(list(out.iterdir())) <= 8
    summaries = "".join((out / f"{x}_summary.txt").read_text() for x in ("check", "measure"))
    assert "planted: FAILED: no end after 4 s\ntests: passed in " in summaries
    for part in ("tests", "smoke", "rehearse", "benchmarks", "profile"):
        assert f"\n{part}: passed in " in summaries, summaries
    assert "build: skipped: on the CPU" in summaries and "ncu: skipped: " in summaries
    log = (out / "check.log").read_text()
    assert "it hangs" in log and "=== smoke" in log
    for name, cases in (("smoke", 1), ("gpu", 2)):
        (path,) = out.glob(f"{name}_*.json")
        content = json.loads(path.read_text())
        assert set(content["files"]) == set(suite.modules())
        assert content["parts"]["build"].startswith("skipped")
        for file in content["files"].values():
            assert len(file["rows"]) == cases and file["failed"] == {}
            assert all({"fused", "eager", "floor"} <= set(row) for row in file["rows"].values())
    assert list(out.glob("profile_*.json"))
