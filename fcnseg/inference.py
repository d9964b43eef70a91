"""Labels of whole images: at once, by a sliding window, at several scales, with mirror images.

Every forward pass leaves low-resolution logits. They stay so until the end; then band after band of
the result's rows is sampled from all of them, turned into probabilities, averaged and reduced to
labels. So memory holds the low-resolution logits, one band, and no ``[N, C, H, W]``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcnseg import _checks, functional
from fcnseg.models import FCN

if TYPE_CHECKING:
    from fcnseg.data import SegmentationDataset
    from fcnseg.training import TrainConfig

Average = Literal["probabilities", "logits"]
Blend = Literal["gaussian", "uniform"]

_BAND = 2**22  # values [N, C, rows, W] of a band; a few such arrays live at a time
_SIGMA = 1 / 8  # of the Gaussian, in windows


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How the labels of an image are found; without arguments, at once and at full size.

    With several passes the label is the argmax of the mean over scales, and over the image and its
    mirror image, of::

        model(F.interpolate(x, scale_factor=scale, mode="bilinear"))["out"]

    resampled bilinearly from the low-resolution logits (of "deconv", from the deconvolution's
    output) to the result's size, then softmax. With a window, the logits of each pixel's windows
    are resampled so, and averaged with weights that add up to 1 at each pixel, after the softmax or
    before it.

    Args:
        scales: factors of the image's size.
        flip: whether each pass is made on the mirror image too.
        window: size (rows, columns), or an int for both, of the windows that the network sees;
            None: the image. A smaller image is padded, below and right, with 0: the mean colour.
        overlap: share of a window, per axis, that it has in common with the next one, rounded to
            pixels (the last one may have more); in [0, 1).
        blend: how windows are weighted: "gaussian", by the distance from their centre (a standard
            deviation of 1/8 of the window), or "uniform".
        average: what is averaged over windows: "probabilities" or "logits". (Over scales and
            mirror images it is probabilities.)
        batch_size: windows per forward pass.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.

    Note:
        Memory: the network's for one batch of windows; the low-resolution logits of all passes; a
        band of some rows of full-resolution probabilities.

    Source:
        Sliding windows weighted by a Gaussian: Isensee et al., "nnU-Net", Nature Methods 2021;
        scales and mirror images: Chen et al., "DeepLab", TPAMI 2018, section 4.1.2.

    Examples:
        >>> import torch
        >>> from fcnseg.models import fcn_resnet18
        >>> model = fcn_resnet18(19, output_stride=32).eval()
        >>> inference = Inference(scales=(0.5, 1.0), flip=True, window=64)
        >>> inference.predict(model, torch.zeros(1, 3, 96, 128)).shape
        torch.Size([1, 96, 128])
    """

    scales: Sequence[float] = (1.0,)
    flip: bool = False
    window: int | Sequence[int] | None = None
    overlap: float = 1 / 3
    blend: Blend = "gaussian"
    average: Average = "probabilities"
    batch_size: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.scales, tuple | list) or not self.scales:
            raise TypeError(f"scales must be a sequence of numbers, got {self.scales!r}")
        for scale in self.scales:
            _checks.number("scales", scale, 0, open_low=True)
        if self.window is not None:
            _checks.pair("window", self.window, 1)
        _checks.number("overlap", self.overlap, 0, 1, open_high=True)
        if self.blend not in get_args(Blend):
            raise ValueError(f"blend must be one of {get_args(Blend)}, got {self.blend!r}")
        if self.average not in get_args(Average):
            raise ValueError(f"average must be one of {get_args(Average)}, got {self.average!r}")
        _checks.integer("batch_size", self.batch_size, 1)

    @property
    def is_plain(self) -> bool:
        """Whether one look at the image is all, which the fused operators do by themselves."""
        return tuple(self.scales) == (1.0,) and not self.flip and self.window is None

    @torch.no_grad()
    def predict(self, model: FCN, x: Tensor, size: int | Sequence[int] | None = None) -> Tensor:
        """Labels. Call ``model.eval()`` first.

        Args:
            model: the network.
            x: float [N, 3, H, W], normalised images.
            size: of the labels: (rows, columns), or an int for both. None: that of x.

        Returns:
            int64 [N, \\*size].

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape.
        """
        size = _size(x, size)
        if self.is_plain and (model.deconv is None or size == tuple(x.shape[-2:])):
            return model.predict(x, size)
        return torch.cat([band.argmax(1) for band in self._bands(model, x, size)], 1)

    @torch.no_grad()
    def probabilities(
        self, model: FCN, x: Tensor, size: int | Sequence[int] | None = None
    ) -> Tensor:
        """The mean probabilities, float [N, C, \\*size], whose argmax `predict` gives.

        Arguments and errors are those of `predict`. This one does hold ``[N, C, H, W]``.
        """
        return torch.cat(list(self._bands(model, x, _size(x, size))), 2)

    @torch.no_grad()
    def update_confusion_matrix(
        self, model: FCN, matrix: Tensor, x: Tensor, target: Tensor, *, ignore_index: int = 255
    ) -> Tensor:
        """Add the labels of x to a confusion matrix. Call ``model.eval()`` first.

        A single look at the whole image is counted straight from low-resolution logits.

        Args:
            model, x: as for `predict`.
            matrix: int64 [C, C], rows truth, columns prediction; changed in place.
            target: uint8, int32 or int64 [N, H', W'], of any size.
            ignore_index: a label that does not count.

        Returns:
            matrix.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape.
            IndexError: (CPU) a bad label.
        """
        size = _size(x, None)
        _checks.target(target, "x", x)
        wanted = (target.shape[1], target.shape[2])
        if self.is_plain and (model.deconv is None or size == wanted):
            return model.update_confusion_matrix(matrix, x, target, ignore_index=ignore_index)
        return functional.confusion_matrix_(
            matrix, self.predict(model, x, wanted), target, ignore_index=ignore_index
        )

    # -- passes --------------------------------------------------------------------------------

    def _passes(self, model: FCN, x: Tensor, size: tuple[int, int]) -> Iterator[list[_Tile]]:
        """The tiles of each pass: one pass per scale, and one more on its mirror image."""
        for scale in self.scales:
            scaled_size = [max(1, round(length * scale)) for length in x.shape[2:]]
            scaled = x
            if scaled_size != list(x.shape[2:]):
                scaled = F.interpolate(x, size=scaled_size, mode="bilinear", align_corners=False)
            for mirrored in (False, True) if self.flip else (False,):
                yield self._tiles(model, scaled.flip(3) if mirrored else scaled, size, mirrored)

    def _tiles(self, model: FCN, x: Tensor, size: tuple[int, int], mirrored: bool) -> list[_Tile]:
        count, _, height, width = x.shape
        rows, columns = (height, width)
        if self.window is not None:
            rows, columns = _checks.pair("window", self.window, 1)
        x = F.pad(x, (0, max(0, columns - width), 0, max(0, rows - height)))
        corners = [
            (top, left)
            for top in self._starts(height, rows)
            for left in self._starts(width, columns)
        ]
        tiles = []
        for first in range(0, len(corners), self.batch_size):
            batch = corners[first : first + self.batch_size]
            windows = [x[:, :, top : top + rows, left : left + columns] for top, left in batch]
            logits = model.low_resolution(torch.cat(windows), aux=False)["out"]
            for (top, left), z in zip(batch, logits.split(count), strict=True):
                # Where the window lies in the image that is not mirrored.
                left = width - left - columns if mirrored else left
                grid = tuple(z.shape[2:]) if model.deconv is None else (rows, columns)
                down = _Axis.sample(size[0], height, (top, rows), grid[0])
                across = _Axis.sample(size[1], width, (left, columns), grid[1])
                tiles.append(_Tile(z, model.deconv, columns, mirrored, down, across.to(z.device)))
        return tiles

    def _starts(self, length: int, window: int) -> list[int]:
        """Where the windows of an axis begin; the last one ends with the image."""
        stride = max(1, round(window * (1 - self.overlap)))
        return [*range(0, length - window, stride), max(0, length - window)]

    # -- bands ---------------------------------------------------------------------------------

    def _bands(self, model: FCN, x: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
        """Mean probabilities [N, C, rows, W], band after band of rows."""
        passes = list(self._passes(model, x, size))
        rows = max(1, _BAND // max(1, len(x) * model.num_classes * size[1]))
        for first in range(0, size[0], rows):
            band = range(first, min(first + rows, size[0]))
            total = self._band(passes[0], band, size[1])
            for tiles in passes[1:]:
                total += self._band(tiles, band, size[1])
            yield total.div_(len(passes))

    def _band(self, tiles: list[_Tile], band: range, width: int) -> Tensor:
        """Probabilities [N, C, rows, W] of one pass in some rows of the result."""
        if len(tiles) == 1:
            return tiles[0].sample(tiles[0].down.part(band)).softmax(1)
        z = tiles[0].logits
        dtype = torch.promote_types(z.dtype, torch.float32)
        sums = torch.zeros((*z.shape[:2], len(band), width), dtype=dtype, device=z.device)
        weights = torch.zeros(sums.shape[2:], dtype=dtype, device=z.device)
        for tile in tiles:
            down = tile.down.part(band)
            if not len(down.low):
                continue
            part = tile.sample(down)
            if self.average == "probabilities":
                part = part.softmax(1)
            place = (
                slice(down.start - band.start, down.start - band.start + len(down.low)),
                slice(tile.across.start, tile.across.start + len(tile.across.low)),
            )
            if self.blend == "gaussian":
                w = torch.outer(down.weight.to(z.device), tile.across.weight).to(dtype)
                sums[:, :, *place] += part * w
                weights[place] += w
            else:
                sums[:, :, *place] += part
                weights[place] += 1
        mean = sums.div_(weights)
        return mean if self.average == "probabilities" else mean.softmax(1)


@dataclass(frozen=True)
class _Axis:
    """Which pixels of the result, along an axis, a tile covers, and where they lie in its grid.

    Attributes:
        start: the first of the covered pixels, which follow each other.
        low, high: int64, the grid's points on both sides of each of them.
        fraction: float64, its distance from ``low``.
        weight: float64, the Gaussian's.
    """

    start: int
    low: Tensor
    high: Tensor
    fraction: Tensor
    weight: Tensor

    @classmethod
    def sample(cls, length: int, scaled: int, tile: tuple[int, int], grid: int) -> _Axis:
        """Of a tile (offset, extent) of an image ``scaled`` pixels long, ``length`` in the result.

        As F.interpolate does: pixel centres correspond, and the outermost values are continued.
        """
        offset, extent = tile
        centre = (torch.arange(length, dtype=torch.float64) + 0.5) * scaled / length
        covered = (centre >= offset) & (centre <= offset + extent)
        start = int(covered.to(torch.uint8).argmax())
        u = (centre[covered] - offset) / extent  # in [0, 1]
        v = (u * grid - 0.5).clamp(0, grid - 1)
        low = v.floor().long()
        weight = torch.exp(-0.5 * ((u - 0.5) / _SIGMA) ** 2)
        return cls(start, low, (low + 1).clamp(max=grid - 1), v - low, weight)

    def part(self, band: range) -> _Axis:
        """The pixels that lie in ``band``; there may be none."""
        first = max(band.start, self.start)
        cut = slice(first - self.start, max(first, band.stop) - self.start)
        parts = (each[cut] for each in (self.low, self.high, self.fraction, self.weight))
        return _Axis(first, *parts)

    def to(self, device: torch.device) -> _Axis:
        parts = (self.low, self.high, self.fraction, self.weight)
        return _Axis(self.start, *(each.to(device, non_blocking=True) for each in parts))


@dataclass(frozen=True)
class _Tile:
    """The low-resolution logits [N, C, h, w] of a window, and how to sample the result there."""

    logits: Tensor
    deconv: nn.ConvTranspose2d | None
    columns: int  # of the window
    mirrored: bool
    down: _Axis  # on the CPU
    across: _Axis  # on the logits' device

    def sample(self, down: _Axis) -> Tensor:
        """Logits [N, C, rows, columns] of rows of the result, float32 or float64."""
        first, last = int(down.low[0]), int(down.high[-1]) + 1
        rows = self._rows(first, last)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if self.mirrored:
            rows = rows.flip(3)
        down = down.to(rows.device)
        fraction = down.fraction[:, None].to(rows.dtype)
        rows = torch.lerp(
            rows.index_select(2, down.low - first),
            rows.index_select(2, down.high - first),
            fraction,
        )
        across, fraction = self.across, self.across.fraction.to(rows.dtype)
        return torch.lerp(
            rows.index_select(3, across.low), rows.index_select(3, across.high), fraction
        )

    def _rows(self, first: int, last: int) -> Tensor:
        """Rows of the grid: of the logits, or of the deconvolution's output, made only there."""
        if self.deconv is None:
            return self.logits[:, :, first:last]
        kernel, stride = self.deconv.weight.shape[2], self.deconv.stride[0]
        padding = stride // 2
        # Input row y reaches the output's rows y * stride - padding + (0 .. kernel - 1).
        low = max(0, -((kernel - 1 - first - padding) // stride))
        high = min(self.logits.shape[2], (last - 1 + padding) // stride + 1)
        out = F.conv_transpose2d(
            self.logits[:, :, low:high],
            self.deconv.weight,
            stride=stride,
            padding=(0, padding),
            groups=self.deconv.groups,
        )
        start = first + padding - low * stride
        return out[:, :, start : start + last - first, : self.columns]


def _size(x: Tensor, size: int | Sequence[int] | None) -> tuple[int, int]:
    """The result's size, after a look at x."""
    _checks.tensor("x", x, 4, "[N, 3, H, W]", _checks.LOGITS_DTYPES)
    if x.shape[1] != 3 or min(x.shape[2:]) < 1:
        raise ValueError(f"x must have shape [N, 3, H, W], got {list(x.shape)}")
    return (x.shape[2], x.shape[3]) if size is None else _checks.pair("size", size, 1)


@dataclass(frozen=True)
class Run:
    """What a checkpoint of a training run holds for its use.

    Attributes:
        model: with the checkpoint's weights, in evaluation mode, on the CPU.
        config: the run's settings.
        dataset: the kind of its data, with the classes and their colours.
        epoch, scores: of the validation that ``best.pt`` was written after, fields of
            :class:`fcnseg.metrics.Scores`; None for ``last.pt``.
    """

    model: FCN
    config: TrainConfig
    dataset: type[SegmentationDataset]
    epoch: int | None
    scores: dict[str, Any] | None


def load_run(path: str | os.PathLike[str]) -> Run:
    """Load a run's network from its directory (``best.pt`` in it) or from a checkpoint of it.

    Raises:
        CheckpointError: the file is missing, cannot be read, or is no checkpoint of a run.
    """
    # Only here: inference itself needs torch alone.
    from fcnseg import data
    from fcnseg.training import CheckpointError, TrainConfig, checkpoint, loop

    if os.path.isdir(path):
        path = os.path.join(path, "best.pt")
    state = checkpoint.load(path)
    try:
        config = TrainConfig(**state["config"])
        dataset = data._DATASETS[config.dataset]
        model = loop.build_model(config, len(dataset.classes))
        # The averaged weights of a run with ``ema``, where the checkpoint is its last one.
        model.load_state_dict(state.get("average") or state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        # A state dict that does not fit is reported name by name.
        text = " ".join(str(error).split())[:300]
        reason = f"it lacks {text}" if isinstance(error, KeyError) else text
        raise CheckpointError(f"{os.fspath(path)} is not of a training run: {reason}") from error
    return Run(model.eval(), config, dataset, state.get("epoch"), state.get("scores"))
