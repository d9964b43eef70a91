"""What the dispatcher and torch.compile ask of every operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracles import labels, normal
from torch import Tensor

import fcnseg
from fcnseg import _ops


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(shape, dtype).requires_grad_()


LOGITS = normal((2, 3, 4, 5))
HALF = normal((2, 3, 4, 5), torch.float16).contiguous(memory_format=torch.channels_last)
TARGET = labels((2, 9, 11), 3, torch.uint8, ignore=255)
WEIGHT = torch.tensor([0.5, 1.0, 2.0])
BILINEAR = (False, None, None)
KERNEL, BIAS = normal((3, 2, 3, 4)), normal((2,))
SMALL = labels((2, 6, 8), 2, ignore=255)
GROUPED = labels((2, 6, 8), 6, torch.int32, ignore=255)
UPSTREAM = normal((2, 6, 8))
# stride, padding, output_padding, groups, dilation, crop
CONV = ([2, 2], [1, 0], [0, 1], 1, [1, 1], [1, 0])
CONV_GROUPED = ([2, 2], [1, 0], [0, 1], 3, [1, 1], [0, 1])
ALL, ONE = [True] * 3, [False, True, False]


def matrix() -> Tensor:
    return torch.ones(3, 3, dtype=torch.int64)


# Arguments of every operator behind the dispatcher.
SAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "upsample_cross_entropy": [
        (HALF.clone().requires_grad_(), TARGET, WEIGHT, 255, "mean", 0.1, True, None, None, True),
        (leaf(2, 3, 4, 5), TARGET.int(), None, 255, "none", 0.0, False, 2.3, 2.3, True),
        (LOGITS, TARGET, None, 255, "sum", 0.0, *BILINEAR, False),
    ],
    "upsample_cross_entropy_backward": [
        (normal((2, 9, 11)), HALF, TARGET, WEIGHT, 255, 0.1, *BILINEAR),
    ],
    # as a CPU forward pass leaves them: the gradient itself, and no edges
    "upsample_cross_entropy_gradient": [
        (torch.tensor(3.0), LOGITS, torch.empty(0), HALF, [9, 11], True, 0.1, *BILINEAR),
    ],
    "upsample_cross_entropy_gradient_": [
        (torch.tensor(3.0), LOGITS.clone(), torch.empty(0), [9, 11], True, 0.1, *BILINEAR),
    ],
    "conv_transpose_cross_entropy": [
        (
            *(leaf(2, 3, 4, 5), leaf(3, 2, 3, 4), SMALL, leaf(2), WEIGHT[:2]),
            *(*CONV, 255, "mean", 0.1, ALL),
        ),
        (LOGITS, leaf(3, 2, 3, 4), GROUPED, None, None, *CONV_GROUPED, 255, "sum", 0.0, ONE),
    ],
    "conv_transpose_cross_entropy_backward": [
        (UPSTREAM, LOGITS, KERNEL, SMALL, BIAS, WEIGHT[:2], *CONV, 255, 0.1, ALL),
        (UPSTREAM, LOGITS, KERNEL, GROUPED, None, None, *CONV_GROUPED, 255, 0.0, ONE),
    ],
    "scale_gradient": [(LOGITS, torch.tensor(3.0), HALF)],
    "upsample_argmax": [(HALF, [9, 11], False, 2.3, 2.3, torch.uint8)],
    "conv_transpose_argmax": [(LOGITS, KERNEL, BIAS, [6, 8], *CONV, torch.int32)],
    "confusion_matrix": [(TARGET.clamp(max=2).int(), TARGET, 3, 255)],
    "confusion_matrix_": [
        (matrix(), TARGET.clamp(max=2), TARGET, 255, None),
        (matrix().t(), TARGET.clamp(max=2), TARGET, 255, torch.tensor(0)),
    ],
    "upsample_confusion_matrix": [(LOGITS, TARGET, 255, *BILINEAR)],
    "upsample_confusion_matrix_": [
        (matrix(), HALF, TARGET, 255, True, None, None, torch.tensor(0)),
    ],
}


@pytest.mark.parametrize("name", _ops._SCHEMAS)
def test_opcheck(name: str) -> None:
    for arguments in SAMPLES[name]:
        torch.library.opcheck(getattr(torch.ops.fcnseg, name).default, arguments)


class Recorder:
    """The backend ``aot_eager``, which keeps the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def operators(self) -> list[str]:
        """The names of this library's operators, in the order of the nodes."""
        return [
            str(node.target).split(".")[1]
            for graph in self.graphs
            for node in graph.graph.nodes
            if node.op == "call_function" and str(node.target).startswith("fcnseg.")
        ]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    torch._dynamo.reset()
    yield Recorder()
    torch._dynamo.reset()


