"""Tables and plots from the files of results.

    python benchmarks/report.py
    python benchmarks/report.py --print FILE      the table of one file of results

rewrites what stands between ``<!-- bench:SET -->`` and ``<!-- /bench -->`` in README.md and docs/:
for each device the newest ``results/SET_DEVICE_DATE.json``, as a Markdown table, and draws the
plots. The same files give the same bytes. SET is summary, matrix, gpu, scaling, training
or curves; the last two have no plot.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import curves_table
import processes
import result_files
import tables
import training_table

BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
SOURCE = re.compile(r"results/([\w.-]+\.json)")
#: Of the sets that are not operators' cases.
TABLES = {"training": training_table.table, "curves": curves_table.table}


def documents() -> list[Path]:
    return [processes.ROOT / "README.md", *sorted((processes.ROOT / "docs").glob("*.md"))]


def newest(name: str) -> list[Path]:
    """The newest file of a set for each device; the CPUs first."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(result_files.RESULTS.glob(f"{name}_*.json"), key=lambda p: p.stem[-10:]):
        content = json.loads(path.read_text())
        if content.get("name") == name and not content["header"].get("quick"):
            about = content["header"]
            found[about["kind"], about["device"]] = path
    return [path for _, path in sorted(found.items())]


def belongs_to(about: dict[str, Any], threads: int | None, load: float | None) -> str:
    """What a table's numbers belong to, in one line."""
    built = about["build_info"]
    words = [f"**{about['device']}**"]
    if about["kind"] == "cuda":
        words += [about["capability"], f"driver {about['driver']}", f"CUDA {about['cuda']}"]
    else:
        words += [f"{built['cpu_capability']}"]
        words += [f"{threads} thread{'s' if threads > 1 else ''}"] if threads else []
    words += [f"torch {about['torch']}"]
    if about["kind"] == "cuda":
        words += [f"triton {about['triton']}"]
    words += [f"commit {about['commit']}", about["date"]]
    if load is not None:
        words += [f"load before {load}"]
    return f"{', '.join(words)}: `{about['command']}`"


def reached(row: dict[str, Any]) -> str:
    """The rate of what bounds the operator."""
    floor = row.get("floor")
    if floor is None or "fused" not in row:
        return ""
    seconds = row["fused"]["median"] * 1e-3
    if floor["bound"] == "bytes":
        return f"{(floor['read'] + floor['written']) / seconds * 1e-9:.3g} GB/s"
    return f"{floor[floor['bound']] / seconds * 1e-9:.3g} Gop/s"


def read_cells(row: dict[str, Any]) -> list[str]:
    """The time to read the inputs once, and the multiple of it that fused took."""
    floor = row.get("floor")
    if floor is None or "fused" not in row:
        return ["", ""]
    read = floor["read ms"]
    return [tables.milliseconds(read), f"{row['fused']['median'] / read:.1f}"]


def others(row: dict[str, Any]) -> str:
    """Competitors besides eager and torch.compile."""
    known = ("fused", "eager", "compile")
    names = [k for k, v in row.items() if isinstance(v, dict) and "median" in v and k not in known]
    cells = [f"{name} {tables.ratio(row, name)}" for name in names]
    return ", ".join(cells)


def table(content: dict[str, Any]) -> str:
    """One row per case: losing ones too."""
    cuda = content["header"]["kind"] == "cuda"
    head = ["operator", "case", "fused, ms", *(["graph, ms", "wall, ms"] if cuda else [])]
    head += ["eager", "torch.compile", "others", "peak memory, fused / eager, MB"]
    head += ["floor, ms", "fused / floor", "reached"]
    head += ["inputs read once, ms", "fused / that"] if cuda else []
    lines = [head, ["---"] * len(head)]
    for module, found in content["files"].items():
        for case, row in found["rows"].items():
            fused = row.get("fused", {})
            keys = ["median", *(["graph", "wall"] if cuda else [])]
            line = [f"`{module.removeprefix('bench_')}`", case]
            line += [tables.milliseconds(fused.get(key)) for key in keys]
            line += [tables.ratio(row, "eager"), tables.ratio(row, "compile"), others(row)]
            line += [tables.memory_cell(row)]
            line += [cell.strip() for cell in tables.floor_cells(row).split("|")]
            line += [reached(row)]
            if cuda:
                line += read_cells(row)
            lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def missing(content: dict[str, Any]) -> list[str]:
    """Sentences on what did not run."""
    skipped: dict[str, str] = {}
    failed = []
    for module, found in content["files"].items():
        for row in found["rows"].values():
            skipped.update(row.get("skipped", {}))
        failed += [f"{module}: {name}: {reason}" for name, reason in found["failed"].items()]
    lines = [f"Skipped: {'; '.join(f'{k} ({v})' for k, v in skipped.items())}."] if skipped else []
    return lines + [f"Failed: {each}." for each in failed]


