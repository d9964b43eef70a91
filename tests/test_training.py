"""The training loop, its schedule and configuration, and the example's command line."""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

pytest.importorskip("albumentations")
pytest.importorskip("tensorboard")

import fcnseg
from fcnseg import _labels
from fcnseg._command_line import BROKEN_PIPE, OutputClosed
from fcnseg.losses import SegmentationLoss
from fcnseg.models import LoadReport
from fcnseg.training import (
    CheckpointError,
    ConfigError,
    DivergedError,
    TrainConfig,
    Trainer,
    World,
    checkpoint,
    loop,
    lr_factor,
    numerics,
    optimizer,
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
        ("class_weights", True), ("label_smoothing", 1.5), ("ohem_threshold", 0.0),
        ("ohem_min_kept", 1.5),
        ("focal_gamma", -1.0), ("skips", "4s"), ("split_file", 3), ("lr_schedule", "plateau"),
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
    assert TrainConfig(**TrainConfig.read(tmp_path / "config.json")) == config


def test_paths_of_a_config_are_those_of_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {name: f"{name}.x" for name in ("data_root", "pretrained", "split_file")}
    config = settings(tmp_path, **paths)
    config.save("config.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = TrainConfig(**TrainConfig.read(tmp_path / "config.json"))
    assert again == config
    for name, path in paths.items():
        assert getattr(again, name) == str(tmp_path / path)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot read"), ("{", "cannot read"), ("[1]", "holds no settings"),
        ('{"lr": 1, "learning_rate": 2}', "not known: learning_rate"),
    ],
)  # fmt: skip
def test_config_that_cannot_be_read(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"config: .*{message}"):
        TrainConfig.read(tmp_path / "config.json")


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
        assert 0 < record["waited_for_data"] < 1
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
    for stop in (1, 4, 6, 11):  # after the first step, an epoch, amid one, before the end
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


def test_split_file_is_known_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    (here / "split.json").write_text("one")
    monkeypatch.chdir(here)
    config = settings(tmp_path / "run", split_file="split.json", max_steps=1, val_interval=0)
    trainer(config).run()
    config.save(tmp_path / "config.json")
    monkeypatch.chdir(there)
    saved = TrainConfig.read(tmp_path / "config.json") | {"resume": True}
    assert trainer(TrainConfig(**saved)).progress.step == 1
    # Moved it is the same, changed it is not.
    (here / "split.json").rename(there / "moved.json")
    saved["split_file"] = "moved.json"
    assert trainer(TrainConfig(**saved)).progress.step == 1
    (there / "moved.json").write_text("another")
    for split_file in ("moved.json", None):
        with pytest.raises(ConfigError, match=r"resume: split_file .* is not the split"):
            trainer(TrainConfig(**(saved | {"split_file": split_file})))


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

    def watched(images: Tensor, target: Tensor, *, valid: bool) -> None:
        state = {k: v.clone() for k, v in made.model.state_dict().items()}
        step(images, target, valid=valid)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_step_and_saves(tmp_path: Path, unbroken: Path, number: int) -> None:
    made = trainer(settings(tmp_path))
    step = made._train_step

    def interrupted(images: Tensor, target: Tensor, *, valid: bool) -> None:
        if made.progress.step == 5:
            os.kill(os.getpid(), number)
        step(images, target, valid=valid)

    made._train_step = interrupted  # type: ignore[method-assign]
    result = made.run()
    assert result.interrupted and result.steps == 6 and result.signal == number
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    assert not trainer(settings(tmp_path, resume=True)).run().interrupted
    assert losses(tmp_path) == losses(unbroken)


def test_diverged_loss_ends_the_run(tmp_path: Path) -> None:
    made = trainer(settings(tmp_path))
    made.model.layers[0].weight.data.fill_(math.nan)
    with pytest.raises(DivergedError, match="nan at step 1") as caught:
        made.run()
    batch = ", ".join(map(str, loop.EpochBatches(18, 4, 0).batch(0, 0)))
    for part in (f"images {batch};", "all labels are valid", "no checkpoint was written yet"):
        assert part in str(caught.value)


def test_diverged_run_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    made = trainer(settings(tmp_path, checkpoint_interval=2, log_interval=100))
    step = made._train_step

    def spoilt(images: Tensor, target: Tensor, *, valid: bool) -> None:
        step(images, target, valid=valid)
        if made.progress.step == 5:  # after the checkpoint of step 4, with a finite loss
            made.model.layers[0].weight.data.fill_(math.nan)

    made._train_step = spoilt  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match=r"nan at step 6.*last checkpoint is of step 4"):
        made.run()
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["progress"]["step"] == 4
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    made = trainer(settings(tmp_path, epochs=1))
    made.run()
    made.model.layers[0].weight.data[0] = math.inf
    with pytest.raises(DivergedError, match="a weight is not finite after step 4"):
        made.save_last()
    assert all(v.isfinite().all() for v in checkpoint.load(tmp_path / "last.pt")["model"].values())


