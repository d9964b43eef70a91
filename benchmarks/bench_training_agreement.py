"""Training with the operators' loss and with eager loss, from the same seeds.

    python benchmarks/bench_training_agreement.py --data-root DIR
    python benchmarks/bench_training_agreement.py --data-root DIR --dtype float32 --epochs 8

In float64 the losses of some steps must agree to rounding. In float32 the rounding grows from step
to step until the two trainings are different ones; the final mIoU of both stands beside the spread
over the seeds. Any data set that fcnseg.data reads; by default one in CamVid's layout.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fcnseg
from fcnseg import data, models
from fcnseg.data import EvalTransform, SegmentationDataset, TrainTransform
from fcnseg.metrics import scores

AUX_WEIGHT = 0.4


def eager_loss(model: models.FCN, x: Tensor, target: Tensor) -> Tensor:
    """What `model.loss` says it equals, from full-resolution logits."""
    full = model(x)
    losses = {
        name: F.cross_entropy(z, target.long(), ignore_index=SegmentationDataset.ignore_index)
        for name, z in full.items()
    }
    return losses["out"] + AUX_WEIGHT * losses["aux"] if "aux" in losses else losses["out"]


def operator_loss(model: models.FCN, x: Tensor, target: Tensor) -> Tensor:
    return model.loss(
        x, target, ignore_index=SegmentationDataset.ignore_index, aux_weight=AUX_WEIGHT
    )


LOSSES = {"operator": operator_loss, "eager": eager_loss}


def batches(
    dataset: SegmentationDataset, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches without end, the same for the same seed."""
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True, generator=order)
    if not len(loader):
        raise SystemExit(f"{dataset.root}: {len(dataset)} images do not fill a batch")
    epoch = 0
    while True:
        dataset.set_epoch(epoch)
        yield from loader
        epoch += 1


def train(
    loss_name: str,
    dataset: SegmentationDataset,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    dtype: torch.dtype,
    **model_options: Any,
) -> tuple[models.FCN, list[float]]:
    """A network trained by SGD with momentum, a short warm-up and cosine annealing; its losses.

    Everything random follows from the seed, so that only the loss tells two runs apart.
    """
    torch.manual_seed(seed)
    depth = model_options.pop("depth")
    model = models.FCN(depth, dataset.num_classes, **model_options).to(dtype)
    optimiser = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    warmup = max(1, steps // 15)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            torch.optim.lr_scheduler.LinearLR(optimiser, 0.1, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps - warmup)),
        ],
        [warmup],
    )
    losses = []
    for _, (images, target) in zip(range(steps), batches(dataset, batch_size, seed), strict=False):
        loss = LOSSES[loss_name](model, data.normalise(images, dtype=dtype), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return model, losses


def validate(model: models.FCN, dataset: SegmentationDataset) -> float:
    """mIoU of the whole images."""
    model.eval()
    matrix = torch.zeros(dataset.num_classes, dataset.num_classes, dtype=torch.int64)
    for images, target in DataLoader(dataset):
        model.update_confusion_matrix(
            matrix, data.normalise(images), target, ignore_index=dataset.ignore_index
        )
    return scores(matrix).mean_iou


def largest_difference(options: argparse.Namespace, **settings: Any) -> float:
    """Prints the losses of both in float64; the largest difference, relative to eager's loss."""
    found = {
        name: train(name, _train_set(options, 0), steps=options.steps, seed=0, **settings)
        for name in LOSSES
    }
    differences = []
    print(f"| step | {' | '.join(found)} | relative difference |\n|---|---|---|---|")
    for step, (ours, theirs) in enumerate(zip(*(x for _, x in found.values()), strict=True), 1):
        differences.append(abs(ours - theirs) / abs(theirs))
        print(f"| {step} | {ours:.12f} | {theirs:.12f} | {differences[-1]:.1e} |")
    (ours, _), (theirs, _) = found.values()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    weights = max((a - b).abs().max().item() for a, b in pairs)
    print(f"largest difference of the losses {max(differences):.1e}, of the weights {weights:.1e}")
    return max(differences)


def compare_miou(options: argparse.Namespace, **settings: Any) -> None:
    """Prints the final mIoU of both, seed by seed, and the spread."""
    val_set = data.open_dataset(options.dataset, options.data_root, "val", EvalTransform())
    found: dict[str, list[float]] = {name: [] for name in LOSSES}
    print("| seed | loss | first | last | mIoU | s |\n|---|---|---|---|---|---|")
    for seed in options.seeds:
        for name in LOSSES:
            start, train_set = time.perf_counter(), _train_set(options, seed)
            steps = options.epochs * (len(train_set) // options.batch_size)
            model, losses = train(name, train_set, steps=steps, seed=seed, **settings)
            found[name].append(validate(model, val_set))
            spent = time.perf_counter() - start
            last = sum(losses[-20:]) / len(losses[-20:])  # of crops, hence a mean
            print(
                f"| {seed} | {name} | {losses[0]:.6f} | {last:.4f} | {found[name][-1]:.4f} "
                f"| {spent:.0f} |",
                flush=True,
            )
    table = torch.tensor([found[name] for name in LOSSES], dtype=torch.float64)  # [2, seeds]
    for name, row in zip(LOSSES, table, strict=True):
        print(f"{name}: mIoU {row.mean():.4f}, spread over seeds (std) {row.std():.4f}")
    difference = table[0] - table[1]
    print(
        f"operator - eager: mean {difference.mean():+.4f}, "
        f"largest of one seed {difference.abs().max():.4f}"
    )


def _train_set(options: argparse.Namespace, seed: int) -> SegmentationDataset:
    transform = TrainTransform(tuple(options.crop), (0.7, 1.3), seed, color_jitter=0)
    return data.open_dataset(options.dataset, options.data_root, "train", transform)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--dataset", default="camvid", help="its kind")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--steps", type=int, default=30, help="in float64")
    parser.add_argument("--tolerance", type=float, default=1e-8, help="in float64")
    parser.add_argument("--epochs", type=int, default=8, help="in float32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="in float32")
    parser.add_argument("--crop", type=int, nargs=2, default=(120, 160), metavar=("H", "W"))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--head", default="fcn")
    parser.add_argument("--deconv-groups", default="grouped")
    parser.add_argument("--output-stride", type=int, default=16)
    parser.add_argument("--skips", help="32s, 16s or 8s, with --output-stride 32")
    parser.add_argument("--aux", action="store_true")
    options = parser.parse_args()
    operator = fcnseg.build_info()["operators"]["conv_transpose_cross_entropy"]["cpu"]
    print(f"conv_transpose_cross_entropy on the CPU: {operator}; torch {torch.__version__}")
    settings = {
        "batch_size": options.batch_size,
        "lr": options.lr,
        "dtype": getattr(torch, options.dtype),
        "depth": options.depth,
        "head": options.head,
        "upsample": "deconv",
        "deconv_groups": options.deconv_groups,
        "output_stride": options.output_stride,
        "skips": options.skips,
        "aux_loss": options.aux,
    }
    if options.dtype == "float32":
        compare_miou(options, **settings)
    elif not largest_difference(options, **settings) <= options.tolerance:
        raise SystemExit(f"the losses differ by more than {options.tolerance:g}")


if __name__ == "__main__":
    main()
