"""One training step of ResNet-101 FCN, loss by PyTorch and loss by fcnseg, in one process.

    python benchmarks/bench_training_step.py [--classes 19 150] [--repeats 3]

On a CPU (2 threads, batch 2, 512x512, output stride 8): time of a step, peak memory, and the share
of the head and the loss, forward and backward. The step is cut at the trunk's features, which
changes no result, so that its pieces can be timed.

    python benchmarks/bench_training_step.py --device cuda [--seconds 400] [--precision bf16|fp16]
        [--tf32] [--memory-cap 72]

On a GPU, a part of ``make gpu-train``: images/s and peak memory of PyTorch's step in
fp32 and under autocast, and of what is added to it one by one: channels_last, the fused loss, the
CUDA graph, the compiled trunk; and the largest batch that fits a memory cap (GiB, the same on every
card). How: training_configurations.py. Every configuration is a job under a deadline (jobs.py), in
order of worth (:func:`plan`); its figures are in the file of results as soon as it ends, in $OUT or
in results/. What found no time is named there.

    python benchmarks/bench_training_step.py --device cpu --quick

rehearses the jobs of the GPU with a tiny network on the CPU; the results go to $OUT, if it is set.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from clocks import DEVICE_VARIABLE
from harness import require_compiled
from jobs import HEADER, Job, Results, run_jobs
from processes import environment
from result_files import header, write
from torch import Tensor
from training_configurations import (
    CONFIGURATIONS,
    LOSSES,
    PRECISIONS,
    Network,
    inputs,
    network,
    peak_memory,
    reset_peak,
    sgd,
)
from training_table import line, table, title

# -- CPU -------------------------------------------------------------------------------------------


CPU_TOLERANCE = 1e-3  # of the losses of each step, relative


def cpu_step(
    model: Network, optimizer: torch.optim.SGD, name: str, x: Tensor, target: Tensor
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
    memory = (peak_memory() - before) / 1e9
    optimizer.zero_grad(set_to_none=True)
    return {"step": stop - start, "head": end - begin, "memory": memory, "loss": loss.item()}


def loss_alone(classes: int, repeats: int, size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """The loss alone, forward and backward, on the head's logits; GB beyond what was there."""
    model = network(classes, channels_last=True)
    _, target = inputs(2, classes, size)
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
            memory = (peak_memory() - before) / 1e9
        found[name] = {"loss": statistics.median(seconds[1:]), "memory": memory}
    return found


def on_cpu(args: argparse.Namespace) -> list[dict[str, Any]]:
    require_compiled("upsample_cross_entropy")
    torch.set_num_threads(2)
    rows = []
    for classes in args.classes:
        x, target = inputs(2, classes, args.size)
        x = x.contiguous(memory_format=torch.channels_last)
        alone = loss_alone(classes, args.repeats, args.size)
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in LOSSES}
        models = {}
        for name in LOSSES:  # alike in the weights at every step
            model = network(classes, channels_last=True)
            models[name] = (model, sgd(model))
        for _ in range(args.repeats):
            for name in LOSSES:
                steps[name].append(cpu_step(*models[name], name, x, target))
        for eager, fused in zip(steps["eager"], steps["fused"], strict=True):
            difference = abs(eager["loss"] - fused["loss"])
            if not difference <= CPU_TOLERANCE * eager["loss"]:
                raise SystemExit(f"the losses differ: {eager['loss']}, fused {fused['loss']}")
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

GIB = 1 << 30
LARGE, SMALL = (512, 1024), (512, 512)
#: (classes, size, batch), in order of worth.
PROBLEMS = [
    (19, LARGE, 2),
    (19, LARGE, 16),
    (150, SMALL, 16),
    (150, SMALL, 8),
    (19, LARGE, 8),
]
COMPILED = "+ compiled trunk"
EAGER = [name for name in CONFIGURATIONS if name != COMPILED]
#: Whose largest batches are compared; the third tells what channels_last has of the difference.
FITTED = ["eager AMP", "+ fused loss", "AMP channels_last"]
# Seconds: a job is ended after the first, not begun with less than the second.
LIMITS = {"measure": (75.0, 12.0), "compiled": (150.0, 60.0), "largest": (75.0, 25.0)}


Problem = tuple[int, tuple[int, int], int]


def plan(args: argparse.Namespace) -> list[Job]:
    """The jobs in order of worth.

    What compiles nothing comes first, for a compilation takes as long as five of the others: the
    small and the large batch of 19 classes, 150 classes, the largest batches. Then the compiled
    trunk at batch 2, where launches are most of the step; then the rest.
    """
    two, sixteen, many, fewer, eight = PROBLEMS
    command = " ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])
    return [
        Job(HEADER, {"command": command}, *LIMITS["measure"], _group(two)),
        *_measured(args, two, EAGER),
        *_measured(args, sixteen, EAGER),
        *_fitted(args, two, FITTED[:2]),
        *_measured(args, many, EAGER),
        *_fitted(args, many, FITTED[:2]),
        *_measured(args, two, [COMPILED]),
        *_measured(args, fewer, EAGER),
        *_measured(args, eight, EAGER),
        *_measured(args, sixteen, [COMPILED]),
        *_fitted(args, two, FITTED[2:]),
        *_fitted(args, many, FITTED[2:]),
        *_measured(args, many, [COMPILED]),
        *_measured(args, fewer, [COMPILED]),
        *_measured(args, eight, [COMPILED]),
    ]


