"""The Triton kernels without a GPU: interpreted and compiled, each in a process of its own."""

from __future__ import annotations

import importlib
import math
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fcnseg.kernels import common
from fcnseg.kernels.conv_transpose_argmax import conv_transpose_argmax_forward
from fcnseg.kernels.conv_transpose_cross_entropy import (
    conv_transpose_cross_entropy_backward,
    conv_transpose_cross_entropy_forward,
)
from fcnseg.kernels.conv_transpose_plan import make_problem, tuned_blocks
from fcnseg.kernels.upsample_argmax import upsample_argmax_forward
from fcnseg.kernels.upsample_confusion_matrix import upsample_confusion_matrix_forward_
from fcnseg.kernels.upsample_cross_entropy import (
    upsample_cross_entropy_backward,
    upsample_cross_entropy_forward,
    upsample_cross_entropy_gradient,
)

ROOT = Path(__file__).parent.parent


def run(*command: str, **environment: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


def in_parts(count: int, seconds: float) -> list[Any]:
    """``count`` parts of a run, each a test of its own, so that all cores are busy to the end."""
    return [
        pytest.param(f"{k}/{count}", marks=pytest.mark.long(seconds)) for k in range(1, count + 1)
    ]


def interpret(name: str, *options: str) -> None:
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{name}.py",
        *options, TRITON_INTERPRET="1")  # fmt: skip


@pytest.mark.parametrize("part", in_parts(3, 15))
def test_values_in_the_interpreter(part: str) -> None:
    interpret("interpret_kernels", "--part", part)


def same_values_as_unprepared() -> None:
    """For `test_the_prepared_interpreter_computes_the_same`, in a process of its own."""
    from tests import triton_interpreter

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, 3, 4, generator=generator)
    weight = torch.randn(5, 3, 4, 4, generator=generator)
    target = torch.randint(0, 3, (1, 6, 8), generator=generator)
    target[0, 2, 3] = 255
    geometry = ((2, 2), (1, 1), (0, 0), 1, (1, 1), (0, 0))

    def values() -> list[torch.Tensor]:
        record = torch.zeros(5, dtype=torch.int64)
        loss, sums, edges = upsample_cross_entropy_forward(
            logits, target, None, 255, "mean", 0.1, False, None, None, True, record
        )
        upsample_cross_entropy_gradient(
            torch.tensor(2.0), sums, edges, sums, (6, 8), False, 0.1, False, None, None
        )
        results = conv_transpose_cross_entropy_forward(
            logits, weight, target, torch.ones(3), None, *geometry, 255, "sum", 0.0, (True,) * 3,
            record,
        )  # fmt: skip
        return [loss, sums, *results]

    before = values()
    triton_interpreter.prepare()
    for one, other in zip(before, values(), strict=True):
        assert torch.equal(one, other)


def test_the_prepared_interpreter_computes_the_same() -> None:
    run("-c", "from tests import test_triton; test_triton.same_values_as_unprepared()",
        TRITON_INTERPRET="1")  # fmt: skip


CONV_TRANSPOSE_QUICK = (
    "geometry or bad_label or not_finite or ties or only_wanted or dtypes or weigh_nothing "
    "or (borders and inf-full)"
)


@pytest.mark.parametrize("part", in_parts(4, 15))
def test_values_of_the_transposed_convolution_in_the_interpreter(part: str) -> None:
    interpret("interpret_conv_transpose", "-k", CONV_TRANSPOSE_QUICK, "--part", part)


@pytest.mark.slow
@pytest.mark.parametrize("part", in_parts(4, 30))
def test_other_values_of_the_transposed_convolution_in_the_interpreter(part: str) -> None:
    interpret("interpret_conv_transpose", "-k", f"not ({CONV_TRANSPOSE_QUICK})", "--part", part)


def same_code_with_shared_passes() -> None:
    """For `test_shared_passes_make_the_same_code`, in a process of its own."""
    from triton import knobs
    from triton.runtime import driver

    from tests import coalesce_once, compile_kernels
    from tests.fake_driver import FakeDriver

    def code(cache: str) -> list[bytes]:
        knobs.cache.dir = cache
        made = []
        for arch in (80, 90):  # the second takes what the first has made
            driver.set_active(FakeDriver(arch))
            for name, kernel, arguments, _ in compile_kernels.configurations(arch):
                if "x0.5" in name or name.startswith("C=19 fp16"):
                    kernel.device_caches.clear()
                    made.append(compile_kernels.compile_one(kernel, arguments).asm["cubin"])
        return made

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        plain = code(one)
        with coalesce_once.share():
            shared = code(other)
        assert len(coalesce_once._coalesced) == len(plain) // 2 >= 4
        assert plain == shared


@pytest.mark.kernels
@pytest.mark.long(7)
def test_shared_passes_make_the_same_code() -> None:
    run("-c", "from tests import test_triton; test_triton.same_code_with_shared_passes()")


@pytest.mark.kernels
@pytest.mark.parametrize("part", in_parts(8, 20))
def test_kernels_compile_for_every_architecture(part: str) -> None:
    run("-m", "tests.compile_kernels", PART=part, JOBS="1")


