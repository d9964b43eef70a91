"""Small calls of every Triton kernel and path, for ``sanitize_gpu.sh``."""

from __future__ import annotations

import torch
from torch import Tensor

import fcnseg
from fcnseg.kernels import upsample_cross_entropy

# C, h, w, H, W, spread: both paths, 8- and 16-bit labels, strips, borders between programs, down
CASES = [
    (19, 5, 40, 40, 320, 2.0),
    (19, 5, 40, 40, 320, 60.0),
    (1, 4, 4, 32, 32, 2.0),
    (300, 3, 4, 24, 32, 2.0),
    (5, 2, 3, 70, 100, 2.0),
    (5, 9, 11, 4, 3, 2.0),
]


def run(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    for reduction in ("mean", "sum", "none"):
        leaf = logits.detach().requires_grad_()
        loss = fcnseg.upsample_cross_entropy(
            leaf, target, weight=weight, ignore_index=255, reduction=reduction,
            label_smoothing=0.0 if weight is None else 0.1,
        )  # fmt: skip
        loss.sum().backward()
        with torch.no_grad():
            fcnseg.upsample_cross_entropy(leaf, target, ignore_index=255, reduction=reduction)
    fcnseg.upsample_argmax(logits, target.shape[1:])
    fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255)


def main() -> None:
    choose_band = upsample_cross_entropy.choose_band
    torch.manual_seed(0)
    for num_classes, h, w, H, W, spread in CASES:
        logits = (torch.randn(2, num_classes, h, w) * spread).cuda()
        target = torch.randint(0, min(num_classes, 255), (2, H, W)).cuda()
        target[:, ::3, ::2] = 255
        for rows in (1, 3):
            upsample_cross_entropy.choose_band = lambda *_, rows=rows: rows
            run(logits, target, None)
            run(logits.half(), target, torch.rand(num_classes).cuda())
        upsample_cross_entropy.choose_band = choose_band
        run(logits.to(memory_format=torch.channels_last), target.to(torch.int32), None)
        target[1, -1, -1] = -5
        target[0, 1, 1] = 2**40
        run(logits, target, None)
        try:
            fcnseg.check_labels()
        except IndexError:
            continue
        raise AssertionError("bad labels were not recorded")


if __name__ == "__main__":
    main()
