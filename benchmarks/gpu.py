"""make gpu: what a CUDA machine can show, without a network, in about eight minutes.

    python benchmarks/gpu.py [--parts PART ...] [--device cuda|cpu] [--quick]

with the Python that sees the GPU. Parts, each in processes of its own and for a limited time:

    build       pip install --no-build-isolation --no-deps -e ., for this device's architecture
    tests       pytest -m gpu
    benchmarks  suite.py gpu
    profile     kernel_profile.py: registers, occupancy, torch.profiler
    ncu         Nsight Compute on the loss
    sanitizer   compute-sanitizer over the kernels

The Python needs torch, Triton, NumPy, pytest, and for the build pybind11, ninja, wheel and
setuptools >= 77. A part that fails does not stop the others, but nothing follows a failed build; a
tool that is missing, or a part for which no time is left, is named. $OUT (else
benchmarks/results) gets the JSON, the table is printed last, and the exit status is 1 if a part
failed. --device cpu --quick runs the same code on tiny problems, as a test does.

This file needs the standard library alone: it runs before fcnseg is built.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT = 470.0  # seconds of all parts
SANITIZER = ROOT / "tests" / "sanitize_gpu.sh"
#: Seconds that a part may take, of what is left of LIMIT.
BOXES = {
    "build": 120.0,
    "tests": 140.0,
    "benchmarks": 190.0,
    "profile": 60.0,
    "ncu": 60.0,
    "sanitizer": 180.0,
}
PROBE = """
import json, torch
import importlib.util
missing = [n for n in ("pybind11", "wheel", "pytest", "triton") if not importlib.util.find_spec(n)]
found = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "device": torch.cuda.get_device_name() if found else None,
    "missing": missing,
    "capability": list(torch.cuda.get_device_capability()) if found else None,
}))
"""


def probe() -> dict:
    """What torch sees; ends the program with one sentence where that is no GPU."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        sys.exit(f"make gpu: torch does not import in {sys.executable} ({why}). "
                 "Choose another with: make gpu PYTHON=...")  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
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


def call(command: Sequence[str], limit: float, environment: dict[str, str]) -> str | None:
    """Why the command failed, or None. Out of time, it is ended with all its children."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"no end after {limit:.0f} s"
    return None if code == 0 else f"exit status {code}"


def gpu_tests() -> list[str]:
    """Files with tests for a GPU; the others may import what this machine lacks."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path) for path in files if "pytest.mark.gpu" in path.read_text()]


def commands(options: argparse.Namespace) -> dict[str, list[str] | str]:
    """The command of each part, or why it is skipped."""
    python = sys.executable
    target = ["--device", options.device, *(["--quick"] if options.quick else [])]
    ncu, bash = shutil.which("ncu"), shutil.which("bash")
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    sanitizer: list[str] | str = [bash or "", str(SANITIZER)]
    if not SANITIZER.exists():
        sanitizer = f"there is no {SANITIZER.relative_to(ROOT)}"
    elif not any(shutil.which("compute-sanitizer", path=path) for path in (None, toolkit)):
        sanitizer = "compute-sanitizer is neither on the PATH nor in CUDA_HOME"
    elif bash is None:
        sanitizer = "it needs bash"
    profile = [python, str(HERE / "kernel_profile.py"), *target]
    return {
        "build": [python, "-m", "pip", "--disable-pip-version-check", "install",
                  "--no-build-isolation", "--no-deps", "-e", "."],
        # a file that imports what this machine lacks must not keep the others from running
        "tests": [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
                  "--continue-on-collection-errors", "--maxfail", "20", *gpu_tests()],
        "benchmarks": [python, str(HERE / "suite.py"), "gpu", *target],
        "profile": profile,
        # clocks stay as they are
        "ncu": "ncu is not on the PATH" if ncu is None else [
            ncu, "--clock-control", "none", "-k", "regex:upsample_cross_entropy",
            "--launch-skip", "4", "--launch-count", "2", "--section", "SpeedOfLight",
            "--section", "Occupancy", "--section", "WarpStateStats", *profile, "--launch"],
        "sanitizer": sanitizer,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="make gpu")
    parser.add_argument("--parts", nargs="+", choices=tuple(BOXES), default=list(BOXES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny problems: a test of the code")
    options = parser.parse_args()
    environment = dict(os.environ)
    if options.device == "cuda":
        found = probe()
        print(f"make gpu: {found['device']}, torch {found['torch']}, CUDA {found['cuda']}")
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*found["capability"])
    environment.update(PYTHONUNBUFFERED="1", PYTHON=sys.executable)
    folder = Path(os.environ.get("OUT") or HERE / "results").absolute()
    environment["OUT"] = str(folder)
    start, began = time.monotonic(), time.time()
    outcomes: dict[str, str] = {}
    for name, command in commands(options).items():
        if name not in options.parts:
            continue
        if isinstance(command, str):
            outcomes[name] = f"skipped: {command}"
            continue
        part = time.monotonic()
        left = LIMIT - (part - start)
        if left < 15:
            outcomes[name] = f"skipped: no time left: --parts {name} runs it alone"
            continue
        if outcomes.get("build", "").startswith("FAILED"):
            outcomes[name] = "skipped: the build failed"
            continue
        print(f"\n=== {name}", flush=True)
        limit = min(BOXES[name], left)
        if name == "benchmarks":  # it ends itself, and keeps what it has
            command = [*command, "--timeout", f"{max(limit - 15, 1):.0f}"]
        reason = call(command, limit, environment)
        seconds = time.monotonic() - part
        outcomes[name] = f"FAILED: {reason}" if reason else f"passed in {seconds:.0f} s"
        if reason and name == "ncu":  # often for root alone
            outcomes[name] = f"skipped: {reason} (may this user read performance counters?)"
    print("\n=== result", flush=True)
    tables = [path for path in folder.glob("gpu_*.json") if path.stat().st_mtime >= began]
    for table in tables:
        content = json.loads(table.read_text())
        table.write_text(json.dumps({**content, "parts": outcomes}, indent=1) + "\n")
        call([sys.executable, str(HERE / "report.py"), "--print", str(table)], 60, environment)
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    failed = [name for name, outcome in outcomes.items() if outcome.startswith("FAILED")]
    if failed:
        print(f"make gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
