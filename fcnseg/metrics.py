"""Segmentation metrics from a confusion matrix: rows truth, columns prediction."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fcnseg import _checks


class ConfusionMatrix(nn.Module):
    """A confusion matrix that is filled batch by batch, without waiting for the device.

    Args:
        num_classes: C.
        ignore_index: label of the target's pixels that are not counted.
        device: where the matrix lives; ``update`` expects its arguments there.

    Attributes:
        matrix: int64 ``[C, C]``, rows truth, columns prediction.
        invalid: int64 scalar, the CUDA pixels left out because a label was outside [0, C) (on the
            CPU ``update`` raises instead).

    Note:
        Both tensors belong to one CUDA stream at a time, like any tensor that PyTorch changes in
        place: before another stream updates, reads, merges or resets them it must wait for the last
        (``stream.wait_stream(other)``). To count on several streams at once, give each a metric of
        its own and add them up by :meth:`merge_state`.

    Examples:
        >>> import torch, fcnseg
        >>> metric = fcnseg.ConfusionMatrix(2, ignore_index=255)
        >>> metric.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]]))
        >>> metric.compute()
        tensor([[1, 1],
                [0, 0]])
    """

    matrix: Tensor
    invalid: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = -100,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _checks.num_classes(num_classes)
        _checks.ignored(ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        shape = (num_classes, num_classes)
        self.register_buffer("matrix", torch.zeros(shape, dtype=torch.int64, device=device))
        self.register_buffer("invalid", torch.zeros((), dtype=torch.int64, device=device))

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            prediction: labels of any shape, uint8, int16, int32 or int64; or logits
                ``[N, C, h, w]``, floating point, which are upsampled bilinearly to the target's
                size.
            target: labels, uint8, int16, int32 or int64, of the prediction's shape; for logits
                ``[N, H, W]``, uint8, int32 or int64.

        Raises:
            ValueError, TypeError: an argument has the wrong shape, dtype or device.
            IndexError: (CPU) a label outside [0, C); nothing of the batch is counted.
        """
        if isinstance(prediction, Tensor) and prediction.is_floating_point():
            _checks.logits("prediction", prediction)
            _checks.target(target, "prediction", prediction)
            _checks.matrix(self.matrix, "prediction", prediction, prediction.shape[1])
            torch.ops.fcnseg.upsample_confusion_matrix_(
                self.matrix,
                prediction.detach(),
                target,
                self.ignore_index,
                False,
                None,
                None,
                self.invalid,
            )
            return
        _checks.prediction_and_target(prediction, target)
        _checks.matrix(self.matrix, "target", target)
        torch.ops.fcnseg.confusion_matrix_(
            self.matrix, prediction, target, self.ignore_index, self.invalid
        )

    def compute(self) -> Tensor:
        """The matrix so far, int64 ``[C, C]`` (a copy). Waits for the device.

        Raises:
            IndexError: CUDA updates met labels outside [0, C); names their count.
        """
        invalid = int(self.invalid)
        if invalid:
            raise IndexError(
                f"{invalid} counted pixel{'s' if invalid > 1 else ''} had a prediction or target "
                f"outside [0, {self.num_classes}); they are not in the matrix (`.matrix`)"
            )
        return self.matrix.clone()

    def forward(self, prediction: Tensor, target: Tensor) -> None:
        """Same as :meth:`update`."""
        self.update(prediction, target)

    def reset(self) -> None:
        """Forget everything."""
        self.matrix.zero_()
        self.invalid.zero_()

    def merge_state(self, metrics: Iterable[ConfusionMatrix]) -> ConfusionMatrix:
        """Add the counts of other metrics of the same number of classes; returns self."""
        metrics = list(metrics)
        for other in metrics:
            if other.num_classes != self.num_classes:
                raise ValueError(
                    f"metrics must have num_classes {self.num_classes}, got {other.num_classes}"
                )
        for other in metrics:
            self.matrix += other.matrix.to(self.matrix.device)
            self.invalid += other.invalid.to(self.invalid.device)
        return self

    def sync(self, group: dist.ProcessGroup | None = None) -> None:
        """Replace the counts by their sum over the processes of ``group``, exactly (int64).

        Does nothing where torch.distributed is not initialised. Call it once, after the last
        update: a second call adds the sums up again.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.matrix, group=group)
            dist.all_reduce(self.invalid, group=group)


@dataclass(frozen=True)
class Scores:
    """Scores of a confusion matrix; fractions in [0, 1], NaN where undefined.

    Attributes:
        iou: float64 ``[C]``, intersection over union; NaN for a class whose union is 0.
        dice: float64 ``[C]``, 2 |A n B| / (|A| + |B|); NaN for a class whose union is 0.
        accuracy: float64 ``[C]``, recall per class; NaN for a class without a true pixel.
        mean_iou, mean_dice, mean_accuracy: means over the classes that are not NaN.
        pixel_accuracy: share of pixels that are right.
        frequency_weighted_iou: IoU weighted by the share of true pixels.
    """

    iou: Tensor
    dice: Tensor
    accuracy: Tensor
    mean_iou: float
    mean_dice: float
    mean_accuracy: float
    pixel_accuracy: float
    frequency_weighted_iou: float


def scores(matrix: Tensor) -> Scores:
    """IoU, Dice and accuracies of a confusion matrix.

    Args:
        matrix: ``[C, C]`` counts, int64, rows truth, columns prediction.

    Returns:
        :class:`Scores`, computed in float64 on the CPU. A class whose union is 0 (neither in the
        truth nor predicted) is NaN and left out of means.

    Raises:
        ValueError, TypeError: ``matrix`` is not a square int64 matrix, or has negative counts.

    Source:
        Long, Shelhamer and Darrell, "Fully convolutional networks for semantic segmentation",
        2015, section 5.

    Examples:
        >>> import torch, fcnseg
        >>> fcnseg.metrics.scores(torch.tensor([[3, 1], [0, 4]])).mean_iou
        0.775
    """
    _checks.tensor("matrix", matrix, 2, "[C, C]", (torch.int64,))
    _checks.matrix(matrix, "matrix", matrix)
    if bool((matrix < 0).any()):
        raise ValueError("matrix must hold counts, got a negative value")
    counts = matrix.detach().to("cpu", torch.float64)
    hits, truth, predicted = counts.diag(), counts.sum(1), counts.sum(0)
    total = counts.sum()
    iou = hits / (truth + predicted - hits)
    dice = 2 * hits / (truth + predicted)
    accuracy = hits / truth
    frequency = truth / total
    return Scores(
        iou=iou,
        dice=dice,
        accuracy=accuracy,
        mean_iou=iou.nanmean().item(),
        mean_dice=dice.nanmean().item(),
        mean_accuracy=accuracy.nanmean().item(),
        pixel_accuracy=(hits.sum() / total).item(),
        # An absent class has frequency 0; its NaN must not count.
        frequency_weighted_iou=(frequency * torch.where(truth > 0, iou, 0.0)).sum().item(),
    )


def _check_classes(classes: Sequence[str], count: int) -> None:
    if len(classes) != count:
        raise ValueError(f"classes must hold {count} names, one per class, got {len(classes)}")


def format_scores(scores: Scores, classes: Sequence[str]) -> str:
    """A table: one line per class with its IoU, Dice and accuracy, then their means.

    Args:
        scores: what :func:`scores` returns.
        classes: the C names, in the order of the labels.

    Returns:
        Lines without a newline at the end; what is undefined shows as "-".

    Raises:
        ValueError: there is not one name per class.

    Examples:
        >>> import torch, fcnseg
        >>> result = fcnseg.metrics.scores(torch.tensor([[3, 1], [0, 4]]))
        >>> print(fcnseg.metrics.format_scores(result, ["road", "sky"]))
        class       IoU      Dice  accuracy
        road     0.7500    0.8571    0.7500
        sky      0.8000    0.8889    1.0000
        mean     0.7750    0.8730    0.8750
        pixel accuracy 0.8750, frequency-weighted IoU 0.7750
    """
    _check_classes(classes, len(scores.iou))
    width = max(len("class"), *map(len, classes))

    def number(value: float) -> str:
        return "-" if math.isnan(value) else f"{value:.4f}"

    def row(name: str, *values: float) -> str:
        return f"{name:{width}s}" + "".join(f"{number(value):>10s}" for value in values)

    columns = (scores.iou.tolist(), scores.dice.tolist(), scores.accuracy.tolist())
    header = f"{'class':{width}s}" + "".join(f"{n:>10s}" for n in ("IoU", "Dice", "accuracy"))
    return "\n".join(
        [
            header,
            *(row(*line) for line in zip(classes, *columns, strict=True)),
            row("mean", scores.mean_iou, scores.mean_dice, scores.mean_accuracy),
            f"pixel accuracy {number(scores.pixel_accuracy)}, "
            f"frequency-weighted IoU {number(scores.frequency_weighted_iou)}",
        ]
    )


def save_matrix(path: str | os.PathLike[str], matrix: Tensor, classes: Sequence[str]) -> None:
    """Draw a confusion matrix, each row divided by its sum, as a PNG. Needs matplotlib.

    Args:
        path: the file to write.
        matrix: ``[C, C]`` counts, int64, rows truth, columns prediction. The row of a class
            without a true pixel stays empty.
        classes: the C names, in the order of the labels.

    Raises:
        ValueError, TypeError: ``matrix`` is not a square int64 matrix, or there is not one name
            per class.
    """
    _checks.matrix(matrix, "matrix", matrix)
    _check_classes(classes, len(matrix))
    from matplotlib.figure import Figure  # only here: the metric needs torch alone

    counts = matrix.detach().to("cpu", torch.float64)
    shares = (counts / counts.sum(1, keepdim=True)).numpy()  # NaN, drawn as blank, where 0 / 0
    side = 0.3 * len(classes) + 2.5  # inches
    figure = Figure(figsize=(side + 0.8, side), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize="small")
    axes.set_yticks(range(len(classes)), classes, fontsize="small")
    axes.set(xlabel="prediction", ylabel="truth")
    for (row, column), share in (((r, c), shares[r, c]) for r, c in counts.nonzero().tolist()):
        if share >= 0.005:
            colour = "white" if share > 0.5 else "black"
            text = f"{100 * share:.0f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize="x-small")
    figure.colorbar(image, label="share of the class's true pixels (numbers: %)", shrink=0.8)
    figure.savefig(path, format="png")
