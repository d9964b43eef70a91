"""The Triton kernels without a GPU: interpreted and compiled, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent


def run(*command: str, **environment: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


def test_values_in_the_interpreter() -> None:
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpret_kernels.py",
        TRITON_INTERPRET="1", OMP_NUM_THREADS="1")  # fmt: skip


CONV_TRANSPOSE_QUICK = "geometry or bad_label or not_finite or ties or only_wanted or dtypes"


@pytest.mark.parametrize(
    "selected", [CONV_TRANSPOSE_QUICK, pytest.param("test", marks=pytest.mark.slow)]
)
def test_values_of_the_transposed_convolution_in_the_interpreter(selected: str) -> None:
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpret_conv_transpose.py", "-k",
        selected, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")  # fmt: skip


def test_kernels_compile_for_every_architecture(tmp_path: Path) -> None:
    run("-m", "tests.compile_kernels", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.parametrize("selected", ["C=19 fp16", pytest.param("", marks=pytest.mark.slow)])
def test_transposed_convolution_compiles_for_every_architecture(
    selected: str, tmp_path: Path
) -> None:
    run("-m", "tests.compile_kernels", selected, TRITON_CACHE_DIR=str(tmp_path), CONV="1")


def test_import_does_not_load_triton() -> None:
    run("-c", "import sys, fcnseg; sys.exit('triton' in sys.modules)")
