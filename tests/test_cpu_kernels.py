"""The compiled CPU kernels: instruction sets, threads, odd cells, ranges, ties, memory, sizes.

``test_conv_transpose_kernels.py`` is its second half: the transposed convolution.

Every test but the last ones runs on the instruction set of this process;
``test_instruction_set`` runs the file again on each of the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    assert_as_good_as_eager,
    bincount_matrix,
    eager_loss,
    eager_upsample,
    labels,
    normal,
)
from torch import Tensor

import fcnseg

ROOT = Path(__file__).resolve().parents[1]
CAPABILITIES = ["avx512", "avx2", "default"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]

pytestmark = pytest.mark.skipif(
    fcnseg.build_info()["operators"]["upsample_cross_entropy"]["cpu"] != "c++",
    reason="the compiled CPU operators are missing",
)


def run(*arguments: str, capability: str | None = None) -> subprocess.CompletedProcess[str]:
    """Python in a new process, on an instruction set."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    if capability is not None:
        environment["FCNSEG_CPU_CAPABILITY"] = capability
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def block_labels(shape: tuple[int, int, int], num_classes: int, seed: int = 0) -> Tensor:
    """Targets as in the benchmarks: blocks of 24 pixels; blocks of 64 are ignored, 5% of them."""
    N, H, W = shape
    generator = torch.Generator().manual_seed(seed)

    def grow(blocks: Tensor, edge: int) -> Tensor:
        return blocks.repeat_interleave(edge, 1).repeat_interleave(edge, 2)[:, :H, :W]

    target = grow(
        torch.randint(num_classes, (N, H // 24 + 1, W // 24 + 1), generator=generator), 24
    )
    ignored = torch.rand(N, H // 64 + 1, W // 64 + 1, generator=generator) < 0.05
    return torch.where(grow(ignored, 64), 255, target).contiguous()


def fused(logits: Tensor, target: Tensor, upstream: Tensor | None = None, **options):
    """Loss and gradient."""
    leaf = logits.detach().requires_grad_()
    loss = fcnseg.upsample_cross_entropy(leaf, target, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]


def check(logits: Tensor, target: Tensor, **options) -> None:
    """Eager in float32 for half types: its half sums overflow."""

    def eager(x: Tensor) -> Tensor:
        return eager_loss(x if x.dtype == torch.float64 else x.float(), target, **options)

    assert_as_good_as_eager(
        lambda x: fcnseg.upsample_cross_entropy(x, target, **options), eager, [logits]
    )


def check_argmax(logits: Tensor, size: tuple[int, int], **options) -> None:
    """The class has the greatest float64 value, up to 1e-5 of the largest logit."""
    prediction = fcnseg.upsample_argmax(logits, size, **options)
    z = eager_upsample(logits.double(), size, **options)
    best = z.amax(1)
    chosen = z.gather(1, prediction[:, None])[:, 0]
    assert ((best - chosen) <= 1e-5 * logits.double().abs().amax()).all()
    target = labels(tuple(prediction.shape), logits.shape[1], ignore=255)
    matrix = fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255, **options)
    assert torch.equal(matrix, bincount_matrix(prediction, target, logits.shape[1], 255))


# -- accuracy ------------------------------------------------------------------------------------


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("num_classes", [2, 5, 19])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_gradient_is_accurate(num_classes, scale, noise):
    """Under few classes, flat logits and noisy labels p - [label] cancels: errors show most."""
    logits = scale * normal((1, num_classes, 32, 64))
    shape = (1, 256, 512)
    target = labels(shape, num_classes) if noise else block_labels(shape, num_classes)
    leaf = logits.double().requires_grad_()
    expected = eager_loss(leaf, target, ignore_index=255)
    loss, gradient = fused(logits, target, ignore_index=255)
    assert relative_error(loss, expected) <= 2e-7
    bound = 1.5e-6 if noise and scale < 1 else 5e-7
    assert relative_error(gradient, torch.autograd.grad(expected, leaf)[0]) <= bound


@pytest.mark.parametrize("num_classes", [1, 2, 16, 17, 150, 300])
def test_numbers_of_classes(num_classes):
    logits, target = 3 * normal((1, num_classes, 3, 18)), labels((1, 25, 141), num_classes)
    check(logits, target)
    check_argmax(logits, (25, 141))


# Around the edges of a tile (32 columns, 8 rows) and of a vector (4, 8, 16 cells); very wide cells.
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 3, 2, 4), (3, 1024)),
        ((1, 3, 4, 2), (1024, 3)),
        ((1, 2, 1, 1), (2, 16384)),
        ((1, 2, 1, 1), (16384, 2)),
        ((1, 2, 1, 2), (300, 300)),
        *(((1, 3, 2, 3), (8, 3 * n)) for n in (31, 32, 33, 64, 65)),
        *(((1, 3, 3, 2), (3 * n, 16)) for n in (7, 8, 9, 16, 17)),
        *(((1, 3, 2, w), (16, 8 * w)) for w in (3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)),
    ],
)
def test_cells_of_any_width(shape, size):
    logits = 3 * normal(shape)
    constant = torch.full((1, *size), shape[1] - 1)  # all moments in one class: they overflow first
    for target in (constant, labels((1, *size), shape[1], ignore=255)):
        for align_corners in (False, True):
            check(logits, target, align_corners=align_corners, ignore_index=255)
    check(logits, constant, reduction="none")
    check_argmax(logits, size)


