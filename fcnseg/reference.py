"""The operators in plain PyTorch: the oracle of the tests, and what runs where nothing is compiled.

Written for clarity. Each function materialises full-resolution logits; arithmetic is float32 for
half and float32 inputs, float64 for float64. A bad label gives NaN as the contract of CUDA says
(no synchronisation); on the CPU the caller has already raised.

1. z = upsample(logits) or z = conv_transpose2d(input, weight) + bias           [N, C, H, W]
2. log p = z - logsumexp(z)
3. l_i = (1-e) w_y (-log p_y) + (e/C) sum_c w_c (-log p_c)
4. dl_i/dz_c = a_i p_c - (1-e) w_y [c = y] - (e/C) w_c,   a_i = (1-e) w_y + (e/C) sum_c w_c
5. the gradient of the small tensors is the adjoint of 1 applied to 4 times the upstream gradient

Source: torch.nn.functional.cross_entropy, interpolate, conv_transpose2d.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fcnseg import _labels


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the loss: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _cross_entropy(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    grad_output: Tensor | None,
    compute_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss (eq. 3) and, if asked, its gradient with respect to z (eq. 4) [N, C, H, W]."""
    num_classes = z.shape[1]
    bad = _labels.bad_mask(target, num_classes, ignore_index)
    index = target.to(torch.int64)
    valid = (index != ignore_index) & ~bad
    index = torch.where(valid, index, 0)
    w = z.new_ones(num_classes) if weight is None else weight.to(z.dtype)
    zero = z.new_zeros(())
    w_y = torch.where(valid, w[index], zero)  # [N, H, W]
    log_p = F.log_softmax(z, dim=1)
    loss = -(1 - label_smoothing) * w_y * log_p.gather(1, index[:, None])[:, 0]
    if label_smoothing > 0:
        loss = loss - (label_smoothing / num_classes) * (log_p * w[:, None, None]).sum(1)
    loss = torch.where(valid, loss, zero)
    any_bad = bad.any()
    nan = z.new_full((), torch.nan)
    # 0 / 0 where every pixel is ignored or none weighs anything: the mean is NaN, as eager's.
    denominator = w_y.sum(dtype=torch.float64)
    denominator = torch.where(denominator == 0, nan, denominator)
    if reduction == "none":
        loss = torch.where(bad, nan, loss)
    else:
        total = loss.sum(dtype=torch.float64)
        total = total / denominator if reduction == "mean" else total
        loss = torch.where(any_bad, nan, total.to(z.dtype))
    if not compute_grad:
        return loss, None

    scale = z.new_ones(()) if grad_output is None else grad_output.to(z.dtype)
    if reduction == "mean":
        scale = scale / denominator.to(z.dtype)
    # Ignored pixels get the factor 0, not a constant 0: eager's gradient is NaN where the logits
    # of an ignored pixel are NaN.
    scale = torch.where(valid, scale, zero)  # [N, H, W]
    smooth = torch.where(valid, w.sum() * (label_smoothing / num_classes), zero)
    a = (1 - label_smoothing) * w_y + smooth
    if num_classes == 1:
        dz = log_p * (a * scale)[:, None]  # exactly zero, or NaN with z
    else:
        classes = torch.arange(num_classes, device=z.device)[:, None, None]
        constant = (label_smoothing / num_classes) * w[:, None, None]
        hot = torch.where(classes == index[:, None], ((1 - label_smoothing) * w_y)[:, None], zero)
        dz = (log_p.exp() * a[:, None] - hot - constant) * scale[:, None]
    dz = torch.where(bad[:, None] if reduction == "none" else any_bad, nan, dz)
    return loss, dz


