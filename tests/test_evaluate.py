"""The evaluator: equal to its oracles on every score, and clear about every bad file."""

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from cityscapes_files import write_pairs, write_png
from cityscapes_oracle import import_cityscapesscripts, official_scores, same
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import import_torchvision

from fcnseg import _extension, evaluate
from fcnseg.data import DataError

SIZE = (48, 96)
NAME = "aachen_000000_000000"


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    root = tmp_path_factory.mktemp("cityscapes")
    write_pairs(root, 5, SIZE, instances=14)
    return root


@pytest.fixture
def root(generated, tmp_path):
    shutil.copytree(generated, tmp_path, dirs_exist_ok=True)
    return tmp_path


def label_path(root, name=NAME, kind="labelIds"):
    return root / f"gtFine/val/{name.split('_')[0]}/{name}_gtFine_{kind}.png"


def prediction_path(root):
    return next((root / "results").rglob(f"{NAME}*.png"))


def run(root, **kwargs):
    return evaluate.evaluate_cityscapes(root / "results", root, **{"workers": 1} | kwargs)


def run_main(*arguments):
    return evaluate.main([*map(str, arguments), "--quiet", "--workers", "1"])


# -- Cityscapes ------------------------------------------------------------------------------------


def test_every_score_equals_cityscapesscripts(generated, capsys):
    official = import_cityscapesscripts()
    pairs, failures, unmatched = evaluate.find_cityscapes_pairs(generated / "results", generated)
    assert (len(pairs), failures, unmatched) == (5, [], [])
    expected = official_scores(official, pairs, quiet=False)
    printed = capsys.readouterr().out
    found = run(generated)
    assert same(found.result, expected)
    assert expected["averageScoreInstClasses"] > 0 and expected["averageScoreInstCategories"] > 0
    for block in found.table.split("\n\n"):
        assert block in printed


def test_images_without_things_equal_cityscapesscripts(tmp_path):
    official = import_cityscapesscripts()
    write_pairs(tmp_path, 1, SIZE, instances=0)
    pairs, *_ = evaluate.find_cityscapes_pairs(tmp_path / "results", tmp_path)
    assert same(run(tmp_path).result, official_scores(official, pairs))


def test_official_prediction_is_found_for_each_truth(generated):
    official = import_cityscapesscripts()
    official.args.predictionPath = str(generated / "results")
    official.args.predictionWalk = None
    for pair in evaluate.find_cityscapes_pairs(generated / "results", generated)[0]:
        assert official.getPrediction(official.args, str(pair.truth)) == str(pair.prediction)


def test_label_table_equals_cityscapesscripts():
    import_cityscapesscripts()
    labels = sys.modules["cityscapesscripts.helpers.labels"].labels
    official = sys.modules["cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"]
    known = [label for label in labels if label.id >= 0]
    assert tuple(label.name for label in known) == evaluate.CITYSCAPES_CLASSES
    assert {label.id: label.category for label in known} == evaluate._CATEGORY_OF
    assert [label.id for label in known if not label.ignoreInEval] == evaluate._EVALUATED
    assert official.args.avgClassSize == evaluate._AVERAGE_INSTANCE_SIZE
    assert {label.name for label in known if label.hasInstances} == set(
        evaluate._AVERAGE_INSTANCE_SIZE
    )


def test_instance_score_weighs_by_size(tmp_path):
    # Two cars of 4 and 12 pixels, the large one found, and 2 pixels of road taken for a car.
    label = np.full((4, 8), 7, np.uint8)
    label[:, :4] = 26
    instance = label.astype(np.uint16)
    instance[0, :4], instance[1:, :4] = 26000, 26001
    predicted = label.copy()
    predicted[0, :4], predicted[0, 4:6] = 7, 26
    write_png(label_path(tmp_path), label)
    write_png(label_path(tmp_path, kind="instanceIds"), instance)
    write_png(tmp_path / f"results/{NAME}.png", predicted)
    result = run(tmp_path).result
    size = 12794.0202738185
    assert result["classScores"]["car"] == 12 / 18
    assert result["classInstScores"]["car"] == pytest.approx(size / (2 * size + 2), rel=1e-12)
    assert result["categoryInstScores"]["vehicle"] == result["classInstScores"]["car"]
    assert math.isnan(result["classInstScores"]["road"])
    assert math.isnan(result["classScores"]["person"])


def test_number_of_processes_changes_nothing(generated):
    one, two = run(generated), run(generated, workers=2)
    assert same(two.result, one.result) and two.table == one.table


def test_torch_operator_counts_where_the_extension_is_missing(root, monkeypatch):
    expected = run(root)
    monkeypatch.setattr(_extension, "pybind", None)
    assert same(run(root).result, expected.result)
    write_png(prediction_path(root), np.full(SIZE, 40, np.uint8))
    assert "prediction holds 4608 values outside [0, 34)" in run(root).failures[0].reason


