"""Processes that end: each under a deadline, with all that it prints in a log.

At the deadline the process group gets SIGINT, so that a program can write down what it has; after
GRACE seconds, whatever is left of the group gets SIGKILL. The output goes straight into the file,
not through a pipe: a program that hangs cannot block its reader, and a machine that is switched
off leaves what was printed.

This file needs the standard library alone: gpu.py imports it before fcnseg is built.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GRACE = 10.0  # seconds between SIGINT and SIGKILL
STUCK = 1.0  # seconds after SIGKILL, for a process that waits for a driver
POLL = 0.1
LARGEST_LOG = 4 << 20  # bytes that one call of run may print


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a process that imports the benchmarks."""
    path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), **(extra or {})}


def write_at_once(path: Path, text: str) -> None:
    """Or not at all: who is ended in the middle of it leaves the file as it was."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without reaping it, so that its group keeps its number."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, options) is not None


def _send(process: subprocess.Popen[bytes], number: int, whole_group: bool) -> None:
    """To a process that was not reaped yet."""
    # nothing but the ended process is left: no such process, or on macOS no permission
    with contextlib.suppress(ProcessLookupError, PermissionError):
        (os.killpg if whole_group else os.kill)(process.pid, number)


class _Log:
    """What the process appends to a file."""

    def __init__(self, path: Path, repeat: bool) -> None:
        self.reader = path.open("rb")
        self.repeat = repeat
        self.start = self.reader.seek(0, os.SEEK_END)

    def follow(self) -> int:
        """The bytes so far; repeats the new ones on stdout."""
        text = self.reader.read()
        if text and self.repeat:
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
        return self.reader.tell() - self.start


def run(
    command: Sequence[str],
    limit: float,
    *,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    repeat: bool = True,
    grace: float = GRACE,
    group: bool = True,
    give_up: Callable[[], str | None] = lambda: None,
) -> str | None:
    """Why the command failed, or None. It lasts at most ``limit + grace + STUCK`` seconds.

    ``log``: the file that its output is appended to, and from there repeated on stdout if
    ``repeat``. None: the output goes where this process's goes. ``give_up`` is asked every tenth of
    a second and may end the process early, with a reason.

    ``group``: the command leads a process group of its own, of which nobody survives the call, nor
    an exception in it. Without, it stays in the group of this process, for a deadline around both.
    """
    stream = None if log is None else log.open("ab")
    output = None if log is None else _Log(log, repeat)
    try:
        # Never a session of its own: who ends the session ends this too.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=None if stream is None else subprocess.STDOUT,
            process_group=0 if group else None,
        )
    except OSError as error:
        return f"{command[0]} does not start: {error.strerror}"
    finally:
        if stream is not None:
            stream.close()
    end = time.monotonic() + limit
    reason = None
    try:
        while not has_ended(process) and reason is None:
            time.sleep(POLL)
            if output is not None and output.follow() > LARGEST_LOG:
                reason = f"more than {LARGEST_LOG >> 20} MB of output"
            if time.monotonic() >= end:
                reason = f"no end after {limit:.0f} s"
            reason = reason or give_up()
    finally:
        if not has_ended(process):
            _send(process, signal.SIGINT, group)
            end = time.monotonic() + grace
            while not has_ended(process) and time.monotonic() < end:
                time.sleep(POLL)
        _send(process, signal.SIGKILL, group)
        try:
            code = process.wait(timeout=STUCK)
        except subprocess.TimeoutExpired:  # a driver holds it: nobody can end it
            code, reason = None, f"{reason}, and SIGKILL does not end it"
        if output is not None:
            output.follow()
            output.reader.close()
    if reason is None and code:
        reason = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return reason
