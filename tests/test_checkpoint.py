"""Checkpoints: atomic, readable after any kill, and enough to continue bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("albumentations")
pytest.importorskip("tensorboard")

from fcnseg.data.synthetic import write_cityscapes
from fcnseg.training import CheckpointError, checkpoint

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_save_and_load_return_the_same(tmp_path: Path) -> None:
    state = {"a": torch.arange(5.0), "b": [1, 2.5, None, "x"], "c": {"d": (True, 3)}}
    checkpoint.save(tmp_path / "last.pt", state)
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(loaded.pop("a"), state.pop("a"))
    assert loaded == state
    assert os.listdir(tmp_path) == ["last.pt"]


def test_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(path, {"step": lambda: None})
    assert checkpoint.load(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_load_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*last\.pt"):
        checkpoint.load(tmp_path / "last.pt")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "code", "list"])
def test_load_names_an_unreadable_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"a": torch.zeros(1000)})
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "code":
        torch.save({"a": subprocess.Popen}, path)
    else:
        torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        checkpoint.load(path)


def test_remove_temporaries_spares_the_rest(tmp_path: Path) -> None:
    for name in (".last.pt.123.tmp", ".best.pt.77.tmp", "last.pt", ".hidden", "notes.tmp"):
        (tmp_path / name).touch()
    checkpoint.remove_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "last.pt", "notes.tmp"]


def test_random_states_are_restored(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        normal = np.random.standard_normal()  # leaves a cached second value behind
        return random.random(), random.gauss(0, 1), normal, torch.rand(()).item()

    draw()
    checkpoint.save(tmp_path / "rng.pt", checkpoint.rng_state())
    expected = [draw() for _ in range(3)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "rng.pt"))
    assert [draw() for _ in range(3)] == expected


def test_checkpoint_is_readable_after_a_kill_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    rng = random.Random(0)
    saved, ended_in_write = 0, 0
    # Forked from one process that has done its imports: a kill then costs milliseconds.
    for _ in range(25):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover
            try:
                os.close(reader)
                step = saved
                while True:
                    step += 1
                    weights = np.full(200_000, step, np.float32)
                    checkpoint.save(path, {"step": step, "weights": torch.from_numpy(weights)})
                    os.write(writer, step.to_bytes(8, "little"))
            finally:
                os._exit(1)
        os.close(writer)
        time.sleep(rng.uniform(0.01, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reported = b""
        while chunk := os.read(reader, 1 << 16):
            reported += chunk
        os.close(reader)
        acknowledged = int.from_bytes(reported[-8:], "little") if reported else saved
        if path.exists():
            state = checkpoint.load(path)
            # What save returned from is there; at most the write in hand is there as well.
            assert state["step"] in (acknowledged, acknowledged + 1)
            assert (state["weights"] == state["step"]).all()
            saved = state["step"]
        else:
            assert acknowledged == 0
        ended_in_write += any(name.endswith(".tmp") for name in os.listdir(tmp_path))
        checkpoint.remove_temporaries(tmp_path)
    assert saved > 0
    assert ended_in_write > 0, "no kill fell into a write: the test shows nothing"


DRIVER = """
import io, os, signal, sys
import torch
from fcnseg.training import TrainConfig, train

data_root, output, resume, fatal_save = sys.argv[1:]
saves, real_save = 0, torch.save

def save(state, file):
    # The given write of last.pt is killed half way through.
    global saves
    saves += "rng" in state
    if "rng" not in state or saves != int(fatal_save):
        return real_save(state, file)
    buffer = io.BytesIO()
    real_save(state, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save
train(
    TrainConfig(
        data_root=data_root, output=output, backbone="resnet18", head="fcn", upsample="bilinear",
        output_stride=32, aux_loss=True, crop=(32, 64), epochs=3, batch_size=3, lr=0.05, workers=1,
        log_interval=1, checkpoint_interval=2, resume=resume == "resume", device="cpu",
    )
)
"""  # the head has dropout, the trunk batch normalisation; 12 images make 4 steps an epoch


def start(data_root: Path, output: Path, *, resume: bool, fatal_save: int = 0) -> subprocess.Popen:
    mode = "resume" if resume else "new"
    command = [sys.executable, "-c", DRIVER, str(data_root), str(output), mode, str(fatal_save)]
    log = open(output.with_suffix(".log"), "ab")  # noqa: SIM115  (the child's)
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)


def records(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]  # the last one may be half written


def without_timing(record: dict) -> dict:
    timing = ("images_per_second", "peak_memory_mb", "waited_for_data")
    return {name: value for name, value in record.items() if name not in timing}


@pytest.mark.long(18)
def test_killed_and_resumed_run_has_the_losses_of_an_unbroken_one(tmp_path: Path) -> None:
    data_root = tmp_path / "data"
    write_cityscapes(data_root, train=12, val=2, size=(32, 64), seed=0)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    reference = start(data_root, unbroken, resume=False)

    # Killed by SIGKILL in the middle of the first epoch, just past its checkpoint.
    process = start(data_root, broken, resume=False)
    deadline = time.monotonic() + 60
    while sum(r["kind"] == "step" for r in records(broken)) < 3:
        assert process.poll() is None, broken.with_suffix(".log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    at = checkpoint.load(broken / "last.pt")["progress"]["step"]
    assert 2 <= at <= 4

    # Resumed, and killed again half way through the second checkpoint that it writes.
    process = start(data_root, broken, resume=True, fatal_save=2)
    assert process.wait(60) == -signal.SIGKILL, broken.with_suffix(".log").read_text()
    assert list(broken.glob(".last.pt.*.tmp")), "the kill did not fall into the write"
    assert at < checkpoint.load(broken / "last.pt")["progress"]["step"] < 12

    process = start(data_root, broken, resume=True)
    assert process.wait(60) == 0, broken.with_suffix(".log").read_text()
    assert reference.wait(60) == 0, unbroken.with_suffix(".log").read_text()
    assert not list(broken.glob(".*.tmp"))

    expected = [without_timing(r) for r in records(unbroken)]
    assert [r["step"] for r in expected if r["kind"] == "step"] == list(range(1, 13))
    assert [without_timing(r) for r in records(broken)] == expected
    for name in ("last.pt", "best.pt"):
        ours, theirs = (checkpoint.load(run / name)["model"] for run in (broken, unbroken))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
