"""Class frequencies of splits, stratified new splits, split files and the command line."""

from __future__ import annotations

import doctest
import importlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from fcnseg import data
from fcnseg.data.__main__ import main
from fcnseg.data.report import Report, SplitCounts, count_pixels, distance
from fcnseg.data.split import group_images, stratify

SIZE = (6, 10)


def write_frame(root: Path, split: str, name: str, label: np.ndarray) -> None:
    for folder, array in (("images", np.zeros((*SIZE, 3), np.uint8)), ("labels", label)):
        path = root / split / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), array)


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """Four sequences of frames; class 8 is all in val, class 3 nearly all in train."""
    root = tmp_path / "camvid"
    for s, (split, frames) in enumerate((("train", 6), ("train", 5), ("val", 4), ("val", 3))):
        for frame in range(frames):
            label = np.full(SIZE, 3 if split == "train" or frame == 0 else 8, np.uint8)
            label[0, : frame + 1] = 5
            label[1, :2] = 11
            write_frame(root, split, f"seq{s}_{frame:03d}", label)
    return root


def counts_of(root: Path, split: str, **options: object) -> np.ndarray:
    return count_pixels(data.CamVid(root, split, **options))


# --- counts and measures ---------------------------------------------------------------------


def test_counts_are_those_of_the_labels(camvid: Path) -> None:
    dataset = data.CamVid(camvid)
    expected = [
        [(dataset.load(i)[1] == value).sum() for value in (*range(11), 255)]
        for i in range(len(dataset))
    ]
    counts = count_pixels(dataset, workers=2)
    np.testing.assert_array_equal(counts, expected)
    split = SplitCounts.of(counts)
    assert split.images == 11 and split.void == 22
    assert split.holding[3] == split.holding[5] == 11 and split.holding[8] == 0
    assert split.shares.sum() == pytest.approx(1)
    assert split.shares[5] == pytest.approx((21 + 15) / (11 * 58))


def test_distance() -> None:
    assert distance([1, 2, 3], [2, 4, 6]) == 0
    assert distance([1, 0, 1], [0, 3, 0]) == 1
    p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    m = (p + q) / 2
    expected = np.sqrt(((p * np.log2(p / m)).sum() + (q * np.log2(q / m)).sum()) / 2)
    assert distance(p, q) == distance(q, p) == pytest.approx(expected)
    assert np.isnan(distance([0, 0], [1, 2]))


def test_warnings_name_what_differs(camvid: Path) -> None:
    splits = {name: SplitCounts.of(counts_of(camvid, name)) for name in ("train", "val")}
    report = Report("CamVid", data.CamVid.classes, splits)
    differ, lacking, uneven = report.warnings()
    assert differ.startswith("train and val differ: the Jensen-Shannon distance")
    assert lacking == "train has no pixel of: car"
    # Road has 602 of 638 pixels of train, 114 of 406 of val.
    assert uneven.endswith("share in val / share in train beyond 0.5 to 2: road 0.30")
    table = report.table().splitlines()
    assert table[0].split() == [
        "class",
        "train",
        "%",
        "val",
        "%",
        "train",
        "images",
        "val",
        "images",
        "val",
        "/",
        "train",
    ]
    assert next(line for line in table if line.startswith("car")).split()[-3:] == ["0", "5", "-"]
    assert table[-1] == f"Jensen-Shannon distance of val to train: {report.distances()['val']:.3f}"
    assert not Report(
        "CamVid", data.CamVid.classes, {"a": splits["val"], "b": splits["val"]}
    ).warnings()


@pytest.mark.parametrize("name", ["report", "split"])
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fcnseg.data.{name}"))
    assert result.attempted and not result.failed


# --- division --------------------------------------------------------------------------------


def random_counts(n: int, classes: int, seed: int = 0) -> np.ndarray:
    """Common classes everywhere, rare ones in few images, of shares over four decades."""
    rng = np.random.default_rng(seed)
    scale = 10 ** np.linspace(4, 1, classes)
    present = rng.random((n, classes)) < np.linspace(1, 0.05, classes)
    return (rng.lognormal(0, 1, (n, classes)) * scale * present).astype(np.int64) + (scale > 5e3)


def worst_ratio(counts: np.ndarray, split: np.ndarray) -> float:
    shares = [
        SplitCounts.of(np.column_stack([c, c[:, :1]])).shares
        for c in (counts[split == 0], counts[split == 1])
    ]
    return np.abs(np.log2(shares[1] / shares[0])).max()


