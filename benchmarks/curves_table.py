"""What the loss curves of bench_training_curves.py show, as a table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two curves: the largest difference of their moving means over a tenth of the steps."""
    window = max(1, len(one) // 10)
    differences = [a - b for a, b in zip(one, other, strict=True)]
    if any(map(math.isnan, differences)):
        return math.nan
    sums = [sum(differences[i : i + window]) for i in range(len(differences) - window + 1)]
    return max(abs(each) for each in sums) / window


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per precision: the distances, and whether the losses agree; None where a run is missing."""
    found = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        done = {
            (row["loss"], row["seed"], row["again"]): row["losses"]
            for row in rows
            if row["precision"] == precision and "losses" in row
        }
        eager = {
            seed: curve
            for (loss, seed, again), curve in done.items()
            if loss == "eager" and not again
        }
        fused = {seed: curve for (loss, seed, _), curve in done.items() if loss == "fused"}
        both = sorted(set(eager) & set(fused))
        gaps = [distance(fused[seed], eager[seed]) for seed in both]
        spread = [distance(*pair) for pair in itertools.combinations(eager.values(), 2)]
        repeats = [
            distance(curve, eager[seed])
            for (_, seed, again), curve in done.items()
            if again and seed in eager
        ]
        tail = max(1, len(next(iter(done.values()), [])) // 10)
        found.append(
            {
                "precision": precision,
                "seeds": both,
                "first": max((abs(fused[s][0] / eager[s][0] - 1) for s in both), default=None),
                "last": {
                    name: [round(sum(curves[s][-tail:]) / tail, 4) for s in both]
                    for name, curves in (("fused", fused), ("eager", eager))
                },
                "fused from eager": max(gaps, default=None),
                "eager from eager again": max(repeats, default=None),
                "eager from other seeds": max(spread, default=None),
                "agree": max(gaps) <= max(spread) if gaps and spread else None,
            }
        )
    return found


def table(content: Mapping[str, Any]) -> str:
    """Markdown, and in sentences what is missing."""
    rows = content["rows"]
    lines = [
        "| precision | seeds | first loss apart by | last tenth, fused / eager | fused from eager "
        "| eager from eager again | eager from other seeds | agree |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2g}"

    for found in verdicts(rows):
        last = ", ".join(
            f"{a:.3f} / {b:.3f}"
            for a, b in zip(found["last"]["fused"], found["last"]["eager"], strict=True)
        )
        agree = {None: "not shown", True: "yes", False: "NO"}[found["agree"]]
        lines.append(
            f"| {found['precision']} | {', '.join(map(str, found['seeds']))} "
            f"| {number(found['first'])} | {last} | {number(found['fused from eager'])} "
            f"| {number(found['eager from eager again'])} "
            f"| {number(found['eager from other seeds'])} | {agree} |"
        )
    for word in ("skipped", "failed", "dropped"):
        cases = [f"{title(row)} ({row[word]})" for row in rows if word in row]
        if cases:
            lines.append(f"\n{word.capitalize()}: {'; '.join(cases)}.")
    return "\n".join(lines)


def title(row: Mapping[str, Any]) -> str:
    return f"{row['precision']}, seed {row['seed']}, {row['loss']}" + " again" * row["again"]


def line(outcome: Mapping[str, Any]) -> str:
    for word in ("skipped", "failed", "dropped"):
        if word in outcome:
            return f"{word}: {outcome[word]}"
    losses = outcome["losses"]
    return f"{losses[0]:.4f} to {sum(losses[-5:]) / len(losses[-5:]):.4f}"
