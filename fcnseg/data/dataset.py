"""What the data sets share: reading image and label files, label tables, normalisation.

A data set is a list of (image, label) files, a table from the label file's values to train ids, and
the names and colours of the classes. Everything that can be wrong with a file becomes a `DataError`
that names it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

UInt8Array = npt.NDArray[np.uint8]

IGNORE_INDEX = 255
# Table entry of a value that no label file may hold. No data set here has that many classes.
_INVALID = 254

# Mean and standard deviation of ImageNet's RGB channels, for values in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class DataError(ValueError):
    """A data set is not as its layout says; the message names the file or folder."""


class Transform(Protocol):
    """What a data set calls on a decoded pair; see `fcnseg.data.TrainTransform`."""

    def __call__(
        self, image: UInt8Array, label: UInt8Array, *, epoch: int, index: int
    ) -> tuple[UInt8Array, UInt8Array]: ...


def label_table(mapping: Mapping[int, int]) -> UInt8Array:
    """A look-up table ``[256]`` from label values to train ids; other values are marked invalid."""
    table = np.full(256, _INVALID, np.uint8)
    for value, train_id in mapping.items():
        table[value] = train_id
    return table


def read_bytes(path: Path) -> UInt8Array:
    """The file's bytes.

    Raises:
        DataError: the file is missing, unreadable or empty.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if data.size == 0:
        raise DataError(f"{path}: the file is empty")
    return data


def decode(path: Path, data: UInt8Array, flags: int) -> npt.NDArray[Any]:
    """Decode a file's bytes with OpenCV, of the type and number of channels that ``flags`` say.

    Raises:
        DataError: the file is corrupt or truncated.
    """
    # Some versions of OpenCV return what they have of a truncated file, so look for the end.
    content = data.tobytes()
    trailer = {b"\x89P": b"IEND", b"\xff\xd8": b"\xff\xd9"}.get(content[:2], b"")
    try:
        decoded = cv2.imdecode(data, flags) if content.rfind(trailer) >= 0 else None
    except cv2.error:
        decoded = None
    if decoded is None:
        raise DataError(f"{path}: corrupt or truncated, expected a whole PNG or JPEG file")
    return decoded


def read_image(path: Path, *, allow_greyscale: bool = False) -> UInt8Array:
    """Decode a colour image, in the orientation its pixels are stored in.

    Args:
        path: a PNG or JPEG file.
        allow_greyscale: replicate a single channel instead of raising.

    Returns:
        uint8 ``[H, W, 3]``, RGB.

    Raises:
        DataError: the file is missing, corrupt, or has one channel.
    """
    # Annotations follow the stored pixels, so an EXIF rotation must not be applied.
    flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = decode(path, read_bytes(path), flags)
    if image.ndim == 2:
        if not allow_greyscale:
            raise DataError(f"{path}: expected an image of 3 channels (RGB), got 1 channel")
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_GRAY2RGB), dtype=np.uint8)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image), dtype=np.uint8)


def read_label(path: Path) -> UInt8Array:
    """Decode a label file: an 8-bit greyscale PNG whose pixel values are ids.

    Returns:
        uint8 ``[H, W]``, the values as stored.

    Raises:
        DataError: the file is missing, corrupt, or of another kind.
    """
    data = read_bytes(path)
    # A decoder would scale 1- to 4-bit grey levels and replace palette indices by colours, hence
    # the look at the header: bytes 24 and 25 are the bit depth and the colour type (0 is grey).
    if data[:4].tobytes() != b"\x89PNG" or data.size < 26:
        raise DataError(f"{path}: corrupt or not a PNG, expected an 8-bit greyscale PNG of ids")
    depth, kind = int(data[24]), int(data[25])
    if (depth, kind) != (8, 0):
        kinds = {0: "1 channel", 2: "3 channels", 3: "a palette", 4: "2 channels", 6: "4 channels"}
        raise DataError(
            f"{path}: expected a label PNG of 1 channel and 8 bits, "
            f"got {kinds.get(kind, f'colour type {kind}')} and {depth} bits"
        )
    return np.asarray(decode(path, data, cv2.IMREAD_UNCHANGED), dtype=np.uint8)


