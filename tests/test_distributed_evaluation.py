"""Evaluation by several processes counts every sample once; the tables and pictures of scores."""

import os

import cv2
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, TensorDataset

from fcnseg import metrics
from fcnseg.data import DistributedEvalSampler

CLASSES = ["road", "tree", "sky"]


def samples():
    generator = torch.Generator().manual_seed(0)
    # 7 samples: neither 2 nor 3 processes get equal shares.
    labels = torch.randint(0, 3, (2, 7, 4, 5), generator=generator)
    return TensorDataset(labels[0], labels[1])


def evaluate_share(rank, processes, store, output):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    dataset = samples()
    metric = metrics.ConfusionMatrix(3)
    sampler = DistributedEvalSampler(dataset)
    for prediction, target in DataLoader(dataset, batch_size=2, sampler=sampler):
        metric.update(prediction, target)
    metric.sync()
    torch.save(metric.compute(), f"{output}.{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_count_every_sample_once(tmp_path, processes, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    output = tmp_path / "matrix"
    mp.spawn(evaluate_share, (processes, f"file://{tmp_path}/store", str(output)), processes)
    expected = metrics.ConfusionMatrix(3)
    expected.update(*samples().tensors)
    assert int(expected.matrix.sum()) == 7 * 20
    for rank in range(processes):
        assert torch.equal(torch.load(f"{output}.{rank}"), expected.compute())


@pytest.mark.parametrize("length", [0, 1, 2, 5, 6])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_hold_every_sample_once(length, processes):
    shares = [
        DistributedEvalSampler(range(length), num_replicas=processes, rank=rank)
        for rank in range(processes)
    ]
    assert sorted(index for share in shares for index in share) == list(range(length))
    assert all(len(share) == len(list(share)) for share in shares)


def test_sampler_errors():
    with pytest.raises(ValueError, match=r"given where torch\.distributed is not initialised"):
        DistributedEvalSampler(range(3))
    with pytest.raises(ValueError, match="both or not at all"):
        DistributedEvalSampler(range(3), rank=0)
    for replicas, rank in ((0, 0), (2, 2), (2, -1)):
        with pytest.raises(ValueError, match=rf"\[0, num_replicas\), got rank {rank} of"):
            DistributedEvalSampler(range(3), num_replicas=replicas, rank=rank)


# -- reports ---------------------------------------------------------------------------------------


def test_table_of_scores():
    result = metrics.scores(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    lines = metrics.format_scores(result, CLASSES).splitlines()
    assert lines[0].split() == ["class", "IoU", "Dice", "accuracy"]
    assert lines[1].split() == ["road", "0.7500", "0.8571", "0.7500"]
    assert lines[3].split() == ["sky", "-", "-", "-"]
    assert lines[4].split() == ["mean", "0.7750", "0.8730", "0.8750"]
    assert lines[5] == "pixel accuracy 0.8750, frequency-weighted IoU 0.7750"
    assert len({len(line) for line in lines[:5]}) == 1
    with pytest.raises(ValueError, match="classes must hold 3 names, one per class, got 2"):
        metrics.format_scores(result, CLASSES[:2])


def test_picture_of_the_matrix(tmp_path):
    pytest.importorskip("matplotlib")
    matrix = torch.tensor([[300, 1, 0], [0, 4, 0], [0, 0, 0]])
    path = tmp_path / "matrix.png"
    metrics.save_matrix(path, matrix, CLASSES)
    assert cv2.imread(str(path)) is not None
    with pytest.raises(ValueError, match="classes must hold 3 names"):
        metrics.save_matrix(path, matrix, CLASSES[:2])
    with pytest.raises(TypeError, match="matrix"):
        metrics.save_matrix(path, matrix.float(), CLASSES)
