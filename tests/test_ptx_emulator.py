"""The emulator: planted faults are found, sound kernels are clean, arithmetic is right."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx_emulator import Kernel, Memory, Report
from tests.ptx_emulator import semantics as s

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(
    .param .u64 .ptr .global .align 1 k_param_0, .param .u64 k_param_1, .param .u32 k_param_2)
{
    .reg .pred %p<20>;
    .reg .b16 %rs<20>;
    .reg .b32 %r<50>;
    .reg .f32 %f<20>;
    .reg .b64 %rd<20>;
    .loc 1 7 3                      // source.py:7:3
    ld.param.u64 %rd1, [k_param_0];
    ld.param.u64 %rd2, [k_param_1];
    ld.param.u32 %r9, [k_param_2];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    shl.b32 %r3, %r1, 2;            // byte of this thread
    cvt.u64.u32 %rd3, %r3;
    add.s64 %rd4, %rd1, %rd3;       // &a[tid]
    mov.u32 %r4, smem;
    add.s32 %r5, %r4, %r3;          // &smem[tid]
"""


def run(
    body: str,
    a,
    b=None,
    n: int = 0,
    warps: int = 2,
    shared: int = 1024,
    grid=(1,),
    memory=None,
    schedule: str = "lockstep",
) -> Report:
    kernel = Kernel(HEAD + body + "\n ret;\n}\n", "k", warps, shared)
    return kernel.launch(grid, [a, b, n], memory, schedule=schedule)


def kinds(report: Report) -> set[str]:
    return {finding.kind for finding in report.faults()}


def words(n: int = 64) -> np.ndarray:
    return np.zeros(n, np.uint32)


# --- planted faults -------------------------------------------------------------------------------

EXCHANGE = """
    st.shared.b32 [%r5], %r1;
    {barrier}
    xor.b32 %r6, %r3, {distance};
    add.s32 %r7, %r4, %r6;
    ld.shared.b32 %r8, [%r7];
    st.global.b32 [%rd4], %r8;
"""


