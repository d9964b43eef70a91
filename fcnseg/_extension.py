"""Loads the compiled parts, and tells what was built and what runs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fcnseg._missing import Missing

#: Of the reference against the compiled operators: benchmarks/reference_slowdown.py, on AVX-512.
SLOWDOWN = "6 to 260 times"

_PACKAGE = Path(__file__).resolve().parent


def _own_file(name: str, *folders: Path) -> str | None:
    """The file of a module of this very package, which lies in one of the folders, or None.

    Where another clone is installed as editable, Python finds that one's modules too.
    """
    spec = importlib.util.find_spec(f"fcnseg.{name}")
    file = None if spec is None else spec.origin
    return file if file and Path(file).parent.resolve() in folders else None


def _load_operators() -> Missing | None:
    """Load ``fcnseg._C`` into the dispatcher; why it could not be, or None."""
    library = _own_file("_C", _PACKAGE)
    if library is None:
        from fcnseg import _missing

        return _missing.operators_not_found()
    try:
        torch.ops.load_library(library)
    except (ImportError, OSError) as error:
        from fcnseg import _missing

        return _missing.library_not_loaded(library, error)
    return None


def _load_pybind() -> tuple[ModuleType | None, Missing | None]:
    """The module ``fcnseg._pybind``, or why it does not load; neither where it was not built."""
    library = _own_file("_pybind", _PACKAGE)
    if library is None:
        return None, None
    try:
        return importlib.import_module("fcnseg._pybind"), None
    except ImportError as error:
        from fcnseg import _missing

        return None, _missing.library_not_loaded(library, error)


#: Why the compiled operators are missing; None where they are loaded.
missing: Missing | None = _load_operators()
pybind, _pybind_missing = _load_pybind()

#: Of this package's kernels too: a source tree that is not installed lacks them.
HAS_TRITON = importlib.util.find_spec("triton") is not None and bool(
    _own_file("kernels", (_PACKAGE / "kernels").resolve(), _PACKAGE.parent / "kernels")
)

if missing is not None:
    warnings.warn(
        f"fcnseg runs on its PyTorch reference, {SLOWDOWN} slower than its compiled operators. "
        f"{missing}",
        RuntimeWarning,
        stacklevel=2,
    )
elif _pybind_missing is not None:
    warnings.warn(
        f"fcnseg counts NumPy arrays with PyTorch. {_pybind_missing}", RuntimeWarning, stacklevel=2
    )


def _cpu_capability() -> str | None:
    return None if missing is not None else torch.ops.fcnseg_cpu.cpu_capability()


def _missing_on_cuda() -> list[Missing]:
    """What CUDA devices could run besides, were it there; nothing where there is no device."""
    from fcnseg import _missing, _ops

    if not torch.cuda.is_available():
        return []
    kinds = {name: kind["cuda"] for name, kind in _ops.implementations().items()}
    missing_there = []
    if kinds["upsample_cross_entropy"] == "reference":
        there = importlib.util.find_spec("triton") is not None
        missing_there.append(_missing.kernels() if there else _missing.triton())
    if kinds["confusion_matrix"] == "reference" and missing is None:
        missing_there.append(_missing.cuda_code())
    return missing_there


@functools.cache
def _warn_of_cuda() -> None:
    for note in _missing_on_cuda():
        warnings.warn(str(note), RuntimeWarning, stacklevel=3)


def warns_of_reference_on_cuda(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """``implementation``, whose first call in the process warns of what is missing on CUDA."""

    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        _warn_of_cuda()
        return implementation(*args)

    return run


def build_info() -> dict[str, Any]:
    """What was compiled, with which compiler, torch and CUDA, and what runs now.

    Returns:
        A dictionary: ``version``; ``torch`` (running) and ``built`` (None where nothing was
        compiled, else compiler, torch, CUDA version, CUDA architectures); ``missing_reason``, a
        sentence that tells why the compiled CPU operators are missing, and ``mend``, the command
        that brings them (both None where they are there); ``notes``, sentences that tell what else
        is missing, on the CUDA devices of this machine for example, and how to mend it;
        ``cpu_capability``, the instruction set that the CPU operators use (avx512, avx2 or
        default; the environment variable FCNSEG_CPU_CAPABILITY forces one); ``operators``: for
        each operator the implementation behind ``cpu`` and ``cuda`` tensors, ``"c++"``,
        ``"cuda"``, ``"triton"`` or ``"reference"`` (pure PyTorch, slow).

    Examples:
        >>> import fcnseg
        >>> fcnseg.build_info()["operators"]["upsample_argmax"]["cpu"] in ("c++", "reference")
        True
    """
    from fcnseg import __version__, _ops

    built = None
    if pybind is not None:
        built = dict(pybind.build_info())
        built["cuda"] = built["cuda"] or None
        built["cuda_archs"] = built["cuda_archs"] or None
    return {
        "version": __version__,
        "torch": torch.__version__,
        "built": built,
        "missing_reason": None if missing is None else missing.cause,
        "mend": None if missing is None else missing.command,
        "notes": [str(note) for note in [_pybind_missing, *_missing_on_cuda()] if note],
        "cpu_capability": _cpu_capability(),
        "operators": _ops.implementations(),
    }
