"""A new division of a data set into splits with like class frequencies.

A split file is JSON: ``dataset`` (the loader's name), how it was made (``seed``, ``grouped``,
``chunk``) and ``splits``, which maps each name to its [image, label] pairs, relative to the data
set's root. Every loader takes it as ``split_file``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .dataset import DataError, SegmentationDataset

IntArray = npt.NDArray[np.int64]


def group_images(
    dataset: type[SegmentationDataset], images: Sequence[Path], chunk: int | None = None
) -> list[str]:
    """The group of each image: Cityscapes' city, CamVid's video sequence.

    Args:
        dataset: the data set's class.
        images: any order.
        chunk: cut each group, sorted by file name, into runs of this many images, which then are
            the groups. Neighbouring frames part only where one run ends and the next begins.

    Raises:
        ValueError: the data set knows no groups, or `chunk` is below 1.
    """
    if not dataset.groups:
        raise ValueError(f"groups: the images of {dataset.__name__} belong to none")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected at least 1 image, got {chunk}")
    names = [dataset.group(image) for image in images]
    if chunk is None:
        return names
    seen: dict[str, int] = {}
    runs = [""] * len(images)
    for index in sorted(range(len(images)), key=lambda i: images[i].name):
        name = names[index]
        runs[index] = f"{name} {seen.setdefault(name, 0) // chunk}"
        seen[name] += 1
    return runs


def stratify(
    counts: IntArray, sizes: Sequence[int], groups: Sequence[str] | None = None, *, seed: int = 0
) -> IntArray:
    """Divide images so that all splits have like class frequencies.

    Groups are dealt out one by one, those with the most of what is rare first (in powers of two, in
    random order among equals), each to the split that brings all splits closest to their due part
    of every class and of the images; then groups of two splits change places where that brings
    them closer still. A split is filled up to its size; where groups do not fit, it comes as close
    as they allow. The same arguments give the same result.

    Args:
        counts: ``[n, C]``, pixels of each class in each image.
        sizes: images that each split should have; their sum is n.
        groups: a name per image; images of one name stay together. None: each image on its own.
        seed: of the random order, not negative.

    Returns:
        int64 ``[n]``, the split of each image, 0 to ``len(sizes) - 1``.

    Raises:
        ValueError: the sizes are not positive or do not sum to n, there is not one group per image,
            or there are fewer groups than splits.

    Source:
        The order and the due parts follow Sechidis, Tsoumakas, Vlahavas, "On the Stratification of
        Multi-Label Data", ECML PKDD 2011; here a class counts by its pixels, not by its presence.

    Examples:
        >>> counts = np.array([[9, 0], [9, 1], [9, 0], [9, 1]])
        >>> split = stratify(counts, [2, 2])
        >>> [int(counts[split == s, 1].sum()) for s in (0, 1)]
        [1, 1]
    """
    n = len(counts)
    if min(sizes, default=0) < 1 or sum(sizes) != n:
        raise ValueError(f"sizes: expected positive numbers that sum to {n}, got {list(sizes)}")
    if seed < 0:
        raise ValueError(f"seed: expected a number >= 0, got {seed}")
    names = [str(i) for i in range(n)] if groups is None else list(groups)
    if len(names) != n:
        raise ValueError(f"groups: expected one per image, {n}, got {len(names)}")
    _, member = np.unique(names, return_inverse=True)
    number = int(member.max()) + 1
    if number < len(sizes):
        raise ValueError(f"groups: {number} cannot fill {len(sizes)} splits")

    # What each group holds of all there is: of every class that occurs, and of the images.
    held = np.zeros((number, counts.shape[1] + 1))
    np.add.at(held, member, np.column_stack([counts, np.ones(n, np.int64)]))
    total = held.sum(0)
    images = held[:, -1].astype(np.int64)
    part = held[:, total > 0] / total[total > 0]  # [groups, classes + 1], columns sum to 1
    due = np.array(sizes)[:, None] / n  # [splits, 1]

    rng = np.random.default_rng(seed)
    order = rng.permutation(number)
    rarity = np.floor(np.log2(part.sum(1)))
    order = order[np.argsort(-rarity[order], kind="stable")]
    assigned = np.full(number, -1)
    got = np.zeros((len(sizes), part.shape[1]))
    room = np.array(sizes)
    for place, group in enumerate(order):
        # The later groups must be able to give every split that is empty at least one.
        empty = [s for s in range(len(sizes)) if not (assigned == s).any()]
        allowed = empty if len(order) - place <= len(empty) else range(len(sizes))
        fitting = [s for s in allowed if room[s] >= images[group]]
        if not fitting:
            most = max(room[s] for s in allowed)
            fitting = [s for s in allowed if room[s] == most]
        # The squared distance to what is due, relative to it; only the changed split's part.
        costs = [
            (((got[s] + part[group] - due[s]) ** 2 - (got[s] - due[s]) ** 2) / due[s]).sum()
            for s in fitting
        ]
        split = fitting[int(np.argmin(costs))]
        assigned[group] = split
        got[split] += part[group]
        room[split] -= images[group]
    _exchange(assigned, part, images, due, rng)
    return assigned[member]


# Rounds, one exchange each, and the groups of a split that a round looks at: seconds at the most,
# also for 20,000 images of 150 classes.
_ROUNDS, _CANDIDATES = 300, 300


def _exchange(
    assigned: IntArray,
    part: npt.NDArray[np.float64],
    images: IntArray,
    due: npt.NDArray[np.float64],
    rng: np.random.Generator,
) -> None:
    """Lets groups of the same number of images change places, the best exchange of each round.

    With x the part of the one and y that of the other group, and r = got - due of their splits s
    and t, an exchange changes the cost by
    ``|y - x|^2 (1 / due_s + 1 / due_t) + 2 (y - x) . (r_s / due_s - r_t / due_t)``.
    """
    splits = len(due)
    for _ in range(_ROUNDS):
        best, exchange = -1e-12, (-1, -1)  # less is rounding
        members = [rng.permutation(np.flatnonzero(assigned == s)) for s in range(splits)]
        rest = np.array([part[group].sum(0) for group in members]) / due - 1
        for s, t in itertools.combinations(range(splits), 2):
            a, b = members[s][:_CANDIDATES], members[t][:_CANDIDATES]
            x, y = part[a], part[b]
            pull = rest[s] - rest[t]
            change = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T  # [a, b]
            change *= (1 / due[s] + 1 / due[t]).item()
            change += 2 * (y @ pull - (x @ pull)[:, None])
            change[images[a][:, None] != images[b]] = np.inf
            i, j = np.unravel_index(int(change.argmin()), change.shape)
            if change[i, j] < best:
                best, exchange = float(change[i, j]), (int(a[i]), int(b[j]))
        if exchange[0] >= 0:
            assigned[list(exchange)] = assigned[list(exchange[::-1])]
        elif max(map(len, members)) <= _CANDIDATES:
            return  # none of all exchanges helps


def write_split(
    path: str | Path,
    dataset: SegmentationDataset,
    splits: Mapping[str, Sequence[tuple[Path, Path]]],
    **made: Any,
) -> None:
    """Write a split file; nothing is ever overwritten.

    Args:
        path: the file to make.
        dataset: any split of the data set, for its root and kind.
        splits: the (image, label) pairs of each split, below the root.
        made: how the split was made, plain values for JSON.

    Raises:
        DataError: the file exists already.
    """
    content = {
        "dataset": type(dataset).__name__,
        **made,
        "splits": {
            name: [[file.relative_to(dataset.root).as_posix() for file in pair] for pair in pairs]
            for name, pairs in splits.items()
        },
    }
    text = json.dumps(content, indent=1)
    try:
        with open(path, "x") as file:
            file.write(text + "\n")
    except FileExistsError:
        raise DataError(f"{path}: exists already; remove it or choose another name") from None
