"""Cases of the kernels over bilinearly upsampled logits: loss, labels, confusion matrix."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fcnseg import reference
from tests.kernel_cases import CORNERS, GEOMETRIES, LAYOUTS, PLAIN, lay_out
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
    """Puts a value into the logits of the first image."""

    def spoil(logits: Tensor, target: Tensor) -> None:
        logits[0, channel, row, column] = value

    return spoil


def put_label(at: tuple[Any, ...], value: int) -> Spoil:
    """Puts a value into the labels."""

    def spoil(logits: Tensor, target: Tensor) -> None:
        target[at] = value

    return spoil


def loss_case(
    logits: Tensor,
    target: Tensor,
    loss: Loss = Loss(),  # noqa: B008 (frozen)
    weight: Tensor | None = None,
    geometry: Geometry = PLAIN,
    record_expected: list[int] | None = None,
    alone: bool = False,
    in_place: bool = False,
    multiprocessors: int = 132,
) -> Callable[[Check], None]:
    """Loss and gradient; ``alone``: the loss once more, where no gradient is wanted."""

    def run(check: Check) -> None:
        torch.manual_seed(0)
        upstream = torch.randn(target.shape) if loss.per_pixel else torch.tensor(-2.5)
        record = launchers.no_record()
        with launches_on(check.session, multiprocessors):
            value, gradient = launchers.bilinear_loss(
                logits, target, weight, loss, geometry, upstream, record, in_place
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
            with launches_on(check.session, multiprocessors):
                value = launchers.bilinear_loss_alone(
                    logits, target, weight, loss, geometry, launchers.no_record()
                )
            check.close("loss alone", value, exact[0], eager[0])

    return run


def spoiled(spoil: Spoil, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The tensors, changed in place."""
    spoil(logits, target)
    return logits, target


def argmax_case(
    logits: Tensor,
    size: tuple[int, int],
    geometry: Geometry = PLAIN,
    dtype: torch.dtype = I64,
    ties: bool = False,
) -> Callable[[Check], None]:
    """Labels of the upsampled logits; ``ties``: equal logits give the lowest class, exactly."""

    def run(check: Check) -> None:
        with launches_on(check.session):
            label = launchers.upsample_argmax_forward(logits, size, *geometry, dtype)
        z = reference.upsample(logits.double(), size, *geometry)
        check.largest("label", label, z, ties)

    return run


