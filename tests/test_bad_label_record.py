"""The bad-label record of a CUDA device, with a stand-in for the device: when it is made and read.

How kernels add to it is tested where they are run: confusion_matrix_emulation.cpp,
interpret_kernels.py and compile_kernels.py.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fcnseg
from fcnseg import _labels

DEVICE = torch.device("cuda", 0)


class Stream:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def synchronize(self) -> None:
        self.log.append("wait for the stream")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order; tensors of the device lie in the CPU's memory."""
    events: list[str] = []
    zeros: Callable[..., Tensor] = torch.zeros

    def logged_zeros(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        events.append("zeros")
        assert device == DEVICE
        return zeros(*size, dtype=dtype)

    monkeypatch.setattr(_labels, "_records", {})
    monkeypatch.setattr(torch, "zeros", logged_zeros)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(events))
    monkeypatch.delenv("FCNSEG_CHECK_LABELS", raising=False)
    return events


def test_record_is_zero_before_another_stream_can_add_to_it(log: list[str]) -> None:
    record = _labels.device_record(DEVICE)
    assert _labels.device_record(DEVICE) is record
    assert log == ["zeros", "wait for the stream"]  # once; the second call waits for nothing


def test_threads_share_one_record(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make, both_ask = _labels._make_record, threading.Barrier(2)

    def slow_make(device: torch.device) -> Tensor:
        # Until the other thread has asked too, or, as it should, cannot get here.
        with contextlib.suppress(threading.BrokenBarrierError):
            both_ask.wait(0.5)
        return make(device)

    monkeypatch.setattr(_labels, "_make_record", slow_make)
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(_labels.device_record(DEVICE)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1]
    assert log.count("zeros") == 1


def test_record_is_not_made_in_a_capture(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run the operator once before it is captured"):
        _labels.device_record(DEVICE)
    assert log == []


def test_check_waits_for_kernels_of_every_stream(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _labels.device_record(DEVICE)
    running = [torch.tensor([2, 7, 0, 1, 3])]  # a kernel on another stream, not finished
    seen: list[list[int]] = []

    def synchronize(device: torch.device) -> None:
        assert device == DEVICE
        if running:
            record.add_(running.pop())
        seen.append(record.tolist())

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(
        IndexError, match=r"cuda:0: .* holds 2 values .* first is 7 at position \(0, 1, 3\)"
    ):
        fcnseg.check_labels()
    # Read after the first wait; zero before the second ends, hence before any later kernel.
    assert seen == [[2, 7, 0, 1, 3], [0] * 5]
    fcnseg.check_labels()
    assert seen[2:] == [[0] * 5]  # nothing to reset: one wait