def upsample(
    logits: Tensor,
    size: Sequence[int],
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> Tensor:
    """Bilinear upsampling as ``F.interpolate`` does it, in the arithmetic's dtype."""
    logits = logits.to(compute_dtype(logits.dtype))
    if logits.shape[0] == 0:  # aten refuses an empty batch on some devices
        return logits.new_zeros((0, logits.shape[1], *size))
    return torch.ops.aten.upsample_bilinear2d(logits, list(size), align_corners, scale_h, scale_w)


def _upsample_adjoint(
    dz: Tensor,
    shape: Sequence[int],
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> Tensor:
    if dz.shape[0] == 0:
        return dz.new_zeros(tuple(shape))
    return torch.ops.aten.upsample_bilinear2d_backward(
        dz, list(dz.shape[2:]), list(shape), align_corners, scale_h, scale_w
    )


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
    compute_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient [N, C, h, w] of a scalar reduction (else an empty tensor)."""
    compute_grad = compute_grad and reduction != "none"
    z = upsample(logits, target.shape[1:], align_corners, scale_h, scale_w)
    loss, dz = _cross_entropy(
        z, target, weight, ignore_index, reduction, label_smoothing, None, compute_grad
    )
    if dz is None:
        return loss, z.new_empty(0)
    return loss, _upsample_adjoint(dz, logits.shape, align_corners, scale_h, scale_w)


def upsample_cross_entropy_backward(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> Tensor:
    """Gradient of ``reduction="none"`` for any upstream gradient [N, H, W]."""
    z = upsample(logits, target.shape[1:], align_corners, scale_h, scale_w)
    dz = _cross_entropy(
        z, target, weight, ignore_index, "none", label_smoothing, grad_output, True
    )[1]
    assert dz is not None
    return _upsample_adjoint(dz, logits.shape, align_corners, scale_h, scale_w).to(logits.dtype)


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    crop: Sequence[int],
) -> Tensor:
    """The ``size`` window at ``crop`` of ``F.conv_transpose2d``, in the arithmetic's dtype."""
    dtype = compute_dtype(input.dtype)
    with _no_autocast(input):
        z = F.conv_transpose2d(
            input.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            list(stride),
            list(padding),
            list(output_padding),
            groups,
            list(dilation),
        )
    return z[:, :, crop[0] : crop[0] + size[0], crop[1] : crop[1] + size[1]]


def _conv_transpose_adjoint(
    dz: Tensor,
    input: Tensor,
    weight: Tensor,
    full_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    crop: Sequence[int],
    compute_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; an empty tensor for each one not wanted."""
    dtype = dz.dtype
    bottom = full_size[0] - crop[0] - dz.shape[2]
    right = full_size[1] - crop[1] - dz.shape[3]
    dz = F.pad(dz, (crop[1], right, crop[0], bottom))
    with _no_autocast(input):
        gradients = torch.ops.aten.convolution_backward(
            dz,
            input.to(dtype),
            weight.to(dtype),
            [dz.shape[1]],
            list(stride),
            list(padding),
            list(dilation),
            True,
            list(output_padding),
            groups,
            list(compute_grad),
        )
    # An empty tensor each: an operator's outputs may not alias.
    first, second, third = (
        gradient if wanted else dz.new_empty(0)
        for gradient, wanted in zip(gradients, compute_grad, strict=True)
    )
    return first, second, third


def _full_size(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    return [
        (input.shape[2 + i] - 1) * stride[i]
        - 2 * padding[i]
        + dilation[i] * (weight.shape[2 + i] - 1)
        + output_padding[i]
        + 1
        for i in range(2)
    ]


def conv_transpose_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    crop: Sequence[int],
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    compute_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, and the gradients of input, weight and bias of a scalar reduction."""
    wanted = any(compute_grad) and reduction != "none"
    geometry = (stride, padding, output_padding, groups, dilation, crop)
    z = conv_transpose(input, weight, bias, target.shape[1:], *geometry)
    loss, dz = _cross_entropy(
        z, target, class_weight, ignore_index, reduction, label_smoothing, None, wanted
    )
    if dz is None:
        return loss, z.new_empty(0), z.new_empty(0), z.new_empty(0)
    full_size = _full_size(input, weight, stride, padding, output_padding, dilation)
    return loss, *_conv_transpose_adjoint(dz, input, weight, full_size, *geometry, compute_grad)


def conv_transpose_cross_entropy_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    crop: Sequence[int],
    ignore_index: int,
    label_smoothing: float,
    compute_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``reduction="none"`` for any upstream gradient [N, H, W]."""
    geometry = (stride, padding, output_padding, groups, dilation, crop)
    z = conv_transpose(input, weight, bias, target.shape[1:], *geometry)
    dz = _cross_entropy(
        z, target, class_weight, ignore_index, "none", label_smoothing, grad_output, True
    )[1]
    assert dz is not None
    full_size = _full_size(input, weight, stride, padding, output_padding, dilation)
    gradients = _conv_transpose_adjoint(dz, input, weight, full_size, *geometry, compute_grad)
    first, second, third = (
        gradient.to(tensor.dtype)
        for gradient, tensor in zip(
            gradients, (input, weight, input if bias is None else bias), strict=True
        )
    )
    return first, second, third


def upsample_argmax(
    logits: Tensor,
    size: Sequence[int],
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Labels [N, H, W]: the lowest index among ties."""
    return upsample(logits, size, align_corners, scale_h, scale_w).argmax(1).to(dtype)


def conv_transpose_argmax(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    crop: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Labels [N, H, W]: the lowest index among ties."""
    geometry = (stride, padding, output_padding, groups, dilation, crop)
    return conv_transpose(input, weight, bias, size, *geometry).argmax(1).to(dtype)


def confusion_matrix_(
    matrix: Tensor, prediction: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Add the counts to ``matrix``; returns the masks of bad predictions and of bad targets."""
    num_classes = matrix.shape[0]
    kept = target.to(torch.int64) != ignore_index
    bad_target = _labels.bad_mask(target, num_classes, ignore_index)
    bad_prediction = _labels.bad_mask(prediction, num_classes, None) & kept & ~bad_target
    valid = kept & ~bad_target & ~bad_prediction
    # Invalid pixels go to a bin of their own: no boolean indexing, which would synchronise.
    bins = target.to(torch.int64) * num_classes + prediction.to(torch.int64)
    bins = torch.where(valid, bins, num_classes * num_classes).flatten()
    counts = bins.new_zeros(num_classes * num_classes + 1)
    counts.scatter_add_(0, bins, torch.ones_like(bins))
    matrix.add_(counts[:-1].view(num_classes, num_classes))
    return bad_prediction, bad_target
