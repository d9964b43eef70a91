"""Compile a kernel for several architectures without the same slow pass for each of them.

For every access to memory Triton's pass that coalesces them looks through the whole kernel, which
takes four of the five seconds that the kernel of a loss needs. Neither it nor the step before it
asks for the architecture, beyond writing down its name. `share` lets both run once for a kernel;
what they made is read in again for the next architecture. The machine code stays the same to the
byte: `test_triton.py` compares.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

from triton._C.libtriton import ir, passes
from triton.backends.nvidia.compiler import CUDABackend

#: What the passes made, by what they were given.
_coalesced: dict[tuple[str, int, int], str] = {}


def _without_the_first_passes() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for owner, name in (
        (passes.ttir, "add_convert_to_ttgpuir"),
        (passes.ttgpuir, "add_coalesce"),
    ):
        stack.enter_context(mock.patch.object(owner, name, lambda *args: None))
    return stack


@contextlib.contextmanager
def share() -> Iterator[None]:
    """Inside, kernels that differ in the architecture alone share the passes."""
    make_ttgir = CUDABackend.make_ttgir

    def make(mod: Any, metadata: Any, options: Any, capability: int) -> Any:
        key = (str(mod), options.num_warps, options.num_ctas)
        target = f'"cuda:{capability}"'
        if key not in _coalesced:
            manager = ir.pass_manager(mod.context)
            passes.ttir.add_convert_to_ttgpuir(
                manager, target.strip('"'), options.num_warps, 32, options.num_ctas
            )
            passes.ttgpuir.add_coalesce(manager)
            manager.run(mod, "make_ttgir")
            text = str(mod)
            assert text.count(target) == 1
            _coalesced[key] = text.replace(target, '"cuda:ARCH"')
        with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
            file.write(_coalesced[key].replace('"cuda:ARCH"', target))
            file.flush()
            again = ir.parse_mlir_module(file.name, mod.context)
        again.context = mod.context
        with _without_the_first_passes():
            return make_ttgir(again, metadata, options, capability)

    with mock.patch.object(CUDABackend, "make_ttgir", staticmethod(make)):
        yield