def test_palette_and_16_bit_predictions(root):
    image = pytest.importorskip("PIL.Image")
    expected = run(root)
    path = prediction_path(root)
    ids = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    write_png(path, ids.astype(np.uint16))
    assert same(run(root).result, expected.result)
    coloured = image.fromarray(ids).convert("P")
    coloured.putpalette(bytes(range(256)) * 3)
    coloured.save(path)
    np.testing.assert_array_equal(evaluate.read_ids(path), ids)
    assert same(run(root).result, expected.result)


# -- bad files -------------------------------------------------------------------------------------


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))


def grey(value, shape=SIZE, dtype=np.uint8):
    return np.full(shape, value, dtype)


BAD = {
    "cut prediction": (lambda r: damaged(prediction_path(r), "cut"), "truncated"),
    "flipped bits": (lambda r: damaged(label_path(r), "flip"), "corrupt"),
    "empty file": (lambda r: prediction_path(r).write_bytes(b""), "the file is empty"),
    "no PNG": (lambda r: prediction_path(r).write_bytes(b"JFIF" * 20), "not a PNG"),
    "no prediction": (lambda r: prediction_path(r).unlink(), f"no prediction {NAME}*.png"),
    "two predictions": (
        lambda r: shutil.copy(prediction_path(r), r / f"results/{NAME}_2.png"),
        "2 predictions: ",
    ),
    "no instances": (
        lambda r: label_path(r, kind="instanceIds").unlink(),
        "instanceIds.png: no such file",
    ),
    "size of prediction": (
        lambda r: write_png(prediction_path(r), grey(7, (24, 96))),
        "size 96x24, but ",
    ),
    "size of instances": (
        lambda r: write_png(label_path(r, kind="instanceIds"), grey(7, (24, 96))),
        "instanceIds.png: size 96x24, but ",
    ),
    "colours": (
        lambda r: write_png(prediction_path(r), grey(7, (*SIZE, 3))),
        "got 3 channels with 8 bits",
    ),
    "predicted label": (
        lambda r: write_png(prediction_path(r), grey(34)),
        "prediction holds 4608 values outside [0, 34)",
    ),
    "true label": (
        lambda r: write_png(label_path(r), grey(255)),
        "target holds 4608 values outside [0, 34)",
    ),
    "label above a byte": (
        lambda r: write_png(prediction_path(r), grey(263, dtype=np.uint16)),
        "the first is 263 at position (0, 0)",
    ),
    "instance of stuff": (
        lambda r: write_png(label_path(r, kind="instanceIds"), grey(7001, dtype=np.uint16)),
        "instance id 7001, but label id 7 has no instances",
    ),
    "instance of nothing": (
        lambda r: write_png(label_path(r, kind="instanceIds"), grey(34001, dtype=np.uint16)),
        "instance id 34001, but label id 34 has no instances",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pair_is_named_and_left_out(root, case):
    spoil, message = BAD[case]
    spoil(root)
    found = run(root)
    assert found.pairs == 4 and len(found.failures) == 1
    assert message in found.failures[0].reason and NAME in found.failures[0].reason
    assert found.failures[0].truth == label_path(root)
    for path in (label_path(root), label_path(root, kind="instanceIds")):
        path.unlink(missing_ok=True)
    assert same(found.result, run(root).result)


def test_prediction_without_truth_is_named(root, capsys):
    extra = write_png(root / "results/ulm_000000_000000.png", grey(7))
    assert run(root).unmatched == [extra]
    assert run_main(root / "results", root) == 0
    assert f"note: {extra}: no ground truth" in capsys.readouterr().err


def test_folder_errors(generated, tmp_path):
    with pytest.raises(DataError, match="absent: no such folder"):
        run(generated, split="absent")
    with pytest.raises(DataError, match="results: no such folder"):
        run(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "gtFine/val").mkdir(parents=True)
    with pytest.raises(DataError, match="val: no ground truth, expected"):
        run(tmp_path)
    with pytest.raises(DataError, match="gtFine: no ground truth, expected PNG"):
        evaluate.evaluate_folders(tmp_path / "results", tmp_path / "gtFine", ["a"])
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        run(generated, workers=0)


# -- resuming --------------------------------------------------------------------------------------


def test_cache_resumes_and_sees_changes(root, monkeypatch):
    cache = root / "counts.jsonl"
    expected = run(root)
    assert same(run(root, cache=cache).result, expected.result)
    # Killed while the second pair's line was written.
    lines = cache.read_text().splitlines(keepends=True)
    cache.write_text(lines[0] + lines[1] + lines[2][:40])
    read = []
    monkeypatch.setattr(
        evaluate,
        "count_pair",
        lambda pair, *args, count=evaluate.count_pair, **kwargs: (
            read.append(pair.truth),
            count(pair, *args, **kwargs),
        )[1],
    )
    assert same(run(root, cache=cache).result, expected.result) and len(read) == 4
    assert same(run(root, cache=cache).result, expected.result) and len(read) == 4
    write_png(prediction_path(root), grey(7))
    changed = run(root, cache=cache)
    assert len(read) == 5 and changed.result["classScores"] != expected.result["classScores"]
    prediction_path(root).unlink()
    assert len(run(root, cache=cache).failures) == 1


def test_failure_is_not_cached(root):
    damaged(prediction_path(root), "cut")
    for _ in range(2):
        assert len(run(root, cache=root / "counts").failures) == 1


def test_other_file_is_no_cache(root):
    path = root / "notes.txt"
    path.write_text("mine\n")
    with pytest.raises(DataError, match=r"notes\.txt: not a cache of this evaluation"):
        run(root, cache=path)
    assert path.read_text() == "mine\n"


# -- command line ----------------------------------------------------------------------------------


def test_command_line(root, capsys):
    json_path, matrix_path = root / "scores.json", root / "matrix.png"
    found = run(root)
    assert run_main(root / "results", root, "--json", json_path, "--matrix", matrix_path) == 0
    assert capsys.readouterr().out == f"{found.table}\n5 of 5 pairs evaluated\n"

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    written = json.loads(json_path.read_text(), parse_constant=no_constant)
    assert (written.pop("pairs"), written.pop("failed")) == (5, [])
    assert written["classScores"]["unlabeled"] is None
    assert written["averageScoreInstClasses"] == found.result["averageScoreInstClasses"]
    assert min(cv2.imread(str(matrix_path)).shape[:2]) > 500


def test_command_line_fails_with_the_names_of_bad_pairs(root, capsys):
    prediction_path(root).unlink()
    json_path = root / "scores.json"
    assert run_main(root / "results", root, "--json", json_path) == 1
    captured = capsys.readouterr()
    assert "4 of 5 pairs evaluated" in captured.out
    assert f"error: {label_path(root)}: no prediction" in captured.err
    assert "1 of 5 pairs could not be evaluated" in captured.err
    assert json.loads(json_path.read_text())["failed"][0]["truth"] == str(label_path(root))
    shutil.rmtree(root / "results")
    (root / "results").mkdir()
    assert run_main(root / "results", root) == 1
    assert capsys.readouterr().out == "0 of 5 pairs evaluated\n"


def test_command_line_refuses_wrong_use(root, capsys):
    for arguments, message in (
        (["absent", root], "absent: no such folder"),
        ([root / "results", root, "--workers", "0"], "workers must be at least 1"),
        ([root, root, "--classes", root / "no.txt"], "no.txt: cannot be read"),
        ([root / "results", root, "--json", root / "no/where.json"], "where.json"),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main([*map(str, arguments), "--quiet"])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


# -- plain folders ---------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "sub/a.png"):
        truth = rng.integers(0, 4, (20, 30)).astype(np.uint8)  # class 4 of 5 is absent
        predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 4, truth.shape))
        truth[rng.random(truth.shape) < 0.1] = 255
        write_png(tmp_path / "truth" / name, truth)
        write_png(tmp_path / "predicted" / name, predicted.astype(np.uint8))
    (tmp_path / "names.txt").write_text("sky\nroad\ntree\ncar\nboat\n")
    return tmp_path


def read_all(folder):
    paths = sorted(folder.rglob("*.png"))
    return np.stack([cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in paths])


def run_plain(plain, ignore_index=255, classes=("sky", "road", "tree", "car", "boat")):
    folders = plain / "predicted", plain / "truth"
    return evaluate.evaluate_folders(*folders, classes, ignore_index, workers=1)


def test_plain_folders_equal_numpy_counts(plain):
    truth, predicted = read_all(plain / "truth"), read_all(plain / "predicted")
    valid = truth != 255
    matrix = np.zeros((5, 5), np.int64)
    np.add.at(matrix, (truth[valid], predicted[valid]), 1)
    found = run_plain(plain)
    np.testing.assert_array_equal(found.matrix, matrix)
    with np.errstate(invalid="ignore"):
        iou = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    np.testing.assert_allclose(list(found.result["classScores"].values()), iou, rtol=1e-12)
    assert math.isnan(found.result["classScores"]["boat"])
    assert found.result["meanIoU"] == pytest.approx(np.nanmean(iou), rel=1e-12)
    assert found.result["pixelAccuracy"] == pytest.approx(matrix.trace() / matrix.sum())
    assert found.table.splitlines()[5].split() == ["boat", "-", "-", "-"]


def test_plain_folders_equal_torchmetrics(plain):
    import_torchvision()  # torchmetrics imports it where it is installed
    pytest.importorskip("torchmetrics", exc_type=ImportError)
    from torchmetrics.functional.classification import (
        multiclass_confusion_matrix,
        multiclass_jaccard_index,
    )

    tensors = [torch.from_numpy(read_all(plain / name)).long() for name in ("predicted", "truth")]
    options = {"num_classes": 5, "ignore_index": 255}
    found = run_plain(plain)
    assert found.matrix.tolist() == multiclass_confusion_matrix(*tensors, **options).tolist()
    iou = multiclass_jaccard_index(*tensors, **options, average=None)
    assert list(found.result["classScores"].values())[:4] == pytest.approx(
        iou.tolist()[:4], rel=1e-6
    )


def test_ignored_class_has_no_score(plain):
    for path in (plain / "truth").rglob("*.png"):
        ids = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        write_png(path, np.where(ids == 255, 0, ids).astype(np.uint8))
    found = run_plain(plain, ignore_index=0)
    assert found.matrix[0].sum() == 0 and found.matrix[:, 0].sum() > 0
    values = list(found.result["classScores"].values())
    assert math.isnan(values[0]) and found.result["meanIoU"] == pytest.approx(np.mean(values[1:4]))


def test_plain_command_line(plain, capsys):
    arguments = plain / "predicted", plain / "truth", "--classes", plain / "names.txt"
    assert run_main(*arguments) == 0
    assert capsys.readouterr().out == f"{run_plain(plain).table}\n3 of 3 pairs evaluated\n"
    (plain / "predicted/b.png").unlink()
    extra = write_png(plain / "predicted/c.png", grey(0))
    assert run_main(*arguments) == 1
    error = capsys.readouterr().err
    assert f"{plain / 'truth/b.png'}: no prediction {plain / 'predicted/b.png'}" in error
    assert f"note: {extra}: no ground truth" in error


def test_class_file_errors(tmp_path):
    path = tmp_path / "names.txt"
    for content in (b"", b"sky\n\nroad\n"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"names\.txt: expected one class name a line"):
            evaluate.read_classes(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"names\.txt: cannot be read"):
        evaluate.read_classes(path)


# -- fuzz ------------------------------------------------------------------------------------------

THINGS = (*range(24, 34), 1, 5)  # classes with instances, evaluated or not, and void


def write_random_pair(root, name, rng, shape):
    """Ids in small blocks, instances that need not agree with the labels, any prediction."""

    def blocks(choices):
        edge = int(rng.integers(1, 5))
        cells = rng.choice(choices, [-(-side // edge) for side in shape])
        return np.kron(cells, np.ones((edge, edge), np.int64))[: shape[0], : shape[1]]

    label = blocks(34)
    instance = np.where(blocks(2), label, 1000 * blocks(THINGS) + blocks(3))
    predicted = np.where(rng.random(shape) < rng.random(), label, blocks(34))
    write_png(label_path(root, name), label.astype(np.uint8))
    write_png(label_path(root, name, "instanceIds"), instance.astype(np.uint16))
    write_png(root / f"results/{name}.png", predicted.astype(np.uint8))


def random_folder(root, rng, count):
    shape = tuple(map(int, rng.integers(1, 24, 2)))
    for index in range(count):
        write_random_pair(root, f"city_000000_{index:06d}", rng, shape)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_any_labels_and_instances_equal_cityscapesscripts(seed, count):
    official = import_cityscapesscripts()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        random_folder(root, np.random.default_rng(seed), count)
        pairs, *_ = evaluate.find_cityscapes_pairs(root / "results", root)
        assert same(run(root).result, official_scores(official, pairs))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_run_killed_anywhere_resumes(seed, first_cut, second_cut):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        random_folder(root, np.random.default_rng(seed), 3)
        cache = root / "counts"
        expected = run(root, cache=cache).result
        for cut in (first_cut, second_cut):
            content = cache.read_bytes()
            cache.write_bytes(content[: int(cut * len(content))])
            assert same(run(root, cache=cache).result, expected)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(sorted(BAD)), min_size=2, max_size=2))
def test_any_mixture_of_bad_pairs_is_named_and_counted(seed, cases):
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for index, case in enumerate([None, cases[0], None, cases[1]]):
            # A case spoils the pair NAME, so a pair gets its own name afterwards.
            write_random_pair(root, NAME, rng, SIZE)
            if case is not None:
                BAD[case][0](root)
            for path in list(root.rglob(f"{NAME}*.png")):
                path.rename(path.with_name(path.name.replace(NAME, f"aachen_000001_{index:06d}")))
        found = run(root)
        assert found.pairs == 2 and not found.unmatched
        named = [f"aachen_000001_{index:06d}" for index in (1, 3)]
        assert [name for f in found.failures for name in named if name in f.reason] == named