def test_division_balances_every_class() -> None:
    counts, sizes = random_counts(300, 12), [240, 60]
    split = stratify(counts, sizes)
    assert np.bincount(split).tolist() == sizes
    random = np.zeros(300, np.int64)
    random[np.random.default_rng(0).permutation(300)[:60]] = 1
    assert worst_ratio(counts, split) < 0.1 < worst_ratio(counts, random)


def test_division_follows_the_seed_alone() -> None:
    counts = random_counts(60, 5)
    first = stratify(counts, [40, 20], seed=1)
    np.testing.assert_array_equal(first, stratify(counts, [40, 20], seed=1))
    assert (first != stratify(counts, [40, 20], seed=2)).any()


def test_groups_stay_together() -> None:
    counts = random_counts(120, 6)
    groups = [f"g{i % 15}" for i in range(120)]
    split = stratify(counts, [96, 24], groups)
    assert np.bincount(split).tolist() == [96, 24]
    assert all(len({split[i] for i in range(120) if i % 15 == g}) == 1 for g in range(15))


def test_groups_that_do_not_fit_leave_no_split_empty() -> None:
    counts = np.ones((9, 2), np.int64)
    groups = ["a"] * 7 + ["b", "c"]
    split = stratify(counts, [3, 3, 3], groups)
    assert sorted(np.bincount(split).tolist()) == [1, 1, 7]
    three = stratify(counts[:3], [1, 1, 1], ["a", "b", "c"])
    assert sorted(three.tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [3, 2]}, r"sizes: expected positive numbers that sum to 4, got \[3, 2\]"),
        ({"sizes": [4, 0]}, "sizes: expected positive"),
        ({"sizes": []}, "sizes: expected positive"),
        ({"seed": -1}, "seed: expected a number >= 0, got -1"),
        ({"groups": ["a"]}, "groups: expected one per image, 4, got 1"),
        ({"groups": ["a"] * 4}, "groups: 1 cannot fill 2 splits"),
    ],
)
def test_division_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stratify(np.ones((4, 2), np.int64), **{"sizes": [2, 2], **arguments})


def test_groups_of_the_data_sets() -> None:
    city = Path("leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png")
    assert group_images(data.Cityscapes, [city]) == ["ulm"]
    frames = [Path(f"train/images/0016E5_{i:05d}.png") for i in (30, 0, 10, 20)]
    assert group_images(data.CamVid, frames) == ["0016E5"] * 4
    runs = group_images(data.CamVid, frames, chunk=2)
    assert runs[1] == runs[2] != runs[3] == runs[0]
    with pytest.raises(ValueError, match="groups: the images of ADE20K belong to none"):
        group_images(data.ADE20K, frames)
    with pytest.raises(ValueError, match="chunk: expected at least 1 image, got 0"):
        group_images(data.CamVid, frames, chunk=0)


# --- split files -----------------------------------------------------------------------------


