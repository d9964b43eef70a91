"""Procedural street scenes, written in the layout of Cityscapes.

A stand-in for a real data set: a run without data goes through the very loader that real data
takes. A scene is a straight street in world coordinates (metres: x right, y up, z ahead of the
camera) that a pinhole camera projects; surfaces are painted from far to near, each into the image
with its colour and into the label map with its Cityscapes label id. All sizes follow from the
world, so that a scene looks alike at every resolution.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from .dataset import DataError, UInt8Array

# Label ids of Cityscapes, named.
_EGO_VEHICLE, _OUT_OF_ROI, _STATIC, _DYNAMIC, _GROUND = 1, 3, 4, 5, 6
_ROAD, _SIDEWALK, _PARKING = 7, 8, 9
_BUILDING, _WALL, _FENCE, _POLE, _TRAFFIC_LIGHT, _TRAFFIC_SIGN = 11, 12, 13, 17, 19, 20
_VEGETATION, _TERRAIN, _SKY, _PERSON, _RIDER, _CAR = 21, 22, 23, 24, 25, 26
_TRUCK, _BUS, _TRAIN, _MOTORCYCLE, _BICYCLE = 27, 28, 31, 32, 33

# Raise it when the drawing changes: a data set of another version is not reused.
_VERSION = 1
_SPLITS = ("train", "val")
_MANIFEST = "synthetic.json"
_FAR = 90.0  # metres; nothing is drawn beyond
_NEAR = 2.5

Colour = Sequence[float] | npt.NDArray[np.float64]
Point = tuple[float, float, float]


class _Canvas:
    """An image and its label map behind one camera; colours are RGB, 0..255, in full daylight."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator) -> None:
        self.height, self.width = size
        self.image = np.zeros((*size, 3), np.uint8)
        self.label = np.zeros(size, np.uint8)
        self.focal = 0.55 * self.width
        self.centre = self.width * rng.uniform(0.44, 0.56)
        self.horizon = self.height * rng.uniform(0.40, 0.46)
        self.eye = rng.uniform(1.3, 1.6)  # the camera's height above the road
        grey = rng.uniform(170, 205)
        self.haze = np.array([grey, grey + 3, grey + rng.uniform(5, 20)])
        self.visibility = rng.uniform(70, 200)

    def pixels(self, metres: float, z: float) -> float:
        """The length in pixels of something at distance z."""
        return self.focal * metres / z

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        return self.centre + self.pixels(x, z), self.horizon + self.pixels(self.eye - y, z)

    def shade(self, colour: Colour, z: float) -> tuple[float, ...]:
        """The colour as seen through the haze."""
        clear = math.exp(-z / self.visibility)
        return tuple(
            clear * float(a) + (1 - clear) * float(b)
            for a, b in zip(colour, self.haze, strict=True)
        )

    def polygon(self, points: Sequence[Point], colour: Colour, label: int) -> None:
        z = max(sum(point[2] for point in points) / len(points), _NEAR)
        # Sixteenths of a pixel, kept within what OpenCV's fixed-point arithmetic holds.
        corners = [self.project(*point) for point in points]
        fixed = np.array(
            [[round(16 * min(max(v, -16000), 16000)) for v in xy] for xy in corners], np.int32
        )
        cv2.fillConvexPoly(self.image, fixed, self.shade(colour, z), cv2.LINE_AA, shift=4)
        cv2.fillConvexPoly(self.label, fixed, (label,), shift=4)

    def ground(
        self, x: tuple[float, float], z: tuple[float, float], colour: Colour, label: int
    ) -> None:
        """A strip of the street's surface."""
        far_to_near = np.geomspace(z[1], z[0], 7 if z[1] / z[0] > 3 else 2)  # the haze in steps
        for far, near in itertools.pairwise(far_to_near):
            self.polygon(
                [(x[0], 0, far), (x[1], 0, far), (x[1], 0, near), (x[0], 0, near)], colour, label
            )

    def front(
        self, x: tuple[float, float], y: tuple[float, float], z: float, colour: Colour, label: int
    ) -> None:
        """An upright rectangle that faces the camera."""
        self.polygon([(x[0], y[0], z), (x[1], y[0], z), (x[1], y[1], z), (x[0], y[1], z)],
                     colour, label)  # fmt: skip

    def side(
        self, x: float, y: tuple[float, float], z: tuple[float, float], colour: Colour, label: int
    ) -> None:
        """An upright rectangle along the street."""
        self.polygon([(x, y[0], z[0]), (x, y[1], z[0]), (x, y[1], z[1]), (x, y[0], z[1])],
                     colour, label)  # fmt: skip

    def disc(
        self, at: Point, radii: tuple[float, float], colour: Colour, label: int, ring: float = 0
    ) -> None:
        """An ellipse that faces the camera; a ring of that width in metres if not 0."""
        z = at[2]
        x, y = self.project(*at)
        axes = [max(1, round(16 * self.pixels(radius, z))) for radius in radii]
        width = max(1, round(self.pixels(ring, z))) if ring else -1
        centre = (round(16 * x), round(16 * y))
        angles = (0, 0, 360)
        colour = self.shade(colour, z)
        cv2.ellipse(self.image, centre, axes, *angles, colour, width, cv2.LINE_AA, 4)
        cv2.ellipse(self.label, centre, axes, *angles, (label,), width, cv2.LINE_8, 4)

    def line(self, a: Point, b: Point, width: float, colour: Colour, label: int) -> None:
        """A bar of that width in metres, at least a pixel wide."""
        z = (a[2] + b[2]) / 2
        start, end = ([round(16 * v) for v in self.project(*point)] for point in (a, b))
        thickness = max(1, round(self.pixels(width, z)))
        cv2.line(self.image, start, end, self.shade(colour, z), thickness, cv2.LINE_AA, 4)
        cv2.line(self.label, start, end, (label,), thickness, cv2.LINE_8, 4)


