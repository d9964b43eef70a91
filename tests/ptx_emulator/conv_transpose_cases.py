"""Cases of the kernels over transposed convolutions: loss with its gradients, labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fcnseg import reference
from tests.kernel_cases import LAYOUTS, lay_out
from tests.ptx_emulator import launchers
from tests.ptx_emulator.bilinear_cases import (
    BF16,
    F16,
    F32,
    I64,
    SHORT,
    U8,
    Spoil,
    put_label,
    put_logit,
)
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
    layout: str | None = None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    spoil: Spoil | None = None,
    record_expected: list[int] | None = None,
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
        if layout is not None:
            x, y = lay_out(layout, x, y)
        if spoil is not None:
            spoil(x, y)
        record = launchers.no_record()
        class_weight = torch.linspace(0.5, 1.5, C) if weighted else None
        gradients = (wanted[0], wanted[1], wanted[2] and bias)
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
            ours = launchers.conv_transpose_loss(own, geometry, loss, gradients, upstream, record)
        exact, eager = (
            launchers.conv_transpose_loss_reference(
                operands(kind), geometry, loss, gradients, upstream
            )
            for kind in (torch.float64, F32)
        )
        for name, asked, our, their, plain in zip(
            ("loss", "input", "weight", "bias"), (True, *gradients), ours, exact, eager, strict=True
        ):
            if asked:
                extra = 0.0 if name == "loss" else ROUNDED_SLOPE[dtype]
                check.close(name, our, their, plain.to(our.dtype), extra)
        if record.tolist() != (record_expected or [0] * 5):
            check.wrong.append(f"record {record.tolist()}")
        with launches_on(check.session):
            label = launchers.conv_transpose_argmax_forward(
                x, weight, own[3], (H, W), *geometry, I64
            )
        wide = operands(torch.float64)
        z = reference.conv_transpose(wide[0], wide[1], wide[3], (H, W), *geometry)
        check.largest("label", label, z)

    return run


def dtype_cases() -> Iterator[Case]:
    """Dtypes, reductions, class weights and smoothing; full, grouped and between."""
    none, smooth = Loss(reduction="none"), Loss(smoothing=0.1)
    quick: dict[str, tuple[int, ...]] = {
        "full fp16 mean": ARCHS, "full fp32 mean": (80,),
        "grouped fp32 mean": ARCHS, "grouped fp16 none": (80,),
    }  # fmt: skip
    for groups, dtype, loss in itertools.product(
        (1, 19), (F16, BF16, F32), (Loss(), none, Loss(reduction="sum"))
    ):
        name = f"{'full' if groups == 1 else 'grouped'} {SHORT[dtype]} {loss.reduction}"
        yield Case(
            f"conv {name}", transposed(19, 19, groups, 4, 8, dtype, loss), quick.get(name, ())
        )
    for groups, dtype, loss, archs in (
        (1, BF16, smooth, (80,)), (21, F32, Loss(reduction="none", smoothing=0.1), (90,)),
        (1, F32, Loss(reduction="none", smoothing=0.1), ()), (21, F16, smooth, (70,)),
    ):  # fmt: skip
        name = f"{'full' if groups == 1 else 'grouped'} {SHORT[dtype]} {loss.reduction}"
        run = transposed(21, 21, groups, 4, 8, dtype, loss, weighted=True)
        yield Case(f"conv {name} weight smoothing", run, archs)
    yield Case("conv between fp32", transposed(8, 6, 2, 2, 4), (70,))
    yield Case("conv between fp16 none", transposed(8, 6, 2, 2, 4, F16, none))


def shape_cases() -> Iterator[Case]:
    """Classes and channels, strides that do not divide the kernel, dilation, crop, layouts."""
    none = Loss(reduction="none")
    run = transposed(5, 7, 1, 4, 4, F16, padding=0, bias=False)
    yield Case("conv full k=s no bias", run, (80,))
    yield Case("conv full 2 classes u8", transposed(3, 2, 1, 2, 4, labels=U8), (90,))
    yield Case("conv full 1 class", transposed(3, 1, 1, 2, 4), (80,))
    yield Case("conv grouped 1 class", transposed(1, 1, 1, 2, 4, loss=none))
    small: dict[str, Any] = {"size": (3, 4)}
    yield Case("conv full 70 to 50", transposed(70, 50, 1, 2, 4, F16, **small))
    yield Case("conv full 70 to 50 fp32 none", transposed(70, 50, 1, 2, 4, F32, none, **small))
    yield Case("conv full 150", transposed(8, 150, 1, 2, 4, F16, **small), (90,))
    yield Case("conv grouped 300", transposed(300, 300, 300, 2, 4, **small))
    yield Case("conv grouped 140", transposed(140, 140, 140, 2, 4, size=(2, 2)), (70,))
    yield Case("conv generic fp16", transposed(19, 19, 1, 2, 3, F16, padding=1), (90,))
    yield Case("conv generic fp32 none", transposed(19, 19, 1, 2, 3, F32, none, padding=1), (80,))
    yield Case("conv generic grouped", transposed(5, 5, 5, 2, 3, padding=1), (70,))
    yield Case("conv dilated", transposed(3, 4, 1, 2, 3, dilation=3, padding=1), (90,))
    yield Case("conv dilated grouped", transposed(4, 4, 4, 2, 3, dilation=3, padding=1))
    yield Case("conv full crop", transposed(19, 19, 1, 4, 8, F16, crop=(3, 1)), (80, 90))
    yield Case("conv grouped crop", transposed(19, 19, 19, 4, 8, crop=(2, 5)), (70, 90))
    yield Case("conv generic crop", transposed(5, 4, 1, 2, 3, padding=0, crop=(1, 3)), ())
    yield Case("conv one sample", transposed(5, 4, 1, 4, 8, F16, size=(1, 1)), (90,))
    yield Case("conv several tiles", transposed(5, 4, 1, 2, 4, F16, size=(20, 33)), (90,))
    yield Case("conv grouped several tiles", transposed(4, 4, 4, 2, 4, size=(20, 33)), (90,))
    yield Case("conv no bias", transposed(19, 19, 1, 4, 8, F16, bias=False))
    for index, name in enumerate(("input", "weight", "bias")):
        alone = (index == 0, index == 1, index == 2)
        run = transposed(19, 19, 1, 4, 8, F16, wanted=alone)
        yield Case(f"conv full gradient of {name} alone", run, (90,) if name == "weight" else ())
        run = transposed(19, 19, 19, 4, 8, wanted=alone)
        yield Case(f"conv grouped gradient of {name} alone", run)
    for layout in LAYOUTS:
        archs = (90,) if layout == "channels_last" else ()
        yield Case(f"conv full {layout}", transposed(19, 19, 1, 4, 8, F16, layout=layout), archs)
        yield Case(f"conv grouped {layout}", transposed(19, 19, 19, 4, 8, layout=layout))


def value_cases() -> Iterator[Case]:
    """Values that are not finite, and bad labels."""
    for groups, dtype, archs in ((1, F16, (90,)), (5, F32, (70,))):
        name = "full" if groups == 1 else "grouped"
        for value in (math.nan, math.inf, -math.inf):
            run = transposed(5, 5, groups, 2, 4, dtype, spoil=put_logit(1, 1, 1, value))
            yield Case(f"conv {name} sample {value}", run, archs)
        for reduction in ("mean", "none"):
            run = transposed(
                5, 5, groups, 2, 4, dtype, Loss(reduction=reduction),
                spoil=put_label((1, 6, 7), 2**32 + 3),
                record_expected=[1, 2**32 + 3, 1, 6, 7],
            )  # fmt: skip
            yield Case(f"conv {name} bad label {reduction}", run, archs)
        run = transposed(5, 5, groups, 2, 4, dtype, spoil=put_label((...,), 255))
        yield Case(f"conv {name} all ignored", run, archs)


def cases() -> Iterator[Case]:
    """Every case over transposed convolutions."""
    yield from dtype_cases()
    yield from shape_cases()
    yield from value_cases()
