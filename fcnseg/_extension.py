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


def has_kernel(backend: str, name: str) -> bool:
    """Whether the compiled library holds ``fcnseg_BACKEND::NAME`` (backend: "cpu" or "cuda")."""
    return missing_reason is None and hasattr(getattr(torch.ops, f"fcnseg_{backend}"), name)


def build_info() -> dict[str, Any]:
    """What was compiled, with which compiler, torch and CUDA, and what runs now.

    Returns:
        A dictionary: ``version``; ``torch`` (running) and ``built`` (None where nothing was
        compiled, else compiler, torch, CUDA version, CUDA architectures); ``missing_reason``;
        ``operators``: for each operator the implementation behind ``cpu`` and ``cuda`` tensors,
        ``"c++"``, ``"cuda"``, ``"triton"`` or ``"reference"`` (pure PyTorch, slow).

    Example:
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
        "operators": _ops.implementations(),
    }
