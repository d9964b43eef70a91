"""A plugin of pytest: a test process whose CUDA device answers no more is ended.

    python -m pytest -n 12 -p broken_device ...

A fault of a kernel, an illegal address say, breaks the CUDA context of its process for good: every
later test of that process would fail, whatever it tests. Under pytest-xdist the process is ended
after the report of the test that broke it, which is therefore also said to have crashed, and a new
process takes the remaining tests.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

STATUS = 70


class BrokenDevice:
    def __init__(self) -> None:
        self.failed = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed = self.failed or report.failed

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """After a test that failed, ask the device."""
        if self.failed and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(STATUS)
        self.failed = False


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a process of pytest-xdist: another one takes its place
        config.pluginmanager.register(BrokenDevice())
