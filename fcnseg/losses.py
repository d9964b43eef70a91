"""The fused losses as modules, and what is built on their loss per pixel.

Hard pixels, the focal factor and class weights act on the map ``[N, H, W]`` that
``reduction="none"`` gives, whichever operator made it; nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from fcnseg import _checks, functional

if TYPE_CHECKING:
    import numpy as np

    from fcnseg.models import FCN

ClassWeighting = Literal["inverse", "median", "effective", "enet"]


class UpsampleCrossEntropyLoss(nn.Module):
    """:func:`fcnseg.upsample_cross_entropy` with its options kept.

    Args:
        weight: class weights ``[C]``, kept as a buffer; None weighs classes alike.
        ignore_index, reduction, label_smoothing, align_corners, scale_factor: as in the function.

    Examples:
        >>> import torch, fcnseg
        >>> criterion = fcnseg.UpsampleCrossEntropyLoss(ignore_index=255)
        >>> target = torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> round(criterion(torch.zeros(1, 2, 2, 2), target).item(), 4)  # log 2
        0.6931
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        align_corners: bool = False,
        scale_factor: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.align_corners = align_corners
        self.scale_factor = scale_factor

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of ``logits`` [N, C, h, w] against ``target`` [N, H, W]."""
        return functional.upsample_cross_entropy(
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            align_corners=self.align_corners,
            scale_factor=self.scale_factor,
        )


class ConvTransposeCrossEntropyLoss(nn.Module):
    """A learnable transposed convolution and its cross entropy, fused.

    Equal to ``nn.ConvTranspose2d`` followed by ``nn.CrossEntropyLoss``; holds the convolution's
    ``weight`` and ``bias`` under the same names, so its state dict is the convolution's.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
            dilation: as in ``nn.ConvTranspose2d``.
        crop: first row and column of the output that the target covers.
        class_weight: class weights ``[C]``, kept as a non-persistent buffer.
        ignore_index, reduction, label_smoothing: as in the function.

    Examples:
        >>> import torch, fcnseg
        >>> criterion = fcnseg.ConvTransposeCrossEntropyLoss(4, 4, 4, stride=2, padding=1, groups=4)
        >>> target = torch.zeros(1, 4, 4, dtype=torch.uint8)
        >>> criterion(torch.randn(1, 4, 2, 2), target).shape
        torch.Size([])
    """

    class_weight: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        crop: tuple[int, int] = (0, 0),
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        convolution = nn.ConvTranspose2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
        )
        self.weight = convolution.weight
        self.bias = convolution.bias
        self.geometry: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "output_padding": output_padding,
            "groups": groups,
            "dilation": dilation,
            "crop": crop,
        }
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of ``input`` [N, C_in, h, w] against ``target`` [N, H, W]."""
        return functional.conv_transpose_cross_entropy(
            input,
            self.weight,
            target,
            self.bias,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.geometry,
        )

    def predict(
        self, input: Tensor, size: int | Sequence[int], dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Labels [N, H, W] of the transposed convolution of ``input``."""
        return functional.conv_transpose_argmax(
            input, self.weight, size, self.bias, dtype=dtype, **self.geometry
        )


def ohem_mask(
    loss: Tensor, valid: Tensor, *, threshold: float = 0.7, min_kept: int | float = 1 / 16
) -> Tensor:
    """The hard pixels of online hard example mining.

    Equal to::

        hard = valid & (loss > -math.log(threshold))  # pixels of p_y < threshold
        if hard.sum() < min_kept:                     # then the hardest, or all there are
            k = min(min_kept, valid.sum())
            hard = valid & (loss >= loss[valid].topk(k).values.min())

    Args:
        loss: cross entropy per pixel, of any shape, without class weights or label smoothing:
            ``-log p_y``.
        valid: bool of the loss's shape: the pixels that count.
        threshold: probability in (0, 1]; a pixel whose label has less is hard.
        min_kept: least number of pixels of the batch to keep: an int, or a float in [0, 1], their
            share of all pixels, valid or not.

    Returns:
        bool of the loss's shape. Among equal losses at the edge of the ``min_kept`` hardest,
        ``torch.topk`` chooses. NaN is hard.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or value.

    Note:
        The number of pixels that is looked for is fixed by ``min_kept`` and the shape, so that the
        host needs to know no count.

    Source:
        Shrivastava, Gupta and Girshick, "Training Region-based Object Detectors with Online Hard
        Example Mining", CVPR 2016; per pixel, with these two limits: Wu, Shen and van den Hengel,
        "Bridging Category-level and Instance-level Semantic Image Segmentation", 2016.

    Examples:
        >>> import torch
        >>> from fcnseg.losses import ohem_mask
        >>> loss = torch.tensor([0.1, 0.2, 0.0, 2.0])
        >>> ohem_mask(loss, torch.tensor([True, True, False, True]), threshold=0.7, min_kept=2)
        tensor([False,  True, False,  True])
    """
    _checks.pixel_loss(loss)
    _checks.same_shape("valid", valid, "loss", loss, (torch.bool,))
    _checks.number("threshold", threshold, 0, 1, open_low=True)
    _min_kept("min_kept", min_kept)
    # What is not valid comes last, also after valid pixels whose loss is 0.
    ranked = loss.detach().masked_fill(~valid, -math.inf).flatten()
    hard = ~(ranked <= -math.log(threshold))  # a NaN is not below
    # Whichever of the two sets is larger holds the other.
    size = ranked.numel()
    count = round(min_kept * size) if isinstance(min_kept, float) else min(min_kept, size)
    hardest = ranked.topk(count, sorted=False).indices
    return hard.scatter_(0, hardest, True).view_as(valid) & valid


def _min_kept(name: str, value: int | float) -> None:
    if isinstance(value, float):
        _checks.number(name, value, 0, 1)
    else:
        _checks.integer(name, value, 0)


def focal(loss: Tensor, gamma: float = 2.0) -> Tensor:
    """The focal loss per pixel, from the cross entropy per pixel.

    Equal to ``(1 - p_y) ** gamma * loss`` with ``p_y = torch.exp(-loss)``, gradient included.

    Args:
        loss: cross entropy per pixel, of any shape, without class weights or label smoothing.
        gamma: exponent, at least 0.

    Returns:
        The loss's shape and dtype; 0 stays 0 (ignored pixels).

    Raises:
        ValueError, TypeError: an argument has the wrong dtype or value.

    Source:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. 4.

    Examples:
        >>> import math, torch
        >>> from fcnseg.losses import focal
        >>> focal(torch.tensor([0.0, math.log(2)]), gamma=1.0)  # p_y = 1, 1/2
        tensor([0.0000, 0.3466])
    """
    _checks.pixel_loss(loss)
    _checks.number("gamma", gamma, 0)
    # Aside, because for gamma < 1 the factor's own derivative at 0 is infinite, that of the
    # product 0. (A NaN is not <= 0.)
    certain = loss <= 0
    l = loss.masked_fill(certain, 1.0)  # noqa: E741
    return (l * (-torch.expm1(-l)) ** gamma).masked_fill(certain, 0.0)


def pixel_mean(
    loss: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    focal_gamma: float = 0.0,
    ohem_threshold: float | None = None,
    ohem_min_kept: int | float = 1 / 16,
) -> Tensor:
    """Mean of a loss per pixel: over the hard pixels, weighted by class, with a focal factor.

    Equal to::

        kept = target != ignore_index
        if ohem_threshold is not None:
            kept = ohem_mask(loss, kept, threshold=ohem_threshold, min_kept=ohem_min_kept)
        w = weight[target[kept]]  # 1 where weight is None
        (w * focal(loss, focal_gamma)[kept]).sum() / w.sum()

    Args:
        loss: ``[N, H, W]``, what ``upsample_cross_entropy`` or ``conv_transpose_cross_entropy``
            gives with ``reduction="none"`` and neither class weights nor label smoothing.
        target: the class indices ``[N, H, W]`` it was given.
        weight: class weights ``[C]``; no gradient. They do not choose the hard pixels.
        ignore_index: label of pixels that count for nothing.
        focal_gamma: exponent of :func:`focal`; 0 for the plain loss.
        ohem_threshold, ohem_min_kept: of :func:`ohem_mask`; a threshold of None keeps all pixels.

    Returns:
        A scalar of the loss's dtype; NaN, with a gradient of 0, where every pixel is ignored.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or value.

    Note:
        A bad label on CUDA, whose loss is NaN, makes the mean NaN.

    Examples:
        >>> import torch, fcnseg
        >>> from fcnseg.losses import pixel_mean
        >>> logits, target = torch.zeros(1, 4, 2, 2), torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> loss = fcnseg.upsample_cross_entropy(logits, target, reduction="none")
        >>> round(pixel_mean(loss, target, focal_gamma=1.0).item(), 4)  # 3/4 log 4
        1.0397
    """
    _checks.pixel_loss(loss)
    _checks.same_shape("target", target, "loss", loss, _checks.LABEL_DTYPES)
    _checks.ignored(ignore_index)
    labels = target.long()
    kept = labels != ignore_index
    if ohem_threshold is not None:
        kept = ohem_mask(loss, kept, threshold=ohem_threshold, min_kept=ohem_min_kept)
    if weight is not None:
        _checks.class_weight("weight", weight, len(weight), loss)
    w = _pixel_weights(labels, kept, weight, loss.dtype)
    if focal_gamma != 0:
        loss = focal(loss, focal_gamma)
    return (w * torch.where(kept, loss, 0.0)).sum() / w.sum()


def _pixel_weights(
    labels: Tensor, kept: Tensor, weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The class weights [N, H, W] of the pixels, 0 where they are not kept."""
    w = kept.to(dtype)
    if weight is None:
        return w
    # A label beyond the classes is not kept, or its loss is NaN; it must not be an index.
    return w * weight.to(dtype)[labels.clamp(0, len(weight) - 1)]


class SegmentationLoss(nn.Module):
    """The training loss of a network with an optional auxiliary head: ``criterion(model, x, y)``.

    Without hard pixels and focal factor, ``model.loss`` with these options, fused to the scalar;
    else ``main + aux_weight * aux``, both the :func:`pixel_mean` of that head's loss per pixel.

    Args:
        weight: class weights ``[C]`` (say, of :func:`class_weights`), kept as a buffer.
        ignore_index: label of pixels that count for nothing.
        label_smoothing: in [0, 1]; only without hard pixels and focal factor, which are defined by
            the label's probability ``exp(-loss)``.
        aux_weight: factor of the auxiliary head's loss, at least 0.
        focal_gamma, ohem_threshold, ohem_min_kept: as in :func:`pixel_mean`.

    Raises:
        ValueError, TypeError: an argument has the wrong type or value.

    Examples:
        >>> import torch
        >>> from fcnseg.losses import SegmentationLoss
        >>> from fcnseg.models import fcn_resnet18
        >>> model = fcn_resnet18(4, output_stride=32, aux_loss=True)
        >>> criterion = SegmentationLoss(ohem_threshold=0.7, ohem_min_kept=256)
        >>> x, target = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8)
        >>> criterion(model, x, target).backward()
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = 255,
        label_smoothing: float = 0.0,
        aux_weight: float = 0.4,
        focal_gamma: float = 0.0,
        ohem_threshold: float | None = None,
        ohem_min_kept: int | float = 1 / 16,
    ) -> None:
        super().__init__()
        _checks.loss_options(ignore_index, "mean", label_smoothing)
        _checks.number("aux_weight", aux_weight, 0)
        _checks.number("focal_gamma", focal_gamma, 0)
        if ohem_threshold is not None:
            _checks.number("ohem_threshold", ohem_threshold, 0, 1, open_low=True)
        _min_kept("ohem_min_kept", ohem_min_kept)
        self.per_pixel = focal_gamma != 0 or ohem_threshold is not None
        if self.per_pixel and label_smoothing != 0:
            raise ValueError(
                "label_smoothing must be 0 with focal_gamma or ohem_threshold, "
                f"got {label_smoothing}"
            )
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.aux_weight = aux_weight
        self.focal_gamma = focal_gamma
        self.ohem_threshold = ohem_threshold
        self.ohem_min_kept = ohem_min_kept

    @property
    def count(self) -> Callable[[Tensor], Tensor] | None:
        """What the mean for a target [N, H, W] divides by, as a function of the target.

        With it the means of the parts of a batch can be put together to that of the batch. None
        with hard pixels, whose number the target does not tell.
        """
        return self._count if self.ohem_threshold is None else None

    def _count(self, target: Tensor) -> Tensor:
        labels = target.long()
        kept = labels != self.ignore_index
        return _pixel_weights(labels, kept, self.weight, torch.float64).sum()

    def forward(self, model: FCN, x: Tensor, target: Tensor) -> Tensor:
        """Loss of ``model`` for images ``x`` [N, 3, H, W] and ``target`` [N, H, W]; a scalar."""
        if not self.per_pixel:
            return model.loss(
                x,
                target,
                weight=self.weight,
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
                aux_weight=self.aux_weight,
            )
        means = {
            name: pixel_mean(
                loss,
                target,
                weight=self.weight,
                ignore_index=self.ignore_index,
                focal_gamma=self.focal_gamma,
                ohem_threshold=self.ohem_threshold,
                ohem_min_kept=self.ohem_min_kept,
            )
            for name, loss in model.losses(
                x, target, ignore_index=self.ignore_index, reduction="none"
            ).items()
        }
        mean = means["out"] + self.aux_weight * means["aux"] if "aux" in means else means["out"]
        if self.ohem_threshold is None:
            return mean
        # Without a count a part of a batch must not be NaN for want of a valid pixel.
        return torch.where((target != self.ignore_index).any(), mean, 0.0)


def class_counts(
    targets: Iterable[Tensor | np.ndarray], num_classes: int, *, ignore_index: int = 255
) -> Tensor:
    """Count the classes in each of a data set's label maps.

    Args:
        targets: class indices of one image each, any shape; of a data set of
            :mod:`fcnseg.data`: ``map(dataset.load_label, range(len(dataset)))``.
        num_classes: C.
        ignore_index: label of pixels that are not counted.

    Returns:
        int64 ``[images, C]``, on the CPU.

    Raises:
        ValueError, TypeError: an argument has the wrong type or value.
        IndexError: (CPU) a label outside [0, C).

    Examples:
        >>> import torch
        >>> from fcnseg.losses import class_counts
        >>> class_counts([torch.tensor([0, 0, 255, 1]), torch.tensor([0, 0])], 3)
        tensor([[2, 1, 0],
                [2, 0, 0]])
    """
    _checks.num_classes(num_classes)
    rows = []
    for target in targets:
        labels = torch.as_tensor(target)
        matrix = functional.confusion_matrix(labels, labels, num_classes, ignore_index=ignore_index)
        rows.append(matrix.diagonal().cpu())
    return torch.stack(rows) if rows else torch.zeros((0, num_classes), dtype=torch.int64)


def class_weights(
    counts: Tensor,
    method: ClassWeighting = "median",
    *,
    beta: float = 1 - 1e-8,
    c: float = 1.02,
) -> Tensor:
    """Class weights that balance a data set, from the counts of its classes.

    With n the pixels of a class, p their share of all, f their share of the pixels of the images
    that hold the class:

    - ``"inverse"``: 1 / p;
    - ``"median"``: median(f) / f;
    - ``"effective"``: 1 / (1 - beta^n);
    - ``"enet"``: 1 / ln(c + p).

    ``"inverse"`` and ``"effective"``, which have no scale of their own, are divided by their mean.
    A class without a pixel has weight 0 and is left out of mean and median.

    Args:
        counts: int64 ``[images, C]``, the pixels of each class in each image; see
            :func:`class_counts`.
        method: one of the above.
        beta: in [0, 1); 1 / (1 - beta) is the number of pixels beyond which more of a class hardly
            make it less heavy.
        c: greater than 1, bounds the weights by 1 / ln c.

    Returns:
        float32 ``[C]``, computed in float64.

    Raises:
        ValueError, TypeError: an argument has the wrong type or value, or no class has a pixel.

    Source:
        median: Eigen and Fergus, ICCV 2015, section 6.3.2; effective: Cui et al., "Class-Balanced
        Loss Based on Effective Number of Samples", CVPR 2019; enet: Paszke et al., "ENet", 2016.

    Examples:
        >>> import torch
        >>> from fcnseg.losses import class_weights
        >>> class_weights(torch.tensor([[30, 15, 5], [30, 15, 5]]), "median")
        tensor([0.5000, 1.0000, 3.0000])
    """
    if method not in get_args(ClassWeighting):
        raise ValueError(f"method must be one of {get_args(ClassWeighting)}, got {method!r}")
    _checks.number("beta", beta, 0, 1, open_high=True)
    _checks.number("c", c, 1, open_low=True)
    _checks.tensor("counts", counts, 2, "[images, C]", (torch.int64,))
    # The pixels of the images that hold a class; sums of integers, exact.
    around = ((counts > 0) * counts.sum(1, keepdim=True)).sum(0).double()
    n = counts.sum(0).double()
    present = n > 0
    if not bool(present.any()):
        raise ValueError("counts must hold at least one pixel, got none")
    n, around = n[present], around[present]
    p = n / n.sum()
    if method == "median":
        f = n / around
        # numpy's median: the mean of the middle two, where torch's is the lower one.
        w = f.quantile(0.5) / f
    elif method == "enet":
        w = 1 / torch.log(c + p)
    else:
        # 1 - beta^n without cancellation
        log_beta = math.log(beta) if beta > 0 else -math.inf
        w = 1 / p if method == "inverse" else -1 / torch.expm1(n * log_beta)
        w = w / w.mean()
    weights = torch.zeros(len(present), dtype=torch.float64)
    weights[present] = w
    return weights.float()
