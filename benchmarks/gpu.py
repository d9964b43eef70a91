"""make gpu: what a CUDA machine can show, without a network, in minutes that are counted.

    python benchmarks/gpu.py [check] [measure] [train] [sanitize] [--device cuda|cpu] [--quick]
                             [--parts PART ...] [--slack TIMES]

with the Python that sees the GPU. Stages, each under six minutes on 16 cores, train under nine; the
default is the first two:

    check      build the extension for this device's architecture; the GPU tests without the slow
               ones, in parallel processes; a smoke figure of every operator
    measure    build (quick where check did it); rehearse, so that every kernel is compiled, on all
               cores; the benchmarks in order of worth; profile: registers, occupancy, the
               profiler's table; ncu: Nsight Compute on the main kernel of the loss
    train      build; training: steps of ResNet-101 FCN in order of worth, the largest batches;
               curves: losses of trainings with both losses in fp32, fp16 and bf16
    sanitize   build; compute-sanitizer over the kernels

A part runs in processes of its own under a deadline of its own: at it SIGINT, ten seconds later
SIGKILL to the whole process group. No part can take the time of another; what parts leave over goes
to the tests, the figures and the training. A part that fails does not stop the others, but
nothing follows a build that fails even without CUDA C++. With fewer cores, --slack 2 makes the
deadlines twice as long.

Written as they come, into $OUT (else benchmarks/results): STAGE.log with all output,
STAGE_summary.txt, and by the parts smoke_*.json, gpu_*.json, profile_*.json, ncu.log,
training_*.json and curves_*.json. The exit status is 1 if a part failed. --device cpu --quick runs
the same code on tiny problems without a GPU, as a test does.

The Python needs torch, Triton, NumPy, pytest, and for the build pybind11, wheel and setuptools >=
77; a tool or a plugin that is missing is named. A copy without .git takes its commit from
FCNSEG_COMMIT. This file needs the standard library alone: it runs before fcnseg is built.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import processes
import tables
import training_table
from processes import HERE, ROOT

STAGE_LIMIT = 355.0  # seconds of a stage, whatever its parts do
TRAIN_LIMIT = 535.0  # of the stage "train"
PROBE_LIMIT = 45.0  # torch may be read from a cold disk
STAGES = ("check", "measure", "train", "sanitize")
SANITIZER = ROOT / "tests" / "sanitize_gpu.sh"
STAMP = ROOT / "build" / "gpu.json"
TEST_PROCESSES = 12
#: What ncu looks at: a step of the loss launches this kernel once, and others beside it.
MAIN_KERNEL = "_upsample_cross_entropy_kernel"
PROBE = """
import importlib.metadata, importlib.util, json, sys, torch
names = ("pybind11", "wheel", "setuptools", "pytest", "triton")
missing = [name for name in names if importlib.util.find_spec(name) is None]
if "setuptools" not in missing:
    version = importlib.metadata.version("setuptools")
    if int(version.split(".")[0]) < 77:
        missing.append("setuptools >= 77 (it has " + version + ")")
found = torch.cuda.is_available()
with open(sys.argv[1], "w") as file:
    json.dump({
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if found else None,
        "missing": missing,
        "capability": list(torch.cuda.get_device_capability()) if found else None,
    }, file)
"""


@dataclass(frozen=True)
class Part:
    """A command and its deadline, or why it is skipped. ``note``: what it has to do without.

    The seconds are its own. A part that ``stretches`` also gets what the parts before it have left
    over. ``told``: an option by which the command is told its seconds, less some to end itself.
    """

    name: str
    seconds: float
    command: Sequence[str] = ()
    skip: str = ""
    note: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    stretches: bool = False
    told: tuple[str, float] | None = None
    #: Tried where the command fails; so much of the part's seconds is kept for it.
    otherwise: Part | None = None
    #: Called where the command passes.
    after: Callable[[], None] | None = None

    def longest(self) -> float:
        """Seconds, if it ignores every signal."""
        calls = 1 if self.otherwise is None else 2
        return 0.0 if self.skip else self.seconds + calls * (processes.GRACE + processes.STUCK)


def probe() -> dict:
    """What torch sees; ends the program with one sentence where that is no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "found.json", Path(folder) / "log"
        command = [sys.executable, "-c", PROBE, str(out)]
        reason = processes.run(command, PROBE_LIMIT, log=log, repeat=False, grace=0.0)
        if reason is not None:
            why = (log.read_text().strip().splitlines() or [reason])[-1]
            sys.exit(f"make gpu: torch does not import in {sys.executable} ({why}). "
                     "Choose another with: make gpu PYTHON=...")  # fmt: skip
        found = json.loads(out.read_text())
    if found["device"] is None:
        reason = "this torch was built without CUDA" if found["cuda"] is None else (
            f"torch was built for CUDA {found['cuda']}, but sees no device or no driver"
        )  # fmt: skip
        sys.exit(f"make gpu: no CUDA device: torch {found['torch']}: {reason}. "
                 "Run it on a machine with an NVIDIA GPU, or choose the Python that sees it "
                 "with: make gpu PYTHON=...")  # fmt: skip
    if found["missing"]:
        sys.exit(f"make gpu: {sys.executable} lacks {', '.join(found['missing'])}")
    return found


