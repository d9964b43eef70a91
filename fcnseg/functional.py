"""The public functions: arguments are checked here, then the dispatcher takes over.

Letters: N batch, C classes, h w low resolution, H W the target's resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fcnseg import _checks, _ops

_Size = int | Sequence[int]


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    scale_factor: float | Sequence[float] | None = None,
) -> Tensor:
    """Cross entropy of bilinearly upsampled logits, in one operator.

    Equal to::

        z = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=align_corners)
        F.cross_entropy(z, target.long(), weight, ignore_index=ignore_index,
                        reduction=reduction, label_smoothing=label_smoothing)

    Args:
        logits: ``[N, C, h, w]``, float16, bfloat16, float32 or float64, any strides.
        target: class indices ``[N, H, W]``, uint8, int32 or int64; its size is the output size.
        weight: class weights ``[C]`` in the logits' dtype or float32; no gradient.
        ignore_index: label of pixels that count for nothing; compared as int64 (with uint8
            targets -100 ignores nothing). It may be a class.
        reduction: ``"mean"`` (over the weights of valid pixels), ``"sum"`` or ``"none"``.
        label_smoothing: share of the uniform distribution in the target, in [0, 1].
        align_corners: as in ``F.interpolate``.
        scale_factor: a number or a pair; sets the coordinate step to ``1 / scale_factor`` as
            ``F.interpolate`` does. ``floor(h * scale_factor)`` must be H. None: the step is
            ``h / H``. Ignored with ``align_corners=True``.

    Returns:
        The loss: a scalar, or ``[N, H, W]`` with 0 at ignored pixels for ``"none"``; float32, or
        float64 for float64 logits. NaN for ``"mean"`` where every pixel is ignored.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        IndexError: (CPU) a label outside [0, C) that is not ``ignore_index``. On CUDA the loss
            and its gradient are NaN instead, and ``fcnseg.check_labels()`` raises.

    Note:
        The gradient of a scalar reduction is computed with the loss, in float32, and scaled in
        the backward pass. There is no double backward.

    Source:
        ``torch.nn.functional.interpolate`` and ``cross_entropy``.

    Examples:
        >>> import torch, fcnseg
        >>> logits = torch.zeros(1, 4, 2, 2, requires_grad=True)
        >>> target = torch.zeros(1, 16, 16, dtype=torch.uint8)
        >>> loss = fcnseg.upsample_cross_entropy(logits, target, ignore_index=255)
        >>> round(loss.item(), 4)  # log 4
        1.3863
        >>> loss.backward()
    """
    _checks.logits("logits", logits)
    _checks.target(target, "logits", logits)
    _checks.class_weight("weight", weight, logits.shape[1], logits)
    _checks.loss_options(ignore_index, reduction, label_smoothing)
    scale_h, scale_w = _checks.scales(
        scale_factor, align_corners, logits.shape[2:], target.shape[1:]
    )
    outputs = torch.ops.fcnseg.upsample_cross_entropy(
        logits,
        target,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        align_corners,
        scale_h,
        scale_w,
        torch.is_grad_enabled() and logits.requires_grad,
    )
    return _ops.loss_alone(*outputs)


def conv_transpose_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    stride: _Size = 1,
    padding: _Size = 0,
    output_padding: _Size = 0,
    groups: int = 1,
    dilation: _Size = 1,
    crop: Sequence[int] = (0, 0),
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of transposed-convolution logits, in one operator.

    Equal to::

        z = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups,
                               dilation)
        z = z[:, :, crop[0] : crop[0] + H, crop[1] : crop[1] + W]
        F.cross_entropy(z, target.long(), class_weight, ignore_index=ignore_index,
                        reduction=reduction, label_smoothing=label_smoothing)

    Args:
        input: ``[N, C_in, h, w]``, float16, bfloat16, float32 or float64, any strides.
        weight: the kernel ``[C_in, C / groups, kH, kW]`` in the input's dtype.
        target: class indices ``[N, H, W]``, uint8, int32 or int64.
        bias: ``[C]`` in the input's dtype.
        stride, padding, output_padding, groups, dilation: as in ``F.conv_transpose2d``.
        crop: first row and column of the output that the target covers.
        class_weight: class weights ``[C]`` in the input's dtype or float32; no gradient.
        ignore_index, reduction, label_smoothing: as in :func:`upsample_cross_entropy`.

    Returns:
        The loss: a scalar, or ``[N, H, W]`` with 0 at ignored pixels for ``"none"``; float32, or
        float64 for float64 input.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value, or the
            target does not fit in the convolution's output.
        IndexError: (CPU) a bad label; see :func:`upsample_cross_entropy`.

    Note:
        Under autocast input, weight and bias are cast as ``F.conv_transpose2d`` casts them.
        Gradients are computed with the loss, each only where it is needed.

    Source:
        ``torch.nn.functional.conv_transpose2d`` and ``cross_entropy``; Long, Shelhamer and
        Darrell, "Fully convolutional networks for semantic segmentation", 2015.

    Examples:
        >>> import torch, fcnseg
        >>> input, weight = torch.zeros(1, 4, 2, 2), torch.ones(4, 1, 4, 4)
        >>> target = torch.zeros(1, 4, 4, dtype=torch.uint8)
        >>> loss = fcnseg.conv_transpose_cross_entropy(
        ...     input, weight, target, stride=2, padding=1, groups=4)
        >>> round(loss.item(), 4)  # log 4
        1.3863
    """
    input, weight, bias = _autocast(input, weight, bias)
    stride, padding, output_padding, dilation, crop = _conv_geometry(
        stride, padding, output_padding, dilation, crop
    )
    _checks.logits("input", input)
    _checks.target(target, "input", input)
    num_classes = _checks.conv_transpose(
        input,
        weight,
        bias,
        target.shape[1:],
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        crop,
    )
    _checks.class_weight("class_weight", class_weight, num_classes, input)
    _checks.loss_options(ignore_index, reduction, label_smoothing)
    grad = torch.is_grad_enabled()
    outputs = torch.ops.fcnseg.conv_transpose_cross_entropy(
        input,
        weight,
        target,
        bias,
        class_weight,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        crop,
        ignore_index,
        reduction,
        label_smoothing,
        [
            grad and input.requires_grad,
            grad and weight.requires_grad,
            grad and bias is not None and bias.requires_grad,
        ],
    )
    return _ops.loss_alone(*outputs)


