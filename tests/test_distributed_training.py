"""Two and three processes train as one does, and all end when one fails.

Batch normalisation is frozen here: without SyncBatchNorm, which PyTorch has on CUDA only, each
process normalises by the statistics of its share.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

pytest.importorskip("albumentations")
pytest.importorskip("tensorboard")

import fcnseg
from fcnseg.data.synthetic import write_cityscapes
from fcnseg.graphs import TrainStep
from fcnseg.losses import SegmentationLoss
from fcnseg.models import fcn_resnet18
from fcnseg.training import ConfigError, TrainConfig, Trainer, World, checkpoint, optimizer
from fcnseg.training.criterion import Objective
from fcnseg.training.loop import EpochBatches

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_cityscapes.py"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
}  # fmt: skip
CLASSES, STEPS, BATCH = 5, 3, 6


class Net(nn.Module):
    """A trunk, a head and a loss per pixel of the upsampled logits, small and in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.classifier = nn.Conv2d(8, CLASSES, 3, padding=1)
        self.double()

    def loss(self, x: Tensor, target: Tensor, *, aux_weight: float, **options: Any) -> Tensor:
        logits = self.classifier(self.backbone(x))
        return fcnseg.upsample_cross_entropy(logits, target, **options)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(STEPS):
        x = torch.randn(BATCH, 3, 12, 16, generator=generator, dtype=torch.float64)
        target = torch.randint(0, CLASSES, (BATCH, 12, 16), generator=generator)
        target[:2] = 255  # all that rank 0 of 3 gets
        target[3, :8] = 255
        made.append((x, target))
    return made


def steps(rank: int, size: int, parts: int) -> tuple[list[float], dict[str, Tensor]]:
    """This process's share of some steps: its parts of the losses, and the weights."""
    model = Net()
    config = TrainConfig(data_root="-", output="-", lr=0.01, ema=0.5, freeze_bn=True)
    optimizer.freeze_batch_norm(model)
    optimizer.train_mode(model, freeze_bn=True)
    average, update = optimizer.averaging(model, config.ema)
    weight = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)
    criterion = SegmentationLoss(weight, ignore_index=255, label_smoothing=0.1)
    objective: nn.Module = Objective(model, criterion)
    if size > 1:
        objective = nn.parallel.DistributedDataParallel(objective)
    step = TrainStep(
        objective, optimizer.make_optimizer(model, config), [1.0, 0.5, 0.25],
        torch.device("cpu"), count=criterion.count, parts=parts, max_norm=0.5, after=update,
    )  # fmt: skip
    own = BATCH // size
    share = slice(rank * own, rank * own + own)
    losses = [step(x[share], target[share]).item() for x, target in batches()]
    averages = {f"average.{name}": value for name, value in average.state_dict().items()}
    return losses, model.state_dict() | averages


