"""What a newcomer meets first: ``python -m fcnseg`` and the public names."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fcnseg
from fcnseg import __main__ as self_test
from tests.test_extension import HIDE_EXTENSION

PUBLIC = {
    "ConfusionMatrix", "ConvTransposeCrossEntropyLoss", "SegmentationLoss",
    "UpsampleCrossEntropyLoss", "__version__",
    "build_info", "check_labels", "confusion_matrix", "confusion_matrix_",
    "conv_transpose_argmax", "conv_transpose_cross_entropy", "metrics", "upsample_argmax",
    "upsample_confusion_matrix", "upsample_confusion_matrix_", "upsample_cross_entropy",
}  # fmt: skip
OPERATORS = sorted(fcnseg.build_info()["operators"])
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROW = r"^  (\w+) +(\S+) +(\S+) +(\S+) +[\d.]+ ms +[\d.]+ ms +[\d.]+x(?:  (WRONG))?$"


def test_public_names() -> None:
    """A name that is added or taken away shows here, and in the CHANGELOG."""
    assert set(fcnseg.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(fcnseg, name) is not None
        assert name == "__version__" or getattr(fcnseg, name).__doc__


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The self-test without times: its exit status, standard output and standard error."""

    def run_self_test(*only: str) -> tuple[int, str, str]:
        problems = [each for each in PROBLEMS if not only or each.operator in only]
        monkeypatch.setattr(self_test, "_problems", lambda device: problems)
        status = self_test.main([])
        return status, *capsys.readouterr()

    monkeypatch.setattr(self_test, "SECONDS", 0.0)
    return run_self_test


PROBLEMS = self_test._problems(DEVICE)


def test_every_operator_is_tested() -> None:
    assert sorted(problem.operator for problem in PROBLEMS) == OPERATORS


def test_self_test(run: Callable[..., tuple[int, str, str]]) -> None:
    threads = torch.get_num_threads()
    status, out, err = run()
    assert (status, err) == (0, "")
    assert torch.get_num_threads() == threads
    assert f"fcnseg {fcnseg.__version__}, torch {torch.__version__}" in out
    assert out.count("operator  ") == 1  # one table
    assert ("The first run on a GPU compiles kernels" in out) == (DEVICE.type == "cuda")
    rows = re.findall(ROW, out, re.MULTILINE)
    assert sorted(row[0] for row in rows) == OPERATORS
    kinds = fcnseg.build_info()["operators"]
    for name, cpu, cuda, error, wrong in rows:
        assert kinds[name] == {"cpu": cpu, "cuda": cuda}
        assert float(error) <= self_test.TOLERANCE and not wrong