def _upsample_none(logits: Tensor) -> Tensor:
    return fcnseg.upsample_cross_entropy(logits, TARGET, ignore_index=255, reduction="none")


def _upsample(logits: Tensor) -> Tensor:
    # The work around the call shows that the operator sits in the middle of one graph.
    return 2 * fcnseg.upsample_cross_entropy(
        logits * 0.5, TARGET, weight=WEIGHT, ignore_index=255, label_smoothing=0.1
    )


def _conv_transpose(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return fcnseg.conv_transpose_cross_entropy(
        input, weight, SMALL, bias, stride=2, padding=(1, 0), output_padding=(0, 1),
        crop=(1, 0), ignore_index=255,
    )  # fmt: skip


def _conv_transpose_argmax(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return fcnseg.conv_transpose_argmax(input, weight, (6, 8), bias, stride=2, padding=(1, 0))


def _confusion_matrix_(logits: Tensor) -> Tensor:
    prediction = (logits[:, 0] > 0).int()
    return fcnseg.confusion_matrix_(matrix(), prediction, torch.ones_like(prediction))


COMPILED: dict[str, tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "upsample_mean": ("upsample_cross_entropy", _upsample, (leaf(2, 3, 4, 5),)),
    "upsample_none": ("upsample_cross_entropy", _upsample_none, (leaf(2, 3, 4, 5),)),
    "conv_transpose": (
        "conv_transpose_cross_entropy",
        _conv_transpose,
        (leaf(2, 3, 4, 5), leaf(3, 2, 3, 4), leaf(2)),
    ),
    "upsample_argmax": (
        "upsample_argmax",
        lambda logits: fcnseg.upsample_argmax(logits, (9, 11), dtype=torch.uint8),
        (leaf(2, 3, 4, 5),),
    ),
    "conv_transpose_argmax": (
        "conv_transpose_argmax",
        _conv_transpose_argmax,
        (LOGITS, KERNEL, BIAS),
    ),
    "confusion_matrix": (
        "confusion_matrix",
        lambda logits: fcnseg.confusion_matrix(logits.argmax(1), logits.argmin(1), 3),
        (LOGITS,),
    ),
    "confusion_matrix_": ("confusion_matrix_", _confusion_matrix_, (LOGITS,)),
    "upsample_confusion_matrix": (
        "upsample_confusion_matrix",
        lambda logits: fcnseg.upsample_confusion_matrix(logits, TARGET, ignore_index=255),
        (LOGITS,),
    ),
    "upsample_confusion_matrix_": (
        "upsample_confusion_matrix_",
        lambda logits: fcnseg.upsample_confusion_matrix_(
            matrix(), logits, TARGET, ignore_index=255
        ),
        (LOGITS,),
    ),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_call_equals_eager_call(case: str, recorder: Recorder) -> None:
    operator, function, arguments = COMPILED[case]
    compiled = torch.compile(function, fullgraph=True, backend=recorder)
    leaves = [tensor for tensor in arguments if tensor.requires_grad]
    results = []
    for call in (function, compiled):
        result = call(*arguments)
        gradients: tuple[Tensor, ...] = ()
        if result.requires_grad:
            gradients = torch.autograd.grad(result.sum() * 3, leaves)
        results.append((result, *gradients))
    for plain, fused in zip(*results, strict=True):
        assert torch.equal(plain, fused)
        assert plain.stride() == fused.stride()
    assert recorder.operators() == [operator]


def test_every_public_operator_is_compiled() -> None:
    assert {operator for operator, _, _ in COMPILED.values()} == set(_ops.implementations())


def test_dynamic_shapes_compile_once(recorder: Recorder) -> None:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return fcnseg.upsample_cross_entropy(logits, target, ignore_index=255)

    compiled = torch.compile(loss, fullgraph=True, backend=recorder, dynamic=True)
    for h, w, height, width in ((4, 5, 9, 11), (6, 3, 20, 8), (3, 7, 17, 31)):
        logits, target = leaf(2, 3, h, w), labels((2, height, width), 3, ignore=255)
        results = []
        for call in (loss, compiled):
            value = call(logits, target)
            results.append((value, *torch.autograd.grad(value, logits)))
        for plain, fused in zip(*results, strict=True):
            assert torch.equal(plain, fused)
    assert recorder.operators() == ["upsample_cross_entropy"]  # one graph for all sizes


def test_frozen_logits_compile_without_a_gradient(recorder: Recorder) -> None:
    compiled = torch.compile(_upsample, fullgraph=True, backend=recorder)
    assert not compiled(LOGITS).requires_grad
    assert torch.equal(compiled(LOGITS), _upsample(LOGITS))
