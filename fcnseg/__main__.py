"""``python -m fcnseg``: what is installed, whether it is right here, and how fast."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fcnseg
from fcnseg import _command_line

N, C, H, W, S = 1, 19, 256, 512, 8  # of the self-test; S is the stride of the logits
IGNORED = 255
TOLERANCE = 1e-5  # relative to the largest value, float32 against float64
SECONDS = 0.12  # for the times of each operator

DESCRIPTION = """\
Tells what is installed, compares every operator of fcnseg with the same computation in float64, and
times it beside the plain PyTorch that it replaces, all on a small problem: on the GPU if PyTorch
sees one, else on the CPU. It takes less than 5 seconds on two CPU cores. The first run on a GPU
compiles kernels, which takes up to a minute."""

EPILOG = """\
columns of the table:
  operator   the name, as in fcnseg.build_info()["operators"]
  cpu, cuda  what computes it for tensors on a CPU and on a CUDA device: c++, cuda (CUDA C++),
             triton, or reference, which is plain PyTorch and slow (where it is the CPU that runs
             it, or a CUDA device that is there, the cause stands below)
  error      the largest error against float64, of a loss and its gradients relative to the
             largest value; of labels and counts the share of those that differ
  eager      median time of plain PyTorch; of a loss with its gradients
  fcnseg     median time of the operator
  faster     the first time divided by the second

On the CPU both times are those of one thread, so that they mean the same on every machine, also on
a busy one; the results of compiled operators are compared as all threads compute them.

