"""Third-party oracles that need help to be imported."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import pytest
import torch

_libraries: list[torch.library.Library] = []  # a schema lives as long as its Library


@cache
def import_torchvision() -> ModuleType:
    """torchvision beside any build of torch, or a skip where it is not installed.

    PyPI's torchvision is a CUDA build. Beside a CPU build of torch its operators do not load, and
    the import fails where it looks their schemas up; it works once these are defined. After that
    `torchvision.models` works; `torchvision.io` and the operators do not.
    """
    try:
        return pytest.importorskip("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return importlib.import_module("torchvision")
