"""Registration: schemas, implementations per device, fake kernels, autograd.

The dispatcher chooses the implementation. CPU tensors run the compiled operator of the namespace
``fcnseg_cpu`` where there is one; CUDA tensors run that of ``fcnseg_cuda`` or the Triton kernels of
``fcnseg.kernels``, imported at the first such call; everything else runs ``reference.py``. A CPU
implementation raises IndexError for a bad label before anything is written; a CUDA implementation
records it on the device (``_labels.py``).

A loss returns itself and its saved gradients: workspaces in the arithmetic's dtype that the forward
pass of a scalar reduction makes when ``compute_grad`` says that a gradient will be wanted (a
compiled graph cannot see that). One operator turns them and the upstream gradient into the gradient
in its tensor's dtype, rounded once: ``upsample_cross_entropy_gradient``, or ``scale_gradient`` for
the transposed convolution. Where autograd is about to free a workspace of that very dtype, the
gradient takes its place (``_may_overwrite``). ``reduction="none"`` has no workspaces: its backward
runs the operator again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fcnseg import _extension, _labels, reference
from fcnseg._extension import HAS_TRITON
from fcnseg.reference import compute_dtype

_LOSS = "int ignore_index, str reduction, float label_smoothing"
_BILINEAR = "bool align_corners, float? scale_h, float? scale_w"
# What the bilinear loss keeps for its gradient, and the options that its layout depends on.
_WORKSPACES = "Tensor grad_output, Tensor sums, Tensor edges"
_WORKSPACES_IN_PLACE = "Tensor grad_output, Tensor(a!) sums, Tensor edges"
_SCALED = f"SymInt[2] size, bool weighted, float label_smoothing, {_BILINEAR}"
_CONV = (
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] output_padding, SymInt groups, "
    "SymInt[2] dilation, SymInt[2] crop"
)

_SCHEMAS = {
    "upsample_cross_entropy": (
        f"(Tensor logits, Tensor target, Tensor? weight, {_LOSS}, {_BILINEAR}, bool compute_grad)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "upsample_cross_entropy_gradient": f"({_WORKSPACES}, Tensor like, {_SCALED}) -> Tensor",
    "upsample_cross_entropy_gradient_": f"({_WORKSPACES_IN_PLACE}, {_SCALED}) -> ()",
    "upsample_cross_entropy_backward": (
        "(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
        f"float label_smoothing, {_BILINEAR}) -> Tensor"
    ),
    "conv_transpose_cross_entropy": (
        "(Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, "
        f"{_CONV}, {_LOSS}, bool[3] compute_grad) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "conv_transpose_cross_entropy_backward": (
        "(Tensor grad_output, Tensor input, Tensor weight, Tensor target, Tensor? bias, "
        f"Tensor? class_weight, {_CONV}, int ignore_index, float label_smoothing, "
        "bool[3] compute_grad) -> (Tensor, Tensor, Tensor)"
    ),
    "scale_gradient": "(Tensor gradient, Tensor scale, Tensor like) -> Tensor",
    "upsample_argmax": f"(Tensor logits, SymInt[2] size, {_BILINEAR}, ScalarType dtype) -> Tensor",
    "conv_transpose_argmax": (
        "(Tensor input, Tensor weight, Tensor? bias, SymInt[2] size, "
        f"{_CONV}, ScalarType dtype) -> Tensor"
    ),
    "confusion_matrix": (
        "(Tensor prediction, Tensor target, SymInt num_classes, int ignore_index) -> Tensor"
    ),
    "confusion_matrix_": (
        "(Tensor(a!) matrix, Tensor prediction, Tensor target, int ignore_index, "
        "Tensor(b!)? invalid) -> ()"
    ),
    "upsample_confusion_matrix": (
        f"(Tensor logits, Tensor target, int ignore_index, {_BILINEAR}) -> Tensor"
    ),
    "upsample_confusion_matrix_": (
        f"(Tensor(a!) matrix, Tensor logits, Tensor target, int ignore_index, {_BILINEAR}, "
        "Tensor(b!)? invalid) -> ()"
    ),
}

_library = torch.library.Library("fcnseg", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

_implementations: dict[str, dict[str, str]] = {}


def implementations() -> dict[str, dict[str, str]]:
    """What runs behind each operator, per device: "c++", "cuda", "triton" or "reference"."""
    return {name: dict(kinds) for name, kinds in _implementations.items()}


def _register(
    name: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    compiled: Callable[..., Any] | None = None,
    cuda_kind: str = "reference",
) -> None:
    """Register ``compiled`` for CPU tensors where the extension is loaded, else ``cpu``."""
    use_compiled = compiled is not None and _extension.missing is None
    _library.impl(name, compiled if use_compiled else cpu, "CPU")
    if "backward" not in name and "gradient" not in name:
        kind = "c++" if use_compiled else "reference"
        _implementations[name] = {"cpu": kind, "cuda": cuda_kind}
        if cuda_kind == "reference":
            cuda = _extension.warns_of_reference_on_cuda(cuda)
    _library.impl(name, cuda, "CUDA")


_triton_kind = "triton" if HAS_TRITON else "reference"


def _use_triton(logits: Tensor, size: Sequence[int]) -> bool:
    """The kernels take every case but float64; their float32 coordinates are exact below 2^22."""
    return HAS_TRITON and logits.dtype != torch.float64 and max(*logits.shape[2:], *size) < 2**22


def _use_triton_conv(
    input: Tensor, weight: Tensor, size: Sequence[int], conv: Sequence[Any]
) -> bool:
    """The kernels take every case but float64; their coordinates and phases are int32."""
    stride, padding, _, _, dilation, crop = conv
    reach = (
        n * s + d * k
        for n, s, d, k in zip(input.shape[2:], stride, dilation, weight.shape[2:], strict=True)
    )
    fits = max(*reach, *size, *padding, *crop) < 2**29 and max(*stride, *dilation) < 2**15
    return HAS_TRITON and input.dtype != torch.float64 and fits


def _with_strides_of(gradient: Tensor, tensor: Tensor) -> Tensor:
    """``gradient`` laid out as ``tensor`` (as the fake kernels promise); a copy only if needed."""
    if gradient.numel() == 0:
        return gradient
    out = torch.empty_like(tensor, dtype=gradient.dtype)
    return gradient if out.stride() == gradient.stride() else out.copy_(gradient)


# --- losses ---------------------------------------------------------------------------------------


def _upsample_cross_entropy(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, gradient = reference.upsample_cross_entropy(logits, *args)
    return loss, _with_strides_of(gradient, logits), gradient.new_empty(0)


def _upsample_cross_entropy_cpu(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    bad = _labels.bad_mask(target, logits.shape[1], ignore_index)
    _labels.raise_if_bad("target", target, bad, logits.shape[1])
    return _upsample_cross_entropy(logits, target, weight, ignore_index, *args)


def _upsample_cross_entropy_cuda(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if _use_triton(logits, target.shape[1:]):
        from fcnseg.kernels.upsample_cross_entropy import upsample_cross_entropy_forward

        record = _labels.device_record(logits.device)
        result = upsample_cross_entropy_forward(logits, target, weight, ignore_index, *args, record)
        _labels.check_now(logits.device)
        return result
    result = _upsample_cross_entropy(logits, target, weight, ignore_index, *args)
    _record_bad_labels(target, _labels.bad_mask(target, logits.shape[1], ignore_index))
    return result


def _upsample_cross_entropy_compiled(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, gradient, bad_label = torch.ops.fcnseg_cpu.upsample_cross_entropy(logits, *args)
    _raise_reported("target", bad_label, logits.shape[1])
    return loss, _with_strides_of(gradient, logits), gradient.new_empty(0)


def _upsample_cross_entropy_gradient(
    grad_output: Tensor, sums: Tensor, edges: Tensor, like: Tensor, *args: Any
) -> Tensor:
    return _scale_gradient(sums, grad_output, like)


def _upsample_cross_entropy_gradient_(
    grad_output: Tensor, sums: Tensor, edges: Tensor, *args: Any
) -> None:
    sums.mul_(grad_output)


def _upsample_cross_entropy_gradient_cuda(
    grad_output: Tensor,
    sums: Tensor,
    edges: Tensor,
    like: Tensor,
    size: Sequence[int],
    *args: Any,
) -> Tensor:
    if not _use_triton(like, size):
        return _upsample_cross_entropy_gradient(grad_output, sums, edges, like)
    from fcnseg.kernels.upsample_cross_entropy import upsample_cross_entropy_gradient

    gradient = torch.empty_like(sums, dtype=like.dtype)
    upsample_cross_entropy_gradient(grad_output, sums, edges, gradient, tuple(size), *args)
    return gradient


def _upsample_cross_entropy_gradient_cuda_(
    grad_output: Tensor, sums: Tensor, edges: Tensor, size: Sequence[int], *args: Any
) -> None:
    if not _use_triton(sums, size):
        return _upsample_cross_entropy_gradient_(grad_output, sums, edges)
    from fcnseg.kernels.upsample_cross_entropy import upsample_cross_entropy_gradient

    upsample_cross_entropy_gradient(grad_output, sums, edges, sums, tuple(size), *args)
    return None


def _upsample_cross_entropy_backward_compiled(
    grad_output: Tensor, logits: Tensor, *args: Any
) -> Tensor:
    gradient = torch.ops.fcnseg_cpu.upsample_cross_entropy_backward(grad_output, logits, *args)
    return _with_strides_of(gradient, logits)


def _raise_reported(name: str, bad_label: Tensor, num_classes: int) -> None:
    """IndexError where a compiled operator's report (count, value, n, y, x) counts bad labels."""
    count, value, *position = bad_label.tolist()
    if count:
        raise IndexError(_labels.error_message(name, count, value, position, num_classes))