def upsample_argmax(
    logits: Tensor,
    size: _Size,
    *,
    align_corners: bool = False,
    scale_factor: float | Sequence[float] | None = None,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Labels of bilinearly upsampled logits, in one operator.

    Equal to ``F.interpolate(logits, size, mode="bilinear").argmax(1)`` in float32 arithmetic
    (float64 for float64): the lowest index among ties.

    Args:
        logits: ``[N, C, h, w]``, float16, bfloat16, float32 or float64, any strides.
        size: output size, an int or ``(H, W)``.
        align_corners, scale_factor: as in :func:`upsample_cross_entropy`.
        dtype: of the result: uint8 (at most 256 classes), int32 or int64.

    Returns:
        ``[N, H, W]`` labels in ``dtype``; no gradient.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or value.

    Source:
        ``torch.nn.functional.interpolate``, ``torch.argmax``.

    Examples:
        >>> import torch, fcnseg
        >>> logits = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.5]]]])  # [1, 2, 1, 2]
        >>> fcnseg.upsample_argmax(logits, (1, 4))
        tensor([[[1, 1, 0, 0]]])
    """
    _checks.logits("logits", logits)
    height, width = _checks.pair("size", size, 1)
    _checks.argmax_dtype(dtype, logits.shape[1])
    scale_h, scale_w = _checks.scales(
        scale_factor, align_corners, logits.shape[2:], (height, width)
    )
    return torch.ops.fcnseg.upsample_argmax(
        logits.detach(), [height, width], align_corners, scale_h, scale_w, dtype
    )


def conv_transpose_argmax(
    input: Tensor,
    weight: Tensor,
    size: _Size,
    bias: Tensor | None = None,
    *,
    stride: _Size = 1,
    padding: _Size = 0,
    output_padding: _Size = 0,
    groups: int = 1,
    dilation: _Size = 1,
    crop: Sequence[int] = (0, 0),
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Labels of transposed-convolution logits, in one operator.

    Equal to the argmax over classes of the ``size`` window at ``crop`` of
    ``F.conv_transpose2d(input, weight, bias, ...)`` in float32 arithmetic (float64 for float64).

    Args:
        input, weight, bias, stride, padding, output_padding, groups, dilation, crop: as in
            :func:`conv_transpose_cross_entropy`.
        size: output size, an int or ``(H, W)``; it must fit in the convolution's output.
        dtype: of the result: uint8 (at most 256 classes), int32 or int64.

    Returns:
        ``[N, H, W]`` labels in ``dtype``; no gradient.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or value.

    Source:
        ``torch.nn.functional.conv_transpose2d``, ``torch.argmax``.

    Examples:
        >>> import torch, fcnseg
        >>> input = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.5]]]])  # [1, 2, 1, 2]
        >>> fcnseg.conv_transpose_argmax(input, torch.ones(2, 1, 1, 2), (1, 4), stride=(1, 2),
        ...                              groups=2)
        tensor([[[1, 1, 0, 0]]])
    """
    input, weight, bias = _autocast(input, weight, bias)
    stride, padding, output_padding, dilation, crop = _conv_geometry(
        stride, padding, output_padding, dilation, crop
    )
    size = _checks.pair("size", size, 1)
    num_classes = _checks.conv_transpose(
        input, weight, bias, size, stride, padding, output_padding, groups, dilation, crop
    )
    _checks.argmax_dtype(dtype, num_classes)
    return torch.ops.fcnseg.conv_transpose_argmax(
        input.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        size,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        crop,
        dtype,
    )


