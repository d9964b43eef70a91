"""PyTorch's global switches: TF32, determinism, cuDNN's search for the fastest algorithms."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fcnseg.training.config import TrainConfig

Batch = tuple[Sequence[Tensor], tuple[Tensor, ...]]


def allow_tf32(allowed: bool) -> None:
    """Whether float32 convolutions and products on CUDA may round to TF32.

    PyTorch has two generations of switches, some of its parts (``torch.export``, Inductor) read the
    old ones, and reading those raises where the new ones say otherwise. Here both say the same,
    whatever they said before.
    """
    cudnn: Any = torch.backends.cudnn  # which does not declare all that it has
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    cudnn.allow_tf32 = allowed
    if not allowed:  # otherwise the convolutions would inherit a global setting
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"


@contextlib.contextmanager
def numerics(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """PyTorch's global switches as the run wants them, and as they were afterwards."""
    backends: Any = torch.backends
    tf32 = [x.fp32_precision == "tf32" for x in (backends.cuda.matmul, backends.cudnn.conv)]
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by a new switch alone
        products = "high" if tf32[0] else "highest"
    before = (
        backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if config.deterministic:  # read when cuBLAS starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        if device.type == "cuda":
            allow_tf32(config.precision == "tf32")
            backends.cudnn.benchmark = not config.deterministic
        torch.use_deterministic_algorithms(config.deterministic or before[1], warn_only=False)
        yield
    finally:
        if device.type == "cuda":
            allow_tf32(tf32[1])
            torch.set_float32_matmul_precision(products)
            backends.cudnn.benchmark = before[0]
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])


def search_where_shapes_repeat(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; cuDNN may search its algorithms by trial for those alone whose shape repeats.

    The search for one shape takes as long as many forward passes. It pays where all images have one
    size, but where nearly each has its own, as in ADE20K, a validation would consist of searches.
    So an image of another size than the one before goes by cuDNN's rules.

    Args:
        batches: (on the CPU, on the device) with the images first, as
            :class:`fcnseg.graphs.Prefetcher` yields them.
    """
    cudnn, shape = torch.backends.cudnn, None
    allowed = cudnn.benchmark
    try:
        for batch in batches:
            images = batch[1][0]
            cudnn.benchmark = allowed and images.shape == shape
            shape = images.shape
            yield batch
    finally:
        cudnn.benchmark = allowed
