"""Why compiled operators are missing, and the command that mends it. Imported where some are."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import urllib.request
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch

_PACKAGE = Path(__file__).parent
_ROOT = _PACKAGE.parent
_SUFFIX = EXTENSION_SUFFIXES[0]  # .cpython-311-x86_64-linux-gnu.so


class Missing(NamedTuple):
    """What is missing: a sentence, and a command for the shell."""

    cause: str
    command: str


def operators_not_found() -> Missing:
    """Where no ``fcnseg._C`` lies beside this file that fits the running Python."""
    installed = _installed_elsewhere()
    if installed is not None:
        return Missing(
            f"Python was started in the source tree {_ROOT}, which hides the installed fcnseg in "
            f"{installed}.",
            "cd ..  # any other folder will do, and so will `python -P`",
        )
    builds = sorted(_PACKAGE.glob("_C.*.so"))
    others = [path.name.split(".")[1] for path in builds if not path.name.endswith(_SUFFIX)]
    if others:
        return Missing(
            f"{_PACKAGE} was built for another Python: for {' and '.join(others)}, while this one "
            f"is {_SUFFIX.split('.')[1]}.",
            _build_command(),
        )
    if _is_source_tree(_ROOT):
        return Missing(f"The source tree {_ROOT} has not been built.", _build_command())
    return Missing(
        "There was no C++ compiler where fcnseg was installed, so it was installed without its "
        "compiled operators.",
        _build_command(),
    )


def operators_not_loaded(library: str, error: Exception) -> Missing:
    """Where the system's loader refuses the file ``library``."""
    text = str(error.__cause__ or error)  # torch hides the loader's message behind one of its own
    wanted = re.search(r"lib(torch_cuda|c10_cuda|cudart)[^\s:]*", text)
    if wanted is not None and torch.version.cuda is None:
        return Missing(
            f"{library} was built for a CUDA build of torch (it needs {wanted[0]}), "
            f"while torch {torch.__version__} is a CPU build.",
            _build_command(),
        )
    return Missing(
        f"{library} does not load beside torch {torch.__version__}: {text}.", _build_command()
    )


def triton() -> Missing:
    return Missing(
        "Triton is not installed, so the operators that it compiles run on their PyTorch "
        "reference on CUDA devices.",
        "pip install triton",
    )


def cuda_code() -> Missing:
    return Missing(
        "fcnseg was built without CUDA code, so confusion_matrix and confusion_matrix_ run on "
        "their PyTorch reference on CUDA devices.",
        f"FORCE_CUDA=1 {_build_command()}  # beside a CUDA toolkit; CUDA_HOME tells where it is",
    )


def _is_source_tree(folder: Path) -> bool:
    return (folder / "setup.py").is_file() and (folder / "csrc").is_dir()


def _installed_elsewhere() -> Path | None:
    """Another fcnseg on the path whose compiled operators fit this Python."""
    for entry in sys.path:
        folder = Path(entry, "fcnseg")
        if (folder / f"_C{_SUFFIX}").is_file() and not folder.samefile(_PACKAGE):
            return folder
    return None


def _build_command() -> str:
    """Installs fcnseg again, from where it came from, for the Python and torch that run now."""
    if _is_source_tree(_ROOT):
        source = f"-e {shlex.quote(str(_ROOT))}"
    else:
        source = shlex.quote(_folder_of_install() or ".")
    command = f"pip install --force-reinstall --no-deps {source}"
    compilers = (os.environ.get("CXX") or "c++", "g++", "clang++")
    if any(shutil.which(name.split()[0]) for name in compilers):
        return command
    return f"{command}  # after a C++ compiler, for example: apt install g++"


def _folder_of_install() -> str | None:
    """The source tree that pip installed fcnseg from, where that was one and is still there."""
    try:
        text = importlib.metadata.distribution("fcnseg").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    url = json.loads(text)["url"] if text else ""
    folder = urllib.request.url2pathname(url.removeprefix("file://"))
    return folder if url.startswith("file://") and _is_source_tree(Path(folder)) else None
