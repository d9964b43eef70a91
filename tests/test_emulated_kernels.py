"""Every Triton kernel's PTX, executed without a GPU: values, and what a sanitiser would find.

The launchers run as they are, on CPU tensors, for sm_70, sm_80 and sm_90. A case fails where a
value or a gradient is further from float64 than eager's, and where the emulator finds an access
out of bounds, misaligned or to memory that nobody wrote, or a race within or between programs.
``torch.empty`` returns NaN there. The wide matrix is slow; README.md of ptx_emulator says how to
run a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

from tests.ptx_emulator.case import ARCHS, Case
from tests.ptx_emulator.cases import all_cases
from tests.ptx_emulator.triton_bridge import Session


def parameters() -> Iterator[object]:
    for arch in ARCHS:
        for case in all_cases():
            marks = () if arch in case.quick else (pytest.mark.slow,)
            yield pytest.param(arch, case, id=f"sm_{arch}-{case.name}", marks=marks)


@pytest.fixture(scope="module")
def sessions() -> dict[int, Session]:
    """One for each architecture: it keeps the kernels that are compiled."""
    return {arch: Session(arch) for arch in ARCHS}


@pytest.mark.parametrize(("arch", "case"), list(parameters()))
def test_kernels_in_the_emulator(arch: int, case: Case, sessions: dict[int, Session]) -> None:
    check = case.check(sessions[arch])
    assert check.notes, "the case compared nothing"
    assert not check.wrong, "\n".join(check.wrong)
