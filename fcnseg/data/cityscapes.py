"""Cityscapes, fine annotations: street scenes of 50 cities, 2048x1024, 19 evaluated classes.

Source: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016.
Ids, names and colours are the data set's own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .dataset import IGNORE_INDEX, DataError, SegmentationDataset, label_table, list_files

# (label id in gtFine_labelIds, name, colour); a class's train id is its place in this list.
_CLASSES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
TRAIN_ID_TO_LABEL_ID: tuple[int, ...] = tuple(label_id for label_id, _, _ in _CLASSES)

# Ids 0..33 exist; those not evaluated are void. The licence plate's id -1 is 255 in a byte.
_LABEL_ID_TO_TRAIN_ID = {label_id: IGNORE_INDEX for label_id in (*range(34), 255)} | {
    label_id: train_id for train_id, label_id in enumerate(TRAIN_ID_TO_LABEL_ID)
}

_IMAGE_SUFFIX = "_leftImg8bit.png"
_LABEL_SUFFIX = "_gtFine_labelIds.png"


class Cityscapes(SegmentationDataset):
    """Cityscapes with fine annotations, label ids mapped to the 19 train ids.

    Reads ``leftImg8bit/{split}/{city}/NAME_leftImg8bit.png`` with
    ``gtFine/{split}/{city}/NAME_gtFine_labelIds.png``. Arguments and errors are
    `SegmentationDataset`'s.
    """

    splits = ("train", "val", "test")
    classes = tuple(name for _, name, _ in _CLASSES)
    palette = np.array([colour for _, _, colour in _CLASSES], np.uint8)
    table = label_table(_LABEL_ID_TO_TRAIN_ID)
    groups = "cities"

    @classmethod
    def group(cls, image: Path) -> str:
        return image.parent.name

    def find_files(self) -> list[tuple[Path, Path]]:
        image_root = self.root / "leftImg8bit" / self.split
        label_root = self.root / "gtFine" / self.split
        for folder in (image_root, label_root):
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder, expected one folder per city in it")
        pairs = []
        for city in sorted(path for path in image_root.iterdir() if path.is_dir()):
            labels = label_root / city.name
            known = set(list_files(labels, [_LABEL_SUFFIX]))
            for image in list_files(city, [_IMAGE_SUFFIX]):
                label = labels / (image.name.removesuffix(_IMAGE_SUFFIX) + _LABEL_SUFFIX)
                if label not in known:
                    raise DataError(f"{label}: no such file, expected the label of {image}")
                pairs.append((image, label))
        return pairs

    def submission_name(self, index: int) -> str:
        # CITY_SEQ_FRAME*.png: the rest of the name is free.
        return f"{self.files[index][0].name.removesuffix(_IMAGE_SUFFIX)}_pred_labelIds.png"