@pytest.mark.kernels
@pytest.mark.parametrize("part", in_parts(2, 10))
def test_transposed_convolution_compiles_for_every_architecture(part: str) -> None:
    run("-m", "tests.compile_kernels", "C=19 fp16", PART=part, CONV="1", JOBS="1")


@pytest.mark.slow
@pytest.mark.parametrize("part", in_parts(8, 60))
def test_every_transposed_convolution_compiles_for_every_architecture(part: str) -> None:
    run("-m", "tests.compile_kernels", PART=part, CONV="1", JOBS="1")


def launched_grids(
    monkeypatch: pytest.MonkeyPatch, launcher: Callable[..., Any], *args: Any
) -> list[Any]:
    """The grids that ``launcher`` asks for; nothing runs."""
    grids: list[Any] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **options: None

    with monkeypatch.context() as patch:
        module = sys.modules[launcher.__module__]
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            patch.setattr(module, name, Recorder())
        launcher(*args)
    return grids


CONV_SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {
    "many channels and classes": ((1, 4096, 33, 33), (4096, 4096, 4, 4), 2, 1),
    "many groups": ((2, 4096, 65, 65), (4096, 1, 64, 64), 32, 4096),
    "few groups": ((1, 4096, 9, 9), (4096, 2048, 3, 3), 2, 2),
    "many images": ((70_000, 19, 4, 4), (19, 19, 4, 4), 2, 1),
    "many rows": ((1, 19, 300_000, 2), (19, 19, 4, 4), 2, 1),
}


