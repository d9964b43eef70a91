"""Decode heads of mmsegmentation, by their documented interface.

Written against mmsegmentation 1.2: ``BaseDecodeHead.loss_by_feat``, ``mmseg.models.losses``'
``CrossEntropyLoss`` and ``accuracy``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fcnseg import functional


def fuse_decode_head(head: Any) -> Any:
    """Let a decode head of mmsegmentation take its loss from the low-resolution logits.

    Replaces ``head.loss_by_feat`` on this object: the losses and the accuracy that it returns are
    the same, without full-resolution logits.

    Args:
        head: a ``BaseDecodeHead`` whose losses are softmax ``CrossEntropyLoss`` and that has no
            sampler (an auxiliary head is fused by a call of its own).

    Returns:
        ``head``.

    Raises:
        TypeError: the head has no such interface, or one of its losses is another one.
        ValueError: it has a sampler or a single output channel, or a loss asks for what the fused
            operator does not give.
    """
    for name in ("loss_by_feat", "loss_decode", "align_corners", "ignore_index", "out_channels"):
        if not hasattr(head, name):
            raise TypeError(
                f"head: expected a decode head of mmsegmentation, got {type(head).__name__} "
                f"without {name!r}"
            )
    if head.sampler is not None:
        raise ValueError("head: expected sampler=None; a sampler needs full-resolution logits")
    if head.out_channels == 1:
        raise ValueError("head: expected at least 2 output channels, got 1 (a binary loss)")
    for loss in _losses(head):
        _check_loss(loss)

    def loss_by_feat(seg_logits: Tensor, batch_data_samples: Sequence[Any]) -> dict[str, Tensor]:
        samples = [sample.gt_sem_seg.data for sample in batch_data_samples]
        target = torch.stack(samples).squeeze(1)  # [N, H, W]
        found: dict[str, Tensor] = {}
        for loss in _losses(head):
            value = _cross_entropy(head, loss, seg_logits, target)
            previous = found.get(loss.loss_name)
            found[loss.loss_name] = value if previous is None else previous + value
        found["acc_seg"] = _accuracy(head, seg_logits, target)
        return found

    head.loss_by_feat = loss_by_feat
    return head


def predict_labels(head: Any, inputs: Any, size: int | Sequence[int]) -> Tensor:
    """Labels ``[N, *size]`` of a decode head: the argmax of its resized logits, in one operator.

    Args:
        head: a ``BaseDecodeHead``.
        inputs: what its ``forward`` takes.
        size: of the labels, an int or (rows, columns).
    """
    with torch.no_grad():
        return functional.upsample_argmax(head(inputs), size, align_corners=head.align_corners)


def _losses(head: Any) -> Sequence[Any]:
    losses = head.loss_decode
    return list(losses) if isinstance(losses, nn.ModuleList) else [losses]


def _check_loss(loss: Any) -> None:
    if type(loss).__name__ != "CrossEntropyLoss":
        raise TypeError(f"head: expected CrossEntropyLoss, got {type(loss).__name__}")
    if loss.use_sigmoid or loss.use_mask:
        raise ValueError("head: expected use_sigmoid=False and use_mask=False")
    if loss.reduction not in ("mean", "sum"):
        raise ValueError(f"head: expected reduction 'mean' or 'sum', got {loss.reduction!r}")
    if loss.class_weight is not None and not loss.avg_non_ignore:
        raise ValueError(
            "head: expected avg_non_ignore=True beside class_weight (without it the mean counts "
            "weights of ignored labels)"
        )


def _cross_entropy(head: Any, loss: Any, seg_logits: Tensor, target: Tensor) -> Tensor:
    weight = loss.class_weight
    if weight is not None:
        weight = torch.as_tensor(weight, dtype=torch.float32, device=seg_logits.device)
    mean = loss.reduction == "mean"
    value = functional.upsample_cross_entropy(
        seg_logits,
        target,
        weight=weight,
        ignore_index=-100 if head.ignore_index is None else head.ignore_index,
        reduction="sum",
        align_corners=head.align_corners,
    )
    if mean:
        # Without avg_non_ignore over all pixels, ignored ones included; 0 where none counts.
        count: Any = target.numel()
        if loss.avg_non_ignore:
            valid = _valid(head, target)
            # a bad label, whose loss is an error already, must not be an index
            labels = target.clamp(0, head.out_channels - 1)
            count = (valid if weight is None else torch.where(valid, weight[labels], 0.0)).sum()
        value = value / (count + torch.finfo(torch.float32).eps)
    return loss.loss_weight * value


def _valid(head: Any, target: Tensor) -> Tensor:
    """The pixels that count, bool [N, H, W]."""
    if head.ignore_index is None:
        return torch.ones_like(target, dtype=torch.bool)
    return target != head.ignore_index


def _accuracy(head: Any, seg_logits: Tensor, target: Tensor) -> Tensor:
    """Per cent of the valid pixels, shape [1], as ``mmseg.models.losses.accuracy``."""
    labels = functional.upsample_argmax(
        seg_logits, target.shape[1:], align_corners=head.align_corners
    )
    valid = _valid(head, target)
    correct = ((labels == target) & valid).sum()
    epsilon = torch.finfo(torch.float32).eps
    return (correct.float() * (100.0 / (valid.sum() + epsilon)))[None]
