"""The training loop: one process, one device, and a run that a kill can only pause."""

import contextlib
import dataclasses
import json
import math
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

import fcnseg
from fcnseg import data, models
from fcnseg.data import EvalTransform, SegmentationDataset, TrainTransform, worker_init_fn
from fcnseg.metrics import ConfusionMatrix, Scores, format_scores, scores
from fcnseg.training import checkpoint, reporting
from fcnseg.training.config import ConfigError, TrainConfig
from fcnseg.training.schedule import lr_factor

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAMPLES = 4  # rows of the picture of predictions


@dataclass
class Progress:
    """Where a run stands; everything that a checkpoint holds besides tensors."""

    step: int = 0  # batches consumed in all, skipped ones included; drives the schedule
    epoch: int = 0
    batch: int = 0  # batches consumed in this epoch
    loss_sum: float = 0.0  # over this epoch's steps
    loss_count: int = 0
    skipped: int = 0  # batches without a valid pixel, in all
    skipped_in_epoch: int = 0
    best_miou: float = math.nan
    best_epoch: int = 0  # 1-based; 0 before the first validation
    stale: int = 0  # validations since the best one
    validated: int = -1  # step of the last validation
    steps_per_epoch: int = 0
    metrics_bytes: int = 0  # length of the metrics file; later records are dropped on resume


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        scores: of the best validation, on every class; None if the run was interrupted before one.
        best_epoch: 1-based epoch of that validation.
        steps: batches consumed, skipped ones included.
        skipped: batches without a valid pixel.
        interrupted: stopped by Ctrl-C, to be resumed.
        output: directory with the checkpoints, metrics and pictures.
    """

    scores: Scores | None
    best_epoch: int
    steps: int
    skipped: int
    interrupted: bool
    output: Path


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


class EpochBatches(Sampler[list[int]]):
    """Batches of indices in an order that is a pure function of (seed, epoch).

    A resumed epoch starts at batch ``start``; the batches before it are never loaded. The last,
    short batch is dropped: one image is no sample for batch normalisation.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return self.length // self.batch_size - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length).tolist()
        end = self.length // self.batch_size * self.batch_size
        for first in range(self.start * self.batch_size, end, self.batch_size):
            yield order[first : first + self.batch_size]


class MetricsFile:
    """Appends JSON lines, and forgets on resume what came after the checkpoint."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        self.file: TextIO = open(path, "a")  # noqa: SIM115  (closed by close)
        os.truncate(self.file.fileno(), min(keep_bytes, path.stat().st_size))

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")

    def sync(self) -> int:
        """Brings all records to the disk; returns the file's length in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        self.file.close()


