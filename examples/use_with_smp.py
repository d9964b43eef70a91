"""A model of segmentation_models.pytorch with the fused loss and prediction.

python examples/use_with_smp.py     (needs segmentation_models_pytorch; weights are random)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _compare import DEVICE, allow_torchvision_beside_cpu_torch, compare, make_batch, run

import fcnseg

NUM_CLASSES = 150


def main(height: int = 512, width: int = 512) -> dict[str, float]:
    allow_torchvision_beside_cpu_torch()
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    model = smp.FPN("resnet18", encoder_weights=None, classes=NUM_CLASSES).to(DEVICE).eval()
    fused = fcnseg.integrations.fuse(model)
    x, target = make_batch(NUM_CLASSES, height, width)

    found = compare(
        model,
        lambda: F.cross_entropy(model(x), target, ignore_index=255),  # before
        lambda: fused.loss(x, target),  # after
    )
    labels = fused.predict(x)  # before: model(x).argmax(1)
    print(f"labels: {tuple(labels.shape)}")
    return found


if __name__ == "__main__":
    run(main, __doc__)
