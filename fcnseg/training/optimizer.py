"""What is optimised and how: parameter groups, frozen batch normalisation, averaged weights."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fcnseg.training.config import TrainConfig


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The trainable parameters with their learning rate and weight decay.

    What lies outside ``model.backbone`` is the head and learns ``config.head_lr`` times as fast (a
    model without a backbone has no head). Vectors (biases, batch normalisation) do not decay unless
    ``config.decay_all``.
    """
    has_head = hasattr(model, "backbone")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            head = has_head and not name.startswith("backbone.")
            decays = config.decay_all or parameter.dim() > 1
            key = (
                config.lr * (config.head_lr if head else 1.0),
                config.weight_decay if decays else 0.0,
            )
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """Fused SGD over :func:`parameter_groups`; its momentum starts at zero, where it stays put."""
    optimizer = torch.optim.SGD(
        parameter_groups(model, config),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )
    if config.momentum:
        # Made by the first step otherwise, but left uninitialised where a GradScaler skips it.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def freeze_batch_norm(model: nn.Module) -> None:
    """Fixes scale and shift of batch normalisation; :func:`train_mode` fixes its statistics."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)


def train_mode(model: nn.Module, *, freeze_bn: bool) -> None:
    """Training mode, in which frozen batch normalisation keeps to its running statistics."""
    model.train()
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def averaging(model: nn.Module, decay: float) -> tuple[nn.Module, Callable[[], None]]:
    """A copy of the model, and the function that moves it to the model's exponential average.

    Equals ``AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)``
    that was updated once before the first step (but the counters of batch normalisation are the
    model's), and keeps no count that lives on the host, so that a CUDA graph can hold the update.
    """
    average = copy.deepcopy(model).requires_grad_(False).eval()
    floats: tuple[list[Tensor], list[Tensor]] = ([], [])
    others: tuple[list[Tensor], list[Tensor]] = ([], [])
    for own, given in zip(
        [*average.parameters(), *average.buffers()],
        [*model.parameters(), *model.buffers()],
        strict=True,
    ):
        pair = floats if own.is_floating_point() else others
        pair[0].append(own)
        pair[1].append(given.detach())
    move = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update() -> None:
        move(*floats, 0)
        if others[0]:  # the counters of batch normalisation
            torch._foreach_copy_(*others)

    return average, update
