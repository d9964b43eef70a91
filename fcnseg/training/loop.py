"""The training loop: one device per process, and a run that a kill can only pause."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

import fcnseg
from fcnseg import data, models
from fcnseg.data import (
    DistributedEvalSampler,
    EvalTransform,
    SegmentationDataset,
    TrainTransform,
    worker_init_fn,
)
from fcnseg.graphs import GraphedTrainStep, Prefetcher, TrainStep, why_not
from fcnseg.metrics import ConfusionMatrix, Scores, format_scores, scores
from fcnseg.training import checkpoint, distributed, optimizer, reporting
from fcnseg.training.config import ConfigError, TrainConfig
from fcnseg.training.criterion import Criterion, Objective, make_criterion
from fcnseg.training.distributed import World
from fcnseg.training.numerics import Batch, numerics, search_where_shapes_repeat
from fcnseg.training.schedule import lr_factor

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_GRACE = 30  # seconds that a data worker outlives a SIGTERM, as torchrun and Slurm wait
_STARVED = 0.1  # share of an epoch's time spent waiting for data that its line tells
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
        scores: of the best validation, on every class; None if the run was interrupted or never
            validates, and in all processes but the first.
        best_epoch: 1-based epoch of that validation.
        steps: batches consumed, skipped ones included.
        skipped: batches without a valid pixel.
        interrupted: stopped by a signal, to be resumed.
        signal: the number of that signal, where this process received it; else 0.
        output: directory with the checkpoints, metrics and pictures.
    """

    scores: Scores | None
    best_epoch: int
    steps: int
    skipped: int
    interrupted: bool
    output: Path
    signal: int = 0


class DivergedError(RuntimeError):
    """The loss, a weight or the loss scale is no longer a number to go on with."""


class WorkerError(RuntimeError):
    """A process that loads data died."""


