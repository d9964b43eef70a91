"""Cases that the interpreter suite and the GPU suite of the Triton kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

Geometry = tuple[bool, float | None, float | None]  # align_corners, scale_h, scale_w
PLAIN: Geometry = (False, None, None)
CORNERS: Geometry = (True, None, None)

#: h, w, H, W and the coordinates
GEOMETRIES: list[tuple[tuple[int, int, int, int], Geometry]] = [
    ((3, 5, 24, 40), PLAIN),
    ((3, 5, 24, 40), CORNERS),  # cells of more than eight pixels
    ((3, 4, 25, 31), PLAIN),
    ((3, 4, 12, 16), PLAIN),
    ((2, 2, 35, 70), PLAIN),  # wide cells: strips
    ((1, 1, 9, 11), PLAIN),
    ((1, 3, 1, 24), CORNERS),
    ((4, 1, 8, 1), PLAIN),
    ((7, 9, 7, 9), PLAIN),  # same size: one pixel a cell
    ((9, 11, 4, 3), PLAIN),  # down: most cells are empty
    ((9, 11, 4, 3), CORNERS),
    ((5, 5, 8, 8), (False, 1.7, 1.7)),
    ((5, 40, 10, 80), PLAIN),  # more cells than lanes: borders between programs
]

LAYOUTS = ["channels_last", "expanded", "sliced", "transposed"]


def lay_out(layout: str, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Other strides; values that repeat where the layout repeats them."""
    if layout == "channels_last":
        return logits.to(memory_format=torch.channels_last), target
    if layout == "expanded":
        height = target.shape[1]
        return logits[:1].expand_as(logits), target[:, :1].expand(-1, height, -1)
    if layout == "sliced":
        return logits.repeat(1, 1, 2, 2)[:, :, ::2, 1::2], target.repeat(1, 1, 2)[:, :, ::2]
    transposed = logits.transpose(2, 3).contiguous().transpose(2, 3)
    return transposed, target.transpose(1, 2).contiguous().transpose(1, 2)
