"""The tables of a file of results of bench_training_step.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: What the ratios are ratios to.
BASELINE = "eager AMP"
# Reasons for a row without figures.
_WITHOUT = ("out_of_memory", "skipped", "failed", "dropped")


def problem(row: Mapping[str, Any]) -> str:
    height, width = row["size"]
    return f"{row['classes']} | {height}x{width}"


def table(content: Mapping[str, Any]) -> str:
    """Markdown: what was measured, and in sentences what was not."""
    rows = content["rows"]
    parts = [_steps(rows), _batches(rows), *missing(rows)]
    return "\n\n".join(part for part in parts if part)


def _steps(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["kind"] != "measure" or "dropped" in row or "skipped" in row or "failed" in row:
            continue
        start = f"| {problem(row)} | {row['batch']} | {row['configuration']} |"
        if "out_of_memory" in row:
            lines.append(f"{start} out of memory | | | |")
            continue
        rate, step = row["images_per_second"], row["step_ms"]
        lines.append(
            f"{start} {rate:.4g} | {_ratio(rows, row)} | {step['median']:.4g} "
            f"({step['p20']:.4g} to {step['p80']:.4g}) | {row['memory_gb']:.2f} |"
        )
    if not lines:
        return ""
    head = "| classes | size | batch | step | images/s | of eager AMP | ms, p20 to p80 | peak, GB |"
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *lines])


def _ratio(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str:
    """Of the images per second to those of the baseline on the same problem."""
    for other in rows:
        same = all(other.get(key) == row[key] for key in ("kind", "classes", "size", "batch"))
        if same and other["configuration"] == BASELINE and "images_per_second" in other:
            return f"{row['images_per_second'] / other['images_per_second']:.2f}x"
    return ""


def _batches(rows: Sequence[Mapping[str, Any]]) -> str:
    found = [row for row in rows if "largest_batch" in row]
    base = {problem(row): row["largest_batch"] for row in found if row["configuration"] == BASELINE}
    lines = []
    for row in found:
        own, eager = row["largest_batch"], base.get(problem(row))
        ratio = f"{own / eager:.2f}x" if eager else ""
        lines.append(
            f"| {problem(row)} | {row['configuration']} | {row['capacity_gb']:.1f} | {own} "
            f"| {ratio} |"
        )
    if not lines:
        return ""
    head = "| classes | size | step | memory, GB | largest batch | of eager AMP |"
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *lines])


def missing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each reason, with all that it kept from a figure."""
    sentences = []
    for word in _WITHOUT:
        cases = [f"{title(row)} ({row[word]})" for row in rows if word in row]
        if cases:
            sentences.append(f"{word.replace('_', ' ').capitalize()}: {'; '.join(cases)}.")
    return sentences


def title(row: Mapping[str, Any]) -> str:
    """Of a job, also before it was done."""
    what = f"batch {row['batch']}" if row["kind"] == "measure" else "largest batch"
    return f"{row['classes']} classes, {what}, {row['configuration']}"


def line(row: Mapping[str, Any]) -> str:
    """An outcome in a line."""
    for word in _WITHOUT:
        if word in row:
            return f"{word.replace('_', ' ')}: {row[word]}"
    if "largest_batch" in row:
        return f"{row['largest_batch']} images fit {row['capacity_gb']:.1f} GB"
    return f"{row['images_per_second']:.4g} images/s, peak {row['memory_gb']:.2f} GB"
