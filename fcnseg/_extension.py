"""Loads the compiled parts, and tells what was built and what runs."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType
from typing import Any

import torch

REBUILD_COMMAND = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _load_operators() -> str | None:
    """Load ``fcnseg._C`` into the dispatcher; the reason why it could not be, or None."""
    spec = importlib.util.find_spec("fcnseg._C")
    if spec is None or spec.origin is None:
        return "fcnseg._C was not built (no C++ compiler at install time?)"
    try:
        torch.ops.load_library(spec.origin)
    except (ImportError, OSError) as error:
        return f"{spec.origin} does not load: {error}"
    return None


def _load_pybind() -> ModuleType | None:
    try:
        return importlib.import_module("fcnseg._pybind")
    except ImportError:
        return None


#: Why the compiled operators are missing; None where they are loaded.
missing_reason: str | None = _load_operators()
pybind: ModuleType | None = _load_pybind()

if missing_reason is not None:
    warnings.warn(
        f"fcnseg runs on its slow PyTorch reference: {missing_reason}. "
        f"Rebuild with: {REBUILD_COMMAND}",
        RuntimeWarning,
        stacklevel=2,
    )


def _cpu_capability() -> str | None:
    return None if missing_reason is not None else torch.ops.fcnseg_cpu.cpu_capability()


def build_info() -> dict[str, Any]:
    """What was compiled, with which compiler, torch and CUDA, and what runs now.

    Returns:
        A dictionary: ``version``; ``torch`` (running) and ``built`` (None where nothing was
        compiled, else compiler, torch, CUDA version, CUDA architectures); ``missing_reason``;
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
        "missing_reason": missing_reason,
        "cpu_capability": _cpu_capability(),
        "operators": _ops.implementations(),
    }
