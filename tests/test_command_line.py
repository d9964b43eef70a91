"""How the commands end: exit statuses, and outputs that nobody reads or that cannot be written."""

from __future__ import annotations

import contextlib
import importlib
import io
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import fcnseg
from fcnseg import _command_line

ROOT = Path(fcnseg.__file__).parents[1]
EXAMPLES = ROOT / "examples"
COMMANDS = ["fcnseg/__main__.py", "fcnseg/evaluate.py", "fcnseg/data/__main__.py"]

# The module alone, so that no test waits for PyTorch; argument 1 is the body of the command.
SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("command_line", sys.argv[1])
command_line = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command_line)
exec("def main():\\n " + sys.argv[2])
command_line.run(main)
"""
TYPICAL = """
 try:
  for line in range(9):
   print(line, flush=True)
   sys.stdin.readline()
 except (ValueError, OSError) as error:  # as the commands do
  print("error: of a file", file=sys.stderr)
  return 1
"""


def start(body: str, *options: str, **streams: object) -> subprocess.Popen[str]:
    file = _command_line.__file__
    return subprocess.Popen(
        [sys.executable, *options, "-c", SCRIPT, str(file), body.strip()],
        stdin=subprocess.PIPE,
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},  # type: ignore
    )


@pytest.mark.parametrize(
    "body, status, out, err",
    [
        ("print(1)", 0, "1\n", ""),
        ("print('é'); return 3", 3, "é\n", ""),
        ("print(1); sys.exit('a message')", 1, "1\n", "a message\n"),
        ("print(1); print(2, file=sys.stderr); sys.exit(2)", 2, "1\n", "2\n"),
        ("print(1); raise KeyError(2)", 1, "1\n", "KeyError: 2\n"),
    ],
)
def test_a_command_ends_with_its_status(body: str, status: int, out: str, err: str) -> None:
    process = start(body)
    found_out, found_err = process.communicate()
    assert (process.returncode, found_out) == (status, out)
    assert found_err.endswith(err) and (err or not found_err)


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_it_ends_quietly_where_nobody_reads_on(options: list[str]) -> None:
    process = start(TYPICAL, *options)
    assert process.stdout is not None and process.stdout.readline() == "0\n"
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate("\n" * 9)
    assert (process.returncode, err) == (_command_line.BROKEN_PIPE, "")


def test_it_ends_quietly_where_nobody_reads_at_the_end() -> None:
    """What is short stays in a buffer until the process ends; ``--help`` does."""
    for body in ("sys.stdin.read(); print(1)", "sys.stdin.read(); print(1); sys.exit(0)"):
        process = start(body)
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate("")
        assert (process.returncode, err) == (_command_line.BROKEN_PIPE, "")


def test_it_ends_quietly_where_nobody_reads_messages() -> None:
    process = start("sys.stdin.read(); print('bar', file=sys.stderr); print('done')")
    assert process.stderr is not None
    process.stderr.close()
    process.stderr = None
    out, _ = process.communicate("")
    assert (process.returncode, out) == (_command_line.BROKEN_PIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told() -> None:
    with open("/dev/full", "w") as full:
        process = start("print(1)", stdout=full)
        _, err = process.communicate()
    assert process.returncode == 1
    assert err == "error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_it_runs_where_a_stream_was_closed_at_the_start(closed: str) -> None:
    """As services and cron start commands."""
    body = "import sys; print(1, flush=True); print(2, file=sys.stderr); return 3"
    words = [sys.executable, "-c", SCRIPT, str(_command_line.__file__), body]
    done = subprocess.run(
        f"{shlex.join(words)} {closed}", shell=True, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert done.stdout == ("" if closed.startswith(">") else "1\n")
    assert done.stderr == ("" if "2>" in closed else "2\n")


def test_it_ends_quietly_where_it_is_interrupted(tmp_path: Path) -> None:
    printed = tmp_path / "printed"
    body = f"print(1, flush=True); open({str(printed)!r}, 'w').close(); sys.stdin.read()"
    process = start(body)
    while not printed.exists():  # a signal while a line is written may write it twice
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (_command_line.INTERRUPTED, "1\n", "")


def test_self_test_into_a_closed_pipe() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fcnseg"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith("fcnseg ")
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err and "Exception ignored" not in err
    assert process.returncode == _command_line.BROKEN_PIPE


@pytest.mark.parametrize(
    "file", [*COMMANDS, *(f"examples/{path.name}" for path in sorted(EXAMPLES.glob("[!_]*.py")))]
)
def test_every_command_ends_this_way(file: str) -> None:
    _, _, last = (ROOT / file).read_text().partition('if __name__ == "__main__":\n')
    assert last in ("    _command_line.run(main)\n", "    run(main, __doc__)\n")


@pytest.mark.parametrize("word", ["nonsense", "--nonsense"])
def test_examples_without_arguments_refuse_unknown_words(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["use_with_smp.py", word])
    monkeypatch.setattr(_command_line, "run", lambda command: command())
    module = importlib.import_module("_compare")
    with pytest.raises(SystemExit) as end:
        module.run(lambda: pytest.fail("it ran"), "What it does.\n\nMore.")
    assert end.value.code == 2
    assert f"use_with_smp.py: error: unrecognized arguments: {word}" in capsys.readouterr().err


class Closed(io.StringIO):
    """An output that nobody reads."""

    def write(self, text: str) -> int:
        raise _command_line.OutputClosed(_command_line.BROKEN_PIPE)


def test_files_are_written_where_nobody_reads_the_scores(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    evaluate = importlib.import_module("fcnseg.evaluate")
    for folder in ("truth", "results"):
        (tmp_path / folder).mkdir()
        assert cv2.imwrite(str(tmp_path / folder / "a.png"), np.zeros((2, 2), np.uint8))
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    json, matrix = tmp_path / "scores.json", tmp_path / "matrix.png"
    arguments = [
        tmp_path / "results", tmp_path / "truth", "--classes", tmp_path / "classes.txt",
        "--json", json, "--matrix", matrix, "--workers", 1, "--quiet",
    ]  # fmt: skip
    with contextlib.redirect_stdout(Closed()), pytest.raises(_command_line.OutputClosed):
        evaluate.main(list(map(str, arguments)))
    assert json.stat().st_size > 0 and matrix.stat().st_size > 0


# -- the training ----------------------------------------------------------------------------------


@pytest.fixture
def training_example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("albumentations")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("train_cityscapes")


@pytest.mark.parametrize("processes", [1, 2])
def test_training_refuses_unknown_words(
    processes: int,
    training_example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("WORLD_SIZE", processes), ("RANK", 0), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(training_example, "_leave", sys.exit)  # not this process
    monkeypatch.setattr(sys, "argv", ["train_cityscapes.py", "--nonsense"])
    with pytest.raises(SystemExit) as end:
        training_example.main()
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "train_cityscapes.py: error: unrecognized arguments: --nonsense"


@pytest.mark.parametrize("saved", [False, True])
def test_training_that_nobody_reads_says_how_to_go_on(
    saved: bool,
    tmp_path: Path,
    training_example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train(config: object) -> None:
        if saved:
            (tmp_path / "last.pt").touch()
        raise _command_line.OutputClosed(_command_line.BROKEN_PIPE)

    monkeypatch.setattr(training_example, "train", train)
    arguments = ["--data-root", "data", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_cityscapes.py", *arguments])
    with pytest.raises(_command_line.OutputClosed) as end:
        training_example.main()
    assert end.value.code == _command_line.BROKEN_PIPE
    err = capsys.readouterr().err
    assert (f"continue it with --output {tmp_path} --resume\n" in err) == saved


def test_commands_after_the_demonstration_are_those_of_this_interpreter(
    training_example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "executable", str(ROOT / ".venv/bin/python"))
    monkeypatch.setattr(sys, "argv", ["examples/train_cityscapes.py"])
    lines = training_example.what_next(Path("runs/a b")).splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("    ")]
    assert [command[:2] for command in commands] == [
        [".venv/bin/python", "examples/evaluate.py"],
        [".venv/bin/python", "examples/predict.py"],
        [".venv/bin/python", "examples/train_cityscapes.py"],
    ]
    assert commands[0][2] == "runs/a b"
