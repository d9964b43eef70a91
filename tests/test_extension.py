"""What is built, what an import costs, and what happens where nothing was compiled."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fcnseg
from fcnseg import _extension

ROOT = Path(fcnseg.__file__).parents[1]


def run_python(code: str) -> str:
    """Run ``code`` in a new interpreter; what it prints."""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


HIDE_EXTENSION = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name == "fcnseg._C" else find_spec(name, package))
"""
USE_THE_REFERENCE = """
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fcnseg
    import fcnseg.functional
    info = fcnseg.build_info()
caught = [w for w in caught if issubclass(w.category, RuntimeWarning)]
assert len(caught) == 1, caught
message = str(caught[0].message)
assert "its PyTorch reference" in message and "pip install --force-reinstall" in message
assert info["missing_reason"] and info["missing_reason"] in message
assert info["mend"] and message.endswith("To mend it: " + info["mend"])
kinds = {kind["cpu"] for kind in info["operators"].values()}
assert kinds == {"reference"}, kinds

import torch

logits = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.5]]]], requires_grad=True)
target = torch.tensor([[[1, 0, 0, 255]]])
kernel = torch.ones(2, 1, 1, 2, requires_grad=True)
with warnings.catch_warnings():
    warnings.simplefilter("error")  # it was said once
    fcnseg.upsample_cross_entropy(logits, target, ignore_index=255).backward()
    fcnseg.conv_transpose_cross_entropy(
        logits, kernel, target, stride=(1, 2), groups=2, ignore_index=255).backward()
    assert logits.grad.isfinite().all() and kernel.grad.isfinite().all()
    assert fcnseg.upsample_argmax(logits, (1, 4)).tolist() == [[[1, 1, 0, 0]]]
    labels = fcnseg.conv_transpose_argmax(logits, kernel, (1, 4), stride=(1, 2), groups=2)
    assert labels.tolist() == [[[1, 1, 0, 0]]]
    expected = [[1, 1], [0, 1]]
    assert fcnseg.confusion_matrix(labels, target, 2, ignore_index=255).tolist() == expected
    matrix = torch.zeros(2, 2, dtype=torch.int64)
    fcnseg.confusion_matrix_(matrix, labels, target, ignore_index=255)
    assert matrix.tolist() == expected
    matrix.zero_()
    fcnseg.upsample_confusion_matrix_(matrix, logits, target, ignore_index=255)
    assert matrix.tolist() == expected
    matrix = fcnseg.upsample_confusion_matrix(logits, target, ignore_index=255)
    assert matrix.tolist() == expected
try:
    fcnseg.confusion_matrix_(matrix, labels, target)
except IndexError as error:
    assert "target holds 1 value" in str(error) and "255 at position (0, 0, 3)" in str(error)
else:
    raise AssertionError("a bad label was counted")
assert matrix.tolist() == expected
print(info["missing_reason"])
"""


def test_works_where_nothing_was_compiled() -> None:
    assert "has not been built" in run_python(HIDE_EXTENSION + USE_THE_REFERENCE)


def test_import_is_light() -> None:
    code = """
import sys
import torch
before = set(sys.modules)
import fcnseg
print(*(set(sys.modules) - before))
"""
    imported = run_python(code).split()
    heavy = (
        "cv2|albumentations|matplotlib|tensorboard|triton|torchvision|tqdm|PIL|scipy"
        r"|torch\._dynamo|torch\._inductor|fcnseg\.(models|data|training)"
    )
    assert [name for name in imported if re.match(rf"({heavy})(\.|$)", name)] == []
    assert "fcnseg.functional" in imported


def test_build_info_names_what_runs() -> None:
    info = fcnseg.build_info()
    assert set(info) == {
        *(
            "version",
            "torch",
            "built",
            "missing_reason",
            "mend",
            "notes",
            "cpu_capability",
            "operators",
        )
    }
    assert info["version"] == fcnseg.__version__
    assert info["torch"] == torch.__version__
    assert set(info["operators"]) == {
        "confusion_matrix",
        "confusion_matrix_",
        "conv_transpose_argmax",
        "conv_transpose_cross_entropy",
        "upsample_argmax",
        "upsample_confusion_matrix",
        "upsample_confusion_matrix_",
        "upsample_cross_entropy",
    }
    for kinds in info["operators"].values():
        assert set(kinds) == {"cpu", "cuda"}
        assert kinds["cpu"] in ("c++", "reference")
        assert kinds["cuda"] in ("cuda", "triton", "reference")


@pytest.mark.skipif(_extension.pybind is None, reason="fcnseg._pybind was not built")
def test_build_info_names_what_was_built() -> None:
    built = fcnseg.build_info()["built"]
    assert set(built) == {"torch", "cuda", "cuda_archs", "compiler"}
    assert built["torch"] and built["compiler"]
    assert (built["cuda"] is None) == (built["cuda_archs"] is None)


@pytest.mark.skipif(_extension.missing is not None, reason="fcnseg._C was not built")
def test_confusion_matrix_runs_compiled() -> None:
    operators = fcnseg.build_info()["operators"]
    assert operators["confusion_matrix"]["cpu"] == operators["confusion_matrix_"]["cpu"] == "c++"


def test_public_names_exist() -> None:
    assert sorted(fcnseg.__all__) == sorted(set(fcnseg.__all__))
    for name in fcnseg.__all__:
        assert hasattr(fcnseg, name)


@pytest.mark.parametrize("name", ["functional", "losses", "metrics", "_extension", "_labels"])
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fcnseg.{name}"))
    assert result.attempted and not result.failed


def test_public_functions_have_examples() -> None:
    for name in ("build_info", "check_labels", *fcnseg.build_info()["operators"]):
        assert ">>> " in (getattr(fcnseg, name).__doc__ or ""), name


def test_submodules_are_imported_when_first_used() -> None:
    code = "import sys, fcnseg; assert 'fcnseg.models' not in sys.modules; "
    code += "print(fcnseg.models.fcn_resnet18.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fcn_resnet18"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        fcnseg.nonsense  # noqa: B018


def test_record_of_bad_labels_outlives_inference_mode() -> None:
    from fcnseg import _labels

    with torch.inference_mode():
        record = _labels.device_record(torch.device("cpu"))
    assert not record.is_inference()
    _labels._records.pop(torch.device("cpu"))


@pytest.mark.parametrize("shape", [(1, 3, 0, 4), (1, 3, 4, 0), (1, 0, 4, 4)])
def test_operators_refuse_empty_logits_behind_the_checks(shape: tuple[int, ...]) -> None:
    if fcnseg.build_info()["operators"]["upsample_argmax"]["cpu"] != "c++":
        pytest.skip("the compiled CPU operators are missing")
    with pytest.raises(RuntimeError, match="at least 1"):
        torch.ops.fcnseg.upsample_argmax(torch.zeros(shape), [4, 8], False, None, None, torch.int64)
