"""The training loop, its schedule and configuration, and the example's command line."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("albumentations")
pytest.importorskip("tensorboard")

import fcnseg
from fcnseg.models import LoadReport
from fcnseg.training import (
    CheckpointError,
    ConfigError,
    DivergedError,
    TrainConfig,
    Trainer,
    checkpoint,
    loop,
    lr_factor,
    reporting,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_cityscapes.py"
CLASSES = ("road", "tree", "sky")


class Pictures(torch.utils.data.Dataset):
    """Small random pictures whose labels are the brightest channel; some are all void."""

    classes, num_classes, ignore_index = CLASSES, len(CLASSES), 255
    palette = np.array([[128, 64, 128], [107, 142, 35], [70, 130, 180]], np.uint8)

    def __init__(self, count: int, void: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(count)
        coarse = torch.rand(count, 3, 3, 4, generator=generator)
        images = F.interpolate(coarse, size=(12, 16), mode="nearest")
        self.images = (images * 255).to(torch.uint8)
        self.targets = images.argmax(1).to(torch.uint8)
        self.targets[list(void)] = 255
        self.loaded: list[int] = []
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.loaded.append(index)
        image = self.images[index]
        return (image.flip(2) if self.epoch % 2 else image), self.targets[index]


class Net(nn.Module):
    """The least that has dropout, batch normalisation and the model's interface."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
            nn.Conv2d(8, 3, 1),
        )  # fmt: skip

    def loss(
        self, x: Tensor, target: Tensor, *, ignore_index: int, aux_weight: float,
        weight: Tensor | None, label_smoothing: float,
    ) -> Tensor:  # fmt: skip
        return F.cross_entropy(
            self.layers(x), target.long(), weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )  # fmt: skip

    def predict(self, x: Tensor) -> Tensor:
        return self.layers(x).argmax(1)

    def update_confusion_matrix(
        self, matrix: Tensor, x: Tensor, target: Tensor, *, ignore_index: int
    ) -> Tensor:
        return fcnseg.confusion_matrix_(matrix, self.predict(x), target, ignore_index=ignore_index)


def settings(output: Path, **changes: Any) -> TrainConfig:
    output.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {
        "data_root": "none", "output": output, "epochs": 3, "batch_size": 4, "lr": 0.1,
        "workers": 0, "log_interval": 3, "checkpoint_interval": 0, "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**(defaults | changes))


def trainer(config: TrainConfig, train_set: Pictures | None = None) -> Trainer:
    made = Trainer(config, Net(), train_set or Pictures(18), Pictures(5))  # type: ignore[arg-type]
    if config.resume:
        made.load_last()
    return made


def records(output: Path, kind: str) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(output: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["lr"]) for r in records(output, "step")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken")
    trainer(settings(output)).run()
    return output


# -- schedule ----------------------------------------------------------------------------------


def test_schedule_warms_up_then_anneals() -> None:
    factors = [lr_factor(s, total_steps=150, warmup_steps=10) for s in range(151)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10] == 1.0
    assert factors[80] == pytest.approx(0.5)  # half way through the cosine
    assert factors[45] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[150] == pytest.approx(0.0, abs=1e-15)
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))


def test_schedule_equals_pytorch_cosine_annealing() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(20):
        expected = optimizer.param_groups[0]["lr"]
        assert lr_factor(step, total_steps=20, warmup_steps=0) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        cosine.step()


@pytest.mark.parametrize("step, total, warmup", [(0, 5, 5), (0, 5, -1), (6, 5, 1), (-1, 5, 1)])
def test_schedule_refuses_bad_arguments(step: int, total: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=r"step"):
        lr_factor(step, total_steps=total, warmup_steps=warmup)


def test_warm_up_shrinks_with_the_epochs(tmp_path: Path) -> None:
    assert settings(tmp_path, epochs=150).warmup == 10
    assert settings(tmp_path, epochs=30).warmup == 2
    assert settings(tmp_path, epochs=30, warmup_epochs=0).warmup == 0
    made = trainer(settings(tmp_path, epochs=75, batch_size=2))  # 9 steps an epoch
    assert (made.total_steps, made.warmup_steps) == (675, 45)


def test_every_step_has_its_learning_rate(unbroken: Path) -> None:
    # 18 images in batches of 4: 4 steps an epoch, 12 in all, of which round(0.2 * 4) warm up.
    expected = [0.1 * lr_factor(s, total_steps=12, warmup_steps=1) for s in range(12)]
    assert [lr for _, _, lr in losses(unbroken)] == expected