class EpochBatches(Sampler[list[int]]):
    """Batches of indices in an order that is a pure function of (seed, epoch).

    A resumed epoch starts at batch ``start``; the batches before it are never loaded. The last,
    short batch is dropped: one image is no sample for batch normalisation. Of several processes
    each gets its part of every batch.
    """

    def __init__(self, length: int, batch_size: int, seed: int, world: World | None = None) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.world = world or World()
        self.epoch, self.start = 0, 0

    def batch(self, epoch: int, number: int) -> list[int]:
        """The indices of a whole batch, those of all processes."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
        return order[number * self.batch_size : (number + 1) * self.batch_size].tolist()

    def __len__(self) -> int:
        return self.length // self.batch_size - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length).tolist()
        own = self.batch_size // self.world.size
        end = self.length // self.batch_size * self.batch_size
        for first in range(self.start * self.batch_size, end, self.batch_size):
            begin = first + self.world.rank * own
            yield order[begin : begin + own]


class MetricsFile:
    """Appends JSON lines, and forgets on resume what came after the checkpoint."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        self.file: TextIO = open(path, "a")  # noqa: SIM115  (closed by close)
        os.truncate(self.file.fileno(), min(keep_bytes, path.stat().st_size))

    def write(self, record: dict[str, Any]) -> None:
        with self._named():
            self.file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        with self._named():
            self.file.flush()

    def sync(self) -> int:
        """Brings all records to the disk; returns the file's length in bytes."""
        with self._named():
            self.file.flush()
            os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        self.file.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """An error of an open file does not name it."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.file.name) from error


class _Interrupt:
    """Turns Ctrl-C and SIGTERM into a flag, so that the step in hand ends whole."""

    def __init__(self) -> None:
        self.signal = 0

    @property
    def set(self) -> bool:
        return self.signal != 0

    def _handle(self, signum: int, frame: object) -> None:
        # A second Ctrl-C is meant; but torchrun passes on a signal that the terminal has sent too.
        if self.set and signum == signal.SIGINT and not distributed.launched():
            raise KeyboardInterrupt
        self.signal = signum

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _init_worker(worker_id: int) -> None:
    worker_init_fn(worker_id)
    # A Ctrl-C or SIGTERM to all processes of a job is for the training process, which still needs
    # its data to end the step; a worker that is left behind ends by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))


@dataclass
class Trainer:
    """Trains ``model`` on ``train_set``, validates it on ``val_set``, keeps the run on disk.

    :func:`train` makes the parts from a configuration; use this class to bring your own. The model
    needs the ``loss`` and ``update_confusion_matrix`` of :class:`fcnseg.models.FCN`, and its
    ``predict`` for the pictures. ``world`` holds the processes that train together;
    ``criterion(model, x, target)`` is the loss, by default what ``config`` says (see
    :mod:`fcnseg.training.criterion`).
    """

    config: TrainConfig
    model: models.FCN
    train_set: SegmentationDataset
    val_set: SegmentationDataset
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world: World = field(default_factory=World)
    criterion: Criterion | None = None

    def __post_init__(self) -> None:
        config, world, self.output = self.config, self.world, Path(self.config.output)
        if len(self.train_set) < config.batch_size:
            raise ConfigError(
                f"batch_size: the training set has {len(self.train_set)} images, fewer than one "
                f"batch of {config.batch_size}"
            )
        if config.batch_size % (config.accumulate * world.size):
            raise ConfigError(
                f"batch_size: expected a multiple of accumulate times the number of processes, "
                f"{config.accumulate} x {world.size}, got {config.batch_size}"
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
        self.batches = EpochBatches(len(self.train_set), config.batch_size, config.seed, world)
        self.pending: list[tuple[int, float]] = []  # step, lr; the losses are on the device
        self.interrupt = _Interrupt()
        self.waited = 0.0  # for data in this epoch: seconds, at its end the share of its time
        self.stopping = False  # an interrupt that all processes know of
        self.metrics: MetricsFile | None = None  # of the first process, while it runs
        self.board: Any = None
        self.saved_step = -1  # of the last checkpoint of this process
        # What tells a split file from another, wherever it lies.
        self.split = (
            hashlib.sha256(Path(config.split_file).read_bytes()).hexdigest()
            if config.split_file is not None
            else None
        )
        self._prepare_model()
        self._prepare_step()
        if world.size > 1:
            torch.manual_seed(config.seed + world.rank)  # dropout differs, the weights do not

    def _prepare_model(self) -> None:
        config = self.config
        if config.sync_bn:
            if self.device.type != "cuda":
                raise ConfigError("sync_bn: PyTorch synchronises batch normalisation on CUDA only")
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if config.freeze_bn:
            optimizer.freeze_batch_norm(self.model)
        self.model.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.average: nn.Module | None = None
        self.update_average: Callable[[], None] | None = None
        if config.ema:
            self.average, self.update_average = optimizer.averaging(self.model, config.ema)
        if config.compile:
            if not isinstance(getattr(self.model, "backbone", None), nn.Module):
                raise ConfigError("compile: the model has no backbone to compile")
            self.model.backbone.compile()  # in place: the names of the weights stay

    def _prepare_step(self) -> None:
        config, world = self.config, self.world
        classes = self.train_set.num_classes
        self.matrix = (
            torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
            if config.train_scores
            else None
        )
        criterion = self.criterion or make_criterion(config, self.train_set, world)
        if isinstance(criterion, nn.Module):
            criterion.to(self.device)
        objective: nn.Module = Objective(
            self.model,
            criterion,
            matrix=self.matrix,
            ignore_index=self.train_set.ignore_index,
        )
        # The stream of the steps; None: the current one.
        graphed = config.cuda_graphs and self.device.type == "cuda" and why_not() is None
        stream = torch.cuda.Stream() if graphed else None
        if world.size > 1:
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                objective = DistributedDataParallel(
                    objective,
                    # Rank 0's running statistics go to all: those of the checkpoint.
                    device_ids=[self.device.index] if self.device.type == "cuda" else None,
                    gradient_as_bucket_view=True,
                )
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)
        self.optimizer = optimizer.make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.train_step = TrainStep(
            objective,
            self.optimizer,
            [self._factor(step) for step in range(self.total_steps)],
            self.device,
            count=getattr(criterion, "count", None),
            parts=config.accumulate,
            max_norm=config.clip_norm,
            scaler=self.scaler,
            autocast=_AUTOCAST.get(config.precision),
            prepare=self._normalised,
            after=self.update_average,
            history=config.log_interval,
        )
        self.step: Callable[[Tensor, Tensor], Tensor] = self.train_step
        if config.cuda_graphs:
            self.step = GraphedTrainStep(self.train_step, stream=stream)
            if self.step.reason is not None and world.main:
                print(f"no CUDA graph, steps run eagerly: {self.step.reason}")

    def _factor(self, step: int) -> float:
        return lr_factor(
            step,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            kind=self.config.lr_schedule,
            drop_every=self.config.lr_step_epochs * self.progress.steps_per_epoch,
        )

    # -- data ----------------------------------------------------------------------------------

    def _loader(self, dataset: SegmentationDataset, **batching: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            num_workers=self.config.workers,
            worker_init_fn=_init_worker,
            pin_memory=self.device.type == "cuda",
            # No persistent_workers: they keep the data set as it was sent to them, so that of one's
            # own its set_epoch would not reach them, and random states that a resumed run lacks;
            # and what they save, the start of a process, is little beside an epoch.
            # Its own generator: making an iterator draws from the global one otherwise, and a
            # resumed epoch makes one more than an unbroken epoch.
            generator=torch.Generator().manual_seed(self.config.seed),
            **batching,
        )

    def _batches(self, dataset: SegmentationDataset, **batching: Any) -> Iterator[Batch]:
        """What a :class:`Prefetcher` gives of a data set."""
        try:
            yield from Prefetcher(self._loader(dataset, **batching), self.device)
        except (ConnectionError, EOFError, RuntimeError) as error:
            # It died while it handed over a tensor, to this thread or to the one that pins memory,
            # and this was seen before its signal.
            pinning = str(error) == "Pin memory thread exited unexpectedly"
            if isinstance(error, RuntimeError) and not pinning:
                raise
            if not self.config.workers or "in DataLoader worker" in str(error):
                raise  # the data set's own
            reason = f"DataLoader worker exited unexpectedly ({type(error).__name__})"
            raise WorkerError(self._worker_died(reason)) from error

    def _normalised(self, images: Tensor) -> Tensor:
        return data.normalise(images, memory_format=self.memory_format)

    def _images(self, images: Tensor) -> Tensor:
        return self._normalised(images.to(self.device, non_blocking=True))

    def _autocast(self) -> torch.autocast:
        dtype = _AUTOCAST.get(self.config.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _files(self, step: int) -> str:
        """The images of the batch of a step, by file name where the data set tells it."""
        epoch, batch = divmod(step - 1, self.progress.steps_per_epoch)
        indices = self.batches.batch(epoch, batch)
        files = getattr(self.train_set, "files", None)
        names = [str(index) if files is None else str(files[index][0]) for index in indices]
        return ("images " if files is None else "") + ", ".join(names)

    # -- state ---------------------------------------------------------------------------------

    def save_last(self) -> None:
        """Writes ``last.pt``, from which :meth:`load_last` continues. All processes call it.

        Raises:
            DivergedError: a loss or a weight is not finite; the checkpoint before is kept.
            OSError: the file cannot be written; the checkpoint before is kept.
        """
        self._flush()
        if not all(torch.isfinite(p).all() for p in self._float_state()):
            raise DivergedError(
                f"a weight is not finite after step {self.progress.step}: {self._advice()}"
            )
        random_states = self.world.gather(checkpoint.rng_state())
        matrix = None if self.matrix is None else self.world.sum(self.matrix.clone())
        if self.metrics is None:
            return
        self.progress.metrics_bytes = self.metrics.sync()
        state = {
            "config": self.config.to_dict(),
            "split": self.split,
            "progress": dict(vars(self.progress)),
            "rng": random_states,
            "scaler": self.scaler.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "matrix": matrix,
            "model": self.model.state_dict(),
        }
        checkpoint.save(self.output / "last.pt", state)
        self.saved_step = self.progress.step

    def _float_state(self) -> Iterator[Tensor]:
        return (t for t in self.model.state_dict().values() if t.is_floating_point())

    def load_last(self) -> None:
        """Puts everything back to what it was when ``last.pt`` was written.

        On another number of processes than then, dropout is drawn anew.

        Raises:
            CheckpointError: the file is missing, unreadable or lacks a part.
            ConfigError: it belongs to a run with other settings or other data.
        """
        path = self.output / "last.pt"
        state = checkpoint.load(path)
        try:
            self.config.check_resumes(state["config"])
            if state["split"] != self.split:
                raise ConfigError(
                    f"resume: split_file {self.config.split_file} is not the split that the run "
                    "began with"
                )
            progress = Progress(**state["progress"])
            if progress.steps_per_epoch != self.progress.steps_per_epoch:
                raise ConfigError(
                    f"resume: an epoch had {progress.steps_per_epoch} batches, has "
                    f"{self.progress.steps_per_epoch}: is {self.config.data_root} the same data?"
                )
            self.model.load_state_dict(state["model"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            if self.matrix is not None and self.world.main:
                self.matrix.copy_(state["matrix"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if len(state["rng"]) == self.world.size:
                checkpoint.set_rng_state(state["rng"][self.world.rank])
            elif self.world.main:
                print(f"continued on {self.world.size} processes, was on {len(state['rng'])}")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise checkpoint.CheckpointError(f"{path} is not of such a run: {error}") from error
        self.train_step.attach()
        self.train_step.number.fill_(progress.step)
        self.saved_step = progress.step
        self.progress = progress

    def _evaluated(self) -> models.FCN:
        """The model that is validated and kept as the best."""
        return self.model if self.average is None else self.average  # type: ignore[return-value]

    def _save_best(self, result: Scores) -> None:
        state = {
            "config": self.config.to_dict(),
            "classes": list(self.train_set.classes),
            "epoch": self.progress.best_epoch,
            "scores": dataclasses.asdict(result),
            "model": self._evaluated().state_dict(),
        }
        checkpoint.save(self.output / "best.pt", state)

    # -- the run -------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Trains from where the run stands to its end, or to Ctrl-C or SIGTERM.

        Raises:
            DivergedError: the loss is not finite; ``last.pt`` is from before.
            WorkerError: a data worker died.
            OSError: a file cannot be written.
        """
        try:
            if self.world.main:
                self._open_logs()
            with numerics(self.config, self.device), self.interrupt.watching():
                while not self._done() and not self.stopping:
                    self._train_epoch()
                if self.stopping:
                    self.save_last()
        except BaseException as error:
            with contextlib.suppress(Exception):  # a full disk, again: the first error counts
                self._close_logs()
            lines = str(error).splitlines() if isinstance(error, RuntimeError) else []
            reason = next((line for line in lines if "DataLoader worker (pid" in line), None)
            if reason is not None and not isinstance(error, WorkerError):
                raise WorkerError(self._worker_died(reason)) from error
            raise
        self._close_logs()
        best = None if self.stopping or not self.world.main else self._report()
        progress = self.progress
        return TrainResult(
            best,
            progress.best_epoch,
            progress.step,
            progress.skipped,
            self.stopping,
            self.output,
            self.interrupt.signal,
        )

    def _open_logs(self) -> None:
        # Here, so that nothing but a training run pays for its import.
        from torch.utils.tensorboard import SummaryWriter

        self.metrics = MetricsFile(self.output / "metrics.jsonl", self.progress.metrics_bytes)
        self.board = SummaryWriter(str(self.output), purge_step=self.progress.step)

    def _close_logs(self) -> None:
        for log in (self.metrics, self.board):
            if log is not None:
                log.close()

    def _worker_died(self, reason: str) -> str:
        return (
            f"{reason.strip().rstrip('.')}: a process that loads data died (out of memory, "
            f"perhaps: try fewer workers than {self.config.workers}); {self._last_checkpoint()}"
        )

    def _last_checkpoint(self) -> str:
        if self.saved_step < 0:
            return "no checkpoint was written yet"
        return f"the last checkpoint is of step {self.saved_step}"

    def _advice(self) -> str:
        return f"try a lower lr or a longer warm-up; {self._last_checkpoint()}"

    def _out_of_steps(self) -> bool:
        limit = self.config.max_steps
        return limit is not None and self.progress.step >= limit

    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.progress.stale

    def _done(self) -> bool:
        """Whether the run has ended; a run that validates ends on a validation."""
        progress = self.progress
        ended = progress.epoch >= self.config.epochs or self._out_of_patience()
        validated = self.config.val_interval == 0 or progress.validated == progress.step
        return ended or (self._out_of_steps() and validated)

    def _train_epoch(self) -> None:
        """Trains the rest of this epoch, then validates; stops early on a signal or max_steps."""
        config, progress = self.config, self.progress
        optimizer.train_mode(self.model, freeze_bn=config.freeze_bn)
        self.train_set.set_epoch(progress.epoch)
        self.batches.epoch, self.batches.start = progress.epoch, progress.batch
        started, first, self.waited = time.perf_counter(), progress.batch, 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        bar = tqdm(
            total=progress.steps_per_epoch,
            initial=progress.batch,
            desc=f"epoch {progress.epoch + 1}/{config.epochs}",
            unit="batch",
            leave=False,
            disable=not (self.world.main and sys.stderr.isatty()),
        )
        with bar:
            if not self._out_of_steps():
                # Named by nothing, so that its workers end with the loop.
                for (_, target), batch in self._waiting(
                    self._batches(self.train_set, batch_sampler=self.batches)
                ):
                    valid = bool((target != self.train_set.ignore_index).any())
                    valid, self.stopping = self.world.any(valid, self.interrupt.set)
                    if self.stopping:
                        break
                    self._train_step(*batch, valid=valid)
                    bar.update()
                    if progress.step % config.log_interval == 0:
                        bar.set_postfix(loss=f"{self._flush():.4f}")
                    if self._out_of_steps():
                        break
                    if (
                        config.checkpoint_interval
                        and progress.step % config.checkpoint_interval == 0
                        and progress.batch < progress.steps_per_epoch
                    ):
                        self.save_last()
        self._flush()
        seconds = time.perf_counter() - started
        if not self.stopping:
            images_per_second = (progress.batch - first) * config.batch_size / seconds
            self.waited /= seconds
            self._end_epoch(images_per_second)

    def _waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; adds the seconds in which the next one was not there to ``waited``."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _train_step(self, images: Tensor, target: Tensor, *, valid: bool) -> None:
        """A step on a batch of the device, or none where no process has a valid pixel in it."""
        progress = self.progress
        if valid:
            try:
                self.step(images, target)
            except IndexError as error:  # a bad label, on the CPU
                step = progress.step + 1
                raise IndexError(f"step {step}: {error}; batch: {self._files(step)}") from error
            lr = self.config.lr * self._factor(progress.step)
            self.pending.append((progress.step + 1, lr))
        else:
            # Not even a forward pass, so that batch normalisation does not see the images either.
            self.train_step.skip()
            progress.skipped += 1
            progress.skipped_in_epoch += 1
        progress.step += 1
        progress.batch += 1

    def _flush(self) -> float:
        """Records the losses since the last call, the one place that waits for the device.

        Raises:
            DivergedError: a loss is not finite and no GradScaler skips such steps, or one skips
                them without end.
            IndexError: a step met a bad label, on CUDA.
        """
        progress = self.progress
        if self.pending:
            history = self.world.sum(self.train_step.losses.clone()).tolist()
            steps = [step for step, _ in self.pending]
            broken = []  # steps and their losses
            for step, lr in self.pending:
                loss = history[(step - 1) % len(history)]
                if self.metrics is not None:
                    self.metrics.write(
                        {"kind": "step", "step": step, "epoch": progress.epoch + 1, "loss": loss}
                        | {"lr": lr}
                    )
                if math.isfinite(loss):
                    progress.loss_sum += loss
                    progress.loss_count += 1
                else:
                    broken.append((step, loss))
            if self.metrics is not None:
                self.board.add_scalar("train/loss", loss, step)
                self.board.add_scalar("train/lr", lr, step)
                self.metrics.flush()
            self.pending.clear()
            if not self.scaler.is_enabled():
                broken = broken[:1]  # the others follow from it
            self._check_labels([step for step, _ in broken], steps)
            if broken and not self.scaler.is_enabled():
                self._diverged(*broken[0])
            if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
                # The scaler skips a step that overflows and halves its scale: at the start that
                # finds the right one, but no gradient is too large for a scale as small as this.
                self._diverged(step, loss)
        return progress.loss_sum / progress.loss_count if progress.loss_count else math.nan

    def _check_labels(self, broken: list[int], steps: list[int]) -> None:
        """Raises IndexError where ``steps`` met a bad label, whose loss is NaN, on CUDA."""
        verdict = None
        try:
            fcnseg.check_labels()
        except IndexError as error:
            verdict = str(error)
        if broken:  # in all processes, though the label is in one of them
            verdict = next(filter(None, self.world.gather(verdict)), None)
        if verdict is None:
            return
        if self.metrics is not None:
            self.metrics.sync()
        suspects = broken or steps
        raise IndexError(
            f"step {', '.join(map(str, suspects))}: {verdict}; batch: "
            f"{'; '.join(map(self._files, suspects))}; {self._last_checkpoint()}"
        )

    def _diverged(self, step: int, loss: float) -> None:
        """Raises, with what is known of the step."""
        if self.metrics is not None:
            self.metrics.sync()
        what = f"the loss is {loss} at step {step}"
        if self.scaler.is_enabled():
            scale = self.scaler.get_scale()
            what += f" and its scale fell to {scale:g}: fp16 overflows again and again"
        raise DivergedError(
            f"{what}; batch: {self._files(step)}; label check: all labels are valid; "
            f"{self._advice()}"
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
            "waited_for_data": self.waited,
        }
        line = f"epoch {progress.epoch + 1:3d}/{config.epochs}  loss {loss:.4f}"
        if self.scaler.is_enabled():
            record["loss_scale"] = self.scaler.get_scale()
        if self.matrix is not None:
            record["train_miou"] = scores(self.world.sum(self.matrix.clone())).mean_iou
            line += f"  training mIoU {record['train_miou']:.4f}"
        if config.val_interval and (last or (progress.epoch + 1) % config.val_interval == 0):
            result = self.validate()
            if result is None:
                return  # the run saves a checkpoint from which this epoch is validated again
            better = progress.best_epoch == 0 or not result.mean_iou <= progress.best_miou
            progress.stale = 0 if better else progress.stale + 1
            progress.validated = progress.step
            if better:
                progress.best_miou, progress.best_epoch = result.mean_iou, progress.epoch + 1
                # First: killed in between, the resumed run validates again and writes it again.
                if self.world.main:
                    self._save_best(result)
            record |= {"miou": result.mean_iou, "pixel_accuracy": result.pixel_accuracy}
            if self.metrics is not None:
                self.board.add_scalar("val/miou", result.mean_iou, progress.step)
            line += f"  mIoU {result.mean_iou:.4f}{' (best)' if better else ''}"
        line += f"  {images_per_second:.1f} images/s  peak memory {record['peak_memory_mb']:.0f} MB"
        if self.waited > _STARVED:
            line += f"  {self.waited:.0%} of the time waiting for data"
        if progress.skipped_in_epoch:
            line += f"  {progress.skipped_in_epoch} batches without a valid pixel skipped"
        if self.metrics is not None:
            self.metrics.write(record)
            self.board.add_scalar("train/images_per_second", images_per_second, progress.step)
        if progress.batch == progress.steps_per_epoch:
            progress.epoch, progress.batch = progress.epoch + 1, 0
            progress.loss_sum, progress.loss_count, progress.skipped_in_epoch = 0.0, 0, 0
            if self.matrix is not None:
                self.matrix.zero_()
        try:  # first: the run ends at this line where nobody reads it any more
            self.save_last()
        finally:
            if self.world.main:
                print(line, flush=True)

    def validate(self) -> Scores | None:
        """Scores on the validation set, at the labels' own resolution; None if interrupted.

        Each process counts its share of the images; all get the scores of the whole set.
        """
        ignore_index, world = self.val_set.ignore_index, self.world
        model = self._evaluated()
        world.share_buffers(model)
        matrix = ConfusionMatrix(
            self.val_set.num_classes, ignore_index=ignore_index, device=self.device
        )
        model.eval()
        batching: dict[str, Any] = {"batch_size": self.config.val_batch_size}
        if world.size > 1:
            batching["sampler"] = DistributedEvalSampler(self.val_set, world.size, world.rank)
        with torch.no_grad(), self._autocast():
            batches = self._batches(self.val_set, **batching)
            for _, (images, target) in search_where_shapes_repeat(batches):
                model.update_confusion_matrix(
                    matrix.matrix, self._normalised(images), target, ignore_index=ignore_index
                )
                if self.interrupt.set:
                    break
        [self.stopping] = world.any(self.interrupt.set)
        if self.stopping:
            return None
        if self.device.type == "cuda":
            fcnseg.check_labels()
        matrix.sync()
        return scores(matrix.compute())

    def _peak_memory(self) -> float:
        """MB: of the device's allocator in this epoch, or of this process so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

    def _report(self) -> Scores | None:
        """Prints the best scores and draws the pictures, with the best weights."""
        model = self._evaluated()
        best = None
        if self.progress.best_epoch:
            best = checkpoint.load(self.output / "best.pt")
            model.load_state_dict(best["model"])
        model.eval()
        samples = []
        count = len(self.val_set)
        for index in np.linspace(0, count - 1, min(_SAMPLES, count)).round().astype(int).tolist():
            image, truth = self.val_set[index]
            with torch.no_grad(), self._autocast():
                prediction = model.predict(self._images(image[None]))
            samples.append(
                (image.permute(1, 2, 0).numpy(), truth.numpy(), prediction[0].cpu().numpy())
            )
        reporting.save_predictions(
            self.output / "predictions.png", samples, self.val_set.classes, self.val_set.palette
        )
        reporting.save_curves(self.output / "curves.png", self.output / "metrics.jsonl")
        if best is None:
            return None
        result = Scores(**best["scores"])
        print(format_scores(result, self.val_set.classes))
        print(f"the best epoch was {best['epoch']}: mIoU {result.mean_iou:.4f}")
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
        skips=config.skips,
    )


def _choose_device(config: TrainConfig, local_rank: int) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    elif name != "cpu" and distributed.launched():
        raise ConfigError(f"device: each process takes the GPU of its local rank, got {name}")
    if name != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name} was asked for, but PyTorch sees no CUDA device")
    if name == "cpu" and config.precision in ("fp16", "tf32"):
        raise ConfigError(
            f"precision: {config.precision} needs a CUDA device; on the CPU use bf16 or fp32"
        )
    device = torch.device(name)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ConfigError(f"device: {name} was asked for, there are {torch.cuda.device_count()}")
    return device


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

    Started by ``torchrun``, the processes train together: each computes its share of every batch
    of ``config.batch_size`` images, and the first one writes the files.

    Returns:
        The scores of the best validation and how the run ended.

    Raises:
        ConfigError: the settings do not fit each other, the data, the machine or the output.
        CheckpointError: ``resume`` without a readable checkpoint.
        DivergedError: the loss became NaN or infinite.
        IndexError: a label outside the classes.
        WorkerError: a data worker died.
        PeerError: another process of the run failed.
        CaptureError: with ``cuda_graphs``, see :class:`fcnseg.graphs.GraphedTrainStep`.
        OSError: a file cannot be written.
    """
    device = _choose_device(config, distributed.World.from_environment().local_rank)
    with distributed.join(device) as world:
        return _train(config, device, world)


def _train(config: TrainConfig, device: torch.device, world: World) -> TrainResult:
    has_checkpoint = _check_output(config)
    world.any()  # all have looked before the first one writes
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
        split_file=config.split_file,
    )
    val_set = data.open_dataset(
        config.dataset, config.data_root, "val", EvalTransform(), split_file=config.split_file
    )
    model = build_model(config, train_set.num_classes)
    if config.pretrained is not None and not has_checkpoint:
        report = models.load_pretrained(model, config.pretrained)
        if world.main:
            print(reporting.load_report(config.pretrained, report))
    trainer = Trainer(config, model, train_set, val_set, device, world)
    output = Path(config.output)
    if has_checkpoint:
        trainer.load_last()
    if world.main:
        output.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_temporaries(output)
        if has_checkpoint:
            at = trainer.progress
            print(f"resuming at step {at.step} (epoch {at.epoch + 1}, batch {at.batch})")
        config.save(output / "config.json")
    return trainer.run()
