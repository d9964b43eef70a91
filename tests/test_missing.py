"""Each cause that leaves fcnseg without its compiled operators, and the command that mends it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import fcnseg
from fcnseg import _extension, _missing

PACKAGE = Path(fcnseg.__file__).parent
SUFFIX = EXTENSION_SUFFIXES[0]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree of fcnseg that has not been built."""
    copy = tmp_path / "clone"
    shutil.copytree(PACKAGE, copy / "fcnseg", ignore=shutil.ignore_patterns("*.so", "kernels"))
    (copy / "csrc").mkdir()
    (copy / "setup.py").touch()
    return copy


def warning_at_import(folder: Path, **environment: str) -> str:
    """What Python, started in ``folder``, writes to stderr when it imports fcnseg from there."""
    code = f"import fcnseg; assert fcnseg.__file__.startswith({str(folder)!r}), fcnseg.__file__"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": ""} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert f"PyTorch reference, {_extension.SLOWDOWN} slower than" in finished.stderr
    return finished.stderr


def test_tree_that_was_not_built(tree: Path) -> None:
    text = warning_at_import(tree)
    assert f"The source tree {tree} has not been built." in text
    assert f"To mend it: pip install --force-reinstall --no-deps -e {tree}" in text


def test_tree_that_hides_the_install(tree: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site" / "fcnseg"
    installed.mkdir(parents=True)
    (installed / f"_C{SUFFIX}").touch()
    text = warning_at_import(tree, PYTHONPATH=str(installed.parent))
    assert f"the source tree {tree}, which hides the installed fcnseg in {installed}." in text
    assert "To mend it: cd .." in text


def test_built_for_another_python(tree: Path) -> None:
    (tree / "fcnseg" / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    text = warning_at_import(tree)
    assert "for another Python: for cpython-399-x86_64-linux-gnu, while this one is " in text
    assert SUFFIX.split(".")[1] in text
    assert f"To mend it: pip install --force-reinstall --no-deps -e {tree}" in text


def test_installed_without_a_compiler(tree: Path) -> None:
    for name in ("csrc", "setup.py"):  # what an install does not have
        path = tree / name
        path.rmdir() if path.is_dir() else path.unlink()
    text = warning_at_import(tree, PATH="", CXX="")
    assert "There was no C++ compiler where fcnseg was installed" in text
    assert "# after a C++ compiler, for example: apt install g++" in text


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
def test_built_for_cuda_beside_a_torch_without(tree: Path, tmp_path: Path) -> None:
    stub = tmp_path / "libtorch_cuda.so"
    library = tree / "fcnseg" / f"_C{SUFFIX}"
    build = ["g++", "-shared", "-xc++", "/dev/null", "-o"]
    subprocess.run([*build, stub, f"-Wl,-soname,{stub.name}"], check=True)
    link = ["-Wl,--no-as-needed", f"-L{tmp_path}", "-ltorch_cuda"]
    subprocess.run([*build, library, *link], check=True)
    text = warning_at_import(tree)
    assert f"{library} was built for a CUDA build of torch (it needs libtorch_cuda.so)" in text
    assert f"while torch {torch.__version__} is a CPU build." in text


def test_file_that_is_no_library(tree: Path) -> None:
    library = tree / "fcnseg" / f"_C{SUFFIX}"
    library.write_text("not a shared library")
    assert f"{library} does not load beside torch {torch.__version__}: " in warning_at_import(tree)


def test_command_names_the_folder_that_was_installed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "my clone"
    (source / "csrc").mkdir(parents=True)
    (source / "setup.py").touch()
    record = tmp_path / "fcnseg-0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: fcnseg\nVersion: 0\n")
    (record / "direct_url.json").write_text(json.dumps({"url": source.as_uri(), "dir_info": {}}))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(_missing, "_ROOT", tmp_path)  # where an installed package lies
    command = "pip install --force-reinstall --no-deps "
    assert command + f"'{source}'" in _missing.operators_not_found().command
    (source / "setup.py").unlink()
    assert command + "." in _missing.operators_not_found().command
    (record / "direct_url.json").unlink()
    assert command + "." in _missing.operators_not_found().command


def test_what_cuda_devices_lack_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name: {"cpu": "c++", "cuda": "reference"} for name in fcnseg.build_info()["operators"]}
    monkeypatch.setattr(fcnseg._ops, "implementations", lambda: kinds)
    monkeypatch.setattr(_extension, "missing", None)
    assert fcnseg.build_info()["notes"] == []  # a CPU build of torch lacks nothing
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    find_spec = importlib.util.find_spec
    hide = lambda name: None if name == "triton" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    notes = fcnseg.build_info()["notes"]
    assert len(notes) == 2
    assert "Triton is not installed" in notes[0] and notes[0].endswith("pip install triton")
    assert "built without CUDA code" in notes[1] and "FORCE_CUDA=1 pip install" in notes[1]

    _extension._warn_of_cuda.cache_clear()
    operator = _extension.warns_of_reference_on_cuda(lambda value: value + 1)
    with pytest.warns(RuntimeWarning) as caught:
        assert operator(1) == 2
        assert operator(2) == 3
    assert [str(warning.message) for warning in caught] == notes
    kinds["confusion_matrix"]["cuda"] = "cuda"
    monkeypatch.undo()
    monkeypatch.setattr(fcnseg._ops, "implementations", lambda: kinds)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert fcnseg.build_info()["notes"] == []
    _extension._warn_of_cuda.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert operator(1) == 2


def test_another_clone_that_is_installed_lends_nothing(tree: Path, tmp_path: Path) -> None:
    """As setuptools does for an editable install: a finder of that clone's modules, asked last."""
    other = tmp_path / "other"
    for folder in (other, other / "kernels"):
        folder.mkdir()
        (folder / "__init__.py").touch()
    for name in ("_C", "_pybind"):
        (other / f"{name}{SUFFIX}").touch()
    code = f"""
import importlib.machinery, sys

class OfAnotherClone:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith("fcnseg."):
            return importlib.machinery.PathFinder.find_spec(name, [{str(other)!r}])

sys.meta_path.append(OfAnotherClone)
import fcnseg._extension
assert fcnseg._extension.pybind is None and not fcnseg._extension.HAS_TRITON
"""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert f"The source tree {tree} has not been built." in finished.stderr
