"""Adapters for other libraries: the same loss, gradients and labels as the model itself."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import import_torchvision
from torch import Tensor, nn

import fcnseg
from fcnseg.integrations import FusedModel, fuse, fuse_decode_head, predict_labels

CLASSES = 5


def batch(height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (2, height, width), generator=generator)
    target[:, :3] = 255
    return x, target


def check(
    model: nn.Module, expected_loss: Any, full_logits: Any, height: int = 64, width: int = 96
) -> FusedModel:
    """Loss, all gradients, labels and matrix against the model's own, in float64."""
    torch.manual_seed(1)
    model = model.double().eval()  # dropout off; the trunk's batch statistics do not matter here
    x, target = batch(height, width)
    fused = fuse(model)
    model.zero_grad()
    expected = expected_loss(x, target)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    model.zero_grad()
    loss = fused(x, target)
    if not isinstance(loss, Tensor):
        loss = loss.loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)

    with torch.no_grad():
        labels = full_logits(x).argmax(1)
    assert torch.equal(fused.predict(x), labels)
    matrix = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    assert fused.update_confusion_matrix(matrix, x, target) is matrix
    assert torch.equal(matrix, fcnseg.confusion_matrix(labels, target, CLASSES, ignore_index=255))
    return fused


@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large"]
)
@pytest.mark.long(6)
def test_torchvision(name: str) -> None:
    make = getattr(import_torchvision().models.segmentation, name)
    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    model = make(weights=None, weights_backbone=None, num_classes=CLASSES, **options)

    def expected(x: Tensor, target: Tensor) -> Tensor:
        out = model(x)
        loss = F.cross_entropy(out["out"], target, ignore_index=255)
        if "aux" in out:
            loss = loss + 0.5 * F.cross_entropy(out["aux"], target, ignore_index=255)
        return loss

    fused = check(model, expected, lambda x: model(x)["out"], 33, 49)
    x, _ = batch(33, 49)
    assert fused(x)["out"].shape == (2, CLASSES, 33, 49)  # the original's forward


@pytest.mark.parametrize("name", ["Unet", "FPN", "DeepLabV3Plus"])
@pytest.mark.long(6)
def test_segmentation_models_pytorch(name: str) -> None:
    import_torchvision()
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, name)("resnet18", encoder_weights=None, classes=CLASSES)

    def expected(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(model(x), target, ignore_index=255)

    fused = check(model, expected, model)
    assert fused.align_corners == (name != "Unet")
    if name == "FPN":
        with pytest.raises(RuntimeError, match="divisible"):  # the original's own message
            fused.predict(torch.zeros(1, 3, 65, 97, dtype=torch.float64))


def test_segmentation_models_pytorch_that_do_not_fit() -> None:
    import_torchvision()
    smp = pytest.importorskip("segmentation_models_pytorch")
    options: dict[str, Any] = {"encoder_weights": None, "classes": CLASSES}
    with pytest.raises(ValueError, match=r"activation=None .* got Sigmoid"):
        fuse(smp.FPN("resnet18", activation="sigmoid", **options))
    with pytest.raises(ValueError, match="aux_params=None"):
        fuse(smp.FPN("resnet18", aux_params={"classes": 3}, **options))
    model = smp.FPN("resnet18", **options)
    model.segmentation_head = nn.Conv2d(128, CLASSES, 1)
    with pytest.raises(TypeError, match="segmentation head of FPN is a Conv2d"):
        fuse(model)
    model = smp.FPN("resnet18", **options)
    model.segmentation_head[1] = nn.Upsample(scale_factor=4)
    with pytest.raises(TypeError, match="expected bilinear upsampling"):
        fuse(model)


def segformer(num_labels: int = CLASSES) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            num_labels=num_labels, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32],
            decoder_hidden_size=16,
        )
    )  # fmt: skip


def test_segformer() -> None:
    import_torchvision()
    model = segformer()

    def full(x: Tensor) -> Tensor:
        return F.interpolate(model(x).logits, x.shape[-2:], mode="bilinear")

    fused = check(model, lambda x, target: model(x, labels=target).loss, full)
    x, target = batch(64, 96)
    assert fused(pixel_values=x, labels=target).logits.shape == (2, CLASSES, 16, 24)
    assert fused(x).loss is None
    with pytest.raises(ValueError, match="at least 2 labels"):
        fuse(segformer(num_labels=1))


def test_upernet() -> None:
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.UperNetConfig(
        backbone_config=backbone, num_labels=CLASSES, hidden_size=16, auxiliary_in_channels=24,
        auxiliary_channels=16,
    )  # fmt: skip
    model = transformers.UperNetForSemanticSegmentation(config)
    check(model, lambda x, target: model(x, labels=target).loss, lambda x: model(x).logits)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected one of torchvision\..*, got Linear"):
        fuse(nn.Linear(1, 1))


class CrossEntropyLoss(nn.Module):
    """mmsegmentation's, as its documentation describes it."""

    loss_name = "loss_ce"

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        options = {
            "use_sigmoid": False, "use_mask": False, "reduction": "mean", "class_weight": None,
            "loss_weight": 1.0, "avg_non_ignore": False,
        }  # fmt: skip
        vars(self).update({**options, **changes})


