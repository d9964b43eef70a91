"""What is built on the loss per pixel: hard pixels, focal factor, class weights, auxiliary head."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import eager_conv_transpose, eager_loss, labels, normal
from torch import Tensor

import fcnseg
from fcnseg import losses, models
from fcnseg.losses import SegmentationLoss, class_counts, class_weights

C = 5
TARGET = labels((2, 11, 13), C, torch.uint8, ignore=255)
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0], dtype=torch.float64)


def upsampled(target: Tensor = TARGET) -> tuple[list[Tensor], Callable, Callable]:
    """Tensors; the loss per pixel from them, fused; the full-resolution logits from them."""
    return (
        [normal((2, C, 3, 4), torch.float64) * 2],
        lambda z: fcnseg.upsample_cross_entropy(z, target, ignore_index=255, reduction="none"),
        lambda z: F.interpolate(z, target.shape[1:], mode="bilinear", align_corners=False),
    )


def deconvolved(target: Tensor = TARGET) -> tuple[list[Tensor], Callable, Callable]:
    geometry = {"stride": 4, "padding": 2, "groups": C}
    return (
        [normal((2, C, 3, 4), torch.float64) * 2, normal((C, 1, 8, 8), torch.float64, 1)],
        lambda z, k: fcnseg.conv_transpose_cross_entropy(
            z, k, target, ignore_index=255, reduction="none", **geometry
        ),
        lambda z, k: eager_conv_transpose(z, k, target.shape[1:], **geometry),
    )


PROBLEMS = {"upsample": upsampled, "conv_transpose": deconvolved}


def plain(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    gamma: float,
    threshold: float | None,
    min_kept: int,
) -> Tensor:
    """Softmax, boolean indices and sorting, as the papers' codes do it."""
    valid = target != 255
    y = target[valid].long()
    p = z.softmax(1).movedim(1, -1)[valid].gather(1, y[:, None])[:, 0]
    w = torch.ones_like(p) if weight is None else weight[y]
    if threshold is not None:
        limit = p.detach().sort().values[: max(min_kept, 0)]
        kept = p < threshold
        if int(kept.sum()) < min_kept:
            kept = p <= limit.max() if len(limit) else kept
        p, w = p[kept], w[kept]
    return (w * (1 - p) ** gamma * -p.log()).sum() / w.sum()


def values(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(3 * value, leaves)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weight"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(
    ("threshold", "min_kept"), [(None, 0), (0.7, 0), (0.01, 100), (0.01, 10**9)]
)
def test_equals_plain_pytorch(
    problem: str, weight: Tensor | None, gamma: float, threshold: float | None, min_kept: int
) -> None:
    tensors, per_pixel, logits = PROBLEMS[problem]()

    def ours(*tensors: Tensor) -> Tensor:
        return losses.pixel_mean(
            per_pixel(*tensors),
            TARGET,
            weight=weight,
            ignore_index=255,
            focal_gamma=gamma,
            ohem_threshold=threshold,
            ohem_min_kept=min_kept,
        )

    def theirs(*tensors: Tensor) -> Tensor:
        return plain(logits(*tensors), TARGET, weight, gamma, threshold, min_kept)

    assert_equal(values(ours, tensors), values(theirs, tensors))


def test_plain_mean_is_cross_entropy() -> None:
    tensors, per_pixel, _ = upsampled()
    ours = values(
        lambda z: losses.pixel_mean(per_pixel(z), TARGET, weight=WEIGHT, ignore_index=255), tensors
    )
    theirs = values(lambda z: eager_loss(z, TARGET, weight=WEIGHT, ignore_index=255), tensors)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_all_ignored(threshold: float | None, gamma: float) -> None:
    target = torch.full_like(TARGET, 255)
    tensors, per_pixel, _ = upsampled(target)
    value, gradient = values(
        lambda z: losses.pixel_mean(
            per_pixel(z),
            target,
            weight=WEIGHT,
            ignore_index=255,
            focal_gamma=gamma,
            ohem_threshold=threshold,
            ohem_min_kept=7,
        ),
        tensors,
    )
    assert value.isnan() and not gradient.any()