# -- the range of the logits -----------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scale", [1e-3, 10.0, 30.0, 1000.0, 1e6])
def test_large_logits(scale, reduction):
    logits, target = scale * normal((1, 19, 5, 9)), labels((1, 40, 72), 19, ignore=255)
    check(logits, target, reduction=reduction, ignore_index=255)
    check_argmax(logits, (40, 72))


@pytest.mark.parametrize("masked", [-1e9, -1e30, torch.finfo(torch.float32).min])
def test_masked_classes(masked):
    target = labels((1, 40, 72), 3)
    everywhere, somewhere, all_but_one = (3 * normal((1, 19, 5, 9)) for _ in range(3))
    everywhere[:, 7:] = masked
    somewhere[:, 4:, :3, 2:6] = masked
    all_but_one[:, 1:] = masked
    for logits in (everywhere, somewhere):
        check(logits, target)
        check_argmax(logits, (40, 72))
    check(all_but_one, torch.zeros_like(target))
    assert (fcnseg.upsample_argmax(all_but_one, (40, 72)) == 0).all()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(48, 56), (4, 3), (9, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype, size, align_corners):
    """NaN exactly where eager has it in float64; argmax then follows torch.argmax."""
    for seed, special in enumerate((torch.nan, torch.inf, -torch.inf)):
        logits = 3 * normal((1, 19, 9, 7), dtype, seed)
        for at in ((0, 3, 0, 0), (0, 5, 4, 3), (0, 0, 8, 6)):
            logits[at] = special
        target = labels((1, *size), 19, ignore=255)
        leaf = logits.double().requires_grad_()
        options = {"align_corners": align_corners}
        loss = eager_loss(leaf, target, ignore_index=255, reduction="none", **options)
        expected = torch.autograd.grad(loss.sum(), leaf)[0]
        ours, gradient = fused(
            logits, target, torch.ones(1, *size, dtype=loss.dtype).to(
                torch.float64 if dtype == torch.float64 else torch.float32),
            ignore_index=255, reduction="none", **options,
        )  # fmt: skip
        assert torch.equal(ours.isnan(), loss.isnan())
        assert torch.allclose(ours.double(), loss, rtol=1e-4, equal_nan=True)
        assert torch.equal(gradient.isnan(), expected.isnan())
        scalar, gradient = fused(logits, target, ignore_index=255, **options)
        assert scalar.isnan() == loss.sum().isnan()
        assert torch.equal(gradient.isnan(), expected.isnan())
        prediction = fcnseg.upsample_argmax(logits, size, **options)
        z = eager_upsample(logits.double(), size, **options)
        chosen, best = z.gather(1, prediction[:, None])[:, 0], z.amax(1)
        same = (prediction == z.argmax(1)) | ((best - chosen) <= 1e-4)  # ties of rounded logits
        assert same.all()


# -- ties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_lowest_index_among_ties(dtype):
    assert (fcnseg.upsample_argmax(torch.zeros(1, 5, 4, 20, dtype=dtype), (37, 160)) == 0).all()
    logits = normal((1, 7, 5, 33), dtype)
    twice = logits.repeat_interleave(3, dim=1)
    prediction = fcnseg.upsample_argmax(logits, (40, 200))
    assert torch.equal(fcnseg.upsample_argmax(twice, (40, 200)), 3 * prediction)


# -- threads ---------------------------------------------------------------------------------------


