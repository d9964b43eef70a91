"""The fake kernel knows the workspaces of a loss as the launcher makes them, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from fcnseg.kernels import common, upsample_cross_entropy

FP16, FP32 = torch.float16, torch.float32


class NoKernel:
    """Stands for a kernel: launches nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_upsample_cross_entropy_kernel", "_loss_kernel", "_gradient_kernel"):
        monkeypatch.setattr(upsample_cross_entropy, name, NoKernel())


@pytest.mark.parametrize("arch", [70, 90])
@pytest.mark.parametrize("multiprocessors", [4, 132])
@pytest.mark.parametrize(
    ("shape", "size", "dtype"),
    [
        ((16, 19, 96, 96), (768, 768), FP16),
        ((8, 150, 64, 64), (512, 512), FP32),
        ((2, 21, 17, 33), (513, 1025), FP32),
        ((1, 1000, 3, 200), (7, 450), FP16),
        ((0, 5, 4, 4), (9, 9), FP32),
    ],
)
@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.1)])
def test_fake_workspaces_are_the_real_ones(
    arch: int, multiprocessors: int, shape: tuple[int, ...], size: tuple[int, int],
    dtype: torch.dtype, weighted: bool, smoothing: float, no_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(common, "capability", lambda device: arch)
    monkeypatch.setattr(common, "multiprocessors", lambda device: multiprocessors)
    for compute_grad, reduction in ((True, "mean"), (True, "none"), (False, "sum")):
        options = (255, reduction, smoothing, False, None, None, compute_grad)
        real = upsample_cross_entropy.upsample_cross_entropy_forward(
            torch.empty(shape, dtype=dtype), torch.empty(shape[0], *size, dtype=torch.uint8),
            torch.empty(shape[1]) if weighted else None, *options,
            torch.zeros(5, dtype=torch.int64),
        )  # fmt: skip
        with FakeTensorMode(), torch.device("cuda"):
            fake = torch.ops.fcnseg.upsample_cross_entropy(
                torch.empty(shape, dtype=dtype), torch.empty(shape[0], *size, dtype=torch.uint8),
                torch.empty(shape[1]) if weighted else None, *options,
            )  # fmt: skip
        for ours, promised in zip(real, fake, strict=True):
            assert ours.shape == promised.shape and ours.dtype == promised.dtype
            assert ours.stride() == promised.stride()


def test_a_graph_with_dynamic_sizes_is_specialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a gradient is wanted on CUDA: the layout of its workspace follows from the sizes."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    monkeypatch.setattr(common, "capability", lambda device: 90)
    monkeypatch.setattr(common, "multiprocessors", lambda device: 132)
    options = (None, 255, "mean", 0.0, False, None, None)
    for wanted in (True, False):
        mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
        shape = mode.from_tensor(torch.empty(2, 19, 12, 14)).shape
        pixels = mode.from_tensor(torch.empty(2, 96, 112)).shape
        with mode, torch.device("cuda"):
            logits, target = torch.empty(shape), torch.empty(pixels, dtype=torch.int64)
            torch.ops.fcnseg.upsample_cross_entropy(logits, target, *options, wanted)
        sizes = (*logits.shape, *target.shape[1:])
        assert all(isinstance(each, torch.SymInt) for each in sizes)
        static = [each.node.maybe_as_int() is not None for each in sizes]
        assert static == [wanted] * len(sizes)