def _vary(rng: np.random.Generator, colour: Colour, amount: float = 18) -> npt.NDArray[np.float64]:
    """A colour like the given one: brightness and tint differ."""
    return np.clip(
        np.asarray(colour) + rng.uniform(-amount, amount) + rng.uniform(-6, 6, 3), 0, 255
    )


_FACADES = ((176, 158, 132), (150, 120, 100), (196, 186, 168), (142, 142, 148), (168, 122, 96))
_PAINTS = (
    (150, 28, 30), (32, 58, 120), (200, 202, 206), (38, 40, 44), (110, 114, 120), (40, 84, 66),
)  # fmt: skip
_CLOTHES = (
    (60, 60, 90),
    (150, 50, 50),
    (40, 40, 44),
    (180, 150, 60),
    (70, 110, 80),
    (190, 190, 200),
)
_SKIN = (205, 160, 130)


def _pick(rng: np.random.Generator, colours: Sequence[Colour]) -> npt.NDArray[np.float64]:
    return _vary(rng, colours[int(rng.integers(len(colours)))])


def _sky(canvas: _Canvas, rng: np.random.Generator) -> None:
    rows = np.linspace(0, 1, canvas.height)[:, None] ** 0.8
    zenith = _vary(rng, ((96, 148, 214), (150, 166, 188))[rng.integers(2)])
    canvas.image[:] = ((1 - rows) * zenith + rows * (canvas.haze + 30).clip(0, 250))[:, None]
    canvas.label[:] = _SKY
    for _ in range(rng.integers(0, 7)):
        x, y = rng.uniform(0, canvas.width), rng.uniform(0, 0.3 * canvas.height)
        for _ in range(4):
            axes = np.array([rng.uniform(0.03, 0.1), rng.uniform(0.008, 0.02)]) * canvas.width
            centre = (round(x + rng.normal(0, 0.05) * canvas.width), round(y))
            cv2.ellipse(canvas.image, centre, [round(v) for v in axes], 0, 0, 360,
                        (232, 235, 240), -1, cv2.LINE_AA)  # fmt: skip