def test_bad_label_is_named_with_its_batch(tmp_path: Path) -> None:
    train_set = Pictures(18)
    batch = loop.EpochBatches(18, 4, 0).batch(0, 2)
    train_set.targets[batch[1], 3, 5] = 77
    with pytest.raises(IndexError, match=rf"step 3: .*batch: images .*{batch[1]}"):
        trainer(settings(tmp_path), train_set).run()


def fp16(output: Path, **changes: Any) -> Trainer:
    return trainer(settings(output, precision="fp16", epochs=1, log_interval=1, **changes))


def test_scaler_that_searches_its_scale_is_no_divergence(tmp_path: Path) -> None:
    made = fp16(tmp_path)
    made.scaler.load_state_dict(made.scaler.state_dict() | {"scale": 2.0**40})
    made.run()
    assert math.isfinite(records(tmp_path, "step")[-1]["loss"])
    assert 1 <= records(tmp_path, "epoch")[0]["loss_scale"] < 2.0**40
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["scaler"]["scale"] == made.scaler.get_scale()


def test_scale_that_collapses_ends_the_run(tmp_path: Path) -> None:
    made = fp16(tmp_path)
    made.scaler.load_state_dict(made.scaler.state_dict() | {"scale": 2.0})
    made.model.layers[0].weight.data.fill_(math.nan)
    with pytest.raises(DivergedError, match=r"step 2 and its scale fell to 0\.5"):
        made.run()


def as_on_cuda(model: Net, x: Tensor, target: Tensor) -> Tensor:
    """The loss, but a bad label is recorded and makes it NaN, where the CPU raises at once."""
    bad = _labels.bad_mask(target, 3, 255)
    _labels.add_to_record(_labels.device_record(target.device), target, bad)
    loss = SegmentationLoss(ignore_index=255)(model, x, target.masked_fill(bad, 255))
    return loss * torch.where(bad.any(), math.nan, 1.0)


