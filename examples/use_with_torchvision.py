"""torchvision's FCN with the fused loss and prediction: its code stays as it is.

python examples/use_with_torchvision.py     (needs torchvision; weights are random)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _compare import DEVICE, allow_torchvision_beside_cpu_torch, compare, make_batch, run

import fcnseg

NUM_CLASSES = 150


def main(height: int = 256, width: int = 512) -> dict[str, float]:
    allow_torchvision_beside_cpu_torch()
    from torchvision.models.segmentation import fcn_resnet50

    torch.manual_seed(0)
    model = fcn_resnet50(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    model.to(DEVICE).eval()  # no dropout: both losses see the same features
    fused = fcnseg.integrations.fuse(model)
    x, target = make_batch(NUM_CLASSES, height, width)

    found = compare(
        model,
        lambda: F.cross_entropy(model(x)["out"], target, ignore_index=255),  # before
        lambda: fused.loss(x, target),  # after
    )
    labels = fused.predict(x)  # before: model(x)["out"].argmax(1)
    print(f"labels: {tuple(labels.shape)}")
    return found


if __name__ == "__main__":
    run(main, __doc__)