def test_no_rounding_decides_between_two_classes() -> None:
    """The labels of float64 are those of float32, and no two classes are equal anywhere."""
    for problem in PROBLEMS:
        if not problem.operator.endswith("argmax"):
            continue
        [labels], [exact] = problem.run_eager(), problem.run_exact()
        assert torch.equal(labels, exact)
        assert len(labels.unique()) == self_test.C
        inputs = [x.double() for x in problem.inputs]
        if problem.operator == "upsample_argmax":
            planes = F.interpolate(inputs[0], (self_test.H, self_test.W), mode="bilinear")
        else:
            stride, groups = self_test.S, self_test.C
            planes = F.conv_transpose2d(*inputs, stride=stride, padding=stride // 2, groups=groups)
        best, second = planes.topk(2, dim=1).values.unbind(1)
        assert (best - second).min() >= 2.0**-17
        assert torch.equal(planes.float().double(), planes)


def spoilt_value(value: Tensor) -> Tensor:
    if value.is_floating_point():
        return value * 1.001
    value = value.clone()
    value.view(-1)[0] ^= 1  # one pixel, or one count
    return value


def spoilt_gradient(value: Tensor) -> Tensor:
    return 1.001 * value - 0.001 * value.detach()


@pytest.mark.skipif(
    fcnseg.build_info()["operators"]["upsample_argmax"][DEVICE.type] == "reference",
    reason="the compiled operators are missing",
)
def test_compiled_operators_are_compared_on_all_threads_and_timed_on_one(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, argmax = [], fcnseg.upsample_argmax

    def spy(*arguments: Any) -> torch.Tensor:
        found.append(torch.get_num_threads())
        return argmax(*arguments)

    monkeypatch.setattr(fcnseg, "upsample_argmax", spy)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run("upsample_argmax")
    finally:
        torch.set_num_threads(threads)
    assert found[0] == 3 and set(found[1:]) == {1}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_result_is_told(
    name: str, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(fcnseg, name)
    wrong: list[Callable[..., Any]] = [lambda *x, **options: spoilt_value(right(*x, **options))]
    if name.endswith("cross_entropy"):
        wrong.append(lambda *x, **options: spoilt_gradient(right(*x, **options)))
        wrong.append(lambda *x, **options: right(*x, **options) * float("nan"))
    if name.endswith("_"):
        wrong.append(lambda matrix, *x, **options: matrix)  # adds nothing
    for function in wrong:
        monkeypatch.setattr(fcnseg, name, function)
        status, out, err = run(name)
        assert status == 1
        assert [row[-1] for row in re.findall(ROW, out, re.MULTILINE)] == ["WRONG"]
        assert err == f"error: wrong or failing on this machine: {name}\n"


def test_an_operator_that_fails_is_told_and_the_others_are_tested(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr(fcnseg, "upsample_argmax", fail)
    status, out, err = run()
    assert status == 1
    assert re.search(r"^  upsample_argmax .* FAILED: RuntimeError: no kernel$", out, re.MULTILINE)
    assert len(re.findall(ROW, out, re.MULTILINE)) == len(OPERATORS) - 1
    assert err == "error: wrong or failing on this machine: upsample_argmax\n"


def test_causes_and_the_mending_command_stand_below_the_table(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = fcnseg.build_info() | {
        "missing_reason": "The compiled operators are missing.",
        "notes": ["Triton is not installed. To mend it: pip install triton"],
        "mend": "pip install .",
    }
    monkeypatch.setattr(fcnseg, "build_info", lambda: info)
    status, out, _ = run("confusion_matrix")
    assert status == 0  # slow is not wrong
    lines = out.splitlines()
    assert lines[-3:] == [
        "",
        "The compiled operators are missing. To mend it: pip install .",
        "Triton is not installed. To mend it: pip install triton",
    ]
    monkeypatch.setattr(
        fcnseg, "build_info", lambda: info | {"missing_reason": None, "notes": [], "mend": None}
    )
    assert len(run("confusion_matrix")[1].splitlines()) == len(lines) - 3


WITHOUT_TIMES = """
import sys
from fcnseg import __main__ as self_test
self_test.SECONDS = 0.0
sys.exit(self_test.main([]))
"""


def test_self_test_where_nothing_was_compiled() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HIDE_EXTENSION + WITHOUT_TIMES],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    rows = re.findall(ROW, done.stdout, re.MULTILINE)
    assert sorted(row[0] for row in rows) == OPERATORS
    assert {row[1] for row in rows} == {"reference"}
    table, _, below = done.stdout.rpartition("\n\n")
    assert "reference" in table and "has not been built" in below


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, status, parts",
    [
        (["--version"], 0, [f"fcnseg {fcnseg.__version__}\n"]),
        (["--help"], 0, ["less than 5 seconds", "columns of the table", "exit status", "eager  "]),
    ],
)
def test_help_and_version(
    arguments: list[str], status: int, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        self_test.main(arguments)
    assert end.value.code == status
    out = capsys.readouterr().out
    assert all(part in out for part in parts)
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("word", ["nonsense", "--nonsense"])
def test_unknown_words_are_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        self_test.main([word])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(f"python -m fcnseg: error: unrecognized arguments: {word}\n")