def confusion_matrix(
    prediction: Tensor, target: Tensor, num_classes: int, *, ignore_index: int = -100
) -> Tensor:
    """Confusion matrix of two label maps.

    Equal to ``torch.bincount(target[kept] * num_classes + prediction[kept],
    minlength=num_classes**2)`` as a matrix, with ``kept = target != ignore_index``.

    Args:
        prediction: labels of any shape, uint8, int16, int32 or int64.
        target: labels of the same shape, uint8, int16, int32 or int64.
        num_classes: C.
        ignore_index: label of the target's pixels that are not counted.

    Returns:
        int64 ``[C, C]``: rows truth, columns prediction.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        IndexError: (CPU) a counted pixel has a label outside [0, C). On CUDA such pixels are left
            out and counted on the device; ``fcnseg.check_labels()`` raises.

    Source:
        ``torch.bincount``.

    Examples:
        >>> import torch, fcnseg
        >>> fcnseg.confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    _checks.prediction_and_target(prediction, target)
    _checks.num_classes(num_classes)
    _checks.ignored(ignore_index)
    return torch.ops.fcnseg.confusion_matrix(prediction, target, num_classes, ignore_index)


def confusion_matrix_(
    matrix: Tensor, prediction: Tensor, target: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Add the confusion matrix of two label maps to ``matrix``, in place.

    Args:
        matrix: int64 ``[C, C]``, rows truth, columns prediction; it sets the number of classes.
        prediction, target, ignore_index: as in :func:`confusion_matrix`.

    Returns:
        ``matrix``.

    Raises:
        ValueError, TypeError, IndexError: as :func:`confusion_matrix`; ``matrix`` is then as it
            was.

    Note:
        On CUDA a matrix belongs to one stream at a time: two streams that add to it need a
        synchronisation between them, as with any tensor.

    Source:
        ``torch.bincount``.

    Examples:
        >>> import torch, fcnseg
        >>> matrix = torch.zeros(2, 2, dtype=torch.int64)
        >>> fcnseg.confusion_matrix_(matrix, torch.tensor([0, 1]), torch.tensor([0, 0]))
        tensor([[1, 1],
                [0, 0]])
    """
    _checks.prediction_and_target(prediction, target)
    _checks.matrix(matrix, "target", target)
    _checks.ignored(ignore_index)
    torch.ops.fcnseg.confusion_matrix_(matrix, prediction, target, ignore_index, None)
    return matrix


