"""A training step that touches the device alone, eager or replayed from a CUDA graph.

:class:`TrainStep` is the whole step as one function of the batch: forward, loss, backward,
clipping, optimiser, learning rate, loss history. Everything that it reads and writes from one call
to the next (weights, momentum, loss scale, step counter, learning rates, losses) is a device tensor
that keeps its place, so that :class:`GraphedTrainStep` can capture the same function and replay it.
:class:`Prefetcher` feeds either.

Source: PyTorch's notes on CUDA graphs (whole-network capture, use with DistributedDataParallel),
and on automatic mixed precision (working with scaled gradients).
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fcnseg import _labels


class CaptureError(RuntimeError):
    """A capture broke off in a way that this process cannot recover from."""


# What PyTorch's notes ask for before a capture: some eager steps, more where DDP rebuilds buckets.
_WARMUP, _WARMUP_DDP = 3, 11


class TrainStep:
    """One optimiser step on one batch; nothing in it waits for the device.

    The batch is split into ``parts`` whose gradients add up. With ``count`` each part's mean weighs
    as much as what it was divided by, over all parts and processes: the step is that of one
    process on the undivided batch, however unevenly void pixels lie. Without it, parts and
    processes count alike.

    The step keeps its own number: a float32 learning rate per group, a device tensor, is set to
    ``base_lrs[group] * factors[number]`` before each step.

    Args:
        loss: ``loss(images, target)``, a scalar, the mean over some of the target's pixels; a
            DistributedDataParallel module where ``torch.distributed`` runs.
        optimizer: made with one learning rate per group, which become tensors here. For a capture
            it must run on the device alone (``fused=True`` or ``capturable=True``).
        factors: [steps], what the learning rates are multiplied by at each step; the last holds
            for all steps after.
        device: of the model.
        count: ``count(target)``, what ``loss`` divides its sum by, a scalar tensor on the device;
            None where that is not known (hard pixels only).
        parts: the batch is computed in as many equal parts, one after the other.
        max_norm: gradients are clipped to this norm; 0 for no limit.
        scaler: a GradScaler, enabled or not; None for none.
        autocast: dtype of the forward pass; None for the weights'.
        prepare: applied to a part's images on the device, outside autocast (normalisation).
        after: called after the optimiser (averaging of weights).
        history: how many of the last losses are kept.

    Attributes:
        number: int64 [1], steps taken, skipped ones included.
        losses: float64 [history]; step i's loss is at ``i % history``. With several processes it
            is this one's share: the loss is the sum of all.

    Raises:
        ValueError: ``factors`` is empty, or ``parts`` or ``history`` is not positive.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        factors: Sequence[float] | Tensor,
        device: torch.device,
        *,
        count: Callable[[Tensor], Tensor] | None = None,
        parts: int = 1,
        max_norm: float = 0.0,
        scaler: torch.amp.GradScaler | None = None,
        autocast: torch.dtype | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[], None] | None = None,
        history: int = 1,
    ) -> None:
        if len(factors) == 0:
            raise ValueError("factors: expected one factor per step, got none")
        for name, value in (("parts", parts), ("history", history)):
            if value < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {value}")
        self.loss, self.optimizer, self.device = loss, optimizer, device
        self.count, self.parts, self.max_norm = count, parts, max_norm
        self.scaler = torch.amp.GradScaler(device.type, enabled=False) if scaler is None else scaler
        self.autocast, self.prepare, self.after = autocast, prepare, after
        self.world = dist.get_world_size() if _distributed() else 1
        self.factors = torch.as_tensor(factors, dtype=torch.float64).to(device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(history, dtype=torch.float64, device=device)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.lrs = [torch.zeros((), device=device) for _ in self.base_lrs]
        self.attach()

    def attach(self) -> None:
        """Puts the learning-rate tensors into the optimiser; call it after ``load_state_dict``."""
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr

    def skip(self, steps: int = 1) -> None:
        """Moves the schedule on without a step."""
        self.number += steps

    def reset(self) -> None:
        """Drops what a step that failed half way left behind."""
        self.optimizer.zero_grad(set_to_none=True)
        for name in ("grad_scale", "found_inf"):
            if hasattr(self.optimizer, name):
                delattr(self.optimizer, name)
        if self.scaler.is_enabled():  # else the next step finds this one unfinished
            state = self.scaler.state_dict()
            self.scaler.__init__(self.device.type, enabled=True)  # type: ignore[misc]
            self.scaler.load_state_dict(state)

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """Takes the step; returns this process's share of the loss, detached."""
        index = self.number.clamp(max=len(self.factors) - 1)
        factor = self.factors.index_select(0, index).squeeze(0)
        for lr, base in zip(self.lrs, self.base_lrs, strict=True):
            lr.copy_(factor * base)
        # Gradients are made anew: a graph then allocates them in its own pool.
        self.optimizer.zero_grad(set_to_none=True)
        pieces = list(zip(images.chunk(self.parts), target.chunk(self.parts), strict=True))
        shares = self._shares([y for _, y in pieces])
        total = torch.zeros((), device=self.device)
        for i, ((x, y), share) in enumerate(zip(pieces, shares, strict=True)):
            with contextlib.ExitStack() as stack:
                if i + 1 < len(pieces) and hasattr(self.loss, "no_sync"):
                    stack.enter_context(self.loss.no_sync())
                x = x if self.prepare is None else self.prepare(x)
                with torch.autocast(
                    self.device.type, dtype=self.autocast, enabled=self.autocast is not None
                ):
                    loss = self.loss(x, y)
                if isinstance(share, Tensor):
                    # The mean over no pixel at all is NaN.
                    loss = torch.where(share > 0, loss, 0.0)
                loss = loss * share
                # DistributedDataParallel divides the sum of the gradients by the processes.
                self.scaler.scale(loss * self.world).backward()
            total = total + loss.detach()
        if self.max_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.after is not None:
            self.after()
        self.losses.index_copy_(0, self.number % len(self.losses), total[None].to(torch.float64))
        self.number += 1
        return total

    def _shares(self, targets: list[Tensor]) -> Sequence[Tensor | float]:
        """What each part's mean is multiplied by; they sum to 1 over all processes."""
        if self.count is None or self.parts * self.world == 1:
            return [1 / (self.parts * self.world)] * len(targets)
        counts = torch.stack([self.count(y) for y in targets]).to(torch.float64)
        whole = counts.sum()
        if self.world > 1:
            dist.all_reduce(whole)
        return list((counts / whole).unbind())


class GraphedTrainStep:
    """A step that is captured in a CUDA graph per shape of its batch, and replayed.

    The first calls with a shape run eagerly on the capture's stream: they are steps like any other.
    Then the step is captured and, from there on, replayed; a batch is copied into the static inputs
    without waiting. Where a capture is impossible, all steps run eagerly and ``reason`` says why.
    That is known before the first step, or from the last eager one, in which the step was seen to
    wait for the device, or from a capture in which the step raised an error.

    Args:
        step: a :class:`TrainStep`, or any function of tensors that returns one tensor and keeps
            its state in device tensors that stay where they are.
        warmup: eager steps before a capture; None for 3, or 11 where ``torch.distributed`` runs.
        shapes: graphs that are kept; the one that was not used for longest goes first.
        stream: on which all steps run; None for a new one. DistributedDataParallel must be made on
            it, for it keeps the nodes that accumulate gradients and so their stream.
        reason: why not to capture, where the caller knows; None to try.

    Attributes:
        reason: why the steps run eagerly, or None.
        captures: graphs captured so far.

    Raises:
        CaptureError: by a call: CUDA declared the capture invalid, as it does where the step waits
            for the device unseen by ``torch.cuda.set_sync_debug_mode``. PyTorch's allocator and
            random generators then may stay as they are within a capture, in which memory used on
            two streams is never given back and dropout fails; so the process must end. Nothing was
            computed: the state is that of the step before. With ``torch.distributed`` any failed
            capture raises it.

    Note:
        After a replay ``parameter.grad`` is what the captured step left there: valid until a step
        of another shape. A graph holds the pointers of weights and optimiser state; load a
        checkpoint before the first step, or call :meth:`forget` after it.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        *,
        warmup: int | None = None,
        shapes: int = 4,
        stream: torch.cuda.Stream | None = None,
        reason: str | None = None,
    ) -> None:
        if warmup is None:
            warmup = _WARMUP_DDP if _distributed() else _WARMUP
        if warmup < 1:
            raise ValueError(f"warmup: expected a number >= 1, got {warmup}")
        if shapes < 1:
            raise ValueError(f"shapes: expected a number >= 1, got {shapes}")
        self.step, self.warmup, self.shapes = step, warmup, shapes
        self.reason = reason or why_not()
        self.captures = 0
        self._warm: dict[Any, int] = {}
        self._graphs: OrderedDict[Any, tuple[Any, tuple[Tensor, ...], Tensor]] = OrderedDict()
        if self.reason is None:
            self._stream = torch.cuda.Stream() if stream is None else stream
            self._pool = torch.cuda.graph_pool_handle()

    def forget(self) -> None:
        """Drops all graphs; shapes are captured anew."""
        self._graphs.clear()
        self._warm.clear()

    def __call__(self, *batch: Tensor) -> Tensor:
        """Takes the step; returns what it returns."""
        if self.reason is None and not all(tensor.is_cuda for tensor in batch):
            devices = ", ".join(sorted({str(tensor.device) for tensor in batch}))
            self._give_up(f"the batch is on {devices}, expected cuda")
        if self.reason is not None:
            return self.step(*batch)
        key = tuple((t.shape, t.stride(), t.dtype, t.device) for t in batch)
        # On one stream, always: a gradient's accumulation runs on the stream of its first use.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._run(key, batch)
            for tensor in batch:
                tensor.record_stream(self._stream)
        torch.cuda.current_stream().wait_stream(self._stream)
        result.record_stream(torch.cuda.current_stream())
        return result

    def _run(self, key: Any, batch: tuple[Tensor, ...]) -> Tensor:
        if key not in self._graphs:
            if self._warm.get(key, 0) < self.warmup:
                self._warm[key] = self._warm.get(key, 0) + 1
                # The first step may wait: what it makes, later ones find. Of several processes none
                # may go on without the graph that the others have.
                if self._warm[key] == self.warmup > 1 and not _distributed():
                    return self._watched(batch)
                return self.step(*batch)
            self._capture(key, batch)
            if self.reason is not None:
                return self.step(*batch)
        self._graphs.move_to_end(key)
        graph, static, output = self._graphs[key]
        for own, given in zip(static, batch, strict=True):
            own.copy_(given, non_blocking=True)
        graph.replay()
        # The graphs share a pool, so the next replay may write here.
        return output.clone()

    def _watched(self, batch: tuple[Tensor, ...]) -> Tensor:
        """An eager step; if it waits for the device, which would spoil a capture, none is made."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = self.step(*batch)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits, others = None, []
        for each in caught:
            message = str(each.message)
            if "called a synchronizing CUDA operation" in message:
                waits = waits or f"{each.filename}:{each.lineno}"
            elif "Synchronization debug mode" not in message:  # which says that it is a prototype
                others.append(each)
        if waits is not None:
            self._give_up(f"the step waits for the device ({waits})")
        for each in others:
            warnings.warn_explicit(
                each.message, each.category, each.filename, each.lineno, source=each.source
            )
        return result

    def _capture(self, key: Any, batch: tuple[Tensor, ...]) -> None:
        while len(self._graphs) >= self.shapes:
            self._graphs.popitem(last=False)
        static = tuple(tensor.clone() for tensor in batch)
        graph = torch.cuda.CUDAGraph()
        try:
            # The loader's thread pins memory meanwhile, which the mode "global" would forbid.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                output = self.step(*static)
        except RuntimeError as error:
            ended = _ended(graph)
            # The step's own error, where ending its capture raised another one after it.
            first = error if ended else error.__context__ or error
            reason = str(first).strip().partition("\n")[0] or type(first).__name__
            if _distributed() and isinstance(first, dist.DistError):
                raise first from error  # another process failed
            # NCCL wants the same of all processes, a graph or none, and DistributedDataParallel
            # takes no further step after half a backward pass.
            if not ended or _distributed():
                raise CaptureError(
                    f"the capture of a CUDA graph broke off and cannot be undone: {reason}; start "
                    "again without CUDA graphs (cuda_graphs=False, --no-cuda-graphs)"
                ) from error
            torch.cuda.synchronize()
            graph.reset()  # its memory goes back to the pool
            self._give_up(f"the capture failed: {reason}")
            reset = getattr(self.step, "reset", None)
            if reset is not None:
                reset()
            return
        self._graphs[key] = (graph, static, output)
        self.captures += 1

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._graphs.clear()
        warnings.warn(f"fcnseg.graphs: steps run eagerly: {reason}", stacklevel=3)


def _ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether a capture came to its end, so that allocator and generators left it too.

    By its own comment ``CUDAGraph.reset`` cannot bring them back where it did not, and nothing
    tells how they stand; but a graph names its pool only after they have left the capture.
    """
    try:
        graph.pool()
    except RuntimeError:
        return False
    return not torch.cuda.is_current_stream_capturing()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def why_not() -> str | None:
    """Why no step of this process can be captured; None if it can be tried."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if _labels.check_every_call():
        return "FCNSEG_CHECK_LABELS=1 waits for the device at every call"
    if _distributed() and "cuda:nccl" not in str(dist.get_backend_config()):
        backend = dist.get_backend_config()
        return f"the processes communicate by {backend}, expected cuda:nccl, which can be captured"
    return None


class Prefetcher:
    """Iterates over batches, their tensors copied to the device while it still computes.

    On CUDA a batch is copied on a stream of its own, from pinned memory without waiting, as soon as
    the step before it has been launched. Elsewhere the tensors pass through.

    Args:
        batches: of tuples of CPU tensors; pinned (``pin_memory=True``) for an asynchronous copy.
        device: where they go.

    Yields:
        (batch on the CPU, batch on the device)
    """

    def __init__(self, batches: Iterable[Sequence[Tensor]], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[tuple[Sequence[Tensor], tuple[Tensor, ...]]]:
        if self.device.type != "cuda":
            for batch in self.batches:
                yield batch, tuple(tensor.to(self.device) for tensor in batch)
            return
        stream = torch.cuda.Stream(self.device)
        for batch in self.batches:
            with torch.cuda.stream(stream):
                copies = tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            for copy in copies:
                copy.record_stream(current)
            yield batch, copies
