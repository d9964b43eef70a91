"""Builds the two extension modules of fcnseg.

``fcnseg._C``       operators, on LibTorch's stable ABI: no Python API in it, loaded as a library
``fcnseg._pybind``  pybind11: build information and NumPy entry points

Switches (environment): FORCE_CUDA=1, FORCE_ONLY_CPU=1, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS,
NVCC_FLAGS, DEBUG=1.
"""

import glob
import os
import shutil
import subprocess
import sys
from typing import Any

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build

import build_backend

TORCH_TARGET = "0x020a000000000000"  # the oldest stable ABI that the sources use: torch 2.10
DEFAULT_CUDA_ARCHS = "7.5;8.0;8.6;8.9;9.0;10.0+PTX"
DEFAULT_CUDA_ARCHS_BEFORE_12_8 = "7.5;8.0;8.6;8.9;9.0+PTX"  # older toolkits do not know 10.0


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "off", "no")


FORCE_CUDA = flag("FORCE_CUDA")
FORCE_ONLY_CPU = flag("FORCE_ONLY_CPU")
DEBUG = flag("DEBUG")


def is_cuda_home(folder: str) -> bool:
    """The nvcc on the path may be a script that calls one elsewhere: its folder has no headers."""
    files = ("bin/nvcc", "include/cuda_runtime.h")
    return all(os.path.exists(os.path.join(folder, file)) for file in files)


def find_cuda_home() -> str | None:
    """The CUDA toolkit, or None. A CPU build of torch hides it even where CUDA_HOME is set."""
    from torch.utils import cpp_extension

    homes = [cpp_extension.CUDA_HOME, os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        homes.append(os.path.dirname(os.path.dirname(os.path.realpath(nvcc))))
    return next((home for home in [*homes, "/usr/local/cuda"] if home and is_cuda_home(home)), None)


def choose_cuda() -> str | None:
    """Where the CUDA toolkit lies if the CUDA sources are to be built, else None."""
    if FORCE_CUDA and FORCE_ONLY_CPU:
        sys.exit("fcnseg: FORCE_CUDA=1 and FORCE_ONLY_CPU=1 exclude each other")
    if FORCE_ONLY_CPU:
        return None
    named = os.environ.get("CUDA_HOME")
    if FORCE_CUDA and named and not is_cuda_home(named):
        sys.exit(
            f"fcnseg: FORCE_CUDA=1, but CUDA_HOME={named} holds no CUDA toolkit (expected "
            "bin/nvcc and include/cuda_runtime.h there)"
        )
    home = find_cuda_home()
    if FORCE_CUDA and home is None:
        sys.exit("fcnseg: FORCE_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME")
    import torch

    # Without FORCE_CUDA a toolkit beside a CPU-only torch is of no use to anybody.
    return home if FORCE_CUDA or torch.version.cuda is not None else None


def compiler_found() -> bool:
    """Whether there is a C++ compiler; torch and setuptools are told of one of unusual name."""
    named = os.environ.get("CXX", "").split()
    if named:
        if shutil.which(named[0]) is None:
            sys.exit(
                f"fcnseg: CXX={os.environ['CXX']}, but {named[0]} is not a program on the path"
            )
        return True
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    # torch calls c++, setuptools what Python was built with: gcc and g++, as a rule.
    if found is not None and not all(map(shutil.which, ("c++", "g++"))):
        os.environ["CXX"] = found
        if shutil.which("gcc") is None:
            os.environ.setdefault("CC", found)
    return found is not None


def pybind11_include() -> str:
    """The headers of pybind11; torch brings a copy, for where pybind11 is not installed."""
    try:
        import pybind11
    except ModuleNotFoundError:
        import torch

        return os.path.join(os.path.dirname(torch.__file__), "include")
    return pybind11.get_include()


def extensions() -> list[Extension]:
    import torch
    from torch.utils import cpp_extension

    cuda_home = choose_cuda()
    cxx = ["-std=c++17", "-fvisibility=hidden", "-Wall"]
    cxx += ["-O0", "-g"] if DEBUG else ["-O3", "-g0"]
    nvcc = ["-std=c++17", *(["-O0", "-g"] if DEBUG else ["-O3"])]
    nvcc += os.environ.get("NVCC_FLAGS", "").split()
    macros: list[tuple[str, str | None]] = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET),
        ("TORCH_STABLE_ONLY", None),
    ]
    options: dict = {"extra_link_args": [] if DEBUG else ["-s"]}
    sources = sorted(glob.glob("csrc/cpu/*.cpp"))
    archs = ""
    if cuda_home is not None:
        version = tuple(map(int, cuda_version(cuda_home).split(".")[:2]))
        default = DEFAULT_CUDA_ARCHS if version >= (12, 8) else DEFAULT_CUDA_ARCHS_BEFORE_12_8
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default)
        cpp_extension.CUDA_HOME = cuda_home  # a CPU build of torch leaves it None
        sources += sorted(glob.glob("csrc/cuda/*.cu")) + sorted(glob.glob("csrc/cuda/*.cpp"))
        # CppExtension, not CUDAExtension: the stable ABI needs no libc10_cuda, and the CPU wheel
        # of torch does not have it. BuildExtension compiles .cu files all the same.
        options["include_dirs"] = [os.path.join(cuda_home, "include")]
        options["library_dirs"] = [os.path.join(cuda_home, "lib64")]
        options["libraries"] = ["cudart_static", "rt", "dl", "pthread"]
        # Nothing of torch's CUDA part is linked, and the runtime is our own: toolkit and torch may
        # be of different CUDA versions. BuildExtension refuses that unless torch names none.
        torch.version.cuda = None
    core = cpp_extension.CppExtension(
        "fcnseg._C",
        sources,
        define_macros=macros,
        # Headers: an edit of one compiles anew.
        depends=[*glob.glob("csrc/c*/*.h"), *glob.glob("csrc/cuda/*.cuh")],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        py_limited_api=True,  # links without libtorch_python; the file still carries Python's tag
        **options,
    )
    core.py_limited_api = False
    info = {
        "FCNSEG_BUILD_TORCH": torch.__version__,
        "FCNSEG_BUILD_CUDA": "" if cuda_home is None else cuda_version(cuda_home),
        "FCNSEG_BUILD_CUDA_ARCHS": archs,
    }
    pybind = Extension(
        "fcnseg._pybind",
        ["csrc/pybind.cpp"],
        include_dirs=[pybind11_include()],
        define_macros=[(name, f'"{value}"') for name, value in info.items()],
        extra_compile_args={"cxx": cxx},
        extra_link_args=options["extra_link_args"],
        language="c++",
    )
    return [core, pybind]


