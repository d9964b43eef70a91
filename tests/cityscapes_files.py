"""Prediction and ground-truth files in Cityscapes' layout, with instances."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

_STUFF = (*range(24), 7, 7, 8, 11, 21, 23)  # the void ids and the large classes
_THINGS = tuple(range(24, 34))


def write_png(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), array, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
        raise OSError(f"{path}: could not be written")
    return path


def write_pairs(
    root: Path,
    count: int,
    size: tuple[int, int],
    *,
    instances: int,
    seed: int = 0,
    first: int = 0,
) -> None:
    """Writes ``root/gtFine/val/CITY/...`` and ``root/results/...``, two cities in turn.

    Truth: blocks of stuff under boxes of things, some of them crowds without an instance, with a
    border of void. Prediction: the truth shifted by a few pixels, some things renamed, with
    speckles.
    """
    height, width = size
    for index in range(first, first + count):
        rng = np.random.default_rng((seed, index))
        block = max(2, width // 48)
        cells = rng.choice(_STUFF, (-(-height // block), -(-width // block))).astype(np.uint8)
        label = np.kron(cells, np.ones((block, block), np.uint8))[:height, :width].copy()
        instance = label.astype(np.uint16)
        predicted = label.copy()
        numbers = dict.fromkeys(_THINGS, 0)
        for _ in range(instances):
            thing = int(rng.choice(_THINGS))
            h, w = rng.integers(2, height // 4), rng.integers(2, width // 8)
            y, x = rng.integers(0, height - h), rng.integers(0, width - w)
            box = np.s_[y : y + h, x : x + w]
            label[box] = thing
            instance[box] = 1000 * thing + numbers[thing] if rng.random() < 0.9 else thing
            numbers[thing] += 1
            predicted[box] = thing if rng.random() < 0.7 else rng.choice(_THINGS)
        predicted = np.roll(predicted, rng.integers(-3, 4, 2), (0, 1))
        speckles = rng.random((height, width)) < 0.02
        predicted[speckles] = rng.integers(0, 34, int(speckles.sum()))
        label[-height // 16 :] = instance[-height // 16 :] = 1
        city = ("aachen", "bonn")[index % 2]
        name = f"{city}_000000_{index:06d}"
        folder = root / "gtFine/val" / city
        write_png(folder / f"{name}_gtFine_labelIds.png", label)
        write_png(folder / f"{name}_gtFine_instanceIds.png", instance)
        # Anywhere below the folder of predictions, with any ending.
        where = root / "results" / ("deep/er" if index % 3 else "")
        write_png(where / f"{name}_pred_labelIds.png", predicted)
