"""Fully convolutional networks on a ResNet trunk, and the loading of pretrained weights.

Source: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR
2015 (the learnable, bilinear-initialised deconvolution; the skips of FCN-16s and FCN-8s);
torchvision.models.segmentation.fcn (the form and the names of the heads).
"""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, Literal, ParamSpec, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fcnseg import functional
from fcnseg.models.resnet import ResNet

Head = Literal["fcn", "plain"]
Upsample = Literal["bilinear", "deconv"]
DeconvGroups = Literal["grouped", "full"]
Skips = Literal["32s", "16s", "8s"]
Reduction = Literal["none", "mean", "sum"]


class FCN(nn.Module):
    """A ResNet trunk, a low-resolution head, and upsampling to the input's size.

    `fcn_resnet18` to `fcn_resnet101` make one. `model(x)` upsamples the logits, as torchvision's
    networks do; `loss`, `predict` and `update_confusion_matrix` compute the same from the
    low-resolution logits, through the fused operators, without full-resolution logits.

    Args:
        depth: Layers of the trunk: 18, 34, 50 or 101.
        num_classes: C, at least 1.
        aux_loss: Whether there is an auxiliary head, on layer 3.
        output_stride: s: 8, 16 or 32 pixels of the input per pixel of the low-resolution logits.
        head: "fcn", torchvision's: 3x3 convolution to a quarter of the channels, batch norm, ReLU,
            dropout of 0.1, 1x1 convolution; or "plain", one 3x3 convolution to the classes. Both
            heads take this form.
        upsample: "bilinear" (`align_corners=False`), or "deconv": a learnable transposed
            convolution with kernel 2s, stride s and padding s/2 that starts as bilinear
            interpolation, its output cropped at (0, 0) to the input's size. The auxiliary logits
            are upsampled bilinearly in either case.
        deconv_groups: "grouped", each class upsampled from its own logits, or "full", from those of
            all classes: in every deconvolution, those of the skips included.
        skips: The wiring of FCN-32s, 16s or 8s, with `output_stride=32` only. "32s" has no skip.
            "16s" doubles the logits by a learnable deconvolution (4x4, stride 2, at first
            bilinear), crops them at (0, 0) to the size of layer 3, of stride 16, and adds layer 3's
            own scores, a 1x1 convolution. "8s" then does the same with layer 2, of stride 8. The
            scores start as zero, as in the paper, so that at first the head's logits alone count.
            `upsample` goes on from stride 16 or 8. None: no skip, any output stride.

    Raises:
        TypeError: num_classes is no int.
        ValueError: Another argument, or num_classes, is out of its range; or skips are asked for
            with an output stride other than 32.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        *,
        aux_loss: bool = False,
        output_stride: int = 8,
        head: Head = "fcn",
        upsample: Upsample = "bilinear",
        deconv_groups: DeconvGroups = "grouped",
        skips: Skips | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_classes, int) or isinstance(num_classes, bool):
            raise TypeError(f"num_classes must be an int, got {type(num_classes).__name__}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        _check_choice("head", head, get_args(Head))
        _check_choice("upsample", upsample, get_args(Upsample))
        _check_choice("deconv_groups", deconv_groups, get_args(DeconvGroups))
        if skips is not None:
            _check_choice("skips", skips, get_args(Skips))
            if output_stride != 32:
                raise ValueError(f"skips={skips!r} needs output_stride=32, got {output_stride!r}")
        self.num_classes = num_classes
        self.backbone = ResNet(depth, output_stride=output_stride)
        make_head = _fcn_head if head == "fcn" else _plain_head
        full = deconv_groups == "full"
        layer2, layer3, layer4 = self.backbone.channels
        self.classifier = make_head(layer4, num_classes)
        self.aux_classifier = make_head(layer3, num_classes) if aux_loss else None
        widths = {None: (), "32s": (), "16s": (layer3,), "8s": (layer3, layer2)}[skips]
        self.skips = nn.ModuleList(_Skip(width, num_classes, full=full) for width in widths)
        self.deconv = (
            _bilinear_deconv(num_classes, output_stride >> len(widths), full=full)
            if upsample == "deconv"
            else None
        )

    def low_resolution(self, x: Tensor, *, aux: bool = True) -> dict[str, Tensor]:
        """Logits before upsampling.

        Args:
            x: float [N, 3, H, W], normalised images.
            aux: Whether to compute the auxiliary logits, where there is an auxiliary head.

        Returns:
            "out" [N, C, ceil(H / s), ceil(W / s)], s the output stride or that of the last skip,
            and, where asked for, "aux" (layer 3's size).

        Raises:
            TypeError: x is not floating-point.
            ValueError: x is not [N, 3, H, W].
        """
        if not x.is_floating_point():
            raise TypeError(f"x must be floating-point (normalised images), got {x.dtype}")
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"x must have shape [N, 3, H, W], got {list(x.shape)}")
        layer2, layer3, layer4 = self.backbone(x)
        out = self.classifier(layer4)
        for skip, features in zip(self.skips, (layer3, layer2), strict=False):
            out = skip(out, features)
        logits = {"out": out}
        if aux and self.aux_classifier is not None:
            logits["aux"] = self.aux_classifier(layer3)
        return logits

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits at full resolution.

        Args:
            x: float [N, 3, H, W], normalised images.

        Returns:
            "out" and, with an auxiliary head, "aux": [N, C, H, W].
        """
        logits = self.low_resolution(x)
        height, width = x.shape[-2:]
        full = {}
        for name, z in logits.items():
            if name == "out" and self.deconv is not None:
                full[name] = self.deconv(z)[..., :height, :width]
            else:
                full[name] = F.interpolate(
                    z, size=(height, width), mode="bilinear", align_corners=False
                )
        return full

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        aux_weight: float = 0.4,
    ) -> Tensor:
        """Cross entropy of the upsampled logits, main and, if there is one, auxiliary.

        Equals, without full-resolution logits, `F.cross_entropy(out["out"], target, ...) +
        aux_weight * F.cross_entropy(out["aux"], target, ...)` with `out = model(x)`.

        Args:
            x: float [N, 3, H, W], normalised images.
            target: uint8, int32 or int64 [N, H, W]. With bilinear upsampling its size may differ
                from that of x: the logits go straight to the target's size.
            weight: [C], class weights.
            ignore_index: A label that does not count.
            reduction: "mean", "sum" or "none".
            label_smoothing: In [0, 1].
            aux_weight: Factor of the auxiliary loss.

        Returns:
            The loss: a scalar, or [N, H, W] with "none". Logits are taken in the dtype that they
            have (under autocast, the low one); the loss is float32 or float64.

        Raises:
            ValueError: A size does not fit, or as the fused operators do.
            IndexError: A bad label, as the fused operators do.
        """
        losses = self.losses(
            x,
            target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return losses["out"] + aux_weight * losses["aux"] if "aux" in losses else losses["out"]

    def losses(
        self,
        x: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """The terms of `loss`: "out" and, with an auxiliary head, "aux", without its factor.

        Arguments and errors are those of `loss`.
        """
        options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        logits = self.low_resolution(x)
        if self.deconv is None:
            losses = {
                "out": functional.upsample_cross_entropy(
                    logits["out"], target, weight=weight, **options
                )
            }
        else:
            _check_deconv_size("target", tuple(target.shape[-2:]), x)
            losses = {
                "out": functional.conv_transpose_cross_entropy(
                    logits["out"],
                    self.deconv.weight,
                    target,
                    stride=self.deconv.stride,
                    padding=self.deconv.stride[0] // 2,
                    groups=self.deconv.groups,
                    class_weight=weight,
                    **options,
                )
            }
        if "aux" in logits:
            losses["aux"] = functional.upsample_cross_entropy(
                logits["aux"], target, weight=weight, **options
            )
        return losses

    @torch.no_grad()
    def predict(self, x: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """Labels: `model(x)["out"].argmax(1)`, without full-resolution logits.

        Call `model.eval()` first.

        Args:
            x: float [N, 3, H, W], normalised images.
            size: Of the labels: (rows, columns), or an int for both. None: that of x. With bilinear
                upsampling the logits go straight to this size (say, the original size of a shrunk
                image). A deconvolution has a fixed scale, so with "deconv" no size but that of x is
                possible.

        Returns:
            int64 labels, [N, *size].

        Raises:
            ValueError: size is not that of x and upsampling is "deconv".

        Examples:
            >>> model = fcn_resnet18(19, output_stride=32).eval()
            >>> model.predict(torch.zeros(1, 3, 64, 96)).shape
            torch.Size([1, 64, 96])
        """
        if size is None:
            size = (x.shape[-2], x.shape[-1])
        logits = self.low_resolution(x, aux=False)["out"]
        if self.deconv is None:
            return functional.upsample_argmax(logits, size)
        _check_deconv_size("size", (size, size) if isinstance(size, int) else tuple(size), x)
        return functional.conv_transpose_argmax(
            logits,
            self.deconv.weight,
            size,
            stride=self.deconv.stride,
            padding=self.deconv.stride[0] // 2,
            groups=self.deconv.groups,
        )

    @torch.no_grad()
    def update_confusion_matrix(
        self, matrix: Tensor, x: Tensor, target: Tensor, *, ignore_index: int = 255
    ) -> Tensor:
        """Add the predictions for x to a confusion matrix. Call `model.eval()` first.

        Args:
            matrix: int64 [C, C], rows truth, columns prediction; changed in place.
            x: float [N, 3, H, W], normalised images.
            target: uint8, int32 or int64 [N, H', W']; with "deconv" its size is that of x.
            ignore_index: A label that does not count.

        Returns:
            matrix.

        Raises:
            ValueError: A size does not fit, or as the fused operators do.
            IndexError: A bad label, as the fused operators do.
        """
        if self.deconv is None:
            logits = self.low_resolution(x, aux=False)["out"]
            return functional.upsample_confusion_matrix_(
                matrix, logits, target, ignore_index=ignore_index
            )
        _check_deconv_size("target", tuple(target.shape[-2:]), x)
        return functional.confusion_matrix_(
            matrix, self.predict(x), target, ignore_index=ignore_index
        )


class _Skip(nn.Module):
    """Logits, doubled and cropped to the size of finer features, plus these features' scores."""

    def __init__(self, channels: int, num_classes: int, *, full: bool) -> None:
        super().__init__()
        self.up = _bilinear_deconv(num_classes, 2, full=full)
        self.score = nn.Conv2d(channels, num_classes, 1)
        for parameter in self.score.parameters():
            nn.init.zeros_(parameter)

    def forward(self, logits: Tensor, features: Tensor) -> Tensor:
        # From h = ceil(H / 2) rows to 2h, which is H or, to be cropped, H + 1.
        height, width = features.shape[-2:]
        return self.up(logits)[..., :height, :width] + self.score(features)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_deconv_size(name: str, size: tuple[int, ...], x: Tensor) -> None:
    # A smaller size would fit the operator, as a crop, and hide that the images were resized.
    if size != tuple(x.shape[-2:]):
        raise ValueError(
            f"{name} must have the size of x, {tuple(x.shape[-2:])}, with upsample='deconv', "
            f"got {size}"
        )


def _fcn_head(in_channels: int, num_classes: int) -> nn.Module:
    channels = in_channels // 4
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(channels, num_classes, 1),
    )


def _plain_head(in_channels: int, num_classes: int) -> nn.Module:
    return nn.Conv2d(in_channels, num_classes, 3, padding=1)


def _bilinear_deconv(num_classes: int, stride: int, *, full: bool) -> nn.ConvTranspose2d:
    """A transposed convolution from h to h * stride, stride even, that interpolates bilinearly."""
    deconv = nn.ConvTranspose2d(
        num_classes,
        num_classes,
        2 * stride,
        stride=stride,
        padding=stride // 2,
        groups=1 if full else num_classes,
        bias=False,
    )
    # Output i lies at source (i + 1/2) / stride - 1/2: the peak is between the two middle taps.
    taps = 1 - (torch.arange(2 * stride) + 0.5 - stride).abs() / stride
    classes = torch.arange(num_classes)
    with torch.no_grad():
        deconv.weight.zero_()
        # From each class to itself, in [C, C, 2s, 2s] or, grouped, [C, 1, 2s, 2s].
        deconv.weight[classes, classes if full else 0] = torch.outer(taps, taps)
    return deconv


_P = ParamSpec("_P")


def _constructor(
    depth: int, network: Callable[Concatenate[int, _P], FCN], doc: str = ""
) -> Callable[_P, FCN]:
    """`network` with its first argument given; it shows the signature of the others."""

    def construct(*args: _P.args, **kwargs: _P.kwargs) -> FCN:
        return network(depth, *args, **kwargs)

    construct.__name__ = construct.__qualname__ = f"fcn_resnet{depth}"
    construct.__doc__ = f"`FCN` on ResNet-{depth}; its arguments are explained there.{doc}"
    signature = inspect.signature(functools.partial(network, depth))
    construct.__signature__ = signature.replace(return_annotation=FCN)  # type: ignore[attr-defined]
    return construct


_AS_TORCHVISION = """

    With the default `output_stride`, `head` and `upsample`, torchvision's `fcn_resnet{}`.
    """

fcn_resnet18 = _constructor(18, FCN)
fcn_resnet34 = _constructor(34, FCN)
fcn_resnet50 = _constructor(50, FCN, _AS_TORCHVISION.format(50))
fcn_resnet101 = _constructor(
    101,
    FCN,
    _AS_TORCHVISION.format(101)
    + """
    >>> with torch.device("meta"):
    ...     model = fcn_resnet101(21, aux_loss=True)
    >>> sum(parameter.numel() for parameter in model.parameters())
    54314346
    """,
)


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` did not load.

    Attributes:
        missing: Entries of the model that the weights lack; they keep their values. The batch
            norms' `num_batches_tracked`, which old weights lack and nothing here reads, is not
            among them.
        unexpected: Entries of the weights, under their own names, that the model lacks.
        mismatched: Entries of the heads that were left as they are because their shapes differ
            (another number of classes): name -> (shape in the weights, shape in the model).
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __str__(self) -> str:
        shapes = [f"{name} {given} -> {own}" for name, (given, own) in self.mismatched.items()]
        return "; ".join(
            f"{title}: {', '.join(names) or 'none'}"
            for title, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("mismatched", shapes),
            )
        )


def load_pretrained(
    model: FCN, state_dict_or_path: Mapping[str, Any] | str | os.PathLike[str]
) -> LoadReport:
    """Load weights by name, in place: of such a model, of torchvision's FCN, or of an ImageNet
    ResNet.

    The names of a plain ResNet (`conv1.weight`, `layer1.0...`) get the prefix `backbone.`. Weights
    that lie one level deeper, under "model" or "state_dict" (as training checkpoints keep them),
    are found there.

    Args:
        model: The network; it is not touched if anything is raised.
        state_dict_or_path: Names to tensors, or a file that `torch.load(weights_only=True)` reads.

    Returns:
        The names that were not loaded, and why. A head for another number of classes is left as it
        is and reported.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file cannot be read, no name fits, or the trunk's shapes differ (another
            depth).
        TypeError: The weights are not a mapping from names to tensors.
    """
    if isinstance(state_dict_or_path, Mapping):
        source, weights = "state_dict_or_path", state_dict_or_path
    else:
        source = os.fspath(state_dict_or_path)
        weights = _read(source)
    for key in ("model", "state_dict"):
        if isinstance(weights, Mapping) and isinstance(weights.get(key), Mapping):
            weights = weights[key]
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"{source} must hold a mapping from names to tensors, got {type(weights).__name__}"
        )
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(
                f"{source} must hold a mapping from names to tensors, "
                f"got {type(value).__name__} under {name!r}"
            )

    own = model.state_dict()
    fitting: dict[str, Tensor] = {}
    unexpected: list[str] = []
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for given_name, value in weights.items():
        name = re.sub(r"^(?=(conv1|bn1|layer[1-4])\.)", "backbone.", given_name)
        if name not in own:
            unexpected.append(given_name)
        elif value.shape != own[name].shape:
            mismatched[name] = (tuple(value.shape), tuple(own[name].shape))
        else:
            fitting[name] = value
    for name, (given, expected) in mismatched.items():
        if name.startswith("backbone."):
            raise ValueError(
                f"{source} is for another backbone: {name} has shape {given}, "
                f"the model's has {expected}"
            )
    if not fitting:
        raise ValueError(
            f"{source} has no entry that fits the model; its names begin with {list(weights)[:3]}, "
            f"the model's with {list(own)[:3]}"
        )
    model.load_state_dict(fitting, strict=False)
    missing = tuple(
        name
        for name in own
        if name not in fitting
        and name not in mismatched
        and not name.endswith(".num_batches_tracked")
    )
    return LoadReport(missing, tuple(unexpected), mismatched)


def _read(path: str) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file of pretrained weights: {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read pretrained weights from {path}: {reason}") from error
