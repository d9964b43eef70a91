"""Small calls of every kernel and path, for ``sanitize_gpu.sh``."""

from __future__ import annotations

import torch
from torch import Tensor

import fcnseg
from fcnseg.kernels import upsample_cross_entropy

# C, h, w, H, W, spread: both paths, borders between programs; strips; 16-bit labels
CASES = [(19, 5, 40, 40, 320, 2.0), (19, 5, 40, 40, 320, 60.0), (5, 2, 3, 70, 100, 2.0),
         (300, 3, 4, 24, 32, 2.0)]  # fmt: skip


def run(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
    for reduction in ("mean", "none"):
        leaf = logits.detach().requires_grad_()
        loss = fcnseg.upsample_cross_entropy(
            leaf, target, weight=weight, ignore_index=255, reduction=reduction,
            label_smoothing=0.0 if weight is None else 0.1,
        )  # fmt: skip
        loss.sum().backward()


def main() -> None:
    torch.manual_seed(0)
    for num_classes, h, w, H, W, spread in CASES:
        logits = (torch.randn(2, num_classes, h, w) * spread).cuda()
        target = torch.randint(0, min(num_classes, 255), (2, H, W)).cuda()
        target[:, ::3, ::2] = 255
        # 4: the last band reaches past the last row. One size keeps its launch: two sizes.
        for images, rows in ((1, 1), (2, 4)):
            upsample_cross_entropy.choose_band = lambda *_, rows=rows: rows
            run(logits[:images], target[:images])
        run(logits.to(memory_format=torch.channels_last), target)
        target[1, -1, -1] = -5
        target[0, 1, 1] = 2**40
        run(logits, target)
        fcnseg.upsample_argmax(logits, target.shape[1:])
        fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255)
        try:
            fcnseg.check_labels()
        except IndexError:
            continue
        raise AssertionError("bad labels were not recorded")
    for groups in (1, 19):  # transposed convolution: full and per class
        leaves = [torch.randn(2, 19, 5, 7), torch.randn(19, 19 // groups, 4, 4), torch.randn(19)]
        input, weight, bias = (leaf.cuda().requires_grad_() for leaf in leaves)
        target19 = torch.randint(0, 19, (2, 10, 14)).cuda()
        geometry = {"stride": 2, "padding": 1, "groups": groups}
        for reduction in ("mean", "none"):
            fcnseg.conv_transpose_cross_entropy(
                input, weight, target19, bias, reduction=reduction, **geometry
            ).sum().backward()
        labels = fcnseg.conv_transpose_argmax(input, weight, (10, 14), bias, **geometry)
        fcnseg.confusion_matrix(labels, target19, 19)
    run(logits, target.clamp(0, 299), torch.rand(300).cuda())
    fcnseg.upsample_cross_entropy(logits, target.clamp(0, 299))


if __name__ == "__main__":
    main()