def confusion_case(
    logits: Tensor,
    target: Tensor,
    geometry: Geometry = PLAIN,
    counted: bool = False,
    bad: int = 0,
    multiprocessors: int = 132,
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
        with launches_on(check.session, multiprocessors):
            launchers.upsample_confusion_matrix_forward_(
                matrix, logits, target, 255, *geometry, record, invalid
            )
        check.same("matrix", matrix, expected)
        found = record if invalid is None else invalid
        if found[0].item() != bad:
            check.wrong.append(f"{found.tolist()} bad labels instead of {bad}")

    return run


def record_case(layout: str) -> Callable[[Check], None]:
    """The record of operators that ran as PyTorch expressions: the labels of three calls."""

    def run(check: Check) -> None:
        _, target = lay_out(layout, *make(2, 3, *SHAPE))
        H, W = target.shape[1:]
        record = launchers.no_record()
        for position, value, count in (((0, 0, 0), 0, 0), ((1, 6, 7), 9, 2), ((0, 3, 1), -5, 4)):
            target = target.clone(memory_format=torch.preserve_format)
            target[position] = value
            n, y, x = position
            with launches_on(check.session):
                launchers.record_bad_labels(
                    record, target, torch.tensor(count), torch.tensor((n * H + y) * W + x)
                )
        check.same("record", record, torch.tensor([6, 9, 1, 6, 7]))

    return run


def geometry_name(sizes: tuple[int, ...], geometry: Geometry) -> str:
    """How the names of cases tell a geometry."""
    h, w, H, W = sizes
    name = f"{h}x{w} to {H}x{W}"
    return name + (" corners" if geometry[0] else "") + (" scale" if geometry[1] else "")


#: Two images of 3 x 4 samples and cells of 8 x 8 pixels: the shape that most cases share, and with
#: it the compiled kernels.
SHAPE = (3, 4, 24, 32)


def option_cases() -> Iterator[Case]:
    """Reductions, class weights and smoothing; dtypes of logits, labels and class weights."""
    x, y = make(2, 19, *SHAPE)
    weights = torch.linspace(0.5, 1.5, 19)
    quick: dict[str, tuple[int, ...]] = {
        "mean": ARCHS, "mean weight smoothing": ARCHS, "none": ARCHS,
        "sum": (90,),
    }  # fmt: skip
    for reduction, weighted, smoothing in itertools.product(
        ("mean", "sum", "none"), (False, True), (0.0, 0.1)
    ):
        name = f"{reduction}{' weight' * weighted}{' smoothing' * (smoothing > 0)}"
        loss, weight = Loss(255, reduction, smoothing), weights if weighted else None
        archs = quick.get(name, ())
        yield Case(f"loss {name}", loss_case(x, y, loss, weight), archs)
        if reduction != "none":
            alone = loss_case(x, y, loss, weight, alone=True)
            yield Case(f"loss {name} alone", alone, (90,) if name == "mean" else ())
    yield Case("loss over its workspace", loss_case(x, y, in_place=True), (90,))
    half = weights.to(F16)
    for dtype, labels, reduction, archs in (
        (F16, I64, "mean", ()), (F16, U8, "mean", (70, 90)), (F16, I64, "none", ()),
        (BF16, I32, "mean", (80,)), (BF16, I64, "none", ()), (F32, U8, "mean", ()),
        (F32, I32, "none", ()),
    ):  # fmt: skip
        x, y = make(2, 19, *SHAPE, dtype, labels)
        loss = Loss(255, reduction)
        name = f"{SHORT[dtype]} {SHORT[labels]} {reduction}"
        yield Case(f"loss {name}", loss_case(x, y, loss), archs)
        if dtype == F16 and labels == I64:
            yield Case(f"loss {name} fp16 weight", loss_case(x, y, loss, half))
    for C, archs in ((1, (90,)), (2, ()), (3, ()), (21, ()), (150, (90,)), (300, (80,))):
        ignored = 255 if C < 255 else -100
        x, y = make(1, C, 2, 3, 16, 24, ignored=ignored)
        for reduction in ("mean", "none"):
            run = loss_case(x, y, Loss(ignored, reduction))
            yield Case(f"loss {C} classes {reduction}", run, archs if reduction == "mean" else ())


def value_cases() -> Iterator[Case]:
    """Logits and labels that take another path through the same kernels."""
    weights = torch.linspace(0.5, 1.5, 19)
    for spread, archs in ((8.0, ()), (100.0, ARCHS)):
        x, y = make(2, 19, *SHAPE, spread=spread)
        yield Case(f"loss spread {spread:g}", loss_case(x, y), archs)
        run = loss_case(x, y, Loss(smoothing=0.1), weights)
        yield Case(f"loss spread {spread:g} weight smoothing", run, archs)
        yield Case(f"loss spread {spread:g} none", loss_case(x, y, Loss(reduction="none")), archs)
    for value, at, reduction in itertools.product(
        (math.nan, math.inf, -math.inf), ((0, 0), (1, 1)), ("mean", "none")
    ):
        x, y = spoiled(put_logit(1, *at, value), *make(2, 19, *SHAPE))
        quick = at == (1, 1) and (reduction == "mean") == (value != math.inf)
        run = loss_case(x, y, Loss(reduction=reduction))
        yield Case(f"loss logit {value} at {at} {reduction}", run, ARCHS if quick else ())
    for reduction in ("mean", "sum", "none"):
        bad = put_label((1, 6, 7), 2**32 + 3)  # whose lower half is a class
        x, y = spoiled(bad, *make(2, 19, *SHAPE))
        run = loss_case(
            x, y, Loss(reduction=reduction), record_expected=[1, 2**32 + 3, 1, 6, 7]
        )  # fmt: skip
        yield Case(f"loss bad label {reduction}", run, () if reduction == "sum" else ARCHS)
    x, y = spoiled(put_label((...,), 255), *make(2, 19, *SHAPE))
    yield Case("loss all ignored", loss_case(x, y), ARCHS)
    x, y = make(2, 19, *SHAPE, ignored=2)
    yield Case("loss ignored value is a class", loss_case(x, y, Loss(ignore_index=2)), (90,))
    light = torch.where(torch.arange(19) < 18, 0.0, 1.0)
    x, y = make(2, 18, *SHAPE)
    x = torch.cat([x, x[:, :1]], 1)  # no pixel carries the class that weighs something
    yield Case("loss of pixels that weigh nothing", loss_case(x, y, weight=light), (80,))


def geometry_cases() -> Iterator[Case]:
    """Ratios, layouts, and what lies between programs and between bands of cell rows."""
    quick: dict[str, tuple[int, ...]] = {
        "3x4 to 25x31": (70, 90), "9x11 to 4x3": (90,), "2x2 to 35x70": (70,),
        "1x1 to 9x11": (90,),
    }  # fmt: skip
    large: list[tuple[tuple[int, int, int, int], Geometry]] = [
        ((3, 3, 96, 96), PLAIN),
        ((24, 24, 12, 12), PLAIN),
    ]
    for sizes, geometry in [*GEOMETRIES, *large]:
        name = geometry_name(sizes, geometry)
        archs = quick.get(name, ())
        x, y = make(1, 3, *sizes)
        yield Case(f"loss {name}", loss_case(x, y, geometry=geometry), archs)
        run = loss_case(x, y, Loss(reduction="none"), geometry=geometry)
        yield Case(f"loss {name} none", run, ())
        yield Case(f"argmax {name}", argmax_case(x, sizes[2:], geometry), archs[:1])
        archs = (90,) if name == "3x4 to 25x31" else ()
        yield Case(f"confusion matrix {name}", confusion_case(x, y, geometry), archs)
    # Other coordinates in cells of the shape that most cases share.
    x, y = make(2, 19, 4, 5, 25, 33)
    yield Case("loss corners", loss_case(x, y, geometry=CORNERS), ARCHS)
    x, y = make(2, 19, *SHAPE)
    yield Case("loss scale", loss_case(x, y, geometry=(False, 8.001, 8.002)), ARCHS)
    # With one multiprocessor a program walks down several cell rows, as it does in a large batch.
    x, y = make(2, 19, 9, 33, 72, 264)
    yield Case("loss bands", loss_case(x, y, multiprocessors=1), ARCHS)
    run = loss_case(x, y, Loss(reduction="none"), multiprocessors=1)
    yield Case("loss bands none", run, (80,))
    run = confusion_case(x.to(F16), y, multiprocessors=1)
    yield Case("confusion matrix several tiles a program", run, ARCHS)
    x = x.to(F16, memory_format=torch.channels_last)
    yield Case("loss bands channels_last", loss_case(x, y, multiprocessors=1), (90,))
    for layout, archs in zip(LAYOUTS, ((70, 90), (90,), (90,), (70,)), strict=True):
        x, y = lay_out(layout, *make(2, 19, *SHAPE, F16, U8))
        yield Case(f"loss {layout}", loss_case(x, y), archs)
        yield Case(f"loss {layout} none", loss_case(x, y, Loss(reduction="none")))
        yield Case(f"argmax {layout}", argmax_case(x, SHAPE[2:]), archs[:1])
        yield Case(f"confusion matrix {layout}", confusion_case(x, y))


def label_cases() -> Iterator[Case]:
    """Labels and confusion matrices."""
    for C, dtype, labels, archs in (
        (19, F16, I64, ARCHS), (1, F32, I64, ()), (2, F32, I64, ()), (19, F16, U8, (80,)),
        (21, BF16, I32, (90,)), (150, F16, I64, ()), (300, F32, I64, (70,)),
    ):  # fmt: skip
        x, _ = make(2, C, *SHAPE, dtype)
        name = f"argmax {C} classes {SHORT[dtype]} {SHORT[labels]}"
        yield Case(name, argmax_case(x, SHAPE[2:], dtype=labels), archs)
    for value in (math.nan, math.inf, -math.inf):
        x, y = spoiled(put_logit(1, 1, 1, value), *make(2, 19, *SHAPE, F16))
        yield Case(f"argmax logit {value}", argmax_case(x, SHAPE[2:]), ARCHS)
        yield Case(f"confusion matrix logit {value}", confusion_case(x, y))
    x = make(2, 19, *SHAPE, F16)[0].round()
    yield Case("argmax ties", argmax_case(x, SHAPE[2:], ties=True), ARCHS)
    for C in (19, 2, 31, 40, 150):
        on = ARCHS if C == 19 else (70,) if C == 150 else ()
        x, y = make(2, C, *SHAPE, F16)
        yield Case(f"confusion matrix {C} classes", confusion_case(x, y), on)
        x, y = spoiled(put_label((1, 3, 4), 2**32 + 1), x, y.clone())
        yield Case(f"confusion matrix {C} classes bad label", confusion_case(x, y, bad=1), on)
        run = confusion_case(x, y, counted=True, bad=1)
        yield Case(f"confusion matrix {C} classes counted", run, (90,) if C == 19 else ())
    for layout in ("channels_last", "transposed"):
        yield Case(f"record of bad labels {layout}", record_case(layout), ARCHS)
    x, y = make(2, 19, *SHAPE, BF16, U8)
    yield Case("confusion matrix bf16 u8", confusion_case(x, y))


def cases() -> Iterator[Case]:
    """Every case over bilinearly upsampled logits."""
    yield from option_cases()
    yield from value_cases()
    yield from geometry_cases()
    yield from label_cases()
