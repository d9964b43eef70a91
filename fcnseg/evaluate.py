"""Scores of predicted label files against ground truth: ``python -m fcnseg.evaluate``.

Two kinds of folders:

* Cityscapes. Class and category IoU and iIoU, bit for bit those of cityscapesscripts'
  ``evalPixelLevelSemanticLabeling``: label ids 0..33, every pixel in the matrix, rows of classes
  that are not evaluated left out of false positives; in iIoU a true pixel weighs the class's
  average instance size over the size of its instance.
* Plain folders with a file of class names: the scores of :mod:`fcnseg.metrics`.

Each pair of files is reduced to integer counts in a pool of processes; the sums and the scores are
made of these counts in the order of the file names, so that neither the number of processes nor a
resumed run changes a digit. A pair that cannot be counted is named, counted and left out.

Source: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016,
section 4.1, and cityscapesscripts 2.3.0.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

import fcnseg
from fcnseg import _command_line, _extension, _labels
from fcnseg.data.cityscapes import TRAIN_ID_TO_LABEL_ID
from fcnseg.data.dataset import DataError, decode, read_bytes
from fcnseg.metrics import Scores, format_scores, save_matrix, scores

IdArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

# Cityscapes' categories with their classes; the label ids count up from 0. (Licence plates have id
# -1, which no label file holds.)
CATEGORIES: dict[str, tuple[str, ...]] = {
    "void": (
        "unlabeled",
        "ego vehicle",
        "rectification border",
        "out of roi",
        "static",
        "dynamic",
        "ground",
    ),
    "flat": ("road", "sidewalk", "parking", "rail track"),
    "construction": ("building", "wall", "fence", "guard rail", "bridge", "tunnel"),
    "object": ("pole", "polegroup", "traffic light", "traffic sign"),
    "nature": ("vegetation", "terrain"),
    "sky": ("sky",),
    "human": ("person", "rider"),
    "vehicle": (
        "car",
        "truck",
        "bus",
        "caravan",
        "trailer",
        "train",
        "motorcycle",
        "bicycle",
    ),
}
CITYSCAPES_CLASSES: tuple[str, ...] = tuple(n for names in CATEGORIES.values() for n in names)
# Label ids of a category, evaluated or not.
_CATEGORY_IDS = {
    category: [CITYSCAPES_CLASSES.index(name) for name in names]
    for category, names in CATEGORIES.items()
}
_CATEGORY_OF = {label: category for category, ids in _CATEGORY_IDS.items() for label in ids}
_EVALUATED = list(TRAIN_ID_TO_LABEL_ID)
# Average pixels per instance in the training set. These are the classes that have instances; all
# classes of the categories "human" and "vehicle" do.
_AVERAGE_INSTANCE_SIZE = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "caravan": 36771.8241758242,
    "trailer": 16926.9763313609,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}
_INSTANCE_CATEGORIES = ("human", "vehicle")
# An instance's id is 1000 times its label id plus its number; up to 1000 a pixel is in no instance.
_INSTANCE_FACTOR = 1000

_TRUTH_SUFFIX = "_gtFine_labelIds.png"
_INSTANCE_SUFFIX = "_gtFine_instanceIds.png"


@dataclass(frozen=True)
class Pair:
    """The files of one image; ``instances`` only where instance scores are wanted."""

    prediction: Path
    truth: Path
    instances: Path | None = None

    def files(self) -> list[Path]:
        return [path for path in (self.prediction, self.truth, self.instances) if path is not None]


@dataclass(frozen=True)
class Counts:
    """What one pair adds.

    Attributes:
        cells: (truth * C + prediction, pixels) of the confusion matrix's cells that are not 0.
        instances: per true instance, by ascending id: (label id, pixels, pixels predicted as its
            class, pixels predicted as a class of its category).
    """

    cells: list[tuple[int, int]]
    instances: list[tuple[int, int, int, int]]


@dataclass(frozen=True)
class Failure:
    """A pair that could not be counted; the reason names the file."""

    truth: Path
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        matrix: int64 ``[C, C]``, rows truth, columns prediction.
        result: the scores as JSON holds them, except that what is undefined is NaN.
        table: the scores for people.
        pairs: number of pairs counted.
        failures: pairs left out.
        unmatched: prediction files without ground truth, which are not evaluated.
    """

    matrix: npt.NDArray[np.int64]
    result: dict[str, Any]
    table: str
    pairs: int
    failures: list[Failure]
    unmatched: list[Path]


