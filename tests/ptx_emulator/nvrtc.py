"""CUDA C++ -> PTX by NVRTC, which needs neither a GPU nor a CUDA toolkit."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def library() -> Path | None:
    """libnvrtc.so.12 of the package nvidia-cuda-nvrtc-cu12, where it is installed."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [file for place in places for file in Path(place).glob("*/lib/libnvrtc.so.12")]
    return found[0] if found else None


class NvrtcError(RuntimeError):
    """The source does not compile; the message is the compiler's."""


class Nvrtc:
    """The compiler in a shared library."""

    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))

    def _text(self, program: Any, what: str) -> str:
        size = ctypes.c_size_t()
        getattr(self.lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.lib, f"nvrtcGet{what}")(program, buffer)
        return buffer.value.decode()

    @contextlib.contextmanager
    def _compiled(
        self, source: str, include: Path, names: list[str], *options: str
    ) -> Iterator[Any]:
        program = ctypes.c_void_p()
        self.lib.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None
        )
        try:
            for name in names:
                self.lib.nvrtcAddNameExpression(program, name.encode())
            every = ["--std=c++17", f"-I{include}", *options]
            array = (ctypes.c_char_p * len(every))(*(option.encode() for option in every))
            if self.lib.nvrtcCompileProgram(program, len(every), array):
                raise NvrtcError(self._text(program, "ProgramLog"))
            yield program
        finally:
            self.lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _lowered(self, program: Any, name: str) -> str:
        out = ctypes.c_char_p()
        self.lib.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(out))
        return (out.value or b"").decode()

    def compile(
        self, source: str, include: Path, arch: int, names: list[str]
    ) -> tuple[str, dict[str, str]]:
        """The PTX, and the name there of each expression, like ``&space::kernel<int>``."""
        options = (f"--gpu-architecture=compute_{arch}", "-lineinfo")
        with self._compiled(source, include, names, *options) as program:
            lowered = {name: self._lowered(program, name) for name in names}
            return self._text(program, "PTX"), lowered

    def machine_code(
        self, source: str, include: Path, arch: int, names: list[str]
    ) -> dict[str, tuple[int, int]]:
        """Registers and spilled bytes of each expression's machine code."""
        options = (f"--gpu-architecture=sm_{arch}", "--ptxas-options=-v")
        pattern = r"entry function '(\S+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
        with self._compiled(source, include, names, *options) as program:
            found = re.findall(pattern, self._text(program, "ProgramLog"), re.DOTALL)
            used = {name: (int(registers), int(spilled)) for name, spilled, registers in found}
            return {name: used[self._lowered(program, name)] for name in names}
