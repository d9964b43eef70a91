"""Scores a trained network on a split of its data set, and writes submission files.

python examples/evaluate.py runs/mine                       # best.pt, as the run validated it
python examples/evaluate.py runs/mine/best.pt --data-root /data/cityscapes --json scores.json
python examples/evaluate.py runs/mine --multi-scale --flip --matrix matrix.png
python examples/evaluate.py runs/mine --window 768 768 --submission results
python -m fcnseg.evaluate results /data/cityscapes          # scores of what was written
"""

import argparse
import contextlib
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, StackDataset
from tqdm import tqdm

import fcnseg
from fcnseg import _command_line, data
from fcnseg.inference import Inference, Run, load_run
from fcnseg.metrics import Scores, format_scores, save_matrix, scores
from fcnseg.training import CheckpointError
from fcnseg.training.numerics import allow_tf32

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
AUTOCAST = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """What says which network runs, how and where; `open_network` takes it."""
    parser.add_argument("run", type=Path, help="directory of a run (its best.pt), or a checkpoint")
    looks = parser.add_argument_group("inference")
    looks.add_argument(
        "--multi-scale",
        type=float,
        nargs="*",
        metavar="SCALE",
        help=f"mean over the image at these scales (default: {' '.join(map(str, SCALES))})",
    )
    looks.add_argument("--flip", action="store_true", help="and over its mirror image")
    looks.add_argument(
        "--window", type=int, nargs=2, metavar=("H", "W"), help="slide a window of this size"
    )
    looks.add_argument(
        "--overlap", type=float, default=Inference.overlap, help="of windows (default: 1/3)"
    )
    looks.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    looks.add_argument("--precision", choices=AUTOCAST, help="default: the run's")


@dataclass
class Network:
    """A run's network, ready to be used."""

    run: Run
    inference: Inference
    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager]

    def images(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] as the network takes them."""
        channels_last = self.run.config.channels_last
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return data.normalise(images.to(self.device, non_blocking=True), memory_format)


def open_network(args: argparse.Namespace) -> Network:
    """Load what the options of `add_network_options` name.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ValueError: an option cannot.
    """
    scales = (1.0,) if args.multi_scale is None else tuple(args.multi_scale) or SCALES
    inference = Inference(scales=scales, flip=args.flip, window=args.window, overlap=args.overlap)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", name):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    run = load_run(args.run)
    precision = args.precision or run.config.precision
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a CUDA device; on the CPU use bf16 or fp32")
    # as in training, whose fp32 is not rounded to tf32
    allow_tf32(precision == "tf32")
    run.model.to(device)
    if run.config.channels_last:
        run.model.to(memory_format=torch.channels_last)
    dtype = AUTOCAST[precision]
    return Network(
        run,
        inference,
        device,
        lambda: torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
    )


def message(error: BaseException) -> str:
    """One line. An error from a data worker carries the worker's traceback; its end says it all."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1] if "Traceback" in text else text


def write_label(path: Path, values: Any) -> None:
    if not cv2.imwrite(str(path), values):
        raise OSError(f"{path}: could not be written")


def evaluate(
    network: Network, dataset: data.SegmentationDataset, args: argparse.Namespace
) -> Tensor:
    """The confusion matrix of a data set; writes the submission where one is asked for."""
    ignore_index = dataset.ignore_index
    metric = fcnseg.ConfusionMatrix(
        dataset.num_classes, ignore_index=ignore_index, device=network.device
    )
    values = dataset.file_values()
    if args.submission is not None:
        args.submission.mkdir(parents=True, exist_ok=True)
    loader = DataLoader(
        StackDataset(range(len(dataset)), dataset),
        batch_size=args.batch_size or network.run.config.val_batch_size,
        num_workers=args.workers,
        worker_init_fn=data.worker_init_fn,
        pin_memory=network.device.type == "cuda",
    )
    with torch.no_grad(), network.autocast():
        for indices, (images, target) in tqdm(loader, unit="batch", disable=args.quiet):
            x = network.images(images)
            target = target.to(network.device, non_blocking=True)
            model = network.run.model
            if args.submission is None:
                network.inference.update_confusion_matrix(
                    model, metric.matrix, x, target, ignore_index=ignore_index
                )
                continue
            labels = network.inference.predict(model, x, tuple(target.shape[1:]))
            metric.update(labels, target)
            for index, each in zip(indices.tolist(), labels.cpu().numpy(), strict=True):
                write_label(args.submission / dataset.submission_name(index), values[each])
    if network.device.type == "cuda":
        fcnseg.check_labels()
    return metric.compute()


def as_json(result: Scores, classes: tuple[str, ...], matrix: Tensor) -> dict[str, Any]:
    """The scores under the names that python -m fcnseg.evaluate gives them; None for NaN."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    def by_class(values: Tensor) -> dict[str, float | None]:
        return dict(zip(classes, map(number, values.tolist()), strict=True))

    return {
        "classScores": by_class(result.iou),
        "classDice": by_class(result.dice),
        "classAccuracy": by_class(result.accuracy),
        "meanIoU": number(result.mean_iou),
        "meanDice": number(result.mean_dice),
        "meanAccuracy": number(result.mean_accuracy),
        "pixelAccuracy": number(result.pixel_accuracy),
        "frequencyWeightedIoU": number(result.frequency_weighted_iou),
        "confMatrix": matrix.tolist(),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_network_options(parser)
    images = parser.add_argument_group("images")
    images.add_argument("--data-root", type=Path, help="default: the run's")
    images.add_argument("--split", default="val", help="default: val")
    images.add_argument(
        "--split-file",
        help='default: the run\'s; "published" for the split that the data set comes with',
    )
    images.add_argument("--batch-size", type=int, help="default: the run's, of its validation")
    images.add_argument("--workers", type=int, default=2, help="that load images (default: 2)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, help="file to write the scores to")
    output.add_argument("--matrix", type=Path, help="PNG file, the normalised confusion matrix")
    output.add_argument(
        "--submission",
        type=Path,
        metavar="DIR",
        help="write the labels as the benchmark wants them",
    )
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main() -> int:
    args = make_parser().parse_args()
    try:
        network = open_network(args)
        config = network.run.config
        root = args.data_root or config.data_root
        split_file = args.split_file or config.split_file
        dataset = data.open_dataset(
            config.dataset,
            root,
            args.split,
            data.EvalTransform(),
            split_file=None if split_file == "published" else split_file,
        )
        matrix = evaluate(network, dataset, args).cpu()
        result = scores(matrix)
        try:  # the files first: nobody may read the whole table
            if args.json is not None:
                content = {
                    "run": str(args.run),
                    "epoch": network.run.epoch,
                    "dataset": config.dataset,
                    "split": args.split,
                    "images": len(dataset),
                    "inference": vars(network.inference),
                    **as_json(result, dataset.classes, matrix),
                }
                args.json.write_text(json.dumps(content, indent=2) + "\n")
            if args.matrix is not None:
                save_matrix(args.matrix, matrix, dataset.classes)
        finally:  # where a file cannot be written, the table is all there is
            print(format_scores(result, dataset.classes))
            print(f"{len(dataset)} images of {root}, {args.split}: mIoU {result.mean_iou:.4f}")
    except (ValueError, TypeError, OSError, IndexError, CheckpointError) as error:
        print(f"error: {message(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    _command_line.run(main)