def with_a_bad_label(output: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> Trainer:
    """A run with a bad label in its second step, as it were on CUDA."""
    monkeypatch.setattr(_labels, "_records", {})
    train_set = Pictures(18)
    train_set.targets[loop.EpochBatches(18, 4, 0).batch(0, 1)[2], 3, 5] = 77
    config = settings(output, precision=precision, log_interval=4)
    return Trainer(config, Net(), train_set, Pictures(5), criterion=as_on_cuda)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bad_label_on_cuda_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    made = with_a_bad_label(tmp_path, monkeypatch, precision)
    batch = ", ".join(map(str, loop.EpochBatches(18, 4, 0).batch(0, 1)))
    said = rf"^step 2: .*holds 1 value .* is 77 at position \(2, 3, 5\); batch: images {batch}; no"
    with pytest.raises(IndexError, match=said):
        made.run()
    assert [step for step, _, _ in losses(tmp_path)] == [1, 2, 3, 4]
    # The scaler has skipped that step, and only that.
    finite = [math.isfinite(loss) for _, loss, _ in losses(tmp_path)]
    assert finite == [True, False, precision == "fp16", precision == "fp16"]


def test_bad_label_of_another_process_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pair(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, "on cuda:1: bad"]

    made = trainer(settings(tmp_path))
    made.world = Pair()
    made.model.layers[0].weight.data.fill_(math.nan)
    with pytest.raises(IndexError, match=r"^step 1: on cuda:1: bad; batch: images "):
        made.run()


def test_bad_label_with_a_finite_loss_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_a_bad_label(tmp_path, monkeypatch, "fp32")
    made.train_step.loss.criterion = lambda *args: as_on_cuda(*args).nan_to_num()  # type: ignore[attr-defined]
    with pytest.raises(IndexError, match=r"^step 1, 2, 3, 4: .*77 at position"):
        made.run()


# -- the practice of the field -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["poly", "step"])
def test_other_schedules(kind: str) -> None:
    options: dict[str, Any] = {"kind": kind, "total_steps": 100, "drop_every": 30}
    factors = [lr_factor(s, warmup_steps=10, **options) for s in range(101)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    if kind == "poly":
        assert factors[55] == pytest.approx(0.5**0.9) and factors[100] == 0
    else:
        assert [factors[s] for s in (29, 30, 59, 60, 90)] == pytest.approx(
            [1, 0.1, 0.1, 0.01, 1e-3]
        )


def test_schedule_refuses_bad_kinds() -> None:
    with pytest.raises(ValueError, match="kind: expected one of cosine, poly, step, got 'exp'"):
        lr_factor(0, total_steps=2, warmup_steps=0, kind="exp")
    with pytest.raises(ValueError, match="drop_every: expected"):
        lr_factor(0, total_steps=2, warmup_steps=0, kind="step")


def test_parameter_groups(tmp_path: Path) -> None:
    model = fcnseg.models.fcn_resnet18(3, output_stride=32, upsample="deconv", head="plain")
    config = settings(tmp_path, lr=0.1, weight_decay=0.01, head_lr=10.0)
    groups = {
        (group["lr"], group["weight_decay"]): {id(p) for p in group["params"]}
        for group in optimizer.parameter_groups(model, config)
    }
    seen = {}
    for name, parameter in model.named_parameters():
        rate = 0.1 if name.startswith("backbone.") else 0.1 * 10
        decay = 0.01 if name.endswith("weight") and parameter.dim() > 1 else 0.0
        assert id(parameter) in groups[rate, decay], name
        seen[name] = (rate, decay)
    assert sum(map(len, groups.values())) == len(seen)
    assert seen["backbone.bn1.weight"] == (0.1, 0.0) and seen["classifier.bias"] == (1.0, 0.0)
    assert seen["deconv.weight"] == (1.0, 0.01)
    plain = settings(tmp_path, lr=0.1, weight_decay=0.01, decay_all=True)
    assert len(optimizer.parameter_groups(model, plain)) == 1


def test_averaged_weights_equal_pytorch(tmp_path: Path) -> None:
    made = trainer(settings(tmp_path, ema=0.9, epochs=1))
    expected = AveragedModel(made.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    expected.update_parameters(made.model)
    step = made._train_step

    def watched(images: Tensor, target: Tensor, *, valid: bool) -> None:
        step(images, target, valid=valid)
        expected.update_parameters(made.model)

    made._train_step = watched  # type: ignore[method-assign]
    made.run()
    best = checkpoint.load(tmp_path / "best.pt")["model"]
    for name, value in expected.module.named_parameters():
        torch.testing.assert_close(best[name], value.data)
    for name in ("layers.1.running_mean", "layers.1.running_var"):
        torch.testing.assert_close(best[name], expected.module.get_buffer(name))
    assert best["layers.1.num_batches_tracked"] == 4
    last = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(last["average"]["layers.0.weight"], best["layers.0.weight"])
    assert not torch.equal(last["model"]["layers.0.weight"], best["layers.0.weight"])


def test_frozen_batch_norm_stays(tmp_path: Path) -> None:
    made = trainer(settings(tmp_path, freeze_bn=True, epochs=1))
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    made.run()
    after = checkpoint.load(tmp_path / "last.pt")["model"]
    changed = {key.rsplit(".", 1)[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"layers.0", "layers.4"}


def test_everything_at_once_resumes_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "ema": 0.9, "clip_norm": 0.1, "nesterov": True, "lr_schedule": "poly", "accumulate": 2,
        "label_smoothing": 0.1, "cuda_graphs": True, "precision": "bf16", "deterministic": True,
        "epochs": 2,
    }  # fmt: skip
    trainer(settings(tmp_path / "whole", **options)).run()
    trainer(settings(tmp_path / "halves", max_steps=3, **options)).run()
    trainer(settings(tmp_path / "halves", resume=True, **options)).run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    whole, halves = (checkpoint.load(tmp_path / x / "last.pt") for x in ("whole", "halves"))
    for part in ("model", "average"):
        assert all(torch.equal(whole[part][key], halves[part][key]) for key in whole[part])
    assert not torch.are_deterministic_algorithms_enabled()  # the run leaves no trace


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    # Dropout draws other numbers for parts, and batch normalisation has other statistics.
    results = []
    for parts in (1, 2):
        made = trainer(
            settings(tmp_path / str(parts), accumulate=parts, freeze_bn=True, epochs=1),
            Pictures(18, void=(1, 5, 7, 11, 13)),
        )
        made.model.layers[3].p = 0.0
        made.run()
        results.append([loss for _, loss, _ in losses(tmp_path / str(parts))])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_run_without_validation(tmp_path: Path) -> None:
    result = trainer(settings(tmp_path, val_interval=0, max_steps=6)).run()
    assert result.scores is None and result.best_epoch == 0 and result.steps == 6
    assert not (tmp_path / "best.pt").exists() and (tmp_path / "predictions.png").exists()
    assert not any("miou" in record for record in records(tmp_path, "epoch"))


def test_scores_of_training_batches(tmp_path: Path) -> None:
    model = fcnseg.models.fcn_resnet18(3, output_stride=32, head="plain", aux_loss=True)
    config = settings(tmp_path, train_scores=True, epochs=1, max_steps=1)
    made = Trainer(config, model, Pictures(8), Pictures(2))  # type: ignore[arg-type]
    runs = 0

    def counted(*_: Any) -> None:
        nonlocal runs
        runs += 1

    model.backbone.register_forward_hook(counted)
    with pytest.raises(ConfigError, match="train_scores: the model has no low-resolution"):
        trainer(settings(tmp_path / "b", train_scores=True))
    made.model.train()
    assert made.matrix is not None
    x, target = made.train_set.images[:4], made.train_set.targets[:4]
    loss = made.train_step(x, target)
    assert runs == 1 and made.matrix.sum().item() == target.numel()
    assert "low_resolution" not in vars(model)
    assert loss.isfinite()
    made.matrix.zero_()
    made.train_step.number.zero_()
    made.run()
    assert 0 < records(tmp_path, "epoch")[0]["train_miou"] < 1


@pytest.mark.slow
def test_compiled_trunk(tmp_path: Path) -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = fcnseg.models.fcn_resnet18(3, output_stride=32, head="plain")
        config = settings(tmp_path / str(compiled), compile=compiled, lr=0.001, max_steps=2)
        Trainer(config, model, Pictures(8), Pictures(2)).run()  # type: ignore[arg-type]
        results.append([loss for _, loss, _ in losses(tmp_path / str(compiled))])
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert (
        checkpoint.load(tmp_path / "True" / "last.pt")["model"].keys() == model.state_dict().keys()
    )


@pytest.mark.parametrize("before", ["highest", "high", "medium", "global"])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_tf32_is_set_for_the_run_and_as_it_was_afterwards(
    tmp_path: Path, precision: str, before: str
) -> None:
    backends: Any = torch.backends

    def old() -> tuple[Any, ...]:  # raises where old and new switches were mixed
        products = torch.get_float32_matmul_precision()
        return products, backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32

    def new() -> tuple[str, ...]:
        return backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision

    backends.cudnn.allow_tf32 = True  # the default, whatever ran before
    try:
        if before == "global":
            backends.cuda.matmul.fp32_precision = "none"  # inherits it
            backends.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(before)
        with numerics.numerics(settings(tmp_path, precision=precision), torch.device("cuda")):
            tf32 = precision == "tf32"
            assert old() == ("high" if tf32 else "highest", tf32, tf32)
            assert new() == (("tf32" if tf32 else "ieee"),) * 2 and backends.cudnn.benchmark
        assert old() == ("high" if before == "global" else before, before != "highest", True)
        assert not backends.cudnn.benchmark
    finally:
        backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = True


def test_an_epoch_that_waits_for_its_data_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(Pictures):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            time.sleep(0.1)
            return super().__getitem__(index)

    made = trainer(settings(tmp_path, epochs=1, max_steps=2), Slow(18))
    made.run()
    (record,) = records(tmp_path, "epoch")
    assert record["waited_for_data"] > 0.5
    share = f"  {record['waited_for_data']:.0%} of the time waiting for data"
    assert share in capsys.readouterr().out


def test_cudnn_searches_only_for_shapes_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(*heights: int) -> Any:
        for height in heights:
            images = torch.zeros(1, 3, height, 4)
            yield (images,), (images,)

    cudnn = torch.backends.cudnn
    for allowed in (True, False):
        monkeypatch.setattr(cudnn, "benchmark", allowed)
        batches = numerics.search_where_shapes_repeat(given(2, 2, 3, 2, 2))
        assert [cudnn.benchmark for _ in batches] == [x and allowed for x in (0, 1, 0, 0, 1)]
        assert cudnn.benchmark is allowed
    monkeypatch.setattr(cudnn, "benchmark", True)
    batches = numerics.search_where_shapes_repeat(given(2, 3, 4))
    next(batches), batches.close()  # as where a signal ends the validation
    assert cudnn.benchmark is True


def test_validation_does_not_search_for_every_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = []
    update = Net.update_confusion_matrix

    def watched(self: Net, *given: Any, **options: Any) -> Tensor:
        searches.append(torch.backends.cudnn.benchmark)
        return update(self, *given, **options)

    monkeypatch.setattr(Net, "update_confusion_matrix", watched)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    made = trainer(settings(tmp_path, val_batch_size=1))
    made.validate()
    assert searches == [False, True, True, True, True]  # all of one size


def test_compile_needs_a_trunk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compile: the model has no backbone"):
        trainer(settings(tmp_path, compile=True))


def test_class_weights_normalise_like_cross_entropy() -> None:
    weight = torch.tensor([0.5, 2.0, 3.0])
    criterion = SegmentationLoss(weight, ignore_index=255)
    target = torch.tensor([[[0, 1, 2, 2, 255, 77]]], dtype=torch.uint8)  # 77: the loss reports it
    assert criterion.count is not None and criterion.count(target).item() >= 0.5 + 2 + 3 + 3
    target[..., -1] = 255
    assert criterion.count(target).item() == 0.5 + 2 + 3 + 3
    unweighted = SegmentationLoss(ignore_index=255).count
    assert unweighted is not None and unweighted(target).item() == 4


@pytest.mark.parametrize("loss", ["ohem", "focal"])
def test_other_losses_train(tmp_path: Path, loss: str) -> None:
    torch.manual_seed(0)
    model = fcnseg.models.fcn_resnet18(3, output_stride=32, head="plain", skips="16s")
    config = settings(tmp_path, loss=loss, epochs=1, max_steps=1, accumulate=2, ohem_min_kept=40)
    made = Trainer(config, model, Pictures(8), Pictures(2))  # type: ignore[arg-type]
    assert (made.train_step.count is None) == (loss == "ohem")
    x, target = made._images(made.train_set.images[:4]), made.train_set.targets[:4]
    options = {"ohem_threshold": 0.7, "ohem_min_kept": 40} if loss == "ohem" else {"focal_gamma": 2}
    criterion = SegmentationLoss(ignore_index=255, **options)  # type: ignore[arg-type]
    model.train()
    with torch.no_grad():
        halves = [criterion(model, x[i : i + 2], target[i : i + 2]).item() for i in (0, 2)]
    assert made.train_step(made.train_set.images[:4], target).item() == pytest.approx(
        sum(halves) / 2, rel=1e-5
    )


def test_class_weights_of_the_training_set(tmp_path: Path) -> None:
    train_set = Pictures(18)
    with pytest.raises(ConfigError, match="class_weights: the data set has no load_label"):
        trainer(settings(tmp_path, class_weights="enet"), train_set)
    train_set.load_label = lambda index: train_set.targets[index].numpy()  # type: ignore[attr-defined]
    made = trainer(settings(tmp_path, class_weights="enet"), train_set)
    shares = (
        np.bincount(train_set.targets.flatten().numpy(), minlength=3) / train_set.targets.numel()
    )
    expected = torch.tensor(1 / np.log(1.02 + shares), dtype=torch.float32)
    criterion: Any = made.train_step.loss.criterion  # type: ignore[attr-defined]
    torch.testing.assert_close(criterion.weight, expected)


def test_criterion_of_ones_own(tmp_path: Path) -> None:
    made = Trainer(
        settings(tmp_path, epochs=1), Net(), Pictures(18), Pictures(5),  # type: ignore[arg-type]
        criterion=lambda model, x, target: 2 * SegmentationLoss(ignore_index=255)(model, x, target),
    )  # fmt: skip
    made.run()
    other = trainer(settings(tmp_path / "other", epochs=1))
    other.run()
    assert losses(tmp_path)[0][1] == pytest.approx(2 * losses(tmp_path / "other")[0][1], rel=1e-6)


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


def test_no_epoch_is_lost_where_nobody_reads_the_output(tmp_path: Path, unbroken: Path) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OutputClosed(BROKEN_PIPE)

    with contextlib.redirect_stdout(Closed()), pytest.raises(OutputClosed):
        trainer(settings(tmp_path)).run()
    resumed = trainer(settings(tmp_path, resume=True))
    assert resumed.progress.epoch == 1
    resumed.run()
    assert losses(tmp_path) == losses(unbroken)


# -- the example -------------------------------------------------------------------------------


def example(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_example_has_a_flag_for_every_setting() -> None:
    specification = importlib.util.spec_from_file_location("example", EXAMPLE)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    flags = {action.dest for action in module.make_parser()._actions} - {"help", "config"}
    assert flags == {field.name for field in dataclasses.fields(TrainConfig)}


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


@pytest.mark.long(13)
def test_example_trains_and_fine_tunes_its_own_weights(tmp_path: Path) -> None:
    small = [
        "--backbone", "resnet18", "--epochs", 1, "--batch-size", 4, "--max-steps", 2,
        "--crop", 32, 64, "--output-stride", 32, "--workers", 0,
    ]  # fmt: skip
    first = example(*small, "--output", tmp_path / "a")
    assert first.returncode == 0, first.stderr
    assert "mIoU" in first.stdout and "--data-root DIR" in first.stdout
    assert "one to three minutes on two CPU cores" in first.stdout
    assert f"look at {tmp_path / 'a' / 'predictions.png'}" in first.stdout
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
    assert "three minutes" not in tuned.stdout and "try next" not in tuned.stdout
    again = example("--config", tmp_path / "b" / "config.json", "--output", tmp_path / "c")
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "c") == losses(tmp_path / "b")
