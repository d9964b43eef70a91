"""The gradient that a scalar loss makes in its forward pass: when it may be overwritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import labels, normal
from torch import Tensor

import fcnseg
from fcnseg import _ops

Loss = Callable[..., Tensor]
TARGET = labels((2, 9, 11), 3, ignore=255)
SMALL = labels((2, 6, 8), 3, ignore=255)
WEIGHT = normal((3, 3, 4, 4))


def upsample(logits: Tensor) -> Tensor:
    return fcnseg.upsample_cross_entropy(logits, TARGET, ignore_index=255)


def conv_transpose(input: Tensor) -> Tensor:
    return fcnseg.conv_transpose_cross_entropy(
        input, WEIGHT.to(input.dtype), SMALL, stride=2, padding=1, ignore_index=255
    )


LOSSES = pytest.mark.parametrize("loss", [upsample, conv_transpose])


def leaf(loss: Loss, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal((2, 3, 4, 5) if loss is upsample else (2, 3, 3, 4), dtype).requires_grad_()


@pytest.fixture
def workspaces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses of the saved gradients that backward passes ask about."""
    seen: list[int] = []
    may_overwrite = _ops._may_overwrite

    def asked(ctx: Any, workspace: Tensor, *others: Tensor) -> bool:
        seen.append(workspace.data_ptr())
        return may_overwrite(ctx, workspace, *others)

    monkeypatch.setattr(_ops, "_may_overwrite", asked)
    return seen


@LOSSES
def test_gradient_takes_the_place_that_is_freed(loss: Loss, workspaces: list[int]) -> None:
    x = leaf(loss)
    value = loss(x)
    kept = [torch.autograd.grad(value * 3, x, retain_graph=True)[0] for _ in range(2)]
    assert all(gradient.data_ptr() not in workspaces for gradient in kept)
    (last,) = torch.autograd.grad(value * 3, x)
    assert last.data_ptr() == workspaces[-1]
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], last)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(value, x)


@LOSSES
def test_another_dtype_is_another_tensor(loss: Loss, workspaces: list[int]) -> None:
    x = leaf(loss, torch.float16)
    (gradient,) = torch.autograd.grad(loss(x) * 65536.0, x)
    assert gradient.dtype == torch.float16 and gradient.data_ptr() != workspaces[-1]


@LOSSES
def test_a_gradient_that_is_accumulated_is_right(loss: Loss) -> None:
    x, y = leaf(loss), leaf(loss)
    for _ in range(2):
        loss(x).backward()
        y.grad = torch.autograd.grad(loss(y), y)[0] + (0 if y.grad is None else y.grad)
    assert torch.equal(x.grad, y.grad)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("retain_graph", [None, False])
def test_a_double_backward_is_refused_whatever_is_retained(
    loss: Loss, dtype: torch.dtype, retain_graph: bool | None
) -> None:
    """A gradient written over its workspace has no node: its penalty would silently be none."""
    x = leaf(loss, dtype)
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True, retain_graph=retain_graph)
    with pytest.raises(RuntimeError, match="is not differentiable twice"):
        (gradient.float().square().sum() + x.float().sum()).backward()


def test_a_workspace_that_somebody_holds_is_not_overwritten() -> None:
    """By the operator's own caller, or by a hook that sees what autograd saves."""
    x, options = leaf(upsample), (None, 255, "mean", 0.0, False, None, None, True)
    loss, sums, _ = torch.ops.fcnseg.upsample_cross_entropy(x, TARGET, *options)
    before = sums.clone()
    torch.autograd.grad(loss * 3, x)
    assert torch.equal(sums, before)
    held: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append((tensor, tensor.clone()))
        return tensor

    for each in (upsample, conv_transpose):
        x = leaf(each)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = each(x)
        torch.autograd.grad(value * 3, x)
    assert len(held) >= 6 and all(torch.equal(*pair) for pair in held)


@LOSSES
@pytest.mark.parametrize("way", ["create_graph", "batched", "hooks", "mode", "compile"])
def test_machinery_between_autograd_and_the_kernels(loss: Loss, way: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return function(*args, **(kwargs or {}))

    x = leaf(loss)
    (expected,) = torch.autograd.grad(loss(x) * 3, x, retain_graph=True)
    if way == "create_graph":
        (gradient,) = torch.autograd.grad(loss(x) * 3, x, create_graph=True)
    elif way == "batched":
        upstream = torch.tensor([3.0, -1.0])
        (both,) = torch.autograd.grad(loss(x), x, upstream, is_grads_batched=True)
        torch.testing.assert_close(both[1], expected / -3)
        gradient = both[0]
    elif way == "hooks":
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
            value = loss(x)
        (gradient,) = torch.autograd.grad(value * 3, x)
    elif way == "mode":
        value = loss(x)
        with Mode():
            (gradient,) = torch.autograd.grad(value * 3, x)
    else:
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        (gradient,) = torch.autograd.grad(compiled(x) * 3, x)
        torch._dynamo.reset()
    assert torch.equal(gradient, expected)