# -- configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("dataset", "voc"), ("backbone", "vgg16"), ("head", "aspp"), ("upsample", "nearest"),
        ("deconv_groups", 2), ("output_stride", 4), ("aux_loss", 1), ("aux_weight", -1.0),
        ("crop", (768,)), ("crop", (0, 5)), ("crop", (1.5, 5)), ("scale", (2.0, 0.5)),
        ("scale", 1.0), ("color_jitter", 1.0), ("epochs", 0), ("epochs", 2.5),
        ("warmup_epochs", 3), ("warmup_epochs", -1), ("batch_size", True), ("lr", 0.0),
        ("lr", math.nan), ("lr", "0.1"), ("momentum", 1.0), ("weight_decay", -1e-4),
        ("val_batch_size", 0), ("val_interval", -1), ("patience", -1), ("max_steps", 0),
        ("workers", -1), ("precision", "fp8"), ("channels_last", None), ("device", "tpu"),
        ("seed", -1), ("log_interval", 0), ("checkpoint_interval", -5), ("resume", "yes"),
        ("data_root", ""), ("output", None), ("pretrained", 3), ("loss", "dice"),
        ("class_weights", True), ("label_smoothing", 1.5), ("lr_schedule", "plateau"),
        ("lr_step_epochs", 0), ("accumulate", 0), ("accumulate", 3), ("head_lr", 0.0),
        ("nesterov", 1), ("clip_norm", -1.0), ("ema", 1.0), ("cuda_graphs", "auto"),
    ],
)  # fmt: skip
def test_config_names_the_bad_field(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected .*got"):
        settings(tmp_path, **{name: value}) if name != "output" else TrainConfig(
            data_root="x",
            output=value,  # type: ignore[arg-type]
        )


def test_every_field_is_checked(tmp_path: Path) -> None:
    for field in dataclasses.fields(TrainConfig):
        with pytest.raises(ConfigError, match=field.name):
            TrainConfig(**({"data_root": "x", "output": "y"} | {field.name: object()}))


def test_config_is_saved_as_json(tmp_path: Path) -> None:
    config = settings(tmp_path, crop=[64, 128])
    config.save(tmp_path / "config.json")
    assert TrainConfig(**json.loads((tmp_path / "config.json").read_text())) == config


def test_resume_refuses_another_run(tmp_path: Path, unbroken: Path) -> None:
    with pytest.raises(ConfigError, match=r"lr was 0\.1, is 0\.2; seed was 0, is 1"):
        trainer(settings(unbroken, resume=True, lr=0.2, seed=1))
    with pytest.raises(ConfigError, match="4 batches, has 5"):
        trainer(settings(unbroken, resume=True), Pictures(20))
    trainer(settings(unbroken, resume=True, workers=3, patience=7, max_steps=100))


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without CUDA")
def test_device_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        loop.train(settings(tmp_path, device="cuda"))
    with pytest.raises(ConfigError, match="fp16 needs a CUDA device"):
        loop.train(settings(tmp_path, precision="fp16"))


def test_output_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    config = settings(tmp_path)
    config.save(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="already holds a run"):
        loop.train(config)


def test_resume_with_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing to resume: no checkpoint at .*last\.pt"):
        loop.train(settings(tmp_path, resume=True))


def test_too_few_images_for_a_batch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 images, fewer than one batch of 4"):
        trainer(settings(tmp_path), Pictures(3))


# -- the loop ----------------------------------------------------------------------------------


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, start: int = 0) -> list[list[int]]:
        batches = loop.EpochBatches(10, 3, seed)
        batches.epoch, batches.start = epoch, start
        assert len(batches) == 3 - start
        return list(batches)

    assert order(0, 4) == order(0, 4)
    assert order(0, 4) != order(0, 5) != order(1, 5)
    assert order(0, 4, start=2) == order(0, 4)[2:]
    flat = [index for batch in order(0, 4) for index in batch]
    assert len(set(flat)) == 9 and all(len(batch) == 3 for batch in order(0, 4))


