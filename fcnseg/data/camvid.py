"""CamVid: driving video of Cambridge, 480x360, 11 classes.

Source: Brostow, Fauqueur, Cipolla, "Semantic object classes in video", Pattern Recognition Letters
30(2), 2009, with the 11 classes of Badrinarayanan et al., "SegNet", TPAMI 2017.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .dataset import IGNORE_INDEX, DataError, SegmentationDataset, label_table, pairs_by_stem

_CLASSES = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign symbol", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)


class CamVid(SegmentationDataset):
    """CamVid, label values 0..10 = classes, 11 and 255 = void.

    Reads ``{split}/images`` with ``{split}/labels``, or the public layout ``{split}`` with
    ``{split}annot``; image (PNG or JPEG) and label (PNG) have the same stem. Arguments and errors
    are `SegmentationDataset`'s.
    """

    splits = ("train", "val", "test")
    classes = tuple(name for name, _ in _CLASSES)
    palette = np.array([colour for _, colour in _CLASSES], np.uint8)
    table = label_table(
        {value: value for value in range(11)} | {11: IGNORE_INDEX, 255: IGNORE_INDEX}
    )
    groups = "video sequences"

    @classmethod
    def group(cls, image: Path) -> str:
        return image.stem.partition("_")[0]  # 0016E5_00390 is a frame of sequence 0016E5

    def find_files(self) -> list[tuple[Path, Path]]:
        for images, labels in (
            (self.root / self.split / "images", self.root / self.split / "labels"),
            (self.root / self.split, self.root / f"{self.split}annot"),
        ):
            if images.is_dir() and labels.is_dir():
                return pairs_by_stem(images, labels)
        raise DataError(
            f"{self.root}: expected {self.split}/images with {self.split}/labels, "
            f"or {self.split} with {self.split}annot"
        )