def test_split_command_writes_what_the_loaders_accept(camvid: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "split.json"
    assert main(["split", "camvid", str(camvid), "--output", str(output), "--seed", "3"]) == 0
    assert "images of the same video sequences may lie in several" in capsys.readouterr().err
    old, new = (
        {s: data.open_dataset("camvid", camvid, s, split_file=f) for s in ("train", "val")}
        for f in (None, output)
    )
    assert [len(new[s]) for s in new] == [len(old[s]) for s in old] == [11, 7]
    assert sorted(new["train"].files + new["val"].files) == sorted(
        old["train"].files + old["val"].files
    )
    assert new["train"].files == sorted(new["train"].files)
    before, after = (
        distance(*(count_pixels(d)[:, :-1].sum(0) for d in sets.values())) for sets in (old, new)
    )
    assert after < 0.1 < before
    again = tmp_path / "again.json"
    main(["split", "camvid", str(camvid), "--output", str(again), "--seed", "3"])
    assert again.read_text() == output.read_text()
    # A report, and a further split, of the new splits.
    main(["report", "camvid", str(camvid), "--split-file", str(output)])
    assert f"distance of val to train: {after:.3f}" in capsys.readouterr().out


def test_split_command_keeps_sequences(camvid: Path, tmp_path: Path) -> None:
    output = tmp_path / "split.json"
    main(
        ["split", "camvid", str(camvid), "--output", str(output), "--groups", "--sizes", "12", "6"]
    )
    parts = [
        {data.CamVid.group(image) for image, _ in data.CamVid(camvid, s, split_file=output).files}
        for s in ("train", "val")
    ]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 4


def test_other_loaders_take_a_split_file(tmp_path: Path) -> None:
    image = tmp_path / "leftImg8bit/val/ulm/ulm_000000_000000_leftImg8bit.png"
    label = tmp_path / "gtFine/val/ulm/ulm_000000_000000_gtFine_labelIds.png"
    for path, array in (
        (image, np.zeros((*SIZE, 3), np.uint8)),
        (label, np.full(SIZE, 7, np.uint8)),
    ):
        path.parent.mkdir(parents=True)
        assert cv2.imwrite(str(path), array)
    pair = [str(path.relative_to(tmp_path)) for path in (image, label)]
    for name in ("Cityscapes", "ADE20K"):
        split_file = tmp_path / f"{name}.json"
        split_file.write_text(json.dumps({"dataset": name, "splits": {"train": [pair]}}))
        dataset = data.open_dataset(name.lower(), tmp_path, "train", split_file=split_file)
        assert dataset.files == [(image, label)] and dataset.load(0)[1].shape == SIZE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "{", "not valid JSON"),
        (lambda c: [], "expected the fields 'dataset' and 'splits'"),
        (lambda c: {"splits": {}}, "expected the fields 'dataset' and 'splits'"),
        (lambda c: c | {"dataset": "ADE20K"}, "expected a split of CamVid, got one of ADE20K"),
        (lambda c: c | {"splits": {"val": []}}, "expected the split 'train', it has val"),
        (lambda c: c | {"splits": {"train": 3}}, "split 'train': expected a list"),
        (lambda c: c | {"splits": {"train": [["a"]]}}, r"split 'train': expected \[image, label\]"),
        (
            lambda c: c | {"splits": {"train": [["gone.png", "seq.png"]]}},
            r"lists .*gone\.png, which does not exist \(nor do 1 others\)",
        ),
        (
            lambda c: c | {"splits": {"train": [["a", "b"]], "val": [["a", "b"]]}},
            "a is listed in 'train' and 'val'",
        ),
    ],
)
def test_bad_split_file_is_named(camvid: Path, tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "bad.json"
    content = change({"dataset": "CamVid", "splits": {"train": []}})
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(data.DataError, match=rf"bad\.json: .*{message}"):
        data.CamVid(camvid, split_file=path)


def test_missing_split_file_and_unknown_split(camvid: Path, tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"absent\.json: no such file"):
        data.CamVid(camvid, split_file=tmp_path / "absent.json")
    with pytest.raises(ValueError, match="split: CamVid has train, val, test; got 'trian'"):
        data.CamVid(camvid, "trian", split_file=tmp_path / "absent.json")


# --- command line ----------------------------------------------------------------------------


def test_report_command(camvid: Path, tmp_path: Path, capsys) -> None:
    png, dump = tmp_path / "report.png", tmp_path / "report.json"
    assert main(["report", "camvid", str(camvid), "--png", str(png), "--json", str(dump)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("class")
    assert "warning: train has no pixel of: car" in printed.err
    image = cv2.imread(str(png))
    assert image.shape[1] == 900 and image.std() > 10
    content = json.loads(dump.read_text())
    assert content["splits"]["val"]["images"] == 7 and len(content["warnings"]) == 3
    assert content["jensen_shannon"]["val"] > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "camvid", "absent"], "absent: no such folder, expected the root of CamVid"),
        (["report", "camvid", ".", "--splits", "train", "test"], "test/images"),
        (["report", "camvid", ".", "--splits", "val", "val"], "--splits: expected different names"),
        (["report", "camvid", ".", "--workers", "0"], "--workers: expected at least 1, got 0"),
        (["split", "camvid", ".", "--output", "o", "--chunk", "2"], "--chunk: needs --groups"),
        (["split", "camvid", ".", "--output", "o", "--sizes", "18"], "--sizes: expected one per"),
        (["split", "camvid", ".", "--output", "o", "--sizes", "9", "8"], "sum to 18"),
        (["split", "camvid", ".", "--output", "used"], "used: exists already"),
        (["report", "camvid", ".", "--split-file", "used"], "used: not valid JSON"),
    ],
)
def test_command_errors(
    camvid: Path, arguments: list[str], message: str, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(camvid)
    Path("used").write_text("text")
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("o").exists() and Path("used").read_text() == "text"


def test_unreadable_label_is_named(camvid: Path, capsys) -> None:
    (camvid / "val/labels/seq2_001.png").write_bytes(b"no label")
    with pytest.raises(SystemExit):
        main(["report", "camvid", str(camvid)])
    assert "val/labels/seq2_001.png: corrupt or not a PNG" in capsys.readouterr().err
