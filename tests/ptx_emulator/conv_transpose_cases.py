"""Cases of the kernels over transposed convolutions: loss with its gradients, labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fcnseg import reference
from tests.ptx_emulator import launchers
from tests.ptx_emulator.bilinear_cases import BF16, F16, F32, I64, SHORT, Spoil
from tests.ptx_emulator.case import ARCHS, Case
from tests.ptx_emulator.check import Check
from tests.ptx_emulator.launchers import ConvOperands, Loss, launches_on

#: Allowed beyond the tolerance of the result's dtype, by the operands': products of a slope, which
#: is rounded to it, with the operands.
ROUNDED_SLOPE = {F32: 0.0, F16: 1e-3, BF16: 8e-3}


def transposed(
    C_in: int,
    C: int,
    groups: int,
    stride: int,
    kernel: int,
    dtype: torch.dtype = F32,
    loss: Loss = Loss(),  # noqa: B008 (frozen)
    weighted: bool = False,
    size: tuple[int, int] = (5, 6),
    labels: torch.dtype = I64,
    dilation: int = 1,
    padding: int | None = None,
    crop: tuple[int, int] = (0, 0),
    bias: bool = True,
    spoil: Spoil | None = None,
    with_argmax: bool = True,
) -> Callable[[Check], None]:
    """Loss, gradients and labels of a transposed convolution of two images."""

    def run(check: Check) -> None:
        torch.manual_seed(C_in + C + stride)
        h, w = size
        x, weight, b = (
            tensor.to(dtype)
            for tensor in (
                torch.randn(2, C_in, h, w),
                torch.randn(C_in, C // groups, kernel, kernel),
                torch.randn(C),
            )
        )
        pad = stride // 2 if padding is None else padding
        geometry = ((stride,) * 2, (pad,) * 2, (0, 0), groups, (dilation,) * 2, crop)
        H, W = (
            (n - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1 - 2 * cropped
            for n, cropped in zip(size, crop, strict=True)
        )
        y = torch.randint(0, C, (2, H, W))
        y[torch.rand(2, H, W) < 0.1] = 255
        y = y.to(labels)
        if spoil is not None:
            spoil(x, y)
        class_weight = torch.linspace(0.5, 1.5, C) if weighted else None
        wanted = (True, True, bias)
        upstream = torch.randn(y.shape) + 1 if loss.per_pixel else None

        def operands(kind: torch.dtype) -> ConvOperands:
            return (
                x.to(kind),
                weight.to(kind),
                y,
                b.to(kind) if bias else None,
                None if class_weight is None else class_weight.to(kind),
            )

        own: ConvOperands = (x, weight, y, b if bias else None, class_weight)
        with launches_on(check.session):
            ours = launchers.conv_transpose_loss(
                own, geometry, loss, wanted, upstream, launchers.no_record()
            )
        exact, eager = (
            launchers.conv_transpose_loss_reference(
                operands(kind), geometry, loss, wanted, upstream
            )
            for kind in (torch.float64, F32)
        )
        names = ("loss", "input", "weight", "bias")[: 3 + bias]
        for name, our, their, plain in zip(names, ours, exact, eager, strict=False):
            extra = 0.0 if name == "loss" else ROUNDED_SLOPE[dtype]
            check.close(name, our, their, plain.to(our.dtype), extra)
        if with_argmax:
            with launches_on(check.session):
                label = launchers.conv_transpose_argmax_forward(
                    x, weight, own[3], (H, W), *geometry, I64
                )
            wide = operands(torch.float64)
            z = reference.conv_transpose(wide[0], wide[1], wide[3], (H, W), *geometry)
            check.largest("label", label, z)

    return run


def cases() -> Iterator[Case]:
    for dtype in (F16, BF16, F32):
        for reduction in ("mean", "none"):
            yield Case(
                f"conv full 19 classes {SHORT[dtype]} {reduction}",
                transposed(19, 19, 1, 4, 8, dtype, Loss(255, reduction)),
                ARCHS if dtype == F16 and reduction == "mean" else (),
            )
