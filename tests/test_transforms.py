"""Augmentation: geometry, and that it depends on (seed, epoch, index) alone."""

import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("albumentations")

from fcnseg import data
from fcnseg.data import synthetic

COUNT = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "s"
    return synthetic.write_cityscapes(folder, train=COUNT, val=1, size=(48, 96))


def dataset(root, seed=0):
    return data.Cityscapes(root, transform=data.TrainTransform((32, 32), seed=seed))


def epoch_of(loader, epoch=0):
    loader.dataset.set_epoch(epoch)
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def make_loader(dataset, workers, **kwargs):
    return torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=workers, worker_init_fn=data.worker_init_fn, **kwargs
    )


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_workers_and_order_change_nothing(root):
    expected = epoch_of(make_loader(dataset(root), 0), 3)
    for workers in (1, 2):
        assert_same(epoch_of(make_loader(dataset(root), workers), 3), expected)
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    shuffled = epoch_of(make_loader(dataset(root), 2, sampler=order), 3)
    assert_same(shuffled, [part[order] for part in expected])


def test_set_epoch_reaches_persistent_workers(root):
    loader = make_loader(dataset(root), 2, persistent_workers=True)
    epochs = [epoch_of(loader, epoch) for epoch in (0, 1, 0)]
    assert_same(epochs[0], epochs[2])
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert_same(epochs[1], epoch_of(make_loader(dataset(root), 0), 1))


def test_two_workers_do_not_repeat_augmentations(root):
    scenes = dataset(root)
    scenes.files = [scenes.files[0]] * COUNT  # one image: only the augmentation differs
    images, _ = epoch_of(make_loader(scenes, 2))
    again, _ = epoch_of(make_loader(scenes, 2), 1)
    assert len({image.numpy().tobytes() for image in (*images, *again)}) == 2 * COUNT


def test_seed_and_negative_index(root):
    assert not torch.equal(dataset(root, 0)[0][0], dataset(root, 1)[0][0])
    assert_same(dataset(root)[-1], dataset(root)[COUNT - 1])


def test_transform_survives_pickling(root):
    image, label = data.Cityscapes(root).load(0)
    transform = data.TrainTransform((20, 30))
    transform(image, label, epoch=0, index=1)
    copy = pickle.loads(pickle.dumps(transform))
    for a, b in zip(
        transform(image, label, epoch=1, index=2), copy(image, label, epoch=1, index=2), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", [(64, 80), (20, 200), (5, 3)])
def test_image_and_label_stay_aligned(size):
    # Labels are readable from the image, whatever the window: bands of 0 and 240.
    label = np.zeros(size, np.uint8)
    label[:, size[1] // 2 :] = 1
    image = np.repeat((240 * label)[..., None], 3, axis=2)
    transform = data.TrainTransform((32, 48), color_jitter=0)
    for index in range(20):
        x, y = transform(image, label, epoch=0, index=index)
        assert x.shape == (32, 48, 3) and y.shape == (32, 48)
        assert set(np.unique(y)) <= {0, 1, 255}
        inside = y != 255
        assert ((x[..., 0] > 120) == (y == 1))[inside].mean() > 0.93


def test_padding_is_void_and_mean():
    image, label = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
    transform = data.TrainTransform((16, 16), scale=(1, 1), color_jitter=0)
    x, y = transform(image, label, epoch=0, index=0)
    assert (y == 255).sum() == 256 - 64
    assert (x[y == 255] == [124, 116, 104]).all() and (x[y == 0] == 0).all()


def test_flip_probability():
    image = np.zeros((8, 8, 3), np.uint8)
    label = np.tile(np.arange(8, dtype=np.uint8), (8, 1))
    for flip, first in ((0, 0), (1, 7)):
        transform = data.TrainTransform((8, 8), scale=(1, 1), flip=flip)
        assert transform(image, label, epoch=0, index=0)[1][0, 0] == first


def test_eval_transform():
    image = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    label = image[..., 0].copy()
    same = data.EvalTransform()(image, label, epoch=0, index=0)
    assert same[0] is image and same[1] is label
    resized = data.EvalTransform((5, 7))(image, label, epoch=0, index=0)
    assert resized[0].shape == (5, 7, 3) and set(np.unique(resized[1])) <= set(np.unique(label))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": (0, 4)}, "crop: expected a positive"),
        ({"scale": (0, 1)}, "scale: expected 0 < low <= high"),
        ({"scale": (2, 1)}, "scale: expected 0 < low <= high"),
        ({"seed": -1}, "seed: expected a number >= 0"),
        ({"flip": 1.5}, "flip: expected a probability"),
        ({"color_jitter": 1}, r"color_jitter: expected a number in \[0, 1\)"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.TrainTransform(**{"crop": (8, 8)} | arguments)
    if "crop" in arguments:
        with pytest.raises(ValueError, match="size: expected a positive"):
            data.EvalTransform((0, 4))