def test_no_more_than_valid_are_kept() -> None:
    # Certain pixels have the ignored pixels' loss, 0, and come before them all the same.
    loss = torch.tensor([0.0, 0.0, 0.0, 3.0, 0.0, 0.1])
    valid = torch.tensor([False, True, False, True, True, True])
    for min_kept, count in ((0, 1), (1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (100, 4)):
        kept = losses.ohem_mask(loss, valid, threshold=0.5, min_kept=min_kept)
        assert int(kept.sum()) == count and not (kept & ~valid).any()
    assert kept.tolist() == valid.tolist()
    assert losses.ohem_mask(loss, valid, threshold=0.01, min_kept=0.5).sum() == 3
    assert losses.ohem_mask(loss[:0], valid[:0]).shape == (0,)


def test_threshold_is_on_the_probability() -> None:
    p = torch.tensor([0.2, 0.69, 0.71, 1.0])
    kept = losses.ohem_mask(-p.log(), torch.ones(4, dtype=torch.bool), threshold=0.7, min_kept=0)
    assert kept.tolist() == [True, True, False, False]


@pytest.mark.parametrize("options", [{}, {"focal_gamma": 0.5}, {"ohem_threshold": 0.7}])
def test_nan_is_not_lost(options: dict[str, float]) -> None:
    loss, target = torch.rand(1, 4, 5), torch.zeros(1, 4, 5, dtype=torch.uint8)
    loss[0, 1, 2] = math.nan  # what a bad label on CUDA leaves
    target[0, 1, 2] = 200
    weight = torch.ones(3)
    assert losses.pixel_mean(loss, target, weight=weight, ignore_index=255, **options).isnan()


def test_focal_gradient() -> None:
    loss = torch.tensor([1e-9, 1e-3, 0.5, 3.0, 40.0], dtype=torch.float64, requires_grad=True)
    for gamma in (0.0, 0.5, 1.0, 2.0, 5.0):
        assert torch.autograd.gradcheck(lambda x, g=gamma: losses.focal(x, g), loss[1:], eps=1e-7)
        assert losses.focal(loss, gamma).isfinite().all()
    zero = torch.zeros(3, requires_grad=True)
    losses.focal(zero, 0.5).sum().backward()
    assert not zero.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_logits_with_scaled_gradient(dtype: torch.dtype) -> None:
    tensors, per_pixel, logits = upsampled()
    z = tensors[0].to(dtype).requires_grad_()
    options = {"ignore_index": 255, "focal_gamma": 2.0, "ohem_threshold": 0.7, "ohem_min_kept": 9}
    loss = losses.pixel_mean(per_pixel(z), TARGET, weight=WEIGHT.float(), **options)
    (gradient,) = torch.autograd.grad(loss * 1024, z)
    value, expected = values(
        lambda z: plain(logits(z), TARGET, WEIGHT, 2.0, 0.7, 9), [z.detach().double()]
    )
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=0)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}[dtype]
    scale = expected.abs().max().item() * 1024 / 3
    torch.testing.assert_close(
        gradient.double(), expected * 1024 / 3, rtol=tolerance, atol=tolerance * scale
    )


