"""Fully convolutional networks on ResNet trunks, upsampled through the fused operators."""

from fcnseg.models.fcn import (
    FCN,
    LoadReport,
    fcn_resnet18,
    fcn_resnet34,
    fcn_resnet50,
    fcn_resnet101,
    load_pretrained,
)
from fcnseg.models.resnet import ResNet

__all__ = [
    "FCN",
    "LoadReport",
    "ResNet",
    "fcn_resnet18",
    "fcn_resnet34",
    "fcn_resnet50",
    "fcn_resnet101",
    "load_pretrained",
]
