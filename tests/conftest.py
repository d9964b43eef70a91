"""What all tests share: threads, caches, the order in which they run, and the tolerances."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from typing import Any

#: One thread for every process that a test starts: the cores belong to the tests that run side by
#: side. Libraries read these variables when they are loaded, hence before torch is.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    OPENCV_FOR_THREADS_NUM="1",
    TORCHINDUCTOR_COMPILE_THREADS="1",
)

import pytest
import torch

# A shell starts what runs in its background with SIGINT ignored, and so would be what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
torch.set_num_threads(1 if PARALLEL else 2)

#: Error allowed beyond eager's, relative to the largest expected value, by the result's dtype.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        metavar="K/N",
        help="Run test K, K + N, K + 2 N and so on alone: the parts 1/N to N/N are the whole suite",
    )


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which need not be there
def pytest_xdist_auto_num_workers() -> int:
    """As many as cores that this process may use, which xdist does not ask where psutil is."""
    return len(os.sched_getaffinity(0))


#: Files whose tests run one after the other in one process.
TOGETHER = ("test_emulated_kernels.py",)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands the tests out one by one in their order, but a file of TOGETHER as a whole."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((name for name in TOGETHER if name in nodeid), nodeid)

    config.option.loadscopereorder = False
    return Scheduler(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Caches of compiled kernels that last as long as this run, and that its processes share."""
    if PARALLEL or torch.cuda.is_available():  # on a GPU the benchmarks that follow use them too
        return
    folder = tempfile.mkdtemp(prefix="fcnseg-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for name in ("TRITON_CACHE_DIR", "PTX_EMULATOR_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ[name] = os.path.join(folder, name.lower())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first, so that no process ends with one while the others are idle."""

    def seconds(item: pytest.Item) -> float:
        marker = item.get_closest_marker("long")
        return marker.args[0] if marker else 0.0

    items.sort(key=seconds, reverse=True)
    if part := config.getoption("--part"):
        k, n = map(int, part.split("/"))
        config.hook.pytest_deselected(items=[t for i, t in enumerate(items) if i % n != k - 1])
        items[:] = items[k - 1 :: n]
