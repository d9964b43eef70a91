"""Cases of the kernels over bilinearly upsampled logits: loss, labels, confusion matrix."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fcnseg import reference
from tests.kernel_cases import PLAIN
from tests.ptx_emulator import launchers
from tests.ptx_emulator.case import ARCHS, Case
from tests.ptx_emulator.check import Check
from tests.ptx_emulator.launchers import Geometry, Loss, launches_on

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
U8, I32, I64 = torch.uint8, torch.int32, torch.int64
SHORT = {F16: "fp16", BF16: "bf16", F32: "fp32", U8: "u8", I32: "i32", I64: "i64"}

Spoil = Callable[[Tensor, Tensor], None]  # plants a value into logits or target


def make(
    N: int,
    C: int,
    h: int,
    w: int,
    H: int,
    W: int,
    dtype: torch.dtype = F32,
    labels: torch.dtype = I64,
    spread: float = 2.0,
    ignored: int = 255,
) -> tuple[Tensor, Tensor]:
    """Random logits and labels, a tenth of which are ``ignored``."""
    torch.manual_seed(N + C + h + w + H + W)
    logits = (torch.randn(N, C, h, w) * spread).to(dtype)
    target = torch.randint(0, min(C, 255), (N, H, W))
    target[torch.rand(N, H, W) < 0.1] = ignored
    return logits, target.to(labels)


def put_logit(channel: int, row: int, column: int, value: float) -> Spoil:
    def spoil(logits: Tensor, target: Tensor) -> None:
        logits[0, channel, row, column] = value

    return spoil


def put_label(at: tuple[Any, ...], value: int) -> Spoil:
    def spoil(logits: Tensor, target: Tensor) -> None:
        target[at] = value

    return spoil


def loss_case(
    logits: Tensor,
    target: Tensor,
    loss: Loss = Loss(),  # noqa: B008 (frozen)
    weighted: bool = False,
    geometry: Geometry = PLAIN,
    record_expected: list[int] | None = None,
    alone: bool = False,
) -> Callable[[Check], None]:
    """Loss and gradient; ``alone``: the loss once more, where no gradient is wanted."""

    def run(check: Check) -> None:
        weight = torch.linspace(0.5, 1.5, logits.shape[1]) if weighted else None
        torch.manual_seed(0)
        upstream = torch.randn(target.shape) if loss.per_pixel else torch.tensor(-3.0)
        record = launchers.no_record()
        with launches_on(check.session):
            value, gradient = launchers.bilinear_loss(
                logits, target, weight, loss, geometry, upstream, record
            )
        exact, eager = (
            launchers.bilinear_loss_reference(
                logits.to(kind),
                target,
                None if weight is None else weight.to(kind),
                loss,
                geometry,
                upstream,
            )
            for kind in (torch.float64, F32)
        )
        check.close("loss", value, exact[0], eager[0])
        check.close("gradient", gradient, exact[1], eager[1].to(gradient.dtype))
        if record.tolist() != (record_expected or [0] * 5):
            check.wrong.append(f"record {record.tolist()}")
        if alone:
            with launches_on(check.session):
                value = launchers.bilinear_loss_alone(
                    logits, target, weight, loss, geometry, launchers.no_record()
                )
            check.close("loss alone", value, exact[0], eager[0])

    return run


def spoiled(spoil: Spoil, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    logits, target = tensors
    spoil(logits, target)
    return logits, target


def argmax_case(
    logits: Tensor, size: tuple[int, int], geometry: Geometry = PLAIN, dtype: torch.dtype = I64
) -> Callable[[Check], None]:
    def run(check: Check) -> None:
        with launches_on(check.session):
            label = launchers.upsample_argmax_forward(logits, size, *geometry, dtype)
        check.largest("label", label, reference.upsample(logits.double(), size, *geometry))

    return run


def confusion_case(
    logits: Tensor,
    target: Tensor,
    geometry: Geometry = PLAIN,
    counted: bool = False,
    bad: int = 0,
) -> Callable[[Check], None]:
    """Counts added to a transposed matrix; ``counted``: bad labels go to a counter."""

    def run(check: Check) -> None:
        C = logits.shape[1]
        matrix = torch.ones(C, C, dtype=I64).t()
        expected = matrix.clone()
        predicted = reference.upsample_argmax(logits, target.shape[1:], *geometry, I64)
        reference.confusion_matrix_(expected, predicted, target, 255)
        record = launchers.no_record()
        invalid = torch.zeros(1, dtype=I64) if counted else None
        with launches_on(check.session):
            launchers.upsample_confusion_matrix_forward_(
                matrix, logits, target, 255, *geometry, record, invalid
            )
        check.same("matrix", matrix, expected)
        found = record if invalid is None else invalid
        if found[0].item() != bad:
            check.wrong.append(f"{found.tolist()} bad labels instead of {bad}")

    return run


def geometry_name(sizes: tuple[int, ...], geometry: Geometry) -> str:
    h, w, H, W = sizes
    name = f"{h}x{w} to {H}x{W}"
    return name + (" corners" if geometry[0] else "") + (" scale" if geometry[1] else "")


def option_cases() -> Iterator[Case]:
    for reduction, weighted, smoothing in itertools.product(
        ("mean", "sum", "none"), (False, True), (0.0, 0.1)
    ):
        options = f"{reduction}{' weight' * weighted}{' smoothing' * (smoothing > 0)}"
        x, y = make(2, 19, 3, 4, 24, 32)
        quick = {"mean": ARCHS, "none": ARCHS, "mean weight smoothing": (90,)}
        run = loss_case(x, y, Loss(255, reduction, smoothing), weighted, alone=reduction != "none")
        yield Case(f"loss {options}", run, quick.get(options, ()))


def cases() -> Iterator[Case]:
    yield from option_cases()
    x, _ = make(2, 19, 3, 4, 24, 32, F16)
    yield Case("argmax 19 classes fp16", argmax_case(x, (24, 32)), ARCHS)
    x, y = make(2, 19, 3, 5, 24, 40, F16)
    yield Case("confusion matrix 19 classes", confusion_case(x, y), ARCHS)
