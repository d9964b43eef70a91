"""Bad labels: the messages, and the record that CUDA operators keep instead of synchronising.

A label is bad where it lies outside ``[0, C)`` and is not ``ignore_index``. CPU operators raise
before they write. CUDA operators cannot know without waiting for the device, so they count there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

_FIELDS = 5  # count, value, and the position (n, y, x) of the first one
_records: dict[torch.device, Tensor] = {}


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
    """The int64 record of ``device``; made at first use, never inside a graph capture."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    record = _records.get(device)
    if record is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "fcnseg: run the operator once before it is captured in a CUDA graph, so that "
                "its bad-label record is not allocated from the graph's memory"
            )
        # Also a call under inference_mode may come first; the record must outlive it.
        with torch.inference_mode(False):
            record = torch.zeros(_FIELDS, dtype=torch.int64, device=device)
        _records[device] = record
    return record


def add_to_record(record: Tensor, labels: Tensor, bad: Tensor) -> None:
    """Count ``bad`` and keep the first one's value and position, without synchronising.

    The position is (n, y, x); more than three dimensions are flattened into n, y, x from the left.
    """
    if labels.numel() == 0:
        return
    if labels.dim() > 3:
        labels, bad = labels.flatten(0, -3), bad.flatten(0, -3)
    count = bad.sum()
    flat = bad.flatten().to(torch.uint8).argmax()
    # not labels[flat], which would wait for the device
    value = torch.take(labels.to(torch.int64), flat)
    position = []
    for size in reversed(labels.shape):
        position.append(flat % size)
        flat = flat // size
    position += [torch.zeros_like(count)] * (3 - len(position))
    first = torch.stack([value, *reversed(position)])
    is_first = (record[0] == 0) & (count > 0)
    record[1:].copy_(torch.where(is_first, first, record[1:]))
    record[0].add_(count)


def check_labels() -> None:
    """Raise if any CUDA call since the last check met a bad label; reset the record.

    CUDA operators do not synchronise, so they only count labels outside ``[0, C)`` that are not
    ``ignore_index`` (their loss and gradient are NaN). This waits for the device and reports.
    With the environment variable ``FCNSEG_CHECK_LABELS=1`` every CUDA call checks at once.

    Raises:
        IndexError: names the number of bad labels, the first one's value and position (n, y, x).

    Examples:
        >>> import fcnseg
        >>> fcnseg.check_labels()
    """
    for device, record in _records.items():
        count, value, *position = record.tolist()
        if count:
            record.zero_()
            message = error_message("target or prediction", count, value, position, None)
            raise IndexError(f"on {device}: {message}")


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
