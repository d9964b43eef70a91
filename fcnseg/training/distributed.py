"""Several processes that train one model, as ``torchrun`` starts them.

Each process computes its share of every batch; sums and gradients are added over all of them, so
that a run on R processes is, up to rounding, the run on one. Tensors on a GPU travel by NCCL;
what the hosts must agree on (Is there a valid pixel? Was one of them told to stop?) by Gloo, which
does not wait for the device.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A process that is lost without a trace (its machine is) stops the others after this long.
_TIMEOUT = datetime.timedelta(minutes=10)


class PeerError(RuntimeError):
    """Another process of the run failed or is lost; its own message tells why."""


@dataclass(frozen=True)
class World:
    """The processes of a run; the default is one process alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "World":
        """What ``torchrun`` set; one process where it did not."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return cls(*(int(os.environ[name]) for name in names)) if launched() else cls()

    @property
    def main(self) -> bool:
        """Whether this process writes the logs, checkpoints and pictures."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in some process. All processes must call it."""
        if self.size == 1:
            return list(flags)
        values = torch.tensor(flags or (False,), dtype=torch.uint8)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place, on the tensor's device, without waiting for it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of the ranks, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, module: nn.Module) -> None:
        """Gives all processes the buffers (running statistics) of rank 0."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def launched() -> bool:
    """Whether ``torchrun`` (or what sets its variables) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[World]:
    """Joins the other processes, where there are any; leaves them at the end.

    After an error the group is left as it is: leaving it in order would wait for the others, which
    may wait for this one. The process is to end, and torchrun then ends the others.

    Args:
        device: what this process computes on.

    Raises:
        PeerError: inside, where a process that this one waited for is gone.
    """
    world = World.from_environment()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)  # where streams, graphs and random states are taken from
    if world.size == 1:
        yield world
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
        yield world
        world.any()  # nobody leaves before the last one is done
    except RuntimeError as error:
        text = str(error)
        # Gloo's errors have no class; an error that has one may quote a path with such a word.
        plain = type(error) is RuntimeError and ("gloo" in text.lower() or "NCCL" in text)
        if isinstance(error, dist.DistError) or plain:
            raise PeerError(
                f"rank {world.rank} lost the other processes (the first error of another rank "
                f"says why): {text.strip().partition(chr(10))[0]}"
            ) from error
        raise
    dist.destroy_process_group()
