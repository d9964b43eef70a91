"""Plain ``pip install``: in new environments, from a copy of the sources, without a download.

The environments hold links to the packages of the one that runs the tests; what a build in
isolation asks for comes from the folder of wheels that ``make test-install`` fills.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGES = Path(sysconfig.get_path("purelib"))
WHEELS = Path(sys.prefix) / "wheels"
# What the new environments must not have: the package itself, and the tools of the build.
NOT_LINKED = re.compile(
    "__editable__|(fcnseg|pip|setuptools|_distutils_hack|distutils-precedence|wheel|pybind11|ninja)"
    "([-.].*)?$"
)

pytestmark = pytest.mark.skipif(
    not WHEELS.is_dir(), reason="make test-install has not fetched the wheels for the build"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what is under version control, and of new files beside it."""
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "runs", "kernels"
    )
    copy = tmp_path / "clone"
    shutil.copytree(ROOT, copy, ignore=ignored)
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=ignored)
    return copy


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment that holds torch and what it needs, and pip."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", code], text=True).strip())
    for name in ("setuptools", "_distutils_hack"):
        shutil.rmtree(site / name, ignore_errors=True)
    for path in site.glob("setuptools-*"):
        shutil.rmtree(path)
    (site / "distutils-precedence.pth").unlink(missing_ok=True)
    for path in PACKAGES.iterdir():
        if NOT_LINKED.match(path.name) is None:
            (site / path.name).symlink_to(path)
    return python


def environment(python: Path, path: str | None = None) -> dict[str, str]:
    """Variables for pip and Python; none of those that steer the build or the search of modules."""
    steering = re.compile("FORCE_|CXX$|CC$|CUDA|PIP_|PYTHON|NVCC|TORCH_|DEBUG$|FCNSEG_|MAKE")
    kept = {name: value for name, value in os.environ.items() if not steering.match(name)}
    return kept | {
        "PATH": path or f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": str(WHEELS),
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def run(*command: str | Path, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def succeed(*command: str | Path, cwd: Path, env: dict[str, str]) -> str:
    finished = run(*command, cwd=cwd, env=env)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


@pytest.mark.install
def test_plain_install_builds_for_the_torch_that_is_there(
    python: Path, source: Path, tmp_path: Path
) -> None:
    env = environment(python)
    succeed(python, "-m", "pip", "install", ".", cwd=source, env=env)  # offline: no other torch
    code = "import fcnseg; print(fcnseg.__file__, fcnseg.build_info()['built']['torch'])"
    file, built = succeed(
        python, "-W", "error::RuntimeWarning", "-c", code, cwd=tmp_path, env=env
    ).split()
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert built == torch.__version__  # with its suffix: +cpu, +cu130
    code = "import fcnseg; print(*{o['cpu'] for o in fcnseg.build_info()['operators'].values()})"
    assert succeed(python, "-c", code, cwd=tmp_path, env=env) == "c++\n"
    assert "WRONG" not in succeed(python, "-m", "fcnseg", cwd=tmp_path, env=env)

    # Python that is started in the source tree finds the sources first.
    hidden = run(python, "-c", "import fcnseg", cwd=source, env=env)
    assert hidden.returncode == 0
    assert f"the source tree {source} before the fcnseg that is installed in" in hidden.stderr
    assert "python -P" in hidden.stderr
    succeed(python, "-W", "error::RuntimeWarning", "-P", "-c", "import fcnseg", cwd=source, env=env)


@pytest.mark.install
def test_install_without_a_compiler_says_what_is_missing(
    python: Path, source: Path, tmp_path: Path
) -> None:
    env = environment(python, path=str(python.parent))
    succeed(python, "-m", "pip", "install", ".", cwd=source, env=env)
    report = succeed(python, "-m", "fcnseg", cwd=tmp_path, env=env)
    assert "installed without its compiled operators, as happens where there is no C++" in report
    command = f"{python} -m pip install --force-reinstall --no-deps {source}"
    assert f"To mend it: {command}  # after a C++ compiler" in report
    assert "WRONG" not in report
