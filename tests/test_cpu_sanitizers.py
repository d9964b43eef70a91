"""The CPU kernels without torch, under sanitizers, an emulator and another architecture's compiler.

``cpu_core_driver.cpp`` is the program; it compares every problem with a plain double version.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["tests/cpu_core_driver.cpp", *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*_core.cpp")
)]  # fmt: skip
FLAGS = ["-std=c++17", "-I", "csrc/cpu", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


def tool(*names: str) -> str:
    """The first of the programs that is installed; skips the test where there is none."""
    for name in names:
        if (path := shutil.which(name)) is not None:
            return path
    pytest.skip(f"{' and '.join(names)}: not installed")


def run(command: list[str], **environment: str) -> str:
    finished = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout


def build(folder: Path, *flags: str) -> str:
    """The driver. The sources compile side by side: together they take a minute of processor."""
    compiler = tool(os.environ.get("CXX", "c++"), "g++")
    objects, running = [], []
    for source in SOURCES:
        objects.append(str(folder / (Path(source).stem + ".o")))
        command = [compiler, *FLAGS, *flags, "-c", source, "-o", objects[-1]]
        running.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for process in running:
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == 0, errors[-4000:]
    program = str(folder / "driver")
    run([compiler, *flags, *objects, "-pthread", "-o", program])
    return program


@pytest.mark.long(45)
def test_address_and_undefined_behaviour(tmp_path):
    program = build(
        tmp_path, "-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"
    )
    capabilities = ["default", "avx2", "avx512"]
    widest = run([program]).split(":")[0]
    for capability in capabilities[: capabilities.index(widest)]:
        out = run([program], FCNSEG_CPU_CAPABILITY=capability)
        assert out == f"{capability}: 168 problems, 0 wrong\n"


def test_haswell_runs_the_avx2_kernels(tmp_path):
    """No AVX-512 instruction has leaked into them, nor AVX2 into the portable ones."""
    if platform.machine() != "x86_64":
        pytest.skip("not an x86-64 machine")
    emulator = tool("qemu-x86_64", "qemu-x86_64-static")
    program = build(tmp_path, "-O2")
    out = run([emulator, "-cpu", "Haswell", program])
    assert out == "avx2: 168 problems, 0 wrong\n"
    out = run([emulator, "-cpu", "Nehalem", program])
    assert out == "default: 168 problems, 0 wrong\n"


def test_compiles_for_arm():
    compiler = tool("aarch64-linux-gnu-g++")
    for source in SOURCES:
        run([compiler, *FLAGS, "-Werror", "-fsyntax-only", source])