def list_files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """The folder's files whose names end in one of `suffixes`, sorted.

    Raises:
        DataError: the folder is missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    endings = tuple(suffixes)
    return sorted(path for path in folder.iterdir() if path.name.endswith(endings))


def pairs_by_stem(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Each image of a folder with the PNG of the same stem in another.

    Raises:
        DataError: an image has no label.
    """
    known = set(list_files(labels, [".png"]))
    pairs = []
    for image in list_files(images, [".png", ".jpg", ".jpeg"]):
        label = labels / f"{image.stem}.png"
        if label not in known:
            raise DataError(f"{label}: no such file, expected the label of {image}")
        pairs.append((image, label))
    return pairs


class SegmentationDataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Images with one label per pixel, read from disk.

    Args:
        root: the data set's folder.
        split: one of `splits`.
        transform: called as ``transform(image, label, epoch=, index=)``; None leaves the pair as it
            is on disk.
        split_file: a file that ``python -m fcnseg.data split`` wrote: the split's pairs are those
            that it lists instead of those of the published split.

    Raises:
        DataError: a folder or a label file is missing, or there are no images; the split file is
            not one of this data set, lacks the split, or lists a file that does not exist.
        ValueError: `split` is not known.
    """

    classes: ClassVar[tuple[str, ...]]
    palette: ClassVar[UInt8Array]  # uint8 [num_classes, 3], RGB
    splits: ClassVar[tuple[str, ...]]
    table: ClassVar[UInt8Array]  # uint8 [256], from the label file's values to train ids
    allow_greyscale: ClassVar[bool] = False
    ignore_index: ClassVar[int] = IGNORE_INDEX
    groups: ClassVar[str] = ""  # what `group` names; "" where images do not belong together

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        transform: Transform | None = None,
        *,
        split_file: str | Path | None = None,
    ) -> None:
        self.root = Path(root)
        self.split = split
        self.transform = transform
        # In shared memory, so that set_epoch reaches the copies that persistent workers hold.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        name = type(self).__name__
        if split not in self.splits:
            raise ValueError(f"split: {name} has {', '.join(self.splits)}; got {split!r}")
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder, expected the root of {name}")
        self.files: list[tuple[Path, Path]] = (
            self.find_files()
            if split_file is None
            else _listed_files(Path(split_file), self.root, name, split)
        )
        if not self.files:
            raise DataError(f"{self.root}: no images of {name}'s split {split!r} found")

    def find_files(self) -> list[tuple[Path, Path]]:
        """The (image, label) pairs of the split, in a fixed order."""
        raise NotImplementedError

    @classmethod
    def group(cls, image: Path) -> str:
        """The name of what an image belongs to: images of one group resemble each other."""
        return image.name

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @classmethod
    def file_values(cls) -> UInt8Array:
        """The value of each train id in label files, uint8 ``[num_classes]``: for submissions."""
        return np.array([np.flatnonzero(cls.table == c)[0] for c in range(len(cls.classes))], "u1")

    def submission_name(self, index: int) -> str:
        """What the benchmark calls the file of labels that is predicted for an image."""
        return f"{self.files[index][0].stem}.png"

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentations of an epoch; call it before iterating over the loader."""
        self._epoch.fill_(epoch)

    def load(self, index: int) -> tuple[UInt8Array, UInt8Array]:
        """Read one pair without the transform.

        Returns:
            The image, uint8 ``[H, W, 3]`` RGB, and its train ids, uint8 ``[H, W]``, 255 = void.

        Raises:
            DataError: a file is missing or corrupt, the sizes differ, or a label is not in the
                data set's table.
        """
        image_path, label_path = self.files[index]
        image = read_image(image_path, allow_greyscale=self.allow_greyscale)
        label = self.load_label(index)
        if image.shape[:2] != label.shape:
            raise DataError(
                f"{label_path}: expected the size of {image_path.name}, {image.shape[0]}x"
                f"{image.shape[1]}, got {label.shape[0]}x{label.shape[1]} (height x width)"
            )
        return image, label

    def load_label(self, index: int) -> UInt8Array:
        """The label of a pair alone: train ids, uint8 ``[H, W]``, 255 = void.

        Raises:
            DataError: as `load` does.
        """
        label_path = self.files[index][1]
        values = read_label(label_path)
        label = np.asarray(cv2.LUT(values, self.table), dtype=np.uint8)
        bad = label == _INVALID
        if bad.any():
            y, x = np.unravel_index(int(bad.argmax()), bad.shape)
            allowed = np.flatnonzero(self.table != _INVALID)
            raise DataError(
                f"{label_path}: label value {values[y, x]} at row {y}, column {x} is not one of "
                f"{type(self).__name__}'s ({_ranges(allowed.tolist())})"
            )
        return label

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image, uint8 ``[3, H, W]`` RGB, and target, uint8 ``[H, W]`` train ids."""
        index = range(len(self))[index]  # -1 and len(self) - 1 are augmented alike
        image, label = self.load(index)
        if self.transform is not None:
            image, label = self.transform(image, label, epoch=int(self._epoch), index=index)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)


def _listed_files(path: Path, root: Path, dataset: str, split: str) -> list[tuple[Path, Path]]:
    """The pairs of a split file's split; see `fcnseg.data.split` for the format."""
    text = read_bytes(path).tobytes()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, dict) or "dataset" not in content:
        raise DataError(f"{path}: expected the fields 'dataset' and 'splits' of a split file")
    if content["dataset"] != dataset:
        raise DataError(f"{path}: expected a split of {dataset}, got one of {content['dataset']}")
    if split not in splits:
        raise DataError(f"{path}: expected the split {split!r}, it has {', '.join(splits)}")
    where: dict[str, str] = {}  # the split of each image
    for name, pairs in splits.items():
        if not isinstance(pairs, list):
            raise DataError(f"{path}: split {name!r}: expected a list of [image, label]")
        for pair in pairs:
            if not (
                isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
            ):
                raise DataError(f"{path}: split {name!r}: expected [image, label], got {pair!r}")
            if pair[0] in where:
                raise DataError(f"{path}: {pair[0]} is listed in {where[pair[0]]!r} and {name!r}")
            where[pair[0]] = name
    files = [(root / image, root / label) for image, label in splits[split]]
    missing = [file for pair in files for file in pair if not file.is_file()]
    if missing:
        raise DataError(
            f"{path}: lists {missing[0]}, which does not exist"
            + (f" (nor do {len(missing) - 1} others)" if len(missing) > 1 else "")
        )
    return files


