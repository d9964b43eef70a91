"""Loss curves of training with the fused and with PyTorch's loss, in fp32, fp16 and bf16.

    python benchmarks/bench_training_curves.py --device cuda [--steps 200] [--seeds 0 1 2]

A part of ``make gpu-train``. ResNet-18 FCN on drawn street scenes, by the trainer's step and
in its precisions (TF32 off, autocast, a GradScaler for fp16); everything random follows from the
seed, so that two curves of a seed differ by the loss alone. Rounding makes them part all the same:
eager's gradient alone is summed in another order in every run on a GPU. So the distance of the
fused curve from the eager one of the same seed stands beside two others: that of a second eager run
("again"), and that of the eager curves of different seeds. A distance is the largest difference of
the two curves' moving means over a tenth of the steps.

They agree, for a precision, where fused and eager are never farther apart than the seeds are; the
exit status is 1 where they do not. Runs are jobs under deadlines (jobs.py) in the order: one seed
in every precision, then the next seed. With ``--device cpu --quick`` a tiny network rehearses it.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from clocks import DEVICE_VARIABLE, device
from curves_table import line, table, title, verdicts
from harness import require_compiled
from jobs import HEADER, Job, Results, run_jobs
from processes import environment
from torch import Tensor
from training_configurations import LOSSES, PRECISIONS, TinyNetwork, switches

from fcnseg import data
from fcnseg.data import synthetic
from fcnseg.graphs import TrainStep
from fcnseg.models import fcn_resnet18

CLASSES = len(data.Cityscapes.classes)
LIMIT, LEAST = 60.0, 12.0  # seconds of a run: its deadline, and what it is not begun without


# -- a run -----------------------------------------------------------------------------------------


@functools.cache
def scenes(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, H, W] and labels uint8 [N, H, W], on the device."""
    with tempfile.TemporaryDirectory() as folder:
        root = synthetic.write_cityscapes(
            Path(folder) / "scenes", train=count, val=1, size=(height, width)
        )
        samples = data.Cityscapes(root, "train", data.EvalTransform())
        images, labels = zip(*(samples[i] for i in range(count)), strict=True)
    return torch.stack(images).to(device()), torch.stack(labels).to(device())


def batch(
    pool: tuple[Tensor, Tensor], size: int, crop: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A random batch: images of the pool, one window, one flip; drawn on the host."""
    images, labels = pool

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    chosen = torch.randperm(len(images), generator=generator)[:size].to(images.device)
    top = draw(images.shape[-2] - crop[0] + 1)
    left = draw(images.shape[-1] - crop[1] + 1)
    window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
    x, target = images[chosen][window], labels[chosen][window]
    if draw(2):
        x, target = x.flip(-1), target.flip(-1)
    return x.contiguous(), target.long().contiguous()


def train(
    loss: str,
    precision: str,
    seed: int,
    *,
    steps: int,
    batch_size: int,
    crop: Sequence[int],
    tiny: bool,
    again: bool,
) -> dict[str, Any]:
    """The losses of all steps. ``again`` changes nothing but what the device itself leaves open."""
    switches(tf32=False, search=True)
    if loss == "fused":
        require_compiled("upsample_cross_entropy")
    pool = scenes(8 if tiny else 64, crop[0] * 4 // 3, crop[1] * 4 // 3)
    torch.manual_seed(seed)
    with torch.device(device()):
        model = TinyNetwork(CLASSES) if tiny else fcn_resnet18(CLASSES, output_stride=8)
    model.train().to(memory_format=torch.channels_last)  # as the images are
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, fused=True
    )
    for parameter in model.parameters():  # a GradScaler that skips the first step needs it
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    autocast = PRECISIONS.get(precision)
    warmup = max(1, steps // 10)
    step = TrainStep(
        lambda x, target: LOSSES[loss](model.low_resolution(x)["out"], target),
        optimizer,
        [min(1.0, (i + 1) / warmup) * (1 - i / steps) ** 0.9 for i in range(steps)],
        torch.device(device()),
        scaler=torch.amp.GradScaler(device(), enabled=precision == "fp16"),
        autocast=autocast,
        prepare=data.normalise,
        history=steps,
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        step(*batch(pool, batch_size, (crop[0], crop[1]), generator))
    losses = step.losses.tolist()
    broken = [i for i, value in enumerate(losses, 1) if not abs(value) < float("inf")]
    if broken:
        return {"failed": f"the loss is {losses[broken[0] - 1]} at step {broken[0]}"}
    return {"losses": [round(value, 6) for value in losses]}


# -- all runs --------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> list[Job]:
    command = " ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])
    jobs = [Job(HEADER, {"command": command}, LIMIT, LEAST)]
    runs = [
        (precision, seed, loss, False)
        for seed in args.seeds
        for precision in args.precisions
        for loss in LOSSES
    ]
    runs += [(precision, args.seeds[0], "eager", True) for precision in args.precisions]
    for precision, seed, loss, again in runs:
        arguments = {
            "loss": loss,
            "precision": precision,
            "seed": seed,
            "steps": args.steps,
            "batch_size": args.batch_size,
            "crop": args.crop,
            "tiny": args.quick,
            "again": again,
        }
        jobs.append(Job(title(arguments), arguments, LIMIT, LEAST, kind=precision))
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", *PRECISIONS])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop", type=int, nargs=2, default=(192, 384), metavar=("H", "W"))
    parser.add_argument("--seconds", type=float, default=150, help="of all runs")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="tiny problems: a test of the code")
    args = parser.parse_args()
    if args.precisions is None:  # PyTorch has no GradScaler's fp16 training on the CPU
        args.precisions = ["fp32", "fp16", "bf16"] if args.device == "cuda" else ["fp32", "bf16"]
    elif args.device == "cpu" and "fp16" in args.precisions:
        parser.error("--precisions fp16: it needs a CUDA device")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    if args.quick:
        args.steps, args.batch_size, args.crop = 20, 2, (48, 96)
    path = args.output
    if path is None and args.quick and not os.environ.get("OUT"):
        path = False  # a rehearsal has no figures to keep
    jobs = plan(args)
    settings = {"tf32": "off"} | ({"quick": True} if args.quick else {})
    results = Results("curves", jobs, settings, line, path)
    threads = {"OMP_NUM_THREADS": "1"} if args.quick and args.device == "cpu" else {}
    run_jobs(
        "bench_training_curves:train",
        jobs,
        args.seconds,
        results.keep,
        environment=environment({DEVICE_VARIABLE: args.device, **threads}),
    )
    print(f"\n{table(results.content())}")
    if results.path:
        print(f"\n{os.path.relpath(results.path)}")
    failed = any("failed" in row for row in results.rows)
    return int(failed or any(found["agree"] is False for found in verdicts(results.rows)))


if __name__ == "__main__":
    sys.exit(main())
