"""Inference against constructions that hold every full-resolution plane."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import bincount_matrix, labels, normal
from torch import Tensor

from fcnseg import inference, models
from fcnseg.inference import Inference

C = 4
X = normal((2, 3, 35, 46), torch.float64)


class Small(models.FCN):
    """An FCN of one layer: what is tested is what surrounds the trunk."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        super().__init__(18, C, output_stride=8, head="plain", **options)
        self.backbone = torch.nn.Conv2d(3, 512, 9, 8, 4)
        self.double().eval()
        with torch.no_grad():
            self.classifier.weight *= 10  # labels that change from cell to cell
            if self.deconv is not None:
                self.deconv.weight += 0.1 * torch.randn_like(self.deconv.weight)

    def low_resolution(self, x: Tensor, *, aux: bool = True) -> dict[str, Tensor]:
        return {"out": self.classifier(self.backbone(x))}


MODELS = {
    "bilinear": Small(),
    "deconv": Small(upsample="deconv"),
    "full deconv": Small(upsample="deconv", deconv_groups="full"),
}


def starts(length: int, window: int, overlap: float) -> list[int]:
    stride = max(1, round(window * (1 - overlap)))
    found = [0]
    while found[-1] + window < length:
        found.append(min(found[-1] + stride, length - window))
    return found


def naive(
    model: models.FCN,
    x: Tensor,
    size: tuple[int, int],
    *,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    window: tuple[int, int] | None = None,
    overlap: float = 1 / 3,
    blend: str = "gaussian",
    average: str = "probabilities",
    **_: Any,
) -> Tensor:
    """Probabilities [N, C, *size], from every window's logits at every pixel of the result."""
    results = []
    for scale in scales:
        scaled_size = [round(length * scale) for length in x.shape[2:]]
        scaled = F.interpolate(x, scaled_size, mode="bilinear")
        # Where the result's pixels lie in the scaled image, [H, W] each.
        at_y, at_x = torch.meshgrid(
            *(
                (torch.arange(s, dtype=torch.float64) + 0.5) * t / s
                for s, t in zip(size, scaled_size, strict=True)
            ),
            indexing="ij",
        )
        for mirrored in (False, True) if flip else (False,):
            rows, columns = window or scaled_size
            total = torch.zeros(len(x), C, *size, dtype=torch.float64)
            weights = torch.zeros(size, dtype=torch.float64)
            for top in starts(scaled_size[0], rows, overlap):
                for left in starts(scaled_size[1], columns, overlap):
                    picture = scaled.flip(3) if mirrored else scaled
                    missing = top + rows - scaled_size[0], left + columns - scaled_size[1]
                    picture = F.pad(picture, (0, max(0, missing[1]), 0, max(0, missing[0])))
                    picture = picture[:, :, top : top + rows, left : left + columns]
                    z = model.low_resolution(picture)["out"]
                    if model.deconv is not None:
                        z = model.deconv(z)[:, :, :rows, :columns]
                    # Mirrored, pixel x of the image is pixel width - x of what the network saw.
                    u = (scaled_size[1] - at_x if mirrored else at_x) - left
                    v = at_y - top
                    inside = (u >= 0) & (u <= columns) & (v >= 0) & (v <= rows)
                    grid = torch.stack([2 * u / columns - 1, 2 * v / rows - 1], -1)
                    z = F.grid_sample(
                        z, grid.expand(len(x), -1, -1, -1), padding_mode="border",
                        align_corners=False,
                    )  # fmt: skip
                    w = inside.double()
                    if blend == "gaussian":
                        w = w * torch.exp(-32 * ((u / columns - 0.5) ** 2 + (v / rows - 0.5) ** 2))
                    total += w * (z.softmax(1) if average == "probabilities" else z)
                    weights += w
            mean = total / weights
            results.append(mean if average == "probabilities" else mean.softmax(1))
    return torch.stack(results).mean(0)


CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "flip": {"flip": True},
    "scales": {"scales": (0.5, 1.0, 1.75)},
    "scales, flip": {"scales": (0.75, 1.3), "flip": True},
    "window": {"window": (24, 32)},
    "ragged window": {"window": (17, 21), "overlap": 0.4, "batch_size": 4},
    "uniform": {"window": (24, 32), "blend": "uniform", "overlap": 0.5},
    "logits": {"window": (24, 32), "average": "logits"},
    "window larger than the image": {"window": (64, 72)},
    "window larger than the image one way": {"window": (64, 24), "flip": True},
    "everything": {
        "window": (32, 40), "scales": (0.6, 1.5), "flip": True, "batch_size": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "case"),
    [(m, c) for m in ("bilinear", "deconv") for c in CASES] + [("full deconv", "everything")],
)
def test_equals_naive(model: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_BAND", 2 * C * 46 * 10)  # 4 bands of 10 rows or less
    net, options = MODELS[model], CASES[case]
    expected = naive(net, X, (35, 46), **options).detach()
    ours = Inference(**options)
    torch.testing.assert_close(ours.probabilities(net, X), expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(ours.predict(net, X), expected.argmax(1))


@pytest.mark.parametrize("rows", [1, 7])
def test_bands_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Inference(**CASES["everything"])
    expected = ours.predict(MODELS["deconv"], X)  # in one
    monkeypatch.setattr(inference, "_BAND", 2 * C * 46 * rows)
    assert torch.equal(ours.predict(MODELS["deconv"], X), expected)


@pytest.mark.parametrize("model", ["bilinear", "deconv"])
@pytest.mark.parametrize("case", ["whole", "everything"])
@pytest.mark.parametrize("size", [(35, 46), (18, 50)])
def test_confusion_matrix(model: str, case: str, size: tuple[int, int]) -> None:
    net, options = MODELS[model], CASES[case]
    target = labels((2, *size), C, torch.uint8, ignore=255)
    matrix = torch.ones(C, C, dtype=torch.int64)
    Inference(**options).update_confusion_matrix(net, matrix, X, target)
    expected = naive(net, X, size, **options).argmax(1)
    assert torch.equal(matrix - 1, bincount_matrix(expected, target, C, 255))


def test_plain_inference_makes_no_full_resolution_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Inference, "_bands", refuse)
    net, target = MODELS["bilinear"], labels((2, 70, 95), C, torch.uint8, ignore=255)
    matrix = torch.zeros(C, C, dtype=torch.int64)
    assert torch.equal(Inference().predict(net, X), net.predict(X))
    assert Inference().predict(net, X, (20, 30)).shape == (2, 20, 30)
    Inference().update_confusion_matrix(net, matrix, X, target)
    assert int(matrix.sum()) == int((target != 255).sum())


def test_memory_is_bounded_by_bands() -> None:
    # The result of a large batch of bands is made of parts of at most _BAND values.
    x = torch.zeros(1, 3, 128, 160, dtype=torch.float64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dim() == 4 and out.shape[1] == C:
                largest = max(largest, out.numel())
            return out

    with Watch(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "_BAND", 8 * C * 160)
        Inference(window=64, flip=True).predict(MODELS["deconv"], x)
    assert 0 < largest <= 32 * C * 160  # some rows of deconvolution around each band
    assert largest < C * 128 * 160 / 3


def test_network_sees_windows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = MODELS["bilinear"], []
    compute = net.low_resolution

    def keep(x: Tensor, **options: Any) -> dict[str, Tensor]:
        seen.append(tuple(x.shape))
        return compute(x, **options)

    monkeypatch.setattr(net, "low_resolution", keep)
    Inference(window=(24, 32), batch_size=2).predict(net, X)
    # On 35x46, at strides of 16 and 21: rows from 0 and 11, columns from 0 and 14.
    assert seen == [(4, 3, 24, 32)] * 2


def test_half_precision() -> None:
    net, x = Small(), X.float()
    net.float()
    expected = Inference(scales=(1.0, 1.5)).probabilities(net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = Inference(scales=(1.0, 1.5)).probabilities(net, x)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.1)
    torch.testing.assert_close(ours.sum(1), torch.ones(2, 35, 46))


@pytest.mark.parametrize("shape", [(0, 3, 16, 16), (1, 3, 1, 1), (1, 3, 1, 40)])
def test_smallest_images(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.float64)
    for options in ({}, {"flip": True}, {"window": 24}, {"scales": (0.1, 2.0)}):
        result = Inference(**options).predict(MODELS["deconv"], x)
        assert result.shape == (shape[0], *shape[2:])


NET = MODELS["bilinear"]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: Inference(scales=()),
            TypeError,
            r"scales must be a sequence of numbers, got \(\)",
        ),
        (lambda: Inference(scales=1.0), TypeError, "scales must be a sequence of numbers, got 1.0"),
        (lambda: Inference(scales=(1, 0)), ValueError, r"scales must lie in \(0, inf\), got 0"),
        (lambda: Inference(scales=("2",)), TypeError, "scales must be a number, got str"),
        (lambda: Inference(window=0), ValueError, "window must be at least 1, got 0"),
        (lambda: Inference(window=(1, 2, 3)), TypeError, "window must be an int or a pair of ints"),
        (lambda: Inference(overlap=1), ValueError, r"overlap must lie in \[0, 1\), got 1"),
        (lambda: Inference(blend="cubic"), ValueError, "blend must be one of .*, got 'cubic'"),
        (lambda: Inference(average="max"), ValueError, "average must be one of .*, got 'max'"),
        (lambda: Inference(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (
            lambda: Inference().predict(NET, X[0]),
            ValueError,
            r"x must have 4 dimensions \[N, 3, H, W\], got shape \[3, 35, 46\]",
        ),
        (
            lambda: Inference().predict(NET, X[:, :2]),
            ValueError,
            r"x must have shape \[N, 3, H, W\], got \[2, 2, 35, 46\]",
        ),
        (
            lambda: Inference().predict(NET, X.byte()),
            TypeError,
            "x must have dtype .*, got torch.uint8",
        ),
        (lambda: Inference().predict(NET, X, 0), ValueError, "size must be at least 1, got 0"),
        (
            lambda: Inference(flip=True).update_confusion_matrix(
                NET, torch.zeros(C, C).long(), X, torch.zeros(1, 4, 4).byte()
            ),
            ValueError,
            "target must have the batch size of x, 2, got",
        ),
        (
            lambda: Inference(flip=True).update_confusion_matrix(
                NET, torch.zeros(C, C).long(), X, torch.full((2, 4, 4), 9).byte()
            ),
            IndexError,
            "9",
        ),
    ],
)
def test_errors(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_doctests() -> None:
    assert doctest.testmod(inference).failed == 0
