"""CUDA C++ -> PTX by NVRTC, which needs neither a GPU nor a CUDA toolkit."""

from __future__ import annotations

import ctypes
import importlib.util
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

    def compile(
        self, source: str, include: Path, arch: int, names: list[str]
    ) -> tuple[str, dict[str, str]]:
        """The PTX, and the name there of each expression, like ``&space::kernel<int>``."""
        program = ctypes.c_void_p()
        self.lib.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None
        )
        try:
            for name in names:
                self.lib.nvrtcAddNameExpression(program, name.encode())
            options = [
                f"--gpu-architecture=compute_{arch}",
                "--std=c++17",
                f"-I{include}",
                "-lineinfo",
            ]
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if self.lib.nvrtcCompileProgram(program, len(options), array):
                raise NvrtcError(self._text(program, "ProgramLog"))
            lowered = {}
            for name in names:
                out = ctypes.c_char_p()
                self.lib.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(out))
                lowered[name] = (out.value or b"").decode()
            return self._text(program, "PTX"), lowered
        finally:
            self.lib.nvrtcDestroyProgram(ctypes.byref(program))