def run_steps(rank: int, size: int, parts: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    torch.save(steps(rank, size, parts), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size, parts", [(3, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
@pytest.mark.long(10)
def test_processes_and_parts_equal_one_process(
    tmp_path: Path, size: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", ENVIRONMENT["GLOO_SOCKET_IFNAME"])
    expected, weights = steps(0, 1, 1)
    mp.spawn(run_steps, (size, parts, str(tmp_path)), size)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    # Each process knows its share of the loss.
    total = [sum(values) for values in zip(*(losses for losses, _ in results), strict=True)]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    for _, own in results:
        for name, value in weights.items():
            torch.testing.assert_close(own[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_shares_make_the_batches_of_one_process() -> None:
    whole = EpochBatches(14, 6, seed=3)
    whole.epoch = 2
    for size in (2, 3):
        shares = []
        for rank in range(size):
            share = EpochBatches(14, 6, 3, World(rank, size))
            share.epoch = 2
            assert len(share) == 2
            shares.append(list(share))
        joined = [[i for own in batch for i in own] for batch in zip(*shares, strict=True)]
        assert joined == list(whole) == [whole.batch(2, 0), whole.batch(2, 1)]


def test_batch_must_fit_the_processes(tmp_path: Path) -> None:
    from test_training import Net as Small
    from test_training import Pictures

    config = TrainConfig(
        data_root="-", output=str(tmp_path), batch_size=4, accumulate=2, device="cpu"
    )
    with pytest.raises(ConfigError, match=r"accumulate times the number of processes, 2 x 3"):
        Trainer(config, Small(), Pictures(8), Pictures(2), world=World(0, 3))  # type: ignore[arg-type]


def test_sync_bn_needs_cuda(tmp_path: Path) -> None:
    from test_training import Net as Small
    from test_training import Pictures

    config = TrainConfig(
        data_root="-", output=str(tmp_path), batch_size=4, sync_bn=True, device="cpu"
    )
    with pytest.raises(ConfigError, match="sync_bn: PyTorch synchronises"):
        Trainer(config, Small(), Pictures(8), Pictures(2))  # type: ignore[arg-type]
    # What is used on CUDA keeps the names of the weights.
    model = fcn_resnet18(4, output_stride=32)
    names = list(model.state_dict())
    assert list(nn.SyncBatchNorm.convert_sync_batchnorm(model).state_dict()) == names


def launch(processes: int, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLE)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command[3:3] = [
            "--master-port",
            "0",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
        ]
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


SMALL = [
    "--backbone", "resnet18", "--output-stride", 32, "--batch-size", 4, "--crop", 32, 64,
    "--workers", 0, "--freeze-bn", "--log-interval", 1, "--epochs", 1, "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_cityscapes(root, train=12, val=3, size=(32, 64), seed=0)  # 3: shares are not equal
    return root


def records(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    timing = ("images_per_second", "peak_memory_mb", "waited_for_data")
    return [{k: v for k, v in json.loads(x).items() if k not in timing} for x in lines]


@pytest.mark.long(20)
def test_torchrun_equals_one_process_and_resumes(tmp_path: Path, data_root: Path) -> None:
    one = launch(1, "--data-root", data_root, "--output", tmp_path / "one", *SMALL)
    # Stopped after the second of three steps, with a validation, and continued.
    arguments = ["--data-root", data_root, "--output", tmp_path / "two"]
    two = launch(2, *arguments, *SMALL, "--max-steps", 2)
    out, err = two.communicate(timeout=600)
    assert two.returncode == 0, err
    two = launch(2, *arguments, "--resume", "--max-steps", 9)
    out, err = two.communicate(timeout=600)
    assert two.returncode == 0, err
    assert out.count("resuming at step 2") == 1 and out.count("best epoch was") == 1, out
    assert one.communicate(timeout=600) and one.returncode == 0
    names = sorted(os.listdir(tmp_path / "two"))
    assert sum(name.startswith("events.") for name in names) == 2  # one writer a start
    assert {"best.pt", "config.json", "curves.png", "last.pt", "predictions.png"} < set(names)
    expected = records(tmp_path / "one")
    ours = [r for r in records(tmp_path / "two") if r.get("step") != 2 or r["kind"] == "step"]
    assert len(ours) == len(expected) == 4
    for own, given in zip(ours, expected, strict=True):
        assert own.pop("kind") == given.pop("kind")
        assert own == pytest.approx(given, rel=1e-5)
    weights = [checkpoint.load(tmp_path / run / "last.pt")["model"] for run in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.long(6)
def test_all_end_when_one_fails(tmp_path: Path, data_root: Path) -> None:
    files = sorted(data_root.glob("leftImg8bit/train/*/*.png"))
    broken = tmp_path / "broken"
    write_cityscapes(broken, train=12, val=3, size=(32, 64), seed=0)
    victim = broken / files[EpochBatches(12, 4, 0).batch(0, 1)[3]].relative_to(data_root)
    victim.write_bytes(victim.read_bytes()[:99])  # rank 1 meets it in the second step
    started = time.monotonic()
    run = launch(2, "--data-root", broken, "--output", tmp_path / "run", *SMALL)
    _, err = run.communicate(timeout=600)
    assert run.returncode == 1
    assert f"error: rank 1: {victim}: corrupt or truncated" in err
    assert time.monotonic() - started < 90


@pytest.mark.long(8)
def test_sigterm_stops_all_with_a_checkpoint(tmp_path: Path, data_root: Path) -> None:
    output = tmp_path / "run"
    run = launch(2, "--data-root", data_root, "--output", output, *SMALL, "--epochs", 900)
    deadline = time.monotonic() + 100
    while not (output / "metrics.jsonl").exists() or len(records(output)) < 2:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)  # to torchrun, which passes it on
    out, err = run.communicate(timeout=600)
    assert run.returncode != 0 and "interrupted at step" in out, err
    steps = [r["step"] for r in records(output) if r["kind"] == "step"]
    assert checkpoint.load(output / "last.pt")["progress"]["step"] == steps[-1]