def plot_path(path: Path, document: Path) -> Path:
    """Beside the JSON for README.md, in docs/figures for the pages of docs/."""
    folder = path.parent if document.parent == processes.ROOT else document.parent / "figures"
    return folder / f"{path.stem}.png"


def section(path: Path, document: Path) -> str:
    """A file of results as Markdown. No link: README.md is also a page of the site of docs/."""
    content = json.loads(path.read_text())
    if content["name"] in TABLES:
        about = belongs_to(content["header"], None, None)
        parts = [f"{about}; `benchmarks/results/{path.name}`", TABLES[content["name"]](content)]
        return "\n\n".join(parts) + "\n"
    scaling = content["name"] == "scaling"
    first = {} if scaling else next(iter(content["files"].values()), {})
    load = first.get("load_before", [None])[0]
    about = belongs_to(content["header"], first.get("threads"), load)
    parts = [f"{about}; `benchmarks/results/{path.name}`, plot beside it"]
    if document.parent != processes.ROOT:
        parts = [f"{about}; `benchmarks/results/{path.name}`"]
        parts += [f"![{content['name']}](figures/{path.stem}.png)"]
    if not scaling:
        parts += [table(content), *missing(content)]
    return "\n\n".join(parts) + "\n"


def render(paths: Sequence[Path], document: Path) -> str:
    """The inside of a block of ``document``."""
    text = "\n".join(section(path, document) for path in paths)
    return f"\n{text}\n" if text else ""


def rewrite(text: str, document: Path) -> str:
    def block(match: re.Match[str]) -> str:
        return f"{match[1]}{render(newest(match[2]), document)}{match[4]}"

    return BLOCK.sub(block, text)


def stale_blocks(text: str, document: Path) -> list[str]:
    """Blocks that are not what the files of results that they name give."""
    stale = []
    for match in BLOCK.finditer(text):
        paths = [result_files.RESULTS / name for name in dict.fromkeys(SOURCE.findall(match[3]))]
        if not all(path.exists() for path in paths) or render(paths, document) != match[3]:
            stale.append(match[2])
    return stale


def plot(path: Path, target: Path) -> None:
    """Times relative to fused, and memory, of a set; or the scaling."""
    import plot_scaling
    from matplotlib import pyplot as plt

    content = json.loads(path.read_text())
    figure = plot_scaling.draw(content) if content["name"] == "scaling" else draw(content)
    # no version of matplotlib in the file
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw(content: dict[str, Any]) -> Any:
    from matplotlib import pyplot as plt

    rows = [
        (f"{module.removeprefix('bench_')}\n{case}", row)
        for module, found in content["files"].items()
        for case, row in found["rows"].items()
        if "fused" in row
    ]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.5 + 0.5 * len(rows)), sharey=True, layout="constrained"
    )
    places = range(len(rows))

    def bars(panel: Any, shift: float, values: list[float], name: str) -> None:
        colour = {"eager": "tab:gray", "torch.compile": "tab:blue", "fused": "tab:green"}[name]
        panel.barh([p + shift for p in places], values, 0.38, label=name, color=colour)

    def times(row: dict[str, Any], name: str) -> float:
        return row[name]["median"] / row["fused"]["median"] if name in row else 0.0

    bars(left, -0.2, [times(row, "eager") for _, row in rows], "eager")
    bars(left, 0.2, [times(row, "compile") for _, row in rows], "torch.compile")
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("time, as a multiple of fused (below 1: fused loses)")
    left.set_yticks(list(places), [name for name, _ in rows], fontsize=7)
    left.invert_yaxis()
    for shift, name in ((-0.2, "eager"), (0.2, "fused")):
        # a logarithmic axis has no 0; no bar where nothing was measured
        found = [row.get("memory", {}).get(name, math.nan) for _, row in rows]
        memory = [value if math.isnan(value) else max(value, 0.01) for value in found]
        bars(right, shift, memory, name)
    right.set_xlabel("peak memory that a call adds, MB")
    for panel in (left, right):
        panel.set_xscale("log")
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    figure.suptitle(f"{content['header']['device']}, torch {content['header']['torch']}")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="tables and plots of the benchmarks")
    parser.add_argument("--print", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.print is not None:
        content = json.loads(options.print.read_text())
        special = TABLES.get(content["name"])
        print(special(content) if special else "\n\n".join([table(content), *missing(content)]))
        return
    plots: dict[Path, Path] = {}
    for document in documents():
        text = document.read_text()
        fresh = rewrite(text, document)
        if fresh != text:
            document.write_text(fresh)
            print(f"rewrote {document.relative_to(processes.ROOT)}")
        for match in BLOCK.finditer(fresh):
            for path in (result_files.RESULTS / name for name in SOURCE.findall(match[3])):
                if match[2] not in TABLES:
                    plots[plot_path(path, document)] = path
    for target, path in sorted(plots.items()):
        target.parent.mkdir(exist_ok=True)
        plot(path, target)
        print(f"drew {target.relative_to(processes.ROOT)}")


if __name__ == "__main__":
    main()
