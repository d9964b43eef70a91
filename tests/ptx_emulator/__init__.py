"""A functional emulator and sanitiser for PTX as Triton and NVRTC emit it. Needs numpy only."""

from tests.ptx_emulator.kernel import Kernel
from tests.ptx_emulator.lanes import EmulatorError
from tests.ptx_emulator.memory import Memory
from tests.ptx_emulator.report import Report

__all__ = ["EmulatorError", "Kernel", "Memory", "Report"]