def _building(
    canvas: _Canvas, rng: np.random.Generator, side: int, x: float, z: tuple[float, float]
) -> None:
    colour = _pick(rng, _FACADES)
    light = rng.uniform(0.72, 1.0) if side < 0 else rng.uniform(0.85, 1.1)
    floors = int(rng.integers(3, 7))
    top = 3.3 * floors + 1.2
    near = max(z[0], _NEAR)
    # The gable that faces the camera shows above lower neighbours.
    canvas.front((side * x, side * (x + 14)), (0, top), near, 0.8 * colour, _BUILDING)
    canvas.side(side * x, (0, top), (near, z[1]), light * colour, _BUILDING)
    canvas.side(side * x, (top - 0.5, top), (near, z[1]), 0.7 * colour, _BUILDING)
    glass = _vary(rng, (70, 84, 102), 25)
    window, gap = rng.uniform(1.1, 1.6), rng.uniform(1.0, 1.6)
    for floor in range(floors):
        y = 3.3 * floor
        height = (y + 0.3, y + 2.7) if floor == 0 else (y + 1.0, y + 2.6)
        for start in np.arange(z[0] + gap, z[1] - window, window + gap):
            # Far windows are narrower than a pixel; leave them out.
            if start > _NEAR and canvas.pixels(x * window / start, start) > 1.0:
                tone = glass * rng.uniform(0.7, 1.35)
                canvas.side(side * x, height, (start, start + window), tone, _BUILDING)


def _barrier(
    canvas: _Canvas, rng: np.random.Generator, side: int, x: float, z: tuple[float, float]
) -> None:
    """A wall, or a fence of posts and rails, with a hedge or trees behind it."""
    near = max(z[0], _NEAR)
    green = _vary(rng, (64, 92, 44))
    canvas.side(side * (x + 1.5), (0, rng.uniform(3, 6)), (near, z[1]), green, _VEGETATION)
    for _ in range(12):
        at = (side * (x + 2), rng.uniform(2, 6), rng.uniform(near + 1, z[1] + 1))
        canvas.disc(at, (rng.uniform(0.8, 2.0),) * 2, _vary(rng, green), _VEGETATION)
    if rng.random() < 0.5:
        colour = _vary(rng, (146, 132, 128))
        top = rng.uniform(1.8, 2.6)
        canvas.side(side * x, (0, top), (near, z[1]), colour, _WALL)
        for y in np.arange(0.45, top, 0.45):
            canvas.side(side * x, (y, y + 0.06), (near, z[1]), 0.75 * colour, _WALL)
        canvas.side(side * x, (top - 0.15, top), (near, z[1]), 1.2 * colour, _WALL)
    else:
        colour = _vary(rng, (88, 92, 98))
        # One label for the whole fence, seen through or not, as annotators draw it.
        canvas.side(side * x, (0, 1.5), (near, z[1]), 0.6 * colour + 0.4 * green, _FENCE)
        for y in (0.25, 1.35):
            canvas.side(side * x, (y, y + 0.1), (near, z[1]), 1.3 * colour, _FENCE)
        for start in np.arange(near, z[1], 0.8):
            canvas.side(side * x, (0, 1.5), (start, start + 0.12), 1.3 * colour, _FENCE)


