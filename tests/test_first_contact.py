"""What a newcomer meets first: ``python -m fcnseg``, the public names, the errors."""

from __future__ import annotations

import re

import pytest
import torch

import fcnseg
from fcnseg import __main__ as self_test

PUBLIC = {
    "ConfusionMatrix", "ConvTransposeCrossEntropyLoss", "SegmentationLoss",
    "UpsampleCrossEntropyLoss", "__version__",
    "build_info", "check_labels", "confusion_matrix", "confusion_matrix_",
    "conv_transpose_argmax", "conv_transpose_cross_entropy", "metrics", "upsample_argmax",
    "upsample_confusion_matrix", "upsample_confusion_matrix_", "upsample_cross_entropy",
}  # fmt: skip


def test_public_names() -> None:
    """A name that is added or taken away shows here, and in the CHANGELOG."""
    assert set(fcnseg.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(fcnseg, name) is not None
        assert name == "__version__" or getattr(fcnseg, name).__doc__


def test_self_test(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "SECONDS", 0.0)
    assert self_test.main() == 0
    out = capsys.readouterr().out
    assert f"fcnseg {fcnseg.__version__}, torch {torch.__version__}" in out
    rows = re.findall(r"^  (\w+) +(\S+) +[\d.]+ ms +[\d.]+ ms +[\d.]+x  (\S+)$", out, re.MULTILINE)
    assert len(rows) == 5
    kinds = fcnseg.build_info()["operators"]
    for name, error, kind in rows:
        assert float(error) <= self_test.TOLERANCE
        assert kind == kinds[name]["cuda" if torch.cuda.is_available() else "cpu"]


def test_self_test_reports_a_wrong_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_test, "SECONDS", 0.0)
    monkeypatch.setattr(
        fcnseg, "upsample_argmax", lambda logits, size: torch.zeros(2, *size).long()
    )
    assert self_test.main() == 1
    captured = capsys.readouterr()
    assert re.search(r"^  upsample_argmax .* WRONG$", captured.out, re.MULTILINE)
    assert "wrong result" in captured.err