def test_a_run_learns_and_leaves_its_files(unbroken: Path) -> None:
    assert {"last.pt", "best.pt", "metrics.jsonl", "predictions.png", "curves.png"} <= set(
        os.listdir(unbroken)
    )
    assert list(unbroken.glob("events.out.tfevents.*"))
    epochs = records(unbroken, "epoch")
    assert [r["epoch"] for r in epochs] == [1, 2, 3]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    for record in epochs:
        in_epoch = [r["loss"] for r in records(unbroken, "step") if r["epoch"] == record["epoch"]]
        assert record["loss"] == pytest.approx(sum(in_epoch) / 4)
        assert record["images_per_second"] > 0 and record["peak_memory_mb"] > 1
    best = checkpoint.load(unbroken / "best.pt")
    assert best["scores"]["mean_iou"] == max(r["miou"] for r in epochs)
    assert best["classes"] == list(CLASSES)


def test_validation_equals_a_direct_computation(tmp_path: Path) -> None:
    made = trainer(settings(tmp_path))
    result = made.validate()
    x = fcnseg.data.normalise(made.val_set.images)
    prediction = made.model.eval().predict(x)
    target = made.val_set.targets
    for c in range(3):
        both, either = (prediction == c) & (target == c), (prediction == c) | (target == c)
        assert result.iou[c].item() == pytest.approx(both.sum().item() / either.sum().item())


def test_stopped_and_resumed_at_any_step_equals_unbroken(tmp_path: Path, unbroken: Path) -> None:
    expected = losses(unbroken)
    for stop in range(1, 12):
        output = tmp_path / str(stop)
        trainer(settings(output, max_steps=stop)).run()
        assert losses(output) == expected[:stop]
        torch.rand(5), np.random.rand(5)  # what the process did meanwhile does not matter
        resumed = trainer(settings(output, resume=True))
        resumed.train_set.loaded.clear()
        resumed.run()
        assert losses(output) == expected
        # The batches before the checkpoint were skipped, not loaded.
        assert len(resumed.train_set.loaded) == 4 * (12 - stop)
    ours, theirs = (checkpoint.load(run / "last.pt")["model"] for run in (output, unbroken))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_records_after_the_checkpoint_are_dropped(tmp_path: Path, unbroken: Path) -> None:
    trainer(settings(tmp_path, max_steps=6)).run()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 7, "loss": 1.0, "lr": 1.0}\n{"kind": "st')
    trainer(settings(tmp_path, resume=True)).run()
    assert losses(tmp_path) == losses(unbroken)


def test_finished_run_resumes_to_its_result(tmp_path: Path) -> None:
    first = trainer(settings(tmp_path, epochs=1)).run()
    content = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "curves.png").unlink()  # as if killed while it drew the pictures
    second = trainer(settings(tmp_path, epochs=1, resume=True)).run()
    assert first.scores is not None and second.scores is not None
    assert second.scores.mean_iou == first.scores.mean_iou
    assert (tmp_path / "curves.png").exists()
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_number_of_workers_changes_nothing(tmp_path: Path, unbroken: Path) -> None:
    trainer(settings(tmp_path, workers=2)).run()
    assert losses(tmp_path) == losses(unbroken)


def test_batch_without_a_valid_pixel_is_counted_and_skipped(tmp_path: Path) -> None:
    config = settings(tmp_path, epochs=1, log_interval=1)
    first, second, *_ = loop.EpochBatches(18, 4, config.seed)
    made = trainer(config, Pictures(18, void=tuple(second)))
    before: list[dict[str, Tensor]] = []
    step = made._train_step

    def watched(images: Tensor, target: Tensor) -> None:
        state = {k: v.clone() for k, v in made.model.state_dict().items()}
        step(images, target)
        if (target == 255).all():
            after = made.model.state_dict()
            assert all(torch.equal(state[key], after[key]) for key in state)
            before.append(state)

    made._train_step = watched  # type: ignore[method-assign]
    result = made.run()
    assert len(before) == 1
    assert result.skipped == 1 and result.steps == 4
    assert [step for step, _, _ in losses(tmp_path)] == [1, 3, 4]
    assert records(tmp_path, "epoch")[0]["skipped"] == 1
    assert math.isfinite(records(tmp_path, "epoch")[0]["loss"])
    assert checkpoint.load(tmp_path / "last.pt")["progress"]["skipped"] == 1
    assert len(first) == 4


RANK = """
import sys, torch
from fcnseg.training.loop import has_valid_pixel
rank, path = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
labels = [[(0, 255), (0, 1)], [(255, 255), (0, 255)], [(255, 255), (255, 255)]]
print([has_valid_pixel(torch.tensor(pair[rank]), 255) for pair in labels])
torch.distributed.destroy_process_group()
"""