@pytest.mark.parametrize("name", CONV_SIZES)
@pytest.mark.parametrize("capability", [70, 90])
def test_grids_of_the_transposed_convolution(
    name: str, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "capability", lambda device: capability)
    shape, kernel, stride, groups = CONV_SIZES[name]
    size = [samples * stride for samples in shape[2:]]
    with torch.device("meta"):
        input, weight = torch.empty(shape), torch.empty(kernel)
        bias, record = torch.empty(kernel[1] * groups), torch.empty(5, dtype=torch.int64)
        target = torch.empty(shape[0], *size, dtype=torch.uint8)
    padding = ((kernel[2] - stride) // 2,) * 2
    geometry = ((stride,) * 2, padding, (stride - 1,) * 2, groups, (1, 1), (0, 0))
    operands, wanted = (input, weight, target, bias, None, *geometry), (True, True, True)
    grids = []
    for launcher, *args in (
        (conv_transpose_cross_entropy_forward, *operands, 255, "mean", 0.0, wanted, record),
        (conv_transpose_cross_entropy_backward, target, *operands, 255, 0.0, wanted),
        (conv_transpose_argmax_forward, input, weight, bias, size, *geometry, torch.uint8),
    ):
        grids += launched_grids(monkeypatch, launcher, *args)
    assert len(grids) >= 10
    for first, *others in grids:
        assert 0 < first < 2**31, grids
        assert all(0 < other < 2**16 for other in others), grids


@pytest.mark.parametrize("shape", [(70_000, 19, 4, 4), (1, 19, 300_000, 2), (1, 70_000, 9, 9)])
def test_grids_of_the_upsampling(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    N, C, h, w = shape
    size = (8 * h, 8 * w)
    with torch.device("meta"):
        logits, record = torch.empty(shape), torch.empty(5, dtype=torch.int64)
        target = torch.empty(N, *size, dtype=torch.uint8)
        matrix = torch.empty(C, C, dtype=torch.int64)
    plain = (False, None, None)
    grids = []
    for launcher, *args in (
        (upsample_cross_entropy_forward, logits, target, None, 255, "mean", 0.0, *plain, True,
         record),
        (upsample_cross_entropy_gradient, logits, logits, logits, logits, size, False, 0.0, *plain),
        (upsample_cross_entropy_backward, target, logits, target, None, 255, 0.0, *plain, record),
        (upsample_argmax_forward, logits, size, *plain, torch.int64),
        (upsample_confusion_matrix_forward_, matrix, logits, target, 255, *plain, record, None),
    ):  # fmt: skip
        grids += launched_grids(monkeypatch, launcher, *args)
    assert len(grids) == 8
    assert all(0 < grid[0] < 2**31 and set(grid[1:]) <= {1} for grid in grids), grids


def same_kernels_at_other_sizes() -> None:
    """For `test_other_sizes_do_not_compile_anew`, in a process of its own."""
    from triton.runtime import driver

    from tests import compile_kernels
    from tests.fake_driver import FakeDriver

    driver.set_active(FakeDriver(90))

    def compiled(
        N: int, h: int, w: int, *, crop: tuple[int, int] = (0, 0), late: int = 0, last: bool = False
    ) -> list[Any]:
        """Tensors begin ``late`` elements after an aligned address; ``last``: channels are last."""

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            tensor = torch.empty(math.prod(shape) + late, dtype=dtype)[late:].view(shape)
            assert (tensor.data_ptr() % 16 != 0) == bool(late)
            return tensor

        size = (8 * h, 8 * w)
        covered = (size[0] - crop[0], size[1] - crop[1])
        logits, target = empty(N, 19, h, w), empty(N, *size, dtype=torch.int64)
        samples = empty(N, h, w, 19).permute(0, 3, 1, 2) if last else logits
        cut = target[:, : covered[0], : covered[1]]
        weight, full = empty(19, 1, 16, 16), empty(19, 19, 16, 16, dtype=torch.float16)
        class_weight, bias = empty(19), empty(19)
        record, matrix = empty(5, dtype=torch.int64), empty(19, 19, dtype=torch.int64)
        plain, geometry = (False, None, None), ((8, 8), (4, 4), (0, 0))
        loss = (cut, bias, class_weight, *geometry, 19, (1, 1), crop, 255)
        kernels = []
        for launcher, *args in (
            (conv_transpose_cross_entropy_forward, samples, weight, *loss, "mean", 0.0, (True,) * 3,
             record),
            (conv_transpose_cross_entropy_backward, empty(*cut.shape), samples, weight, *loss, 0.0,
             (True,) * 3),
            (conv_transpose_argmax_forward, samples.half(), full, None, covered, *geometry, 1,
             (1, 1), crop, torch.int64),
            (upsample_cross_entropy_forward, logits, target, class_weight, 255, "mean", 0.0, *plain,
             True, record),
            (upsample_cross_entropy_gradient, logits, logits, logits, logits, size, False, 0.0,
             *plain),
            (upsample_cross_entropy_backward, empty(*target.shape), logits, target, None, 255, 0.0,
             *plain, record),
            (upsample_argmax_forward, samples, size, *plain, torch.int64),
            (upsample_confusion_matrix_forward_, matrix, samples, target, 255, *plain, record,
             None),
        ):  # fmt: skip
            kernels += compile_kernels.recorded(90, launcher, *args)
        return [compile_kernels.compile_one(*launch) for launch in kernels]

    first = compiled(2, 64, 128)
    assert len(first) >= 14
    for sizes, options in (
        ((3, 61, 127), {}),
        ((16, 60, 121), {"last": True}),
        ((1, 67, 144), {"crop": (1, 16)}),
        ((1, 48, 16), {"crop": (3, 5), "late": 1}),
    ):
        for kernel, other in zip(first, compiled(*sizes, **options), strict=True):
            assert kernel is other, (sizes, options, kernel.metadata.name)


@pytest.mark.long(12)
def test_other_sizes_do_not_compile_anew() -> None:
    run("-c", "from tests import test_triton; test_triton.same_kernels_at_other_sizes()")


@pytest.mark.parametrize(
    ("version", "before"),
    [
        ("3.6.0", True), ("3.6.0+git9844da95", True), ("3.7", True), ("3.7.0", True),
        ("3.7.1rc1", True), ("3.7.1.dev20260101", True), ("3.7.1-rc2", True), ("unknown", True),
        ("3.7.1", False), ("3.7.1+gitd704bc6e", False), ("3.7.1.post1", False), ("3.7.2", False),
        ("3.10.0", False), ("4.0.0rc1", False),
    ],
)  # fmt: skip
def test_versions_of_triton(version: str, before: bool) -> None:
    assert common.is_before(version, (3, 7, 1)) == before


@pytest.mark.parametrize("of_weight", [False, True])
@pytest.mark.parametrize(
    ("version", "capability", "dtype", "stages"),
    [
        ("3.6.0", 90, torch.float16, 1),
        ("3.7.0+git1", 90, torch.bfloat16, 1),
        ("3.6.0", 90, torch.float32, 2),  # through registers
        ("3.6.0", 80, torch.float16, 2),  # no wgmma
        ("3.7.1", 90, torch.float16, 2),
    ],
)
def test_one_stage_where_triton_forgets_a_fence(
    version: str, capability: int, dtype: torch.dtype, stages: int, of_weight: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("triton.__version__", version)
    input, weight = torch.empty(1, 19, 4, 4), torch.empty(19, 19, 16, 16)
    geometry = ((32, 32), (8, 8), (4, 4), 1, (1, 1), (0, 0))
    problem = make_problem(input, weight, *geometry)
    tuned = tuned_blocks.__wrapped__  # what is cached belongs to the Triton that runs
    assert tuned(problem, dtype, capability, of_weight).num_stages == stages


def kernels_told_by_values() -> None:
    """For `test_no_kernel_is_told_by_values`, in a process of its own."""
    import triton

    import fcnseg.kernels

    kernels = {
        value
        for module in pkgutil.iter_modules(fcnseg.kernels.__path__, "fcnseg.kernels.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    assert len(kernels) >= 10
    for kernel in kernels:
        for parameter in kernel.params:
            free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            assert parameter.is_constexpr or free, (kernel.fn.__name__, parameter.name)


def test_no_kernel_is_told_by_values() -> None:
    run("-c", "from tests import test_triton; test_triton.kernels_told_by_values()")


def test_import_does_not_load_triton() -> None:
    run("-c", "import sys, fcnseg; sys.exit('triton' in sys.modules)")
