"""Small Triton kernels for the emulator's own tests: sound ones, and ones with planted faults."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from tests.ptx_emulator.triton_bridge import Session, emulate

UNFENCED = "wgmma reads what no fence.proxy.async ordered"


@triton.jit
def softmax_kernel(x_ptr, y_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + at, mask=at < columns, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(
        y_ptr + row * columns + at, (e / tl.sum(e, 0)).to(y_ptr.dtype.element_ty), mask=at < columns
    )


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    K,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK):
        a = tl.load(a_ptr + m[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + (start + k[:, None]) * N + n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc)


@triton.jit
def histogram_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, BINS: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    counts = tl.histogram(x, BINS, mask=at < n)
    tl.atomic_add(out_ptr + tl.arange(0, BINS), counts)


@triton.jit
def scan_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    y = tl.cumsum(tl.load(x_ptr + at), 1)
    tl.store(
        y_ptr + tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :], tl.trans(y)
    )


@triton.jit
def neighbour_kernel(x_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, at)
    if BARRIER:
        tl.debug_barrier()
    y = tl.load(x_ptr + (at + 1) % BLOCK)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + at, y)


@triton.jit
def unmasked_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) + 1)


def check_sound(arch: int) -> None:
    """Sound kernels give right values and no finding."""
    torch.manual_seed(0)
    x = torch.randn(5, 100)
    for num_warps in (1, 4):
        with emulate(arch) as session:
            y = torch.empty(5, 100)
            softmax_kernel[(5,)](x, y, 100, BLOCK=128, num_warps=num_warps)
            half = torch.empty(5, 100, dtype=torch.bfloat16)
            softmax_kernel[(5,)](x, half, 100, BLOCK=128, num_warps=num_warps)
        assert session.report.ok, session.report
        torch.testing.assert_close(y, x.softmax(1))
        assert (half == x.softmax(1).bfloat16()).float().mean() > 0.98
        labels = torch.randint(0, 16, (1000,), dtype=torch.int32)
        counts = torch.zeros(16, dtype=torch.int32)
        with emulate(arch) as session:
            histogram_kernel[(8,)](labels, counts, 1000, BLOCK=128, BINS=16, num_warps=num_warps)
        assert session.report.ok, session.report
        assert torch.equal(counts.long(), labels.long().bincount(minlength=16))
        integers = torch.randint(0, 100, (16, 64), dtype=torch.int32)
        with emulate(arch) as session:
            turned = torch.empty(64, 16, dtype=torch.int32)
            scan_kernel[(1,)](integers, turned, 16, 64, num_warps=num_warps)
        assert session.report.ok, session.report
        assert torch.equal(turned, integers.cumsum(1).int().t())
    for dtype, M, N in (
        (torch.float16, 64, 32),
        (torch.bfloat16, 64, 32),
        (torch.float32, 64, 16),
        (torch.float16, 16, 16),
    ):
        if arch < 80 and dtype == torch.bfloat16:
            continue
        a, b = torch.randn(M, 64).to(dtype), torch.randn(64, N).to(dtype)
        with emulate(arch) as session:
            c = torch.empty(M, N)
            matmul_kernel[(1,)](a, b, c, 64, M, N, BLOCK=32, num_warps=4)
        kinds = {fault.kind for fault in session.report.faults()}
        # Before 3.7.1 Triton does not fence what cp.async has written (triton-lang/triton #10537).
        known = {UNFENCED} if arch == 90 and triton.__version__ < "3.7.1" else set()
        assert kinds <= known, session.report
        exact = a.double() @ b.double()
        tolerance = 2e-2 if dtype == torch.float32 and arch >= 80 else 1e-5  # TF32
        assert (c - exact).abs().max() < tolerance * exact.abs().max()


def check_faults() -> None:
    """Each planted fault is found, and nothing else."""

    def kinds(launch: Callable[[], object]) -> set[str]:
        with emulate(90) as session:
            launch()
        return {f.kind for f in session.report.faults()}

    x = torch.zeros(128, dtype=torch.int32)
    assert kinds(lambda: neighbour_kernel[(1,)](x, 128, True, num_warps=4)) == set()
    assert torch.equal(x, torch.arange(1, 129, dtype=torch.int32) % 128)
    found = kinds(lambda: neighbour_kernel[(1,)](x, 128, False, num_warps=4))
    assert "global race: read after write" in found
    found = kinds(lambda: neighbour_kernel[(2,)](x, 128, True, num_warps=4))
    assert any("between CTAs" in kind for kind in found)
    y = torch.zeros(256)
    assert kinds(lambda: unmasked_kernel[(2,)](torch.zeros(256), y, 128)) == set()
    assert kinds(lambda: unmasked_kernel[(2,)](torch.zeros(200), y, 128)) == {"out of bounds"}
    assert kinds(lambda: unmasked_kernel[(2,)](torch.empty(256), y, 128)) == {"uninitialised"}
    assert kinds(lambda: unmasked_kernel[(2,)](torch.zeros(300)[:200], y, 128)) == {
        "outside of the view"
    }

    def without(instruction: str) -> set[str]:
        session = Session(90, transform=lambda _, ptx: re.sub(instruction + "[^;]*;", "", ptx))
        a, b, c = torch.randn(64, 64).half(), torch.randn(64, 32).half(), torch.empty(64, 32)
        with emulate(90, session):
            matmul_kernel[(1,)](a, b, c, 64, 64, 32, BLOCK=32, num_warps=4)
        return {f.kind for f in session.report.faults()}

    assert UNFENCED in without("fence.proxy.async")
    assert "shared race: read after write" in without("bar.sync")
    assert "access before cp.async was waited for" in without("cp.async.wait_group")
