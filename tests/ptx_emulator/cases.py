"""The cases of the emulated kernels: every kernel, every option of the operators' contract.

A case is quick on those architectures where it adds code that no other quick case runs; the wide
matrix, every case on every architecture, takes the better part of an hour.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.ptx_emulator import bilinear_cases, conv_transpose_cases
from tests.ptx_emulator.case import Case


def all_cases() -> Iterator[Case]:
    """Every case, on whatever architecture."""
    yield from bilinear_cases.cases()
    yield from conv_transpose_cases.cases()
