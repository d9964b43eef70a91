"""Trains a ResNet-FCN on Cityscapes, ADE20K or CamVid.

With no --data-root it draws a small data set of street scenes and trains on that for a few minutes:

    python examples/train_cityscapes.py
    python examples/train_cityscapes.py --data-root /data/cityscapes --pretrained resnet101.pth
    python examples/train_cityscapes.py --data-root /data/cityscapes --head fcn --upsample bilinear
    python examples/train_cityscapes.py --output runs/mine --resume  # and the options of the run
"""

import argparse
import os
import sys
import time
from pathlib import Path

from fcnseg.data.synthetic import write_cityscapes
from fcnseg.training import CheckpointError, DivergedError, TrainConfig, config, train

# The run without --data-root: small enough for two CPU cores, long enough to see it learn.
DEMO_IMAGES = {"train": 96, "val": 16, "size": (64, 128)}
DEMO = {
    "crop": (64, 128),
    "scale": (1.0, 1.0),
    "output_stride": 16,
    "epochs": 9,
    "batch_size": 4,
    "workers": 1,
    "val_interval": 3,
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="Without --data-root these defaults change: "
        + ", ".join(f"{name.replace('_', '-')} {value}" for name, value in DEMO.items()),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    d = TrainConfig

    files = parser.add_argument_group("files")
    files.add_argument("--dataset", choices=config.DATASETS, default=d.dataset, help="its kind")
    files.add_argument("--data-root", type=Path, help="where it lies (none: draw a small one)")
    files.add_argument("--output", type=Path, help="directory to write (none: runs/DATE-TIME)")
    files.add_argument("--resume", action="store_true", help="continue the run in --output")

    model = parser.add_argument_group("model")
    model.add_argument("--backbone", choices=config.BACKBONES, default=d.backbone, help="trunk")
    model.add_argument(
        "--head",
        choices=config.HEADS,
        default=d.head,
        help="one convolution, or torchvision's",
    )
    model.add_argument(
        "--upsample",
        choices=config.UPSAMPLES,
        default=d.upsample,
        help="to full resolution",
    )
    model.add_argument(
        "--deconv-groups",
        choices=config.DECONV_GROUPS,
        default=d.deconv_groups,
        help="its kind",
    )
    model.add_argument(
        "--output-stride",
        type=int,
        choices=config.OUTPUT_STRIDES,
        default=d.output_stride,
        help="of the trunk, by dilation",
    )
    model.add_argument(
        "--aux", dest="aux_loss", action="store_true", help="train an auxiliary head"
    )
    model.add_argument(
        "--aux-weight", type=float, default=d.aux_weight, help="of the auxiliary loss"
    )
    model.add_argument(
        "--pretrained", type=Path, help="state dict to start from, of an FCN or an ImageNet ResNet"
    )

    images = parser.add_argument_group("images")
    images.add_argument(
        "--crop",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        default=d.crop,
        help="of training, in pixels",
    )
    images.add_argument(
        "--scale",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=d.scale,
        help="random resize before the crop",
    )
    images.add_argument(
        "--color-jitter", type=float, default=d.color_jitter, help="random change of colours"
    )

    schedule = parser.add_argument_group("optimisation")
    schedule.add_argument("--epochs", type=int, default=d.epochs, help="length of the schedule")
    schedule.add_argument(
        "--warmup-epochs", type=float, help="of linear warm-up (none: 10 of every 150 epochs)"
    )
    schedule.add_argument("--batch-size", type=int, default=d.batch_size, help="images per step")
    schedule.add_argument("--lr", type=float, default=d.lr, help="peak learning rate")
    schedule.add_argument("--momentum", type=float, default=d.momentum, help="of SGD")
    schedule.add_argument("--weight-decay", type=float, default=d.weight_decay, help="of SGD")
    schedule.add_argument("--max-steps", type=int, help="stop early, after this many steps")
    schedule.add_argument(
        "--patience",
        type=int,
        default=d.patience,
        help="validations without a better mIoU before stopping; 0 never stops",
    )
    schedule.add_argument(
        "--val-interval", type=int, default=d.val_interval, help="epochs between validations"
    )
    schedule.add_argument(
        "--val-batch-size", type=int, default=d.val_batch_size, help="1 if image sizes differ"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default=d.device, help="auto, cpu, cuda or cuda:N")
    machine.add_argument(
        "--precision", choices=config.PRECISIONS, default=d.precision, help="fp16 needs CUDA"
    )
    machine.add_argument("--workers", type=int, default=d.workers, help="processes that load data")
    machine.add_argument("--seed", type=int, default=d.seed, help="of weights, order, augmentation")
    machine.add_argument(
        "--log-interval", type=int, default=d.log_interval, help="steps between metric writes"
    )
    machine.add_argument(
        "--checkpoint-interval",
        type=int,
        default=d.checkpoint_interval,
        help="steps between checkpoints within an epoch; 0 for one per epoch",
    )
    return parser


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    demo = args.data_root is None
    if demo:
        if args.dataset != "cityscapes":
            parser.error(f"--dataset {args.dataset} needs --data-root")
        parser.set_defaults(**DEMO)  # what the command line sets still wins
        args = parser.parse_args()
    if args.output is None:
        if args.resume:
            parser.error("--resume needs --output, the directory of the run to continue")
        args.output = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if demo:
        args.data_root = args.output / "data"
    if demo and not args.resume:
        print(
            f"No --data-root: training on drawn street scenes in {args.data_root}. For the real "
            "thing pass --data-root DIR, which holds leftImg8bit/ and gtFine/."
        )
    try:
        settings = TrainConfig(**vars(args))
        if demo and not args.resume:
            write_cityscapes(args.data_root, **DEMO_IMAGES)  # kept if it is there already
        result = train(settings)
    except (ValueError, OSError, CheckpointError, DivergedError) as error:
        text = str(error).strip() or type(error).__name__
        # An error from a data worker carries the worker's traceback; its last line says it all.
        print(f"error: {text.splitlines()[-1] if 'Traceback' in text else text}", file=sys.stderr)
        return 1
    if result.interrupted:
        print(f"interrupted at step {result.steps}; continue with --output {args.output} --resume")
        return 130
    print(f"weights, metrics and pictures: {result.output}{os.sep}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
