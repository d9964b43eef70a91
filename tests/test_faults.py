"""What goes wrong in a long run: it says so in a line, and nothing that was saved is lost.

Each run is continued afterwards and then has, bit for bit, the losses of an unbroken one. A kill in
the middle of a step or of a write is in test_checkpoint.py, twice; here ten times.
"""

import errno
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("cv2")
pytest.importorskip("albumentations")
pytest.importorskip("tensorboard")

import cv2
from test_checkpoint import ENVIRONMENT, records, without_timing
from test_training import EXAMPLE, Pictures, settings, trainer

from fcnseg.data import DataError
from fcnseg.data.synthetic import write_cityscapes
from fcnseg.training import TrainConfig, TrainResult, WorkerError, checkpoint, train
from fcnseg.training.loop import EpochBatches, MetricsFile


def saved_step(output: Path) -> int:
    return checkpoint.load(output / "last.pt")["progress"]["step"]


def outcome(output: Path) -> list[dict[str, Any]]:
    return [without_timing(record) for record in records(output)]


# -- full disk -------------------------------------------------------------------------------------


def fill_disk(path: Path) -> Path:
    """Makes the next write of a checkpoint meet a full disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.symlink_to("/dev/full")
    return temporary


@pytest.mark.parametrize("size", [10, 1_000_000])  # fails at the flush, or within torch.save
def test_full_disk_keeps_the_checkpoint(tmp_path: Path, size: int) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"a": torch.ones(3)})
    fill_disk(path)
    with pytest.raises(OSError, match=r"No space left on device; the one.*last\.pt") as caught:
        checkpoint.save(path, {"a": torch.zeros(size)})
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["last.pt"]
    assert torch.equal(checkpoint.load(path)["a"], torch.ones(3))


def test_file_size_limit_keeps_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"a": torch.ones(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="cannot write the checkpoint"):
            checkpoint.save(path, {"a": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["last.pt"]
    assert torch.equal(checkpoint.load(path)["a"], torch.ones(3))


def test_full_disk_names_the_metrics(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.close()
    metrics.file = open("/dev/full", "w")  # noqa: SIM115
    metrics.write({"step": 1})
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        metrics.flush()


def test_run_on_a_full_disk_is_continued(tmp_path: Path) -> None:
    trainer(settings(tmp_path / "unbroken")).run()
    output = tmp_path / "broken"
    made = trainer(settings(output))
    end_epoch = made._end_epoch

    def full(images_per_second: float) -> None:
        if made.progress.epoch == 1:
            fill_disk(output / "last.pt")
        end_epoch(images_per_second)

    made._end_epoch = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match=r"No space left on device; the one written before is whole"):
        made.run()
    assert saved_step(output) == 4
    trainer(settings(output, resume=True)).run()
    assert outcome(output) == outcome(tmp_path / "unbroken")


# -- files ----------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "backbone": "resnet18", "output_stride": 32, "crop": (32, 64), "epochs": 1, "batch_size": 3,
    "workers": 1, "log_interval": 1, "checkpoint_interval": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_cityscapes(root, train=12, val=2, size=(32, 64), seed=0)
    return root


def run(data_root: Path, output: Path, **changes: Any) -> TrainResult:
    return train(TrainConfig(data_root=str(data_root), output=str(output), **(RUN | changes)))


@pytest.fixture(scope="module")
def unbroken(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    run(data_root, output)
    return output


@pytest.mark.parametrize(
    "fault", ["corrupt image", pytest.param("bad label", marks=pytest.mark.slow)]
)
def test_bad_file_is_named_and_the_run_is_continued(
    tmp_path: Path, data_root: Path, unbroken: Path, fault: str
) -> None:
    index = EpochBatches(12, 3, 0).batch(0, 2)[1]
    if fault == "corrupt image":
        victim = sorted(data_root.glob("leftImg8bit/train/*/*.png"))[index]
    else:
        victim = sorted(data_root.glob("gtFine/train/*/*labelIds.png"))[index]
    content = victim.read_bytes()
    if fault == "corrupt image":
        victim.write_bytes(content[: len(content) // 2])
    else:
        label = cv2.imread(str(victim), cv2.IMREAD_UNCHANGED)
        label[3, 5] = 77
        cv2.imwrite(str(victim), label)
    output = tmp_path / "run"
    try:
        with pytest.raises(DataError) as caught:
            run(data_root, output)
    finally:
        victim.write_bytes(content)
    reason = "corrupt or truncated" if fault == "corrupt image" else "label value 77 at row 3"
    assert f"{victim}: {reason}" in str(caught.value).splitlines()[-1]
    assert saved_step(output) == 2
    run(data_root, output, resume=True)
    assert outcome(output) == outcome(unbroken)


# -- processes ------------------------------------------------------------------------------------


class Mortal(Pictures):
    """Kills the process that loads the picture ``fatal``."""

    fatal = -1

    def __getitem__(self, index: int) -> Any:
        if index == self.fatal and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def run_with_a_dying_worker(output: Path) -> None:
    pictures = Mortal(18)
    pictures.fatal = EpochBatches(18, 4, 0).batch(0, 3)[0]
    trainer(settings(output, epochs=1, workers=1, checkpoint_interval=1), pictures).run()


@pytest.mark.long(5)
def test_dying_worker_is_said_and_the_run_is_continued(tmp_path: Path) -> None:
    trainer(settings(tmp_path / "unbroken", epochs=1)).run()
    output = tmp_path / "broken"
    # In a process of its own: PyTorch raises in the handler of the worker's SIGCHLD, wherever the
    # main thread happens to be, and that may be within pytest.
    call = (
        "import pathlib, sys, torch, test_faults; "
        f"torch.set_num_threads({torch.get_num_threads()}); "  # sums in one order
        "test_faults.run_with_a_dying_worker(pathlib.Path(sys.argv[1]))"
    )
    died = subprocess.run(
        [sys.executable, "-c", call, str(output)], env=ENVIRONMENT, cwd=Path(__file__).parent,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert died.returncode == 1, died.stderr
    said = (
        r"WorkerError: .*(Killed|exited unexpectedly).*fewer workers than 1.*checkpoint is of step"
    )
    assert re.search(said, died.stderr), died.stderr
    assert 1 <= saved_step(output) <= 3  # the worker loads ahead
    resumed = settings(output, epochs=1, resume=True, checkpoint_interval=1)
    trainer(resumed, Pictures(18)).run()
    assert outcome(output) == outcome(tmp_path / "unbroken")


class Interrupted(Pictures):
    """Whose workers get a Ctrl-C twice, as a terminal sends it to all processes."""

    def __getitem__(self, index: int) -> Any:
        assert torch.utils.data.get_worker_info() is not None
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def test_workers_leave_ctrl_c_to_the_training_process(tmp_path: Path) -> None:
    def outlives(output: Path, pictures: Pictures) -> list[dict[str, Any]]:
        config = settings(output, epochs=1, val_interval=0, workers=1)
        made = trainer(config, pictures)
        made._report = lambda: None  # type: ignore[method-assign]  # reads a picture itself
        assert not made.run().interrupted
        return outcome(output)

    expected = outlives(tmp_path / "a", Pictures(18))
    assert outlives(tmp_path / "b", Interrupted(18)) == expected


class Failing(Pictures):
    def __getitem__(self, index: int) -> Any:
        raise self.error  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "error", [ConnectionResetError("server"), RuntimeError("DataLoader worker")]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_the_data_set_is_no_dead_worker(
    tmp_path: Path, error: Exception, workers: int
) -> None:
    pictures = Failing(18)
    pictures.error = error  # type: ignore[attr-defined]
    with pytest.raises(type(error), match=str(error)) as caught:
        trainer(settings(tmp_path, workers=workers), pictures).run()
    assert not isinstance(caught.value, WorkerError)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("Connection reset by peer"),
        RuntimeError("Pin memory thread exited unexpectedly"),  # on CUDA
    ],
)
def test_broken_pipe_of_a_worker_is_its_death(tmp_path: Path, error: Exception) -> None:
    def dies() -> Any:
        raise error
        yield

    made = trainer(settings(tmp_path, workers=3))
    made._loader = lambda *_, **__: dies()  # type: ignore[method-assign]
    said = rf"unexpectedly .{type(error).__name__}.: .*fewer workers than 3.*no checkpoint"
    with pytest.raises(WorkerError, match=said):
        made.run()


def start_example(data_root: Path, output: Path, *arguments: object) -> subprocess.Popen[str]:
    options = [
        "--backbone", "resnet18", "--output-stride", 32, "--crop", 32, 64, "--epochs", 40,
        "--batch-size", 3, "--workers", 1, "--log-interval", 1, "--checkpoint-interval", 1,
        "--val-interval", 0, "--device", "cpu",
    ]  # fmt: skip
    command = [sys.executable, EXAMPLE, "--data-root", data_root, "--output", output, *arguments]
    if "--resume" not in arguments:
        command += options
    return subprocess.Popen(
        list(map(str, command)), env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(record["step"] >= step for record in records(output)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.long(8)
def test_sigterm_to_all_processes_saves_and_exits(tmp_path: Path, data_root: Path) -> None:
    output = tmp_path / "run"
    process = start_example(data_root, output)
    wait_for_step(process, output, 2)
    os.killpg(process.pid, signal.SIGTERM)  # as a batch system does, to the data worker too
    out, err = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, err
    step = saved_step(output)
    assert f"interrupted at step {step}; continue with --output {output} --resume" in out
    assert [r["step"] for r in records(output)][-1] == step
    again = start_example(data_root, output, "--resume", "--max-steps", step + 1)
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert f"resuming at step {step}" in out and saved_step(output) == step + 1


@pytest.mark.slow
def test_killed_ten_times_at_a_random_moment(tmp_path: Path, data_root: Path) -> None:
    expected = tmp_path / "unbroken"
    reference = start_example(data_root, expected)
    assert reference.communicate(timeout=400) and reference.returncode == 0
    rng, output, step = random.Random(0), tmp_path / "broken", 0
    for _ in range(10):
        process = start_example(data_root, output, *(["--resume"] if step else []))
        wait_for_step(process, output, step + 1)
        time.sleep(rng.uniform(0, 1.5))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
        before, step = step, saved_step(output) if (output / "last.pt").exists() else 0
        assert step >= before
    process = start_example(data_root, output, "--resume")
    assert process.communicate(timeout=400) and process.returncode == 0
    assert json.dumps(outcome(output)) == json.dumps(outcome(expected))
    ours, theirs = (checkpoint.load(x / "last.pt")["model"] for x in (output, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