def _upsample_cross_entropy_backward(grad_output: Tensor, logits: Tensor, *args: Any) -> Tensor:
    gradient = reference.upsample_cross_entropy_backward(grad_output, logits, *args)
    return _with_strides_of(gradient, logits)


def _upsample_cross_entropy_backward_cuda(
    grad_output: Tensor, logits: Tensor, target: Tensor, *args: Any
) -> Tensor:
    if not _use_triton(logits, target.shape[1:]):
        return _upsample_cross_entropy_backward(grad_output, logits, target, *args)
    from fcnseg.kernels.upsample_cross_entropy import upsample_cross_entropy_backward

    record = _labels.device_record(logits.device)
    return upsample_cross_entropy_backward(grad_output, logits, target, *args, record)


def _conv_transpose_cross_entropy(
    input: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, grad_input, grad_weight, grad_bias = reference.conv_transpose_cross_entropy(
        input, weight, *args
    )
    return (
        loss,
        _with_strides_of(grad_input, input),
        _with_strides_of(grad_weight, weight),
        grad_bias,
    )


def _conv_classes(weight: Tensor, conv: Sequence[Any]) -> int:
    groups = conv[3]
    return weight.shape[1] * groups


def _conv_transpose_cross_entropy_cpu(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_classes, ignore_index = _conv_classes(weight, args[:6]), args[6]
    bad = _labels.bad_mask(target, num_classes, ignore_index)
    _labels.raise_if_bad("target", target, bad, num_classes)
    return _conv_transpose_cross_entropy(input, weight, target, bias, class_weight, *args)


def _conv_transpose_cross_entropy_cuda(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _use_triton_conv(input, weight, target.shape[1:], args[:6]):
        from fcnseg.kernels.conv_transpose_cross_entropy import (
            conv_transpose_cross_entropy_forward,
        )

        record = _labels.device_record(input.device)
        result = conv_transpose_cross_entropy_forward(
            input, weight, target, bias, class_weight, *args, record
        )
        _labels.check_now(input.device)
        return result
    result = _conv_transpose_cross_entropy(input, weight, target, bias, class_weight, *args)
    num_classes, ignore_index = _conv_classes(weight, args[:6]), args[6]
    _record_bad_labels(target, _labels.bad_mask(target, num_classes, ignore_index))
    return result


def _conv_transpose_cross_entropy_compiled(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, grad_input, grad_weight, grad_bias, bad_label = (
        torch.ops.fcnseg_cpu.conv_transpose_cross_entropy(
            input, weight, target, bias, class_weight, stride, padding, groups, *args
        )
    )
    _raise_reported("target", bad_label, weight.shape[1] * groups)
    return (
        loss,
        _with_strides_of(grad_input, input),
        _with_strides_of(grad_weight, weight),
        grad_bias,
    )


def _conv_transpose_cross_entropy_backward_compiled(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input, grad_weight, grad_bias = torch.ops.fcnseg_cpu.conv_transpose_cross_entropy_backward(
        grad_output, input, weight, target, bias, class_weight, stride, padding, *args
    )
    return _with_strides_of(grad_input, input), _with_strides_of(grad_weight, weight), grad_bias


def _conv_transpose_cross_entropy_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input, grad_weight, grad_bias = reference.conv_transpose_cross_entropy_backward(
        grad_output, input, weight, *args
    )
    return _with_strides_of(grad_input, input), _with_strides_of(grad_weight, weight), grad_bias


def _conv_transpose_cross_entropy_backward_cuda(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    operands = (grad_output, input, weight, target, bias, class_weight)
    if not _use_triton_conv(input, weight, target.shape[1:], args[:6]):
        return _conv_transpose_cross_entropy_backward(*operands, *args)
    from fcnseg.kernels.conv_transpose_cross_entropy import conv_transpose_cross_entropy_backward

    return conv_transpose_cross_entropy_backward(*operands, *args)


def _scale_gradient(gradient: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    # Multiplied in the gradient's dtype and rounded once, to the dtype of `like`: the tensor that
    # the gradient is of. It also ties a double backward to that tensor, so that it can raise.
    # As an output that dtype needs no wider product in memory on CUDA.
    scaled = torch.empty_like(gradient, dtype=like.dtype)
    return torch.mul(gradient, scale.to(gradient.dtype), out=scaled)


def _record_bad_labels(labels: Tensor, bad: Tensor) -> None:
    _labels.add_to_record(_labels.device_record(labels.device), labels, bad)
    _labels.check_now(labels.device)


_register(
    "upsample_cross_entropy",
    compiled=_upsample_cross_entropy_compiled,
    cpu=_upsample_cross_entropy_cpu,
    cuda=_upsample_cross_entropy_cuda,
    cuda_kind=_triton_kind,
)
_register(
    "upsample_cross_entropy_backward",
    compiled=_upsample_cross_entropy_backward_compiled,
    cpu=_upsample_cross_entropy_backward,
    cuda=_upsample_cross_entropy_backward_cuda,
)
_register(
    "upsample_cross_entropy_gradient",
    cpu=_upsample_cross_entropy_gradient,
    cuda=_upsample_cross_entropy_gradient_cuda,
)
_register(
    "upsample_cross_entropy_gradient_",
    cpu=_upsample_cross_entropy_gradient_,
    cuda=_upsample_cross_entropy_gradient_cuda_,
)
_register(
    "conv_transpose_cross_entropy",
    compiled=_conv_transpose_cross_entropy_compiled,
    cpu=_conv_transpose_cross_entropy_cpu,
    cuda=_conv_transpose_cross_entropy_cuda,
    cuda_kind=_triton_kind,
)
_register(
    "conv_transpose_cross_entropy_backward",
    compiled=_conv_transpose_cross_entropy_backward_compiled,
    cpu=_conv_transpose_cross_entropy_backward,
    cuda=_conv_transpose_cross_entropy_backward_cuda,
)
_register("scale_gradient", cpu=_scale_gradient, cuda=_scale_gradient)


# --- argmax ---------------------------------------------------------------------------------------


def _upsample_argmax(*args: Any) -> Tensor:
    return reference.upsample_argmax(*args).contiguous()


def _upsample_argmax_cuda(logits: Tensor, size: Sequence[int], *args: Any) -> Tensor:
    if not _use_triton(logits, size):
        return _upsample_argmax(logits, size, *args)
    from fcnseg.kernels.upsample_argmax import upsample_argmax_forward

    return upsample_argmax_forward(logits, size, *args)


def _conv_transpose_argmax(*args: Any) -> Tensor:
    return reference.conv_transpose_argmax(*args).contiguous()


def _conv_transpose_argmax_cuda(
    input: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int], *args: Any
) -> Tensor:
    if not _use_triton_conv(input, weight, size, args[:6]):
        return _conv_transpose_argmax(input, weight, bias, size, *args)
    from fcnseg.kernels.conv_transpose_argmax import conv_transpose_argmax_forward

    return conv_transpose_argmax_forward(input, weight, bias, size, *args)


def _upsample_argmax_compiled(
    logits: Tensor,
    size: Sequence[int],
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
    dtype: torch.dtype,
) -> Tensor:
    labels = torch.ops.fcnseg_cpu.upsample_argmax(
        logits, *size, align_corners, scale_h, scale_w, dtype == torch.uint8
    )
    return labels.to(dtype)


def _conv_transpose_argmax_compiled(
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
    labels = torch.ops.fcnseg_cpu.conv_transpose_argmax(
        input, weight, bias, *size, stride, padding, groups, dilation, crop, dtype == torch.uint8
    )
    return labels.to(dtype)


_register(
    "upsample_argmax",
    compiled=_upsample_argmax_compiled,
    cpu=_upsample_argmax,
    cuda=_upsample_argmax_cuda,
    cuda_kind=_triton_kind,
)
_register(
    "conv_transpose_argmax",
    compiled=_conv_transpose_argmax_compiled,
    cpu=_conv_transpose_argmax,
    cuda=_conv_transpose_argmax_cuda,
    cuda_kind=_triton_kind,
)


# --- confusion matrices ---------------------------------------------------------------------------


def _in_memory_order(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both permuted alike so that neither needs a copy, where their layouts allow that.

    A count does not depend on the order of the pixels, only on the pairs.
    """
    if not (prediction.is_contiguous() and target.is_contiguous()):
        order = sorted(range(target.dim()), key=target.stride, reverse=True)
        permuted = prediction.permute(order), target.permute(order)
        if all(labels.is_contiguous() for labels in permuted):
            return permuted
    return prediction, target


def _confusion_matrix_compiled(
    matrix: Tensor,
    prediction: Tensor,
    target: Tensor,
    ignore_index: int,
    invalid: Tensor | None = None,
) -> None:
    counts = matrix if matrix.is_contiguous() else matrix.new_zeros(matrix.shape)
    count_into = torch.ops.fcnseg_cpu.confusion_matrix_
    report = count_into(counts, *_in_memory_order(prediction, target), ignore_index)
    if report[0]:
        # Nothing was written. Count in the order of the indices, to name the first bad one.
        report = count_into(counts, prediction, target, ignore_index)
        count, flat, value, in_prediction = report.tolist()
        name = "prediction" if in_prediction else "target"
        position = _labels.unravel(flat, target.shape)
        raise IndexError(_labels.error_message(name, count, value, position, matrix.shape[0]))
    if counts is not matrix:
        matrix.add_(counts)


def _confusion_matrix_cpu(
    matrix: Tensor,
    prediction: Tensor,
    target: Tensor,
    ignore_index: int,
    invalid: Tensor | None = None,
) -> None:
    counts = torch.zeros_like(matrix)
    bad_prediction, bad_target = reference.confusion_matrix_(
        counts, prediction, target, ignore_index
    )
    _labels.raise_if_bad("target", target, bad_target, matrix.shape[0])
    _labels.raise_if_bad("prediction", prediction, bad_prediction, matrix.shape[0])
    matrix.add_(counts)


def _confusion_matrix_compiled_cuda(
    matrix: Tensor,
    prediction: Tensor,
    target: Tensor,
    ignore_index: int,
    invalid: Tensor | None = None,
) -> None:
    counts = matrix if matrix.is_contiguous() else torch.zeros_like(matrix).contiguous()
    count_into = torch.ops.fcnseg_cuda.confusion_matrix_
    if invalid is not None:
        count_into(counts, *_in_memory_order(prediction, target), ignore_index, invalid)
    else:
        # In the order of the indices: the record names the first bad one.
        prediction, target = prediction.contiguous(), target.contiguous()
        counters = counts.new_zeros(3)  # invalid, ignored, where
        count_into(counts, prediction, target, ignore_index, counters)
        record = _labels.device_record(counts.device)
        torch.ops.fcnseg_cuda.record_invalid_(record, counters, prediction, target, matrix.shape[0])
        _labels.check_now(counts.device)
    if counts is not matrix:
        matrix.add_(counts)


def _confusion_matrix_reference_cuda(
    matrix: Tensor,
    prediction: Tensor,
    target: Tensor,
    ignore_index: int,
    invalid: Tensor | None = None,
) -> None:
    bad_prediction, bad_target = reference.confusion_matrix_(
        matrix, prediction, target, ignore_index
    )
    bad = bad_prediction | bad_target
    if invalid is None:
        labels = torch.where(bad_target, target.to(torch.int64), prediction.to(torch.int64))
        _record_bad_labels(labels, bad)
    else:
        invalid.add_(bad.sum())


def _from_zeros(update: Callable[..., None]) -> Callable[..., Tensor]:
    """``confusion_matrix`` in terms of ``confusion_matrix_``."""

    def confusion_matrix(
        prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int
    ) -> Tensor:
        matrix = _confusion_matrix_fake(prediction, target, num_classes, ignore_index).zero_()
        update(matrix, prediction, target, ignore_index)
        return matrix

    return confusion_matrix


def _through_labels(update: Callable[..., None]) -> Callable[..., None]:
    """``upsample_confusion_matrix_`` in terms of ``confusion_matrix_``: writes the labels."""

    def upsample_confusion_matrix_(
        matrix: Tensor,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        align_corners: bool,
        scale_h: float | None,
        scale_w: float | None,
        invalid: Tensor | None = None,
    ) -> None:
        prediction = reference.upsample_argmax(
            logits, target.shape[1:], align_corners, scale_h, scale_w, torch.int64
        )
        update(matrix, prediction, target, ignore_index, invalid)

    return upsample_confusion_matrix_


def _upsample_confusion_matrix_cuda(
    matrix: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
    invalid: Tensor | None = None,
) -> None:
    geometry = (align_corners, scale_h, scale_w)
    if not _use_triton(logits, target.shape[1:]):
        _through_labels(_confusion_matrix_cuda)(
            matrix, logits, target, ignore_index, *geometry, invalid
        )
        return
    from fcnseg.kernels.upsample_confusion_matrix import upsample_confusion_matrix_forward_

    record = _labels.device_record(logits.device)
    upsample_confusion_matrix_forward_(
        matrix, logits, target, ignore_index, *geometry, record, invalid
    )
    if invalid is None:
        _labels.check_now(logits.device)


def _upsample_from_zeros(update: Callable[..., None]) -> Callable[..., Tensor]:
    def upsample_confusion_matrix(logits: Tensor, *args: Any) -> Tensor:
        matrix = _upsample_confusion_matrix_fake(logits, *args).zero_()
        update(matrix, logits, *args)
        return matrix

    return upsample_confusion_matrix


def _confusion_matrix_fake(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> Tensor:
    return target.new_empty((num_classes, num_classes), dtype=torch.int64)


def _upsample_confusion_matrix_fake(logits: Tensor, target: Tensor, *args: Any) -> Tensor:
    return logits.new_empty((logits.shape[1], logits.shape[1]), dtype=torch.int64)


def _upsample_confusion_matrix_compiled(
    matrix: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
    invalid: Tensor | None = None,
) -> None:
    counts = matrix if matrix.is_contiguous() else matrix.new_zeros(matrix.shape)
    bad_label = torch.ops.fcnseg_cpu.upsample_confusion_matrix(
        counts, logits, target, ignore_index, align_corners, scale_h, scale_w
    )
    _raise_reported("target", bad_label, matrix.shape[0])
    if counts is not matrix:
        matrix.add_(counts)


_compiled_cuda = _extension.missing is None and hasattr(torch.ops.fcnseg_cuda, "confusion_matrix_")
_confusion_matrix_cuda = (
    _confusion_matrix_compiled_cuda if _compiled_cuda else _confusion_matrix_reference_cuda
)
_cuda_kind = "cuda" if _compiled_cuda else "reference"

_register(
    "confusion_matrix_",
    compiled=_confusion_matrix_compiled,
    cpu=_confusion_matrix_cpu,
    cuda=_confusion_matrix_cuda,
    cuda_kind=_cuda_kind,
)
_register(
    "confusion_matrix",
    compiled=_from_zeros(_confusion_matrix_compiled),
    cpu=_from_zeros(_confusion_matrix_cpu),
    cuda=_from_zeros(_confusion_matrix_cuda),
    cuda_kind=_cuda_kind,
)
_register(
    "upsample_confusion_matrix_",
    compiled=_upsample_confusion_matrix_compiled,
    cpu=_through_labels(_confusion_matrix_cpu),
    cuda=_upsample_confusion_matrix_cuda,
    cuda_kind=_triton_kind,
)
_register(
    "upsample_confusion_matrix",
    compiled=_upsample_from_zeros(_upsample_confusion_matrix_compiled),
    cpu=_upsample_from_zeros(_through_labels(_confusion_matrix_cpu)),
    cuda=_upsample_from_zeros(_upsample_confusion_matrix_cuda),
    cuda_kind=_triton_kind,
)


# --- fake kernels: shapes, dtypes and strides without data ----------------------------------------


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"fcnseg::{name}", lib=_library)


def _fake_loss(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    shape = target.shape if reduction == "none" else ()
    return logits.new_empty(shape, dtype=compute_dtype(logits.dtype))


def _fake_gradient(tensor: Tensor, wanted: bool) -> Tensor:
    dtype = compute_dtype(tensor.dtype)
    return torch.empty_like(tensor, dtype=dtype) if wanted else tensor.new_empty(0, dtype=dtype)


@_fake("upsample_cross_entropy")
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = compute_grad and reduction != "none"
    sums = _fake_gradient(logits, wanted)
    edges = 0
    if wanted and logits.device.type == "cuda" and _use_triton(logits, target.shape[1:]):
        from fcnseg.kernels.upsample_cross_entropy import edges_size

        # The layout follows from the sizes, so a graph with dynamic ones is compiled for these.
        N, C, h, w, H, W = (int(size) for size in (*logits.shape, *target.shape[1:]))
        bilinear = (align_corners, scale_h, scale_w)
        edges = edges_size(
            (N, C, h, w), (H, W), weight is not None, label_smoothing, *bilinear, logits.device
        )
    return _fake_loss(logits, target, reduction), sums, sums.new_empty(edges)


@_fake("upsample_cross_entropy_gradient")
def _(grad_output: Tensor, sums: Tensor, edges: Tensor, like: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(sums, dtype=like.dtype)


@_fake("upsample_cross_entropy_gradient_")
def _(grad_output: Tensor, sums: Tensor, *args: Any) -> None:
    return None


@_fake("upsample_cross_entropy_backward")
def _(grad_output: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(logits)


@_fake("conv_transpose_cross_entropy")
def _(
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
    to_input, to_weight, to_bias = (wanted and reduction != "none" for wanted in compute_grad)
    classes = weight.new_empty(weight.shape[1] * groups)
    return (
        _fake_loss(input, target, reduction),
        _fake_gradient(input, to_input),
        _fake_gradient(weight, to_weight),
        _fake_gradient(classes, to_bias),
    )


@_fake("conv_transpose_cross_entropy_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    compute_grad = args[-1]
    shaped = (input, weight, input.new_empty(0) if bias is None else bias)
    to_input, to_weight, to_bias = (
        torch.empty_like(tensor) if wanted else tensor.new_empty(0)
        for tensor, wanted in zip(shaped, compute_grad, strict=True)
    )
    return to_input, to_weight, to_bias


@_fake("scale_gradient")
def _(gradient: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(gradient, dtype=like.dtype)


@_fake("upsample_argmax")
def _(logits: Tensor, size: Sequence[int], *args: Any) -> Tensor:
    return logits.new_empty((logits.shape[0], *size), dtype=args[-1])


@_fake("conv_transpose_argmax")
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int], *args: Any
) -> Tensor:
    return input.new_empty((input.shape[0], *size), dtype=args[-1])


_fake("confusion_matrix")(_confusion_matrix_fake)
_fake("upsample_confusion_matrix")(_upsample_confusion_matrix_fake)


@_fake("confusion_matrix_")
def _(matrix: Tensor, *args: Any) -> None:
    return None


@_fake("upsample_confusion_matrix_")
def _(matrix: Tensor, *args: Any) -> None:
    return None


# --- autograd -------------------------------------------------------------------------------------


def _autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    torch.library.register_autograd(
        f"fcnseg::{name}", backward, setup_context=setup_context, lib=_library
    )


def _not_twice(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"fcnseg.{name} is not differentiable twice: its gradient is computed together with "
            "the loss. Use torch.nn.functional for a double backward"
        )

    return backward


def _require_grad_flag(wanted: bool, name: str) -> None:
    if not wanted:
        raise RuntimeError(
            f"torch.ops.fcnseg.{name} ran with compute_grad=False, so there is no gradient; "
            f"call fcnseg.{name}, which sets the flag"
        )


_OWNED = "fcnseg: the workspaces are autograd's alone"
# What tells whether a workspace is about to be freed has no public name in PyTorch. Where a version
# lacks one of these, nothing is overwritten.
_CAN_TELL = all(
    hasattr(module, name)
    for module, name in (
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C._autograd, "_get_current_graph_task_keep_graph"),
        (torch._C._autograd, "_top_saved_tensors_default_hooks"),
        (torch._C._functorch, "is_legacy_batchedtensor"),
        (torch._C._functorch, "peek_interpreter_stack"),
    )
)


def loss_alone(loss: Tensor, *workspaces: Tensor) -> Tensor:
    """The loss of what a loss operator returned; its caller keeps no workspace.

    So autograd alone holds them from here on, unless hooks see what it saves, and may write over
    them. Who calls an operator of ``torch.ops`` and keeps what it returns finds it unchanged.
    """
    if _CAN_TELL and not torch.compiler.is_compiling() and loss.grad_fn is not None:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        node: Any = loss.grad_fn  # whose metadata PyTorch declares as a method
        node.metadata[_OWNED] = hooks is None
    return loss


def _may_overwrite(ctx: Any, workspace: Tensor, like: Tensor, grad_loss: Tensor) -> bool:
    """Whether the gradient of ``like`` may take the place of the saved ``workspace``.

    Only where the dtypes are the same, nobody else holds the workspace (:func:`loss_alone`), and
    autograd is about to free it: without ``retain_graph``, and with nothing between this call and
    the kernels that traces, batches or wraps tensors (compiling, ``vmap``, dispatch modes,
    subclasses). Nor with ``create_graph``: what is written in place has no node, so that a double
    backward would find nothing to raise in. It spares a tensor of the gradient's size at the peak.
    """
    plain = type(workspace) is Tensor and type(like) is Tensor
    return (
        plain
        and ctx.metadata.get(_OWNED, False)
        and workspace.dtype == like.dtype
        and not torch.is_grad_enabled()  # create_graph, which retain_graph=False may go with
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._functorch.is_legacy_batchedtensor(grad_loss)  # is_grads_batched
    )


def _setup_upsample(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, ignore_index, reduction, *options, compute_grad = inputs
    ctx.compute_grad = compute_grad
    ctx.reduction = reduction
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of the workspaces' sizes for them
    if reduction == "none":
        ctx.options = (ignore_index, *options)
        ctx.save_for_backward(logits, target, weight)
    else:
        ctx.options = (target.shape[1:], weight is not None, *options)
        ctx.save_for_backward(*output[1:], logits)


def _upsample_backward(ctx: Any, grad_loss: Tensor | None, *unused: None) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 10
    _require_grad_flag(ctx.compute_grad, "upsample_cross_entropy")
    if ctx.reduction == "none":
        gradient = torch.ops.fcnseg.upsample_cross_entropy_backward(
            grad_loss, *ctx.saved_tensors, *ctx.options
        )
        return gradient, *[None] * 9
    sums, edges, logits = ctx.saved_tensors
    if _may_overwrite(ctx, sums, logits, grad_loss):
        torch.ops.fcnseg.upsample_cross_entropy_gradient_(grad_loss, sums, edges, *ctx.options)
        return sums, *[None] * 9
    gradient = torch.ops.fcnseg.upsample_cross_entropy_gradient(
        grad_loss, sums, edges, logits, *ctx.options
    )
    return gradient, *[None] * 9


def _setup_conv_transpose(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, target, bias, class_weight, *conv = inputs[:11]
    ignore_index, reduction, label_smoothing, compute_grad = inputs[11:]
    ctx.compute_grad = compute_grad
    ctx.reduction = reduction
    ctx.options = (*conv, ignore_index, label_smoothing, compute_grad)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of the gradients' sizes for them
    none = reduction == "none"
    saved = (
        (input, weight, target, bias, class_weight) if none else (*output[1:], *inputs[:2], bias)
    )
    ctx.save_for_backward(*saved)


def _scaled(ctx: Any, unscaled: Tensor, grad_loss: Tensor, like: Tensor) -> Tensor:
    if _may_overwrite(ctx, unscaled, like, grad_loss):
        return unscaled.mul_(grad_loss)
    return torch.ops.fcnseg.scale_gradient(unscaled, grad_loss, like)


def _conv_transpose_backward(ctx: Any, grad_loss: Tensor | None, *unused: None) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 15
    _require_grad_flag(any(ctx.compute_grad), "conv_transpose_cross_entropy")
    if ctx.reduction == "none":
        gradients = torch.ops.fcnseg.conv_transpose_cross_entropy_backward(
            grad_loss, *ctx.saved_tensors, *ctx.options
        )
    else:
        saved = ctx.saved_tensors
        gradients = [
            _scaled(ctx, unscaled, grad_loss, like) if wanted else None
            for unscaled, like, wanted in zip(saved[:3], saved[3:], ctx.compute_grad, strict=True)
        ]
    to_input, to_weight, to_bias = (
        gradient if wanted else None
        for gradient, wanted in zip(gradients, ctx.compute_grad, strict=True)
    )
    return to_input, to_weight, None, to_bias, *[None] * 11


_autograd("upsample_cross_entropy", _upsample_backward, _setup_upsample)
_autograd("conv_transpose_cross_entropy", _conv_transpose_backward, _setup_conv_transpose)
_autograd("upsample_cross_entropy_backward", _not_twice("upsample_cross_entropy"))
_autograd("conv_transpose_cross_entropy_backward", _not_twice("conv_transpose_cross_entropy"))
_autograd("upsample_cross_entropy_gradient", _not_twice("upsample_cross_entropy"))
_autograd("scale_gradient", _not_twice("conv_transpose_cross_entropy"))
