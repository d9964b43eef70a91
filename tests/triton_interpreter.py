"""Triton's interpreter for the tests of the kernels: repaired, and without work that it discards.

What the kernels compute stays the same to the last bit: ``test_triton.py`` compares.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


def _repair_triton_3_6() -> None:
    """Before 3.7 the interpreter calls int() on arrays of one element; NumPy 2.4 refuses that."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _patch_once_a_launch(patch_lang: Callable[[Any], Any]) -> None:
    """Every call of a device function looks through the whole language for what to replace, though
    the launch has replaced it: a quarter of the time. The launch replaces all at once instead."""
    languages = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda fn: patch_lang(languages)

    def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_device_function


def _look_up_types_by_name(np_dtype: Callable[[Any], np.dtype[Any]]) -> None:
    """The interpreter makes a table of all types to look one of them up in."""
    known: dict[str, np.dtype[Any]] = {}

    def look_up(dtype: Any) -> np.dtype[Any]:
        if dtype.name not in known:
            known[dtype.name] = np_dtype(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = look_up


def prepare() -> None:
    """Once in a process, before any kernel runs."""
    if triton.__version__.startswith("3.6."):
        _repair_triton_3_6()
    _patch_once_a_launch(interpreter._patch_lang)
    _look_up_types_by_name(interpreter._get_np_dtype)
    # Whether 32 bits overflow is computed in 64 for every sum and product, but told to nobody:
    # that takes the option `debug`, which is off.
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    gc.set_threshold(100_000)  # it makes many small objects, hardly any in circles
