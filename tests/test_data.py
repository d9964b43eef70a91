"""Data sets: files to (image, train ids), and every way a file can be wrong."""

import json

import cv2
import numpy as np
import pytest
import torch

from fcnseg import data
from fcnseg.data import cityscapes, synthetic

HEIGHT, WIDTH = 12, 20


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array)
    return path


def write_pair(image_path, label_path, value=0):
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[..., 2] = 200  # OpenCV writes BGR: a red image
    label = np.full((HEIGHT, WIDTH), value, np.uint8)
    return write(image_path, image), write(label_path, label)


@pytest.fixture
def camvid(tmp_path):
    write_pair(tmp_path / "train/images/a.png", tmp_path / "train/labels/a.png", 3)
    return tmp_path


def cityscapes_paths(root, city="ulm", name="ulm_000000_000000"):
    return (
        root / f"leftImg8bit/train/{city}/{name}_leftImg8bit.png",
        root / f"gtFine/train/{city}/{name}_gtFine_labelIds.png",
    )


def test_cityscapes_maps_label_ids_to_train_ids(tmp_path):
    image_path, label_path = cityscapes_paths(tmp_path)
    write_pair(image_path, label_path)
    values = np.r_[0:34, 255].astype(np.uint8)[None]
    write(image_path, np.zeros((1, values.size, 3), np.uint8))
    write(label_path, values)
    dataset = data.open_dataset("cityscapes", tmp_path)
    expected = np.full(256, 255)
    expected[list(cityscapes.TRAIN_ID_TO_LABEL_ID)] = range(19)
    np.testing.assert_array_equal(dataset.load(0)[1][0], expected[values[0]])
    assert (dataset.num_classes, dataset.palette.shape, dataset.ignore_index) == (19, (19, 3), 255)
    assert cityscapes.TRAIN_ID_TO_LABEL_ID[13] == 26 and dataset.classes[13] == "car"


def test_ade20k_shifts_labels_by_one(tmp_path):
    values = np.arange(151, dtype=np.uint8)[None]
    write(tmp_path / "images/training/a.jpg", np.zeros((1, 151), np.uint8))  # greyscale is allowed
    write(tmp_path / "annotations/training/a.png", values)
    dataset = data.ADE20K(tmp_path)
    image, label = dataset.load(0)
    assert image.shape == (1, 151, 3)
    np.testing.assert_array_equal(label[0], np.r_[255, 0:150])
    assert len(dataset.classes) == 150 and len(np.unique(dataset.palette, axis=0)) == 150


@pytest.mark.parametrize("folders", [("train/images", "train/labels"), ("train", "trainannot")])
@pytest.mark.parametrize(("value", "train_id"), [(0, 0), (10, 10), (11, 255), (255, 255)])
def test_camvid_layouts_and_labels(tmp_path, folders, value, train_id):
    write_pair(tmp_path / folders[0] / "a.png", tmp_path / folders[1] / "a.png", value)
    image, target = data.CamVid(tmp_path)[0]
    assert image.shape == (3, HEIGHT, WIDTH) and image.dtype == target.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [200, 0, 0]
    assert target.unique().tolist() == [train_id]


def test_index_out_of_range(camvid):
    with pytest.raises(IndexError):
        data.CamVid(camvid)[1]


@pytest.mark.parametrize("name", ["cityscapes", "ade20k", "camvid"])
def test_missing_folders(tmp_path, name):
    with pytest.raises(data.DataError, match=r"absent: no such folder, expected the root"):
        data.open_dataset(name, tmp_path / "absent")
    with pytest.raises(data.DataError, match=str(tmp_path)):
        data.open_dataset(name, tmp_path)
    with pytest.raises(ValueError, match=r"split: .* has train, val.*; got 'trian'"):
        data.open_dataset(name, tmp_path, "trian")


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match=r"name: expected one of cityscapes, .*; got 'voc'"):
        data.open_dataset("voc", tmp_path)


