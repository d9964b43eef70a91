"""What the ``use_with_*`` examples share: two ways to the same loss, side by side."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from fcnseg import _command_line

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def allow_torchvision_beside_cpu_torch() -> None:
    """PyPI's torchvision is a CUDA build, and beside a CPU build of torch its import looks for the
    schemas of operators that it could not load. Not needed with wheels of the same kind."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)  # a schema lives as long as this object


_libraries: list[torch.library.Library] = []


def make_batch(num_classes: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Two random images and targets in blocks, with a border to ignore."""
    x = torch.randn(2, 3, height, width, device=DEVICE)
    blocks = torch.randint(num_classes, (2, height // 16, width // 16), device=DEVICE)
    target = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    target[:, :8] = 255
    return x, target


def compare(
    model: nn.Module, eager: Callable[[], Tensor], fused: Callable[[], Tensor]
) -> dict[str, float]:
    """Print loss, gradient difference, seconds and peak memory of a step done both ways."""
    found: dict[str, tuple[Tensor, Tensor, float, float]] = {}
    for name, loss in (("eager", eager), ("fused", fused)):
        _step(model, loss)  # warm-up
        before = _reset_peak()
        start = time.perf_counter()
        value, gradient = _step(model, loss)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        found[name] = (value, gradient, time.perf_counter() - start, _peak() - before)
        del value, gradient
    for name, (value, _, seconds, megabytes) in found.items():
        print(f"{name}: loss {value:.6f}, {seconds:.2f} s a step, peak memory +{megabytes:.0f} MB")
    difference = found["fused"][1] - found["eager"][1]
    relative = (difference.norm() / found["eager"][1].norm()).item()
    saved = found["eager"][3] - found["fused"][3]
    print(f"gradients differ by {relative:.1e} (relative); {saved:.0f} MB saved")
    return {
        "loss": abs((found["fused"][0] - found["eager"][0]).item()),
        "gradient": relative,
        "saved": saved,
    }


def run(main: Callable[[], object], doc: str) -> NoReturn:
    """The command line of an example that takes no arguments."""

    def command() -> None:
        argparse.ArgumentParser(description=doc.partition("\n")[0]).parse_args()
        main()

    _command_line.run(command)


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    value = loss()
    value.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return value.detach(), torch.cat(gradients).cpu()


def _status(key: str) -> float:
    """Megabytes, from /proc/self/status; NaN where there is none."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    kilobytes = [line.split()[1] for line in lines if line.startswith(key)]
    return int(kilobytes[0]) / 1024 if kilobytes else float("nan")


def _reset_peak() -> float:
    """Let the peak start anew; what is in use now, MB."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM")
