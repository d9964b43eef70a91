"""Bad labels: the messages, and the record that CUDA operators keep instead of synchronising.

A label is bad where it lies outside ``[0, C)`` and is not ``ignore_index``. CPU operators raise
before they write. CUDA operators cannot know without waiting for the device, so they count there.

Calls on any stream, and replays of CUDA graphs on any stream, share the record of their device. A
call that met bad labels adds their number by an integer atomic; the call that moves the count away
from 0 writes value and position. So the count is exact, and value and position belong to one bad
label: with one stream the first, with several the first of the call whose addition came first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from fcnseg._extension import HAS_TRITON

_FIELDS = 5  # count, value, and the position (n, y, x) of the first one
_records: dict[torch.device, Tensor] = {}
_making_a_record = threading.Lock()


def error_message(
    name: str, count: int, value: int, position: Sequence[int], num_classes: int | None
) -> str:
    """The text of the IndexError for ``count`` bad values of the argument ``name``."""
    allowed = "the allowed classes" if num_classes is None else f"[0, {num_classes})"
    index = "(" + ", ".join(map(str, position)) + ")"
    return (
        f"{name} holds {count} value{'s' if count > 1 else ''} outside {allowed} and different "
        f"from ignore_index; the first is {value} at position {index}"
    )


def unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The index of element number ``flat`` of a tensor of ``shape``, counted row by row."""
    position = []
    for size in reversed(shape):
        position.append(flat % size)
        flat //= size
    return tuple(reversed(position))


def bad_mask(labels: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """bool, shape of ``labels``: outside ``[0, num_classes)`` and not ``ignore_index``."""
    wide = labels.to(torch.int64)
    bad = (wide < 0) | (wide >= num_classes)
    return bad if ignore_index is None else bad & (wide != ignore_index)


def raise_if_bad(name: str, labels: Tensor, bad: Tensor, num_classes: int) -> None:
    """IndexError that names the first element of ``labels`` where ``bad`` holds. Synchronises."""
    count = int(bad.sum())
    if count:
        flat = int(bad.flatten().to(torch.uint8).argmax())
        value = int(labels.flatten()[flat])
        position = unravel(flat, labels.shape)
        raise IndexError(error_message(name, count, value, position, num_classes))


def device_record(device: torch.device) -> Tensor:
    """The int64 record of ``device``; made at first use, never inside a graph capture.

    Its making is the one time that a CUDA operator waits, for its own stream: the zeros must lie in
    memory before a kernel on another stream adds to them.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    record = _records.get(device)
    if record is None:
        with _making_a_record:  # two threads must not make two records
            record = _records.get(device)
            if record is None:
                record = _records[device] = _make_record(device)
    return record


def _make_record(device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "fcnseg: run the operator once before it is captured in a CUDA graph, so that "
            "its bad-label record is not allocated from the graph's memory"
        )
    # Also a call under inference_mode may come first; the record must outlive it.
    with torch.inference_mode(False):
        record = torch.zeros(_FIELDS, dtype=torch.int64, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return record


def add_to_record(record: Tensor, labels: Tensor, bad: Tensor) -> None:
    """Count ``bad`` and keep the first one's value and position, without synchronising.

    The position is (n, y, x); more than three dimensions are flattened into n, y, x from the left.
    On CUDA without Triton the writing of value and position is not atomic, nor is the count under
    ``torch.use_deterministic_algorithms(True)``: two streams must not call it at once there.
    """
    if labels.numel() == 0:
        return
    if labels.dim() > 3:
        labels, bad = labels.flatten(0, -3), bad.flatten(0, -3)
    while labels.dim() < 3:
        labels, bad = labels[None], bad[None]
    count = bad.sum()
    flat = bad.flatten().to(torch.uint8).argmax()
    if record.is_cuda and HAS_TRITON:
        from fcnseg.kernels.bad_labels import record_bad_labels

        record_bad_labels(record, labels, count, flat)
        return
    # not labels[flat], which would wait for the device
    value = torch.take(labels.to(torch.int64), flat)
    height, width = labels.shape[1:]
    row = flat // width
    first = torch.stack([value, row // height, row % height, flat % width])
    is_first = (record[0] == 0) & (count > 0)
    record[1:].copy_(torch.where(is_first, first, record[1:]))
    record.scatter_add_(0, torch.zeros_like(count)[None], count[None])


def check_labels() -> None:
    """Raise if any CUDA call since the last check met a bad label; reset the record.

    CUDA operators do not synchronise, so they only count labels outside ``[0, C)`` that are not
    ``ignore_index`` (their loss and gradient are NaN). This waits for all streams of the device, so
    that it reports every call made before it, and again after the reset, so that it loses none made
    after it. Calls that another host thread makes meanwhile may be reported or lost.
    With the environment variable ``FCNSEG_CHECK_LABELS=1`` every CUDA call checks at once.

    Raises:
        IndexError: names the number of bad labels, the first one's value and position (n, y, x).

    Examples:
        >>> import fcnseg
        >>> fcnseg.check_labels()
    """
    for device, record in list(_records.items()):
        _wait_for(device)
        count, value, *position = record.tolist()
        if count:
            record.zero_()
            _wait_for(device)
            message = error_message("target or prediction", count, value, position, None)
            raise IndexError(f"on {device}: {message}")


def _wait_for(device: torch.device) -> None:
    """Until every stream of ``device`` is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_every_call() -> bool:
    """Whether FCNSEG_CHECK_LABELS asks for a check (and so a synchronisation) at every call."""
    return os.environ.get("FCNSEG_CHECK_LABELS", "0") not in ("", "0")


def check_now(device: torch.device) -> None:
    """What every CUDA operator calls after its launch."""
    if check_every_call():
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "FCNSEG_CHECK_LABELS=1 needs a synchronisation, which a CUDA graph capture "
                "forbids: unset it, and call fcnseg.check_labels() after the replay"
            )
        check_labels()
