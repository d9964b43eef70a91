"""Hugging Face's SegFormer with the fused loss and prediction: its code stays as it is.

python examples/use_with_segformer.py     (needs transformers; weights are random)

``fuse(model)`` can be given to ``transformers.Trainer`` in place of the model.
"""

from __future__ import annotations

import torch
from _compare import DEVICE, allow_torchvision_beside_cpu_torch, compare, make_batch, run

import fcnseg

NUM_CLASSES = 150


def main(height: int = 512, width: int = 512) -> dict[str, float]:
    allow_torchvision_beside_cpu_torch()
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(num_labels=NUM_CLASSES)  # the size of SegFormer-B0
    model = SegformerForSemanticSegmentation(config).to(DEVICE).eval()
    fused = fcnseg.integrations.fuse(model)
    x, target = make_batch(NUM_CLASSES, height, width)

    found = compare(
        model,
        lambda: model(x, labels=target).loss,  # before
        lambda: fused(x, labels=target).loss,  # after
    )
    labels = fused.predict(x)  # before: F.interpolate(model(x).logits, ...).argmax(1)
    print(f"labels: {tuple(labels.shape)}")
    return found


if __name__ == "__main__":
    run(main, __doc__)
