"""Each cause that leaves fcnseg without its compiled operators, and the command that mends it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fcnseg
from fcnseg import _extension, _missing, _ops
from tests.test_extension import USE_THE_REFERENCE

PACKAGE = Path(fcnseg.__file__).parent
PIP = f"{sys.executable} -m pip install --force-reinstall --no-deps"
SUFFIX = EXTENSION_SUFFIXES[0]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree of fcnseg that has not been built."""
    copy = tmp_path / "clone"
    shutil.copytree(PACKAGE, copy / "fcnseg", ignore=shutil.ignore_patterns("*.so", "kernels"))
    (copy / "csrc").mkdir()
    (copy / "setup.py").touch()
    return copy


def run_python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": ""} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished


def warning_at_import(folder: Path, **environment: str) -> str:
    """What Python, started in ``folder``, writes to stderr when it imports fcnseg from there."""
    code = f"import fcnseg; assert fcnseg.__file__.startswith({str(folder)!r}), fcnseg.__file__"
    finished = run_python(code, folder, **environment)
    assert f"PyTorch reference, {_extension.SLOWDOWN} slower than" in finished.stderr
    return finished.stderr


def test_tree_that_was_not_built(tree: Path) -> None:
    text = warning_at_import(tree)
    assert f"The source tree {tree} has not been built." in text
    assert f"To mend it: {PIP} -e {tree}\n" in text


def test_tree_that_hides_the_install(tree: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site" / "fcnseg"
    installed.mkdir(parents=True)
    (installed / f"_C{SUFFIX}").touch()
    text = warning_at_import(tree, PYTHONPATH=str(installed.parent))
    hides = (
        f"Python finds the source tree {tree} before the fcnseg that is installed in {installed}."
    )
    assert (
        f"{hides} To mend it: cd ..  # any other folder will do, and so will `python -P`\n" in text
    )
    path = os.pathsep.join(map(str, (tree, installed.parent)))
    text = warning_at_import(tmp_path, PYTHONPATH=path)
    assert f"{hides} To mend it: unset PYTHONPATH  # or whatever puts {tree} on the path" in text


def test_built_for_another_python(tree: Path) -> None:
    (tree / "fcnseg" / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    text = warning_at_import(tree)
    assert "for another Python: for cpython-399-x86_64-linux-gnu, while this one is " in text
    assert SUFFIX.split(".")[1] in text
    assert f"To mend it: {PIP} -e {tree}\n" in text


def test_installed_without_a_compiler(tree: Path) -> None:
    for name in ("csrc", "setup.py"):  # what an install does not have
        path = tree / name
        path.rmdir() if path.is_dir() else path.unlink()
    text = warning_at_import(tree, PATH="")
    assert "fcnseg was installed without its compiled operators, as happens where there is" in text
    assert "# in the folder of fcnseg's sources; after a C++ compiler, for example: apt" in text


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
    assert f"{library} does not load" in run_python(USE_THE_REFERENCE, tree).stdout


def test_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0"))
    cause, command = _missing.library_not_loaded("_C.so", OSError("undefined symbol"))
    assert cause == "fcnseg needs torch 2.11 or newer, and this one is 2.10.0."
    assert command == f"{sys.executable} -m pip install --upgrade torch"


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The direct_url.json of an installed fcnseg, which lies in ``tmp_path``."""
    folder = tmp_path / "fcnseg-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fcnseg\nVersion: 0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(_missing, "_ROOT", tmp_path.resolve())
    monkeypatch.setattr(_missing, "_PACKAGE", tmp_path.resolve() / "fcnseg")
    return folder / "direct_url.json"


def command_after(record: Path, origin: object) -> str:
    record.write_text(origin if isinstance(origin, str) else json.dumps(origin))
    return _missing.operators_not_found().command


def test_command_installs_what_was_installed(record: Path, tmp_path: Path) -> None:
    source = tmp_path / "my clone"
    source.mkdir()
    folder = {"url": source.as_uri(), "dir_info": {}}
    assert command_after(record, folder) == f"{PIP} '{source}'"
    git = {"url": "https://host/fcnseg.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    assert command_after(record, git) == f"{PIP} git+https://host/fcnseg.git@abc"
    archive = {"url": "https://host/fcnseg-0.tar.gz", "archive_info": {}}
    assert command_after(record, archive) == f"{PIP} https://host/fcnseg-0.tar.gz"


def test_command_says_where_it_belongs_if_that_is_unknown(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = f"{PIP} .  # in the folder of fcnseg's sources"
    gone = {"url": (tmp_path / "gone").as_uri(), "dir_info": {}}
    assert command_after(record, gone) == unknown
    assert command_after(record, "not JSON") == unknown
    record.unlink()
    assert _missing.operators_not_found().command == unknown
    origin = {"url": "https://host/fcnseg-0.tar.gz", "archive_info": {}}
    assert command_after(record, origin) != unknown
    monkeypatch.setattr(_missing, "_PACKAGE", tmp_path / "another" / "fcnseg")
    assert _missing.operators_not_found().command == unknown


def test_pybind_module_that_does_not_load(tree: Path) -> None:
    library = tree / "fcnseg" / f"_pybind{SUFFIX}"
    library.write_text("not a shared library")
    shutil.copy(PACKAGE / f"_C{SUFFIX}", tree / "fcnseg")
    code = "import fcnseg; info = fcnseg.build_info(); print(info['missing_reason'], info['notes'])"
    finished = run_python(code, tree)
    assert f"RuntimeWarning: fcnseg counts NumPy arrays with PyTorch. {library} does not" in (
        finished.stderr
    )
    assert finished.stdout.startswith(f"None ['{library} does not load beside torch")


def test_reference_on_cuda_devices_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name: {"cpu": "c++", "cuda": "reference"} for name in fcnseg.build_info()["operators"]}
    monkeypatch.setattr(_ops, "implementations", lambda: kinds)
    monkeypatch.setattr(_extension, "missing", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fcnseg.build_info()["notes"] == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    find_spec = importlib.util.find_spec
    for there, cause in ((None, "Triton is not installed"), (object(), "do not belong to the fcn")):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, there=there: there if name == "triton" else find_spec(name),
        )
        notes = fcnseg.build_info()["notes"]
        assert len(notes) == 2 and cause in notes[0]
        assert "built without CUDA code" in notes[1] and f"mend it: FORCE_CUDA=1 {PIP}" in notes[1]

    # An operator that is registered with the reference for CUDA tensors warns when it runs.
    registered = {}
    library = SimpleNamespace(impl=lambda name, run, key: registered.update({key: run}))
    monkeypatch.setattr(_ops, "_library", library)
    monkeypatch.setattr(_ops, "_implementations", {})
    _ops._register("an_operator", cpu=abs, cuda=abs, cuda_kind="reference")
    _extension._warn_of_cuda.cache_clear()
    with pytest.warns(RuntimeWarning) as caught:
        assert registered["CUDA"](-1) == 1
        assert registered["CUDA"](-2) == 2
    assert [str(warning.message) for warning in caught] == notes

    _ops._register("an_operator", cpu=abs, cuda=abs, cuda_kind="triton")
    assert registered["CUDA"] is abs
    kinds["confusion_matrix"]["cuda"] = "cuda"
    kinds["upsample_cross_entropy"]["cuda"] = "triton"
    assert fcnseg.build_info()["notes"] == []


def test_readme_says_how_much_slower_the_reference_is() -> None:
    assert f"{_extension.SLOWDOWN} slower" in (PACKAGE.parent / "README.md").read_text()


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
    assert f"The source tree {tree} has not been built." in run_python(code, tree).stderr