def upsample_confusion_matrix(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    align_corners: bool = False,
    scale_factor: float | Sequence[float] | None = None,
) -> Tensor:
    """Confusion matrix straight from low-resolution logits.

    Equal to ``confusion_matrix(upsample_argmax(logits, target.shape[1:]), target, C)``.

    Args:
        logits: ``[N, C, h, w]``, float16, bfloat16, float32 or float64, any strides.
        target: class indices ``[N, H, W]``, uint8, int32 or int64.
        ignore_index: label of the target's pixels that are not counted.
        align_corners, scale_factor: as in :func:`upsample_cross_entropy`.

    Returns:
        int64 ``[C, C]``: rows truth, columns prediction.

    Raises:
        ValueError, TypeError, IndexError: as :func:`confusion_matrix`.

    Source:
        ``torch.nn.functional.interpolate``, ``torch.argmax``, ``torch.bincount``.

    Examples:
        >>> import torch, fcnseg
        >>> logits = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.5]]]])  # labels 1 1 0 0
        >>> fcnseg.upsample_confusion_matrix(logits, torch.tensor([[[1, 0, 0, 0]]]))
        tensor([[2, 1],
                [0, 1]])
    """
    scale_h, scale_w = _check_streaming(logits, target, ignore_index, align_corners, scale_factor)
    return torch.ops.fcnseg.upsample_confusion_matrix(
        logits.detach(), target, ignore_index, align_corners, scale_h, scale_w
    )


def upsample_confusion_matrix_(
    matrix: Tensor,
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    align_corners: bool = False,
    scale_factor: float | Sequence[float] | None = None,
) -> Tensor:
    """Add the confusion matrix of upsampled logits to ``matrix``, in place.

    Args:
        matrix: int64 ``[C, C]``, rows truth, columns prediction.
        logits, target, ignore_index, align_corners, scale_factor: as in
            :func:`upsample_confusion_matrix`.

    Returns:
        ``matrix``.

    Raises:
        ValueError, TypeError, IndexError: as :func:`confusion_matrix`; ``matrix`` is then as it
            was.

    Note:
        On CUDA a matrix belongs to one stream at a time: two streams that add to it need a
        synchronisation between them, as with any tensor.

    Source:
        ``torch.nn.functional.interpolate``, ``torch.argmax``, ``torch.bincount``.

    Examples:
        >>> import torch, fcnseg
        >>> matrix = torch.zeros(2, 2, dtype=torch.int64)
        >>> logits = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.5]]]])  # labels 1 1 0 0
        >>> target = torch.tensor([[[1, 0, 0, 0]]])
        >>> fcnseg.upsample_confusion_matrix_(matrix, logits, target)
        tensor([[2, 1],
                [0, 1]])
    """
    scale_h, scale_w = _check_streaming(logits, target, ignore_index, align_corners, scale_factor)
    _checks.matrix(matrix, "logits", logits, logits.shape[1])
    torch.ops.fcnseg.upsample_confusion_matrix_(
        matrix, logits.detach(), target, ignore_index, align_corners, scale_h, scale_w, None
    )
    return matrix


def _check_streaming(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    align_corners: bool,
    scale_factor: float | Sequence[float] | None,
) -> tuple[float | None, float | None]:
    _checks.logits("logits", logits)
    _checks.target(target, "logits", logits)
    _checks.ignored(ignore_index)
    return _checks.scales(scale_factor, align_corners, logits.shape[2:], target.shape[1:])


def _conv_geometry(
    stride: _Size, padding: _Size, output_padding: _Size, dilation: _Size, crop: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    return (
        _checks.pair("stride", stride, 1),
        _checks.pair("padding", padding, 0),
        _checks.pair("output_padding", output_padding, 0),
        _checks.pair("dilation", dilation, 1),
        _checks.pair("crop", crop, 0),
    )


def _autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The casts that autocast applies to the operands of ``conv_transpose2d``."""
    if not isinstance(input, Tensor) or not torch.is_autocast_enabled(input.device.type):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(input.device.type)

    def cast(tensor: Tensor) -> Tensor:
        # As autocast: double precision stays. What is no tensor is for the checks to refuse.
        lower = isinstance(tensor, Tensor) and tensor.dtype in _checks.LOGITS_DTYPES[:3]
        return tensor.to(dtype) if lower else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)
