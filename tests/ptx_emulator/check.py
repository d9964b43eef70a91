"""Compares what a kernel wrote with float64, and collects what a case has to say."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.conftest import TOLERANCE
from tests.ptx_emulator.triton_bridge import Session


class Check:
    """The notes of one case, and its faults: wrong values, then whatever the emulator reports."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.notes: list[str] = []
        self.wrong: list[str] = []

    def close(
        self, name: str, ours: Tensor, exact: Tensor, eager: Tensor, extra: float = 0.0
    ) -> None:
        """``ours`` is no further from ``exact`` than ``eager`` is, but for a tolerance.

        Errors are relative to the largest expected value. NaN and infinities have to stand where
        eager's stand.
        ``extra`` widens the tolerance where products are rounded, as on tensor cores.
        """
        if ours.shape != exact.shape:
            self.wrong.append(f"{name} has shape {tuple(ours.shape)}, not {tuple(exact.shape)}")
            return
        self.written(name, ours)
        for what, of in (("NaN", torch.isnan), ("infinity", torch.isinf)):
            differ = of(ours) != of(eager)
            if differ.any():
                self.wrong.append(f"{what} of {name} differs at {int(differ.sum())}")
        fine = exact.isfinite() & ours.isfinite() & eager.isfinite()
        if not fine.any():
            self.notes.append(f"{name} not finite")
            return
        scale = exact[fine].abs().max().item()
        error = (ours.double() - exact)[fine].abs().max().item()
        theirs = (eager.double() - exact)[fine].abs().max().item()
        self.notes.append(f"{name} of {scale:.1e} off by {error:.1e}, eager by {theirs:.1e}")
        if error > theirs + (TOLERANCE[ours.dtype] + extra) * scale:
            self.wrong.append(self.notes[-1])

    def same(self, name: str, ours: Tensor, expected: Tensor) -> None:
        """``ours`` equals ``expected`` exactly."""
        self.written(name, ours)
        differ = int((ours != expected).sum())
        self.notes.append(f"{name}: {differ} differ")
        if differ:
            self.wrong.append(f"{name} differs at {differ} of {ours.numel()}")

    def largest(self, name: str, label: Tensor, logits: Tensor, ties: bool = False) -> None:
        """Every label names a class [N, C, H, W] that is the largest, or nearly so; NaN counts as
        the largest, as in torch.argmax. ``ties``: the lowest class of equal logits, exactly."""
        self.written(name, label)
        index = label.long()
        outside = int(((index < 0) | (index >= logits.shape[1])).sum())
        if outside:
            self.wrong.append(f"{outside} of {name} name no class")
            return
        expected = logits.argmax(1)
        firm = logits.isnan().any(1) | logits.isinf().any(1) | ties
        differ = int(((index != expected) & firm).sum())
        if differ:
            self.wrong.append(f"{name} differs from argmax at {differ} of {int(firm.sum())}")
        gap = logits.gather(1, expected[:, None]) - logits.gather(1, index[:, None])
        finite = gap.masked_fill(firm[:, None], 0)
        self.notes.append(f"{name} gap {finite.max().item():.1e}")
        if finite.max() > 1e-5 * logits.nan_to_num(0, 0, 0).abs().max():
            self.wrong.append(f"{name} {finite.max().item():.1e} below the largest")

    def written(self, name: str, tensor: Tensor) -> None:
        """Every element of a result has been written by somebody."""
        if missing := self.session.undefined(tensor):
            self.wrong.append(f"{missing} elements of {name} never written")