def test_compiles_into_one_graph() -> None:
    target = TARGET
    options = {"ignore_index": 255, "focal_gamma": 2.0, "ohem_threshold": 0.7, "ohem_min_kept": 9}

    def function(z: Tensor) -> Tensor:
        per_pixel = fcnseg.upsample_cross_entropy(z, target, ignore_index=255, reduction="none")
        return losses.pixel_mean(per_pixel, target, **options)

    tensors = upsampled()[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(values(compiled, tensors), values(function, tensors))


# -- the criterion of a model ----------------------------------------------------------------------


class Small(models.FCN):
    """The heads and losses of the network, which are tested here, on as little as they need."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        super().__init__(18, C, output_stride=32, head="plain", **options)
        self.backbone = torch.nn.ModuleList(
            [torch.nn.Conv2d(3, 256, 3, 16, 1), torch.nn.Conv2d(256, 512, 3, 2, 1)]
        )
        self.double()

    def low_resolution(self, x: Tensor, *, aux: bool = True) -> dict[str, Tensor]:
        layer3 = self.backbone[0](x)
        logits = {"out": self.classifier(self.backbone[1](layer3))}
        return logits | ({"aux": self.aux_classifier(layer3)} if self.aux_classifier else {})


X = normal((2, 3, 40, 56), torch.float64)
Y = labels((2, 40, 56), C, torch.uint8, ignore=255)


def parameter_gradients(model: models.FCN, loss: Tensor) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize(
    ("gamma", "threshold", "smoothing"), [(0.0, None, 0.1), (2.0, None, 0.0), (0.0, 0.4, 0.0)]
)
@pytest.mark.parametrize("aux", [True, False])
def test_criterion_of_a_model(
    gamma: float, threshold: float | None, smoothing: float, aux: bool
) -> None:
    model = Small(aux_loss=aux, upsample="deconv" if aux else "bilinear")
    criterion = SegmentationLoss(
        WEIGHT.float(),
        aux_weight=0.3,
        label_smoothing=smoothing,
        focal_gamma=gamma,
        ohem_threshold=threshold,
        ohem_min_kept=100,
    )
    ours = parameter_gradients(model, criterion(model, X, Y))
    out = model(X)

    def eager(z: Tensor) -> Tensor:
        if smoothing:
            return F.cross_entropy(z, Y.long(), WEIGHT, ignore_index=255, label_smoothing=smoothing)
        return plain(z, Y, WEIGHT, gamma, threshold, 100)

    theirs = eager(out["out"]) + (0.3 * eager(out["aux"]) if aux else 0)
    for a, b in zip(ours, parameter_gradients(model, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_count_puts_parts_together(gamma: float) -> None:
    model = Small()
    criterion = SegmentationLoss(WEIGHT.float(), focal_gamma=gamma)
    parts = [(X[:1], Y[:1]), (X[1:], Y[1:])]
    counts = [criterion.count(y) for _, y in parts]
    assert counts[0] != counts[1]
    whole = sum(
        criterion(model, *part) * count for part, count in zip(parts, counts, strict=True)
    ) / sum(counts)
    torch.testing.assert_close(whole, criterion(model, X, Y), rtol=1e-6, atol=0)
    assert SegmentationLoss(ohem_threshold=0.7).count is None


def test_criterion_moves_its_weight() -> None:
    criterion = SegmentationLoss(torch.ones(3))
    assert criterion.to(torch.float64).weight.dtype == torch.float64
    assert "weight" not in SegmentationLoss().state_dict()


# -- class weights ---------------------------------------------------------------------------------


def test_class_counts() -> None:
    rng = np.random.default_rng(0)
    maps = [rng.choice([0, 1, 3, 255], (4, 5 + i)).astype(np.uint8) for i in range(3)]
    maps[1][maps[1] == 3] = 0
    counts = class_counts(maps, 4)
    expected = [np.bincount(m[m != 255], minlength=4) for m in maps]
    assert counts.dtype == torch.int64 and counts.tolist() == np.stack(expected).tolist()
    assert class_counts([], 4).shape == (0, 4)
    with pytest.raises(IndexError, match="7"):
        class_counts([np.full((2, 2), 7, np.uint8)], 4)


def test_class_weights_equal_their_formulas() -> None:
    counts = torch.tensor(
        [[3000000000, 20000000, 0, 0, 100000000], [1000000000, 10000000, 0, 500000, 100000000],
         [2000000, 0, 0, 0, 0]]
    )  # fmt: skip
    n = counts.sum(0).double()
    images = counts.sum(1).double()
    around = torch.stack([images[counts[:, c] > 0].sum() for c in range(5)])
    here = n > 0
    p, f = n[here] / n.sum(), n[here] / around[here]
    numpy_median = float(np.median(f.numpy()))
    effective = (1 - (1 - 1e-8)) / (1 - (1 - 1e-8) ** n[here])
    for method, expected in {
        "inverse": (1 / p) / (1 / p).mean(),
        "median": numpy_median / f,
        "effective": effective / effective.mean(),
        "enet": 1 / torch.log(1.02 + p),
    }.items():
        weights = class_weights(counts, method)
        assert weights.dtype == torch.float32 and weights[2] == 0
        torch.testing.assert_close(weights[here].double(), expected, rtol=1e-6, atol=0)
    assert class_weights(counts, "effective", beta=0.0)[here].tolist() == [1.0] * 4
    three = torch.tensor([[6, 3, 1]])
    torch.testing.assert_close(
        class_weights(three, "effective", beta=0.5),
        (lambda w: w / w.mean())(1 / (1 - 0.5 ** torch.tensor([6.0, 3.0, 1.0]))),
    )


# -- errors ----------------------------------------------------------------------------------------

LOSS = torch.zeros(2, 3, 4)
BYTES = torch.zeros(2, 3, 4, dtype=torch.uint8)
VALID = BYTES == 0
COUNTS = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: losses.focal([0.0]), TypeError, "loss must be a tensor, got list"),
        (lambda: losses.focal(LOSS.half()), TypeError, "loss must have dtype .*got torch.float16"),
        (lambda: losses.focal(LOSS, -1), ValueError, r"gamma must lie in \[0, inf\), got -1"),
        (lambda: losses.focal(LOSS, "2"), TypeError, "gamma must be a number, got str"),
        (lambda: losses.focal(LOSS, math.nan), ValueError, "gamma must lie in .* got nan"),
        (
            lambda: losses.ohem_mask(LOSS, BYTES),
            TypeError,
            "valid must have dtype torch.bool, got torch.uint8",
        ),
        (
            lambda: losses.ohem_mask(LOSS, VALID[:1]),
            ValueError,
            r"valid must have the shape of loss, \[2, 3, 4\], got \[1, 3, 4\]",
        ),
        (
            lambda: losses.ohem_mask(LOSS, VALID, threshold=0),
            ValueError,
            r"threshold must lie in \(0, 1\], got 0",
        ),
        (
            lambda: losses.ohem_mask(LOSS, VALID, threshold=1.5),
            ValueError,
            r"threshold must lie in \(0, 1\], got 1.5",
        ),
        (
            lambda: losses.ohem_mask(LOSS, VALID, min_kept=-1),
            ValueError,
            "min_kept must be at least 0, got -1",
        ),
        (
            lambda: losses.ohem_mask(LOSS, VALID, min_kept=1.5),
            ValueError,
            r"min_kept must lie in \[0, 1\], got 1.5",
        ),
        (
            lambda: losses.ohem_mask(LOSS, VALID, min_kept="all"),
            TypeError,
            "min_kept must be an int, got str",
        ),
        (
            lambda: losses.pixel_mean(LOSS, BYTES[0]),
            ValueError,
            r"target must have the shape of loss, \[2, 3, 4\], got \[3, 4\]",
        ),
        (
            lambda: losses.pixel_mean(LOSS, LOSS),
            TypeError,
            "target must have dtype torch.uint8, torch.int32, torch.int64, got torch.float32",
        ),
        (
            lambda: losses.pixel_mean(LOSS, BYTES, weight=torch.ones(2, 2)),
            ValueError,
            "weight must have 1 dimensions",
        ),
        (
            lambda: losses.pixel_mean(LOSS, BYTES, ignore_index=None),
            TypeError,
            "ignore_index must be an int, got NoneType",
        ),
        (
            lambda: SegmentationLoss(label_smoothing=0.1, focal_gamma=2.0),
            ValueError,
            "label_smoothing must be 0 with focal_gamma or ohem_threshold, got 0.1",
        ),
        (
            lambda: SegmentationLoss(label_smoothing=0.1, ohem_threshold=0.7),
            ValueError,
            "label_smoothing must be 0 with",
        ),
        (lambda: SegmentationLoss(aux_weight=-0.4), ValueError, r"aux_weight must lie in \[0, inf"),
        (lambda: SegmentationLoss(ohem_threshold=2), ValueError, r"ohem_threshold must lie in \(0"),
        (lambda: class_counts([BYTES], 0), ValueError, "num_classes must be at least 1, got 0"),
        (lambda: class_weights(COUNTS, "sqrt"), ValueError, "method must be one of .*, got 'sqrt'"),
        (lambda: class_weights(COUNTS, beta=1.0), ValueError, r"beta must lie in \[0, 1\), got 1"),
        (lambda: class_weights(COUNTS, c=1.0), ValueError, r"c must lie in \(1, inf\), got 1"),
        (
            lambda: class_weights(COUNTS[0]),
            ValueError,
            r"counts must have 2 dimensions \[images, C\], got shape \[3\]",
        ),
        (
            lambda: class_weights(COUNTS.float()),
            TypeError,
            "counts must have dtype torch.int64, got torch.float32",
        ),
        (
            lambda: class_weights(0 * COUNTS),
            ValueError,
            "counts must hold at least one pixel, got none",
        ),
    ],
)
def test_errors(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_doctests() -> None:
    assert doctest.testmod(losses).failed == 0
