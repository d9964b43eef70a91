"""ADE20K, the scene parsing benchmark: indoor and outdoor scenes of any size, 150 classes.

Source: Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017. A class carries the first of
its names in the benchmark's list.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .dataset import IGNORE_INDEX, SegmentationDataset, UInt8Array, label_table, pairs_by_stem

_CLASSES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion,
base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace,
refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway,
river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove,
palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light,
truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track,
apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall,
tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal,
bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""


def _palette(num_classes: int) -> UInt8Array:
    """Distinct colours: the bits of ``class + 1``, three at a time, from the high bit of RGB down.

    The rule of PASCAL VOC's colour map, not the benchmark's own colours.
    """
    ids = np.arange(1, num_classes + 1)
    colours = np.zeros((num_classes, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            if 3 * bit + channel < 8:
                colours[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(
                    np.uint8
                )
    return colours


class ADE20K(SegmentationDataset):
    """ADE20K's scene parsing benchmark: label values 1..150 become 0..149, and 0 becomes 255.

    Reads ``images/training`` with ``annotations/training`` (split ``"train"``) and
    ``images/validation`` with ``annotations/validation`` (split ``"val"``); image (JPEG or PNG) and
    label (PNG) have the same stem. A few of its images are greyscale. Arguments and errors are
    `SegmentationDataset`'s.
    """

    splits = ("train", "val")
    classes = tuple(name.strip() for name in _CLASSES.replace("\n", " ").split(","))
    palette = _palette(len(classes))
    table = label_table({0: IGNORE_INDEX} | {value: value - 1 for value in range(1, 151)})
    allow_greyscale = True

    def find_files(self) -> list[tuple[Path, Path]]:
        folder = {"train": "training", "val": "validation"}[self.split]
        return pairs_by_stem(self.root / "images" / folder, self.root / "annotations" / folder)