# --- files ----------------------------------------------------------------------------------------


def _check_png(path: Path, data: npt.NDArray[np.uint8]) -> None:
    """DataError unless all chunks are whole: decoders return what they can of a damaged file."""
    content = data.tobytes()
    position, kind = 8, b""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR":
        raise DataError(f"{path}: not a PNG file")
    while kind != b"IEND":
        length = int.from_bytes(content[position : position + 4])
        kind = content[position + 4 : position + 8]
        body = content[position + 4 : position + 8 + length]
        checksum = content[position + 8 + length : position + 12 + length]
        if len(checksum) < 4 or zlib.crc32(body) != int.from_bytes(checksum):
            raise DataError(f"{path}: corrupt or truncated, expected a whole PNG file")
        position += 12 + length


def read_ids(path: Path) -> IdArray:
    """Decode a PNG whose pixel values are ids: 8- or 16-bit greyscale, or indices of a palette.

    Returns:
        uint8 or uint16 ``[H, W]``, the values as stored.

    Raises:
        DataError: the file is missing, corrupt, or of another kind.
    """
    data = read_bytes(path)
    _check_png(path, data)
    depth, kind = int(data[24]), int(data[25])  # IHDR: bit depth, colour type (0 grey, 3 palette)
    if kind == 3:
        from PIL import Image  # OpenCV replaces the indices by colours

        try:
            with Image.open(path) as image:
                return np.asarray(image, dtype=np.uint8)
        except (OSError, SyntaxError) as error:
            raise DataError(f"{path}: corrupt: {error}") from error
    if kind != 0 or depth not in (8, 16):
        kinds = {0: "1 channel", 2: "3 channels", 4: "2 channels", 6: "4 channels"}
        raise DataError(
            f"{path}: expected a PNG of ids, of 1 channel with 8 or 16 bits or with a palette, "
            f"got {kinds.get(kind, f'colour type {kind}')} with {depth} bits"
        )
    ids: IdArray = decode(path, data, cv2.IMREAD_UNCHANGED)
    return ids


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    return folder


def find_cityscapes_pairs(
    predictions: str | Path, root: str | Path, split: str = "val"
) -> tuple[list[Pair], list[Failure], list[Path]]:
    """Pairs in the official layout, sorted by ground truth.

    Args:
        predictions: the prediction of ``CITY_SEQ_FRAME_gtFine_labelIds.png`` is the one file
            ``CITY_SEQ_FRAME*.png`` anywhere below this folder.
        root: holds ``gtFine/SPLIT/CITY/*_gtFine_labelIds.png`` and ``*_gtFine_instanceIds.png``.
        split: name of the folder below ``gtFine``.

    Returns:
        Pairs, failures (no prediction, or several), and predictions without ground truth.

    Raises:
        DataError: a folder is missing, or there is no ground truth.
    """
    found = sorted((path.name, path) for path in _folder(predictions).rglob("*.png"))
    names = [name for name, _ in found]
    truth_root = _folder(_folder(root) / "gtFine" / split)
    truths = sorted(truth_root.glob(f"*/*{_TRUTH_SUFFIX}"))
    if not truths:
        raise DataError(f"{truth_root}: no ground truth, expected CITY/*{_TRUTH_SUFFIX}")
    pairs, failures, used = [], [], set()
    for truth in truths:
        stem = truth.name.removesuffix(_TRUTH_SUFFIX)
        start = end = bisect_left(names, stem)
        while end < len(names) and names[end].startswith(stem):
            end += 1
        matches = [path for _, path in found[start:end]]
        used.update(matches)
        if len(matches) == 1:
            instances = truth.with_name(stem + _INSTANCE_SUFFIX)
            pairs.append(Pair(matches[0], truth, instances))
        elif matches:
            listed = ", ".join(map(str, matches))
            failures.append(Failure(truth, f"{truth}: {len(matches)} predictions: {listed}"))
        else:
            failures.append(Failure(truth, f"{truth}: no prediction {stem}*.png"))
    return pairs, failures, [path for _, path in found if path not in used]


