"""The CUDA confusion matrix without a GPU: emulated, compiled for every architecture, inspected."""

import ctypes
import importlib.util
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fcnseg

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
TESTS = ROOT / "tests"
LABELS = ("Label8", "Label16", "Label32", "Label64")
#: Kernels, and the registers of a thread that leave a multiprocessor full enough.
ENTRIES = {"count_replicated": 64, "count_single": 64, "count_global": 80, "record_invalid": 64}
COUNTING = ("count_replicated", "count_single", "count_global")


def _nvidia_files(pattern: str) -> list[Path]:
    """Files of NVIDIA's packages on PyPI."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return [found for place in places for found in Path(place).glob(pattern)]


def _cuobjdump(*arguments: str) -> str:
    programs = [shutil.which("cuobjdump"), *_nvidia_files("*/bin/cuobjdump")]
    programs = [program for program in programs if program is not None]
    if not programs:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of nvidia-cuda-cuobjdump")
    command = [str(programs[0]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _ceiling(mangled: str) -> int:
    return next(most for entry, most in ENTRIES.items() if entry in mangled)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("source", "sanitizer"),
    [
        ("confusion_matrix_emulation.cpp", "address,undefined"),
        ("confusion_matrix_emulation.cpp", "thread"),
        ("confusion_matrix_launch.cpp", "address,undefined"),
    ],
)
@pytest.mark.long(15)
def test_emulated_kernels_are_exact_under_sanitizers(
    tmp_path: Path, source: str, sanitizer: str
) -> None:
    program = tmp_path / "emulation"
    sanitizers = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    flags = ["-std=c++20", "-O0", "-pthread", *sanitizers, "-DFCNSEG_HOST_EMULATION"]
    includes = [f"-I{path}" for path in (CUDA, TESTS, TESTS / "cuda_runtime_stub")]
    command = ["g++", *flags, *includes, str(TESTS / source), "-o", str(program)]
    subprocess.run(command, check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_nvrtc_compiles_for_volta() -> None:
    libraries = _nvidia_files("*/lib/libnvrtc.so.12")
    if not libraries:
        pytest.skip("needs nvidia-cuda-nvrtc-cu12")
    nvrtc = ctypes.CDLL(str(libraries[0]))
    program = ctypes.c_void_p()
    source = b'#include "confusion_matrix_kernel.cuh"\n'
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"k.cu", 0, None, None) == 0
    for entry, prediction, target in itertools.product(COUNTING, LABELS, LABELS):
        name = f"&fcnseg::{entry}<fcnseg::{prediction}, fcnseg::{target}>"
        assert nvrtc.nvrtcAddNameExpression(program, name.encode()) == 0
    options = ["--gpu-architecture=sm_70", "--std=c++17", f"-I{CUDA}", "--ptxas-options=-v"]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    result = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, buffer)
    log = buffer.value.decode()
    assert result == 0, log
    used = re.findall(r"entry function '(\S+)'.*?Used (\d+) registers", log, re.DOTALL)
    assert len(used) == len(LABELS) ** 2 * len(COUNTING) + 1  # and record_invalid
    for name, registers in used:
        assert int(registers) <= _ceiling(name), name
    assert all(int(found) == 0 for found in re.findall(r"(\d+) bytes spill", log))


def test_fat_binary_holds_what_was_asked_for() -> None:
    built = fcnseg.build_info()["built"]
    if built is None or built["cuda"] is None:
        pytest.skip("fcnseg was built without CUDA (FORCE_CUDA=1 forces it)")
    assert fcnseg.build_info()["operators"]["confusion_matrix_"]["cuda"] == "cuda"
    library = importlib.util.find_spec("fcnseg._C")
    assert library is not None and library.origin is not None
    archs = built["cuda_archs"].replace(" ", ";").split(";")
    expected = {f"sm_{arch.removesuffix('+PTX').replace('.', '')}" for arch in archs}
    # Libraries that are linked in bring code of their own, so more may be listed.
    assert expected <= set(re.findall(r"sm_\d+", _cuobjdump("--list-elf", library.origin)))
    if archs[-1].endswith("+PTX"):
        assert max(expected, key=lambda arch: int(arch[3:])) in _cuobjdump(
            "--list-ptx", library.origin
        )
    usage = _cuobjdump("--dump-resource-usage", library.origin)
    ours = re.findall(r"Function (\S*fcnseg\S*):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    per_arch = len(LABELS) ** 2 * len(COUNTING) + 1  # and record_invalid
    assert len(ours) == per_arch * len(expected)
    for name, registers, stack, local in ours:
        assert int(registers) <= _ceiling(name) and (int(stack), int(local)) == (0, 0), name
