"""Splitting an evaluation over processes so that every sample is counted once."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch.distributed as dist
from torch.utils.data import Sampler


class DistributedEvalSampler(Sampler[int]):
    """This process's share of a data set, without padding and without shuffling.

    ``torch.utils.data.DistributedSampler`` repeats samples until all shares are equally long, and
    a confusion matrix summed over the processes counts those twice. Here process r of R gets the
    samples r, r + R, r + 2R, ...; some processes get one sample less, or none at all. The metric
    communicates only in ``ConfusionMatrix.sync()``, so unequal shares are no problem; a model that
    communicates in its forward pass is (evaluate ``ddp.module`` rather than ``ddp``).

    Args:
        dataset: anything with a length.
        num_replicas: number of processes R; None asks torch.distributed.
        rank: this process, 0 to R - 1; None asks torch.distributed.

    Raises:
        ValueError: ``num_replicas`` or ``rank`` is out of range, or only one is given, or neither
            is and torch.distributed is not initialised.

    Examples:
        >>> [list(DistributedEvalSampler(range(5), num_replicas=2, rank=r)) for r in (0, 1)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(
        self, dataset: Sized, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        if num_replicas is None and rank is None:
            if not (dist.is_available() and dist.is_initialized()):
                raise ValueError(
                    "num_replicas and rank must be given where torch.distributed is not initialised"
                )
            num_replicas, rank = dist.get_world_size(), dist.get_rank()
        if num_replicas is None or rank is None:
            raise ValueError("num_replicas and rank must be given both or not at all")
        if num_replicas < 1 or not 0 <= rank < num_replicas:
            raise ValueError(
                f"rank must be in [0, num_replicas), got rank {rank} of {num_replicas}"
            )
        self._indices = range(rank, len(dataset), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)