@pytest.mark.parametrize(
    ("barrier", "distance", "found"),
    [
        ("bar.sync 0;", 128, set()),
        ("", 128, {"shared race: read after write"}),
        ("bar.warp.sync -1;", 128, {"shared race: read after write"}),
        ("bar.warp.sync -1;", 4, set()),
        ("", 4, {"shared race: read after write"}),
        ("bar.sync 0;", 4, set()),
    ],
)
def test_missing_barrier(barrier: str, distance: int, found: set[str]) -> None:
    a = words()
    report = run(EXCHANGE.format(barrier=barrier, distance=distance), a)
    assert kinds(report) == found
    assert (a == np.arange(64) ^ distance // 4).all()
    if found:
        finding = report.faults()[0]
        assert finding.count == 64
        assert finding.location == "source.py:7:3"
        assert "CTA 0 thread" in finding.examples[0]


@pytest.mark.parametrize("schedule", ["forward", "backward"])
def test_schedules_show_what_a_race_does(schedule: str) -> None:
    a = words()
    body = EXCHANGE.format(barrier="bar.sync 0;", distance=128)
    assert run(body, a, schedule=schedule).ok
    assert (a == np.arange(64) ^ 32).all()
    report = run(EXCHANGE.format(barrier="", distance=128), a, schedule=schedule)
    late = slice(32, 64) if schedule == "forward" else slice(0, 32)
    assert (a[late] == (np.arange(64) ^ 32)[late]).all()
    assert (np.delete(a, np.arange(64)[late]) == 0xFFFFFFFF).all()  # read before it was written
    assert any("shared race" in kind for kind in kinds(report))


def test_missing_barrier_before_overwriting() -> None:
    body = """
    st.shared.b32 [%r5], %r1;
    bar.sync 0;
    xor.b32 %r6, %r3, 128;
    add.s32 %r7, %r4, %r6;
    ld.shared.b32 %r8, [%r7];
    st.shared.b32 [%r5], %r8;
    """
    assert kinds(run(body, words())) == {"shared race: write after read"}


def test_replica_reads_are_told_apart() -> None:
    body = """
    ld.global.b32 %r6, [%rd1];
    add.s32 %r6, %r6, 1;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 st.global.b32 [%rd1], %r6;
    """
    a = words(1)
    report = run(body, a, warps=1)
    assert not report.faults()
    assert a[0] == 1
    assert kinds(run(body, words(1), warps=2)) == {
        "global race: write after a replica's read, other warp"
    }
    assert kinds(run(body, words(1), warps=4, schedule="forward")) == {
        "global race: read after write"
    }
    assert kinds(run(body, words(1), warps=4, schedule="backward")) == {
        "global race: write after read"
    }
    last = body.replace("%r1, 0", "%r1, 127")
    assert kinds(run(last, words(1), warps=4)) == {
        "global race: write after a replica's read, other warp"
    }


def test_one_instruction_one_address() -> None:
    body = "st.global.b32 [%rd1], {value};"
    assert kinds(run(body.format(value="%r1"), words(1))) == {
        "global race: one instruction, one address"
    }
    report = run(body.format(value="%r9"), words(1))
    assert report.ok
    assert report.kinds()["same-value writes"] > 0


def test_races_between_ctas() -> None:
    found = kinds(run("st.global.b32 [%rd4], %r2;", words(), grid=(2,)))
    assert found == {"global race between CTAs: write after write"}
    body = """
    setp.eq.u32 %p1, %r2, 0;
    @%p1 st.global.b32 [%rd4], %r1;
    @!%p1 ld.global.b32 %r6, [%rd4];
    """
    assert kinds(run(body, words(), grid=(2,))) == {"global race between CTAs: read after write"}
    assert run("red.global.add.u32 [%rd4], 1;", a := words(), grid=(3,)).ok
    assert (a == 3).all()
    body = "red.global.add.u32 [%rd4], 1; ld.global.b32 %r6, [%rd4];"
    assert not run(body, words(), grid=(2,)).ok


def test_races_need_one_launch() -> None:
    kernel = Kernel(HEAD + "st.global.b32 [%rd4], %r1; ret; }", "k", 2)
    memory, report, a = Memory(), Report(), words()
    for _ in range(2):
        kernel.launch((1,), [a, None, 0], memory, report)
    assert report.ok


def test_a_byte_of_a_word_is_its_own() -> None:
    body = """
    cvt.u64.u32 %rd5, %r1;
    add.s64 %rd6, %rd1, %rd5;
    cvt.u16.u32 %rs1, %r1;
    st.global.b8 [%rd6], %rs1;
    """
    a = np.zeros(64, np.uint8)
    assert run(body, a).ok
    assert (a == np.arange(64)).all()


def test_out_of_bounds() -> None:
    memory = Memory()
    a = words(60)
    memory.add_array(a, "logits")
    report = run("st.global.b32 [%rd4], %r1;", a, memory=memory)
    assert kinds(report) == {"out of bounds"}
    (finding,) = report.faults()
    assert finding.count == 4
    assert "thread 60" in finding.examples[0]
    assert "0 bytes past logits" in finding.examples[0]
    assert (a == np.arange(60)).all()
    assert kinds(run("ld.global.b32 %r6, [%rd1+-4];", words())) == {"out of bounds"}
    assert kinds(run("st.shared.b32 [%r5+1000], %r1;", words())) == {"shared memory out of bounds"}


def test_misaligned() -> None:
    body = "ld.global.v4.b32 {%r6, %r7, %r8, %r10}, [%rd1+4];"
    assert kinds(run(body, words())) == {"misaligned"}
    assert run("ld.global.v4.b32 {%r6, %r7, %r8, %r10}, [%rd1+16];", words()).ok
    assert kinds(run("ld.global.b16 %rs1, [%rd1+1];", words())) == {"misaligned"}


def test_uninitialised() -> None:
    memory = Memory()
    a, b = words(), words()
    memory.add_array(b, "scratch", defined=False)
    body = "add.s64 %rd5, %rd2, %rd3; ld.global.b32 %r6, [%rd5]; st.global.b32 [%rd4], %r6;"
    report = run(body, a, b, memory=memory)
    assert kinds(report) == {"uninitialised"}
    assert "scratch byte 0" in report.faults()[0].examples[0]
    assert (a == 0xFFFFFFFF).all()  # poison
    written = "add.s64 %rd5, %rd2, %rd3; st.global.b32 [%rd5], %r1;"
    assert run(written, a, b, memory=memory).ok
    assert run(body, a, b, memory=memory).ok
    assert (a == np.arange(64)).all()
    assert kinds(run("ld.shared.b32 %r6, [%r5];", a)) == {"uninitialised shared memory"}


def test_outside_of_a_view() -> None:
    torch = pytest.importorskip("torch")
    whole = torch.zeros(4, 64, dtype=torch.int32)
    report = run("ld.global.b32 %r6, [%rd4+256];", whole[1], warps=2)
    assert kinds(report) == {"outside of the view"}
    assert run("ld.global.b32 %r6, [%rd4];", whole[1]).ok


def test_divergent_barrier() -> None:
    body = "setp.lt.u32 %p1, %r1, {}; @%p1 bra $L; bar.sync 0; $L: st.global.b32 [%rd4], %r1;"
    assert run(body.format(0), words()).ok
    assert run(body.format(16), words()).ok  # the others ended: they no longer take part
    body = "setp.lt.u32 %p1, %r1, {}; @%p1 bra $L; bar.sync 0; $L: bar.sync 1;"
    assert kinds(run(body.format(16), words())) == {"divergent bar"}


def test_shuffle_from_an_inactive_lane() -> None:
    body = """
    and.b32 %r6, %r1, 1;
    setp.eq.u32 %p1, %r6, 1;
    @%p1 bra $L;
    shfl.sync.bfly.b32 %r7, %r1, 1, 31, 0x55555555;
    $L: st.global.b32 [%rd4], %r7;
    """
    assert kinds(run(body, words(32), warps=1)) == {"shfl from an inactive lane"}


COPY = """
    shl.b32 %r6, %r1, 4;
    cvt.u64.u32 %rd5, %r6;
    add.s64 %rd6, %rd1, %rd5;
    add.s32 %r7, %r4, %r6;
    cp.async.cg.shared.global [%r7], [%rd6], 16;
    cp.async.commit_group;
    {wait}
    xor.b32 %r8, %r6, {distance};
    add.s32 %r8, %r8, %r4;
    ld.shared.b32 %r10, [%r8];
    add.s64 %rd7, %rd2, %rd3;
    st.global.b32 [%rd7], %r10;
"""


def test_asynchronous_copy() -> None:
    a, b = np.arange(256, dtype=np.uint32), words()
    assert run(COPY.format(wait="cp.async.wait_group 0; bar.sync 0;", distance=512), a, b).ok
    assert (b == (np.arange(64) ^ 32) * 4).all()
    found = kinds(run(COPY.format(wait="", distance=0), a, b))
    assert "access before cp.async was waited for" in found
    found = kinds(run(COPY.format(wait="cp.async.wait_group 1; bar.sync 0;", distance=0), a, b))
    assert "access before cp.async was waited for" in found
    found = kinds(run(COPY.format(wait="cp.async.wait_group 0;", distance=512), a, b))
    assert found == {"shared race: read after write"}


# --- control flow ---------------------------------------------------------------------------------


def test_divergent_loop_meets_again() -> None:
    body = """
    mov.b32 %r6, 0;
    mov.b32 %r7, 0;
    $LOOP:
    setp.ge.u32 %p1, %r6, %r1;
    @%p1 bra $DONE;
    add.s32 %r7, %r7, %r6;
    add.s32 %r6, %r6, 1;
    bra.uni $LOOP;
    $DONE:
    shfl.sync.bfly.b32 %r8, %r7, 1, 31, -1;
    redux.sync.add.s32 %r10, %r7, -1;
    sub.s32 %r8, %r8, %r10;
    st.global.b32 [%rd4], %r8;
    """
    a = words()
    assert run(body, a).ok
    sums = np.array([i * (i - 1) // 2 for i in range(64)])
    totals = sums.reshape(2, 32).sum(1).repeat(32)
    assert (a.view(np.int32) == sums[np.arange(64) ^ 1] - totals).all()


@pytest.mark.parametrize("schedule", ["lockstep", "forward", "backward"])
def test_loop_that_some_leave_before_a_barrier(schedule: str) -> None:
    body = """
    and.b32 %r6, %r1, 7;
    mov.b32 %r7, 0;
    $LOOP:
    add.s32 %r7, %r7, 3;
    add.s32 %r6, %r6, -1;
    setp.gt.s32 %p1, %r6, 0;
    @%p1 bra $LOOP;
    bar.sync 0;
    st.global.b32 [%rd4], %r7;
    """
    a = words()
    assert run(body, a, schedule=schedule).ok
    assert (a == 3 * np.maximum(np.arange(64) % 8, 1)).all()


def test_barrier_in_a_loop_of_ctas_that_differ() -> None:
    body = """
    mov.b32 %r6, 0;
    st.shared.b32 [%r5], %r1;
    $LOOP:
    bar.sync 0;
    xor.b32 %r7, %r3, 128;
    add.s32 %r7, %r7, %r4;
    ld.shared.b32 %r8, [%r7];
    bar.sync 0;
    st.shared.b32 [%r5], %r8;
    add.s32 %r6, %r6, 1;
    setp.le.u32 %p1, %r6, %r2;
    @%p1 bra $LOOP;
    shl.b32 %r10, %r2, 8;
    cvt.u64.u32 %rd5, %r10;
    add.s64 %rd6, %rd4, %rd5;
    st.global.b32 [%rd6], %r8;
    """
    a = words(5 * 64)
    assert run(body, a, grid=(5,)).ok
    for cta in range(5):
        turned = np.arange(64) ^ (32 if cta % 2 == 0 else 0)
        assert (a[64 * cta :][:64] == turned).all()


def test_part_of_a_warp() -> None:
    kernel = Kernel(HEAD + "st.global.b32 [%rd4], %r1; ret; }", "k", threads=40)
    a = words(40)
    assert kernel.launch((1,), [a, None, 0]).ok
    assert (a == np.arange(40)).all()


# --- arithmetic -----------------------------------------------------------------------------------


def compute(code: str, inputs, dtype=np.uint32) -> np.ndarray:
    """``code`` from %r6 (and %r7, the next word) to %r8."""
    a = np.zeros(128, np.uint32)
    flat = np.asarray(inputs, dtype).reshape(-1).view(np.uint32)
    a[: len(flat)] = flat
    body = (
        "ld.global.b32 %r6, [%rd4]; ld.global.b32 %r7, [%rd4+128];"
        + code
        + "st.global.b32 [%rd4], %r8;"
    )
    run(body, a, warps=1)
    return a[:32]


RANDOM = np.random.default_rng(0)
INTEGERS = np.concatenate(
    [
        RANDOM.integers(0, 2**32, 24, np.uint64).astype(np.uint32),
        np.array([0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint32),
    ]
)
OTHERS = np.roll(INTEGERS[::-1], 3)


def signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


def trunc_div(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.s32 %r8, %r6, %r7;", lambda a, b: a + b),
        ("sub.s32 %r8, %r6, %r7;", lambda a, b: a - b),
        ("mul.lo.s32 %r8, %r6, %r7;", lambda a, b: a * b),
        ("mul.hi.u32 %r8, %r6, %r7;", lambda a, b: a * b >> 32),
        ("mul.hi.s32 %r8, %r6, %r7;", lambda a, b: signed(a) * signed(b) >> 32),
        ("mad.lo.s32 %r8, %r6, %r7, %r6;", lambda a, b: a * b + a),
        (
            "mul.wide.s32 %rd5, %r6, %r7; shr.u64 %rd5, %rd5, 16; cvt.u32.u64 %r8, %rd5;",
            lambda a, b: signed(a) * signed(b) >> 16,
        ),
        ("div.u32 %r8, %r6, %r7;", lambda a, b: a // b if b else 2**32 - 1),
        ("div.s32 %r8, %r6, %r7;", lambda a, b: trunc_div(signed(a), signed(b)) if b else -1),
        (
            "rem.s32 %r8, %r6, %r7;",
            lambda a, b: signed(a) - trunc_div(signed(a), signed(b)) * signed(b) if b else a,
        ),
        ("min.s32 %r8, %r6, %r7;", lambda a, b: min(signed(a), signed(b))),
        ("max.u32 %r8, %r6, %r7;", lambda a, b: max(a, b)),
        ("shl.b32 %r8, %r6, %r7;", lambda a, b: a << b if b < 32 else 0),
        ("shr.u32 %r8, %r6, %r7;", lambda a, b: a >> b if b < 32 else 0),
        ("shr.s32 %r8, %r6, %r7;", lambda a, b: signed(a) >> min(b, 31)),
        ("shf.l.wrap.b32 %r8, %r6, %r7, %r6;", lambda a, b: (b << 32 | a) << (a & 31) >> 32),
        ("shf.r.clamp.b32 %r8, %r6, %r7, %r6;", lambda a, b: (b << 32 | a) >> min(a, 32)),
        ("popc.b32 %r8, %r6;", lambda a, b: a.bit_count()),
        ("clz.b32 %r8, %r6;", lambda a, b: 32 - a.bit_length()),
        ("brev.b32 %r8, %r6;", lambda a, b: int(f"{a:032b}"[::-1], 2)),
        ("bfind.u32 %r8, %r6;", lambda a, b: a.bit_length() - 1),
        ("bfe.u32 %r8, %r6, 5, 9;", lambda a, b: a >> 5 & 511),
        ("bfe.s32 %r8, %r6, 5, 9;", lambda a, b: (a >> 5 & 511) - (512 if a >> 13 & 1 else 0)),
        ("bfi.b32 %r8, %r6, %r7, 5, 9;", lambda a, b: b & ~(511 << 5) | (a & 511) << 5),
        (
            "prmt.b32 %r8, %r6, %r7, 0x7510;",
            lambda a, b: a & 0xFFFF | (b >> 8 & 255) << 16 | (b >> 24) << 24,
        ),
        (
            "setp.lt.s32 %p1, %r6, %r7; selp.b32 %r8, 7, 9, %p1;",
            lambda a, b: 7 if signed(a) < signed(b) else 9,
        ),
        ("setp.hi.u32 %p1|%p2, %r6, %r7; selp.b32 %r8, 1, 0, %p2;", lambda a, b: int(a <= b)),
        ("mov.b32 {%rs1, %rs2}, %r6; mov.b32 %r8, {%rs2, %rs1};", lambda a, b: a << 16 | a >> 16),
        (
            "cvt.u16.u32 %rs1, %r6; cvt.s32.s8 %r8, %rs1;",
            lambda a, b: (a & 255) - (256 if a & 128 else 0),
        ),
    ],
)
def test_integers(code: str, expected) -> None:
    out = compute(code, [INTEGERS, OTHERS])
    for a, b, got in zip(INTEGERS.tolist(), OTHERS.tolist(), out.tolist(), strict=True):
        assert got == expected(a, b) & 0xFFFFFFFF, (a, b)


def test_lop3_and_ballot() -> None:
    out = compute("lop3.b32 %r8, %r6, %r7, %r1, 0xe2;", [INTEGERS, OTHERS])
    table = [(0xE2 >> k) & 1 for k in range(8)]
    for a, b, d, got in zip(
        INTEGERS.tolist(), OTHERS.tolist(), range(32), out.tolist(), strict=True
    ):
        bits = sum(
            table[(a >> i & 1) * 4 + (b >> i & 1) * 2 + (d >> i & 1)] << i for i in range(32)
        )
        assert got == bits
    out = compute("setp.lt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r8, %p1, -1;", [INTEGERS])
    assert (out == 31).all()


def floats(code: str, a, b=(0.0,)) -> np.ndarray:
    pad = [np.resize(np.asarray(x, np.float32), 32) for x in (a, b)]
    pre = "mov.b32 %f6, %r6; mov.b32 %f7, %r7;"
    return compute(pre + code + "mov.b32 %r8, %f8;", pad, np.float32).view(np.float32)


NAN = math.nan


def test_float_minimum_and_comparison() -> None:
    a, b = [NAN, 1.0, NAN, -0.0, 0.0, 2.0], [1.0, NAN, NAN, 0.0, -0.0, 3.0]
    np.testing.assert_array_equal(
        floats("min.f32 %f8, %f6, %f7;", a, b)[:6], [1, 1, NAN, -0.0, -0.0, 2]
    )
    assert np.signbit(floats("min.f32 %f8, %f6, %f7;", a, b)[3:5]).all()
    assert not np.signbit(floats("max.f32 %f8, %f6, %f7;", a, b)[3:5]).any()
    np.testing.assert_array_equal(floats("max.NaN.f32 %f8, %f6, %f7;", a, b)[:3], [NAN] * 3)
    select = "setp.{}.f32 %p1, %f6, %f7; selp.f32 %f8, 0f3F800000, 0f00000000, %p1;"
    for name, expected in {
        "lt": [0, 0, 0, 0, 0, 1],
        "ltu": [1, 1, 1, 0, 0, 1],
        "ne": [0, 0, 0, 0, 0, 1],
        "neu": [1, 1, 1, 0, 0, 1],
        "equ": [1, 1, 1, 1, 1, 0],
        "nan": [1, 1, 1, 0, 0, 0],
        "num": [0, 0, 0, 1, 1, 1],
    }.items():
        assert floats(select.format(name), a, b)[:6].tolist() == expected, name


def test_fused_multiply_add_rounds_once() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal(32).astype(np.float32), rng.standard_normal(32).astype(np.float32)
    out = floats("fma.rn.f32 %f8, %f6, %f7, 0fBF800000;", a, b)
    exact = [Fraction(float(x)) * Fraction(float(y)) - 1 for x, y in zip(a, b, strict=True)]
    assert (out == np.array([np.float32(float(e)) for e in exact])).all()
    x = rng.standard_normal((3, 1000)) * 10.0 ** rng.integers(-3, 3, (3, 1000))
    x[2, :500] = -x[0, :500] * x[1, :500]
    exact = [float(Fraction(p) * Fraction(q) + Fraction(r)) for p, q, r in x.T]
    assert (s.fma64(*x) == np.array(exact)).all()


def test_flush_to_zero_and_special_functions() -> None:
    assert floats("mul.ftz.f32 %f8, %f6, %f7;", [1e-38], [1e-3])[0] == 0
    assert floats("mul.f32 %f8, %f6, %f7;", [1e-38], [1e-3])[0] > 0
    out = floats("ex2.approx.ftz.f32 %f8, %f6;", [0, 1, -1, -200, 200, -math.inf, NAN])[:7]
    np.testing.assert_array_equal(out, [1, 2, 0.5, 0, math.inf, 0, NAN])
    out = floats("lg2.approx.ftz.f32 %f8, %f6;", [0, 1, 8, -1, math.inf])[:5]
    np.testing.assert_array_equal(out, [-math.inf, 0, 3, NAN, math.inf])
    out = floats("rsqrt.approx.ftz.f32 %f8, %f6;", [4, 0, math.inf])[:3]
    np.testing.assert_array_equal(out, [0.5, math.inf, 0])
    out = floats("div.full.f32 %f8, %f6, %f7;", [1, 1, 0], [3, 0, 0])[:3]
    np.testing.assert_array_equal(out, [np.float32(1) / np.float32(3), math.inf, NAN])


def test_conversions() -> None:
    values = [1.5, 2.5, -1.5, 3e9, -3e9, NAN, math.inf, 0.3]
    code = "cvt.{}.s32.f32 %r8, %f6; mov.b32 %f8, %r8;"
    for mode, expected in {
        "rzi": [1, 2, -1, 2**31 - 1, -(2**31), 0, 2**31 - 1, 0],
        "rni": [2, 2, -2, 2**31 - 1, -(2**31), 0, 2**31 - 1, 0],
        "rmi": [1, 2, -2, 2**31 - 1, -(2**31), 0, 2**31 - 1, 0],
    }.items():
        assert floats(code.format(mode), values)[:8].view(np.int32).tolist() == expected, mode
    out = floats("cvt.rn.f16.f32 %rs1, %f6; cvt.f32.f16 %f8, %rs1;", [1 / 3, 65520, 1e-8, NAN])[:4]
    np.testing.assert_array_equal(out, [np.float16(1 / 3), math.inf, 0, NAN])
    out = floats(
        "cvt.rn.bf16.f32 %rs1, %f6; cvt.f32.bf16 %f8, %rs1;", [1.00390625, 1.01171875, NAN]
    )[:3]
    np.testing.assert_array_equal(out, [1.0, 1.015625, NAN])  # ties to even
    assert s.narrow(np.array([1 + 2.0**-30]), "rp")[0] > 1
    assert s.narrow(np.array([1 + 2.0**-30]), "rz")[0] == 1


def test_bfloat16_rounds_once() -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(2).standard_normal(10000).astype(np.float32)
    expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (s.to_bf16(x) == expected).all()
    assert s.bf16_of_f64(np.array([1 + 2.0**-8 + 2.0**-40]))[0] == 0x3F81  # not a tie


def test_multiplication_high_of_64_bits() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(-(2**63), 2**63 - 1, (2, 1000), dtype=np.int64)
    assert s.mul_hi(a, b).tolist() == [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    assert s.mul_hi(ua, ub).tolist() == [int(x) * int(y) >> 64 for x, y in zip(ua, ub, strict=True)]


# --- Triton ---------------------------------------------------------------------------------------


def triton_kernels():
    pytest.importorskip("triton")
    from tests.ptx_emulator import triton_cases

    return triton_cases


@pytest.mark.parametrize("arch", [70, 80, 90])
def test_triton_kernels(arch: int) -> None:
    triton_kernels().check_sound(arch)


def test_triton_faults() -> None:
    triton_kernels().check_faults()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_wrong(value: float) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from tests.ptx_emulator.check import Check
    from tests.ptx_emulator.triton_bridge import Session

    expected = torch.ones(4, dtype=torch.float64)
    ours = expected.float()
    ours[2] = value
    check = Check(Session(90))
    check.close("it", ours, expected, expected.float())
    assert len(check.wrong) == 1 and "differs at 1" in check.wrong[0]
    check = Check(Session(90))
    check.close("it", ours, expected, ours)  # where eager's stands
    assert not check.wrong