class DecodeHead(nn.Module):
    """mmsegmentation's ``BaseDecodeHead``, as its documentation describes it."""

    def __init__(self, *losses: nn.Module, **changes: Any) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(4, CLASSES, 1, dtype=torch.float64)
        self.loss_decode = losses[0] if len(losses) == 1 else nn.ModuleList(losses)
        self.sampler = None
        self.ignore_index, self.align_corners, self.out_channels = 255, False, CLASSES
        for name, value in changes.items():
            setattr(self, name, value)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.conv_seg(inputs)

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list[Any]) -> dict[str, Tensor]:
        raise NotImplementedError


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5, 1.0, 3.0]])
@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_mmsegmentation_interface(
    align_corners: bool, weight: list[float] | None, avg_non_ignore: bool
) -> None:
    """Against its definition of the losses; not run against the package."""
    loss = CrossEntropyLoss(loss_weight=0.4, class_weight=weight, avg_non_ignore=avg_non_ignore)
    head = DecodeHead(loss, CrossEntropyLoss(reduction="sum"), align_corners=align_corners)
    if weight is not None and not avg_non_ignore:
        with pytest.raises(ValueError, match="avg_non_ignore=True"):
            fuse_decode_head(head)
        return
    assert fuse_decode_head(head) is head
    features = torch.randn(2, 4, 8, 12, dtype=torch.float64)
    _, target = batch(64, 96)
    samples = [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=each[None])) for each in target]
    found = head.loss_by_feat(head(features), samples)

    z = F.interpolate(head(features), (64, 96), mode="bilinear", align_corners=align_corners)
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    per_pixel = F.cross_entropy(z, target, w, ignore_index=255, reduction="none")
    valid = target != 255
    count = valid.sum() if avg_non_ignore else target.numel()
    if w is not None:
        count = w[target[valid]].sum()
    unweighted = F.cross_entropy(z, target, ignore_index=255, reduction="sum")
    assert found.keys() == {"loss_ce", "acc_seg"}
    torch.testing.assert_close(found["loss_ce"], 0.4 * per_pixel.sum() / count + unweighted)
    accuracy = 100 * (z.argmax(1) == target)[valid].double().mean()
    torch.testing.assert_close(found["acc_seg"], accuracy[None].float())
    labels = predict_labels(head, features, (64, 96))
    assert torch.equal(labels, z.argmax(1))


def test_mmsegmentation_heads_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="Linear without 'loss_by_feat'"):
        fuse_decode_head(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="sampler=None"):
        fuse_decode_head(DecodeHead(CrossEntropyLoss(), sampler=object()))
    with pytest.raises(ValueError, match="at least 2 output channels"):
        fuse_decode_head(DecodeHead(CrossEntropyLoss(), out_channels=1))
    with pytest.raises(TypeError, match="got MSELoss"):
        fuse_decode_head(DecodeHead(nn.MSELoss()))
    with pytest.raises(ValueError, match="use_sigmoid=False"):
        fuse_decode_head(DecodeHead(CrossEntropyLoss(use_sigmoid=True)))
    with pytest.raises(ValueError, match="got 'none'"):
        fuse_decode_head(DecodeHead(CrossEntropyLoss(reduction="none")))


def test_torchmetrics_metric() -> None:
    import_torchvision()
    torchmetrics = pytest.importorskip("torchmetrics")
    from fcnseg.integrations import ConfusionMatrixMetric

    logits = torch.randn(2, CLASSES, 8, 12)
    _, target = batch(64, 96)
    prediction = fcnseg.upsample_argmax(logits, (64, 96))
    jaccard = torchmetrics.classification.MulticlassJaccardIndex(CLASSES, ignore_index=255)
    collection = torchmetrics.MetricCollection(
        {"ours": ConfusionMatrixMetric(CLASSES), "theirs": jaccard}
    )
    for _ in range(2):
        collection.update(prediction, target)
    found = collection.compute()
    assert found["ours"] == pytest.approx(found["theirs"].item())

    metric = ConfusionMatrixMetric(CLASSES, score=None)
    metric.update(logits, target)  # low-resolution logits go straight into the matrix
    expected = fcnseg.confusion_matrix(prediction, target, CLASSES, ignore_index=255)
    assert torch.equal(metric.matrix, expected)
    assert metric.compute()["mean_iou"] == fcnseg.metrics.scores(expected).mean_iou
    metric.reset()
    assert not metric.matrix.any()
    with pytest.raises(ValueError, match="score: expected None or one of iou, dice"):
        ConfusionMatrixMetric(CLASSES, score="nonsense")
    with pytest.raises(IndexError, match="target holds 1 value outside"):
        metric.update(torch.zeros(1, dtype=torch.int64), torch.tensor([CLASSES]))


class Labels(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return fcnseg.upsample_argmax(logits, (24, 32))


def test_export_of_upsample_argmax() -> None:
    logits = torch.randn(2, CLASSES, 3, 4)
    program = torch.export.export(Labels(), (logits,))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert "fcnseg.upsample_argmax" in str(calls[-1].target)
    other = torch.randn_like(logits)
    assert torch.equal(program.module()(other), Labels()(other))


@pytest.mark.slow
def test_aot_inductor_of_upsample_argmax(tmp_path: Any) -> None:
    logits = torch.randn(2, CLASSES, 3, 4)
    program = torch.export.export(Labels(), (logits,))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "labels.pt2")
    )
    labels = torch._inductor.aoti_load_package(package)
    other = torch.randn_like(logits)
    assert torch.equal(labels(other), Labels()(other))


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchvision", "transformers", "segmentation_models_pytorch"])
def test_examples(
    library: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import_torchvision()
    pytest.importorskip(library)
    names = {"transformers": "segformer", "segmentation_models_pytorch": "smp"}
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    example = importlib.import_module(f"use_with_{names.get(library, library)}")
    found = example.main(64, 64)
    assert found["gradient"] < 1e-4
    assert re.search(r"MB saved\nlabels: \(2, 64, 64\)", capsys.readouterr().out)
