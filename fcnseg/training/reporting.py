"""What a run leaves for people: tables as text, pictures as PNG."""

import json
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure  # no pyplot: no window system, no global state
from matplotlib.patches import Patch

from fcnseg.models import LoadReport

_VOID = np.array([0, 0, 0], np.uint8)  # colour of labels that do not count


def load_report(path: str, report: LoadReport) -> str:
    """What a file of pretrained weights did not bring, and what of it was not used."""
    lines = [f"pretrained weights: {path}"]
    for title in ("missing", "unexpected", "mismatched"):
        keys = list(getattr(report, title))
        shown = ", ".join(map(str, keys[:8])) + (", ..." if len(keys) > 8 else "")
        lines.append(f"  {title}: {len(keys)}" + (f" ({shown})" if keys else ""))
    return "\n".join(lines)


def colourise(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Labels [H, W] as an RGB image uint8 [H, W, 3]; what is no class becomes black."""
    table = np.tile(_VOID, (256, 1))
    table[: len(palette)] = palette
    return table[labels]


def save_predictions(
    path: str | os.PathLike[str],
    samples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    palette: np.ndarray,
) -> None:
    """Draws image, truth and prediction side by side, one row per sample, with a legend.

    Args:
        path: PNG file to write.
        samples: (image uint8 [H, W, 3] RGB, truth [H, W], prediction [H, W]) each.
        classes: names, in the order of the labels.
        palette: uint8 [C, 3] RGB.
    """
    height, width = samples[0][0].shape[:2]
    cell = 4.0  # inches
    present = np.unique(np.concatenate([np.unique(plane) for s in samples for plane in s[1:]]))
    handles = [
        Patch(facecolor=palette[c] / 255, edgecolor="0.5", label=classes[c])
        for c in present
        if c < len(classes)
    ]
    handles = handles[:24]  # the legend of 150 classes would be all there is to see
    legend = 0.3 * -(-len(handles) // 6) + 0.2
    rows = cell * height / width * len(samples) + 0.3
    figure = Figure(figsize=(3 * cell, rows + legend), dpi=100, layout="constrained")
    axes = figure.subplots(len(samples), 3, squeeze=False)
    for row, (image, truth, prediction) in zip(axes, samples, strict=True):
        planes = (
            image,
            colourise(truth, palette),
            # Black where the truth is void: nothing there is right or wrong.
            colourise(np.where(truth < len(classes), prediction, 255), palette),
        )
        for axis, plane in zip(row, planes, strict=True):
            axis.imshow(plane, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(
        axes[0], ("image", "truth (black does not count)", "prediction"), strict=True
    ):
        axis.set_title(title)
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(path)


def save_curves(path: str | os.PathLike[str], metrics_path: str | os.PathLike[str]) -> None:
    """Draws loss, validation mIoU and learning rate over the steps.

    Args:
        path: PNG file to write.
        metrics_path: the run's ``metrics.jsonl``.
    """
    with open(metrics_path) as file:
        records = [json.loads(line) for line in file]
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    validations = [record for record in epochs if "miou" in record]
    figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
    loss, miou, lr = figure.subplots(1, 3)
    loss.plot([r["step"] for r in steps], [r["loss"] for r in steps], alpha=0.4, label="step")
    loss.plot([r["step"] for r in epochs], [r["loss"] for r in epochs], "o-", label="epoch mean")
    loss.set(title="training loss", xlabel="step")
    loss.legend()
    miou.plot([r["step"] for r in validations], [r["miou"] for r in validations], "o-")
    miou.set(title="validation mIoU", xlabel="step", ylim=(0, None))
    lr.plot([r["step"] for r in steps], [r["lr"] for r in steps])
    lr.set(title="learning rate", xlabel="step", ylim=(0, None))
    for axis in (loss, miou, lr):
        axis.grid(alpha=0.3)
    figure.savefig(path)
