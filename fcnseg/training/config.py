"""What a training run is made of: one typed, checked, immutable record."""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fcnseg.losses import ClassWeighting
from fcnseg.training.schedule import SCHEDULES

DATASETS = ("cityscapes", "ade20k", "camvid")
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
HEADS = ("plain", "fcn")
UPSAMPLES = ("deconv", "bilinear")
DECONV_GROUPS = ("grouped", "full")
OUTPUT_STRIDES = (8, 16, 32)
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
LOSSES = ("ce", "ohem", "focal")
CLASS_WEIGHTS = ("none", *get_args(ClassWeighting))
SKIPS = ("32s", "16s", "8s")

# What may differ between a run and its continuation: none of it changes a loss. (Of a split file
# the checkpoint knows the content.)
_FREE_ON_RESUME = frozenset(
    {
        "data_root",
        "split_file",
        "output",
        "resume",
        "pretrained",
        "workers",
        "max_steps",
        "cuda_graphs",
        "patience",
        "log_interval",
        "checkpoint_interval",
    }
)


class ConfigError(ValueError):
    """A setting of a run that cannot be used; the message names the field."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of one training run.

    The defaults are those of the original design: ResNet-101, one 3x3 convolution to the classes,
    learnable grouped transposed convolution, SGD with momentum for 150 epochs.

    Args:
        data_root: directory that holds the data set. This path and those of the files to read are
            kept absolute.
        output: directory that the run writes: checkpoints, metrics, pictures.
        dataset: one of ``DATASETS``.
        split_file: file of ``python -m fcnseg.data split`` that tells which images are in the
            training and the validation set, or None for the published ones.
        backbone, head, upsample, deconv_groups, output_stride, skips: see :mod:`fcnseg.models`.
        aux_loss: train an auxiliary head too; its loss counts ``aux_weight`` times.
        freeze_bn: batch normalisation keeps its statistics, scales and shifts (of ``pretrained``).
        sync_bn: its statistics are those of the whole batch over all processes (CUDA only).
        pretrained: file with a state dict to start from (loaded by name), or None.
        crop: height and width of the training crops, in pixels.
        scale: range of the random resize that precedes the crop.
        color_jitter: largest random change of brightness, contrast and saturation; 0 for none.
        loss: ``"ce"`` (cross entropy), ``"ohem"`` (its hard pixels only) or ``"focal"``.
        ohem_threshold, ohem_min_kept, focal_gamma: of these, see :mod:`fcnseg.losses`.
        class_weights: ``"none"``, or a method of :func:`fcnseg.losses.class_weights`, by which the
            classes are balanced by their frequencies in the training set.
        label_smoothing: share of the uniform distribution in the target.

        epochs: length of the whole schedule, in passes over the training set.
        warmup_epochs: linear warm-up at its start; None takes 10 of every 150 epochs.
        lr_schedule: ``"cosine"``, ``"poly"`` (power 0.9) or ``"step"``: a tenth every
            ``lr_step_epochs``.
        batch_size: images per step, of all processes together.
        accumulate: a step computes its batch in this many parts, one after the other; the loss and
            the gradient stay those of the whole batch (``"ohem"`` chooses in each part by itself).
        lr, momentum, nesterov, weight_decay: of SGD.
        head_lr: the heads' learning rate (deconvolution included) is this many times ``lr``; 10 is
            usual where the trunk is pretrained.
        decay_all: decay also batch normalisation and biases.
        clip_norm: largest norm of the gradient; 0 for no limit.
        ema: decay per step of averaged weights, which are then validated and kept as the best;
            0 for none.
        val_batch_size: images per validation step; 1 unless all images have one size.
        val_interval: epochs between validations (the last epoch is always followed by one); 0
            never validates.
        patience: stop after this many validations in a row without a better mIoU; 0 never does.
        max_steps: stop after this many steps though the schedule spans ``epochs``; None never does.
        workers: processes that load data; 0 loads in the training process.
        precision: ``"fp32"``, ``"tf32"`` (fp32 whose products are rounded; CUDA only), or the
            autocast dtype ``"bf16"`` or ``"fp16"`` (CUDA only).
        channels_last: memory format of the model and the images.
        cuda_graphs: capture the training step in a CUDA graph; where that is impossible the run
            says why and goes on without, or ends, to be resumed without.
        compile: compile the trunk by ``torch.compile``.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; each
            process of several takes the GPU of its local rank.
        seed: of the initial weights, the data order, the augmentation and dropout.
        deterministic: only algorithms with the same result in every run.
        train_scores: also score the training batches, in training mode, from the logits at hand.
        log_interval: steps between two writes of the metrics (every step's loss is recorded).
        checkpoint_interval: steps between two checkpoints within an epoch; 0 writes one per epoch.
        resume: continue the run in ``output``.

    Raises:
        ConfigError: a field is of the wrong type or out of range.

    Examples:
        >>> TrainConfig(data_root="data", output="run", epochs=30).warmup
        2.0
    """

    data_root: str
    output: str
    dataset: str = "cityscapes"
    split_file: str | None = None

    backbone: str = "resnet101"
    head: str = "plain"
    upsample: str = "deconv"
    deconv_groups: str = "grouped"
    output_stride: int = 8
    skips: str | None = None
    aux_loss: bool = False
    aux_weight: float = 0.4
    freeze_bn: bool = False
    sync_bn: bool = False
    pretrained: str | None = None

    crop: tuple[int, int] = (768, 768)
    scale: tuple[float, float] = (0.5, 2.0)
    color_jitter: float = 0.25

    loss: str = "ce"
    ohem_threshold: float = 0.7
    ohem_min_kept: int | float = 1 / 16
    focal_gamma: float = 2.0
    class_weights: str = "none"
    label_smoothing: float = 0.0

    epochs: int = 150
    warmup_epochs: float | None = None
    lr_schedule: str = "cosine"
    lr_step_epochs: int = 30
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 0.01
    head_lr: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_all: bool = False
    clip_norm: float = 0.0
    ema: float = 0.0

    val_batch_size: int = 1
    val_interval: int = 1
    patience: int = 20
    max_steps: int | None = None

    workers: int = 4
    precision: str = "fp32"
    channels_last: bool = True
    cuda_graphs: bool = False
    compile: bool = False
    device: str = "auto"
    seed: int = 0
    deterministic: bool = False
    train_scores: bool = False
    log_interval: int = 10
    checkpoint_interval: int = 200
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("data_root", "output", "pretrained", "split_file"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
            elif not (value and isinstance(value, str)) and (
                value is not None or name in ("data_root", "output")
            ):
                raise ConfigError(f"{name}: expected a path, got {value!r}")
        # What the run reads lies where it lies, also for who reads config.json elsewhere.
        for name in ("data_root", "pretrained", "split_file"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, os.path.abspath(getattr(self, name)))
        self._choice("dataset", DATASETS)
        self._choice("backbone", BACKBONES)
        self._choice("head", HEADS)
        self._choice("upsample", UPSAMPLES)
        self._choice("deconv_groups", DECONV_GROUPS)
        self._choice("output_stride", OUTPUT_STRIDES)
        self._choice("precision", PRECISIONS)
        self._choice("skips", (None, *SKIPS))
        if self.skips is not None and self.output_stride != 32:
            raise ConfigError(f"skips: expected output_stride 32 with it, got {self.output_stride}")
        self._choice("loss", LOSSES)
        self._choice("class_weights", CLASS_WEIGHTS)
        self._choice("lr_schedule", SCHEDULES)
        for name in (f.name for f in dataclasses.fields(self) if f.type in (bool, "bool")):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "accumulate", "val_batch_size", "log_interval"):
            self._integer(name, 1)
        self._integer("lr_step_epochs", 1)
        for name in ("val_interval", "patience", "workers", "seed", "checkpoint_interval"):
            self._integer(name, 0)
        if self.max_steps is not None:
            self._integer("max_steps", 1)
        self._number("lr", 0, open_low=True)
        self._number("head_lr", 0, open_low=True)
        self._number("momentum", 0, 1, open_high=True)
        self._number("ema", 0, 1, open_high=True)
        self._number("clip_norm", 0)
        self._number("label_smoothing", 0, 1)
        self._number("ohem_threshold", 0, 1, open_low=True)
        self._number("ohem_min_kept", 0)
        if isinstance(self.ohem_min_kept, float) and self.ohem_min_kept > 1:
            raise ConfigError(
                "ohem_min_kept: expected an integer (pixels) or a share of the batch in [0, 1], "
                f"got {self.ohem_min_kept!r}"
            )
        self._number("focal_gamma", 0)
        if self.label_smoothing and self.loss != "ce":
            raise ConfigError(
                f"label_smoothing: expected 0 with loss {self.loss}, got {self.label_smoothing}"
            )
        self._number("weight_decay", 0)
        self._number("aux_weight", 0)
        self._number("color_jitter", 0, 1, open_high=True)
        if self.warmup_epochs is not None:
            self._number("warmup_epochs", 0, self.epochs, open_high=True)
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov: expected a momentum > 0 with it, got momentum 0")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"accumulate: expected a divisor of batch_size {self.batch_size}, "
                f"got {self.accumulate}"
            )
        self._pair("crop", int)
        self._pair("scale", float)
        if self.scale[0] > self.scale[1]:
            raise ConfigError(f"scale: expected (low, high) with low <= high, got {self.scale}")
        if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d?))?", str(self.device)):
            raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {self.device!r}")

    @property
    def warmup(self) -> float:
        """Epochs of linear warm-up."""
        return self.epochs * 10 / 150 if self.warmup_epochs is None else self.warmup_epochs

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON and a checkpoint can hold."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the fields to ``path`` as JSON; a file that is there is replaced whole or kept."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if Path(path).exists() and Path(path).read_text() == text:
            return
        temporary = Path(f"{os.fspath(path)}.tmp")
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> dict[str, Any]:
        """The fields that :meth:`save` wrote, to be changed and passed to the class.

        Raises:
            ConfigError: the file is missing, is not such a file, or has a field that is not known.
        """
        try:
            fields = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"config: cannot read {os.fspath(path)}: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"config: {os.fspath(path)} holds no settings")
        unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(TrainConfig)})
        if unknown:
            raise ConfigError(
                f"config: {os.fspath(path)} has settings that are not known: {', '.join(unknown)}"
            )
        return fields

    def check_resumes(self, saved: dict[str, Any]) -> None:
        """Raises ConfigError where this run is not a continuation of the one that wrote ``saved``.

        Where the data lie, the worker count and the like may change; nothing that would change a
        loss may.
        """
        changed = [
            f"{name} was {saved.get(name)!r}, is {value!r}"
            for name, value in self.to_dict().items()
            if name not in _FREE_ON_RESUME and saved.get(name) != value
        ]
        if changed:
            raise ConfigError(f"resume: not the same run: {'; '.join(changed)}")

    def _choice(self, name: str, choices: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or value not in choices:
            raise ConfigError(
                f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}"
            )

    def _integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{name}: expected an integer >= {low}, got {value!r}")

    def _number(
        self,
        name: str,
        low: float,
        high: float = math.inf,
        *,
        open_low: bool = False,
        open_high: bool = False,
    ) -> None:
        value = getattr(self, name)
        ok = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
        ok = ok and (value > low if open_low else value >= low)
        ok = ok and (value < high if open_high else value <= high)
        if not ok:
            limits = f"{'>' if open_low else '>='} {low:g}"
            if high != math.inf:
                limits += f" and {'<' if open_high else '<='} {high:g}"
            raise ConfigError(f"{name}: expected a number {limits}, got {value!r}")

    def _pair(self, name: str, kind: type[int] | type[float]) -> None:
        value: Any = getattr(self, name)
        kinds = (int,) if kind is int else (int, float)
        ok = isinstance(value, tuple | list) and len(value) == 2
        ok = ok and all(isinstance(v, kinds) and not isinstance(v, bool) and v > 0 for v in value)
        if not ok or not all(map(math.isfinite, value)):
            noun = "positive integers" if kind is int else "positive numbers"
            raise ConfigError(f"{name}: expected two {noun}, got {value!r}")
        object.__setattr__(self, name, (kind(value[0]), kind(value[1])))
