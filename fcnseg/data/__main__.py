"""Class frequencies of a data set's splits, and new splits.

python -m fcnseg.data report camvid DIR --png report.png
python -m fcnseg.data split camvid DIR --output split.json --groups --chunk 20
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fcnseg import _command_line

from . import _DATASETS, SegmentationDataset, open_dataset
from .report import Report, SplitCounts, count_pixels
from .split import IntArray, group_images, stratify, write_split


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fcnseg.data", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser(
        "report", help="class frequencies per split, and where they differ"
    )
    split = commands.add_parser("split", help="write new splits with like class frequencies")
    for command in (report, split):
        command.add_argument("dataset", choices=sorted(_DATASETS))
        command.add_argument("root", type=Path, help="the data set's folder")
        command.add_argument(
            "--splits",
            nargs="+",
            default=["train", "val"],
            metavar="NAME",
            help="which; the first is what the others are compared with (default: train val)",
        )
        command.add_argument("--split-file", type=Path, help="take the splits of this file")
        command.add_argument("--workers", type=int, help="threads (default: one per core)")
        command.add_argument("--png", type=Path, help="draw the class frequencies into this file")
        command.add_argument("--json", type=Path, help="write the report into this file")
    split.add_argument("--output", type=Path, required=True, help="the split file to make")
    split.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        metavar="N",
        help="images of each split (default: as many as it has)",
    )
    split.add_argument("--seed", type=int, default=0, help="of the division (default: 0)")
    split.add_argument(
        "--groups",
        action="store_true",
        help="keep Cityscapes' cities or CamVid's video sequences in one split each",
    )
    split.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        help="with --groups: keep runs of N images of a group together, not the whole group",
    )
    return parser


def _write_report(report: Report, options: argparse.Namespace) -> None:
    try:  # the files first: nobody may read the whole table
        if options.png is not None:
            report.save(options.png)
        if options.json is not None:
            options.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    finally:  # where a file cannot be written, the table is all there is
        print(report.table())
        for warning in report.warnings():
            print(f"warning: {warning}", file=sys.stderr)


def _resplit(
    datasets: dict[str, SegmentationDataset],
    counts: dict[str, IntArray],
    options: argparse.Namespace,
) -> dict[str, IntArray]:
    """Writes the split file; the counts of the new splits."""
    names = list(datasets)
    first = datasets[names[0]]
    pairs = [pair for dataset in datasets.values() for pair in dataset.files]
    pool = np.concatenate(list(counts.values()))
    groups = None
    if options.groups:
        groups = group_images(type(first), [image for image, _ in pairs], options.chunk)
    elif options.chunk is not None:
        raise ValueError("--chunk: needs --groups")
    sizes = options.sizes or [len(dataset) for dataset in datasets.values()]
    if len(sizes) != len(names):
        raise ValueError(f"--sizes: expected one per split, {len(names)}, got {len(sizes)}")
    chosen = stratify(pool[:, :-1], sizes, groups, seed=options.seed)
    order = sorted(range(len(pairs)), key=lambda i: pairs[i])
    where = {name: [i for i in order if chosen[i] == s] for s, name in enumerate(names)}
    write_split(
        options.output,
        first,
        {name: [pairs[i] for i in rows] for name, rows in where.items()},
        seed=options.seed,
        grouped=options.groups,
        chunk=options.chunk,
    )
    if first.groups and not options.groups:
        print(
            f"note: images of the same {first.groups} may lie in several splits; "
            "--groups keeps them together",
            file=sys.stderr,
        )
    return {name: pool[rows] for name, rows in where.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code 0, or exits with 2 and a message."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if len(set(options.splits)) < len(options.splits):
            raise ValueError(f"--splits: expected different names, got {' '.join(options.splits)}")
        if options.workers is not None and options.workers < 1:
            raise ValueError(f"--workers: expected at least 1, got {options.workers}")
        datasets = {
            name: open_dataset(options.dataset, options.root, name, split_file=options.split_file)
            for name in options.splits
        }
        counts = {name: count_pixels(each, options.workers) for name, each in datasets.items()}
        if options.command == "split":
            counts = _resplit(datasets, counts, options)
        splits = {name: SplitCounts.of(each) for name, each in counts.items()}
        kind = type(datasets[options.splits[0]])
        _write_report(Report(kind.__name__, kind.classes, splits), options)
    except (ValueError, OSError) as error:  # DataError is a ValueError
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    _command_line.run(main)