def all_results(logits: Tensor, target: Tensor) -> list[Tensor]:
    options = {"ignore_index": 255, "label_smoothing": 0.1}
    upstream = normal(tuple(target.shape))
    size = target.shape[1:]
    return [
        *fused(logits, target, ignore_index=255),
        *fused(logits, target, weight=torch.linspace(0.5, 2, logits.shape[1]), **options),
        *fused(logits, target, upstream, reduction="none", **options),
        fcnseg.upsample_argmax(logits, size),
        fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype):
    logits, target = 3 * normal((2, 19, 21, 33), dtype), block_labels((2, 168, 264), 19)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(all_results(logits, target))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_calls_from_several_python_threads():
    inputs = [
        (3 * normal((1, 19, 16, 32), seed=i), block_labels((1, 128, 256), 19, i)) for i in range(8)
    ]
    expected = [all_results(*each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: all_results(*each), inputs))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- any shape, scale, dtype, stride, option -------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "every other column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "rows last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "padded": lambda x: F.pad(x, (1, 1, 2, 2))[..., 2:-2, 1:-1],
    "one image": lambda x: x[:1].expand(x.shape),
}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_any_problem(data):
    draw = data.draw
    N, C = draw(st.integers(0, 2)), draw(st.sampled_from([1, 2, 3, 5, 19, 21]))
    h, w = draw(st.integers(1, 12)), draw(st.integers(1, 36))
    dtype = draw(st.sampled_from(DTYPES))
    scale = draw(st.none() | st.sampled_from([0.5, 1.0, 1.7, 2.0, 2.5, 4.0, 8.0]))
    if scale is None:
        H, W = draw(st.integers(1, 70)), draw(st.integers(1, 90))
    else:
        H, W = int(h * scale), int(w * scale)
        if H == 0 or W == 0:
            return
    logits = draw(st.sampled_from([0.1, 1.0, 3.0, 30.0])) * normal(
        (N, C, h, w), seed=draw(st.integers(0, 99))
    )
    logits = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](logits.to(dtype))
    ignore_index = draw(st.sampled_from([255, 0, -100]))
    kind = draw(st.sampled_from(["noise", "blocks", "constant", "ignored"]))
    target = labels((N, H, W), C, ignore=ignore_index)
    if kind == "blocks":
        target = target[:, ::6, ::6].repeat_interleave(6, 1).repeat_interleave(6, 2)[:, :H, :W]
    elif kind == "constant":
        target = torch.full((N, H, W), C - 1)
    elif kind == "ignored":
        target = torch.full((N, H, W), ignore_index)
    geometry = {"align_corners": draw(st.booleans()), "scale_factor": scale}
    integers = [torch.int64, torch.int32] + [torch.uint8] * (ignore_index >= 0)
    if N > 0:
        check(
            logits, target.to(draw(st.sampled_from(integers))), **geometry,
            weight=draw(st.sampled_from([None, torch.linspace(0.1, 2, C)])),
            ignore_index=ignore_index,
            label_smoothing=draw(st.sampled_from([0.0, 0.1, 0.5])),
            reduction=draw(st.sampled_from(REDUCTIONS)),
        )  # fmt: skip
        check_argmax(logits, (H, W), **geometry)
    else:
        loss, gradient = fused(logits, target, reduction="sum", ignore_index=ignore_index)
        assert loss == 0 and gradient.shape == logits.shape


# -- other processes: instruction sets, memory -----------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.long(8)
def test_instruction_set(capability):
    """This file and its second half on each instruction set of this machine."""
    if "FCNSEG_CPU_CAPABILITY" in os.environ:
        pytest.skip("an instruction set is forced already")
    probe = run(
        "-c", "import fcnseg; print(fcnseg.build_info()['cpu_capability'])", capability=capability
    )
    if probe.returncode != 0:
        assert f"{capability}, but this machine has only" in probe.stderr, probe.stderr
        pytest.skip(f"this machine has no {capability}")
    assert probe.stdout.strip() == capability
    if capability == fcnseg.build_info()["cpu_capability"]:
        return  # what this process runs on
    finished = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow",
        __file__, str(Path(__file__).with_name("test_conv_transpose_kernels.py")),
        "-k", "not instruction_set and not memory and not sizes", capability=capability,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]


def test_unknown_instruction_set():
    finished = run("-c", "import fcnseg; fcnseg.build_info()", capability="sse9")
    assert finished.returncode != 0
    assert "FCNSEG_CPU_CAPABILITY must be avx512, avx2 or default, got sse9" in finished.stderr