def _group(problem: Problem) -> str:
    return f"{problem[0]} classes, batch {problem[2]}"


def _common(args: argparse.Namespace, problem: Problem) -> dict[str, Any]:
    classes, size, _ = problem
    shrink = 16 if args.quick else 1
    return {
        "classes": classes,
        "size": [size[0] // shrink, size[1] // shrink],
        "precision": args.precision,
        "tf32": args.tf32,
        "tiny": args.quick,
    }


def _measured(args: argparse.Namespace, problem: Problem, names: Sequence[str]) -> list[Job]:
    jobs = []
    for name in names:
        kind = "compiled" if name == COMPILED else "measure"
        arguments = {
            "kind": "measure",
            "configuration": name,
            "batch": problem[2],
            "seconds": 0.05 if args.quick else args.step_seconds,
            **_common(args, problem),
        }
        group = _group(problem) + (", compiled" if name == COMPILED else "")
        jobs.append(Job(title(arguments), arguments, *LIMITS[kind], group, kind))
    return jobs


def _fitted(args: argparse.Namespace, problem: Problem, names: Sequence[str]) -> list[Job]:
    jobs = []
    for name in names:
        arguments = {
            "kind": "largest",
            "configuration": name,
            "capacity": args.memory_cap * GIB,
            "most": 4 if args.quick else 1024,
            **_common(args, problem),
        }
        named = title(arguments)
        jobs.append(Job(named, arguments, *LIMITS["largest"], named, "largest"))
    return jobs


def with_expected(job: Job, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The job's arguments, with the losses that it must agree with where ``rows`` know them."""
    given = dict(job.arguments)
    if given.get("kind") == "measure":
        known = [
            row["losses"]
            for row in rows
            if all(row.get(key) == given[key] for key in ("classes", "size", "batch"))
            and not CONFIGURATIONS[row["configuration"]].get("fused")
            and "losses" in row
        ]
        given["expected"] = known[-1] if known else None
    return given


def on_gpu(args: argparse.Namespace) -> int:
    """Does the jobs; 1 if one of them failed."""
    jobs = plan(args)
    settings = {
        "precision": f"AMP in {args.precision}",
        "tf32": "on" if args.tf32 else "off",
        "memory_cap_gib": args.memory_cap,
        **({"quick": True} if args.quick else {}),
    }
    path = args.output
    if path is None and args.quick and not os.environ.get("OUT"):
        path = False  # a rehearsal has no figures to keep
    results = Results("training", jobs, settings, line, path)
    # more threads would wait for each other on a machine that has other work
    threads = {"OMP_NUM_THREADS": "1"} if args.device == "cpu" else {}
    run_jobs(
        "training_configurations:do",
        jobs,
        args.seconds,
        results.keep,
        environment=environment({DEVICE_VARIABLE: args.device, **threads}),
        arguments=lambda job: with_expected(job, results.rows),
    )
    print(f"\n{table(results.content())}")
    if results.path:
        print(f"\n{os.path.relpath(results.path)}")
    return int(any("failed" in row for row in results.rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    cpu = parser.add_argument_group("on a CPU")
    cpu.add_argument("--classes", type=int, nargs="+", default=[19, 150])
    cpu.add_argument("--repeats", type=int, default=3, help="steps that are timed")
    cpu.add_argument("--size", type=int, nargs=2, default=(512, 512))
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--seconds", type=float, default=480, help="of all jobs")
    gpu.add_argument("--step-seconds", type=float, default=2, help="of timed steps, each job")
    gpu.add_argument("--precision", choices=list(PRECISIONS), default="bf16", help="of AMP")
    gpu.add_argument("--tf32", action="store_true", help="for the float32 products")
    gpu.add_argument("--memory-cap", type=float, default=72, help="GiB, for the largest batch")
    gpu.add_argument("--quick", action="store_true", help="tiny problems: a test of the code")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    if args.device == "cpu" and args.precision == "fp16":
        parser.error("--precision fp16: it needs a CUDA device; on the CPU use bf16")
    os.environ[DEVICE_VARIABLE] = args.device
    if args.device == "cuda" or args.quick:
        return on_gpu(args)
    about = header()
    print("; ".join(f"{key} {about[key]}" for key in ("device", "torch", "commit", "date")))
    rows = on_cpu(args)
    if args.output is not None:
        write(args.output, about | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
