"""cityscapesscripts as the oracle of the Cityscapes evaluator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest


def import_cityscapesscripts() -> ModuleType:
    """Its pixel-level evaluation, or a skip where it is not installed."""
    if not hasattr(np, "in1d"):  # gone since NumPy 2.4
        np.in1d = np.isin  # type: ignore[attr-defined]
    name = "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"
    return pytest.importorskip(name)


def official_scores(official: ModuleType, pairs: Sequence[Any], quiet: bool = True) -> dict:
    """What it finds for pairs that have ``prediction`` and ``truth``, in their order."""
    official.args.quiet, official.args.JSONOutput = quiet, False
    official.args.colorized, official.args.bold, official.args.nocol = False, "", ""
    lists = [str(pair.prediction) for pair in pairs], [str(pair.truth) for pair in pairs]
    return official.evaluateImgLists(*lists, official.args)


def same(ours: Any, theirs: Any) -> bool:
    """Whether every entry of ``theirs`` is in ``ours``, to the last bit, NaN where NaN."""
    if isinstance(theirs, Mapping):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, float) and math.isnan(theirs):
        return isinstance(ours, float) and math.isnan(ours)
    return bool(ours == theirs)
