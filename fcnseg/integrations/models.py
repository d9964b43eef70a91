"""torchvision, segmentation_models.pytorch and Hugging Face transformers.

Source: torchvision.models.segmentation, segmentation_models_pytorch.base.SegmentationModel,
transformers' SegformerForSemanticSegmentation and UperNetForSemanticSegmentation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fcnseg.integrations._fused_model import FusedModel


class _Torchvision(FusedModel):
    """FCN, DeepLabV3 and LRASPP. The auxiliary weight is that of torchvision's own training."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.single_head = not hasattr(model, "aux_classifier")  # LRASPP's takes all features

    def low_resolution(self, x: Tensor, *, aux: bool = True) -> dict[str, Tensor]:
        model: Any = self.model
        features = model.backbone(x)
        logits = {"out": model.classifier(features if self.single_head else features["out"])}
        if aux and not self.single_head and model.aux_classifier is not None:
            logits["aux"] = model.aux_classifier(features["aux"])
        return logits


class _SegmentationModelsPytorch(FusedModel):
    """Every architecture whose head is a convolution, an upsampling and an activation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        head = getattr(model, "segmentation_head", None)
        if not isinstance(head, nn.Sequential) or len(head) != 3:
            raise TypeError(
                f"model: the segmentation head of {type(model).__name__} is a "
                f"{type(head).__name__}, not a convolution, an upsampling and an activation"
            )
        upsampling, activation = head[1], getattr(head[2], "activation", None)
        if not isinstance(activation, nn.Identity):
            raise ValueError(
                "model: expected activation=None (the loss takes logits), got "
                f"{type(activation).__name__}"
            )
        if isinstance(upsampling, nn.Upsample) and upsampling.mode == "bilinear":
            self.align_corners = bool(upsampling.align_corners)
        elif not isinstance(upsampling, nn.Identity):
            raise TypeError(f"model: expected bilinear upsampling in the head, got {upsampling}")
        if getattr(model, "classification_head", None) is not None:
            raise ValueError("model: expected aux_params=None; a classification head has no target")

    def low_resolution(self, x: Tensor, *, aux: bool = True) -> dict[str, Tensor]:
        model: Any = self.model
        model.check_input_shape(x)
        return {"out": model.segmentation_head[0](model.decoder(model.encoder(x)))}


class _Transformers(FusedModel):
    """SegFormer and UperNet. ``forward`` speaks the library's language, so that its Trainer works:
    with ``labels`` it returns the fused loss and, as logits, the low-resolution ones."""

    def __init__(self, model: nn.Module, ignore_index: int, aux_weight: float) -> None:
        super().__init__(model)
        self.ignore_index, self.aux_weight = ignore_index, aux_weight
        config: Any = model.config
        self.config = config  # where the library's Trainer looks for it
        if config.num_labels < 2:
            raise ValueError(
                "model: expected at least 2 labels (a single one is trained with a binary loss), "
                f"got {config.num_labels}"
            )

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, labels: Tensor | None = None, **options: Any
    ) -> Any:
        if labels is None:
            return self.model(pixel_values, **options)
        from transformers.modeling_outputs import SemanticSegmenterOutput

        logits = self.low_resolution(pixel_values)
        loss = self._loss(logits, labels, self.aux_weight, ignore_index=self.ignore_index)
        return SemanticSegmenterOutput(loss=loss, logits=logits["out"])


class _Segformer(_Transformers):
    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        super().__init__(model, config.semantic_loss_ignore_index, 0.0)

    def low_resolution(self, x: Tensor, *, aux: bool = True) -> dict[str, Tensor]:
        return {"out": self.model(x).logits}  # a quarter of the images' size


class _UperNet(_Transformers):
    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        super().__init__(model, config.loss_ignore_index, config.auxiliary_loss_weight)

    def low_resolution(self, x: Tensor, *, aux: bool = True) -> dict[str, Tensor]:
        model: Any = self.model
        features = model.backbone.forward_with_filtered_kwargs(x).feature_maps
        logits = {"out": model.decode_head(features)}
        if aux and model.auxiliary_head is not None:
            logits["aux"] = model.auxiliary_head(features)
        return logits


#: (module prefix, class name) of what :func:`fuse` takes; looked up without importing anything.
_SUPPORTED: dict[tuple[str, str], type[FusedModel]] = {
    ("torchvision.", "_SimpleSegmentationModel"): _Torchvision,  # FCN and DeepLabV3
    ("torchvision.", "LRASPP"): _Torchvision,
    ("segmentation_models_pytorch.", "SegmentationModel"): _SegmentationModelsPytorch,
    ("transformers.", "SegformerForSemanticSegmentation"): _Segformer,
    ("transformers.", "UperNetForSemanticSegmentation"): _UperNet,
}


def fuse(model: nn.Module) -> Any:
    """Fused loss and prediction for a segmentation model of another library.

    Equal to the model's own loss (cross entropy of its bilinearly upsampled logits) and to the
    argmax of its output, without full-resolution logits::

        fused = fcnseg.integrations.fuse(torchvision.models.segmentation.fcn_resnet101(...))
        loss = fused.loss(images, target)  # or fused(images, target)
        labels = fused.predict(images)

    Args:
        model: a torchvision FCN, DeepLabV3 or LRASPP; a segmentation_models.pytorch model with a
            bilinear (or no) upsampling head and ``activation=None``; transformers'
            ``SegformerForSemanticSegmentation`` or ``UperNetForSemanticSegmentation``. A subclass
            counts as its base.

    Returns:
        A :class:`FusedModel` that shares the model's parameters.

    Raises:
        TypeError: the model is none of these, or its head has another form.
        ValueError: the model ends in an activation, has a classification head, or one label only.
    """
    for base in type(model).__mro__:
        for (package, name), fused in _SUPPORTED.items():
            if base.__name__ == name and base.__module__.startswith(package):
                return fused(model)
    names = ", ".join(package + name for package, name in _SUPPORTED)
    raise TypeError(f"model: expected one of {names}, got {type(model).__qualname__}")
