"""One training step of ResNet-101 FCN, loss by PyTorch and loss by fcnseg, in one process.

    python benchmarks/bench_training_step.py [--classes 19 150] [--repeats 3]

On a CPU (2 threads, batch 2, 512x512, output stride 8): time of a step, peak memory, and the share
of the head and the loss, forward and backward. The step is cut at the trunk's features, which
changes no result, so that its pieces can be timed.

    python benchmarks/bench_training_step.py --device cuda [--batches 2 4 8 16] [--largest]

On a GPU: images/s and peak memory of PyTorch's step in fp32 and under autocast, and of what is
added to it one by one: channels_last, the fused loss, the CUDA graph, the compiled trunk.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import header, require_compiled
from torch import Tensor
from torch.nn import functional as F

import fcnseg
from fcnseg.graphs import GraphedTrainStep, TrainStep
from fcnseg.models import FCN, fcn_resnet101


def eager_loss(logits: Tensor, target: Tensor) -> Tensor:
    full = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full, target, ignore_index=255)


def fused_loss(logits: Tensor, target: Tensor) -> Tensor:
    return fcnseg.upsample_cross_entropy(logits, target, ignore_index=255)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"eager": eager_loss, "fused": fused_loss}


def inputs(batch: int, classes: int, size: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, *size, generator=generator)
    blocks = torch.randint(0, classes, (batch, size[0] // 16, size[1] // 16), generator=generator)
    target = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    target[:, :16] = 255
    return x.to(device), target.to(device)


def network(classes: int, device: str, *, channels_last: bool) -> FCN:
    torch.manual_seed(0)
    model = fcn_resnet101(classes, output_stride=8).to(device)
    for module in model.modules():  # equal draws are not part of the step
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]


def sgd(model: FCN) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    for parameter in model.parameters():  # made by the first step otherwise: it is to be like all
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# -- CPU -------------------------------------------------------------------------------------------


def peak_memory() -> float:
    """GB, resident, since the last :func:`reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def reset_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def cpu_step(
    model: FCN, optimizer: torch.optim.SGD, name: str, x: Tensor, target: Tensor
) -> dict[str, float]:
    """Seconds of the step and of the head and loss in it; GB beyond weights and momentum; loss."""
    reset_peak()
    before = peak_memory()
    start = time.perf_counter()
    *_, features = model.backbone(x)
    cut = features.detach().requires_grad_()
    begin = time.perf_counter()
    loss = LOSSES[name](model.classifier(cut), target)
    loss.backward()
    end = time.perf_counter()
    features.backward(cut.grad)
    optimizer.step()
    stop = time.perf_counter()
    memory = peak_memory() - before
    optimizer.zero_grad(set_to_none=True)
    return {"step": stop - start, "head": end - begin, "memory": memory, "loss": loss.item()}


def loss_alone(classes: int, repeats: int, size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """The loss alone, forward and backward, on the head's logits; GB beyond what was there."""
    model = network(classes, "cpu", channels_last=True)
    _, target = inputs(2, classes, size, "cpu")
    features = torch.randn(2, 2048, size[0] // 8, size[1] // 8).relu_()
    features = features.contiguous(memory_format=torch.channels_last)
    found = {}
    for name, loss in LOSSES.items():
        logits = model.classifier(features).detach().requires_grad_()
        seconds, memory = [], 0.0
        for _ in range(repeats + 1):
            logits.grad = None
            reset_peak()
            before = peak_memory()
            start = time.perf_counter()
            loss(logits, target).backward()
            seconds.append(time.perf_counter() - start)
            memory = peak_memory() - before
        found[name] = {"loss": statistics.median(seconds[1:]), "memory": memory}
    return found


def on_cpu(args: argparse.Namespace) -> list[dict[str, Any]]:
    require_compiled("upsample_cross_entropy")
    torch.set_num_threads(2)
    rows = []
    for classes in args.classes:
        x, target = inputs(2, classes, args.size, "cpu")
        x = x.contiguous(memory_format=torch.channels_last)
        alone = loss_alone(classes, args.repeats, args.size)
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in LOSSES}
        models = {}
        for name in LOSSES:  # alike in the weights at every step
            model = network(classes, "cpu", channels_last=True)
            models[name] = (model, sgd(model))
        for _ in range(args.repeats):
            for name in LOSSES:
                steps[name].append(cpu_step(*models[name], name, x, target))
        for eager, fused in zip(steps["eager"], steps["fused"], strict=True):
            difference = abs(eager["loss"] - fused["loss"])
            assert difference <= 1e-3 * eager["loss"], (eager["loss"], fused["loss"])
        for name, values in steps.items():
            row: dict[str, Any] = {"classes": classes, "loss by": name}
            for key in ("step", "head", "memory"):
                row[key] = statistics.median(value[key] for value in values)
            row["loss alone"], row["memory of loss"] = alone[name]["loss"], alone[name]["memory"]
            rows.append(row)
    print("| classes | loss by | step, s | head + loss | loss, s | loss | peak, GB | of loss, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['classes']} | {row['loss by']} | {row['step']:.2f} "
            f"| {row['head'] / row['step']:.1%} | {row['loss alone']:.3f} "
            f"| {row['loss alone'] / row['step']:.1%} | {row['memory']:.2f} "
            f"| {row['memory of loss']:.3f} |"
        )
    return rows


# -- GPU -------------------------------------------------------------------------------------------

# Each line adds to the one before.
MODES: dict[str, dict[str, bool]] = {"eager fp32": {}, "eager AMP": {"amp": True}}
for _name in ("channels_last", "fused", "graph", "compiled"):
    MODES["+ " + _name] = list(MODES.values())[-1] | {_name: True}


def gpu_step(
    classes: int, *, amp: bool = False, channels_last: bool = False, fused: bool = False,
    graph: bool = False, compiled: bool = False,
) -> tuple[TrainStep, Callable[..., Tensor]]:  # fmt: skip
    model = network(classes, "cuda", channels_last=channels_last).train()
    if compiled:
        model.backbone.compile()
    loss = LOSSES["fused" if fused else "eager"]

    def objective(x: Tensor, target: Tensor) -> Tensor:
        return loss(model.low_resolution(x)["out"], target)

    step = TrainStep(
        objective, sgd(model), [1.0], torch.device("cuda"),
        autocast=torch.bfloat16 if amp else None,
    )  # fmt: skip
    return step, GraphedTrainStep(step) if graph else step


def gpu_time(run: Callable[..., Tensor], x: Tensor, target: Tensor, seconds: float = 3.0) -> float:
    """Median seconds of a step."""
    for _ in range(6):
        run(x, target)
    torch.cuda.synchronize()
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 10:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()  # type: ignore[no-untyped-call]
        run(x, target)
        end.record()  # type: ignore[no-untyped-call]
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def measure(mode: str, classes: int, batch: int, size: tuple[int, int]) -> dict[str, Any] | None:
    """Images/s, peak GB and the first losses; None where the memory does not suffice."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        _, run = gpu_step(classes, **MODES[mode])
        x, target = inputs(batch, classes, size, "cuda")
        if MODES[mode].get("channels_last"):
            x = x.contiguous(memory_format=torch.channels_last)
        losses = [run(x, target).item() for _ in range(8)]
        rate = batch / gpu_time(run, x, target)
    except torch.OutOfMemoryError:
        return None
    if isinstance(run, GraphedTrainStep) and run.reason is not None:
        raise RuntimeError(f"{mode}: no graph: {run.reason}")
    return {
        "mode": mode, "classes": classes, "batch": batch, "images_per_second": rate,
        "memory": torch.cuda.max_memory_allocated() / 1e9, "losses": losses,
    }  # fmt: skip


def largest_batch(mode: str, classes: int, size: tuple[int, int]) -> int:
    """By doubling, then by halving the gap."""
    low, high = 0, 1
    while measure(mode, classes, high, size) is not None:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if measure(mode, classes, middle, size) is None:
            high = middle
        else:
            low = middle
    return low


def on_gpu(args: argparse.Namespace) -> list[dict[str, Any]]:
    print("| classes | size | batch | step | images/s | peak, GB |\n|---|---|---|---|---|---|")
    rows = []
    for classes in args.classes:
        size = (512, 1024) if classes == 19 else (512, 512)
        for batch in args.batches:
            for mode in MODES:
                row = measure(mode, classes, batch, size)
                head = f"| {classes} | {size[0]}x{size[1]} | {batch} | {mode} |"
                if row is None:
                    print(head, "out of memory | |")
                    continue
                rows.append(row)
                print(head, f"{row['images_per_second']:.1f} | {row['memory']:.2f} |", flush=True)
        if args.largest:
            for mode in ("eager AMP", "+ fused", "+ graph"):
                batch = largest_batch(mode, classes, size)
                rows.append({"mode": mode, "classes": classes, "largest_batch": batch})
                print(f"| {classes} | {size[0]}x{size[1]} | largest: {batch} | {mode} | | |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--classes", type=int, nargs="+", default=[19, 150])
    parser.add_argument("--repeats", type=int, default=3, help="steps timed on a CPU")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), help="on a CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 16], help="on a GPU")
    parser.add_argument("--largest", action="store_true", help="largest batches on a GPU")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    args.size = tuple(args.size)
    about = header()
    if args.device == "cuda":
        about["device"] = torch.cuda.get_device_name()
    print("; ".join(f"{key} {about[key]}" for key in ("device", "torch", "commit", "date")))
    rows = on_gpu(args) if args.device == "cuda" else on_cpu(args)
    if args.output is not None:
        args.output.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