def test_no_images(tmp_path):
    for folder in ("train/images", "train/labels"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(data.DataError, match=r"no images of CamVid's split 'train'"):
        data.CamVid(tmp_path)


def test_missing_label_is_found_at_construction(camvid, tmp_path):
    (camvid / "train/labels/a.png").unlink()
    with pytest.raises(data.DataError, match=r"labels/a\.png: no such file, expected the label of"):
        data.CamVid(camvid)
    image_path, label_path = cityscapes_paths(tmp_path)
    write_pair(image_path, label_path)
    label_path.unlink()
    with pytest.raises(data.DataError, match=r"_labelIds\.png: no such file, expected the label"):
        data.Cityscapes(tmp_path)


@pytest.mark.parametrize("which", ["images", "labels"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_bytes(b"not an image at all, but text"), "corrupt"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "corrupt or truncated"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
)
def test_damaged_file_is_named(camvid, which, damage, message):
    dataset = data.CamVid(camvid)
    damage(camvid / "train" / which / "a.png")
    with pytest.raises(data.DataError, match=rf"{which}/a\.png: .*{message}"):
        dataset[0]


def test_truncated_jpeg_is_named(tmp_path):
    image, _ = write_pair(tmp_path / "train/a.jpg", tmp_path / "trainannot/a.png")
    image.write_bytes(image.read_bytes()[:-30])
    with pytest.raises(data.DataError, match=r"a\.jpg: corrupt or truncated"):
        data.CamVid(tmp_path)[0]


@pytest.mark.parametrize(
    ("file", "shape", "message"),
    [
        ("labels/a.png", (8, 9), "expected the size of a.png, 12x20, got 8x9"),
        ("labels/a.png", (12, 20, 3), "expected a label PNG of 1 channel and 8 bits, got 3 ch"),
        ("images/a.png", (12, 20), r"expected an image of 3 channels \(RGB\), got 1 channel"),
    ],
)
def test_wrong_shape_is_named(camvid, file, shape, message):
    write(camvid / "train" / file, np.zeros(shape, np.uint8))
    with pytest.raises(data.DataError, match=f"{file}: {message}"):
        data.CamVid(camvid)[0]


def test_sixteen_bit_label_is_refused(camvid):
    write(camvid / "train/labels/a.png", np.zeros((HEIGHT, WIDTH), np.uint16))
    with pytest.raises(data.DataError, match=r"a\.png: .*got 1 channel and 16 bits"):
        data.CamVid(camvid)[0]


def test_label_outside_the_table_names_file_and_value(camvid):
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    label[5, 7] = 12
    write(camvid / "train/labels/a.png", label)
    message = r"a\.png: label value 12 at row 5, column 7 is not one of CamVid's \(0\.\.11, 255\)"
    with pytest.raises(data.DataError, match=message):
        data.CamVid(camvid)[0]


def test_error_in_a_worker_names_the_file(camvid):
    (camvid / "train/images/a.png").write_bytes(b"")
    loader = torch.utils.data.DataLoader(data.CamVid(camvid), num_workers=1)
    with pytest.raises(data.DataError, match=r"images/a\.png: the file is empty"):
        next(iter(loader))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_normalise(dtype, memory_format):
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    result = data.normalise(images, memory_format, dtype)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (data.MEAN, data.STD))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        result.double(), (images.double() / 255 - mean) / std, rtol=tolerance, atol=tolerance
    )
    assert result.dtype == dtype and result.is_contiguous(memory_format=memory_format)


def test_normalise_errors():
    with pytest.raises(TypeError, match=r"images: expected uint8, got torch\.float32"):
        data.normalise(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"images: expected the shape \[N, 3, H, W\], got \[3, 2"):
        data.normalise(torch.zeros(3, 2, 2, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"dtype: expected a floating-point type"):
        data.normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), dtype=torch.int32)


SCENES = {"train": 3, "val": 2, "size": (48, 96), "seed": 4}


def test_synthetic_scenes_are_deterministic_and_readable(tmp_path):
    for name in "ab":
        assert synthetic.write_cityscapes(tmp_path / name, **SCENES) == tmp_path / name
    first, second = (data.Cityscapes(tmp_path / name) for name in "ab")
    assert (len(first), len(data.Cityscapes(tmp_path / "a", "val"))) == (3, 2)
    for index in range(3):
        for x, y in zip(first[index], second[index], strict=True):
            assert torch.equal(x, y)
    image, target = first[0]
    assert image.shape == (3, 48, 96)
    assert 255 in target and len(target.unique()) > 6
    assert not torch.equal(image, first[1][0])
    assert not torch.equal(image, data.Cityscapes(tmp_path / "a", "val")[0][0])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}  # no temporary folders


def test_synthetic_scenes_hold_every_class():
    ids = set()
    for index in range(60):
        ids |= set(np.unique(synthetic.render((64, 128), np.random.default_rng(index))[1]).tolist())
    assert ids >= set(cityscapes.TRAIN_ID_TO_LABEL_ID) | {1, 3, 4}
    assert max(ids) < 34


def test_synthetic_scenes_are_reused_or_refused(tmp_path):
    root = synthetic.write_cityscapes(tmp_path / "s", **SCENES)
    before = (root / "synthetic.json").stat().st_mtime_ns
    synthetic.write_cityscapes(root, **SCENES)
    assert (root / "synthetic.json").stat().st_mtime_ns == before
    with pytest.raises(
        data.DataError, match=r"synthetic\.json: .*'seed': 4.* expected .*'seed': 5"
    ):
        synthetic.write_cityscapes(root, **SCENES | {"seed": 5})
    (root / "synthetic.json").write_text("{")
    with pytest.raises(data.DataError, match=r"synthetic\.json: not valid JSON"):
        synthetic.write_cityscapes(root, **SCENES)
    (root / "synthetic.json").unlink()
    with pytest.raises(data.DataError, match=r"has no synthetic\.json"):
        synthetic.write_cityscapes(root, **SCENES)


def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "_write_split", interrupt)
    with pytest.raises(KeyboardInterrupt):
        synthetic.write_cityscapes(tmp_path / "s", **SCENES)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    root = synthetic.write_cityscapes(tmp_path / "s", **SCENES)
    assert json.loads((root / "synthetic.json").read_text())["train"] == 3


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"train": 0}, "train: expected at least 1"),
        ({"val": 0}, "val: expected at least 1"),
        ({"size": (16, 64)}, "size: expected height and width"),
        ({"seed": -1}, "seed: expected a number >= 0"),
    ],
)
def test_synthetic_argument_errors(tmp_path, argument, message):
    with pytest.raises(ValueError, match=message):
        synthetic.write_cityscapes(tmp_path / "s", **SCENES | argument)
