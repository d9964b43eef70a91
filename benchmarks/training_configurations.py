"""A training step of ResNet-101 FCN in the configurations of the GPU table: made, checked, timed.

What runs in the process of a job (see jobs.py): :func:`do` measures one configuration, or searches
the largest batch that one fits. The step is the trainer's own, :class:`fcnseg.graphs.TrainStep`
with fused SGD, on random images and targets in blocks, dropout off, so that equal weights give
equal losses.

1. Numerics. TF32 is off unless asked for, cuDNN chooses its algorithms by trial, as the trainer has
   it. AMP is autocast to bfloat16, or to float16 with a GradScaler.
2. Checks, before anything is timed. The fused loss and its gradient against PyTorch's in float32 on
   the network's own logits: :data:`LOSS_TOLERANCE`, :data:`GRADIENT_TOLERANCE`. The losses of the
   first steps with it against those of the last configuration with PyTorch's:
   :data:`FIRST_TOLERANCE` for the first, which sees equal weights; :data:`LATER_TOLERANCE` for the
   others, in which rounding has grown. And the last two losses differ: those of a graph that leaves
   the weights alone are equal.
3. Time. Events between steps that follow each other without waiting for the device, as in training;
   the median.
4. Memory. Peak of the allocator in steps after the first ones, whose search for convolution
   algorithms takes workspace of its own. A graph's memory is what its capture took.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clocks import device, statistics, synchronize
from harness import first_line, require_compiled
from torch import Tensor, nn
from torch.nn import functional as F

import fcnseg
from fcnseg.graphs import GraphedTrainStep, TrainStep, why_not
from fcnseg.models import FCN, fcn_resnet101

IGNORE_INDEX = 255
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_TOLERANCE = 1e-4  # relative
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # of norms
FIRST_TOLERANCE = 2e-2
LATER_TOLERANCE = 0.1
SEARCH_STEPS = 3  # in which memory is not counted
CHECKED_STEPS = 8  # in all before the clock runs; a graph is captured in the fourth

#: Each adds to the one before.
CONFIGURATIONS: dict[str, dict[str, bool]] = {
    "eager fp32": {},
    "eager AMP": {"amp": True},
    "AMP channels_last": {"amp": True, "channels_last": True},
}
for _name, _option in (
    ("+ fused loss", "fused"),
    ("+ CUDA graph", "graph"),
    ("+ compiled trunk", "compiled"),
):
    CONFIGURATIONS[_name] = list(CONFIGURATIONS.values())[-1] | {_option: True}

# What allocators and libraries say, besides torch.OutOfMemoryError, where no memory is left.
_NO_MEMORY = ("out of memory", "ALLOC_FAILED", "was unable to find an engine")


def eager_loss(logits: Tensor, target: Tensor) -> Tensor:
    full = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full, target, ignore_index=IGNORE_INDEX)


def fused_loss(logits: Tensor, target: Tensor) -> Tensor:
    return fcnseg.upsample_cross_entropy(logits, target, ignore_index=IGNORE_INDEX)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"eager": eager_loss, "fused": fused_loss}


def inputs(batch: int, classes: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images float32 [N, 3, H, W] and int64 targets in blocks of 16 pixels, the first rows void."""
    generator = torch.Generator(device()).manual_seed(0)
    x = torch.randn(batch, 3, *size, generator=generator, device=device())
    blocks = (batch, size[0] // 16, size[1] // 16)
    target = torch.randint(0, classes, blocks, generator=generator, device=device())
    target = target.repeat_interleave(16, 1).repeat_interleave(16, 2)
    target[:, : size[0] // 32] = IGNORE_INDEX
    return x, target


class TinyNetwork(nn.Module):
    """Stands in for the FCN in a rehearsal: the same parts, four layers."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Conv2d(8, classes, 3, stride=2, padding=1)

    def low_resolution(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.classifier(self.backbone(x))}


Network = FCN | TinyNetwork


def network(classes: int, *, channels_last: bool, tiny: bool = False) -> Network:
    """In training mode, without dropout: equal draws are not part of the step."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = TinyNetwork(classes) if tiny else fcn_resnet101(classes, output_stride=8)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.train()


def sgd(model: nn.Module) -> torch.optim.SGD:
    """With a rate so low that rounding does not grow into another course within some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, fused=True)
    for parameter in model.parameters():  # made by the first step otherwise: it is to be like all
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def peak_memory() -> float:
    """Bytes: of the device's allocator, or of this process; since the last :func:`reset_peak`."""
    if device() == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def reset_peak() -> None:
    gc.collect()
    if device() == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def is_out_of_memory(error: BaseException | str) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, BaseException) and not isinstance(error, RuntimeError):
        return False
    return any(words in str(error) for words in _NO_MEMORY)


def switches(*, tf32: bool, search: bool) -> None:
    """PyTorch's global numerics (1 above); ``search``: cuDNN chooses by trial."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = search


class Step:
    """The training step of a configuration, to be called with images and targets.

    Attributes:
        reason: why a graph was asked for and none is replayed; None otherwise.
    """

    def __init__(
        self, configuration: str, classes: int, precision: str = "bf16", *, tiny: bool = False
    ) -> None:
        options = CONFIGURATIONS[configuration]
        self.channels_last = options.get("channels_last", False)
        self.fused = options.get("fused", False)
        self.autocast = PRECISIONS[precision] if options.get("amp") else None
        if self.fused:
            require_compiled("upsample_cross_entropy")
        self.model = network(classes, channels_last=self.channels_last, tiny=tiny)
        self.compiled = options.get("compiled", False)
        if self.compiled:
            torch._dynamo.reset()
            # a rehearsal is one of our code, not of the compiler
            self.model.backbone.compile(backend="aot_eager" if tiny else "inductor")
        loss = LOSSES["fused" if self.fused else "eager"]

        def objective(x: Tensor, target: Tensor) -> Tensor:
            return loss(self.model.low_resolution(x)["out"], target)

        self.step = TrainStep(
            objective,
            sgd(self.model),
            [1.0],
            torch.device(device()),
            scaler=torch.amp.GradScaler(device(), enabled=self.autocast == torch.float16),
            autocast=self.autocast,
        )
        self.run: Callable[..., Tensor] = self.step
        if options.get("graph") and why_not() is None:
            self.run = GraphedTrainStep(self.step)

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        return self.run(x, target)

    @property
    def reason(self) -> str | None:
        return self.run.reason if isinstance(self.run, GraphedTrainStep) else None

    def inputs(self, batch: int, classes: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        x, target = inputs(batch, classes, size)
        return (
            x.contiguous(memory_format=torch.channels_last) if self.channels_last else x
        ), target

    def check_loss(self, x: Tensor, target: Tensor) -> dict[str, float]:
        """Compares the fused loss and its gradient with PyTorch's in float32, on two images.

        Raises:
            ValueError: they are farther apart than the tolerances.
        """
        with (
            torch.no_grad(),
            torch.autocast(device(), dtype=self.autocast, enabled=self.autocast is not None),
        ):
            logits = self.model.low_resolution(x)["out"][:2].detach()
        return compare_losses(logits, target[:2])


def compare_losses(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Relative differences of the fused loss and its gradient from eager's in float32."""
    found = {}
    for name, loss, given in (
        ("eager", eager_loss, logits.float()),
        ("fused", fused_loss, logits.clone()),
    ):
        given.requires_grad_()
        value = loss(given, target)
        # times a factor, as a GradScaler has it, lest half precision lose what is small
        (gradient,) = torch.autograd.grad(value * 1024, given)
        found[name] = (value.double(), gradient.double())
    (expected, towards), (value, gradient) = found["eager"], found["fused"]
    differences = {
        "loss": ((value - expected).abs() / expected.abs()).item(),
        "gradient": ((gradient - towards).norm() / towards.norm()).item(),
    }
    limits = {"loss": LOSS_TOLERANCE, "gradient": GRADIENT_TOLERANCE[logits.dtype]}
    for name, difference in differences.items():
        if not difference <= limits[name]:  # NaN is none of them
            raise ValueError(
                f"the fused {name} is {difference:.1e} from eager's on the same logits, "
                f"allowed are {limits[name]:.0e}"
            )
    return differences


def check_course(losses: list[float], expected: list[float]) -> None:
    """Compares the losses of the first steps with those of another configuration.

    Raises:
        ValueError: they are farther apart than the tolerances.
    """
    for i, (ours, theirs) in enumerate(zip(losses, expected, strict=True)):
        tolerance = LATER_TOLERANCE if i else FIRST_TOLERANCE
        if not abs(ours - theirs) <= tolerance * abs(theirs):
            raise ValueError(
                f"the loss of step {i + 1} is {ours:.4f}, without this change {theirs:.4f}: "
                f"farther apart than {tolerance:.0%}"
            )


def step_seconds(run: Callable[[], Any], count: int) -> list[float]:
    """Of ``count`` steps that follow each other (3 above)."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        if device() != "cuda":
            ticks = [time.perf_counter()]
            for _ in range(count):
                run()
                ticks.append(time.perf_counter())
            return [after - before for before, after in itertools.pairwise(ticks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        pairs = itertools.pairwise(events)
        return [before.elapsed_time(after) * 1e-3 for before, after in pairs]
    finally:
        if collecting:
            gc.enable()


_courses: dict[tuple[int, ...], list[float]] = {}


def steps_for(seconds: float, once: float) -> int:
    return min(100, max(5, round(seconds / once)))


def measure(
    configuration: str,
    classes: int,
    size: tuple[int, int],
    batch: int,
    *,
    precision: str,
    tf32: bool,
    tiny: bool,
    seconds: float,
    expected: list[float] | None,
) -> dict[str, Any]:
    """Time and memory of a step, some ``seconds`` of steps.

    ``expected`` are the losses of the first steps with PyTorch's loss, with which those of the
    fused loss must agree; None: those of the last configuration that this process has measured
    with it.
    """
    switches(tf32=tf32, search=True)
    reset_peak()  # of what the configuration before has left
    run = Step(configuration, classes, precision, tiny=tiny)
    x, target = run.inputs(batch, classes, size)
    found: dict[str, Any] = {}
    if run.fused and not run.compiled:  # whose trunk would be compiled once more, for the check
        found["check"] = run.check_loss(x, target)
    losses = [run(x, target).item() for _ in range(SEARCH_STEPS)]
    reset_peak()
    losses += [run(x, target).item() for _ in range(CHECKED_STEPS - SEARCH_STEPS)]
    found["losses"] = losses
    if run.reason is not None:
        return {"out_of_memory" if is_out_of_memory(run.reason) else "failed": run.reason}
    if losses[-1] == losses[-2] and run.autocast != torch.float16:  # whose scaler may skip steps
        raise ValueError(f"the last two losses are both {losses[-1]!r}: the step learns nothing")
    problem = (classes, *size, batch)
    if not run.fused:
        _courses[problem] = losses
    elif (course := expected or _courses.get(problem)) is not None:
        check_course(losses, course)
    (once,) = step_seconds(lambda: run(x, target), 1)
    statistic = statistics(step_seconds(lambda: run(x, target), steps_for(seconds, once)))
    return found | {
        "step_ms": statistic,
        "images_per_second": round(batch / statistic["median"] * 1e3, 2),
        "memory_gb": round(peak_memory() / 1e9, 3),
    }


def search_batch(
    attempt: Callable[[int], float], capacity: float, most: int = 1 << 16
) -> tuple[int, dict[int, float | None]]:
    """The largest batch that fits, and the peak of each batch that was tried, None where none did.

    From the peaks of one and two images the batch that should just fit is told in advance; from
    there the search goes up or down by growing steps, then halves the gap. ``attempt(batch)``
    returns the peak in bytes or raises what :func:`is_out_of_memory` knows; a peak above
    ``capacity`` does not fit either.

    Args:
        most: batches above are not tried.
    """
    peaks: dict[int, float | None] = {}

    def fits(batch: int) -> bool:
        try:
            peak = attempt(batch)
            peaks[batch] = peak if peak <= capacity else None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            peaks[batch] = None
        return peaks[batch] is not None

    for batch in (1, 2):
        if not fits(batch):
            return batch - 1, peaks
    one, two = peaks[1] or 0.0, peaks[2] or 0.0
    batch = 2 + int((capacity - two) / max(two - one, 1.0))
    low, high, stride = 2, most + 1, 1  # low fits; high does not, or is not tried
    while high - low > 1:
        batch = min(max(batch, low + 1), high - 1)
        if fits(batch):
            low = batch
        else:
            high = batch
        if low > 2 and high <= most:
            batch = (low + high) // 2
        else:
            batch = low + stride if low > 2 else high - stride
        stride *= 2
    return low, peaks


def largest_batch(
    configuration: str,
    classes: int,
    size: tuple[int, int],
    *,
    precision: str,
    tf32: bool,
    tiny: bool,
    capacity: float,
    most: int,
) -> dict[str, Any]:
    """The largest batch of which two steps fit ``capacity`` bytes, at most the device's memory.

    cuDNN chooses by rule here: its trials would take most of the time and memory of their own. A
    process on the CPU is not held to the capacity; its peak is compared with it.
    """
    switches(tf32=tf32, search=False)
    if device() == "cuda":
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        capacity = min(capacity, total)
        torch.cuda.set_per_process_memory_fraction(capacity / total)
    run = Step(configuration, classes, precision, tiny=tiny)

    def steps(batch: int) -> float:
        x, target = run.inputs(batch, classes, size)
        for _ in range(2):
            run(x, target)
        synchronize()
        return peak_memory()

    def attempt(batch: int) -> float:
        reset_peak()
        message = None
        try:
            return steps(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = first_line(error)
        # Only now are the frames gone that held the failed step's tensors.
        run.step.reset()
        raise torch.OutOfMemoryError(message)

    batch, peaks = search_batch(attempt, capacity, most)
    return {
        "largest_batch": batch,
        "capacity_gb": round(capacity / 1e9, 3),
        "peaks_gb": {
            str(n): None if peak is None else round(peak / 1e9, 3)
            for n, peak in sorted(peaks.items())
        },
    }


def do(kind: str, **arguments: Any) -> dict[str, Any]:
    """A job: "measure" or "largest"."""
    options = CONFIGURATIONS[arguments["configuration"]]
    # a rehearsal on the CPU compiles all the same, without a graph
    rehearsed = arguments["tiny"] and options.get("compiled")
    if options.get("graph") and not rehearsed and (reason := why_not()):
        return {"skipped": reason}
    try:
        return {"measure": measure, "largest": largest_batch}[kind](**arguments)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"out_of_memory": first_line(error)}
