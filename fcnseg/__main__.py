"""``python -m fcnseg``: what is installed, whether it is right here, and how fast (5 seconds)."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fcnseg

N, C, H, W, S = 2, 19, 256, 512, 8  # of the self-test; S is the stride of the logits
TOLERANCE = 1e-5  # relative to the largest value, float32 against float64
SECONDS = 0.4  # for each timing

_Step = Callable[[], tuple[Tensor, ...]]


def main() -> int:
    info = fcnseg.build_info()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _print_build(info)
    print(f"\nself-test on {_describe(device)}, logits [{N}, {C}, {H // S}, {W // S}] -> {H}x{W}")
    print(f"  {'operator':<30}{'error':>9}{'eager':>12}{'fcnseg':>12}{'faster':>9}  runs on")
    wrong = 0
    for name, eager, fused, exact in _problems(device):
        error = _error(fused(), exact())
        right = error <= TOLERANCE
        wrong += not right
        theirs, ours = _milliseconds(eager, device), _milliseconds(fused, device)
        kind = info["operators"][name][device.type]
        print(
            f"  {name:<30}{error:>9.0e}{theirs:>9.2f} ms{ours:>9.2f} ms{theirs / ours:>8.1f}x  "
            f"{kind}{'' if right else '  WRONG'}"
        )
    if wrong:
        print(f"{wrong} operator(s) gave a wrong result on this machine", file=sys.stderr)
    return min(wrong, 1)


def _print_build(info: dict[str, Any]) -> None:
    print(f"fcnseg {info['version']}, torch {info['torch']}")
    built = info["built"]
    if built is not None:
        cuda = "no CUDA code"
        if built["cuda"] is not None:
            cuda = f"CUDA {built['cuda']} for {built['cuda_archs']}"
        print(f"built with {built['compiler']} against torch {built['torch']}, {cuda}")
    if info["missing_reason"] is not None:
        print(f"compiled operators missing: {info['missing_reason']}")
    else:
        print(f"CPU instructions: {info['cpu_capability']}")
    print(f"\n  {'operator':<30}{'cpu':<12}cuda")
    for name, kinds in info["operators"].items():
        print(f"  {name:<30}{kinds['cpu']:<12}{kinds['cuda']}")


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'s' if threads > 1 else ''}"


def _problems(device: torch.device) -> list[tuple[str, _Step, _Step, _Step]]:
    """(operator, the eager way, the fused way, the eager way in float64)."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(N, C, H // S, W // S, generator=generator)
    blocks = torch.randint(C, (N, H // 16, W // 16), generator=generator)
    target = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    kernel = torch.rand(C, 1, 2 * S, 2 * S, generator=generator)
    logits, target, kernel = logits.to(device), target.to(device), kernel.to(device)
    geometry: dict[str, Any] = {"stride": S, "padding": S // 2, "groups": C}

    def upsampled(x: Tensor) -> Tensor:
        return F.interpolate(x, (H, W), mode="bilinear")

    def counts(labels: Tensor) -> Tensor:
        return torch.bincount((target * C + labels).flatten(), minlength=C * C).view(C, C)

    def loss(function: Callable[..., Tensor], *tensors: Tensor) -> _Step:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]

        def step() -> tuple[Tensor, ...]:
            value = function(*leaves)
            return (value.detach(), *torch.autograd.grad(value, leaves))

        return step

    def bilinear(x: Tensor) -> Tensor:
        return F.cross_entropy(upsampled(x), target)

    def transposed(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.conv_transpose2d(x, weight, **geometry), target)

    labels = fcnseg.upsample_argmax(logits, (H, W))
    return [
        (
            "upsample_cross_entropy",
            loss(bilinear, logits),
            loss(lambda x: fcnseg.upsample_cross_entropy(x, target), logits),
            loss(bilinear, logits.double()),
        ),
        (
            "conv_transpose_cross_entropy",
            loss(transposed, logits, kernel),
            loss(
                lambda x, weight: fcnseg.conv_transpose_cross_entropy(
                    x, weight, target, **geometry
                ),
                logits,
                kernel,
            ),
            loss(transposed, logits.double(), kernel.double()),
        ),
        (
            "upsample_argmax",
            lambda: (upsampled(logits).argmax(1),),
            lambda: (fcnseg.upsample_argmax(logits, (H, W)),),
            lambda: (upsampled(logits.double()).argmax(1),),
        ),
        (
            "upsample_confusion_matrix",
            lambda: (counts(upsampled(logits).argmax(1)),),
            lambda: (fcnseg.upsample_confusion_matrix(logits, target),),
            lambda: (counts(labels),),
        ),
        (
            "confusion_matrix",
            lambda: (counts(labels),),
            lambda: (fcnseg.confusion_matrix(labels, target, C),),
            lambda: (counts(labels),),
        ),
    ]


def _error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest error relative to the largest value; for labels the share that differs."""
    errors = []
    for ours, theirs in zip(found, exact, strict=True):
        if ours.is_floating_point():
            difference = (ours.double() - theirs.double()).abs().max()
            errors.append((difference / theirs.abs().max()).item())
        else:
            errors.append((ours != theirs).double().mean().item())
    return max(errors)


def _milliseconds(step: _Step, device: torch.device) -> float:
    """Median of as many runs as fit in SECONDS, at least three."""

    def once() -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    end = time.perf_counter() + SECONDS
    times = [once() for _ in range(3)]
    while time.perf_counter() < end and len(times) < 1000:
        times.append(once())
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