def has_valid_pixel(target: Tensor, ignore_index: int) -> bool:
    """Whether a batch can be trained on, with the same answer on every rank.

    Where ``torch.distributed`` runs, one rank without a valid pixel makes all of them skip, so
    that none waits for another's gradients.

    Args:
        target: integer labels on the CPU, any shape.
        ignore_index: label of a pixel that does not count.
    """
    valid = bool((target != ignore_index).any())
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        flag = torch.tensor(int(valid), device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
        valid = bool(flag.item())
    return valid


class _Interrupt:
    """Turns the first Ctrl-C into a flag, so that the step in hand ends whole."""

    def __init__(self) -> None:
        self.set = False

    def _handle(self, signum: int, frame: object) -> None:
        if self.set:
            raise KeyboardInterrupt
        self.set = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        previous = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


@dataclass
class Trainer:
    """Trains ``model`` on ``train_set``, validates it on ``val_set``, keeps the run on disk.

    :func:`train` makes the parts from a configuration; use this class to bring your own. The model
    needs ``loss(x, target, *, ignore_index, aux_weight)`` and
    ``update_confusion_matrix(matrix, x, target, *, ignore_index)``.
    """

    config: TrainConfig
    model: models.FCN
    train_set: SegmentationDataset
    val_set: SegmentationDataset
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        config, self.output = self.config, Path(self.config.output)
        if len(self.train_set) < config.batch_size:
            raise ConfigError(
                f"batch_size: the training set has {len(self.train_set)} images, fewer than one "
                f"batch of {config.batch_size}"
            )
        if len(self.val_set) == 0:
            raise ConfigError(f"data_root: the validation set in {config.data_root} is empty")
        self.progress = Progress(steps_per_epoch=len(self.train_set) // config.batch_size)
        self.total_steps = config.epochs * self.progress.steps_per_epoch
        warmup = round(config.warmup * self.progress.steps_per_epoch)
        self.warmup_steps = min(warmup, self.total_steps - 1)
        self.memory_format = (
            torch.channels_last if config.channels_last else torch.contiguous_format
        )
        self.model.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler("cuda", enabled=config.precision == "fp16")
        self.batches = EpochBatches(len(self.train_set), config.batch_size, config.seed)
        self.pending: list[tuple[int, float, Tensor]] = []  # step, lr, loss still on the device
        self.interrupt = _Interrupt()

    # -- data ----------------------------------------------------------------------------------

    def _loader(self, dataset: SegmentationDataset, **batching: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            num_workers=self.config.workers,
            worker_init_fn=worker_init_fn,
            pin_memory=self.device.type == "cuda",
            # Its own generator: making an iterator draws from the global one otherwise, and a
            # resumed epoch makes one more than an unbroken epoch.
            generator=torch.Generator().manual_seed(self.config.seed),
            **batching,
        )

    def _images(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        return data.normalise(images, memory_format=self.memory_format)

    def _autocast(self) -> torch.autocast:
        dtype = _AUTOCAST[self.config.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    # -- state ---------------------------------------------------------------------------------

    def save_last(self) -> None:
        """Writes ``last.pt``, from which :meth:`load_last` continues."""
        self.progress.metrics_bytes = self.metrics.sync()
        state = {
            "config": self.config.to_dict(),
            "progress": dict(vars(self.progress)),
            "rng": checkpoint.rng_state(),
            "scaler": self.scaler.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "model": self.model.state_dict(),
        }
        checkpoint.save(self.output / "last.pt", state)

    def load_last(self) -> None:
        """Puts everything back to what it was when ``last.pt`` was written.

        Raises:
            CheckpointError: the file is missing, unreadable or lacks a part.
            ConfigError: it belongs to a run with other settings or other data.
        """
        path = self.output / "last.pt"
        state = checkpoint.load(path)
        try:
            self.config.check_resumes(state["config"])
            progress = Progress(**state["progress"])
            if progress.steps_per_epoch != self.progress.steps_per_epoch:
                raise ConfigError(
                    f"resume: an epoch had {progress.steps_per_epoch} batches, has "
                    f"{self.progress.steps_per_epoch}: is {self.config.data_root} the same data?"
                )
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            checkpoint.set_rng_state(state["rng"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise checkpoint.CheckpointError(f"{path} is not of such a run: {error}") from error
        self.progress = progress

    def _save_best(self, result: Scores) -> None:
        state = {
            "config": self.config.to_dict(),
            "classes": list(self.train_set.classes),
            "epoch": self.progress.best_epoch,
            "scores": dataclasses.asdict(result),
            "model": self.model.state_dict(),
        }
        checkpoint.save(self.output / "best.pt", state)

    # -- the run -------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Trains from where the run stands to its end, or to Ctrl-C."""
        # Here, so that nothing but a training run pays for its import.
        from torch.utils.tensorboard import SummaryWriter

        progress = self.progress
        self.metrics = MetricsFile(self.output / "metrics.jsonl", progress.metrics_bytes)
        self.board = SummaryWriter(str(self.output), purge_step=progress.step)
        try:
            with self.interrupt.watching():
                while not self._done():
                    self._train_epoch()
                    if self.interrupt.set:
                        self.save_last()
                        break
        finally:
            self.metrics.close()
            self.board.close()
        if self.interrupt.set:
            return self._result(None, interrupted=True)
        return self._result(self._report(), interrupted=False)

    def _result(self, best: Scores | None, *, interrupted: bool) -> TrainResult:
        progress = self.progress
        return TrainResult(
            best, progress.best_epoch, progress.step, progress.skipped, interrupted, self.output
        )

    def _out_of_steps(self) -> bool:
        limit = self.config.max_steps
        return limit is not None and self.progress.step >= limit

    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.progress.stale

    def _done(self) -> bool:
        """Whether the run has ended; a run always ends on a validation."""
        progress = self.progress
        ended = progress.epoch >= self.config.epochs or self._out_of_patience()
        return ended or (self._out_of_steps() and progress.validated == progress.step)

    def _train_epoch(self) -> None:
        """Trains the rest of this epoch, then validates; stops early on Ctrl-C or max_steps."""
        config, progress = self.config, self.progress
        self.model.train()
        self.train_set.set_epoch(progress.epoch)
        self.batches.epoch, self.batches.start = progress.epoch, progress.batch
        started, first = time.perf_counter(), progress.batch
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        bar = tqdm(
            total=progress.steps_per_epoch,
            initial=progress.batch,
            desc=f"epoch {progress.epoch + 1}/{config.epochs}",
            unit="batch",
            leave=False,
            disable=not sys.stderr.isatty(),
        )
        with bar:
            if not self._out_of_steps():
                for images, target in self._loader(self.train_set, batch_sampler=self.batches):
                    self._train_step(images, target)
                    bar.update()
                    if progress.step % config.log_interval == 0:
                        bar.set_postfix(loss=f"{self._flush():.4f}")
                    if self.interrupt.set or self._out_of_steps():
                        break
                    if (
                        config.checkpoint_interval
                        and progress.step % config.checkpoint_interval == 0
                        and progress.batch < progress.steps_per_epoch
                    ):
                        self._flush()
                        self.save_last()
        self._flush()
        seconds = time.perf_counter() - started
        if not self.interrupt.set:
            images_per_second = (progress.batch - first) * config.batch_size / seconds
            self._end_epoch(images_per_second)

    def _train_step(self, images: Tensor, target: Tensor) -> None:
        config, progress = self.config, self.progress
        # Before the forward pass, so that batch normalisation does not see the images either.
        if has_valid_pixel(target, self.train_set.ignore_index):
            lr = config.lr * lr_factor(
                progress.step, total_steps=self.total_steps, warmup_steps=self.warmup_steps
            )
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            images = self._images(images)
            target = target.to(self.device, non_blocking=True)
            self.optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                loss = self.model.loss(
                    images,
                    target,
                    ignore_index=self.train_set.ignore_index,
                    aux_weight=config.aux_weight,
                )
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.pending.append((progress.step + 1, lr, loss.detach()))
        else:
            progress.skipped += 1
            progress.skipped_in_epoch += 1
        progress.step += 1
        progress.batch += 1

    def _flush(self) -> float:
        """Records the losses since the last call, the one place that waits for the device."""
        progress = self.progress
        if self.pending:
            losses = torch.stack([loss for _, _, loss in self.pending]).tolist()
            for (step, lr, _), loss in zip(self.pending, losses, strict=True):
                self.metrics.write(
                    {"kind": "step", "step": step, "epoch": progress.epoch + 1, "loss": loss}
                    | {"lr": lr}
                )
                if math.isfinite(loss):
                    progress.loss_sum += loss
                    progress.loss_count += 1
                else:
                    self._explain(loss, step)
            self.board.add_scalar("train/loss", losses[-1], self.pending[-1][0])
            self.board.add_scalar("train/lr", self.pending[-1][1], self.pending[-1][0])
            self.pending.clear()
            self.metrics.file.flush()
        return progress.loss_sum / progress.loss_count if progress.loss_count else math.nan

    def _explain(self, loss: float, step: int) -> None:
        """Raises for a loss that is not finite, unless a GradScaler deals with it."""
        if self.device.type == "cuda":
            fcnseg.check_labels()  # a label outside the classes makes the loss NaN
        if not self.scaler.is_enabled():
            self.metrics.sync()
            raise DivergedError(
                f"the loss is {loss} at step {step}: try a lower lr or a longer warm-up"
            )

    def _end_epoch(self, images_per_second: float) -> None:
        config, progress = self.config, self.progress
        loss = self._flush()
        last = progress.epoch + 1 == config.epochs or self._out_of_steps()
        record: dict[str, Any] = {
            "kind": "epoch",
            "step": progress.step,
            "epoch": progress.epoch + 1,
            "loss": loss,
            "skipped": progress.skipped_in_epoch,
            "images_per_second": images_per_second,
            "peak_memory_mb": self._peak_memory(),
        }
        line = f"epoch {progress.epoch + 1:3d}/{config.epochs}  loss {loss:.4f}"
        if last or (progress.epoch + 1) % config.val_interval == 0:
            result = self.validate()
            if self.interrupt.set:
                return  # the run saves a checkpoint from which this epoch is validated again
            better = progress.best_epoch == 0 or not result.mean_iou <= progress.best_miou
            progress.stale = 0 if better else progress.stale + 1
            progress.validated = progress.step
            if better:
                progress.best_miou, progress.best_epoch = result.mean_iou, progress.epoch + 1
                # First: killed in between, the resumed run validates again and writes it again.
                self._save_best(result)
            record |= {"miou": result.mean_iou, "pixel_accuracy": result.pixel_accuracy}
            self.board.add_scalar("val/miou", result.mean_iou, progress.step)
            line += f"  mIoU {result.mean_iou:.4f}{'*' if better else ' '}"
        self.metrics.write(record)
        self.board.add_scalar("train/images_per_second", images_per_second, progress.step)
        line += f"  {images_per_second:.1f} images/s  peak {record['peak_memory_mb']:.0f} MB"
        if progress.skipped_in_epoch:
            line += f"  {progress.skipped_in_epoch} batches without a valid pixel skipped"
        print(line, flush=True)
        if progress.batch == progress.steps_per_epoch:
            progress.epoch, progress.batch = progress.epoch + 1, 0
            progress.loss_sum, progress.loss_count, progress.skipped_in_epoch = 0.0, 0, 0
        self.save_last()

    def validate(self) -> Scores:
        """Scores of the model on the validation set, at the labels' own resolution."""
        ignore_index = self.val_set.ignore_index
        matrix = ConfusionMatrix(
            self.val_set.num_classes, ignore_index=ignore_index, device=self.device
        )
        self.model.eval()
        with torch.no_grad(), self._autocast():
            for images, target in self._loader(self.val_set, batch_size=self.config.val_batch_size):
                self.model.update_confusion_matrix(
                    matrix.matrix,
                    self._images(images),
                    target.to(self.device, non_blocking=True),
                    ignore_index=ignore_index,
                )
                if self.interrupt.set:
                    break
        if self.device.type == "cuda":
            fcnseg.check_labels()
        return scores(matrix.compute())

    def _peak_memory(self) -> float:
        """MB: of the device's allocator in this epoch, or of this process so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

    def _report(self) -> Scores:
        """Prints the best scores and draws the pictures, with the best weights."""
        best = checkpoint.load(self.output / "best.pt")
        self.model.load_state_dict(best["model"])
        self.model.eval()
        samples = []
        count = len(self.val_set)
        for index in np.linspace(0, count - 1, min(_SAMPLES, count)).round().astype(int).tolist():
            image, truth = self.val_set[index]
            with torch.no_grad(), self._autocast():
                prediction = self.model.predict(self._images(image[None]))
            samples.append(
                (image.permute(1, 2, 0).numpy(), truth.numpy(), prediction[0].cpu().numpy())
            )
        reporting.save_predictions(
            self.output / "predictions.png", samples, self.val_set.classes, self.val_set.palette
        )
        reporting.save_curves(self.output / "curves.png", self.output / "metrics.jsonl")
        result = Scores(**best["scores"])
        print(format_scores(result, self.val_set.classes))
        print(f"best of epoch {best['epoch']}: mIoU {result.mean_iou:.4f}")
        return result


def build_model(config: TrainConfig, num_classes: int) -> models.FCN:
    """The network that ``config`` describes, with initial (not pretrained) weights."""
    make = getattr(models, f"fcn_{config.backbone}")
    return make(
        num_classes,
        aux_loss=config.aux_loss,
        output_stride=config.output_stride,
        head=config.head,
        upsample=config.upsample,
        deconv_groups=config.deconv_groups,
    )


def _choose_device(config: TrainConfig) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name} was asked for, but PyTorch sees no CUDA device")
    if name == "cpu" and config.precision == "fp16":
        raise ConfigError("precision: fp16 needs a CUDA device; on the CPU use bf16 or fp32")
    return torch.device(name)


def _check_output(config: TrainConfig) -> bool:
    """Whether there is a checkpoint to continue from; raises where ``resume`` does not fit."""
    output = Path(config.output)
    last, started = output / "last.pt", (output / "config.json").exists()
    if config.resume and not (last.exists() or started):
        raise checkpoint.CheckpointError(f"nothing to resume: no checkpoint at {last}")
    if not config.resume and (last.exists() or started):
        raise ConfigError(f"output: {output} already holds a run: resume it, or choose another")
    return last.exists()


def train(config: TrainConfig) -> TrainResult:
    """Trains as ``config`` says, from the start or, with ``resume``, from the last checkpoint.

    Writes to ``config.output``: ``config.json``, ``metrics.jsonl`` (one record per step and per
    epoch), TensorBoard events, ``last.pt``, ``best.pt``, and at the end ``predictions.png`` and
    ``curves.png``. Killed at any moment and resumed, a run on the CPU has bit for bit the losses
    of an unbroken one.

    Returns:
        The scores of the best validation and how the run ended.

    Raises:
        ConfigError: the settings do not fit each other, the data, the machine or the output.
        CheckpointError: ``resume`` without a readable checkpoint.
        DivergedError: the loss became NaN or infinite.
    """
    has_checkpoint = _check_output(config)
    device = _choose_device(config)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    train_set = data.open_dataset(
        config.dataset,
        config.data_root,
        "train",
        TrainTransform(
            config.crop,
            scale=config.scale,
            seed=config.seed,
            color_jitter=config.color_jitter,
        ),
    )
    val_set = data.open_dataset(config.dataset, config.data_root, "val", EvalTransform())
    model = build_model(config, train_set.num_classes)
    if config.pretrained is not None and not has_checkpoint:
        report = models.load_pretrained(model, config.pretrained)
        print(reporting.load_report(config.pretrained, report))
    trainer = Trainer(config, model, train_set, val_set, device)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint.remove_temporaries(output)
    if has_checkpoint:
        trainer.load_last()
        at = trainer.progress
        print(f"resuming at step {at.step} (epoch {at.epoch + 1}, batch {at.batch})")
    config.save(output / "config.json")
    return trainer.run()
