"""Cells, sentences and tables of figures, from rows as harness.measure_case makes them.

This file needs the standard library alone: gpu.py imports it before fcnseg is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
