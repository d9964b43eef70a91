"""Every Triton kernel's PTX, executed without a GPU: values, and what a sanitiser would find.

The launchers run as they are, on CPU tensors, for sm_70, sm_80 and sm_90. A case fails where a
value or a gradient is further from float64 than eager's, and where the emulator finds an access
out of bounds, misaligned or to memory that nobody wrote, or a race within or between programs.
``torch.empty`` returns NaN there. The wide matrix is slow; README.md of ptx_emulator says how to
run a part of it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

import triton

import fcnseg.kernels
from tests import coalesce_once
from tests.ptx_emulator.case import ARCHS, Case
from tests.ptx_emulator.cases import all_cases
from tests.ptx_emulator.triton_bridge import Session

CASES = list(all_cases())

#: All run in one process (tests/conftest.py): the architectures share some work of the compiler,
#: and the last tests see what those before them executed.
pytestmark = [pytest.mark.kernels, pytest.mark.long(100)]


def parameters() -> Iterator[object]:
    for arch in ARCHS:
        for case in CASES:
            marks = () if arch in case.quick else (pytest.mark.slow,)
            yield pytest.param(arch, case, id=f"sm_{arch}-{case.name}", marks=marks)


@pytest.fixture(scope="module", autouse=True)
def shared_passes() -> Iterator[None]:
    with coalesce_once.share():
        yield


@pytest.fixture(scope="module")
def sessions() -> dict[int, Session]:
    """One for each architecture: it keeps the kernels that are compiled."""
    return {arch: Session(arch) for arch in ARCHS}


@pytest.fixture(scope="module")
def done() -> set[tuple[int, str]]:
    """The cases that were run."""
    return set()


@pytest.mark.parametrize(("arch", "case"), list(parameters()))
def test_kernels_in_the_emulator(
    arch: int, case: Case, sessions: dict[int, Session], done: set[tuple[int, str]]
) -> None:
    check = case.check(sessions[arch])
    assert check.notes, "the case compared nothing"
    assert not check.wrong, "\n".join(check.wrong)
    done.add((arch, case.name))


APPROXIMATE = ("loss mean", "loss none")


@pytest.mark.parametrize("name", APPROXIMATE)
def test_exponentials_may_be_two_ulp_off(name: str) -> None:
    """As the device's are. The kernel multiplies four exponentials to the powers of a pixel's row
    and column, so an error of the factors grows on the way to the last pixel of a cell."""
    (case,) = (case for case in CASES if case.name == name)
    check = case.check(Session(90, approx_noise=2))
    assert not check.wrong, "\n".join(check.wrong)


def kernel_names() -> set[str]:
    """Every kernel of the package: a new one needs a case."""
    return {
        name
        for module in pkgutil.iter_modules(fcnseg.kernels.__path__, "fcnseg.kernels.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_was_executed(
    arch: int, sessions: dict[int, Session], done: set[tuple[int, str]]
) -> None:
    if missing := {case.name for case in CASES if arch in case.quick} - {
        name for done_arch, name in done if done_arch == arch
    }:
        pytest.skip(f"{len(missing)} quick cases of sm_{arch} were not run, or failed")
    assert sessions[arch].launched == kernel_names()