PEAK = """
import sys
import torch
import fcnseg
from oracles import eager_loss
from test_cpu_kernels import block_labels

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1])

torch.set_num_threads(1)
loss = fcnseg.upsample_cross_entropy if sys.argv[1] == "fused" else eager_loss
loss(torch.zeros(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 8, 8).long()).backward()
logits, target = torch.randn(2, 19, 64, 128, requires_grad=True), block_labels((2, 512, 1024), 19)
try:
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
except OSError:
    pass
before = status("VmHWM")
loss(logits, target, ignore_index=255).backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_peak_memory():
    peak = {}
    for name in ("fused", "eager"):
        finished = run("-c", PEAK, name)
        assert finished.returncode == 0, finished.stderr
        peak[name] = int(finished.stdout)
    assert peak["eager"] > 100_000  # kB: three planes of 80 MB
    assert peak["fused"] <= 0.05 * peak["eager"], peak


# -- sizes past 32 bits, checked on tiles ----------------------------------------------------------


def tile_logits(logits: Tensor, rows: range, columns: range, size: tuple[int, int]) -> Tensor:
    """Upsampled float64 logits [C, rows, columns] of image 0, align_corners=False."""

    def weights(pixels: range, n_in: int, n_out: int) -> Tensor:
        at = ((torch.tensor(pixels, dtype=torch.float64) + 0.5) * n_in / n_out - 0.5).clamp(min=0)
        low = at.long()
        high = (low + 1).clamp(max=n_in - 1)
        matrix = torch.zeros(len(pixels), n_in, dtype=torch.float64)
        index = torch.arange(len(pixels))
        matrix.index_put_((index, low), 1 - (at - low), accumulate=True)
        matrix.index_put_((index, high), at - low, accumulate=True)
        return matrix

    down = weights(rows, logits.shape[2], size[0])
    across = weights(columns, logits.shape[3], size[1])
    return down @ logits[0].double() @ across.T


def check_gradient_at(
    logits: Tensor, target: Tensor, gradient: Tensor, y: int, x: int, scale: int
) -> None:
    """The gradient of the sum at one source pixel, from all output pixels that it reaches."""
    size = tuple(target.shape[1:])
    rows = range(max(0, (y - 1) * scale), min(size[0], (y + 2) * scale))
    columns = range(max(0, (x - 1) * scale), min(size[1], (x + 2) * scale))
    leaf = logits.double().requires_grad_()
    z = tile_logits(leaf, rows, columns, size)
    t = target[0, rows.start : rows.stop, columns.start : columns.stop].long()
    loss = F.cross_entropy(z[None], t[None], ignore_index=255, reduction="sum")
    expected = torch.autograd.grad(loss, leaf)[0][0, :, y, x]
    found = gradient[0, :, y, x].double()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_150_classes_at_4096():
    """2.5e9 virtual elements."""
    logits, target = 3 * normal((1, 150, 512, 512)), block_labels((1, 4096, 4096), 150).byte()
    total, gradient = fused(logits, target, ignore_index=255, reduction="sum")
    losses = fcnseg.upsample_cross_entropy(logits, target, ignore_index=255, reduction="none")
    assert relative_error(total, losses.double().sum()) <= 1e-6
    prediction = fcnseg.upsample_argmax(logits, (4096, 4096), dtype=torch.uint8)
    for y, x in ((0, 0), (2000, 1111), (4096 - 40, 4096 - 40)):
        rows, columns = range(y, y + 40), range(x, x + 40)
        window = (0, slice(y, y + 40), slice(x, x + 40))
        z = tile_logits(logits, rows, columns, (4096, 4096))
        expected = F.cross_entropy(
            z[None], target[window][None].long(), ignore_index=255, reduction="none"
        )
        assert torch.allclose(losses[window].double(), expected[0], rtol=1e-5, atol=1e-5)
        chosen = z.gather(0, prediction[window][None].long())[0]
        assert (z.amax(0) - chosen <= 1e-5 * logits.abs().max()).all()
    for y, x in ((0, 0), (100, 333), (511, 511)):
        check_gradient_at(logits, target, gradient, y, x, 8)


@pytest.mark.slow
def test_more_than_2_to_31_pixels():
    scale, edge = 725, 46400
    logits = 3 * normal((1, 2, 64, 64))
    row = labels((1, 1, edge), 2, torch.uint8, ignore=255)
    target = row.expand(1, edge, edge).contiguous()
    target[0, ::7] = 1
    _, gradient = fused(logits, target, ignore_index=255, reduction="sum")
    for y, x in ((0, 0), (31, 7), (63, 63)):
        check_gradient_at(logits, target, gradient, y, x, scale)
    prediction = fcnseg.upsample_argmax(logits, (edge, edge), dtype=torch.uint8)
    matrix = fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255)
    # count_nonzero: a sum of booleans would make an int64 copy of 17 GB
    assert matrix.sum() == torch.count_nonzero(target != 255)
    assert matrix[:, 1].sum() == torch.count_nonzero((prediction == 1) & (target != 255))
    for y, x in ((0, 0), (20000, 33333), (edge - 40, edge - 40)):
        z = tile_logits(logits, range(y, y + 40), range(x, x + 40), (edge, edge))
        chosen = z.gather(0, prediction[0, y : y + 40, x : x + 40].long()[None])[0]
        assert (z.amax(0) - chosen <= 1e-5 * logits.abs().max()).all()
    target[0, edge - 1, edge - 2] = 9
    with pytest.raises(IndexError, match=rf"first is 9 at position \(0, {edge - 1}, {edge - 2}\)"):
        fcnseg.upsample_cross_entropy(logits, target, ignore_index=255)