def _tree(canvas: _Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    green = _vary(rng, (72, 108, 48), 24)
    top, radius = rng.uniform(3.2, 4.6), rng.uniform(1.3, 2.0)
    canvas.line((x, 0, z), (x, top, z), 0.28, (82, 66, 52), _VEGETATION)
    for light in (0.72, 0.9, 1.1, 1.3):  # shaded below, lit above
        for _ in range(7):
            offset = rng.normal(0, 0.55 * radius, 2)
            at = (x + offset[0], top + (light - 0.8) * 2.4 + 0.6 * offset[1], z)
            size = radius * rng.uniform(0.25, 0.6)
            canvas.disc(at, (size, size), light * _vary(rng, green, 8), _VEGETATION)


def _lamp(canvas: _Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    height, inward = rng.uniform(6, 8), -np.sign(x) * 1.4
    grey = _vary(rng, (98, 102, 104))
    canvas.line((x, 0, z), (x, height, z), 0.17, grey, _POLE)
    canvas.line((x, height, z), (x + inward, height + 0.2, z), 0.12, grey, _POLE)
    canvas.front((x + inward - 0.3, x + inward + 0.3), (height + 0.05, height + 0.3), z,
                 (225, 222, 205), _POLE)  # fmt: skip


def _signal(canvas: _Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    canvas.line((x, 0, z), (x, 2.6, z), 0.16, (84, 88, 90), _POLE)
    canvas.front((x - 0.3, x + 0.3), (2.4, 3.7), z, (30, 32, 32), _TRAFFIC_LIGHT)
    lit = int(rng.integers(3))
    for lamp, colour in enumerate(((60, 230, 120), (250, 190, 40), (250, 50, 40))):
        tone = np.array(colour) * (1.0 if lamp == lit else 0.25)
        canvas.disc((x, 2.65 + 0.4 * lamp, z), (0.16, 0.16), tone, _TRAFFIC_LIGHT)


def _sign(canvas: _Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    canvas.line((x, 0, z), (x, 2.5, z), 0.12, (130, 134, 136), _POLE)
    kind = int(rng.integers(4))
    if kind == 0:  # a speed limit
        canvas.disc((x, 2.7, z), (0.45, 0.45), (205, 30, 36), _TRAFFIC_SIGN)
        canvas.disc((x, 2.7, z), (0.31, 0.31), (240, 240, 240), _TRAFFIC_SIGN)
    elif kind == 1:  # give way
        for size, colour in ((0.6, (205, 30, 36)), (0.36, (240, 240, 240))):
            points = [(x - size, 2.75 + size / 2, z), (x + size, 2.75 + size / 2, z),
                      (x, 2.75 - 0.9 * size, z)]  # fmt: skip
            canvas.polygon(points, colour, _TRAFFIC_SIGN)
    elif kind == 2:  # priority road
        for size, colour in ((0.58, (245, 245, 245)), (0.42, (246, 200, 30))):
            points = [(x - size, 2.7, z), (x, 2.7 + size, z), (x + size, 2.7, z),
                      (x, 2.7 - size, z)]  # fmt: skip
            canvas.polygon(points, colour, _TRAFFIC_SIGN)
    else:  # a crossing
        canvas.front((x - 0.45, x + 0.45), (2.25, 3.15), z, (28, 84, 180), _TRAFFIC_SIGN)
        canvas.polygon([(x - 0.3, 2.4, z), (x, 3.0, z), (x + 0.3, 2.4, z)], (240, 240, 240),
                       _TRAFFIC_SIGN)  # fmt: skip


def _person(canvas: _Canvas, rng: np.random.Generator, x: float, z: float, ground: int) -> None:
    height = rng.uniform(1.55, 1.9)
    coat, trousers = _pick(rng, _CLOTHES), 0.7 * _pick(rng, _CLOTHES)
    stride = rng.uniform(0.05, 0.25)
    canvas.disc((x, 0.02, z), (0.4, 0.06), (58, 58, 60), ground)
    for foot in (-stride, stride):
        canvas.line((x, 0.5 * height, z), (x + foot, 0.05, z), 0.19, trousers, _PERSON)
    canvas.disc((x, 0.66 * height, z), (0.25, 0.21 * height), coat, _PERSON)
    canvas.disc((x, 0.93 * height, z), (0.12, 0.15), _SKIN, _PERSON)
    if rng.random() < 0.3:
        canvas.front((x + 0.25, x + 0.5), (0.35, 0.75), z, (120, 84, 50), _DYNAMIC)  # a bag


def _two_wheeler(canvas: _Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A bicycle or a motorcycle from the side, with a rider or parked."""
    motor = rng.random() < 0.35
    label = _MOTORCYCLE if motor else _BICYCLE
    wheel = 0.32 if motor else 0.36
    paint = _pick(rng, _PAINTS)
    canvas.disc((x, 0.02, z), (0.9, 0.07), (50, 50, 52), _ROAD)
    for axle in (x - 0.55, x + 0.55):
        if motor:
            canvas.disc((axle, wheel, z), (wheel, wheel), (24, 24, 26), label)
        else:
            canvas.disc((axle, wheel, z), (wheel, wheel), (26, 26, 28), label, ring=0.09)
    if motor:
        canvas.disc((x, 0.62, z), (0.62, 0.24), paint, label)
        canvas.line((x + 0.35, 0.75, z), (x + 0.45, 1.15, z), 0.1, (40, 40, 44), label)
    else:
        seat, bars, pedals = (x - 0.2, 0.85, z), (x + 0.42, 0.95, z), (x, 0.32, z)
        for a, b in ((seat, bars), (seat, pedals), (bars, pedals), ((x - 0.55, wheel, z), seat),
                     ((x + 0.55, wheel, z), bars)):  # fmt: skip
            canvas.line(a, b, 0.08, paint, label)
    if rng.random() < 0.65:
        coat = _pick(rng, _CLOTHES)
        canvas.line((x - 0.15, 0.9, z), (x + 0.1, 0.35, z), 0.18, 0.6 * coat, _RIDER)
        canvas.line((x - 0.15, 0.95, z), (x + 0.12, 1.45, z), 0.36, coat, _RIDER)
        canvas.line((x + 0.1, 1.4, z), (x + 0.4, 1.0, z), 0.12, coat, _RIDER)
        canvas.disc((x + 0.17, 1.68, z), (0.14, 0.17), _SKIN, _RIDER)
        canvas.disc((x + 0.16, 1.75, z), (0.16, 0.12), _pick(rng, _PAINTS), _RIDER)


def _box(
    canvas: _Canvas, x: float, z: float, size: tuple[float, float, float], base: float,
    colour: npt.NDArray[np.float64], label: int,
) -> float:  # fmt: skip
    """A box of width, height and length on the road; returns the x of the side that is seen."""
    width, height, length = size
    flank = x - np.sign(x) * width / 2
    canvas.side(flank, (base, base + height), (z, z + length), 0.78 * colour, label)
    canvas.front((x - width / 2, x + width / 2), (base, base + height), z, colour, label)
    return float(flank)


def _car(canvas: _Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    paint = _pick(rng, _PAINTS)
    width, length = rng.uniform(1.7, 1.9), rng.uniform(3.8, 4.7)
    roof = rng.uniform(1.4, 1.65)
    half, flank = width / 2, x - np.sign(x) * width / 2
    glass, tyre = (44, 54, 66), (20, 20, 22)
    canvas.ground((x - half - 0.1, x + half + 0.1), (z - 0.2, z + length), (40, 40, 42), _ROAD)
    for axle in (z + 0.8, z + length - 0.8):
        canvas.side(flank, (0, 0.62), (axle - 0.33, axle + 0.33), tyre, _CAR)
    canvas.side(flank, (0.28, 0.9), (z, z + length), 0.75 * paint, _CAR)
    inner = flank + np.sign(x) * 0.15
    canvas.polygon([(flank, 0.9, z + 0.1), (inner, roof, z + 0.5), (inner, roof, z + 0.6 * length),
                    (flank, 0.9, z + 0.8 * length)], glass, _CAR)  # fmt: skip
    for wheel in (x - half + 0.15, x + half - 0.15):
        canvas.front((wheel - 0.13, wheel + 0.13), (0, 0.4), z, tyre, _CAR)
    canvas.front((x - half, x + half), (0.26, 0.92), z, paint, _CAR)
    top = 0.36 * width + 0.02
    canvas.polygon([(x - half + 0.04, 0.9, z), (x + half - 0.04, 0.9, z), (x + top, roof, z + 0.35),
                    (x - top, roof, z + 0.35)], paint, _CAR)  # fmt: skip
    pane = top - 0.06
    canvas.polygon([(x - half + 0.18, 0.96, z), (x + half - 0.18, 0.96, z),
                    (x + pane, roof - 0.1, z + 0.3), (x - pane, roof - 0.1, z + 0.3)],
                   glass, _CAR)  # fmt: skip
    oncoming = x < 0
    light = (248, 244, 220) if oncoming else (205, 24, 24)
    for lamp in (x - half + 0.2, x + half - 0.2):
        canvas.front((lamp - 0.16, lamp + 0.16), (0.64, 0.8), z, light, _CAR)
    canvas.front((x - 0.25, x + 0.25), (0.42, 0.54), z, (235, 235, 225), _CAR)
    canvas.front((x - half + 0.05, x + half - 0.05), (0.26, 0.36), z, 0.45 * paint, _CAR)


def _big_vehicle(canvas: _Canvas, rng: np.random.Generator, x: float, z: float, label: int) -> None:
    """A truck, a bus or a tram ("train")."""
    length, height, colours = {
        _TRUCK: (7.0, 2.9, ((226, 226, 222), (196, 178, 150), (120, 140, 160))),
        _BUS: (11.0, 2.7, ((206, 54, 44), (40, 96, 160), (222, 186, 60))),
        _TRAIN: (24.0, 3.2, ((240, 206, 70), (86, 150, 96))),
    }[label]
    paint = _pick(rng, colours)
    half = 1.25
    canvas.ground((x - 1.4, x + 1.4), (z - 0.2, z + length), (40, 40, 42), _ROAD)
    for axle in (z + 1.2, z + length - 1.5):
        flank = x - np.sign(x) * half
        canvas.side(flank, (0, 0.9), (axle - 0.5, axle + 0.5), (20, 20, 22), label)
    for wheel in (x - 1.0, x + 1.0):
        canvas.front((wheel - 0.16, wheel + 0.16), (0, 0.6), z, (20, 20, 22), label)
    flank = _box(canvas, x, z, (2 * half, height, length), 0.45, paint, label)
    glass = (48, 60, 74)
    if label == _TRUCK:  # the doors of the load
        canvas.front((x - 0.04, x + 0.04), (0.6, height + 0.3), z, 0.6 * paint, label)
        canvas.front((x - half, x + half), (0.45, 0.62), z, (60, 60, 62), label)
    else:
        canvas.front((x - 1.1, x + 1.1), (1.6, height), z, glass, label)
        for start in np.arange(z + 0.5, z + length - 1.4, 1.7):
            canvas.side(flank, (1.5, height - 0.1), (start, start + 1.4), glass, label)
    for lamp in (x - 1.0, x + 1.0):
        canvas.front((lamp - 0.14, lamp + 0.14), (0.7, 0.95), z, (205, 24, 24), label)


def _bin(canvas: _Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    canvas.front((x - 0.3, x + 0.3), (0, 1.0), z, _vary(rng, (60, 74, 60)), _STATIC)
    canvas.front((x - 0.34, x + 0.34), (0.95, 1.08), z, (40, 48, 42), _STATIC)


def render(size: tuple[int, int], rng: np.random.Generator) -> tuple[UInt8Array, UInt8Array]:
    """Draw one street.

    Args:
        size: height and width in pixels.
        rng: decides everything about the scene.

    Returns:
        The image, uint8 ``[H, W, 3]`` RGB, and its Cityscapes label ids, uint8 ``[H, W]``.
    """
    canvas = _Canvas(size, rng)
    road = rng.uniform(4.6, 6.6)  # from the middle line to the kerb
    lane = road - 2.2 if rng.random() < 0.7 else road  # beyond it, cars are parked
    paved = road + rng.uniform(2.0, 3.2)
    front = paved + (rng.uniform(1.5, 3.5) if rng.random() < 0.5 else 0.0)  # with a front lawn
    offset = rng.uniform(0.8, 0.45 * lane)  # we drive right of the middle line

    _sky(canvas, rng)
    _surfaces(canvas, rng, offset, road, lane, paved, front)
    for side in (-1, 1):
        _frontage(canvas, rng, side, offset, front)

    things: list[tuple[float, Callable[..., None], float, tuple[int, ...]]] = []

    def place(draw: Callable[..., None], x: float, z: float, *extra: int) -> None:
        things.append((z, draw, x - offset, extra))

    def distance(nearest: float = 5.0, farthest: float = 45.0) -> float:
        return float(np.exp(rng.uniform(np.log(nearest), np.log(farthest))))

    kerb = road + 0.5
    for side in (-1, 1):
        if rng.random() < 0.6:
            for z in np.arange(rng.uniform(5, 12), 60, rng.uniform(8, 13)):
                place(_tree, side * (paved - 0.4), z + rng.normal(0, 0.5))
        for z in np.arange(rng.uniform(6, 20), 70, 22):
            place(_lamp, side * kerb, z)
        for draw, most in ((_sign, 3), (_signal, 2), (_bin, 2)):
            for _ in range(rng.integers(0, most + 1)):
                place(draw, side * kerb, distance(6, 30))
        for _ in range(rng.integers(0, 5)):
            place(_person, side * rng.uniform(road + 0.6, paved - 0.2), distance(5, 30), _SIDEWALK)
        if lane < road:
            for z in np.arange(rng.uniform(5, 14), 60, 6.0):
                if rng.random() < 0.6:
                    place(_car, side * (road - 1.1), z)
        for _ in range(rng.integers(0, 2)):
            place(_two_wheeler, side * (lane - rng.uniform(0.6, 1.2)), distance(5, 22))
        # At most one thing in a lane at a time, so that nothing stands in another.
        ahead = distance(7, 30)
        kind = rng.random()
        centre = side * min(0.5 * lane, 2.2)
        if kind < 0.18:
            place(_big_vehicle, centre, ahead, _BUS)
        elif kind < 0.36:
            place(_big_vehicle, centre, ahead, _TRUCK)
        elif kind < 0.48:
            place(_big_vehicle, centre, ahead, _TRAIN)
        elif kind < 0.9:
            place(_car, centre, ahead)
            if rng.random() < 0.5:
                place(_car, centre, ahead + rng.uniform(9, 25))
    if rng.random() < 0.25:
        place(_person, rng.uniform(-lane, lane), distance(8, 25), _ROAD)
    for z, draw, x, extra in sorted(things, key=lambda thing: -thing[0]):
        draw(canvas, rng, x, z, *extra)
    return _finish(canvas, rng)


def _surfaces(
    canvas: _Canvas, rng: np.random.Generator,
    offset: float, road: float, lane: float, paved: float, front: float,
) -> None:  # fmt: skip
    """Ground, lawn, pavement, road and its markings."""
    depth = (1.2, 2000.0)
    asphalt = _vary(rng, (92, 92, 96), 14)
    stone = _vary(rng, (156, 146, 140), 12)
    canvas.ground((-900, 900), depth, (120, 116, 104), _GROUND)
    for side in (-1, 1):

        def strip(a: float, b: float, colour: Colour, label: int, side: int = side) -> None:
            canvas.ground((side * a - offset, side * b - offset), depth, colour, label)

        if front > paved:
            strip(paved, front, _vary(rng, (112, 132, 66)), _TERRAIN)
        strip(road, paved, stone, _SIDEWALK)
        if lane < road and rng.random() < 0.3:
            strip(0, road, 1.08 * asphalt + (6, 2, 0), _PARKING)
            strip(0, lane, asphalt, _ROAD)
        else:
            strip(0, road, asphalt, _ROAD)
        strip(road, road + 0.25, 1.15 * stone, _SIDEWALK)
    for seam in np.arange(2.0, 26.0, 1.5):
        for a in (-paved, road + 0.25):
            canvas.ground((a - offset, a - offset + paved - road - 0.25), (seam, seam + 0.05),
                          0.9 * stone, _SIDEWALK)  # fmt: skip
    white = (214, 214, 208)
    for start in np.arange(rng.uniform(0, 6) + 1.2, 80, 6.0):
        canvas.ground((-0.08 - offset, 0.08 - offset), (start, start + 3), white, _ROAD)
    if lane < road:
        for side in (-1, 1):
            x = side * lane - offset
            canvas.ground((x - 0.06, x + 0.06), (1.2, 80), white, _ROAD)
    if rng.random() < 0.35:  # a zebra crossing
        z = rng.uniform(7, 16)
        for x in np.arange(-road + 0.4, road - 0.6, 1.0):
            canvas.ground((x - offset, x + 0.5 - offset), (z, z + 3), white, _ROAD)


def _frontage(
    canvas: _Canvas, rng: np.random.Generator, side: int, offset: float, front: float
) -> None:
    """What lines the street: buildings, now and then a wall or a fence."""
    edges = [rng.uniform(-12, 0)]
    while edges[-1] < _FAR:
        edges.append(edges[-1] + rng.uniform(9, 20))
    x = front + side * -offset
    for start, stop in zip(edges[-2::-1], edges[:0:-1], strict=True):
        draw = _building if rng.random() < 0.75 else _barrier
        if stop > _NEAR + 1:
            draw(canvas, rng, side, x, (start, stop))


def _finish(canvas: _Canvas, rng: np.random.Generator) -> tuple[UInt8Array, UInt8Array]:
    """Light, lens, sensor noise, and what a car-mounted camera sees of its car and frame."""
    image, label = canvas.image, canvas.label
    height, width = label.shape
    hood = (round(width * rng.uniform(0.45, 0.55)), round(height * 1.07))
    axes = (round(0.62 * width), round(height * rng.uniform(0.11, 0.15)))
    cv2.ellipse(image, hood, axes, 0, 0, 360, (34, 36, 40), -1, cv2.LINE_AA)
    cv2.ellipse(image, (hood[0], hood[1] + height // 50), axes, 0, 0, 360, (52, 55, 61), -1)
    cv2.ellipse(label, hood, axes, 0, 0, 360, (_EGO_VEHICLE,), -1)
    blurred = cv2.GaussianBlur(image, (3, 3), 0.5 + height / 2000)
    gain = rng.uniform(0.78, 1.15) * np.array([rng.uniform(0.94, 1.06), 1, rng.uniform(0.94, 1.06)])
    # Grain of the surfaces (seen at every size) and of the sensor, in eight bits for speed.
    noise = rng.integers(0, 256, (height, width, 1), np.uint8).astype(np.float32)
    noise = (noise - 127.5) * (rng.uniform(4, 10) / 127.5)
    lit = blurred.astype(np.float32) * gain.astype(np.float32) + noise
    image = np.clip(lit, 0, 255).astype(np.uint8)
    margin = max(1, width // 256)
    for edge in (np.s_[:margin], np.s_[:, :margin], np.s_[:, -margin:]):
        label[edge] = _OUT_OF_ROI
    return image, label


def write_cityscapes(
    root: str | Path,
    *,
    train: int = 200,
    val: int = 50,
    size: tuple[int, int] = (128, 256),
    seed: int = 0,
) -> Path:
    """Write a data set of street scenes that `Cityscapes` reads.

    A scene depends on (seed, split, number) and `size` alone. The folder appears when all of it has
    been written; one with the same parameters is kept as it is.

    Args:
        root: the folder to make; its parent is made where needed.
        train, val: numbers of images, at least 1.
        size: height and width of the images, at least 32 each.
        seed: not negative.

    Returns:
        `root`.

    Raises:
        ValueError: an argument is out of range.
        DataError: `root` holds something else; nothing is ever overwritten.
    """
    root = Path(root)
    counts = {"train": train, "val": val}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: expected at least 1 image, got {count}")
    if min(size) < 32:
        raise ValueError(f"size: expected height and width of at least 32, got {tuple(size)}")
    if seed < 0:
        raise ValueError(f"seed: expected a number >= 0, got {seed}")
    wanted = {"version": _VERSION, **counts, "size": list(size), "seed": seed}
    if _present(root, wanted):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.partial-", dir=root.parent))
    try:
        for split, count in counts.items():
            _write_split(partial, split, count, size, seed)
        (partial / _MANIFEST).write_text(json.dumps(wanted, indent=2) + "\n")
        partial.chmod(0o755)
        try:
            os.rename(partial, root)
        except OSError:
            # Another process may have finished the same data set meanwhile.
            if not _present(root, wanted):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _present(root: Path, wanted: dict[str, object]) -> bool:
    """Whether the data set is there; False if `root` is missing or empty."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    manifest = root / _MANIFEST
    if not manifest.is_file():
        raise DataError(f"{root}: expected no such folder or an empty one: it has no {_MANIFEST}")
    try:
        found = json.loads(manifest.read_text())
    except ValueError as error:
        raise DataError(f"{manifest}: not valid JSON: {error}") from None
    if found != wanted:
        raise DataError(
            f"{manifest}: the scenes there were made with {found}, expected {wanted}; "
            "remove the folder or choose another"
        )
    return True


def _write_split(root: Path, split: str, count: int, size: tuple[int, int], seed: int) -> None:
    images = root / "leftImg8bit" / split / "synthetic"
    labels = root / "gtFine" / split / "synthetic"
    for folder in (images, labels):
        folder.mkdir(parents=True)
    for index in range(count):
        sequence = np.random.SeedSequence([seed, _SPLITS.index(split), index])
        image, label = render(size, np.random.default_rng(sequence))
        name = f"synthetic_{index:06d}_000000"
        image_path = images / f"{name}_leftImg8bit.png"
        label_path = labels / f"{name}_gtFine_labelIds.png"
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        for path, array in ((image_path, bgr), (label_path, label)):
            if not cv2.imwrite(str(path), array, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
                raise OSError(f"{path}: could not be written")
