"""The emulated kernels once more, as Triton 3.6 compiles them: GPU images still ship it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = Path(sys.prefix) / "triton-3.6"  # holds nothing but that Triton


def run(*command: str) -> str:
    """What a Python with that Triton prints; it imports nothing else from there."""
    path = os.pathsep.join((str(FOLDER), str(ROOT)))
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"needs {FOLDER}, which make test-full installs")
def test_kernels_of_triton_3_6_in_the_emulator() -> None:
    assert run("-c", "import triton; print(triton.__version__)").startswith("3.6.")
    files = ["tests/test_ptx_emulator.py", "tests/test_emulated_kernels.py"]
    print(run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files))