def test_ranks_agree_on_what_to_skip(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        out, err = rank.communicate(timeout=60)
        assert out.strip() == "[True, False, False]", err


def test_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mious = [0.2, 0.5, 0.4, 0.5, 0.3, 0.9]  # 0.5 again is no improvement

    def run(output: Path, patience: int) -> loop.TrainResult:
        made = trainer(settings(output, epochs=6, patience=patience))
        validate, planned = made.validate, iter(mious)
        monkeypatch.setattr(
            made, "validate", lambda: dataclasses.replace(validate(), mean_iou=next(planned))
        )
        return made.run()

    result = run(tmp_path / "three", 3)
    assert (result.steps, result.best_epoch) == (20, 2)
    assert result.scores is not None and result.scores.mean_iou == 0.5
    assert run(tmp_path / "off", 0).best_epoch == 6


def test_validation_interval(tmp_path: Path) -> None:
    trainer(settings(tmp_path, epochs=5, val_interval=2)).run()
    assert ["miou" in r for r in records(tmp_path, "epoch")] == [False, True, False, True, True]


def test_interrupt_ends_the_step_and_saves(tmp_path: Path, unbroken: Path) -> None:
    made = trainer(settings(tmp_path))
    step = made._train_step

    def interrupted(images: Tensor, target: Tensor) -> None:
        if made.progress.step == 5:
            os.kill(os.getpid(), 2)
        step(images, target)

    made._train_step = interrupted  # type: ignore[method-assign]
    result = made.run()
    assert result.interrupted and result.steps == 6
    assert not trainer(settings(tmp_path, resume=True)).run().interrupted
    assert losses(tmp_path) == losses(unbroken)


def test_diverged_loss_ends_the_run(tmp_path: Path) -> None:
    made = trainer(settings(tmp_path))
    made.model.layers[0].weight.data.fill_(math.nan)
    with pytest.raises(DivergedError, match="nan at step 1"):
        made.run()


def test_bf16_autocast(tmp_path: Path, unbroken: Path) -> None:
    trainer(settings(tmp_path, precision="bf16", epochs=1)).run()
    ours, theirs = losses(tmp_path)[0][1], losses(unbroken)[0][1]
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.05)


# -- reports -----------------------------------------------------------------------------------


def test_colourise_paints_void_black() -> None:
    image = reporting.colourise(np.array([[0, 2, 255]]), Pictures.palette)
    assert image.tolist() == [[[128, 64, 128], [70, 130, 180], [0, 0, 0]]]


def test_load_report_counts_and_names() -> None:
    shapes = {"classifier.weight": ((21, 1), (19, 1))}
    text = reporting.load_report("w.pth", LoadReport(("a", "b"), (), shapes))
    assert "missing: 2 (a, b)" in text and "unexpected: 0" in text
    assert "mismatched: 1 (classifier.weight)" in text


# -- the example -------------------------------------------------------------------------------


def example(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def test_example_help_shows_groups_and_defaults() -> None:
    result = example("--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    for part in ("files:", "model:", "optimisation:", "(default: resnet101)", "(default: 0.01)"):
        assert part in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data-root", "/no/such/place"], "/no/such/place"),
        (["--data-root", ".", "--lr", "-1"], "lr: expected a number > 0, got -1.0"),
        (["--data-root", ".", "--output", "nothing-here", "--resume"], "nothing to resume"),
    ],
)
def test_example_says_in_one_line_what_is_wrong(arguments: list[str], message: str) -> None:
    result = example(*arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_example_trains_and_fine_tunes_its_own_weights(tmp_path: Path) -> None:
    small = [
        "--backbone", "resnet18", "--epochs", 1, "--batch-size", 4, "--max-steps", 2,
        "--crop", 32, 64, "--output-stride", 32, "--workers", 0,
    ]  # fmt: skip
    first = example(*small, "--output", tmp_path / "a")
    assert first.returncode == 0, first.stderr
    assert "mIoU" in first.stdout and "--data-root DIR" in first.stdout
    for name in ("config.json", "predictions.png", "curves.png"):
        assert (tmp_path / "a" / name).stat().st_size > 0
    assert json.loads((tmp_path / "a" / "config.json").read_text())["head"] == "plain"
    tuned = example(
        *small, "--data-root", tmp_path / "a" / "data", "--output", tmp_path / "b",
        "--pretrained", tmp_path / "a" / "best.pt", "--aux", "--precision", "bf16",
    )  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr
    assert "missing: 2 (aux_classifier.weight, aux_classifier.bias)" in tuned.stdout
    assert "unexpected: 0" in tuned.stdout