# --- the parts ------------------------------------------------------------------------------------


def gpu_tests() -> list[str]:
    """Files with tests for a GPU, the loss first; the others may import what this machine lacks."""
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda p: ("triton" not in p.name, p))
    return [str(path) for path in files if "pytest.mark.gpu" in path.read_text()]


def find_tool(name: str) -> str | None:
    """On the PATH, or in the CUDA toolkit."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which(name) or shutil.which(name, path=toolkit)


def build_state(machine: Mapping[str, object]) -> dict[str, object]:
    """All that a build follows from, and what it made: as long as it stays, so may the build.

    The sources by content: a copied working tree has new times.
    """
    digest = hashlib.sha256()
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    builders = [ROOT / name for name in ("setup.py", "build_backend.py", "pyproject.toml")]
    for path in [*builders, *sorted(sources)]:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    made = {path.name: [path.stat().st_size, path.stat().st_mtime_ns]
            for path in sorted((ROOT / "fcnseg").glob("_*.so"))}  # fmt: skip
    return {**machine, "sources": digest.hexdigest(), "made": made}


def built_before(machine: Mapping[str, object]) -> str:
    """Why nothing need be built (setuptools would compile everything anew), or ""."""
    if not STAMP.exists():
        return ""
    kept, state = json.loads(STAMP.read_text()), build_state(machine)
    return str(kept["how"]) if state["made"] and kept["state"] == state else ""


def keep_build(machine: Mapping[str, object], how: str) -> None:
    STAMP.parent.mkdir(exist_ok=True)
    STAMP.write_text(json.dumps({"state": build_state(machine), "how": how}))


def build_part(options: argparse.Namespace, seconds: float) -> Part:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install",
               "--no-build-isolation", "--no-deps", "-e", "."]  # fmt: skip
    if options.device == "cpu":
        return Part("build", seconds, skip="on the CPU, what is installed is taken")
    if how := built_before(options.machine):
        return Part("build", seconds, skip=how)
    # the Triton kernels need no nvcc: better they alone than nothing
    plain = Part(
        "build without CUDA C++", seconds / 3, command, environment={"FORCE_ONLY_CPU": "1"},
        after=lambda: keep_build(options.machine, "built before, but CUDA C++ failed to build"),
    )  # fmt: skip
    return Part(
        "build", seconds, command, otherwise=plain,
        after=lambda: keep_build(options.machine, "built before, for this device and Python"),
    )  # fmt: skip


def tests_part(options: argparse.Namespace, seconds: float) -> Part:
    """A timeout in a thread ends a process that hangs in a kernel; xdist then starts another."""
    # a file that imports what this machine lacks must not keep the others from running
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu and not slow", "-rfE", "--tb=short",
               "-p", "no:cacheprovider", "--continue-on-collection-errors"]  # fmt: skip
    parallel = importlib.util.find_spec("xdist") is not None
    timeout = importlib.util.find_spec("pytest_timeout") is not None
    notes = []
    if parallel:
        command += ["-p", "broken_device"]
        command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    else:
        notes.append("without pytest-xdist: in one process, which will not get far")
    if timeout:
        command += ["--timeout", "120", *(["--timeout-method", "thread"] if parallel else [])]
    else:
        notes.append("without pytest-timeout: a test that hangs stops the others of its process")
    return Part(
        "tests", seconds, [*command, *gpu_tests()], note="; ".join(notes), stretches=True,
        # the processes share the cores
        environment={"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
    )  # fmt: skip


def suite_part(name: str, which: str, options: argparse.Namespace, seconds: float) -> Part:
    """A set of suite.py, which is told to end itself before its deadline."""
    command = [sys.executable, str(HERE / "suite.py"), which, *target(options)]
    return Part(name, seconds, command, stretches=which != "rehearse", told=("--timeout", 6.0))


def jobs_part(
    name: str, script: str, options: argparse.Namespace, seconds: float, words: Sequence[str] = ()
) -> Part:
    """A benchmark that is a list of jobs, told to end itself before its deadline."""
    command = [sys.executable, str(HERE / script), *target(options), *words]
    return Part(name, seconds, command, stretches=name == "training", told=("--seconds", 8.0))


def target(options: argparse.Namespace) -> list[str]:
    return ["--device", options.device, *(["--quick"] if options.quick else [])]


def ncu_part(options: argparse.Namespace, folder: Path, seconds: float) -> Part:
    tool = find_tool("ncu")
    if tool is None:
        return Part("ncu", seconds, skip="ncu is neither on the PATH nor in CUDA_HOME")
    if options.device == "cpu":
        return Part("ncu", seconds, skip="it needs a GPU")
    launch = [sys.executable, str(HERE / "kernel_profile.py"), *target(options), "--launch"]
    sections = ("SchedulerStats", "InstructionStats", "MemoryWorkloadAnalysis")
    return Part(
        "ncu", seconds,
        # Of the launches that the name lets through, one per step: the third. Clocks as they are.
        [tool, "--clock-control", "none", "--kernel-name", f"regex:^{MAIN_KERNEL}",
         "--launch-skip", "2", "--launch-count", "1",
         *(word for section in sections for word in ("--section", section)),
         "--log-file", str(folder / "ncu.log"), *launch],
    )  # fmt: skip


def sanitizer_part(options: argparse.Namespace, seconds: float) -> Part:
    bash, skip = shutil.which("bash"), ""
    if options.device == "cpu":
        skip = "it needs a GPU"
    elif find_tool("compute-sanitizer") is None:
        skip = "compute-sanitizer is neither on the PATH nor in CUDA_HOME"
    elif bash is None:
        skip = "it needs bash"
    command = [bash or "", str(SANITIZER)]
    return Part("sanitizer", seconds, command, skip=skip, stretches=True)


def parts(options: argparse.Namespace, folder: Path) -> dict[str, list[Part]]:
    """The parts of every stage, in order."""
    slack = options.slack
    # what has no bfloat16 arithmetic trains in float16
    old = options.machine.get("capability", [8, 0]) < [8, 0]
    half = ["--precision", "fp16"] if old else []
    halves = ["--precisions", "fp32", "fp16"] if old else []
    profile = [sys.executable, str(HERE / "kernel_profile.py"), *target(options)]
    return {
        "check": [
            build_part(options, slack * 70),
            tests_part(options, slack * 140),
            suite_part("smoke", "smoke", options, slack * 55),
        ],
        "measure": [
            build_part(options, slack * 57),
            suite_part("rehearse", "rehearse", options, slack * 42),
            suite_part("benchmarks", "gpu", options, slack * 95),
            Part("profile", slack * 22, profile),
            ncu_part(options, folder, slack * 27),
        ],
        "train": [
            build_part(options, slack * 57),
            jobs_part("training", "bench_training_step.py", options, slack * 310, half),
            jobs_part("curves", "bench_training_curves.py", options, slack * 75, halves),
        ],
        "sanitize": [build_part(options, slack * 60), sanitizer_part(options, slack * 215)],
    }


# --- running them ---------------------------------------------------------------------------------


class Stage:
    """Runs parts one after the other, and keeps the log and the summary up to date."""

    def __init__(
        self, name: str, about: str, folder: Path, environment: Mapping[str, str], end: float
    ) -> None:
        """``end``: of the stage, on the monotonic clock."""
        self.name, self.about, self.folder, self.environment = name, about, folder, environment
        self.end = end
        self.log, self.summary = folder / f"{name}.log", folder / f"{name}_summary.txt"
        self.outcomes: dict[str, str] = {}
        self.built = True  # or there is nothing to build
        self.began = time.time()
        self.log.write_text("")

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a") as log:
            log.write(f"{text}\n")

    def note(self, part: str, outcome: str) -> None:
        self.outcomes[part] = outcome
        self.write_summary()

    def results(self) -> list[Path]:
        """The files of results that this stage wrote."""
        sets = ("smoke", "gpu", "training", "curves")
        paths = [path for name in sets for path in self.folder.glob(f"{name}_*.json")]
        return [path for path in paths if path.stat().st_mtime >= self.began]

    def figures(self) -> list[str]:
        lines = []
        for path in self.results():
            content = json.loads(path.read_text())
            if path.name.startswith("training_"):
                lines += [f"{training_table.title(row)}: {training_table.line(row)}"
                          for row in content["rows"]]  # fmt: skip
            for module, file in content.get("files", {}).items():
                stem = module.removeprefix("bench_")
                lines += [f"{stem}, {case}: {tables.sentence(row)}"
                          for case, row in file["rows"].items()]  # fmt: skip
                lines += [f"{stem}, {case}: FAILED: {why}" for case, why in file["failed"].items()]
        return lines

    def write_summary(self) -> None:
        lines = [f"make gpu-{self.name}: {self.about}"]
        lines += [f"{part}: {outcome}" for part, outcome in self.outcomes.items()]
        try:
            figures = self.figures()
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            figures = [f"The figures cannot be read: {type(error).__name__}: {error}"]
        processes.write_at_once(self.summary, "\n".join([*lines, "", *figures]) + "\n")

    def run_all(self, parts: Sequence[Part]) -> None:
        for i, part in enumerate(parts):
            seconds = part.seconds
            if part.stretches:
                later = sum(each.longest() for each in parts[i + 1 :])
                ending = processes.GRACE + processes.STUCK
                seconds = max(seconds, self.end - time.monotonic() - later - ending)
            self.run(part, seconds)

    def run(self, part: Part, seconds: float) -> None:
        skip = part.skip or ("" if self.built else "the build failed")
        if skip:
            self.note(part.name, f"skipped: {skip}")
            self.say(f"\n=== {part.name}: skipped: {skip}")
            return
        self.note(part.name, f"running since {datetime.datetime.now():%H:%M:%S}")
        start = time.monotonic()
        reserve = 0.0 if part.otherwise is None else part.otherwise.seconds
        reason = self.call(part, seconds - reserve)
        outcome, works = f"FAILED: {reason}", reason is None
        if works:
            outcome = f"passed in {time.monotonic() - start:.0f} s"
            if part.after is not None:
                part.after()
        elif part.name == "ncu":  # often for root alone
            outcome = f"skipped: {reason} (may this user read performance counters?)"
        elif part.otherwise is not None:
            left = max(seconds - (time.monotonic() - start), reserve)
            works = self.call(part.otherwise, left) is None
            if works and part.otherwise.after is not None:
                part.otherwise.after()
            outcome += f"; {part.otherwise.name}: {'passed' if works else 'failed too'}"
        self.built = works or part.name != "build"
        self.note(part.name, outcome + (f" ({part.note})" if part.note else ""))
        self.say(f"--- {part.name}: {self.outcomes[part.name]}")

    def call(self, part: Part, seconds: float) -> str | None:
        command = [*part.command]
        if part.told is not None:
            option, less = part.told
            command += [option, f"{max(seconds - less, 1.0):.0f}"]
        self.say(f"\n=== {part.name}, at most {seconds:.0f} s: {shlex.join(command)}")
        if part.note:
            self.say(part.note)
        environment = {**self.environment, **part.environment}
        return processes.run(command, seconds, environment=environment, log=self.log)

    def finish(self) -> None:
        """The outcomes into the files of results, and the summary once more."""
        for path in self.results():
            with contextlib.suppress(ValueError):  # of which the summary tells
                content = {**json.loads(path.read_text()), "parts": self.outcomes}
                processes.write_at_once(path, json.dumps(content, indent=1) + "\n")
        self.write_summary()
        print(f"\n{self.summary.read_text()}", flush=True)


Table = Callable[[argparse.Namespace, Path], dict[str, list[Part]]]


def main(arguments: Sequence[str] | None = None, table: Table = parts) -> int:
    parser = argparse.ArgumentParser(description="make gpu")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="of the stages: only these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny problems: a test of the code")
    parser.add_argument("--slack", type=float, default=1.0, help="times the deadlines: fewer cores")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"no stage {min(unknown)!r}; choose from {', '.join(STAGES)}")
    environment = processes.environment({"PYTHONUNBUFFERED": "1", "PYTHON": sys.executable})
    about, options.machine = "a dry run on the CPU", {"python": sys.executable}
    if options.device == "cuda":
        found = probe()
        about = f"{found['device']}, torch {found['torch']}, CUDA {found['cuda']}"
        options.machine |= {key: found[key] for key in ("torch", "capability")}
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*found["capability"])
    folder = Path(os.environ.get("OUT") or HERE / "results").absolute()
    environment["OUT"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stages = [name for name in table(options, folder) if name in (options.stages or STAGES[:2])]
    known = {part.name for name in stages for part in table(options, folder)[name]}
    if unknown := set(options.parts or ()) - known:
        parser.error(f"--parts: no {min(unknown)!r}; choose from {', '.join(sorted(known))}")
    failed = []
    for name in stages:
        limit = options.slack * (TRAIN_LIMIT if name == "train" else STAGE_LIMIT)
        stage = Stage(name, about, folder, environment, start + limit)
        stage.say(f"make gpu-{name}: {about}")
        try:
            every = table(options, folder)[name]  # anew: what is built now is not built again
            stage.run_all([x for x in every if options.parts is None or x.name in options.parts])
        finally:
            stage.finish()
        start = time.monotonic()
        failed += [part for part, outcome in stage.outcomes.items() if "FAILED" in outcome]
    if failed:
        print(f"make gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no part survives it
    sys.exit(main())
