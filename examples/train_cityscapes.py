"""Trains a ResNet-FCN on Cityscapes, ADE20K or CamVid.

With no --data-root it draws a small data set of street scenes and trains on that for a few minutes:

    python examples/train_cityscapes.py
    python examples/train_cityscapes.py --data-root /data/cityscapes --pretrained resnet101.pth
    python examples/train_cityscapes.py --data-root /data/cityscapes --head fcn --upsample bilinear
    python examples/train_cityscapes.py --output runs/mine --resume
    python examples/train_cityscapes.py --config runs/mine/config.json --output runs/again
    torchrun --nproc-per-node 8 examples/train_cityscapes.py --data-root /data/cityscapes --output X

For several machines and for Slurm see LAUNCH.md.
"""

import argparse
import os
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from fcnseg import _command_line
from fcnseg.data.synthetic import write_cityscapes
from fcnseg.graphs import CaptureError
from fcnseg.training import (
    CheckpointError,
    DivergedError,
    PeerError,
    TrainConfig,
    WorkerError,
    World,
    config,
    train,
)
from fcnseg.training.schedule import SCHEDULES

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


YES_NO = argparse.BooleanOptionalAction


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
    files.add_argument("--split-file", type=Path, help="of python -m fcnseg.data split")
    files.add_argument("--output", type=Path, help="directory to write (none: runs/DATE-TIME)")
    files.add_argument(
        "--config", type=Path, help="config.json of a run, whose settings are the defaults"
    )
    files.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output, by default with its settings",
    )

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
        "--skips", choices=config.SKIPS, help="of FCN-32s, 16s or 8s, with --output-stride 32"
    )
    model.add_argument(
        "--aux",
        dest="aux_loss",
        action=YES_NO,
        default=d.aux_loss,
        help="train an auxiliary head",
    )
    model.add_argument(
        "--aux-weight", type=float, default=d.aux_weight, help="of the auxiliary loss"
    )
    model.add_argument(
        "--pretrained", type=Path, help="state dict to start from, of an FCN or an ImageNet ResNet"
    )

    model.add_argument(
        "--freeze-bn", action=YES_NO, default=d.freeze_bn, help="batch norm stays as pretrained"
    )
    model.add_argument(
        "--sync-bn", action=YES_NO, default=d.sync_bn, help="batch norm over all processes (CUDA)"
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
    schedule.add_argument("--loss", choices=config.LOSSES, default=d.loss, help="per pixel")
    schedule.add_argument(
        "--ohem-threshold",
        type=float,
        default=d.ohem_threshold,
        help="pixels of less probability are hard",
    )
    schedule.add_argument(
        "--ohem-min-kept",
        type=lambda text: float(text) if "." in text else int(text),
        default=d.ohem_min_kept,
        help="hard pixels at least: a number, or a share of the batch",
    )
    schedule.add_argument(
        "--focal-gamma", type=float, default=d.focal_gamma, help="exponent of --loss focal"
    )
    schedule.add_argument(
        "--class-weights",
        choices=config.CLASS_WEIGHTS,
        default=d.class_weights,
        help="by the classes' frequencies in the training set",
    )
    schedule.add_argument(
        "--label-smoothing", type=float, default=d.label_smoothing, help="in [0, 1]"
    )
    schedule.add_argument("--epochs", type=int, default=d.epochs, help="length of the schedule")
    schedule.add_argument(
        "--warmup-epochs", type=float, help="of linear warm-up (none: 10 of every 150 epochs)"
    )
    schedule.add_argument(
        "--lr-schedule", choices=SCHEDULES, default=d.lr_schedule, help="after the warm-up"
    )
    schedule.add_argument(
        "--lr-step-epochs",
        type=int,
        default=d.lr_step_epochs,
        help="epochs between the drops to a tenth of --lr-schedule step",
    )
    schedule.add_argument(
        "--batch-size", type=int, default=d.batch_size, help="images per step, of all processes"
    )
    schedule.add_argument(
        "--accumulate",
        type=int,
        default=d.accumulate,
        help="parts a batch is computed in, one after the other",
    )
    schedule.add_argument("--lr", type=float, default=d.lr, help="peak learning rate")
    schedule.add_argument(
        "--head-lr", type=float, default=d.head_lr, help="of the head, times --lr"
    )
    schedule.add_argument("--momentum", type=float, default=d.momentum, help="of SGD")
    schedule.add_argument("--nesterov", action=YES_NO, default=d.nesterov, help="of SGD")
    schedule.add_argument("--weight-decay", type=float, default=d.weight_decay, help="of SGD")
    schedule.add_argument(
        "--decay-all", action=YES_NO, default=d.decay_all, help="also batch norm and biases"
    )
    schedule.add_argument(
        "--clip-norm", type=float, default=d.clip_norm, help="of the gradient; 0 for no limit"
    )
    schedule.add_argument(
        "--ema", type=float, default=d.ema, help="decay of averaged weights; 0 for none"
    )
    schedule.add_argument("--max-steps", type=int, help="stop early, after this many steps")
    schedule.add_argument(
        "--patience",
        type=int,
        default=d.patience,
        help="validations without a better mIoU before stopping; 0 never stops",
    )
    schedule.add_argument(
        "--val-interval",
        type=int,
        default=d.val_interval,
        help="epochs between validations; 0 never validates",
    )
    schedule.add_argument(
        "--train-scores", action=YES_NO, default=d.train_scores, help="score training batches too"
    )
    schedule.add_argument(
        "--val-batch-size", type=int, default=d.val_batch_size, help="1 if image sizes differ"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default=d.device, help="auto, cpu, cuda or cuda:N")
    machine.add_argument(
        "--precision",
        choices=config.PRECISIONS,
        default=d.precision,
        help="tf32 and fp16 need CUDA",
    )
    machine.add_argument(
        "--channels-last", action=YES_NO, default=d.channels_last, help="memory format"
    )
    machine.add_argument(
        "--cuda-graphs", action=YES_NO, default=d.cuda_graphs, help="replay the captured step"
    )
    machine.add_argument(
        "--compile", action=YES_NO, default=d.compile, help="torch.compile the trunk"
    )
    machine.add_argument(
        "--deterministic",
        action=YES_NO,
        default=d.deterministic,
        help="only algorithms with the same result in every run",
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


def read_settings() -> argparse.Namespace:
    """The command line, over the settings of --config or of the run to resume, over defaults."""
    parser = make_parser()
    args = parser.parse_args()
    if args.output is None and args.resume:
        parser.error("--resume needs --output, the directory of the run to continue")
    if args.output is None and World.from_environment().size > 1:
        parser.error("several processes need --output")
    source = args.config
    if args.resume and source is None and (args.output / "config.json").exists():
        source = args.output / "config.json"
    if source is not None:
        saved = TrainConfig.read(source)
        for name in ("output", "resume"):
            saved.pop(name, None)
        parser.set_defaults(**saved)  # what the command line sets still wins
    elif args.data_root is None:
        if args.dataset != "cityscapes":
            parser.error(f"--dataset {args.dataset} needs --data-root")
        parser.set_defaults(**DEMO)
    args = parser.parse_args()
    if args.output is None:
        args.output = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    return args


def draw_data(args: argparse.Namespace) -> None:
    args.data_root = args.output / "data"
    if World.from_environment().size > 1:
        raise ValueError("data_root: several processes need a data set that is there")
    print(
        "There is no --data-root, so this is a demonstration: it draws street scenes into\n"
        f"{args.data_root} and trains a network on them.\n"
        "With the settings of the demonstration it takes one to three minutes on two CPU cores.\n"
        "To train on Cityscapes itself, pass --data-root DIR, the folder that holds leftImg8bit/ "
        "and gtFine/.\n",
        flush=True,
    )
    write_cityscapes(args.data_root, **DEMO_IMAGES)  # kept if it is there already


def what_next(output: Path) -> str:
    """What to do with the run of the demonstration, as commands that work where it ran."""
    here, python = Path.cwd(), Path(sys.executable)
    if python.is_relative_to(here):
        python = python.relative_to(here)

    def command(script: str, *arguments: str | Path) -> str:
        path = Path(sys.argv[0]).with_name(script)
        return "    " + shlex.join(map(str, (python, path, *arguments)))

    return "\n".join(
        [
            "",
            "What to try next:",
            f"  look at {output / 'predictions.png'}, the images beside the true and the predicted "
            f"classes,\n  and at {output / 'curves.png'}, how the loss fell;",
            "  score the network, and draw which classes it takes for which:",
            command("evaluate.py", output, "--matrix", output / "matrix.png"),
            "  label images, here those of the validation split:",
            command(
                "predict.py", output, output / "data/leftImg8bit/val",
                "--output", output / "labelled",
            ),
            "  train on Cityscapes itself, with --data-root DIR:",
            command("train_cityscapes.py", "--data-root", "DIR"),
        ]
    )  # fmt: skip


def _leave(status: int = 1) -> NoReturn:
    """Ends this process at once: leaving in order would wait for others that wait for this one."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def main() -> int:
    world = World.from_environment()
    output, demonstration = None, False
    try:
        args = read_settings()
        output, demonstration = args.output, args.data_root is None
        if demonstration:
            draw_data(args)
        del args.config
        result = train(TrainConfig(**vars(args)))
    except (
        ValueError, IndexError, OSError,
        CaptureError, CheckpointError, DivergedError, PeerError, WorkerError,
    ) as error:  # fmt: skip
        text = str(error).strip() or type(error).__name__
        # An error from a data worker carries the worker's traceback; its last line says it all.
        text = text.splitlines()[-1] if "Traceback" in text else text
        rank = f"rank {world.rank}: " if world.size > 1 else ""
        print(f"error: {rank}{text}", file=sys.stderr, flush=True)
        if world.size > 1:
            _leave()
        return 1
    except SystemExit as end:  # a wrong command line, or the output is closed
        if isinstance(end, _command_line.OutputClosed) and output and (output / "last.pt").exists():
            print(
                "the output takes nothing more, so the training ended; "
                f"continue it with --output {output} --resume",
                file=sys.stderr,
            )
        if world.size > 1:
            _leave(end.code if isinstance(end.code, int) else 1)
        raise
    except BaseException:
        if world.size > 1:  # out of memory, say
            traceback.print_exc()
            _leave()
        raise
    if result.interrupted:
        if world.main:
            print(
                f"interrupted at step {result.steps}; continue with --output {args.output} --resume"
            )
        return 128 + (result.signal or signal.SIGTERM)
    if world.main:
        print(f"weights, metrics and pictures: {result.output}{os.sep}")
        if demonstration:
            print(what_next(args.output))
    return 0


if __name__ == "__main__":
    _command_line.run(main)