def _ranges(values: list[int]) -> str:
    """``[0, 1, 2, 255]`` as ``0..2, 255``."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


@functools.lru_cache(maxsize=16)
def _affine(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(MEAN, dtype=torch.float64).view(1, 3, 1, 1)
    std = torch.tensor(STD, dtype=torch.float64).view(1, 3, 1, 1)
    return (-mean / std).float().to(device), (1 / (255 * std)).float().to(device)


def normalise(
    images: Tensor,
    memory_format: torch.memory_format = torch.channels_last,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Bytes to what ImageNet's networks expect, on the images' device.

    Equals ``(images / 255 - MEAN) / STD``, computed in float32.

    Args:
        images: uint8 ``[N, 3, H, W]``, RGB.
        memory_format: of the result.
        dtype: of the result, floating point.

    Returns:
        ``[N, 3, H, W]`` of `dtype`.

    Raises:
        TypeError: `images` is not uint8 or `dtype` is not a floating-point type.
        ValueError: `images` has another shape.

    Examples:
        >>> normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
        tensor([2.2489, 2.4286, 2.6400])
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8, got {images.dtype}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected the shape [N, 3, H, W], got {list(images.shape)}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
    shift, scale = _affine(images.device)
    # The layout is changed while a value is one byte.
    images = images.contiguous(memory_format=memory_format)
    return torch.addcmul(shift, images, scale).to(dtype)
