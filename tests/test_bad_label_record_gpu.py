"""The bad-label record under several streams and graphs on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fcnseg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLASSES = 19
STREAMS, CALLS = 4, 100
Operator = Callable[[Tensor], object]


def _operators() -> dict[str, Operator]:
    """Every way by which an operator adds to the record, as functions of a target [1, 32, 64]."""
    logits = torch.zeros(1, CLASSES, 4, 8, device="cuda")
    double = logits.double()
    prediction = torch.zeros(1, 32, 64, dtype=torch.int64, device="cuda")
    weight = torch.zeros(CLASSES, 1, 16, 16, device="cuda")
    conv = {"stride": 8, "padding": 4, "groups": CLASSES}
    return {
        "confusion matrix": lambda t: fcnseg.confusion_matrix(prediction, t, CLASSES),
        "matrix of logits": lambda t: fcnseg.upsample_confusion_matrix(logits, t),
        "bilinear loss": lambda t: fcnseg.upsample_cross_entropy(logits, t),
        "bilinear loss per pixel": lambda t: fcnseg.upsample_cross_entropy(
            logits, t, reduction="none"
        ),
        "PyTorch expressions": lambda t: fcnseg.upsample_cross_entropy(double, t),
        "transposed convolution": lambda t: fcnseg.conv_transpose_cross_entropy(
            logits, weight, t, **conv
        ),
    }


NAMES = (
    "confusion matrix",
    "matrix of logits",
    "bilinear loss",
    "bilinear loss per pixel",
    "PyTorch expressions",
    "transposed convolution",
)


def _targets() -> list[Tensor]:
    """One per stream, with 2 to 5 bad labels, the first of which tells the stream."""
    targets = []
    for stream in range(STREAMS):
        target = torch.zeros(1, 32, 64, dtype=torch.int64, device="cuda")
        target[0, 3 + stream, 7 : 9 + stream] = 100 + stream
        targets.append(target)
    return targets


@pytest.mark.parametrize("name", NAMES)
def test_streams_lose_no_count(name: str) -> None:
    operator, targets = _operators()[name], _targets()
    for target in targets:  # compiles, and makes the record
        operator(target)
    with pytest.raises(IndexError):
        fcnseg.check_labels()
    fcnseg.check_labels()
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]
    for _ in range(CALLS):
        for stream, target in zip(streams, targets, strict=True):
            with torch.cuda.stream(stream):
                operator(target)
    with pytest.raises(IndexError) as caught:
        fcnseg.check_labels()
    message = str(caught.value)
    assert f"holds {CALLS * sum(range(2, 2 + STREAMS))} values" in message
    places = [f"first is {100 + s} at position (0, {3 + s}, 7)" for s in range(STREAMS)]
    assert sum(place in message for place in places) == 1, message
    fcnseg.check_labels()


def test_replays_on_another_stream_are_counted() -> None:
    operator, target = _operators()["bilinear loss"], _targets()[0]
    operator(target)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operator(target)
    with pytest.raises(IndexError):
        fcnseg.check_labels()
    stream = torch.cuda.Stream()
    for _ in range(CALLS):
        with torch.cuda.stream(stream):
            graph.replay()
        operator(target)
    with pytest.raises(IndexError, match=rf"holds {CALLS * 2 * 2} values"):
        fcnseg.check_labels()