def cuda_version(cuda_home: str) -> str:
    """Of the compiler: a toolkit from wheels has no version.json."""
    nvcc = os.path.join(cuda_home, "bin", "nvcc")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.rsplit(", V", 1)[1].split()[0]


def ext_modules() -> list[Extension]:
    if compiler_found():
        build_backend.import_torch()
        return extensions()
    if FORCE_CUDA or FORCE_ONLY_CPU:
        sys.exit("fcnseg: a build was forced, but there is no C++ compiler (set CXX)")
    print(
        "fcnseg: WARNING: no C++ compiler found; installing without the compiled operators. "
        "fcnseg will run on its slow PyTorch reference and say so at import.",
        file=sys.stderr,
    )
    return []


class CleanBuild(build):
    """What an earlier build of this folder left, perhaps with another torch, is not installed."""

    def run(self) -> None:
        left = os.path.join(self.build_lib, "fcnseg")
        if os.path.isdir(left):
            shutil.rmtree(left)
        super().run()


def compiles() -> bool:
    """Whether this run of setup.py is more than a look at names and files, which needs no torch."""
    return not {"dist_info", "egg_info", "sdist"} & set(sys.argv[1:2])


extension_modules = ext_modules() if compiles() else []
commands: dict[str, Any] = {"build": CleanBuild}
if extension_modules:
    from torch.utils import cpp_extension

    commands["build_ext"] = cpp_extension.BuildExtension

# Here and not in pyproject.toml, where setuptools before 77 does not take an SPDX expression.
license_key = (
    "license" if build_backend.release(setuptools.__version__) < (77, 0) else "license_expression"
)

setup(
    packages=[
        "fcnseg",
        "fcnseg.data",
        "fcnseg.integrations",
        "fcnseg.kernels",
        "fcnseg.models",
        "fcnseg.training",
    ],
    package_dir={"fcnseg.kernels": "kernels"},
    package_data={"fcnseg": ["py.typed"]},
    license_files=["LICENSE"],
    ext_modules=extension_modules,
    cmdclass=commands,
    **{license_key: "Apache-2.0"},
)