The exit status is 0 if all results are right, even where they are slow; 1 if one is wrong; 2 if the
command line is."""

_Function = Callable[..., Tensor]


@dataclass(frozen=True)
class _Problem:
    """An operator with its arguments; the gradient is taken of those that require one."""

    operator: str
    eager: _Function
    fused: _Function
    inputs: tuple[Tensor, ...] = ()

    def run_eager(self) -> tuple[Tensor, ...]:
        return _results(self.eager, self.inputs)

    def run_fused(self) -> tuple[Tensor, ...]:
        return _results(self.fused, self.inputs)

    def run_exact(self) -> tuple[Tensor, ...]:
        """The eager way in float64."""
        inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in self.inputs]
        return _results(self.eager, inputs)


def _results(function: _Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    value = function(*inputs)
    if not value.requires_grad:
        return (value,)
    return (value.detach(), *torch.autograd.grad(value, inputs))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fcnseg",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fcnseg {fcnseg.__version__}")
    parser.parse_args(arguments)
    info = fcnseg.build_info()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _print_build(info)
    if device.type == "cuda":
        print("\nThe first run on a GPU compiles kernels, which takes up to a minute.")
    threads = torch.get_num_threads()
    try:
        wrong = _test(info["operators"], device, threads)
    finally:
        torch.set_num_threads(threads)
    _print_causes(info)
    if wrong:
        print(f"error: wrong or failing on this machine: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _print_build(info: dict[str, Any]) -> None:
    print(f"fcnseg {info['version']}, torch {info['torch']}")
    built = info["built"]
    if built is not None:
        cuda = "no CUDA code"
        if built["cuda"] is not None:
            cuda = f"CUDA {built['cuda']} for {built['cuda_archs']}"
        print(f"built with {built['compiler']} against torch {built['torch']}, {cuda}")
    if info["cpu_capability"] is not None:
        print(f"CPU instructions: {info['cpu_capability']}")


def _print_causes(info: dict[str, Any]) -> None:
    """Why operators run on the slow reference, and what mends it."""
    causes = list(info["notes"])
    if info["missing_reason"] is not None:
        causes.insert(0, f"{info['missing_reason']} To mend it: {info['mend']}")
    if causes:
        print("\n" + "\n".join(causes))


def _test(kinds: dict[str, dict[str, str]], device: torch.device, threads: int) -> list[str]:
    """Print the table; the operators whose results are wrong, or that give none."""
    where = "the CPU, timed on one thread"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    print(f"\nself-test on {where}: logits [{N}, {C}, {H // S}, {W // S}], labels [{N}, {H}, {W}]")
    print(
        f"  {'operator':<30}{'cpu':<11}{'cuda':<11}{'error':>5}{'eager':>12}{'fcnseg':>12}"
        f"{'faster':>9}",
        flush=True,
    )
    wrong = []
    for problem in _problems(device):
        name = problem.operator
        line = f"  {name:<30}{kinds[name]['cpu']:<11}{kinds[name]['cuda']:<11}"
        try:
            # The compiled operators must be right on all threads. PyTorch's own need no such check,
            # and on a busy machine their threads wait for each other, up to a second a call.
            torch.set_num_threads(1 if kinds[name][device.type] == "reference" else threads)
            found = problem.run_fused()
            torch.set_num_threads(1)
            error, right = _compare(found, problem.run_exact())
            eager, fused = _milliseconds(problem, device)
        except Exception as exception:  # the others may still work
            lines = str(exception).splitlines() or [""]
            line += f"FAILED: {type(exception).__name__}: {lines[0]}"
            right = False
        else:
            line += f"{error:>5.0e}{eager:>9.2f} ms{fused:>9.2f} ms{eager / fused:>8.1f}x"
            line += "" if right else "  WRONG"
        print(line, flush=True)
        if not right:
            wrong.append(name)
    return wrong


def _problems(device: torch.device) -> list[_Problem]:
    """One for every operator.

    The labels of the fused operators must be those of float64, so no rounding may decide between
    two classes. The logits, kernels and weights of the upsampling are small multiples of powers of
    two, so that float32 holds every sum exactly, and each class has an own offset, finer than all
    steps between these sums, so that no two classes are ever equal.
    """
    generator = torch.Generator().manual_seed(0)

    def multiples(step: float, *shape: int) -> Tensor:
        return step * torch.randint(64, shape, generator=generator)

    offset = torch.arange(C) * 2.0**-17
    logits = multiples(1 / 8, N, C, H // S, W // S)
    kernel = multiples(1 / 64, C, 1, 2 * S, 2 * S)
    target = torch.randint(C, (N, H // 16, W // 16), generator=generator)
    target[:, :1] = IGNORED
    target = target.repeat_interleave(16, 1).repeat_interleave(16, 2)
    offset, logits, kernel, target = (x.to(device) for x in (offset, logits, kernel, target))
    distinct = logits + offset[:, None, None]
    geometry: dict[str, Any] = {"stride": S, "padding": S // 2, "groups": C}
    start = torch.arange(C * C, device=device).view(C, C)  # what is there already

    def upsampled(x: Tensor) -> Tensor:
        return F.interpolate(x, (H, W), mode="bilinear")

    def transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, **geometry)

    def cross_entropy(x: Tensor) -> Tensor:
        return F.cross_entropy(x, target, ignore_index=IGNORED)

    def counts(labels: Tensor) -> Tensor:
        kept = target != IGNORED
        pairs = target[kept] * C + labels[kept]
        return torch.bincount(pairs, minlength=C * C).view(C, C)

    labels = upsampled(distinct.double()).argmax(1)
    learned = logits.clone().requires_grad_(), kernel.clone().requires_grad_()
    return [
        _Problem(
            "upsample_cross_entropy",
            lambda x: cross_entropy(upsampled(x)),
            lambda x: fcnseg.upsample_cross_entropy(x, target, ignore_index=IGNORED),
            learned[:1],
        ),
        _Problem(
            "conv_transpose_cross_entropy",
            lambda x, weight: cross_entropy(transposed(x, weight)),
            lambda x, weight: fcnseg.conv_transpose_cross_entropy(
                x, weight, target, ignore_index=IGNORED, **geometry
            ),
            learned,
        ),
        _Problem(
            "upsample_argmax",
            lambda x: upsampled(x).argmax(1),
            lambda x: fcnseg.upsample_argmax(x, (H, W)),
            (distinct,),
        ),
        _Problem(
            "conv_transpose_argmax",
            lambda *inputs: transposed(*inputs).argmax(1),
            lambda x, weight, bias: fcnseg.conv_transpose_argmax(
                x, weight, (H, W), bias, **geometry
            ),
            (logits, kernel, offset),
        ),
        _Problem(
            "confusion_matrix",
            lambda: counts(labels),
            lambda: fcnseg.confusion_matrix(labels, target, C, ignore_index=IGNORED),
        ),
        _Problem(
            "confusion_matrix_",
            lambda: start.clone().add_(counts(labels)),
            lambda: fcnseg.confusion_matrix_(start.clone(), labels, target, ignore_index=IGNORED),
        ),
        _Problem(
            "upsample_confusion_matrix",
            lambda x: counts(upsampled(x).argmax(1)),
            lambda x: fcnseg.upsample_confusion_matrix(x, target, ignore_index=IGNORED),
            (distinct,),
        ),
        _Problem(
            "upsample_confusion_matrix_",
            lambda x: start.clone().add_(counts(upsampled(x).argmax(1))),
            lambda x: fcnseg.upsample_confusion_matrix_(
                start.clone(), x, target, ignore_index=IGNORED
            ),
            (distinct,),
        ),
    ]


def _compare(found: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, bool]:
    """The largest error, and whether it is small enough."""
    errors, right = [], True
    for ours, theirs in zip(found, exact, strict=True):
        if theirs.is_floating_point():
            difference = (ours.double() - theirs).abs().max()
            errors.append((difference / theirs.abs().max()).item())
            right &= errors[-1] <= TOLERANCE  # false for NaN
        else:
            errors.append((ours != theirs).double().mean().item())
            right &= errors[-1] == 0
    return max(errors), right


def _milliseconds(problem: _Problem, device: torch.device) -> tuple[float, float]:
    """Median times of the eager and the fused way, run in turns so that both meet the same load."""
    steps = problem.run_eager, problem.run_fused
    times: tuple[list[float], list[float]] = [], []
    for step in steps:  # to warm up
        step()
    end = time.perf_counter() + SECONDS
    while not times[0] or time.perf_counter() < end:
        for step, seconds in zip(steps, times, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    eager, fused = (1e3 * statistics.median(seconds) for seconds in times)
    return eager, fused


if __name__ == "__main__":
    _command_line.run(main)
