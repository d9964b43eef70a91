"""Files of results, and their header: what the figures belong to."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from clocks import device
from processes import HERE, ROOT, write_at_once

import fcnseg

RESULTS = HERE / "results"
COMMIT_VARIABLE = "FCNSEG_COMMIT"


def _first_line(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def device_name() -> str:
    if device() == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        model = names[0].split(": ")[1] if names else model
    return f"{os.cpu_count()} x {model}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Of these files: from git; in a copy without its repository, $FCNSEG_COMMIT or "unknown"."""
    top = _first_line(["git", "rev-parse", "--show-toplevel"])
    if top is None or Path(top).resolve() != ROOT:  # the repository around a copy is another one
        return os.environ.get(COMMIT_VARIABLE) or "unknown"
    head = _first_line(["git", "rev-parse", "--short", "HEAD"])
    changed = _first_line(["git", "status", "--porcelain", "--untracked-files=no"])
    return f"{head or 'unknown'}{' with changes' if changed else ''}"


def header(command: str | None = None) -> dict[str, Any]:
    """What the numbers belong to."""
    if command is None:
        script = Path(sys.argv[0]).resolve()
        script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
        command = " ".join(["python", f"{script}", *sys.argv[1:]])
    about = {
        "device": device_name(),
        "kind": device(),
        "driver": None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "command": command,
        "date": datetime.date.today().isoformat(),
        "build_info": fcnseg.build_info(),
    }
    if device() == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = _first_line(query)
        about["capability"] = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return about


def results_path(name: str, about: Mapping[str, Any]) -> Path:
    words = "".join(x if x.isalnum() else " " for x in about["device"]).lower().split()
    folder = Path(os.environ.get("OUT") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}_{'-'.join(words)}_{about['date']}.json"


def write(path: Path, content: Mapping[str, Any]) -> None:
    write_at_once(path, json.dumps(content, indent=1) + "\n")


def save(name: str, content: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> Path:
    """Write ``NAME_DEVICE_DATE.json`` into $OUT, or into results/."""
    about = header() if about is None else about
    path = results_path(name, about)
    write(path, {"name": name, "header": about, **content})
    return path