def find_plain_pairs(
    predictions: str | Path, truths: str | Path
) -> tuple[list[Pair], list[Failure], list[Path]]:
    """Pairs of PNG files of the same path below two folders, sorted.

    Returns:
        Pairs, failures (no prediction), and predictions without ground truth.

    Raises:
        DataError: a folder is missing, or there is no ground truth.
    """
    prediction_root, truth_root = _folder(predictions), _folder(truths)
    found = {path.relative_to(prediction_root) for path in prediction_root.rglob("*.png")}
    wanted = sorted(path.relative_to(truth_root) for path in truth_root.rglob("*.png"))
    if not wanted:
        raise DataError(f"{truth_root}: no ground truth, expected PNG files")
    pairs, failures = [], []
    for name in wanted:
        truth, prediction = truth_root / name, prediction_root / name
        if name in found:
            pairs.append(Pair(prediction, truth))
        else:
            failures.append(Failure(truth, f"{truth}: no prediction {prediction}"))
    return pairs, failures, [prediction_root / name for name in sorted(found - set(wanted))]


def read_classes(path: str | Path) -> tuple[str, ...]:
    """The class names of a text file, one a line: line i (from 0) names label i.

    Raises:
        DataError: the file is missing or empty, or a line is.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    names = tuple(line.strip() for line in lines)
    if not names or not all(names):
        raise DataError(f"{path}: expected one class name a line, and no empty line")
    return names


# --- counting -------------------------------------------------------------------------------------


def _confusion_matrix(
    prediction: IdArray, truth: IdArray, num_classes: int, ignore_index: int
) -> npt.NDArray[np.int64]:
    """int64 ``[C, C]``; IndexError for a label outside [0, C)."""
    # The counting routines know no uint16.
    labels = [x.astype(np.int32) if x.dtype == np.uint16 else x for x in (prediction, truth)]
    if _extension.pybind is None:
        p, t = (torch.from_numpy(np.require(x, requirements="W")) for x in labels)
        counted = fcnseg.confusion_matrix(p, t, num_classes, ignore_index=ignore_index)
        return np.asarray(counted.numpy(), dtype=np.int64)
    matrix, bad = _extension.pybind.confusion_matrix(*labels, num_classes, ignore_index)
    count, position, value, in_prediction = bad
    if count:
        name = "prediction" if in_prediction else "target"
        where = _labels.unravel(position, truth.shape)
        raise IndexError(_labels.error_message(name, count, value, where, num_classes))
    return np.asarray(matrix, dtype=np.int64)


def _count_instances(
    path: Path, instances: IdArray, prediction: IdArray
) -> list[tuple[int, int, int, int]]:
    """`Counts.instances` of an image whose predictions are label ids."""
    inside = np.flatnonzero(instances > _INSTANCE_FACTOR)
    ids, predicted = instances.ravel()[inside], prediction.ravel()[inside]
    # Neighbours mostly agree, so count runs of equal (instance, prediction) by their lengths.
    is_start = np.ones(len(ids), bool)
    is_start[1:] = (ids[1:] != ids[:-1]) | (predicted[1:] != predicted[:-1])
    starts = np.flatnonzero(is_start)
    lengths = np.diff(starts, append=len(ids))
    present, rank = np.unique(ids[starts], return_inverse=True)
    num_classes = len(CITYSCAPES_CLASSES)
    # [instance, predicted label]: one pass whatever the number of instances.
    table = np.bincount(
        rank * num_classes + predicted[starts], lengths, minlength=len(present) * num_classes
    ).reshape(-1, num_classes)
    counted = []
    for instance, row in zip(present.tolist(), table, strict=True):
        label = instance // _INSTANCE_FACTOR
        if label < num_classes and _CATEGORY_OF[label] == "void":
            continue
        if label >= num_classes or CITYSCAPES_CLASSES[label] not in _AVERAGE_INSTANCE_SIZE:
            raise DataError(
                f"{path}: instance id {instance}, but label id {label} has no instances"
            )
        category = _CATEGORY_IDS[_CATEGORY_OF[label]]
        counted.append((label, int(row.sum()), int(row[label]), int(row[category].sum())))
    return counted


def count_pair(pair: Pair, num_classes: int, ignore_index: int) -> Counts:
    """Read the files of a pair and count.

    Args:
        pair: with ``instances``, its labels are Cityscapes' label ids.
        num_classes: C; labels are 0 to C - 1.
        ignore_index: pixels of this true label are not counted.

    Raises:
        DataError: a file is missing, corrupt, of another size than the others, or holds a value
            that it must not; names the file.
    """
    truth, prediction = read_ids(pair.truth), read_ids(pair.prediction)
    instances = None if pair.instances is None else read_ids(pair.instances)
    others = [(pair.prediction, prediction), (pair.instances, instances)]
    for path, array in others:
        if array is not None and array.shape != truth.shape:
            sizes = [f"{a.shape[1]}x{a.shape[0]}" for a in (array, truth)]
            raise DataError(f"{path}: size {sizes[0]}, but {pair.truth} has {sizes[1]}")
    try:
        matrix = _confusion_matrix(prediction, truth, num_classes, ignore_index)
    except IndexError as error:
        raise DataError(f"{pair.prediction} (prediction), {pair.truth} (target): {error}") from None
    flat = matrix.ravel()
    cells = [(int(cell), int(flat[cell])) for cell in np.flatnonzero(flat)]
    if pair.instances is None or instances is None:
        return Counts(cells, [])
    return Counts(cells, _count_instances(pair.instances, instances, prediction))


def _count_or_fail(pair: Pair, num_classes: int, ignore_index: int) -> Counts | Failure:
    try:
        return count_pair(pair, num_classes, ignore_index)
    except DataError as error:
        return Failure(pair.truth, str(error))


def _start_worker() -> None:
    # One thread per process: the pool is the parallelism, and the threads of the forked parent's
    # pools do not exist here.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


class _Cache:
    """Counts of finished pairs in a file of JSON lines, found again by path, size and time.

    The first line tells the settings. Lines are appended as pairs finish; what a killed run left
    half-written is no valid JSON, is passed over, and its pair is counted again.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.known: dict[str, Counts] = {}
        header = json.dumps({"fcnseg.evaluate": 1, **settings})
        existing = path.read_text(errors="replace").splitlines() if path.exists() else []
        # A run killed at once leaves less than the first line.
        if existing and existing[0] != header and not header.startswith("\n".join(existing)):
            raise DataError(f"{path}: not a cache of this evaluation; delete it or name another")
        for line in existing[1:]:
            try:
                key, cells, instances = json.loads(line)
            except ValueError:
                continue
            self.known[key] = Counts([tuple(x) for x in cells], [tuple(x) for x in instances])
        self._file = open(path, "a" if len(existing) > 1 else "w")  # noqa: SIM115
        # After a torn line, a new one.
        self._file.write("\n" if len(existing) > 1 else header + "\n")

    @staticmethod
    def key(pair: Pair) -> str | None:
        """None where a file is missing."""
        try:
            stats = [(str(path.resolve()), path.stat()) for path in pair.files()]
        except OSError:
            return None
        return json.dumps([[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats])

    def add(self, key: str, counts: Counts) -> None:
        self._file.write(json.dumps([key, counts.cells, counts.instances]) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def count_pairs(
    pairs: Sequence[Pair],
    num_classes: int,
    ignore_index: int = 255,
    *,
    workers: int | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> list[Counts | Failure]:
    """`count_pair` of many pairs, in their order, with a failure in place of a DataError.

    Args:
        pairs, num_classes, ignore_index: as for `count_pair`.
        workers: number of processes, None for one per available core; 1 counts in this process.
        cache: a file that keeps the counts of pairs; a pair whose files have not changed since is
            not read again.
        progress: show a bar on stderr.

    Raises:
        ValueError: ``workers`` is less than 1.
        DataError: ``cache`` is a file of another kind or of other settings.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        workers = workers or os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    settings = {"num_classes": num_classes, "ignore_index": ignore_index}
    store = None if cache is None else _Cache(Path(cache), settings)
    keys = [None if store is None else store.key(pair) for pair in pairs]
    known = {} if store is None else store.known
    results: list[Counts | Failure | None] = [known.get(key) if key else None for key in keys]
    todo = [index for index, result in enumerate(results) if result is None]
    count = functools.partial(_count_or_fail, num_classes=num_classes, ignore_index=ignore_index)

    def counted() -> Iterator[Counts | Failure]:
        work = [pairs[index] for index in todo]
        if min(workers, len(work)) <= 1:
            yield from map(count, work)
            return
        with ProcessPoolExecutor(min(workers, len(work)), initializer=_start_worker) as pool:
            yield from pool.map(count, work)

    bar = tqdm(total=len(pairs), initial=len(pairs) - len(todo), disable=not progress, unit="image")
    try:
        for index, result in zip(todo, counted(), strict=True):
            results[index] = result
            key = keys[index]
            if store is not None and key is not None and isinstance(result, Counts):
                store.add(key, result)
            bar.update()
    finally:
        bar.close()
        if store is not None:
            store.close()
    return [result for result in results if result is not None]


def _split(results: Iterable[Counts | Failure]) -> tuple[list[Counts], list[Failure]]:
    counts: list[Counts] = []
    failures: list[Failure] = []
    for result in results:
        if isinstance(result, Counts):
            counts.append(result)
        else:
            failures.append(result)
    return counts, failures


def _sorted(failures: Iterable[Failure]) -> list[Failure]:
    return sorted(failures, key=lambda failure: failure.truth)


def _sum_matrix(counts: Iterable[Counts], num_classes: int) -> npt.NDArray[np.int64]:
    matrix = np.zeros(num_classes * num_classes, np.int64)
    for pair in counts:
        for cell, pixels in pair.cells:
            matrix[cell] += pixels
    return matrix.reshape(num_classes, num_classes)


# --- scores ---------------------------------------------------------------------------------------


def _iou(hits: float, wrong: float, missed: float) -> float:
    union = hits + wrong + missed  # in the order of cityscapesscripts: the weighted are floats
    return hits / union if union else math.nan


def _average(values: Iterable[float]) -> float:
    total, valid = 0.0, 0
    for value in values:  # sum() compensates for rounding since Python 3.12, cityscapesscripts not
        if not math.isnan(value):
            total, valid = total + value, valid + 1
    return total / valid if valid else math.nan


def cityscapes_scores(counts: Sequence[Counts]) -> dict[str, Any]:
    """Cityscapes' scores with the keys of cityscapesscripts' result file; NaN where undefined.

    Args:
        counts: of the pairs, in an order that fixes the last digit of iIoU.

    Returns:
        ``classScores``, ``classInstScores``, ``categoryScores``, ``categoryInstScores`` by name;
        ``averageScoreClasses``, ``averageScoreInstClasses``, ``averageScoreCategories``,
        ``averageScoreInstCategories``; ``priors``, ``labels``, ``confMatrix``.
    """
    names = CITYSCAPES_CLASSES
    matrix = _sum_matrix(counts, len(names))
    # Weighted true positives and false negatives, one instance after another.
    hits = dict.fromkeys((*names, *CATEGORIES), 0.0)
    misses = dict(hits)
    for pair in counts:
        for label, size, class_hits, category_hits in pair.instances:
            if label not in _EVALUATED:
                continue
            weight = _AVERAGE_INSTANCE_SIZE[names[label]] / float(size)
            for name, found in (
                (names[label], class_hits),
                (_CATEGORY_OF[label], category_hits),
            ):
                hits[name] += float(found) * weight
                misses[name] += float(size - found) * weight

    def pixels(rows: Iterable[int], columns: Iterable[int]) -> int:
        return int(matrix[np.ix_(list(rows), list(columns))].sum())

    everything = range(len(names))
    class_scores, class_instance_scores = {}, {}
    for label, name in enumerate(names):
        class_scores[name] = class_instance_scores[name] = math.nan
        if label not in _EVALUATED:
            continue
        true = pixels([label], [label])
        missed = pixels([label], everything) - true
        wrong = pixels([other for other in _EVALUATED if other != label], [label])
        class_scores[name] = _iou(true, wrong, missed)
        if name in _AVERAGE_INSTANCE_SIZE:
            class_instance_scores[name] = _iou(hits[name], wrong, misses[name])
    category_scores, category_instance_scores = {}, {}
    for category, ids in _CATEGORY_IDS.items():
        inside = [label for label in ids if label in _EVALUATED]
        outside = [label for label in _EVALUATED if label not in ids]
        true = pixels(inside, inside)
        missed = pixels(inside, everything) - true
        category_scores[category] = _iou(true, pixels(outside, inside), missed)
        category_instance_scores[category] = math.nan
        if category in _INSTANCE_CATEGORIES:
            wrong = pixels(outside, ids)  # here also as a class that is not evaluated
            category_instance_scores[category] = _iou(hits[category], wrong, misses[category])
    total = int(matrix.sum())
    return {
        "confMatrix": matrix.tolist(),
        "priors": {
            name: int(matrix[label].sum()) / total if total else math.nan
            for label, name in enumerate(names)
        },
        "labels": {name: label for label, name in enumerate(names)},
        "classScores": class_scores,
        "classInstScores": class_instance_scores,
        "categoryScores": category_scores,
        "categoryInstScores": category_instance_scores,
        "averageScoreClasses": _average(class_scores.values()),
        "averageScoreInstClasses": _average(class_instance_scores.values()),
        "averageScoreCategories": _average(category_scores.values()),
        "averageScoreInstCategories": _average(category_instance_scores.values()),
    }


def cityscapes_table(result: dict[str, Any]) -> str:
    """The tables that cityscapesscripts prints (its nIoU is the iIoU of the publication)."""
    blocks = []
    evaluated = [CITYSCAPES_CLASSES[label] for label in _EVALUATED]
    for title, kind, average, names in (
        ("classes", "class", "Classes", evaluated),
        ("categories", "category", "Categories", [name for name in CATEGORIES if name != "void"]),
    ):
        line = "-" * 32
        rows = [f"{title:<17s}IoU      nIoU", line]
        for name in names:
            values = result[f"{kind}Scores"][name], result[f"{kind}InstScores"][name]
            rows.append(f"{name:<14}: {values[0]:>5.3f}    {values[1]:>5.3f}")
        values = result[f"averageScore{average}"], result[f"averageScoreInst{average}"]
        rows += [line, f"Score Average : {values[0]:5.3f}    {values[1]:5.3f}", line]
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def evaluate_cityscapes(
    predictions: str | Path,
    root: str | Path,
    split: str = "val",
    *,
    workers: int | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score predictions of Cityscapes as cityscapesscripts does.

    Args:
        predictions, root, split: as for `find_cityscapes_pairs`; pixel values are label ids.
        workers, cache, progress: as for `count_pairs`.

    Returns:
        An `Evaluation` whose ``result`` is that of `cityscapes_scores`.

    Raises:
        DataError: a folder is missing, there is no ground truth, or ``cache`` is another file.
        ValueError: ``workers`` is less than 1.
    """
    pairs, unpaired, unmatched = find_cityscapes_pairs(predictions, root, split)
    num_classes = len(CITYSCAPES_CLASSES)
    counts, failures = _split(
        count_pairs(pairs, num_classes, -1, workers=workers, cache=cache, progress=progress)
    )
    result = cityscapes_scores(counts)
    return Evaluation(
        matrix=_sum_matrix(counts, num_classes),
        result=result,
        table=cityscapes_table(result),
        pairs=len(counts),
        failures=_sorted(unpaired + failures),
        unmatched=unmatched,
    )


def _without_class(result: Scores, label: int) -> Scores:
    """The scores with one class left out of the means, as if it were absent."""
    iou, dice = result.iou.clone(), result.dice.clone()
    iou[label] = dice[label] = math.nan
    return dataclasses.replace(
        result,
        iou=iou,
        dice=dice,
        mean_iou=iou.nanmean().item(),
        mean_dice=dice.nanmean().item(),
    )


def evaluate_folders(
    predictions: str | Path,
    truths: str | Path,
    classes: Sequence[str],
    ignore_index: int = 255,
    *,
    workers: int | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score folders of label files with the scores of :func:`fcnseg.metrics.scores`.

    Args:
        predictions, truths: as for `find_plain_pairs`; pixel values are labels 0 to C - 1.
        classes: the C names.
        ignore_index: true label of pixels that do not count. If it is the label of a class (say, 0
            of ADE20K's files), this class has no score; predicting it is wrong.
        workers, cache, progress: as for `count_pairs`.

    Returns:
        An `Evaluation` whose ``result`` has ``classScores`` (IoU), ``classDice`` and
        ``classAccuracy`` by name, ``meanIoU``, ``meanDice``, ``meanAccuracy``, ``pixelAccuracy``,
        ``frequencyWeightedIoU`` and ``confMatrix``.

    Raises:
        DataError: a folder is missing, there is no ground truth, or ``cache`` is another file.
        ValueError: ``workers`` is less than 1.
    """
    pairs, unpaired, unmatched = find_plain_pairs(predictions, truths)
    counts, failures = _split(
        count_pairs(
            pairs, len(classes), ignore_index, workers=workers, cache=cache, progress=progress
        )
    )
    matrix = _sum_matrix(counts, len(classes))
    result = scores(torch.from_numpy(matrix))
    if 0 <= ignore_index < len(classes):
        result = _without_class(result, ignore_index)
    return Evaluation(
        matrix=matrix,
        result={
            "classScores": dict(zip(classes, result.iou.tolist(), strict=True)),
            "classDice": dict(zip(classes, result.dice.tolist(), strict=True)),
            "classAccuracy": dict(zip(classes, result.accuracy.tolist(), strict=True)),
            "meanIoU": result.mean_iou,
            "meanDice": result.mean_dice,
            "meanAccuracy": result.mean_accuracy,
            "pixelAccuracy": result.pixel_accuracy,
            "frequencyWeightedIoU": result.frequency_weighted_iou,
            "confMatrix": matrix.tolist(),
        },
        table=format_scores(result, classes),
        pairs=len(counts),
        failures=_sorted(unpaired + failures),
        unmatched=unmatched,
    )


# --- command line ---------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fcnseg.evaluate",
        description="Scores predicted label files. Without --classes: Cityscapes, class and "
        "category IoU and iIoU as cityscapesscripts computes them. Exit code 1 if a pair could not "
        "be evaluated.",
    )
    parser.add_argument(
        "predictions",
        help="folder of PNG files of label ids; Cityscapes: CITY_SEQ_FRAME*.png anywhere below it; "
        "with --classes: the names of the ground truth's files",
    )
    parser.add_argument(
        "truth",
        help="Cityscapes: the folder that holds gtFine/; with --classes: a folder of PNG files",
    )
    parser.add_argument("--split", default="val", help="of Cityscapes (default: %(default)s)")
    parser.add_argument("--classes", help="text file: line i, from 0, is the name of label i")
    parser.add_argument(
        "--ignore-index",
        type=int,
        default=255,
        help="with --classes: true label of pixels that do not count (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--cache", help="file that keeps finished pairs; resumes from it")
    parser.add_argument("--json", help="file to write the scores to")
    parser.add_argument("--matrix", help="PNG file to draw the normalised confusion matrix to")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _finite(value: Any) -> Any:
    """The same with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 1 if a pair could not be evaluated."""
    parser = _parser()
    options = parser.parse_args(arguments)
    common = {"workers": options.workers, "cache": options.cache, "progress": not options.quiet}
    try:
        classes: Sequence[str] = CITYSCAPES_CLASSES
        if options.classes is None:
            found = evaluate_cityscapes(options.predictions, options.truth, options.split, **common)
        else:
            classes = read_classes(options.classes)
            found = evaluate_folders(
                options.predictions, options.truth, classes, options.ignore_index, **common
            )
        try:  # the files first: nobody may read the whole table
            if options.json is not None:
                failed = [{"truth": str(f.truth), "reason": f.reason} for f in found.failures]
                content = {**found.result, "pairs": found.pairs, "failed": failed}
                Path(options.json).write_text(json.dumps(_finite(content), indent=2) + "\n")
            if options.matrix is not None:
                save_matrix(options.matrix, torch.from_numpy(found.matrix), classes)
        finally:  # where a file cannot be written, the table is all there is
            if found.pairs:
                print(found.table)
    except (ValueError, OSError) as error:  # DataError is a ValueError
        parser.error(str(error))
    total = found.pairs + len(found.failures)
    print(f"{found.pairs} of {total} pairs evaluated")
    for path in found.unmatched:
        print(f"note: {path}: no ground truth, not evaluated", file=sys.stderr)
    for failure in found.failures:
        print(f"error: {failure.reason}", file=sys.stderr)
    if found.failures:
        print(
            f"error: {len(found.failures)} of {total} pairs could not be evaluated; "
            "the scores leave them out",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    _command_line.run(main)
