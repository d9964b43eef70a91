"""A driver of Triton's without a device: kernels are compiled for any architecture, none runs."""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget


class FakeDriver:
    """What Triton asks a driver before it compiles, answered for any architecture."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # a device key of its own, so that caches do not mix

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
