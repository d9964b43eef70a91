"""Launches that are prepared once: what a call costs on the host.

Triton's own ``kernel[grid](...)`` binds and inspects every argument at every call, 60 microseconds
and more for a kernel with fifty of them, twice for a loss: as long as the kernels themselves take.
Here a ``Launch`` keeps the grid, the scalars and, after the first call, the compiled kernel; a
later call passes the tensors. ``launch`` finds the one that fits its arguments. Where even the
arguments take long to work out, a function decorated with ``cached_plan`` does so once for the
shapes, strides, dtypes and options that they depend on.

On tensors that are not on a CUDA device (Triton's interpreter, an emulator, compiling without a
GPU) nothing is kept, and every launch goes through ``kernel[grid](...)``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_Plan = TypeVar("_Plan")
_caches: list[Any] = []


def keeps_plans(device: torch.device) -> bool:
    """Whether plans are kept, and compiled kernels launched directly, for tensors on ``device``."""
    return device.type == "cuda"


def cached_plan(make: Callable[..., _Plan]) -> Callable[..., _Plan]:
    """``make(device, *key)``, with its results kept for devices of which ``keeps_plans`` holds.

    The arguments must be hashable and determine the plan. The cache is bounded: a run whose sizes
    never repeat works out its plans anew, but compiles nothing for that.
    """
    kept = functools.lru_cache(maxsize=512)(make)
    _caches.append(kept)

    @functools.wraps(make)
    def plan(device: torch.device, *key: Any) -> _Plan:
        return (kept if keeps_plans(device) else make)(device, *key)

    return plan


def forget() -> None:
    """Drop all plans and launches that are kept (compiled kernels stay in Triton's own cache)."""
    for cache in _caches:
        cache.cache_clear()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: makes it the tensor's, where it is another one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


class Launch:
    """One kernel on one grid; everything but its tensors is fixed.

    The kernel's parameters are pointers first, then scalars, then constexprs. It may not be
    specialised on the value of a scalar or the alignment of a pointer (``common.kernel``), so that
    the kernel that the first call compiled is right for every later one. The dtypes of the tensors
    are fixed as well: they belong into the key of the plan that this launch is part of.
    """

    def __init__(
        self, kernel: Any, grid: Sequence[int], scalars: Sequence[Any] = (), **constexprs: Any
    ) -> None:
        """``constexprs`` are the kernel's and Triton's options (``num_warps``, ``maxnreg``)."""
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.scalars = tuple(scalars)
        self.constexprs = constexprs
        self._compiled: Callable[..., None] | None = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the current device and its current stream."""
        if self._compiled is not None:
            self._compiled(*tensors, *self._rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self.scalars, **self.constexprs)
        if compiled is not None and keeps_plans(tensors[0].device):
            self._keep(compiled)

    def _keep(self, compiled: Any) -> None:
        parameters = self.kernel.params
        for each in parameters:
            fixed = each.is_constexpr or each.do_not_specialize
            if not (fixed or each.do_not_specialize_on_alignment):
                raise RuntimeError(
                    f"{self.kernel.fn.__name__}: {each.name} is specialised on its alignment, so "
                    "its compiled kernel cannot be kept: make it by fcnseg.kernels.common.kernel"
                )
        names = [each.name for each in parameters if each.is_constexpr]
        self._rest = (*self.scalars, *(self.constexprs[name] for name in names))
        self._compiled = compiled[self.grid]


@functools.lru_cache(maxsize=2048)
def _kept_launch(
    kernel: Any,
    device: torch.device,
    grid: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    scalars: tuple[Any, ...],
    constexprs: tuple[tuple[str, Any], ...],
) -> Launch:
    return Launch(kernel, grid, scalars, **dict(constexprs))


_caches.append(_kept_launch)


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: Sequence[Tensor], scalars: tuple[Any, ...],
    **constexprs: Any,
) -> None:  # fmt: skip
    """``kernel[grid](*tensors, *scalars, **constexprs)``; the ``Launch`` is kept on CUDA.

    A scalar has the same type at every call: a key that holds 1 also finds what 1.0 was kept for.
    """
    device = tensors[0].device
    if keeps_plans(device):
        dtypes = tuple([tensor.dtype for tensor in tensors])
        prepared = _kept_launch(kernel, device, grid, dtypes, scalars, tuple(constexprs.items()))
    else:
        prepared = Launch(kernel, grid, scalars, **constexprs)
    prepared(*tensors)
