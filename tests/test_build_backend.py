"""What the build asks for, which torch it takes, and what it says where it cannot go on."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = Path(sysconfig.get_path("purelib"))


def folder_with_torch(folder: Path, version: str) -> Path:
    (folder / "torch" / "include").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    record = folder / f"torch-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return folder


# As pip does for a build in isolation.
HIDE = """
import site, sys
sys.path = [folder for folder in sys.path if folder not in site.getsitepackages()]
"""


def in_isolation(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` where setuptools and the backend can be imported, other packages cannot."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("setuptools", "setuptools-*", "_distutils_hack", "packaging"):
        for package in PACKAGES.glob(name):
            (alone / package.name).symlink_to(package)
    path = os.pathsep.join(map(str, (ROOT, alone)))
    return subprocess.run(
        [sys.executable, "-c", HIDE + code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "version, requirements",
    [("2.13.0+cpu", []), ("2.11.0", []), ("2.10.1", ["torch>=2.11"]), (None, ["torch>=2.11"])],
)
def test_torch_is_asked_for_where_none_is_fit(
    version: str | None,
    requirements: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    import build_backend

    if version is not None:
        folder_with_torch(tmp_path, version)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    assert build_backend.get_requires_for_build_wheel() == requirements
    assert build_backend.get_requires_for_build_editable() == requirements
    assert build_backend.get_requires_for_build_sdist() == []


@pytest.mark.parametrize(
    "setting, seen",
    [
        ("include-system-site-packages = false", False),
        ("include-system-site-packages = true", True),
        (None, True),  # no virtual environment
    ],
)
def test_torch_of_the_user_counts_where_python_sees_it(
    setting: str | None, seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    import build_backend

    folder_with_torch(tmp_path / "user", "2.13.0")
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path / "none")])
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    if setting is None:
        monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    else:
        (tmp_path / "pyvenv.cfg").write_text(f"home = /usr/bin\n{setting}\n")
    assert build_backend.torch_is_there() == seen


def test_isolation_does_not_hide_the_torch_of_the_environment(tmp_path: Path) -> None:
    code = "import build_backend; build_backend.import_torch(); import torch; print(torch.__file__)"
    done = in_isolation(code, tmp_path)
    assert done.stdout.strip() == str(PACKAGES / "torch" / "__init__.py"), done.stderr


def test_torch_that_is_missing_or_too_old_is_told(tmp_path: Path) -> None:
    nowhere = "site.getsitepackages = lambda: []; import build_backend; "
    code = nowhere + "build_backend.import_torch()"
    done = in_isolation(code, tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "fcnseg: the build needs torch 2.11 or newer, and none is installed: install torch first, "
        "or leave out --no-build-isolation"
    )
    folder_with_torch(tmp_path / "alone", "2.9.0")
    shutil.move(tmp_path / "alone", tmp_path / "old")
    done = in_isolation(f"sys.path.append({str(tmp_path / 'old')!r}); {code}", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "fcnseg: the build needs torch 2.11 or newer, got 2.9.0: run pip install --upgrade torch, "
        "or leave out --no-build-isolation"
    )


def test_torch_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    broken = folder_with_torch(tmp_path / "site", "2.13.0")
    (broken / "torch" / "__init__.py").write_text("import typing_extensions_of_old")
    code = f"""
site.getsitepackages = lambda: [{str(broken)!r}]
import build_backend
build_backend.import_torch()
"""
    done = in_isolation(code, tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "fcnseg: the torch that is installed cannot be imported (No module named "
        "'typing_extensions_of_old'): run pip install --force-reinstall torch"
    )


@pytest.mark.parametrize(
    "before, message",
    [
        (
            "sys.modules['setuptools'] = None",
            "a build without isolation needs the package setuptools, which is not installed: run "
            "pip install setuptools wheel, or leave out --no-build-isolation",
        ),
        (
            "import setuptools; setuptools.__version__ = '63.4.3'",
            "the build needs setuptools 64 or newer, got 63.4.3: run pip install --upgrade "
            "setuptools, or leave out --no-build-isolation",
        ),
        (
            "import importlib.util, setuptools; setuptools.__version__ = '65.5.0'; "
            "importlib.util.find_spec = lambda name: None",
            "setuptools 65.5.0 builds only beside the package wheel, which is not installed: run "
            "pip install wheel, or leave out --no-build-isolation",
        ),
    ],
)
def test_tools_that_are_missing_are_told(before: str, message: str, tmp_path: Path) -> None:
    done = in_isolation(f"{before}; import build_backend", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == f"fcnseg: {message}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    names = ("csrc", "fcnseg", "kernels", "setup.py", "build_backend.py", "pyproject.toml",
             "README.md", "LICENSE", "MANIFEST.in")  # fmt: skip
    for name in names:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            if name == "fcnseg":
                ignored = shutil.ignore_patterns("*.so", "__pycache__", "kernels")
            shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    return tmp_path / "source"


def test_source_distribution_needs_no_torch(source: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; import build_backend; "
    code += "build_backend.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    with tarfile.open(next((source / "dist").glob("fcnseg-*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    headers = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")}
    assert {"build_backend.py", "setup.py", "csrc/pybind.cpp", "kernels/common.py"} <= names
    assert headers and headers <= names


def run_setup(source: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    steering = ("FORCE_", "CUDA", "CXX", "CC", "NVCC")
    kept = {name: v for name, v in os.environ.items() if not name.startswith(steering)}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=source,
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_an_earlier_build_left_is_not_installed(source: Path) -> None:
    left, others = source / "lib" / "fcnseg" / "_C.left.so", source / "lib" / "others.txt"
    left.parent.mkdir(parents=True)
    left.touch()
    others.touch()
    done = run_setup(source, "build", "--build-lib", "lib", PATH="")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found" in done.stderr
    assert (source / "lib" / "fcnseg" / "losses.py").is_file() and not left.exists()
    assert others.exists()


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"CXX": "no-compiler -O2"}, "CXX=no-compiler -O2, but no-compiler is not a program on"),
        ({"FORCE_CUDA": "1", "FORCE_ONLY_CPU": "1"}, "FORCE_ONLY_CPU=1 exclude each other"),
        ({"FORCE_CUDA": "1", "CUDA_HOME": "/none"}, "CUDA_HOME=/none holds no CUDA toolkit"),
        ({"FORCE_CUDA": "1", "PATH": ""}, "a build was forced, but there is no C++ compiler"),
    ],
)
def test_settings_that_cannot_be_met_are_told(
    variables: dict[str, str], message: str, source: Path
) -> None:
    done = run_setup(source, "build", **variables)
    assert done.returncode == 1
    assert done.stderr.startswith("fcnseg: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
