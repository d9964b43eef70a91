"""How often the classes occur in the splits of a data set, and where the splits differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fcnseg.losses import class_counts

from .dataset import SegmentationDataset
from .split import IntArray

#: Splits whose class shares have a larger Jensen-Shannon distance differ. A class that has 5% of
#: one split and 10% of the other brings 0.08, one that has 10% and 20% brings 0.12.
MAX_DISTANCE = 0.1
#: A class whose share in one split is more than this many times that in the other is uneven.
MAX_RATIO = 2.0


def count_pixels(dataset: SegmentationDataset, workers: int | None = None) -> IntArray:
    """Pixels of each class in each image.

    Args:
        dataset: read in its own order, without its transform.
        workers: threads; None takes one per core.

    Returns:
        int64 ``[n, C + 1]``; the last column counts void.

    Raises:
        DataError: a label file is missing, corrupt, or holds a value of no class; it is named.
    """
    classes = dataset.num_classes

    def count(index: int) -> IntArray:
        label = dataset.load_label(index)
        [found] = class_counts([label], classes, ignore_index=dataset.ignore_index).numpy()
        return np.append(found, label.size - found.sum())

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return np.stack(list(pool.map(count, range(len(dataset)))))


def distance(p: npt.ArrayLike, q: npt.ArrayLike) -> float:
    """Jensen-Shannon distance of two distributions, given as shares or counts: 0 equal, 1 disjoint.

    The square root of the mean relative entropy, in bits, of both to their mean. NaN where one
    holds nothing.

    Source: Endres, Schindelin, "A new metric for probability distributions", IEEE Transactions on
    Information Theory 49(7), 2003.

    Examples:
        >>> distance([1, 1], [2, 2]), distance([1, 0], [0, 1])
        (0.0, 1.0)
    """
    a, b = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if a.sum() == 0 or b.sum() == 0:
        return float("nan")
    a, b = a / a.sum(), b / b.sum()
    mean = (a + b) / 2

    def entropy(x: npt.NDArray[np.float64]) -> float:
        some = x > 0
        return float((x[some] * np.log2(x[some] / mean[some])).sum())

    return float(np.sqrt(max(0.0, (entropy(a) + entropy(b)) / 2)))


@dataclass(frozen=True)
class SplitCounts:
    """What a split holds.

    Attributes:
        images: number of images.
        pixels: int64 ``[C]``, pixels of each class.
        holding: int64 ``[C]``, images that hold the class.
        void: pixels of no class.
    """

    images: int
    pixels: IntArray
    holding: IntArray
    void: int

    @classmethod
    def of(cls, counts: IntArray) -> SplitCounts:
        """Of what `count_pixels` returns, or some of its rows."""
        pixels = counts[:, :-1]
        return cls(len(counts), pixels.sum(0), (pixels > 0).sum(0), int(counts[:, -1].sum()))

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """Part of the labelled pixels that each class has; NaN without a labelled pixel."""
        with np.errstate(invalid="ignore"):
            return self.pixels / self.pixels.sum()


@dataclass(frozen=True)
class Report:
    """Class frequencies per split. The first split is what the others are compared with.

    Attributes:
        dataset: its name.
        classes: their names.
        splits: name -> counts.
    """

    dataset: str
    classes: tuple[str, ...]
    splits: Mapping[str, SplitCounts]

    def _others(self) -> list[tuple[str, str]]:
        first, *others = self.splits
        return [(first, other) for other in others]

    def distances(self) -> dict[str, float]:
        """Jensen-Shannon distance of the class shares of each other split to the first."""
        return {
            b: distance(self.splits[a].pixels, self.splits[b].pixels) for a, b in self._others()
        }

    def table(self) -> str:
        """Lines for people: shares and images per class and split; sums; distances."""
        width = max(len("images"), *map(len, self.classes))
        names = list(self.splits)
        head = [f"{name} %" for name in names] + [f"{name} images" for name in names]
        head += [f"{b} / {a}" for a, b in self._others()]
        columns = [max(12, len(title) + 2) for title in head]

        def line(name: str, cells: Sequence[str]) -> str:
            padded = (f"{cell:>{size}s}" for cell, size in zip(cells, columns, strict=False))
            return f"{name:{width}s}" + "".join(padded)

        splits = self.splits.values()
        lines = [line("class", head)]
        for c, name in enumerate(self.classes):
            cells = [f"{100 * split.shares[c]:.3f}" for split in splits]
            cells += [str(split.holding[c]) for split in splits]
            cells += [_ratio(self.splits[a], self.splits[b], c) for a, b in self._others()]
            lines.append(line(name, cells))
        void = [split.void / max(1, split.void + split.pixels.sum()) for split in splits]
        lines.append(line("(void)", [f"{100 * share:.3f}" for share in void]))
        lines.append(line("images", [""] * len(names) + [str(split.images) for split in splits]))
        for name, value in self.distances().items():
            lines.append(f"Jensen-Shannon distance of {name} to {names[0]}: {value:.3f}")
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """Where a split differs from the first: see `MAX_DISTANCE` and `MAX_RATIO`.

        A line for the distance, one for the classes that one of both lacks, and one for those whose
        share is uneven, as far as there is something to say.
        """
        found = []
        for a, b in self._others():
            first, other = self.splits[a], self.splits[b]
            value = distance(first.pixels, other.pixels)
            if not value <= MAX_DISTANCE:
                found.append(
                    f"{a} and {b} differ: the Jensen-Shannon distance of their class shares is "
                    f"{value:.3f}, more than {MAX_DISTANCE:g}"
                )
            for one, name, rest in ((first, a, other), (other, b, first)):
                lacking = (one.pixels == 0) & (rest.pixels > 0)
                if lacking.any():
                    found.append(f"{name} has no pixel of: {', '.join(self._names(lacking))}")
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = other.shares / first.shares
            uneven = np.isfinite(ratio) & (ratio > 0)
            uneven &= (ratio > MAX_RATIO) | (ratio < 1 / MAX_RATIO)
            if uneven.any():
                listed = [
                    f"{name} {ratio[c]:.2f}"
                    for c, name in zip(np.flatnonzero(uneven), self._names(uneven), strict=True)
                ]
                found.append(
                    f"uneven classes, share in {b} / share in {a} beyond {1 / MAX_RATIO:g} to "
                    f"{MAX_RATIO:g}: {', '.join(listed)}"
                )
        return found

    def _names(self, chosen: npt.NDArray[np.bool_]) -> list[str]:
        return [self.classes[c] for c in np.flatnonzero(chosen)]

    def to_dict(self) -> dict[str, Any]:
        """Counts, distances and warnings as JSON can hold them."""
        return {
            "dataset": self.dataset,
            "classes": list(self.classes),
            "splits": {
                name: {
                    "images": split.images,
                    "pixels": split.pixels.tolist(),
                    "images_holding": split.holding.tolist(),
                    "void_pixels": split.void,
                }
                for name, split in self.splits.items()
            },
            "jensen_shannon": {
                name: None if np.isnan(value) else value for name, value in self.distances().items()
            },
            "warnings": self.warnings(),
        }

    def save(self, path: str | Path) -> None:
        """Draw the shares as bars, one row per class and one bar per split, as a PNG.

        Needs matplotlib.
        """
        from matplotlib.figure import Figure  # only here: a data set needs no matplotlib

        number, splits = len(self.classes), len(self.splits)
        height = max(3.0, (0.12 + 0.14 * splits) * number + 1.2)  # inches
        figure = Figure(figsize=(9, height), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        rows, thick = np.arange(number), 0.8 / splits
        for place, (name, split) in enumerate(self.splits.items()):
            offset = (place - (splits - 1) / 2) * thick
            axes.barh(
                rows + offset,
                np.nan_to_num(100 * split.shares),
                thick,
                label=f"{name} ({split.images} images)",
            )
        title = f"{self.dataset}: class frequencies"
        if splits > 1:
            listed = ", ".join(f"{name} {value:.3f}" for name, value in self.distances().items())
            title += f"\nJensen-Shannon distance to {next(iter(self.splits))}: {listed}"
        axes.set_yticks(rows, self.classes, fontsize="small" if number <= 40 else "x-small")
        axes.set(
            xscale="log",
            xlabel="share of the labelled pixels, %",
            ylim=(number - 0.4, -0.6),  # the first class on top
            title=title,
        )
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="lower right")
        figure.savefig(path, format="png")


def _ratio(first: SplitCounts, other: SplitCounts, c: int) -> str:
    if first.pixels[c] == 0 or other.pixels[c] == 0:
        return "-"
    return f"{other.shares[c] / first.shares[c]:.2f}"
