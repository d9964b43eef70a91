"""Why compiled code is missing, and the command that mends it. Imported where some is missing."""

from __future__ import annotations

import importlib.metadata
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

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE.parent
_SUFFIX = EXTENSION_SUFFIXES[0]  # .cpython-311-x86_64-linux-gnu.so
_OLDEST_TORCH = "2.11"


class Missing(NamedTuple):
    """What is missing and why: a sentence; and a command for the shell."""

    cause: str
    command: str

    def __str__(self) -> str:
        return f"{self.cause} To mend it: {self.command}"


def operators_not_found() -> Missing:
    """Where no ``fcnseg._C`` lies beside this file that fits the running Python."""
    if shadow := _shadow():
        return shadow
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
        "fcnseg was installed without its compiled operators, as happens where there is no C++ "
        "compiler.",
        _build_command(),
    )


def library_not_loaded(library: str, error: Exception) -> Missing:
    """Where the system's loader refuses the file ``library``."""
    if torch.__version__ < _OLDEST_TORCH:
        return Missing(
            f"fcnseg needs torch {_OLDEST_TORCH} or newer, and this one is {torch.__version__}.",
            f"{_pip()} install --upgrade torch",
        )
    text = str(error.__cause__ or error)  # torch hides the loader's message behind one of its own
    # Libraries that were built before fcnseg stopped to link the CUDA part of torch.
    wanted = re.search(r"lib(torch_cuda|c10_cuda)[^\s:]*", text)
    if wanted is not None and torch.version.cuda is None:
        return Missing(
            f"{library} was built for a CUDA build of torch (it needs {wanted[0]}), while torch "
            f"{torch.__version__} is a CPU build.",
            _build_command(),
        )
    return Missing(
        f"{library} does not load beside torch {torch.__version__}: {text}.", _build_command()
    )


def triton() -> Missing:
    return Missing(
        "Triton is not installed, so the operators that it compiles run on their PyTorch "
        "reference on CUDA devices.",
        f"{_pip()} install triton",
    )


def kernels() -> Missing:
    return _shadow() or Missing(
        f"The Triton kernels, fcnseg.kernels, do not belong to the fcnseg in {_PACKAGE}, so its "
        "operators run on their PyTorch reference on CUDA devices.",
        _build_command(),
    )


def cuda_code() -> Missing:
    return Missing(
        "fcnseg was built without CUDA code, so confusion_matrix and confusion_matrix_ run on "
        "their PyTorch reference on CUDA devices.",
        f"FORCE_CUDA=1 {_build_command()}  # beside a CUDA toolkit; CUDA_HOME tells where it is",
    )


def _is_source_tree(folder: Path) -> bool:
    return os.path.isfile(folder / "setup.py") and os.path.isdir(folder / "csrc")


def _shadow() -> Missing | None:
    """A source tree that is not installed, and comes before an install on the path."""
    folders = [os.path.join(entry, "fcnseg") for entry in sys.path]
    installed = [
        folder
        for folder in folders
        if os.path.isfile(os.path.join(folder, f"_C{_SUFFIX}"))
        and Path(folder).resolve() != _PACKAGE
    ]
    if not installed or not _is_source_tree(_ROOT):
        return None
    command = "cd ..  # any other folder will do, and so will `python -P`"
    if Path(sys.path[0]).resolve() != _ROOT or sys.flags.safe_path:
        command = f"unset PYTHONPATH  # or whatever puts {_ROOT} on the path of modules"
    return Missing(
        f"Python finds the source tree {_ROOT} before the fcnseg that is installed in "
        f"{installed[0]}.",
        command,
    )


def _pip() -> str:
    return f"{shlex.quote(sys.executable)} -m pip"


def _build_command() -> str:
    """Installs fcnseg again, from where it came from, for the Python and torch that run now."""
    source, comment = _source()
    comments = [comment] if comment else []
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        comments.append("after a C++ compiler, for example: apt install g++")
    command = f"{_pip()} install --force-reinstall --no-deps {source}"
    return command + (f"  # {'; '.join(comments)}" if comments else "")


def _source() -> tuple[str, str]:
    """What pip is to install again, and a comment where that needs one."""
    if _is_source_tree(_ROOT):
        return f"-e {shlex.quote(str(_ROOT))}", ""
    unknown = ".", "in the folder of fcnseg's sources"
    try:
        distribution = importlib.metadata.distribution("fcnseg")
        text = distribution.read_text("direct_url.json")
        origin = json.loads(text) if text else {}
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError):
        return unknown
    if Path(str(distribution.locate_file("fcnseg"))).resolve() != _PACKAGE or "url" not in origin:
        return unknown
    url = origin["url"]
    if "vcs_info" in origin:
        revision = origin["vcs_info"]["commit_id"]
        return shlex.quote(f"{origin['vcs_info']['vcs']}+{url}@{revision}"), ""
    if not url.startswith("file://"):
        return shlex.quote(url), ""
    path = urllib.request.url2pathname(url.removeprefix("file://"))
    return (shlex.quote(path), "") if os.path.exists(path) else unknown
