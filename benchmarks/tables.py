"""Cells and tables of figures, what they belong to, and the files of results."""

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
from processes import HERE, ROOT

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
    """At once or not at all: who is ended in the middle of it leaves the file before."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(path)


def save(name: str, content: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> Path:
    """Write ``NAME_DEVICE_DATE.json`` into $OUT, or into results/."""
    about = header() if about is None else about
    path = results_path(name, about)
    write(path, {"name": name, "header": about, **content})
    return path


# --- cells ----------------------------------------------------------------------------------------


def milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def times(value: float) -> str:
    return f"{value:.1f}x" if value < 10 else f"{value:.0f}x"


def ratio(row: Mapping[str, Any], name: str) -> str:
    """Of a competitor's time to that of fused, as 12x, or why there is none."""
    if name in row and "fused" in row:
        return times(row[name]["median"] / row["fused"]["median"])
    if name in row:
        return f"{milliseconds(row[name]['median'])} ms"
    return row.get("skipped", {}).get(name, "")


def memory_cell(row: Mapping[str, Any]) -> str:
    memory = row.get("memory", {})
    if "fused" not in memory or "eager" not in memory:
        return ""
    return f"{memory['fused']:.1f} / {memory['eager']:.0f}"


def floor_cells(row: Mapping[str, Any]) -> str:
    """Two cells: the floor and what bounds it; the multiple of it that fused took."""
    floor = row.get("floor")
    if floor is None or "fused" not in row:
        return "|"
    multiple = row["fused"]["median"] / floor["ms"]
    return f"{milliseconds(floor['ms'])} ({floor['bound']}) | {multiple:.1f}"


def competitors(row: Mapping[str, Any]) -> list[str]:
    """What was timed beside fused, or skipped."""
    timed = [key for key, value in row.items() if isinstance(value, dict) and "median" in value]
    return [name for name in dict.fromkeys([*timed, *row.get("skipped", {})]) if name != "fused"]


def sentence(row: Mapping[str, Any]) -> str:
    """The figures of a case in one line, for a log."""
    parts = []
    if "fused" in row:
        fused = row["fused"]
        ways = [f"{way} {milliseconds(fused[way])}" for way in ("graph", "wall") if way in fused]
        parts.append(f"fused {milliseconds(fused['median'])} ms")
        parts[-1] += f" ({', '.join(ways)})" if ways else ""
    parts += [f"{name} {ratio(row, name)}" for name in competitors(row)]
    if "floor" in row and "fused" in row:
        cells = [cell.strip() for cell in floor_cells(row).split("|")]
        parts.append(f"{cells[1]} times the floor of {cells[0]}")
    if cell := memory_cell(row):
        parts.append(f"memory {cell} MB")
    return "; ".join(parts)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Medians; how many times longer the others took; memory; floor."""
    names = dict.fromkeys(name for row in rows.values() for name in competitors(row))
    columns = sorted(names, key=lambda name: (name != "eager", "eager" not in name))
    lines = ["| case | fused, ms |"]
    for column in columns:
        lines[0] += f" {column} |"
    lines[0] += " memory, fused / eager, MB | floor, ms | fused / floor |"
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for case, row in rows.items():
        ours = row.get("fused", {}).get("median")
        line = f"| {case} | {milliseconds(ours)} |"
        for column in columns:
            line += f" {ratio(row, column)} |"
        line += f" {memory_cell(row)} | {floor_cells(row)} |"
        lines.append(line)
    return "\n".join(lines)
