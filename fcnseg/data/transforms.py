"""Augmentation and resizing of (image, label) pairs on the CPU.

The one module that touches albumentations, and only `TrainTransform` needs it. An augmentation is a
pure function of (seed, epoch, index): albumentations' generators would otherwise start alike in
every worker of every epoch, and a resumed run would draw other augmentations than an unbroken one.
"""

from __future__ import annotations

import os

import cv2
import numpy as np

from .dataset import IGNORE_INDEX, MEAN, UInt8Array

_FILL = tuple(round(255 * mean) for mean in MEAN)
# Samples at pixel centres, as the bilinear resize of the image does; INTER_NEAREST is off by up to
# half a pixel.
_NEAREST = cv2.INTER_NEAREST_EXACT


def worker_init_fn(worker_id: int) -> None:
    """Keep OpenCV to one thread in a DataLoader worker; pass it as ``worker_init_fn``.

    The augmentations need no seeding per worker: they depend on (seed, epoch, index) alone.
    """
    cv2.setNumThreads(0)


def _check_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"{name}: expected a positive (height, width), got {tuple(size)}")
    return int(height), int(width)


class TrainTransform:
    """Random scale, crop, flip and colour jitter.

    A scale s is drawn uniformly; a window of size crop / s is cut out of the image, padded with the
    mean colour and label 255 where it reaches beyond, and resized to `crop` (bilinear for the
    image, nearest for the label). That equals scaling first, and touches fewer pixels.

    Args:
        crop: height and width of the result, in pixels.
        scale: range of s.
        seed: of the augmentations, not negative.
        flip: probability of a horizontal flip.
        color_jitter: largest relative change of brightness, contrast and saturation; 0 for none.

    Raises:
        ValueError: an argument is out of range.
        ImportError: albumentations is not installed.

    Examples:
        >>> transform = TrainTransform((8, 16), seed=1)
        >>> image, label = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
        >>> [array.shape for array in transform(image, label, epoch=0, index=5)]
        [(8, 16, 3), (8, 16)]
    """

    def __init__(
        self,
        crop: tuple[int, int],
        scale: tuple[float, float] = (0.5, 2.0),
        seed: int = 0,
        flip: float = 0.5,
        color_jitter: float = 0.25,
    ) -> None:
        self.crop = _check_size("crop", crop)
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale: expected 0 < low <= high, got {tuple(scale)}")
        if seed < 0:
            raise ValueError(f"seed: expected a number >= 0, got {seed}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip: expected a probability in [0, 1], got {flip}")
        if not 0 <= color_jitter < 1:
            raise ValueError(f"color_jitter: expected a number in [0, 1), got {color_jitter}")
        self.scale = scale
        self.seed = seed
        # Without this, albumentations asks the network for a newer version when imported.
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations

        self._compose = albumentations.Compose(
            [
                albumentations.HorizontalFlip(p=flip),
                # Always applied, the strength being random: one seed goes to every transform, so
                # that equal probabilities would be equal decisions.
                albumentations.ColorJitter(
                    brightness=color_jitter,
                    contrast=color_jitter,
                    saturation=color_jitter,
                    hue=(0, 0),  # a detour through HSV that would more than double the time
                    p=float(color_jitter > 0),
                ),
            ]
        )

    def __call__(
        self, image: UInt8Array, label: UInt8Array, *, epoch: int, index: int
    ) -> tuple[UInt8Array, UInt8Array]:
        """Augment a pair: uint8 ``[H, W, 3]`` and ``[H, W]`` to the same of size `crop`."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, index]))
        scale = rng.uniform(*self.scale)
        spans = [
            _random_span(rng, length, max(1, round(size / scale)))
            for length, size in zip(label.shape, self.crop, strict=True)
        ]
        image = self._cut(image, spans, cv2.INTER_LINEAR, _FILL)
        label = self._cut(label, spans, _NEAREST, (IGNORE_INDEX,))
        self._compose.set_random_seed(int(rng.integers(2**32)))
        result = self._compose(image=image, mask=label)
        return np.ascontiguousarray(result["image"]), np.ascontiguousarray(result["mask"])

    def _cut(
        self,
        array: UInt8Array,
        spans: list[tuple[int, int]],
        interpolation: int,
        fill: tuple[int, ...],
    ) -> UInt8Array:
        inside = [
            (max(a, 0), min(b, length))
            for (a, b), length in zip(spans, array.shape[:2], strict=True)
        ]
        (top, bottom), (left, right) = (
            (start - a, b - stop) for (a, b), (start, stop) in zip(spans, inside, strict=True)
        )
        window = array[inside[0][0] : inside[0][1], inside[1][0] : inside[1][1]]
        if top or bottom or left or right:
            padded = cv2.copyMakeBorder(
                window, top, bottom, left, right, cv2.BORDER_CONSTANT, value=fill
            )
            window = np.asarray(padded, dtype=np.uint8)
        resized = cv2.resize(window, self.crop[::-1], interpolation=interpolation)
        return np.asarray(resized, dtype=np.uint8)


def _random_span(rng: np.random.Generator, length: int, window: int) -> tuple[int, int]:
    """Where a window lies on an axis: inside it, or all around it when the window is larger."""
    slack = length - window
    start = int(rng.integers(min(slack, 0), max(slack, 0), endpoint=True))
    return start, start + window


class EvalTransform:
    """No augmentation; optionally a fixed size.

    Args:
        size: height and width that image (bilinear) and label (nearest) are resized to; None keeps
            them as they are on disk.
    """

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self.size = None if size is None else _check_size("size", size)

    def __call__(
        self, image: UInt8Array, label: UInt8Array, *, epoch: int = 0, index: int = 0
    ) -> tuple[UInt8Array, UInt8Array]:
        """The pair at `size`; epoch and index change nothing."""
        if self.size is None or self.size == label.shape:
            return image, label
        width_height = self.size[::-1]
        return (
            np.asarray(cv2.resize(image, width_height, interpolation=cv2.INTER_LINEAR), np.uint8),
            np.asarray(cv2.resize(label, width_height, interpolation=_NEAREST), np.uint8),
        )
